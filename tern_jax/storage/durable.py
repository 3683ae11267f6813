"""Files and folders that survive a power cut, and paths that orbax can take.

What a process has written is in the memory of the system until it is told to
bring it to the disk, the names in a folder no less than the bytes of a file.
"""

import contextlib
import errno
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

# A file system may know no way to do this for a folder.
_NO_WAY = (errno.EINVAL, errno.ENOTSUP)
# What makes a name a pattern.
_MAGIC = frozenset("*?[")


def flush(path: Path) -> None:
  """Returns once a file, or the names in a folder, are on the disk."""
  folder = path.is_dir()
  if folder and os.name == "nt":
    return  # It cannot open folders, and writes names through.
  file = os.open(path, os.O_RDONLY if folder else os.O_RDWR)
  try:
    os.fsync(file)
  except OSError as e:
    if not folder or e.errno not in _NO_WAY:
      raise
  finally:
    os.close(file)


def flush_all(folder: Path) -> None:
  """Returns once a folder is on the disk, with all that is in it."""
  for root, _, files in os.walk(folder):
    for name in files:
      flush(Path(root, name))
    flush(Path(root))


def make(folder: Path) -> None:
  """Makes a folder, parents included, that is on the disk when it returns."""
  if not folder.is_dir():
    make(folder.parent)
    folder.mkdir(exist_ok=True)
    try:
      flush(folder.parent)
    except OSError:
      with contextlib.suppress(OSError):
        folder.rmdir()
      raise


def is_pattern(path: str | os.PathLike[str]) -> bool:
  """Whether a path holds what could be taken for a pattern."""
  return not _MAGIC.isdisjoint(os.fspath(path))


@contextlib.contextmanager
def plain(folder: Path) -> Iterator[Path]:
  """Yields a path of a folder that is no pattern: a link, where need be.

  Where orbax brings together what several processes wrote, it globs: a folder
  `lr[0.1]` is not found that way, and what it saves there has no index.
  """
  if not is_pattern(folder):
    yield folder
    return
  with tempfile.TemporaryDirectory() as place:
    link = Path(place, "folder")
    link.symlink_to(folder, target_is_directory=True)
    yield link
