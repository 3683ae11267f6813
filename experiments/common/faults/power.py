"""Power cuts: what is on the disk at a random moment.

A file system of its own, in an image whose journal is written only when asked,
is copied while a process that saves to it is stopped: what the copy lacks, a
power cut would lose. Needs root, and Linux with loop devices; elsewhere nothing
is cut.
"""

import contextlib
import itertools
import os
import random
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from experiments.common.faults.trees import flat, hush, net, processes
from tern_jax.checkpoint import Checkpointer, load_packed, save_packed

#: Seconds until ext4 writes its journal unasked.
_COMMIT = 3600


@contextlib.contextmanager
def mounted(image: Path, at: Path) -> Iterator[Path]:
  """Mounts an image of a file system."""
  at.mkdir(exist_ok=True)
  options = f"loop,commit={_COMMIT},noauto_da_alloc"
  subprocess.run(["mount", "-o", options, image, at], check=True)
  try:
    yield at
  finally:
    subprocess.run(["umount", "--lazy", at], check=True)


def can_mount(folder: Path) -> bool:
  """Whether this process may make and mount a file system."""
  if os.geteuid() != 0 or shutil.which("mkfs.ext4") is None:
    return False
  try:
    with mounted(make(folder / "trial"), folder / "mounted"):
      return True
  except subprocess.CalledProcessError:
    return False


def make(image: Path) -> Path:
  """Makes an image of an empty file system."""
  with image.open("wb") as file:
    file.truncate(64 << 20)
  subprocess.run(["mkfs.ext4", "-q", image], check=True)
  return image


def write(folder: str, reports: Any) -> None:
  """Replaces a checkpoint and adds steps to a run, until killed."""
  hush()
  with Checkpointer(f"{folder}/run", keep=1) as run:
    for i in itertools.count():
      tree = net(i)
      save_packed(f"{folder}/net", tree, overwrite=True)
      run.save(i, {"bias": tree["bias"]}, tree)
      reports.send(i)


def power(times: int, seed: int, folder: Path) -> Counter[str]:
  """Cuts the power at random moments; returns how often all was there."""
  counts: Counter[str] = Counter()
  if times and not can_mount(folder):
    counts["skipped: nothing can be mounted here"] = 1
    return counts
  rng, image, copy = random.Random(seed), folder / "image", folder / "copy"
  context = processes()
  with mounted(make(image), folder / "disk") as disk:
    reports, theirs = context.Pipe(duplex=False)
    writer = context.Process(target=write, args=(str(disk), theirs))
    writer.start()
    assert reports.poll(300), "the writer does not start"
    pid, saved = writer.pid or 0, -1
    try:
      for _ in range(times):
        time.sleep(rng.uniform(0, 0.5))
        os.kill(pid, signal.SIGSTOP)
        while reports.poll():
          saved = reports.recv()
        shutil.copyfile(image, copy)
        os.kill(pid, signal.SIGCONT)
        with mounted(copy, folder / "after") as after:
          check(after, saved)
        counts["right"] += 1
    finally:
      writer.kill()
      writer.join()
  counts["saves"] = saved + 1
  return counts


def check(after: Path, saved: int) -> None:
  """Raises unless what was saved last, or the next, is on a disk."""
  expected = (saved, saved + 1)
  found = flat(load_packed(after / "net"))
  assert found in [flat(net(i)) for i in expected], "the checkpoint is lost"
  with Checkpointer(after / "run") as run:
    state, _, step = run.restore({"bias": net(0)["bias"]})
  assert step in expected, f"step {saved} is lost, {step} is there"
  assert flat(state) == flat({"bias": net(step)["bias"]})
