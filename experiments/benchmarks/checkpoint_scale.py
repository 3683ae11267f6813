"""What a checkpoint takes as it grows: time and memory.

    python -m experiments.benchmarks.checkpoint_scale

Each save and each load is a process of its own, which first saves and loads a
tiny tree: what the packages themselves take is no part of the figures. Weights
are random, half of them zero, in leaves of 4 million: 16 MB each as float32.
A peak is how far the resident memory of the process grows, the packed tree
itself included; it is compared with the bytes of the packed tree and of one
dense leaf. Seconds are those of the clock.

Last output, on 2 busy CPU cores of a shared machine, jax 0.10.2:

  codec     task  M weights  seconds  s/M weights  peak MB  / bound
  planes    save          1    0.238       0.2380      1.1     0.26
  planes    load          1    0.276       0.2763      0.8     0.18
  planes    save          3    0.218       0.0726      2.6     0.21
  planes    load          3    0.439       0.1463      2.7     0.21
  planes    save         10    0.378       0.0378      5.4     0.29
  planes    load         10    0.216       0.0216      9.0     0.48
  planes    save         30    0.438       0.0146     11.2     0.48
  planes    load         30    0.371       0.0124     14.4     0.61
  planes    save        100    0.920       0.0092     51.3     1.25
  planes    load        100    0.627       0.0063     48.2     1.17
  entropy   save          1    0.339       0.3385      3.9     0.91
  entropy   load          1    0.262       0.2617      4.5     1.05
  entropy   save          3    0.516       0.1720     12.7     1.00
  entropy   load          3    0.413       0.1377     18.0     1.41
  entropy   save         10    0.523       0.0523     14.5     0.78
  entropy   load         10    0.897       0.0897     23.0     1.24
  entropy   save         30    1.328       0.0443     25.7     1.09
  entropy   load         30    2.155       0.0718     26.4     1.12
  entropy   save        100    3.562       0.0356     68.6     1.67
  entropy   load        100    5.882       0.0588     56.7     1.38

The memory that the allocator keeps for itself differs between runs: the largest
save at the entropy took 1.25 to 1.67 of the bound in four of them.
"""

import dataclasses
import json
import pathlib
import subprocess
import sys
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from tern_jax.checkpoint import CODECS, load_packed, save_packed
from tern_jax.packed import PackedTernary

#: Weights of a leaf, but the last, which has the rest.
LEAF = 4_000_000
ROWS = 2_000


@dataclasses.dataclass
class Options:
  """Command line of the benchmark.

  Attributes:
    millions: weights of the trees.
    codecs: how planes are stored.
    seed: of the weights.
    task: what a process of the benchmark does, "save" or "load"; "" for all.
    path: of the checkpoint of a task.
  """

  millions: tuple[float, ...] = (1, 3, 10, 30, 100)
  codecs: tuple[str, ...] = CODECS
  seed: int = 0
  task: str = ""
  path: str = ""


def make(weights: int, seed: int) -> dict[str, PackedTernary]:
  """Returns random packed weights, made without dense ones."""
  rng, tree = np.random.default_rng(seed), {}
  one = jnp.ones(())
  while weights > 0:
    rows, columns = ROWS, min(LEAF, weights) // ROWS
    nonzero, sign = rng.integers(0, 256, (2, rows // 8, columns), np.uint8)
    tree[f"{len(tree)}"] = PackedTernary(
      nonzero, nonzero & sign, one, one, (rows, columns), 0
    )
    weights -= rows * columns
  return tree


def memory(name: str) -> int:
  """Returns the memory of this process in bytes: VmRSS, or VmHWM, its peak."""
  lines = pathlib.Path("/proc/self/status").read_text().splitlines()
  (line,) = (line for line in lines if line.startswith(name))
  return 1024 * int(line.split()[1])


def work(options: Options) -> None:
  """Does one task and prints what it took."""
  (codec,), (millions,) = options.codecs, options.millions
  with tempfile.TemporaryDirectory() as folder:
    save_packed(f"{folder}/net", make(2 * ROWS, 0), codec=codec)
    load_packed(f"{folder}/net")
  pathlib.Path("/proc/self/clear_refs").write_text("5")  # forgets the peak
  before = memory("VmRSS")
  save = options.task == "save"
  tree = make(round(1e6 * millions), options.seed) if save else None
  start = time.perf_counter()
  if save:
    save_packed(options.path, tree, codec=codec)
  else:
    tree = load_packed(options.path)
  seconds = time.perf_counter() - start
  grown = memory("VmHWM") - before
  size = sum(x.nbytes for x in jax.tree.leaves(tree))
  print(json.dumps({"seconds": seconds, "peak": grown, "bytes": size}))


def measure(options: Options) -> list[dict[str, float]]:
  """Runs all tasks, each in its process; prints and returns a row for each."""
  print(f"seed {options.seed}")
  print("codec     task  M weights  seconds  s/M weights  peak MB  / bound")
  rows = []
  for codec in options.codecs:
    for millions in options.millions:
      with tempfile.TemporaryDirectory() as folder:
        for task in ("save", "load"):
          command = [sys.executable, "-m", __spec__.name]
          command += ["--codecs", codec, "--millions", str(millions)]
          command += ["--task", task, "--path", f"{folder}/net"]
          command += ["--seed", str(options.seed)]
          out = subprocess.check_output(command, text=True)
          row = json.loads(out.splitlines()[-1])
          leaf = 4 * min(LEAF, round(1e6 * millions))
          row |= {"bound": row["peak"] / (row["bytes"] + leaf)}
          rows.append(row)
          print(
            f"{codec:<9} {task:<5} {millions:>9g} {row['seconds']:>8.3f}"
            f" {row['seconds'] / millions:>12.4f} {row['peak'] / 1e6:>8.1f}"
            f" {row['bound']:>8.2f}",
            flush=True,
          )
  return rows


def main(options: Options) -> None:
  """Runs the benchmark, or one task of it."""
  if options.task:
    work(options)
  else:
    measure(options)


if __name__ == "__main__":
  jax.config.update("jax_platforms", "cpu")
  main(tyro.cli(Options))
