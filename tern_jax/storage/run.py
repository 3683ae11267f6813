"""A training run, saved step by step and resumed bit for bit."""

import contextlib
import functools
import operator
from collections.abc import Iterator
from typing import Any

from tern_jax.core.types import PyTree
from tern_jax.storage import checkpoint, codecs, limits, places
from tern_jax.storage.leaves import CheckpointError, PathLike
from tern_jax.storage.tensors import context, lent, ocp
from tern_jax.storage.tensors import saving as saving_as


class Checkpointer(contextlib.AbstractContextManager["Checkpointer"]):
  """Saves a training run step by step, and resumes it bit for bit.

  Every step carries the resumable state and the packed weights, so that any
  step can be deployed by `load_packed` without the training code. A step
  appears whole or not at all; an interrupted save is ignored. From its first
  save until `close`, no other process can save to the directory; in a bucket
  nothing keeps it from that.

  Args:
    directory: of the run, made if it does not exist, or gs://bucket/path; a
      step is a folder in it.
    save_interval: steps between saves; `save` skips the others.
    keep: number of latest steps to keep, None for all.
    keep_every: steps that are multiples of it are kept permanently.

  Raises:
    ValueError: `save_interval`, `keep` or `keep_every` below 1.
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
  ):
    given = {"save_interval": save_interval, "keep": keep}
    for name, value in (given | {"keep_every": keep_every}).items():
      if value is not None and value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}.")
    policies = ocp.training.preservation_policies
    keeping = [policies.LatestN(keep)]
    if keep_every is not None:
      keeping.append(policies.EveryNSteps(keep_every))
    self.directory = places.absolute(directory)
    self._interval = save_interval
    self._open = functools.partial(
      ocp.training.Checkpointer,
      self.directory,
      context=context(),
      preservation_policy=policies.AnyPreservationPolicy(keeping),
    )
    with places.explained("open", self.directory):
      if not places.in_bucket(self.directory):
        for step in places.steps(self.directory):
          limits.size_of_folder(self.directory / str(step))
      self._run = self._open()
    #: The step that is being saved, and what waits for it.
    self._saving: tuple[places.Place, Any] | None = None
    self._lock: contextlib.ExitStack | None = None

  def save(
    self,
    step: int,
    state: PyTree,
    packed: PyTree,
    *,
    extra: object = None,
    method: object = None,
    force: bool = False,
    wait: bool = True,
  ) -> bool:
    """Saves one step, if it is due; returns whether it was saved now.

    Args:
      step: number of the step, not below that of a saved step.
      state: pytree of arrays to resume from; typed PRNG keys are welcome.
      packed: pytree with `PackedTernary` leaves, as for `save_packed`.
      extra: JSON value, such as the position of the data iterator. It comes
        back as JSON has it: tuples as lists, keys as strings.
      method: what made the packed weights; its repr is kept in the spec.
      force: save although the step is not a multiple of the interval.
      wait: return once the step is on disk. False: once all arrays are copied,
        so that they can be donated or changed; what goes wrong after that is
        raised by the next save that is due, `wait`, `restore` or `close`.

    Raises:
      TypeError: a leaf is no array, or `extra` is no JSON value.
      CheckpointError: a later step exists, or another process saves to this
        directory, or the step cannot be written, or the one before could not.
    """
    step = operator.index(step)
    due = force or step % self._interval == 0
    if due:
      self.wait()
    path, latest = self.directory / str(step), self.latest_step()
    if latest is not None and step < latest:
      raise CheckpointError(
        f"{path}: step {latest} is saved already: save later steps, or go on "
        "from an older step in another directory."
      )
    if step == latest or not due:
      return False
    trees = {"state": state, "packed": packed}
    parts = checkpoint.parts_of(trees, codecs.PLANES, method, extra)
    with places.explained("save", path):
      places.lead(lambda: self._prepare(path))
      if places.in_bucket(path):
        self._run.reload()  # Forget the incomplete step that was removed.
    compress = checkpoint.compressible(parts, codecs.PLANES)
    with self._cleaned(path), saving_as(compress):
      parts = lent(parts) if wait else parts
      saving = self._run.save_checkpointables_async(step, parts, force=True)
    self._saving = path, saving
    if wait:
      self.wait()
    return True

  def wait(self) -> None:
    """Returns once the last save is on disk, or raises a CheckpointError."""
    if self._saving:
      (path, saving), self._saving = self._saving, None
      with self._cleaned(path):
        saving.result()

  def close(self) -> None:
    """Finishes the last save, as `wait`; then other processes can save."""
    with self._lock or contextlib.nullcontext():
      self._lock = None
      try:
        self.wait()
      finally:
        self._run.close()

  def restore(
    self,
    like: PyTree,
    step: int | None = None,
    *,
    partial: bool = False,
    max_bytes: int | None = None,
  ) -> tuple[PyTree, Any, int]:
    """Restores a step, or a part of its state, as (state, extra, step).

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
    step = self.latest_step() if step is None else step
    if step is None:
      raise CheckpointError(f"{self.directory} holds no checkpoint: save one.")
    path = places.locate(self.directory / str(step))
    spec = checkpoint.read_spec(path)
    state = checkpoint.load(path, "state", spec, like, partial, max_bytes)
    return state, spec["extra"], step

  def latest_step(self) -> int | None:
    """Returns the number of the latest saved step, None if there is none."""
    return max(places.steps(self.directory), default=None)

  def __exit__(self, *_: object) -> None:
    self.close()

  def _prepare(self, path: places.Place) -> None:
    """Makes sure that this is the only writer, and that it can write."""
    if not self._lock:
      lock = contextlib.ExitStack()
      lock.enter_context(places.locked(self.directory, self.directory))
      self._lock = lock
      for leftover in self.directory.glob("*"):
        if places.is_unfinished(leftover):
          places.remove(leftover)
    places.probe(path)

  @contextlib.contextmanager
  def _cleaned(self, path: places.Place) -> Iterator[None]:
    """Leaves nothing of a save that fails inside."""
    try:
      with places.explained("save", path):
        yield
    except CheckpointError:
      # The failed one would report the same error at every call.
      with contextlib.suppress(Exception):
        self._run.close()
      for leftover in (path, path.with_name(f"{path.name}{places.UNFINISHED}")):
        if places.is_unfinished(leftover):
          places.remove(leftover)
      with places.explained("open", self.directory):
        self._run = self._open()
      raise
