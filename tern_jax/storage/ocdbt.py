"""How much the index of a part would take, before TensorStore reads it.

Orbax keeps the arrays of a part in an OCDBT database: a manifest leads to the
root of a tree of nodes, which hold names and either values or where they lie.
TensorStore spells out the names of a node, and makes room for a value, as their
lengths say: a few kilobytes can claim gigabytes, and the process ends if there
are none. Only these lengths are read here.

Source: https://google.github.io/tensorstore/kvstore/ocdbt, "Storage format".
"""

import functools
import re
import struct
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorstore

from tern_jax.storage.places import Place

_MANIFEST, _NODE = b"\x0c\xdb\x3a\x2a", b"\x0c\xdb\x20\xde"
_ZSTD = b"\x28\xb5\x2f\xfd"
# Most bytes of a block of zstd, once it is decompressed.
_BLOCK = 1 << 17
# What a node may hold: so many bytes, or so many for each one in the file.
_FREE, _RATIO = 16 << 20, 64
# Most bytes of a node in a file: orbax writes up to 100 MB.
_MOST = 128 << 20
# Most names in a node. A tree of 35,000 packed leaves has half of them.
_NAMES = 1 << 19
# What TensorStore says of a frame that ends before it was expected to.
_GOT = re.compile(r"Not enough data.* at uncompressed byte (\d+)")


class _NewerError(Exception):
  """The database has a version that is not known here, maybe to TensorStore."""


@functools.cache
def readable() -> bool:
  """Whether this TensorStore says what is needed here: all so far have."""
  try:
    return _decompressed(_ZSTD + b"\0\x38\x29\0\0whole") == b"whole"
  except ValueError:
    return False


def sizes(folder: Place) -> dict[str, int]:
  """Returns the bytes of all values of a database, by their names.

  {} if this TensorStore does not say what is needed to read the nodes, or if
  they are newer than this: then TensorStore decides alone.

  Raises:
    ValueError: the index is damaged, or takes more than it may.
    OSError: a file is missing.
  """
  if not readable():
    return {}
  try:
    return _sizes(folder)
  except _NewerError:
    return {}


def _sizes(folder: Place) -> dict[str, int]:
  reader = _Reader(_body(folder / "manifest.ocdbt", 0, None, _MANIFEST))
  reader.take(16)
  kind, *_ = reader.numbers(3)
  reader.take(1)
  if reader.numbers(1) == [1]:
    reader.take(4)
  files = reader.files()
  (n,) = reader.numbers(1)
  reader.numbers(n)
  reader.take(n)
  roots = [reader.numbers(n) for _ in range(3)]
  if kind or not n:
    raise ValueError("its manifest is not one of ours")
  file, offset, length = (column[-1] for column in roots)
  found: dict[str, int] = {}
  for name, size in _values(folder, (files[file], offset, length), b"", set()):
    found[name.decode()] = size
  return found


def _values(
  folder: Place, at: tuple[str, int, int], prefix: bytes, seen: set
) -> Iterator[tuple[bytes, int]]:
  """Yields the names and sizes of the values of a node and those below it."""
  name, offset, length = at
  if at in seen:
    raise ValueError("two nodes of it are one")
  seen.add(at)
  if {".", "..", ""} & {*name.split("/")}:
    raise ValueError("a node of it lies outside")
  reader = _Reader(_body(folder / name, offset, length, _NODE))
  height = reader.take(1)[0]
  files = reader.files()
  (n,) = reader.numbers(1)
  shared, more = [0, *reader.numbers(n - 1)][:n], reader.numbers(n)
  common = reader.numbers(n) if height else []
  reader.check_names(sum(shared) + sum(more) + n * len(prefix))
  keys, key = [], b""
  for i, j in zip(shared, more, strict=True):
    key = key[:i] + reader.take(j)
    keys.append(prefix + key)
  if not height:
    yield from zip(keys, reader.numbers(n), strict=True)
    return
  places = zip(*(reader.numbers(n) for _ in range(3)), strict=True)
  for key, i, (file, start, size) in zip(keys, common, places, strict=True):
    below = key[: len(prefix) + i]
    yield from _values(folder, (files[file], start, size), below, seen)


def _body(path: Place, offset: int, length: int | None, magic: bytes) -> bytes:
  """Returns what a manifest or a node has, decompressed."""
  with path.open("rb") as file:
    file.seek(offset)
    data = file.read(_MOST + 1 if length is None else min(length, _MOST + 1))
  if not 18 <= len(data) <= _MOST or data[:4] != magic:
    raise ValueError(f"{path.name} has no node, or too large a one")
  (size,) = struct.unpack("<Q", data[4:12])
  if size != len(data):
    raise ValueError(f"{path.name} has a node of another size")
  if data[12]:
    raise _NewerError
  body = data[14:-4]
  return _decompressed(body) if data[13] else body


def _decompressed(frame: bytes) -> bytes:
  """Returns what a frame of zstd holds, if its blocks cannot hold too much."""
  head = frame[4] if frame[:4] == _ZSTD else 0xFF
  single = head >> 5 & 1
  known = (single, 2, 4, 8)[head >> 6]
  start = 6 - single + (0, 1, 2, 4)[head & 3]
  most, at, last = 0, start + known, 0
  while not last:
    block = int.from_bytes(frame[at : at + 3], "little")
    last, kind, size = block & 1, block >> 1 & 3, block >> 3
    most += _BLOCK if kind == 2 else size
    at += 3 + (1 if kind == 1 else size)
    if at > len(frame) or kind == 3:
      raise ValueError("a node of it is no frame of zstd")
  if at + (head & 4) != len(frame) or most > max(_FREE, _RATIO * len(frame)):
    raise ValueError("a node of it holds too much")
  if known:
    most = int.from_bytes(frame[start : start + known], "little")
    most += 256 * (known == 2)
  try:
    return _read(frame, most if known else most + 1)
  except ValueError as e:
    # The frame does not say how much it holds, but TensorStore does.
    if known or not (got := _GOT.search(str(e))):
      raise
    return _read(frame, int(got[1]))


def _read(frame: bytes, size: int) -> bytes:
  """Returns the bytes in a frame of zstd; raises ValueError for others."""
  metadata = {
    "shape": [size],
    "data_type": "uint8",
    "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [size]}},
    "codecs": [{"name": "bytes"}, {"name": "zstd"}],
  }
  spec = {"driver": "zarr3", "kvstore": "memory://", "metadata": metadata}
  context = tensorstore.Context()
  array: Any = tensorstore.open(spec, create=True, context=context).result()
  array.kvstore.write("c/0", frame).result()
  return array.read().result().tobytes()


class _Reader:
  """Reads numbers and bytes from the front."""

  def __init__(self, data: bytes):
    self._data, self._at = data, 0

  def take(self, n: int) -> bytes:
    """Returns the next n bytes."""
    taken = self._data[self._at : self._at + n]
    if len(taken) < n:
      raise ValueError("a node of it ends too early")
    self._at += n
    return taken

  def numbers(self, n: int) -> list[int]:
    """Returns the next n numbers, in 7 bits a byte, the lowest first."""
    if n < 1:
      return []
    if n > _NAMES:
      raise ValueError(f"a node of it has {n:,} names")
    left = np.frombuffer(self._data, np.uint8, offset=self._at)
    ends = np.flatnonzero(left < 128)[:n] + 1
    sizes = np.diff(ends, prepend=0)
    if len(ends) < n or max(sizes) > 10:
      raise ValueError("a node of it has no numbers where some must be")
    starts = ends - sizes
    shifts = 7 * (np.arange(ends[-1]) - np.repeat(starts, sizes))
    bits = (left[: ends[-1]] & 127).astype(np.uint64) << shifts.astype(
      np.uint64
    )
    self._at += int(ends[-1])
    return np.add.reduceat(bits, starts).tolist()

  def check_names(self, size: int) -> None:
    """Raises a ValueError if names take too much, once they are spelled out."""
    if size > max(_FREE, _RATIO * len(self._data)):
      raise ValueError("the names in it take too much")

  def files(self) -> list[str]:
    """Returns the names of files in a table."""
    (n,) = self.numbers(1)
    shared, more = [0, *self.numbers(n - 1)][:n], self.numbers(n)
    self.numbers(n)
    self.check_names(sum(shared) + sum(more))
    names, name = [], b""
    for i, j in zip(shared, more, strict=True):
      name = name[:i] + self.take(j)
      names.append(name.decode())
    return names
