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
  planes    save          1    0.065       0.0649      1.7     0.41
  planes    load          1    0.061       0.0608      2.3     0.55
  planes    save          3    0.065       0.0217      4.3     0.34
  planes    load          3    0.067       0.0222      5.5     0.43
  planes    save         10    0.093       0.0093      9.6     0.52
  planes    load         10    0.105       0.0105     12.3     0.67
  planes    save         30    0.131       0.0044     20.2     0.86
  planes    load         30    0.157       0.0052     21.1     0.90
  planes    save        100    0.240       0.0024     54.6     1.33
  planes    load        100    0.325       0.0032     42.0     1.02
  entropy   save          1    0.062       0.0622      4.1     0.97
  entropy   load          1    0.076       0.0758      5.6     1.31
  entropy   save          3    0.073       0.0244      8.6     0.68
  entropy   load          3    0.084       0.0281     11.6     0.91
  entropy   save         10    0.192       0.0192     12.5     0.68
  entropy   load         10    0.218       0.0218     19.7     1.06
  entropy   save         30    0.388       0.0129     21.9     0.93
  entropy   load         30    0.488       0.0163     26.3     1.12
  entropy   save        100    0.729       0.0073     55.6     1.36
  entropy   load        100    1.397       0.0140     49.3     1.20

The memory that the allocator keeps for itself differs between runs: of seeds 1
to 5, with jax 0.10 and 0.12, saves of 100 million weights took 1.10 to 1.30 of
the bound as planes and 1.27 to 1.41 at the entropy, loads 1.00 to 1.14 and 1.08
to 1.21. The packed tree and its coded bytes are 1.07 of that; the rest of the
largest save is what two threads keep that code a million weights at a time.
"""

import dataclasses
import json
import pathlib
import subprocess
import sys
import tempfile
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from experiments.common import errors
from tern_jax.checkpoint import CODECS, load_packed, save_packed
from tern_jax.storage.packed import PackedTernary

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
    shape = rows // 8, columns
    # Apart: a view of both would keep what is drawn for the signs, too.
    nonzero: Any = rng.integers(0, 256, shape, np.uint8)
    sign: Any = nonzero & rng.integers(0, 256, shape, np.uint8)
    tree[f"{len(tree)}"] = PackedTernary(
      nonzero, sign, one, one, (rows, columns), 0
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
  with errors.explained():
    main(tyro.cli(Options))
