"""Hostile files: each is loaded by a process of its own, which is measured."""

import random
import resource
import time
from collections import Counter
from pathlib import Path
from typing import Any

from experiments.common.faults import crafted
from experiments.common.faults.trees import hush, processes
from tern_jax.checkpoint import load_packed
from tern_jax.export import from_safetensors

#: Most seconds of CPU for a refusal, and after how many a process hangs.
SECONDS, HANGS = 1.0, 60.0
#: Bytes that a load may take whatever its file, and times the file's size.
FREE, TIMES = 64 << 20, 3


def load(path: Path) -> None:
  """Loads a checkpoint or a safetensors file."""
  (from_safetensors if path.suffix else load_packed)(path)


def try_to_load(usual: Path, path: Path, answers: Any) -> None:
  """Loads, and tells what came of it, the seconds, and the memory in bytes."""
  hush()
  load(usual)  # What is loaded or compiled once is not counted.
  before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  start = time.process_time()
  try:
    load(path)
    outcome = "loaded"
  except (ValueError, OSError) as error:
    outcome = f"refused in {len(str(error).splitlines())} lines"
  seconds = time.process_time() - start
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  answers.send((outcome, seconds, 1024 * (peak - before)))


def hostile(times: int, seed: int, folder: Path) -> Counter[str]:
  """Loads hostile files; returns how many were refused."""
  context = processes()
  files = list(crafted.files().items())
  random.Random(seed).shuffle(files)
  (folder / "usual").mkdir()
  usual = crafted.saved(folder / "usual")
  counts: Counter[str] = Counter()
  for i, (name, build) in enumerate(files[:times]):
    (place := folder / str(i)).mkdir()
    path = build(place)
    answers, theirs = context.Pipe(duplex=False)
    process = context.Process(target=try_to_load, args=(usual, path, theirs))
    process.start()
    theirs.close()
    try:
      assert answers.poll(HANGS), f"{name}: the process hangs"
      outcome, seconds, grown = answers.recv()
    except EOFError:
      process.join()
      raise AssertionError(f"{name}: died, {process.exitcode}") from None
    finally:
      process.kill()
      process.join()
    assert outcome == "refused in 1 lines", f"{name}: {outcome}"
    assert seconds < SECONDS, f"{name}: {seconds} s of CPU"
    # What a sparse file claims to have is not on the disk.
    size = sum(512 * x.lstat().st_blocks for x in place.rglob("*"))
    most = FREE + TIMES * size
    assert grown < most, f"{name}: {grown:,} bytes, {size:,} on disk"
    counts["refused"] += 1
    slowest = max(counts["slowest in ms"], round(1000 * seconds))
    counts["slowest in ms"] = slowest
    counts["most memory in MB"] = max(counts["most memory in MB"], grown >> 20)
  return counts
