"""The steps of a run: which are believed, and which are kept.

The spec of a step names it and its run. A folder that was renamed, or that
comes from another run, is not what its name says, and is refused. Steps that an
older version saved name neither; they are believed.
"""

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Callable
from typing import Literal, TypeVar

from tern_jax.storage import places, spec
from tern_jax.storage.leaves import (
  CheckpointError,
  Json,
  MisfitError,
  PathLike,
  printable,
)
from tern_jax.storage.places import Place

T = TypeVar("T")

#: What is wrong with steps.
Faults = dict[int, CheckpointError]
#: Bytes of the name of a run.
ID_BYTES = 8
_ID = re.compile(f"[0-9a-f]{{{2 * ID_BYTES}}}")
# How many of the earliest steps, and of the latest, tell which run it is.
_ASKED = 8
# What keeps a step from being read that may be whole all the same.
_NO_DAMAGE = (MemoryError, PermissionError)
# What the spec of a step has and that of `save_packed` has not.
_FACTS = {"step": int, "run": str, "metric": float}


def opened(path: PathLike) -> tuple[Place, Json]:
  """Returns the folder that `places.locate` finds, and its spec.

  Raises:
    CheckpointError: nothing there, damaged, from a newer version, or the latest
      step of a run is another step, or one of another run.
  """
  folder = places.locate(path)
  found = spec.read(folder)
  step = places.step_of(folder)
  if step is not None and folder.parent == places.absolute(path):
    check(folder, found, Steps(folder.parent).run())
  return folder, found


def check(folder: Place, facts: Json, run: str | None) -> None:
  """Raises unless a step is the one that its folder says, of this run."""
  step = places.step_of(folder)
  if facts.get("step", step) != step:
    named = printable(facts["step"])
    fault = f"it is step {named}, renamed or copied: name it {named} again"
  elif run is not None and facts.get("run", run) != run:
    other = printable(facts["run"])
    fault = f"it is of run {other}, not of {run} as others: move it away"
  else:
    return
  raise CheckpointError(f"{folder} is no step of this run: {fault}.")


@dataclasses.dataclass(frozen=True)
class Kept:
  """Which steps of a run are kept.

  Args:
    latest: how many of the latest, None for all.
    every: those that are multiples of it, None for none.
    best: how many of the best.
    mode: whether the best metric is the largest or the smallest.
  """

  latest: int | None
  every: int | None
  best: int | None
  mode: Literal["max", "min"]


class Steps:
  """The steps of a run, and what their specs say.

  Args:
    directory: of the run.
  """

  def __init__(self, directory: Place):
    self._directory = directory
    # By step: what tells the folder from others of its name, and its facts.
    self._known: dict[int, tuple[object, Json | None]] = {}

  def facts(self, step: int) -> Json | None:
    """Returns what the spec of a step says of it; None if it is damaged."""
    folder = self._directory / str(step)
    identity = places.identity(folder)
    if step not in self._known or self._known[step][0] != identity:
      try:
        found = spec.read(folder)
      except CheckpointError:
        facts = None
      else:
        told = _FACTS.items()
        facts = {k: found[k] for k, kind in told if type(found.get(k)) is kind}
        if not _ID.fullmatch(facts.get("run", "")):
          facts.pop("run", None)
      self._known[step] = identity, facts
    return self._known[step][1]

  def run(self) -> str | None:
    """Returns the run that most steps name, in a tie the one of the earliest.

    None if none of them names one.
    """
    numbers = sorted(places.steps(self._directory))
    asked = {*numbers[:_ASKED], *numbers[-_ASKED:]}
    named = ((n, self.facts(n) or {}) for n in sorted(asked))
    own = (x.get("run") for n, x in named if x.get("step") == n)
    runs = Counter(run for run in own if run)
    return next((name for name, _ in runs.most_common(1)), None)

  def opened(self, step: int, run: str | None) -> tuple[Place, Json]:
    """Returns the folder of a step of this run, and its spec."""
    folder = places.locate(self._directory / str(step))
    found = spec.read(folder)
    check(folder, found, run or self.run())
    return folder, found

  def latest(self, task: Callable[[int], T]) -> tuple[int, T, Faults]:
    """Returns the latest whole step, what a task reads of it, and the faults.

    The faults are those of later steps. Nothing but damage leads to an earlier
    step: not what an earlier one would not have, either.
    """

    def attempt() -> tuple[int, T, Faults]:
      faults: Faults = {}
      for step in places.steps(self._directory, damaged=True):
        try:
          return step, task(step), faults
        except CheckpointError as e:
          if isinstance(e, MisfitError) or isinstance(e.__cause__, _NO_DAMAGE):
            raise
          faults[step] = e
      for fault in faults.values():
        raise fault
      raise CheckpointError(f"{self._directory} holds no checkpoint: save one.")

    return places.again(self._directory, attempt, lambda x: bool(x[2]))

  def own(self, run: str | None) -> list[int]:
    """Returns the steps of a run, the latest first.

    Neither those that are of another, or renamed, nor those of which the spec
    is damaged. One that names no run is of this one.
    """
    return [
      step
      for step in places.steps(self._directory)
      if (facts := self.facts(step)) is not None
      and facts.get("step", step) == step
      and facts.get("run", run) == run
    ]

  def best(self, mode: Literal["max", "min"]) -> list[int]:
    """Returns the steps that have a metric, the best first.

    Of equal ones the earlier is the better. NaN is no metric.
    """
    sign, scores = {"max": -1, "min": 1}[mode], {}
    for step in self.own(self.run()):
      metric = (self.facts(step) or {}).get("metric", math.nan)
      if not math.isnan(metric):
        scores[step] = sign * metric, step
    return sorted(scores, key=scores.__getitem__)

  def stale(self, kept: Kept) -> list[int]:
    """Returns the steps that are not to be kept, the earliest first."""
    if kept.latest is None:
      return []
    own = self.own(self.run())
    stay = {*own[: kept.latest]}
    if kept.every is not None:
      stay |= {n for n in own if n % kept.every == 0}
    if kept.best is not None:
      stay |= {*self.best(kept.mode)[: kept.best]}
    return sorted({*own} - stay)
