"""Readers: one process loads what another one replaces all the time."""

import time
from collections import Counter
from pathlib import Path
from typing import Any

from experiments.common.faults.trees import flat, hush, net, processes
from tern_jax.checkpoint import Checkpointer, load_packed, save_packed


def write(folder: str, ready: Any, stop: Any) -> None:
  """Replaces a checkpoint and adds steps to a run, until told to stop."""
  hush()
  nets = net(0), net(1)
  step = 0
  with Checkpointer(f"{folder}/run", keep=1) as run:
    while not stop.is_set():
      tree = nets[step % 2]
      run.save(step, {}, tree)
      save_packed(f"{folder}/net", tree, overwrite=True)
      ready.set()
      step += 1


def readers(seconds: int, seed: int, folder: Path) -> Counter[str]:
  """Loads for so long; returns how often, all of them right."""
  del seed
  context = processes()
  ready, stop = context.Event(), context.Event()
  writer = context.Process(target=write, args=(str(folder), ready, stop))
  writer.start()
  wanted = [flat(net(0)), flat(net(1))]
  counts: Counter[str] = Counter()
  seen = dict.fromkeys(("net", "run"), -1)
  try:
    assert ready.wait(300), "the writer does not start"
    end = time.monotonic() + seconds
    while time.monotonic() < end:
      for name in seen:
        found = flat(load_packed(folder / name))
        assert found in wanted, f"{name} is a mixture of two checkpoints"
        counts[f"{name} loaded"] += 1
        which = wanted.index(found)
        counts[f"{name} replaced"] += which != seen[name]
        seen[name] = which
  finally:
    stop.set()
    writer.join()
  assert writer.exitcode == 0, "the writer failed"
  return counts
