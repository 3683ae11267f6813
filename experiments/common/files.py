"""Files that appear whole or not at all."""

import contextlib
import json
import os
import secrets
from pathlib import Path
from typing import Any

from tern_jax.checkpoint import Place
from tern_jax.storage import durable

#: What is written aside, until it is whole.
PARTS = ".*.????????.part"


def write(path: Place, content: bytes | str) -> None:
  """Writes a file, which takes the place of the one before it at one stroke.

  Neither a full disk, a kill nor a power cut leaves a part of it. An object in
  a bucket appears whole by itself.

  Raises:
    OSError: it cannot be written; the one before it is still there.
  """
  data = content.encode() if isinstance(content, str) else content
  if not isinstance(path, Path):
    path.write_bytes(data)
    return
  part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
  try:
    with part.open("wb") as file:
      file.write(data)
      file.flush()
      os.fsync(file.fileno())
    part.replace(path)
  except BaseException as error:
    # On a disk that is full, or was taken away, no cleaning may fail either.
    with contextlib.suppress(OSError):
      part.unlink()
    if isinstance(error, OSError):
      raise OSError(error.errno, error.strerror, str(path)) from error
    raise
  with contextlib.suppress(OSError):  # where the file system can
    durable.flush(path.parent)


def write_table(folder: Path, text: str, table: Any) -> None:
  """Writes a table, as Markdown and as JSON."""
  write(folder / "table.md", f"{text}\n")
  write(folder / "table.json", json.dumps(table, indent=2) + "\n")


def remove_parts(folder: Path) -> None:
  """Removes what writers left that were killed; no other may be at work."""
  for pattern in (PARTS, f"*/{PARTS}"):
    for part in folder.glob(pattern):
      part.unlink(missing_ok=True)
