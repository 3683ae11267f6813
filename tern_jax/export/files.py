"""What all formats share: the contract of a writer, files, names of leaves."""

import contextlib
import dataclasses
import importlib
import math
import os
import secrets
import shutil
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from tern_jax.core.paths import path_str
from tern_jax.core.types import PyTree
from tern_jax.storage import durable, leaves, limits, places
from tern_jax.storage.leaves import PathLike
from tern_jax.storage.packed import validate

#: Version of the layouts that this package writes, the newest that is read.
FORMAT = 1
#: {keyword: arguments of `argparse.add_argument`}.
Options = Mapping[str, Mapping[str, Any]]
#: Files and folders that are being written: what to remove if the process must
#: end at once.
unfinished: set[Path] = set()


@dataclasses.dataclass(frozen=True)
class Writer:
  """A format as the command `python -m tern_jax export` sees it.

  Args:
    write: called as write(path, tree, overwrite=..., **options) with the tree
      of a checkpoint; returns {leaf: relative RMS error} of what it rounds, or
      None. Itself None if a checkpoint cannot be written in this format.
    options: keywords of `write`; those of one name in several formats must
      agree. Without a default, that of `write` holds.
    refusal: why there is no `write`.
    folder: names of the files in the folder that it writes; none if what it
      writes is a file.
  """

  write: Callable[..., Mapping[str, float] | None] | None
  options: Options = dataclasses.field(default_factory=dict)
  refusal: str = ""
  folder: Collection[str] = ()


def require(package: str, task: str) -> Any:
  """Imports an optional package; if it is missing, says how to install it."""
  try:
    return importlib.import_module(package)
  except ImportError as e:
    hint = f"{package.partition('.')[0]}: pip install 'tern_jax[export]'"
    raise ImportError(f"{task} needs the package {hint}.") from e


def local_file(path: PathLike) -> Path:
  """Returns the path of a file, which other packages read or write here."""
  if os.fspath(path).startswith("gs://"):
    hint = "give a path on this machine, and copy the file"
    raise ValueError(f"{os.fspath(path)} is a place in a bucket: {hint}.")
  return places.local(path)


def free_file(path: PathLike, overwrite: bool) -> Path:
  """Returns the path of a file, which can be written.

  Raises:
    FileExistsError: it exists, and must not be overwritten.
    IsADirectoryError: it is a folder.
    ValueError: it is not on this machine, or a device.
  """
  given, path = os.fspath(path), local_file(path)
  if path.is_dir() or given.endswith("/"):
    raise IsADirectoryError(f"{given} is a folder: give the path of a file.")
  if os.path.lexists(path) and not overwrite:
    raise _taken(path)
  if path.exists():
    limits.size_of_file(path)  # A device would be replaced by a file.
  return path


def free_folder(
  path: PathLike, overwrite: bool, names: Collection[str]
) -> Path:
  """Returns the path of a folder, which can be written.

  Args:
    path: of the folder.
    overwrite: whether one that exists may be replaced.
    names: of the files that such a folder has.

  Raises:
    FileExistsError: it exists, and must not be overwritten, or holds others.
    NotADirectoryError: it is a file.
    ValueError: it is not on this machine.
  """
  path = local_file(path)
  if not os.path.lexists(path):
    return path
  if path.is_symlink() or not path.is_dir():
    raise NotADirectoryError(f"{path} is no folder: give another path.")
  if not overwrite:
    raise _taken(path)
  if others := sorted({x.name for x in path.iterdir()} - {*names}):
    raise FileExistsError(
      f"{path} holds {others[0]}, which would be lost: choose another path."
    )
  return path


@contextlib.contextmanager
def fresh_folder(
  path: PathLike, overwrite: bool, names: Collection[str]
) -> Iterator[Path]:
  """Yields a folder to write to, which becomes the real one if all went well.

  Args:
    path: of the folder.
    overwrite: whether one that exists may be replaced.
    names: of the files that such a folder has.
  """
  path = free_folder(path, overwrite, names)
  fresh = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
  old = fresh.with_suffix(".old")
  try:
    durable.make(path.parent)
    fresh.mkdir()
  except OSError as e:
    fault = f"cannot write to the folder {path.parent}: {e.strerror}."
    raise type(e)(fault) from e
  unfinished.add(fresh)
  try:
    yield fresh
    durable.flush_all(fresh)
    if free_folder(path, overwrite, names).exists():
      path.rename(old)
    try:
      fresh.rename(path)
    except OSError:
      if old.exists():
        old.rename(path)
      raise
    durable.flush(path.parent)
    remove(old)
  except (ValueError, TypeError, FileExistsError):
    raise
  except Exception as e:
    raise OSError(f"cannot write {path}: {e}.") from e
  finally:
    unfinished.discard(fresh)
    remove(fresh)


def remove(path: Path) -> None:
  """Deletes a file or a folder that may be there."""
  if path.is_dir():
    shutil.rmtree(path, ignore_errors=True)
  else:
    path.unlink(missing_ok=True)


def _taken(path: Path) -> FileExistsError:
  return FileExistsError(f"{path} already exists: pass overwrite=True.")


@contextlib.contextmanager
def fresh_file(path: PathLike, overwrite: bool) -> Iterator[Path]:
  """Yields a path to write to, which becomes the real one if all went well."""
  path = free_file(path, overwrite)
  fresh = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh.touch()
  except OSError as e:  # which names the file beside it
    fault = f"cannot write to the folder {path.parent}: {e.strerror}."
    raise type(e)(fault) from e
  unfinished.add(fresh)
  try:
    mode = fresh.stat().st_mode
    yield fresh
    # Some writers replace the file by one that only its owner may read.
    fresh.chmod(mode)
    with fresh.open("rb") as file:
      os.fsync(file.fileno())
    if overwrite:
      fresh.replace(path)
      return
    try:
      # Unlike a rename, a link never replaces what another writer put there.
      path.hardlink_to(fresh)
    except OSError:  # it is taken, or the file system has no links
      if os.path.lexists(path):
        raise _taken(path) from None
      fresh.rename(path)
  except (ValueError, TypeError, FileExistsError):
    raise
  except Exception as e:  # Writers name no path, or the file beside it.
    raise OSError(f"cannot write {path}: {e}.") from e
  finally:
    fresh.unlink(missing_ok=True)
    unfinished.discard(fresh)


def checked_leaves(tree: PyTree) -> dict[leaves.Path, Any]:
  """Returns the leaves of a tree by path, each an array or valid weights."""
  found, _ = leaves.flatten(tree, depth=math.inf)
  for path, x in found.items():
    name = path_str(path) or "the leaf"
    if leaves.kind_of(name, x) == "ternary":
      validate({name: x})
  return found


def tensor_name(path: leaves.Path) -> str:
  """Returns what the tensor of a leaf is called: its path joined by dots."""
  return path_str(path).replace("/", ".") or "leaf"


def check_unique(names: Iterable[str]) -> None:
  """Raises a ValueError if two tensors have one name."""
  if twice := sorted(name for name, n in Counter(names).items() if n > 1):
    raise ValueError(f"two leaves have the name {', '.join(twice)}")
