"""What tells whether a library was compiled from the sources beside it."""

import hashlib
import pathlib

_SUFFIXES = (".cc", ".h", ".inc", ".py")


def digest(folder: pathlib.Path) -> str:
  """Returns the SHA-256 of the sources in a folder, with their names."""
  files = sorted(x for x in folder.iterdir() if x.suffix in _SUFFIXES)
  each = (
    f"{x.name} {hashlib.sha256(x.read_bytes()).hexdigest()}" for x in files
  )
  return hashlib.sha256("\n".join(each).encode()).hexdigest()
