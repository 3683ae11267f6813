"""Where checkpoints lie: a folder, or a place in a bucket.

A folder appears whole by a rename. Nothing in a bucket can be renamed: there a
checkpoint is whole once orbax's `commit_success.txt` is in it, which is written
last. What is saved to `net` is written to `.net.new/new` first; while it takes
the place of an older checkpoint, that one is kept in `.net.new/old`. It is
deleted when the new one has been found readable, and is on the disk.
"""

import contextlib
import os
import re
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import fsspec
import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from tern_jax.storage import bucket
from tern_jax.storage.leaves import (
  CheckpointError,
  MisfitError,
  PathLike,
  printable,
)

T = TypeVar("T")

#: A folder, or a place in a bucket.
Place = Path | epath.Path

#: Where orbax puts the spec.
SPEC = Path("spec", "data.json")
#: What orbax adds to the name of a folder until it is whole.
UNFINISHED = ".orbax-checkpoint-tmp"
#: What it writes last in a bucket.
COMMITTED = "commit_success.txt"
#: What may be in the folder of a checkpoint.
_PARTS = ("packed", "state", SPEC.parts[0])
#: The name of a step: the digits of a number, and nothing else.
_STEP = re.compile("0|[1-9][0-9]{0,17}")
#: How often a checkpoint is read that is replaced during each attempt.
_ATTEMPTS = 50


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
    old = old_of(path)
    if not taken(path) and is_whole(old):
      return old  # A save was killed while it replaced the checkpoint.
    if not path.is_dir():
      what = "is a file" if path.exists() else "does not exist"
      raise CheckpointError(f"{path} {what}: give the folder of a checkpoint.")
    latest = None if is_whole(path) else next(steps(path, damaged=True), None)
    if latest is not None:
      path = path / str(latest)
    if not is_whole(path):
      raise CheckpointError(f"{path} holds no checkpoint: its spec is missing.")
    return path


def disk_bytes(path: PathLike) -> int:
  """Returns the bytes of all files of what `locate` finds, orbax's own too.

  Raises:
    CheckpointError: nothing there.
  """

  def total() -> int:
    folder = locate(path)
    with explained("look at", folder):
      return sum(x.stat().length for x in files_of(folder))

  return again(absolute(path), total)


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


def together(task: Callable[[], None]) -> None:
  """Runs a task on every process; if it fails on one, it does so on all."""
  error: Exception | None = None
  try:
    task()
  except Exception as e:
    error = e
  failed = error is not None
  if jax.process_count() > 1:
    failed = bool(multihost_utils.process_allgather(np.array(failed)).any())
  if failed:
    raise error or CheckpointError("another process says what is wrong.")


def shared(data: bytes) -> bytes:
  """Returns the bytes that the first of all processes has, on all of them."""
  array = np.frombuffer(data, np.uint8)
  return np.asarray(multihost_utils.broadcast_one_to_all(array)).tobytes()


def gathered(number: int) -> list[int]:
  """Returns the numbers that the processes have."""
  data = np.frombuffer(number.to_bytes(8), np.uint8)
  rows = np.asarray(multihost_utils.process_allgather(data)).reshape(-1, 8)
  return [int.from_bytes(row.tobytes()) for row in rows]


def in_bucket(path: Place) -> bool:
  """Whether a place is one in a bucket."""
  return isinstance(path, epath.Path)


def is_whole(path: Place) -> bool:
  """Whether there is a checkpoint, written to its end."""
  ended = not in_bucket(path) or (path / COMMITTED).exists()
  return ended and (path / SPEC).exists()


def is_unfinished(path: Place) -> bool:
  """Whether it is a step whose save was interrupted."""
  if not in_bucket(path):
    return path.name.endswith(UNFINISHED)
  return step_of(path) is not None and _is_begun(path) and not is_whole(path)


def _is_begun(path: Place) -> bool:
  """Whether there is a part of a checkpoint."""
  return any((path / part).exists() for part in _PARTS)


def step_of(path: Place) -> int | None:
  """Returns the step that the name of a folder stands for, None if it is none.

  >>> [step_of(Path(name)) for name in ("0", "70", "007", "٣", "7.new")]
  [0, 70, None, None, None]
  """
  return int(path.name) if _STEP.fullmatch(path.name) else None


def _numbered(directory: Place) -> list[int]:
  """Returns the numbers that could be steps of a run, the latest first."""
  numbers = map(step_of, directory.glob("*"))
  return sorted((n for n in numbers if n is not None), reverse=True)


def steps(directory: Place, *, damaged: bool = False) -> Iterator[int]:
  """Yields the steps of a run, the latest first.

  Args:
    directory: of the run.
    damaged: also those of which a part is left, but not the spec. What is not
      whole in a bucket is the rest of an interrupted save, and no step.
  """
  damaged = damaged and not in_bucket(directory)
  known = _is_begun if damaged else is_whole
  return (n for n in _numbered(directory) if known(directory / str(n)))


def again(
  path: Place, task: Callable[[], T], wrong: Callable[[T], bool] | None = None
) -> T:
  """Returns what a task reads at a place, which another process may replace.

  What is deleted while it is read looks damaged: then it is read again.

  Args:
    path: of a checkpoint, or of a run.
    task: reads it.
    wrong: tells that something could not be read, if this is no error.
  """
  for left in reversed(range(_ATTEMPTS)):
    before = _seen(path)
    try:
      found = task()
      if not (left and wrong and wrong(found)) or _seen(path) == before:
        return found
    except MisfitError:
      raise
    except CheckpointError:
      if not left or _seen(path) == before:
        raise
  raise AssertionError("the last attempt returns or raises")


def _seen(path: Place) -> object:
  """Returns what differs once there is another checkpoint at a place."""
  with explained("look at", path):
    numbers = _numbered(path)
    latest = [path / str(n) for n in numbers[:1]]
    return numbers, [identity(x) for x in (path, old_of(path), *latest)]


def identity(path: Place) -> object:
  """Returns what tells a checkpoint from another at the same place."""
  try:
    if isinstance(path, epath.Path):
      mark = (path / COMMITTED).stat()
      return mark.mtime, (path / SPEC).read_bytes()
    stat = os.stat(path / SPEC)
    return stat.st_dev, stat.st_ino, stat.st_mtime_ns
  except OSError:
    return None


def old_of(path: Place) -> Place:
  """Returns where a checkpoint is kept that is being replaced."""
  return path.with_name(f".{path.name}.new") / "old"


def taken(path: Place) -> bool:
  """Whether the path holds anything but an incomplete checkpoint."""
  if in_bucket(path):
    return path.exists() and (is_whole(path) or not (path / SPEC).exists())
  return os.path.lexists(path)


def files_of(folder: Place) -> Iterator[epath.Path]:
  """Yields all files in a folder, and in the folders in it."""
  # The walk of epath returns names without a scheme.
  for path in folder.iterdir():
    yield from files_of(path) if path.is_dir() else [epath.Path(path)]
