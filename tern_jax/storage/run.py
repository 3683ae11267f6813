"""A training run, saved step by step and resumed bit for bit."""

import contextlib
import functools
import operator
import secrets
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import jax

from tern_jax.core.types import PyTree
from tern_jax.storage import checkpoint, codecs, places, staging, steps
from tern_jax.storage.describe import changes, is_lasting, text_of
from tern_jax.storage.leaves import (
  CheckpointError,
  Json,
  PathLike,
)
from tern_jax.storage.parts import (
  Contents,
  check_readable,
  compressible,
  contents_of,
  parts_of,
)
from tern_jax.storage.reading import load
from tern_jax.storage.spec import json_value, number
from tern_jax.storage.tensors import lent, ocp, saving

_MODES = ("max", "min")


class Checkpointer(contextlib.AbstractContextManager["Checkpointer"]):
  """Saves a training run step by step, and resumes it bit for bit.

  Every step carries the resumable state and the packed weights, so that any
  step can be deployed by `load_packed` without the training code. A step
  appears whole or not at all; an interrupted save is ignored. Older steps are
  deleted once the new one has been found readable, and is on the disk. From its
  first save until `close`, no other process can save to the directory; in a
  bucket nothing keeps it from that.

  Args:
    directory: of the run, made if it does not exist, or gs://bucket/path; a
      step is a folder in it.
    save_interval: steps between saves; `save` skips the others.
    keep: number of latest steps to keep, None for all.
    keep_every: steps that are multiples of it are kept permanently.
    keep_best: number of steps to keep because their metric is the best so far,
      beside those that `keep` and `keep_every` keep.
    best_mode: whether the best metric is the "max" or the "min".
    describe: what the run is made of, by name, such as `{"optimizer": tx,
      "method": tern}`. Each step records it as text: a string as it is, an
      optax transformation by its functions and what they hold, all else by its
      repr, but for what differs from process to process. `restore` warns of
      what is no longer the same.

  Raises:
    ValueError: `save_interval`, `keep`, `keep_every` or `keep_best` below 1, or
      an unknown `best_mode`.
    CheckpointError: the directory cannot be made or read.

  >>> import tempfile, jax.numpy as jnp
  >>> state = {"w": jnp.arange(3.0)}
  >>> with (
  ...   tempfile.TemporaryDirectory() as directory,
  ...   Checkpointer(directory, save_interval=10) as run,
  ... ):
  ...   saved = [i for i in range(25) if run.save(i, state, {})]
  ...   restored, extra, step = run.restore(like=state)
  >>> saved, restored["w"].tolist(), step
  ([0, 10, 20], [0.0, 1.0, 2.0], 20)
  """

  def __init__(
    self,
    directory: PathLike,
    *,
    save_interval: int = 1,
    keep: int | None = None,
    keep_every: int | None = None,
    keep_best: int | None = None,
    best_mode: Literal["max", "min"] = "max",
    describe: Mapping[str, object] | None = None,
  ):
    given = {"save_interval": save_interval, "keep": keep}
    given |= {"keep_every": keep_every, "keep_best": keep_best}
    for name, value in given.items():
      if value is not None and value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}.")
    if best_mode not in _MODES:
      raise ValueError(f"best_mode must be one of {_MODES}, got {best_mode!r}.")
    self.directory = places.absolute(directory)
    self._interval = save_interval
    self._kept = steps.Kept(keep, keep_every, keep_best, best_mode)
    described = (describe or {}).items()
    self._described = {name: text_of(value) for name, value in described}
    self._steps = steps.Steps(self.directory)
    #: The run that steps are saved for, once it is known.
    self._id: str | None = None
    #: What made the weights of the step that was restored, until the next save.
    self._method: str | None = None
    #: Steps that `restore` found damaged, or none of this run.
    self._refused: set[int] = set()
    with places.explained("open", self.directory):
      staging.check_name(self.directory)
      staging.make(self.directory)
    #: The step that is being saved, and what waits for it.
    self._saving: tuple[places.Place, Callable[[], None]] | None = None
    self._lock: contextlib.ExitStack | None = None

  def save(
    self,
    step: int,
    state: PyTree,
    packed: PyTree,
    *,
    extra: object = None,
    method: object = None,
    metric: float | None = None,
    force: bool = False,
    wait: bool = True,
  ) -> bool:
    """Saves one step, if it is due; returns whether it was saved now.

    Steps that `restore` refused are in the way of those that follow: they are
    renamed, to `30.refused` for instance.

    Args:
      step: number of the step, not below that of a saved step.
      state: pytree of arrays to resume from; typed PRNG keys are welcome.
      packed: pytree with `PackedTernary` leaves, as for `save_packed`.
      extra: JSON value, such as the position of the data iterator; scalars of
        NumPy and JAX are numbers. It comes back as JSON has it: tuples as
        lists, keys as strings. NaN and infinity come back, too.
      method: what made the packed weights; its repr is kept in the spec. None:
        the "method" of `describe`.
      metric: what `keep_best` and `best_step` compare, such as the validation
        accuracy. None and NaN are never the best.
      force: save although the step is not a multiple of the interval.
      wait: return once the step is on disk. False: once all arrays are copied,
        so that they can be donated or changed; what goes wrong after that is
        raised by the next save that is due, `wait`, `restore` or `close`.

    Raises:
      TypeError: a leaf is no array, `extra` is no JSON value, or `metric` is no
        number.
      ValueError: the step is negative.
      CheckpointError: a later step exists, or another process saves to this
        directory, or the step cannot be written, or the one before could not.
    """
    step = operator.index(step)
    if step < 0:
      raise ValueError(f"step must be at least 0, got {step}.")
    due = force or step % self._interval == 0
    if due:
      self.wait()
    path = self.directory / str(step)
    if step == self._check_later(step) or not due:
      return False
    self._compare(method)
    method = self._described.get("method") if method is None else method
    facts = {
      "extra": json_value(extra, "extra"),
      "step": step,
      "run": self._named(),
      "metric": None if metric is None else number(metric, "metric"),
      "describe": self._described,
    }
    trees = {"state": state, "packed": packed}
    parts = parts_of(trees, codecs.PLANES, method, **facts)
    with places.explained("save", path):
      places.lead(lambda: self._prepare(step))
      staging.count_alike()
    self._refused = set()  # They have other names now.
    self._saving = path, self._begin(path, parts, wait)
    if wait:
      self.wait()
    return True

  def wait(self) -> None:
    """Returns once the last save is on disk, or raises a CheckpointError."""
    if self._saving:
      (path, finish), self._saving = self._saving, None
      with self._cleaned(path):
        places.together(finish)

  def close(self) -> None:
    """Finishes the last save, as `wait`; then other processes can save."""
    with self._lock or contextlib.nullcontext():
      self._lock = None
      self.wait()

  def restore(
    self,
    like: PyTree,
    step: int | None = None,
    *,
    partial: bool = False,
    max_bytes: int | None = None,
  ) -> tuple[PyTree, Any, int]:
    """Restores a step, or a part of its state, as (state, extra, step).

    Without a step it is the latest that is whole: it warns of later ones that
    are damaged, renamed, or of another run. It also warns of what `describe`
    tells otherwise than the step.

    Args:
      like: state, or its shapes, of the structure, shapes, dtypes and
        shardings to restore; any number of devices, whatever it was saved on.
      step: number of the step, None for the latest.
      partial: `like` has only some of the leaves, at their paths in the state,
        such as `{"params": params}`; no others are read.
      max_bytes: as in `load_packed`.

    Raises:
      CheckpointError: no such step, damaged, or of other paths, shapes or
        dtypes than `like`; or the last save could not be written.
    """
    self.wait()
    faults: steps.Faults = {}

    def loaded(step: int) -> tuple[PyTree, Json]:
      folder, spec = self._steps.opened(step, self._id)
      state = load(folder, "state", spec, like, partial, max_bytes)
      return state, spec

    if step is None and jax.process_count() > 1:
      step, faults = self._agreed(max_bytes)
    if step is None:
      step, (state, spec), faults = self._steps.latest(loaded)
      self._refused = {*faults}
    else:
      chosen = operator.index(step)
      place = self.directory / str(chosen)
      state, spec = places.again(place, lambda: loaded(chosen))
    self._id = (self._steps.facts(step) or {}).get("run")
    self._method = spec.get("method")
    for later, fault in faults.items():
      told = f"step {later} is passed over, step {step} is restored: {fault}"
      warnings.warn(told, stacklevel=2)
    for told in changes(spec.get("describe"), self._described):
      warnings.warn(told, stacklevel=2)
    return state, spec.get("extra"), step

  def latest_step(self) -> int | None:
    """Returns the number of the latest saved step, None if there is none.

    It is none of those that `restore` has refused.
    """
    found = places.steps(self.directory)
    return next((n for n in found if n not in self._refused), None)

  def best_step(self) -> int | None:
    """Returns the number of the step of the best metric, None without one.

    Of equal ones it is the first.
    """
    best = self._steps.best(self._kept.mode)
    return next((n for n in best if n not in self._refused), None)

  def __exit__(self, *_: object) -> None:
    self.close()

  def _named(self) -> str:
    """Returns the run that steps are saved for, drawn at the first save."""
    if self._id is None:
      name = self._steps.run() or secrets.token_hex(steps.ID_BYTES)
      self._id = places.shared(bytes.fromhex(name)).hex()
    return self._id

  def _prepare(self, step: int) -> None:
    """Makes sure that this is the only writer, and that it can write."""
    path = self.directory / str(step)
    if not self._lock:
      lock = contextlib.ExitStack()
      lock.enter_context(staging.locked(self.directory, self.directory))
      self._lock = lock
      for leftover in self.directory.glob("*"):
        if places.is_unfinished(leftover):
          staging.remove(leftover)
      # Another process may have gone on until now.
      if self._check_later(step) == step:
        raise CheckpointError(f"{path} is saved already.")
    for refused in places.steps(self.directory, damaged=True):
      if refused >= step or refused in self._refused:
        staging.set_aside(self.directory / str(refused))
    if places.taken(path):
      raise CheckpointError(f"{path} is in the way, and no step: move it away.")
    if places.in_bucket(path):
      staging.probe(path)
    else:
      staging.make(staging.stage_of(path))

  def _check_later(self, step: int) -> int | None:
    """Returns the latest step; raises if it is a later one."""
    latest = self.latest_step()
    if latest is not None and step < latest:
      raise CheckpointError(
        f"{self.directory / str(step)}: step {latest} is saved already: save "
        "later steps, or go on from an older step in another directory."
      )
    return latest

  def _begin(
    self, path: places.Place, parts: Json, wait: bool
  ) -> Callable[[], None]:
    """Begins to save; returns what ends it, on every process."""
    contents, fresh = contents_of(parts), path
    compress = saving(compressible(parts, codecs.PLANES))
    with self._cleaned(path), compress, contextlib.ExitStack() as stack:
      if not places.in_bucket(path):
        folder = stack.enter_context(staging.plain(staging.stage_of(path)))
        fresh = folder / "new"
      parts = lent(parts) if wait else parts
      begun = ocp.save_checkpointables_async(fresh, parts)
      writing = stack.pop_all()

    def finish() -> None:
      with writing:
        begun.result()
      if jax.process_index() == 0:
        self._publish(path, contents)

    return finish if wait else staging.in_background(finish)

  def _publish(self, path: places.Place, contents: Contents) -> None:
    """Makes a step appear, and then deletes those that are not to be kept."""
    check = functools.partial(check_readable, contents=contents)
    staging.publish_step(path, check)
    for old in self._steps.stale(self._kept):
      staging.discard(self.directory / str(old))

  @contextlib.contextmanager
  def _cleaned(self, path: places.Place) -> Iterator[None]:
    """Leaves nothing of a save that fails inside."""
    try:
      with places.explained("save", path):
        yield
    except CheckpointError:
      for leftover in (path, staging.stage_of(path)):
        if places.is_unfinished(leftover):
          staging.remove(leftover)
      raise

  def _agreed(self, max_bytes: int | None) -> tuple[int, steps.Faults]:
    """Returns the latest step that is whole for every process.

    All of it is read before: a process that finds damage while the others have
    gone on would leave them waiting for it.
    """
    step, faults = 0, {}

    def look() -> None:
      nonlocal step, faults
      step, _, faults = self._steps.latest(
        lambda n: checkpoint.verify(
          *self._steps.opened(n, self._id), "state", max_bytes
        )
      )

    places.together(look)
    step = min(places.gathered(step))
    later = places.steps(self.directory, damaged=True)
    self._refused = {n for n in later if n > step}
    return step, faults

  def _compare(self, method: object) -> None:
    """Warns if what made the weights is not what made those restored."""
    was, self._method = self._method, None
    if method is None or "method" in self._described:
      return
    now = method if isinstance(method, str) else repr(method)
    if isinstance(was, str) and is_lasting(was + now):
      for told in changes({"method": was}, {"method": now}):
        warnings.warn(told, stacklevel=3)
