"""How checkpoints get to where they lie: staged, verified, on the disk, moved.

One process at a time writes to a place. What it writes appears there whole, and
what it replaces goes only then.
"""

import contextlib
import os
import re
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
from etils import epath

from tern_jax.storage import durable
from tern_jax.storage.leaves import CheckpointError
from tern_jax.storage.places import (
  COMMITTED,
  SPEC,
  UNFINISHED,
  Place,
  files_of,
  gathered,
  in_bucket,
  is_whole,
  lead,
  taken,
)

try:
  import fcntl
except ImportError:  # not POSIX: nothing tells two writers apart
  fcntl = None

# What is no name to orbax: a backslash, the scheme of a bucket, and what Python
# puts in the place of bytes that are no text.
_UNREADABLE = re.compile(r"\\|(?:^|/)(?:gs|s3|az|hf):(?:/|$)|[\ud800-\udfff]")


def check_name(path: Place) -> None:
  """Raises for a path at which orbax could not find again what it saves.

  A link leads to a folder whose name is a pattern, but not into a bucket, nor
  do several processes share one.
  """
  fault = None
  if _UNREADABLE.search(path.as_posix()) and not in_bucket(path):
    fault = "orbax reads no names with a backslash, gs: or bytes of no UTF-8"
  elif UNFINISHED in path.name:
    fault = f"{UNFINISHED} is how orbax marks what is not whole"
  elif durable.is_pattern(path):
    reasons = {
      "in a bucket": in_bucket(path),
      "when several processes save": jax.process_count() > 1,
      "when TMPDIR has them, too": durable.is_pattern(tempfile.gettempdir()),
    }
    found = [reason for reason, applies in reasons.items() if applies]
    if found:
      fault = f"*, ? and [ are taken for a pattern {found[0]}"
  if fault:
    raise CheckpointError(
      f"cannot save {str(path)!r}: {fault}: choose another name."
    )


def make(folder: Place) -> None:
  """Makes a folder, parents included, that a power cut leaves."""
  if isinstance(folder, epath.Path):
    folder.mkdir(parents=True, exist_ok=True)
  else:
    durable.make(folder)


def count_alike() -> None:
  """Lets the processes that will save wait for one another.

  Orbax numbers what it does, and waits for the others under that number; but
  what one process has loaded by itself has counted there alone.
  """
  if jax.process_count() == 1:
    return
  # Private, and hence imported only where several processes need it.
  from orbax.checkpoint._src.futures import synchronization

  count = synchronization.OperationIdGenerator
  most = max(gathered(int(count.get_current_operation_id())))
  while int(count.get_current_operation_id()) < most:
    count.next_operation_id()


def plain(folder: Place) -> contextlib.AbstractContextManager[Place]:
  """Returns a context: a path of the folder that orbax takes for no pattern."""
  if isinstance(folder, epath.Path):
    return contextlib.nullcontext(folder)
  return durable.plain(folder)


def flush(folder: Place) -> None:
  """Returns once a folder is on the disk, with all that is in it."""
  if not isinstance(folder, epath.Path):
    durable.flush_all(folder)


def probe(path: Place) -> None:
  """Raises an OSError if no folder can be made there."""
  # A save that fails inside orbax leaves threads that wait for five minutes.
  trial = path.with_name(f".{path.name}.probe")
  if in_bucket(path):  # It has no folders, only names.
    trial.write_text("")
    trial.unlink()
  else:
    trial.mkdir(exist_ok=True)
    trial.rmdir()


@contextlib.contextmanager
def locked(folder: Place, path: Place) -> Iterator[None]:
  """Makes this the only writer of a path, by a lock on a folder.

  The system releases the lock when the process ends, in whatever way.
  """
  who = "another process is saving there, or a Checkpointer that was not closed"
  busy = CheckpointError(f"{path}: {who}: save to another directory.")
  if fcntl is None or in_bucket(folder):
    yield
    return
  try:
    file = os.open(folder, os.O_RDONLY)
  except FileNotFoundError:
    raise busy from None  # removed by the writer that has just finished
  try:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      raise busy from None
    except OSError:
      pass  # a file system without locks
    # The folder may have been removed, and made again, before the lock.
    if not os.path.exists(folder) or not os.path.samestat(
      os.fstat(file), os.stat(folder)
    ):
      raise busy
    yield
  finally:
    os.close(file)


def remove(path: Place) -> None:
  """Deletes a folder."""
  if isinstance(path, epath.Path):
    # First its mark: what is deleted in part is never taken for a whole one.
    (path / COMMITTED).unlink(missing_ok=True)
    path.rmtree(missing_ok=True)
  else:
    shutil.rmtree(path, ignore_errors=True)


def stage_of(path: Place) -> Place:
  """Returns the folder in which a step is written, to be moved to its path."""
  return path.with_name(f"{path.name}{UNFINISHED}")


def publish_step(path: Place, check: Callable[[Place], None]) -> None:
  """Makes a step appear that was written, if `check` finds it readable."""
  if in_bucket(path):  # It has appeared already.
    try:
      check(path)
    except CheckpointError:
      remove(path)
      raise
    return
  stage = stage_of(path)
  check(stage / "new")
  flush(stage / "new")
  move(stage / "new", path)
  remove(stage)


def discard(path: Place) -> None:
  """Deletes a step, which is at no time there in part."""
  if not in_bucket(path):
    remove(stage_of(path))
    path = path.rename(stage_of(path))
  remove(path)


def set_aside(path: Place) -> None:
  """Gives a step another name, under which it is none."""
  names = (f"{path.name}.refused{end}" for end in ("", *range(1, 1000)))
  free = (x for x in map(path.with_name, names) if not x.exists())
  move(path, next(free))


def move(path: Place, target: Place) -> None:
  """Moves a checkpoint, which appears there whole or not at all."""
  if not isinstance(path, epath.Path):
    path.rename(target)  # This fails if something else has appeared there.
    durable.flush(Path(target.parent))
    durable.flush(path.parent)
    return
  if taken(target):
    raise FileExistsError(f"{target} exists")
  remove(target)
  # With a spec and without its mark, a partial copy is known as one.
  first, last = path / SPEC, path / COMMITTED
  for file in sorted(files_of(path), key=lambda x: (x == last) - (x == first)):
    file.copy(target / file.relative_to(path), overwrite=True)
  remove(path)


@contextlib.contextmanager
def staged(
  path: Place, overwrite: bool, check: Callable[[Place], None]
) -> Iterator[Place]:
  """Yields where to save a checkpoint, which then appears at its path.

  Args:
    path: of the checkpoint.
    overwrite: replace the one that is there.
    check: raises unless the new one, in a folder, is readable.
  """
  check_name(path)
  stage = path.with_name(f".{path.name}.new")
  with contextlib.ExitStack() as stack:

    def prepare() -> None:
      make(stage)
      stack.enter_context(locked(stage, path))
      stack.callback(_settle, stage, path, done=True)
      _settle(stage, path)
      if taken(path):
        if not overwrite:
          raise CheckpointError(f"{path} already exists: pass overwrite=True.")
        if not is_whole(path):
          what = "exists and is not a checkpoint"
          raise CheckpointError(f"{path} {what}: choose another path.")
      probe(stage / "new")

    def publish() -> None:
      check(stage / "new")
      flush(stage / "new")
      if overwrite and taken(path):
        move(path, stage / "old")
      move(stage / "new", path)

    lead(prepare)
    count_alike()
    with plain(stage) as folder:
      yield folder / "new"
    lead(publish)


def _settle(stage: Place, path: Place, done: bool = False) -> None:
  """Undoes an interrupted replacement, and deletes what is left of it."""
  old = stage / "old"
  if is_whole(old) and not taken(path):
    move(old, path)
  for leftover in stage.iterdir() if stage.exists() else ():
    # Something else may have appeared at the path: then the old one stays.
    if leftover != old or is_whole(path):
      remove(leftover)
  if done and not in_bucket(stage):
    with contextlib.suppress(OSError):
      stage.rmdir()


def in_background(task: Callable[[], None]) -> Callable[[], None]:
  """Runs a task in a thread; returns what waits for it and raises its error."""
  errors: list[Exception] = []

  def attempt() -> None:
    try:
      task()
    except Exception as e:
      errors.append(e)

  thread = threading.Thread(target=attempt, name="tern_jax.Checkpointer")
  thread.start()

  def wait() -> None:
    thread.join()
    for error in errors:
      raise error

  return wait
