"""Kills: a training that saves is killed at a random moment, and resumed."""

import contextlib
import random
import time
from collections import Counter
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from experiments.common.faults.trees import flat, hush, processes
from tern_jax.checkpoint import (
  Checkpointer,
  CheckpointError,
  load_packed,
  save_packed,
)
from tern_jax.core.containers import Ternary
from tern_jax.storage.packed import pack


@jax.jit
def advance(state: dict[str, jax.Array]) -> dict[str, jax.Array]:
  """Does a step of training."""
  x = jax.random.normal(jax.random.key(state["step"]), (16, 64))
  w = state["w"]
  m = 0.9 * state["m"] + x.T @ (jnp.tanh(x @ w) - x[:, :8])
  return {"step": state["step"] + 1, "w": w - 0.01 * m, "m": m}


def begin() -> dict[str, jax.Array]:
  """Returns the state of step 0."""
  w = jax.random.normal(jax.random.key(0), (64, 8))
  return {"step": jnp.array(0, jnp.int32), "w": w, "m": jnp.zeros_like(w)}


def packed_of(state: dict[str, jax.Array]) -> dict[str, Any]:
  """Returns the packed weights of a state."""
  one = jnp.ones(())
  codes = jnp.sign(jnp.round(state["w"])).astype(jnp.int8)
  return {"w": pack(Ternary(codes, one, one)), "step": state["step"]}


def train(folder: str, reports: Any) -> None:
  """Trains until killed; reports the steps that are on disk."""
  hush()
  state = begin()
  with Checkpointer(f"{folder}/run", keep=2, keep_every=10) as run:
    if run.latest_step() is not None:
      state = run.restore(state)[0]
    packed_of(advance(state))  # compiles
    reports.send(0)
    while True:
      state = advance(state)
      step, packed = int(state["step"]), packed_of(state)
      run.save(step, state, packed, extra=step, wait=step % 2 == 0)
      save_packed(f"{folder}/net", packed, overwrite=True)
      if step % 2 == 0:
        reports.send(step)


def kills(times: int, seed: int, folder: Path) -> Counter[str]:
  """Kills trainings; returns what they were doing, and the steps checked."""
  context = processes()
  rng, counts, states = random.Random(seed), Counter(), [begin()]
  saved = 0
  for _ in range(times):
    reports, theirs = context.Pipe(duplex=False)
    process = context.Process(target=train, args=(str(folder), theirs))
    process.start()
    theirs.close()
    assert reports.poll(300), "the training does not start"
    time.sleep(rng.uniform(0, 1))
    process.kill()
    process.join()
    with contextlib.suppress(EOFError):
      while True:
        saved = max(saved, reports.recv())
    counts["kills"] += 1
    counts["during a step"] += any(folder.glob("run/*-tmp"))
    counts["during a replacement"] += (folder / ".net.new").exists()
    steps = [int(x.name) for x in folder.glob("run/*") if x.name.isdecimal()]
    assert max(steps, default=0) >= saved, f"step {saved} is lost"
    if not steps:
      continue
    while len(states) <= max(steps):
      states.append(advance(states[-1]))
    run, last = Checkpointer(folder / "run", keep=2, keep_every=10), max(steps)
    assert run.restore(begin())[2] == last
    for step in steps:
      try:
        state, extra, found = run.restore(begin(), step)
        packed = load_packed(folder / "run" / str(step))
      except CheckpointError:
        # Only what was being deleted may be there in part.
        deleted = step < last - 1 and step % 10
        assert deleted, f"step {step} is damaged"
        counts["during a deletion"] += 1
        continue
      assert found == extra == step
      assert flat(state) == flat(states[step]), f"step {step} is another"
      assert flat(packed) == flat(packed_of(states[step]))
      counts["steps right"] += 1
    run.close()
    if saved:
      packed = load_packed(folder / "net")
      step = int(packed["step"])
      # A step that is saved in the background may be lost.
      assert saved <= step <= last + 1, f"step {step} of {saved} to {last}"
      if step == len(states):
        states.append(advance(states[-1]))
      assert flat(packed) == flat(packed_of(states[step]))
      counts["replacements right"] += 1
  counts["last step"] = len(states) - 1
  return counts
