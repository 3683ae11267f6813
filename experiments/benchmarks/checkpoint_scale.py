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
  planes    save          1    0.349       0.3492      1.1     0.26
  planes    load          1    0.186       0.1859      1.0     0.23
  planes    save          3    0.162       0.0541      2.8     0.22
  planes    load          3    0.105       0.0350      2.7     0.21
  planes    save         10    0.099       0.0099      6.3     0.34
  planes    load         10    0.074       0.0074      8.1     0.44
  planes    save         30    0.074       0.0025     11.4     0.49
  planes    load         30    0.115       0.0038     14.6     0.62
  planes    save        100    0.316       0.0032     52.5     1.28
  planes    load        100    0.226       0.0023     43.8     1.07
  entropy   save          1    0.062       0.0617      0.2     0.05
  entropy   load          1    0.102       0.1016      0.7     0.18
  entropy   save          3    0.063       0.0210      6.8     0.54
  entropy   load          3    0.136       0.0453      6.5     0.51
  entropy   save         10    0.270       0.0270      7.7     0.42
  entropy   load         10    0.284       0.0284     13.9     0.75
  entropy   save         30    0.609       0.0203     12.4     0.53
  entropy   load         30    0.859       0.0286     13.4     0.57
  entropy   save        100    1.315       0.0131     55.0     1.34
  entropy   load        100    4.638       0.0464     45.0     1.10

The memory that the allocator keeps for itself differs between runs: the largest
save at the entropy took 1.34 to 1.41 of the bound in eleven of them, one with
jax 0.10.2 and ten with 0.12. The packed tree and its coded bytes are 1.07 of
that; the rest is what two threads keep that code a million weights at a time.
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
