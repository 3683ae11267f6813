"""Where checkpoints lie: a folder, or a place in a bucket.

A folder appears whole by a rename. Nothing in a bucket can be renamed: there a
checkpoint is whole once orbax's `commit_success.txt` is in it, which is written
last. What is saved to `net` is written to `.net.new/new` first; while it takes
the place of an older checkpoint, that one is kept in `.net.new/old`.
"""

import contextlib
import os
import shutil
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from tern_jax.storage import bucket
from tern_jax.storage.leaves import CheckpointError, PathLike, printable

try:
  import fcntl
except ImportError:  # not POSIX: nothing tells two writers apart
  fcntl = None

#: A folder, or a place in a bucket.
Place = Path | epath.Path

#: Where orbax puts the spec.
SPEC = Path("spec", "data.json")
#: What orbax adds to the name of a folder until it is whole.
UNFINISHED = ".orbax-checkpoint-tmp"
#: What it writes last in a bucket.
_COMMITTED = "commit_success.txt"


def absolute(path: PathLike) -> Place:
  """Returns a path that means the same in every working directory.

  Args:
    path: of a folder or a file, file:///path, or gs://bucket/path.

  Raises:
    ValueError: another scheme, no bucket is named, or no UTF-8.

  >>> absolute("gs://bucket/runs/7")
  PosixGPath('gs://bucket/runs/7')
  >>> absolute("file:///runs/7")
  PosixPath('/runs/7')
  >>> absolute("runs").is_absolute()
  True
  """
  name = os.fspath(path)
  if not name.startswith("gs://"):
    found = local(path).resolve()
    try:
      str(found).encode()
    except UnicodeEncodeError:
      # TensorStore would find nothing there, as if arrays were damaged.
      hint = "set PYTHONUTF8=1, or rename it"
      raise ValueError(f"{printable(found)} is no UTF-8: {hint}.") from None
    return found
  if not name.removeprefix("gs://").partition("/")[0]:
    raise ValueError(f"{name} names no bucket: give gs://bucket/path.")
  # TensorStore and other hosts write there, too: no listing stays true.
  fsspec.config.conf.setdefault("gcs", {})["use_listings_cache"] = False
  return epath.Path(name)


def local(path: PathLike) -> Path:
  """Returns a path on this machine, of which links are left as they are.

  Args:
    path: of a folder or a file, or file:///path. A first component ~ is the
      home of the user, as shells have it.

  Raises:
    ValueError: a place elsewhere, or an empty path.
  """
  name = os.fspath(path)
  if not name:
    raise ValueError("the path is empty: give one, such as . or runs/net.")
  scheme, separator, rest = name.partition("://")
  if not separator or os.sep in scheme:
    home = name == "~" or name.startswith("~/")
    return (Path(name).expanduser() if home else Path(name)).absolute()
  host, slash, rest = rest.partition("/")
  if scheme.lower() != "file":
    wanted = "a path, file:///path or, for checkpoints, gs://bucket/path"
    raise ValueError(f"{name}: {scheme}:// is not supported: give {wanted}.")
  if host not in ("", "localhost") or not slash:
    raise ValueError(f"{name} is on another machine: give file:///path.")
  return Path(urllib.request.url2pathname(slash + rest)).absolute()


def locate(path: PathLike) -> Place:
  """Returns the folder of a checkpoint, which may be a run's latest step.

  Raises:
    CheckpointError: there is no checkpoint.
  """
  path = absolute(path)
  with explained("look at", path):
    old = path.with_name(f".{path.name}.new") / "old"
    if not _taken(path) and is_whole(old):
      return old  # A save was killed while it replaced the checkpoint.
    if not path.is_dir():
      what = "is a file" if path.exists() else "does not exist"
      raise CheckpointError(f"{path} {what}: give the folder of a checkpoint.")
    if not is_whole(path) and (found := steps(path)):
      path = path / str(max(found))
    if not is_whole(path):
      raise CheckpointError(f"{path} holds no checkpoint: its spec is missing.")
    return path


def disk_bytes(path: PathLike) -> int:
  """Returns the bytes of all files of what `locate` finds, orbax's own too.

  Raises:
    CheckpointError: nothing there.
  """
  return sum(x.stat().length for x in _files(locate(path)))


@contextlib.contextmanager
def explained(task: str, path: Place) -> Iterator[None]:
  """Turns whatever fails inside into a CheckpointError that names the path."""
  try:
    if in_bucket(path):
      bucket.reach(str(path))
    yield
  except (CheckpointError, ImportError):
    raise
  except Exception as e:  # orbax and TensorStore raise errors of many kinds
    reason = printable(f"{type(e).__name__}: {e}".partition("\n")[0], 2000)
    raise CheckpointError(f"cannot {task} {path}: {reason}") from e


def lead(task: Callable[[], None]) -> None:
  """Runs a task on the first of all processes; if it fails, all of them do."""
  error: Exception | None = None
  if jax.process_index() == 0:
    try:
      task()
    except Exception as e:
      error = e
  if multihost_utils.broadcast_one_to_all(np.array(error is not None)):
    raise error or CheckpointError("the first process says what is wrong.")


def in_bucket(path: Place) -> bool:
  """Whether a place is one in a bucket."""
  return isinstance(path, epath.Path)


def is_whole(path: Place) -> bool:
  """Whether there is a checkpoint, written to its end."""
  ended = not in_bucket(path) or (path / _COMMITTED).exists()
  return ended and (path / SPEC).exists()


def is_unfinished(path: Place) -> bool:
  """Whether it is a step whose save was interrupted."""
  if not in_bucket(path):
    return path.name.endswith(UNFINISHED)
  parts = "packed", "state", SPEC.parts[0]
  begun = path.name.isdecimal() and any((path / x).exists() for x in parts)
  return begun and not is_whole(path)


def steps(directory: Place) -> list[int]:
  """Returns the numbers of the steps of a run."""
  numbered = [x for x in directory.glob("*") if x.name.isdecimal()]
  return [int(x.name) for x in numbered if not in_bucket(x) or is_whole(x)]


def _taken(path: Place) -> bool:
  """Whether the path holds anything but an incomplete checkpoint."""
  if in_bucket(path):
    return path.exists() and (is_whole(path) or not (path / SPEC).exists())
  return os.path.lexists(path)


def _files(folder: Place) -> Iterator[epath.Path]:
  # The walk of epath returns names without a scheme.
  for path in folder.iterdir():
    yield from _files(path) if path.is_dir() else [epath.Path(path)]


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
    (path / _COMMITTED).unlink(missing_ok=True)
    path.rmtree(missing_ok=True)
  else:
    shutil.rmtree(path, ignore_errors=True)


def _move(path: Place, target: Place) -> None:
  """Moves a checkpoint, which appears there whole or not at all."""
  if not isinstance(path, epath.Path):
    path.rename(target)  # This fails if something else has appeared there.
    return
  if _taken(target):
    raise FileExistsError(f"{target} exists")
  remove(target)
  # With a spec and without its mark, a partial copy is known as one.
  first, last = path / SPEC, path / _COMMITTED
  for file in sorted(_files(path), key=lambda x: (x == last) - (x == first)):
    file.copy(target / file.relative_to(path), overwrite=True)
  remove(path)


@contextlib.contextmanager
def staged(path: Place, overwrite: bool) -> Iterator[Place]:
  """Yields where to save a checkpoint, which then appears at its path."""
  stage = path.with_name(f".{path.name}.new")
  with contextlib.ExitStack() as stack:

    def prepare() -> None:
      stage.mkdir(parents=True, exist_ok=True)
      stack.enter_context(locked(stage, path))
      stack.callback(_settle, stage, path, done=True)
      _settle(stage, path)
      if _taken(path):
        if not overwrite:
          raise CheckpointError(f"{path} already exists: pass overwrite=True.")
        if not is_whole(path):
          what = "exists and is not a checkpoint"
          raise CheckpointError(f"{path} {what}: choose another path.")
      probe(stage / "new")

    def publish() -> None:
      if overwrite and _taken(path):
        _move(path, stage / "old")
      _move(stage / "new", path)

    lead(prepare)
    yield stage / "new"
    lead(publish)


def _settle(stage: Place, path: Place, done: bool = False) -> None:
  """Undoes an interrupted replacement, and deletes what is left of it."""
  old = stage / "old"
  if is_whole(old) and not _taken(path):
    _move(old, path)
  for leftover in stage.iterdir() if stage.exists() else ():
    # Something else may have appeared at the path: then the old one stays.
    if leftover != old or is_whole(path):
      remove(leftover)
  if done and not in_bucket(stage):
    with contextlib.suppress(OSError):
      stage.rmdir()
