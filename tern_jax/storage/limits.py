"""What a load may take, checked before anything is opened or allocated.

Nothing in a file is trusted: neither what it is, nor how large it says to be.

Bytes. A file claims arrays; weights in a codec count as their planes, too. By
default the claims may be `RATIO` times the bytes on disk, or `FLOOR`, whichever
is more, and no more than the memory that is free. A caller who knows better
gives `max_bytes` instead.

What we write always loads by default. Random weights hardly shrink. The moments
of a state at step 0 are all zero and shrink ten thousand fold, but the weights
beside them do not, so that the state shrinks four fold. Only what is constant
nearly everywhere can be above the ratio, and is stored as it is instead:
`worth_compressing` says so to zstd, `within` to the entropy codec, in which a
million zero weights take nine bytes. `FLOOR` is less than the packages take.

Files. A checkpoint has folders and regular files. Anything else could block, or
have no end, or lead elsewhere. Links in it are refused wherever they lead,
since nothing that saves a checkpoint makes one; the path of a checkpoint, or of
a file, may be a link.
"""

import json
import math
import os
import stat
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from tern_jax.storage.leaves import CheckpointError, PathLike, printable

#: Most bytes of arrays that a byte on disk may claim.
RATIO = 1024
#: Bytes of arrays that any file may claim.
FLOOR = 64 << 20
#: Most bytes of a JSON file, or of a header.
JSON_BYTES = 16 << 20
# The estimate of what zstd leaves is off by less than this factor.
_MARGIN = 8
# How much of an array it is made from: so many samples of so many bytes.
_SAMPLES, _SAMPLE = 8, 1 << 16
_KINDS = {
  stat.S_IFIFO: "a FIFO",
  stat.S_IFSOCK: "a socket",
  stat.S_IFCHR: "a device",
  stat.S_IFBLK: "a device",
  stat.S_IFLNK: "a symbolic link",
  stat.S_IFDIR: "a folder",
}


def size_of_file(path: PathLike) -> int:
  """Returns the bytes of a regular file, or of what a link to one leads to.

  Raises:
    CheckpointError: it is something else, which could block, or have no end.
    OSError: nothing is there.
  """
  found = os.stat(path)
  if not stat.S_ISREG(found.st_mode):
    what = f"{os.fspath(path)} is {_kind(found)}"
    raise CheckpointError(f"{what}, and must be a regular file.")
  return found.st_size


def size_of_folder(folder: PathLike) -> int:
  """Returns the bytes of all files in the folder of a checkpoint.

  Raises:
    CheckpointError: one is no regular file, or of JSON and too large.
  """
  size, folders = 0, [os.fspath(folder)]
  while folders:
    with os.scandir(folders.pop()) as entries:
      for entry in entries:
        found = entry.stat(follow_symlinks=False)
        name = os.path.relpath(entry.path, folder)
        if stat.S_ISDIR(found.st_mode):
          folders.append(entry.path)
          continue
        if not stat.S_ISREG(found.st_mode):
          raise CheckpointError(
            f"{folder}: {printable(name)} is {_kind(found)}, and must be a"
            " regular file: put a copy in its place, if you trust it."
          )
        check_json(folder, name, found.st_size)
        size += found.st_size
  return size


def _kind(found: os.stat_result) -> str:
  return _KINDS.get(stat.S_IFMT(found.st_mode), "no file")


def check_json(folder: object, name: str, size: int) -> None:
  """Raises a CheckpointError if a file that is read as a whole is too large."""
  base = os.path.basename(name)
  whole = base.startswith("_") or base.endswith((".json", ".ocdbt"))
  if (whole or "array_metadatas" in name) and size > JSON_BYTES:
    what = f"{printable(name)} has {size:,} bytes"
    raise CheckpointError(f"{folder}: {what}, and may have {JSON_BYTES:,}.")


def check_saved(name: str, text: str) -> None:
  """Raises a ValueError if what describes a file would not be read again."""
  # Orbax writes up to three times as much beside it.
  if (size := len(text)) > (most := JSON_BYTES // 3):
    hint = "save fewer leaves, or less beside them"
    raise ValueError(
      f"{name} would have {size:,} bytes, and may have {most:,}: {hint}."
    )


def within(claimed: int, stored: int) -> bool:
  """Whether stored bytes may claim so many bytes by default."""
  return claimed <= max(FLOOR, RATIO * stored)


def check(
  path: object,
  claimed: int,
  stored: Callable[[], int],
  max_bytes: int | None = None,
  held: int | None = None,
) -> None:
  """Raises a CheckpointError if a file claims more than it may.

  Args:
    path: of the file.
    claimed: bytes of all arrays that would be loaded.
    stored: returns the bytes on disk.
    max_bytes: that it may claim, None for what follows from the bytes on disk
      and the free memory.
    held: most bytes of arrays on the host at a time, None for all.
  """
  says = f"{path} claims {claimed:,} bytes of arrays"
  if max_bytes is not None:
    if claimed > max_bytes:
      raise CheckpointError(f"{says}, and max_bytes is {max_bytes:,}.")
    return
  hint = f"pass max_bytes={claimed} if you trust it"
  if claimed > FLOOR and not within(claimed, size := stored()):
    most = f"more than {RATIO:,} times the {size:,} bytes on disk"
    raise CheckpointError(f"{says}, {most}: {hint}.")
  held = claimed if held is None else held
  if held > FLOOR and held > (free := free_memory()):
    raise CheckpointError(f"{says}, and {free:,} bytes are free: {hint}.")


def free_memory() -> float:
  """Returns the bytes that this process can still take, as far as is known."""
  memory = _numbers("/proc/meminfo")
  found = [math.inf]
  if "MemAvailable:" in memory:
    free = memory["MemAvailable:"] + memory.get("SwapFree:", 0)
    found.append(1024 * free)
  elif hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
    found.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
  # In a container, version 2 and version 1 of control groups.
  for folder, most, used, cached in (
    ("", "memory.max", "memory.current", "inactive_file"),
    (
      "memory/",
      "memory.limit_in_bytes",
      "memory.usage_in_bytes",
      "total_inactive_file",
    ),
  ):
    root = f"/sys/fs/cgroup/{folder}"
    limit, usage = (_number(root + name) for name in (most, used))
    if limit is not None and usage is not None:
      spare = _numbers(root + "memory.stat").get(cached, 0)
      found.append(max(0, limit - usage + spare))
  return min(found)


def _number(path: str) -> int | None:
  try:
    return int(Path(path).read_text())
  except (OSError, ValueError):  # there is none, or it is "max"
    return None


def _numbers(path: str) -> dict[str, int]:
  """Returns what a file of the system has in lines of a name and a number."""
  try:
    lines = Path(path).read_text().splitlines()
  except OSError:
    return {}
  rows = (line.split() for line in lines)
  return {x[0]: int(x[1]) for x in rows if x[1:] and x[1].isdecimal()}


def worth_compressing(arrays: Iterable[np.ndarray], claimed: int) -> bool:
  """Whether arrays still load by default once zstd has compressed them.

  The estimate is zlib's, for samples of the largest arrays, until enough bytes
  are known to stay.

  Args:
    arrays: on the host.
    claimed: bytes that a file of them would claim.
  """
  if claimed <= FLOOR:
    return True
  enough, left = _MARGIN * claimed / RATIO, 0.0
  for x in sorted(arrays, key=lambda x: -x.nbytes):
    flat = x.reshape(-1).view(np.uint8)
    step = max(_SAMPLE, flat.size // _SAMPLES)
    samples = [flat[i : i + _SAMPLE] for i in range(0, flat.size, step)]
    kept = sum(len(zlib.compress(sample.data, 1)) for sample in samples)
    left += kept / sum(map(len, samples)) * flat.size
    if left >= enough:
      return True
  return False


def read_json(path: Any) -> Any:
  """Returns the value of a JSON file, which may be in a bucket."""
  with path.open("rb") as file:
    text = file.read(JSON_BYTES + 1)
  check_json(path.parent, path.name, len(text))
  return json.loads(text.decode("utf-8"))
