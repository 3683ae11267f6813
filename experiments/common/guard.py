"""Long runs that end before their end: by a signal, or by a NaN."""

import contextlib
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from experiments.common import processes, terminal
from experiments.common.errors import (
  InterruptedRunError,
  command_line,
  watched,
)
from tern_jax.checkpoint import Place
from tern_jax.core.paths import path_str

#: Steps from one question of all processes for the signals of all to the next.
COMPARED_EVERY = 8

#: A machine that is taken away, Ctrl-C, and a terminal that is closed.
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


@contextlib.contextmanager
def termination() -> Iterator[Callable[[int], int]]:
  """Turns signals that ask a process to end into a question.

  A second Ctrl-C ends it at once.

  Yields:
    `asked(step)`: the number of the signal for which the run shall end after
    this step, else 0. All processes get the same answer at the same step, so
    several compare notes at some only.

  Raises:
    InterruptedRunError: on leaving, a signal came too late for a question.
  """
  if threading.current_thread() is not threading.main_thread():
    # Only a main thread may handle signals.
    yield lambda _: 0
    return
  came: list[int] = []

  def came_to_any() -> int:
    mine = came[0] if came else 0
    if processes.count() == 1:
      return mine
    return int(multihost_utils.process_allgather(np.int32(mine)).max())

  every = 1 if processes.count() == 1 else COMPARED_EVERY
  with _handled(came.append), watched(_tell):
    yield lambda step: came_to_any() if step % every == 0 else 0
    if number := came_to_any():
      raise stopped("between two phases", number)


def stopped(where: str, number: int) -> InterruptedRunError:
  """Returns the error that tells where a run stopped, and how it goes on.

  Args:
    where: the run is.
    number: of the signal for which it ends.
  """
  name = signal.Signals(number).name
  text = f"{name}: stopped {where}; to go on: {command_line()}"
  return InterruptedRunError(text, number)


def _tell() -> None:
  text = "SIGINT: ends with a checkpoint after this step; again: at once"
  terminal.say(text, sys.stderr)


@contextlib.contextmanager
def _handled(handle: Callable[[int], None]) -> Iterator[None]:
  """Handles all signals of `SIGNALS`, but for those that are ignored."""
  # Under nohup SIGHUP is, and in the background of a script SIGINT.
  before = {
    number: handler
    for number in SIGNALS
    if (handler := signal.getsignal(number)) not in (signal.SIG_IGN, None)
  }
  for number in before:
    signal.signal(number, lambda number, _: handle(number))
  try:
    yield
  finally:
    for number, handler in before.items():
      signal.signal(number, handler)


def not_finite(tree: Any) -> list[str]:
  """Returns the paths of the leaves that have a NaN or an infinity.

  >>> not_finite({"a": jnp.ones(2), "b": jnp.array([0.0, jnp.nan])})
  ['b']
  """
  floats = {
    path_str(path): jnp.isfinite(leaf).all()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    if jnp.issubdtype(leaf.dtype, jnp.inexact)
  }
  bad = [path for path, fine in jax.device_get(floats).items() if not fine]
  # What is trained before what follows from it.
  return sorted(bad, key=lambda path: not path.startswith("params/"))


def where_it_arose(
  step: Callable[[Any, Any], Any],
  state: Any,
  batches: Iterable[Any],
  steps: Iterable[int],
  saved: Place,
) -> str:
  """Repeats steps from the last good state, and tells what went wrong first.

  Args:
    step: the training step.
    state: of the last checkpoint.
    batches: those that followed it.
    steps: their numbers.
    saved: directory of the checkpoint.

  Returns:
    A message.
  """
  kept = f" The last good checkpoint is {saved}."
  # The batches never end.
  for n, batch in zip(steps, batches, strict=False):
    after, measured = step(state, batch)
    bad = not_finite(after)
    if bad:
      more = f" and {len(bad) - 5} more" if len(bad) > 5 else ""
      return (
        f"Step {n} is the first that is not finite: its loss is"
        f" {float(measured['loss']):.6g}, and after it there are NaNs or"
        f" infinities in {', '.join(bad[:5])}{more}; before it there are none."
        f"{kept} Take a smaller --learning-rate or --scale-learning-rate, in"
        " another --workdir."
      )
    state = after
  return f"A repetition of the steps was finite throughout.{kept}"
