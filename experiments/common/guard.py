"""Long runs that end before their end: by a signal, or by a NaN."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import multihost_utils

from experiments.common.errors import InterruptedRunError
from tern_jax.checkpoint import Place
from tern_jax.core.paths import path_str

#: Steps from one question of all processes for the signals of all to the next.
COMPARED_EVERY = 8


@contextlib.contextmanager
def termination() -> Iterator[Callable[[int], bool]]:
  """Turns SIGTERM, as a preempted machine sends it, into a question.

  Yields:
    `asked(step)`: whether the run shall end after this step. All processes get
    the same answer at the same step, so several compare notes at some only.

  Raises:
    InterruptedRunError: on leaving, SIGTERM came too late for a question.
  """
  if threading.current_thread() is not threading.main_thread():
    # Only a main thread may handle signals.
    yield lambda _: False
    return
  came = threading.Event()

  def came_to_any() -> bool:
    if jax.process_count() == 1:
      return came.is_set()
    return bool(multihost_utils.process_allgather(came.is_set()).any())

  every = 1 if jax.process_count() == 1 else COMPARED_EVERY
  before = signal.signal(signal.SIGTERM, lambda *_: came.set())
  try:
    yield lambda step: step % every == 0 and came_to_any()
    if came_to_any():
      raise InterruptedRunError(
        "SIGTERM: stopped between two phases; the same command goes on there."
      )
  finally:
    signal.signal(signal.SIGTERM, before)


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
