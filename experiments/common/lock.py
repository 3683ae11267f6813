"""One writer of a directory at a time."""

import contextlib
import fcntl
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from experiments.common import files, terminal
from experiments.common.errors import UsageError
from tern_jax.checkpoint import Place

#: The file that is locked. It tells who holds it.
NAME = ".lock"

#: Runs that begin and end beside this one may take a directory away so often.
_ATTEMPTS = 100


@contextlib.contextmanager
def held(
  directory: Place, wait: Callable[[str], None] | None = None
) -> Iterator[None]:
  """Makes this process the only writer of a directory, which is made.

  The system releases the lock when the process ends, in whatever way: what a
  killed process leaves, on this host or another, locks nothing. A directory in
  which nothing was written is gone afterwards. A bucket has no locks.

  Args:
    directory: to write to.
    wait: called with who holds it before this one waits; None never waits.

  Raises:
    UsageError: another process holds it, or it cannot be written to.
  """
  if not isinstance(directory, Path):
    yield
    return
  made: list[Path] = []
  number = None
  try:
    number = _take(directory, wait, made)
    files.remove_parts(directory)
    yield
  finally:
    if number is not None:
      # First the name, then the lock: who opened the file before sees that.
      with contextlib.suppress(OSError):
        (directory / NAME).unlink()
      os.close(number)
    with contextlib.suppress(OSError):  # They are in use.
      for folder in made:
        folder.rmdir()


def _take(
  directory: Path, wait: Callable[[str], None] | None, made: list[Path]
) -> int:
  """Returns the number of the open file, locked; adds the folders it made."""
  path = directory / NAME
  for _ in range(_ATTEMPTS):
    made[:] = [x for x in (directory, *directory.parents) if not x.exists()]
    if (number := _open(path)) is None:
      continue
    try:
      if not _locked(number, directory):
        holder = _holder(number)
        if wait is None:
          raise UsageError(
            f"{directory} is in use by {holder}: wait until that has ended, or"
            " write to another directory."
          )
        wait(holder)
        fcntl.flock(number, fcntl.LOCK_EX)
      with contextlib.suppress(FileNotFoundError):
        if os.path.samestat(os.fstat(number), os.stat(path)):
          _sign(number)
          return number
    except BaseException:
      os.close(number)
      raise
    os.close(number)  # Its holder has removed it.
  raise UsageError(f"{path} changes all the time: remove it.")


def _open(path: Path) -> int | None:
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    return os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
  except FileNotFoundError:
    return None  # Who made the directory has just taken it away.
  except OSError as error:
    raise UsageError(
      f"{path.parent} cannot be written to ({error.strerror}): give another"
      " directory."
    ) from error


def _locked(number: int, directory: Path) -> bool:
  try:
    fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError:
    return False
  except OSError as error:
    # Such as a network's file system that was mounted without locks.
    terminal.say(
      f"{directory} cannot be locked ({error.strerror}): start nothing else"
      " that writes there.",
      sys.stderr,
    )
  return True


def _holder(number: int) -> str:
  """Returns who holds the lock, as that has written it."""
  text = os.pread(number, 200, 0).decode(errors="replace").strip()
  # Whoever may write there may have written anything.
  return text if text and text.isprintable() else "another process"


def _sign(number: int) -> None:
  since = time.strftime("%Y-%m-%d %H:%M:%S")
  text = f"pid {os.getpid()} on {socket.gethostname()} since {since}\n"
  # On a full disk nobody is told, but the lock holds.
  with contextlib.suppress(OSError):
    os.ftruncate(number, 0)
    os.pwrite(number, text.encode(), 0)
