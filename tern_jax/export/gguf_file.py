"""What a GGUF file of `to_gguf` holds, read without ggml or its package.

No count, size or offset of the file is trusted: what is read is bounded by the
size of the file.
"""

import dataclasses
import math
import os
import struct
from collections.abc import Iterator
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from tern_jax.export import files
from tern_jax.storage.layout import packed_axis, plane_shape
from tern_jax.storage.leaves import CheckpointError, Json, PathLike
from tern_jax.storage.packed import PackedTernary

#: First bytes of a file.
MAGIC = b"GGUF"
# ggml's types, by number: the name, and the dtype of the elements.
_DENSE = {
  0: ("F32", "<f4"),
  1: ("F16", "<f2"),
  24: ("I8", "<i1"),
  25: ("I16", "<i2"),
  26: ("I32", "<i4"),
  27: ("I64", "<i8"),
  28: ("F64", "<f8"),
  30: ("BF16", "<u2"),
}
# Weights that are decoded at a time.
_PART = 1 << 20
# struct's letters of the types of metadata; 8 is a string, 9 an array.
_VALUES = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_POWERS = np.array([1, 3, 9, 27, 81], np.uint8)[:, None]


class Ternary(NamedTuple):
  """A type that holds ternary weights exactly.

  Args:
    name: what ggml calls it.
    number: its number there.
    block: consecutive weights that share a scale.
    nbytes: of a block.
    scale: where in a block the two bytes of the scale are.
    file_type: number of a file whose matrices are of this type.
  """

  name: str
  number: int
  block: int
  nbytes: int
  scale: slice
  file_type: int


#: By name.
TERNARY = {
  x.name: x
  for x in (
    Ternary("TQ1_0", 34, 256, 54, slice(52, 54), 36),
    Ternary("TQ2_0", 35, 256, 66, slice(64, 66), 37),
    Ternary("Q2_0", 42, 64, 18, slice(0, 2), 41),
  )
}
_TERNARY = {x.number: x for x in TERNARY.values()}


@dataclasses.dataclass(frozen=True)
class Tensor:
  """A tensor as the header of a file describes it.

  Args:
    name: its name.
    type: number of its type in ggml.
    shape: in NumPy's order of axes.
    offset: from the start of the file, in bytes.
  """

  name: str
  type: int
  shape: tuple[int, ...]
  offset: int

  @property
  def type_name(self) -> str:
    """What ggml calls its type."""
    known = _DENSE | _TERNARY
    return known[self.type][0] if self.type in known else f"type {self.type}"

  @property
  def is_known(self) -> bool:
    """Whether its values can be read here."""
    return self.type in _DENSE | _TERNARY

  @property
  def is_ternary(self) -> bool:
    """Whether it is of one of the types that hold ternary weights."""
    return self.type in _TERNARY

  @property
  def nbytes(self) -> int:
    """Bytes in the file, 0 of a type that `to_gguf` does not write."""
    n = math.prod(self.shape)
    if self.is_ternary:
      return n // _TERNARY[self.type].block * _TERNARY[self.type].nbytes
    if self.type not in _DENSE:
      return 0
    return n * np.dtype(_DENSE[self.type][1]).itemsize


def read_header(path: PathLike) -> tuple[Json, list[Tensor]]:
  """Returns the metadata and the tensors of a file of any origin.

  Metadata other than numbers, strings and lists of strings is left out.

  Raises:
    CheckpointError: the header is damaged.
    OSError: the file cannot be read.
  """
  with files.local_file(path).open("rb") as file:
    try:
      return _Header(file).read()
    except ValueError as e:
      raise CheckpointError(f"cannot read {os.fspath(path)}: {e}.") from e


def examine(
  path: PathLike,
) -> Iterator[tuple[Tensor, np.ndarray | PackedTernary | CheckpointError]]:
  """Yields each tensor of a file of `to_gguf`, or what is wrong with it.

  A GGUF file has no checksums. An error is a structure that is not whole, a
  code that is none, or a value that is not finite.

  Raises:
    CheckpointError: the header is damaged, or the file is another's.
    OSError: the file cannot be read.
  """
  path = files.local_file(path)
  metadata, tensors = read_header(path)
  version = metadata.get("tern_jax.format")
  if type(version) is not int:
    raise CheckpointError(f"{path} was not written by to_gguf.")
  if version > files.FORMAT:
    reads = f"this tern_jax reads up to {files.FORMAT}: upgrade tern_jax"
    raise CheckpointError(f"{path} has format {version}, but {reads}.")
  # An empty list is not written.
  if metadata.get("tern_jax.ternary", []) != [
    x.name for x in _ternary(tensors)
  ]:
    fault = "its ternary tensors are not those of its metadata"
    raise CheckpointError(f"{path} is damaged: {fault}.")
  with path.open("rb") as file:
    for tensor in tensors:
      try:
        yield tensor, _decode(file, tensor)
      except ValueError as e:
        fault = f"{path}: {tensor.name} is damaged: {e}."
        yield tensor, CheckpointError(fault)


def _ternary(tensors: list[Tensor]) -> list[Tensor]:
  return [x for x in tensors if x.is_ternary]


class _Header:
  """Reads the header of a file, little-endian."""

  def __init__(self, file: BinaryIO):
    self._file = file
    self._size = os.fstat(file.fileno()).st_size

  def read(self) -> tuple[Json, list[Tensor]]:
    """Returns the metadata and the tensors."""
    if self._bytes(4) != MAGIC:
      raise ValueError("it is no GGUF file")
    if (version := self._number("I")) not in (2, 3):
      raise ValueError(f"its version is {version}, but 2 and 3 are known")
    # The least that a tensor and a value take.
    n_tensors, n_values = self._count(24), self._count(13)
    metadata = {}
    for _ in range(n_values):
      key, value = self._string(), self._value(self._number("I"))
      if value is not None:
        metadata[key] = value
    found = [self._tensor() for _ in range(n_tensors)]
    align = metadata.get("general.alignment", 32)
    if type(align) is not int or not 0 < align <= 1 << 16:
      raise ValueError(f"its alignment is {align}")
    start = -(-self._file.tell() // align) * align
    files.check_unique(x.name for x in found)
    return metadata, [
      dataclasses.replace(x, offset=start + x.offset) for x in found
    ]

  def _bytes(self, n: int) -> bytes:
    if n > self._size - self._file.tell():
      raise ValueError("it ends within its header")
    return self._file.read(n)

  def _number(self, letter: str) -> Any:
    letter = f"<{letter}"
    return struct.unpack(letter, self._bytes(struct.calcsize(letter)))[0]

  def _count(self, least: int) -> int:
    n = self._number("Q")
    if n * least > self._size:
      raise ValueError(f"it claims {n} entries, more than it has bytes for")
    return n

  def _string(self) -> str:
    return self._bytes(self._count(1)).decode()

  def _value(self, kind: int) -> Any:
    if kind == _STRING:
      return self._string()
    if kind != _ARRAY:
      return self._number(self._letter(kind))
    kind = self._number("I")
    if kind == _STRING:
      return [self._string() for _ in range(self._count(8))]
    width = struct.calcsize(self._letter(kind))
    self._bytes(self._count(width) * width)
    return None

  def _letter(self, kind: int) -> str:
    if kind not in _VALUES:
      raise ValueError(f"its metadata has a value of type {kind}")
    return _VALUES[kind]

  def _tensor(self) -> Tensor:
    name, ndim = self._string(), self._number("I")
    if ndim > 4:
      raise ValueError(f"{name} has {ndim} axes, but ggml has up to 4")
    shape = tuple(self._number("Q") for _ in range(ndim))[::-1]
    return Tensor(name, self._number("I"), shape, self._number("Q"))


def values(path: PathLike, x: Tensor) -> np.ndarray:
  """Returns the values of a tensor, those of ternary weights in float32.

  Raises:
    CheckpointError: it is damaged, or of a type that is not known here.
    OSError: the file cannot be read.
  """
  codes, scales = parts(path, x)
  if scales is None:
    return codes
  blocks = codes.reshape(-1, _TERNARY[x.type].block).astype(np.float32)
  return (blocks * scales.reshape(-1, 1)).reshape(x.shape)


def parts(path: PathLike, x: Tensor) -> tuple[np.ndarray, np.ndarray | None]:
  """Returns int8 codes and their scales, one a block, or values and None.

  Raises:
    CheckpointError: it is damaged, or of a type that is not known here.
    OSError: the file cannot be read.
  """
  path = files.local_file(path)
  try:
    with path.open("rb") as file:
      data = _read(file, x)
      if not x.is_ternary:
        return _dense(x, data), None
      blocks, scales = _blocks(x, data)
      codes = _DECODE[_TERNARY[x.type].name](blocks)
      _check_codes(codes)
      return codes.reshape(x.shape), scales
  except ValueError as e:
    raise CheckpointError(f"{path}: {x.name} is damaged: {e}.") from e


def _decode(file: BinaryIO, x: Tensor) -> np.ndarray | PackedTernary:
  """Returns the values of a tensor, checked."""
  data = _read(file, x)
  if not x.is_ternary:
    return _dense(x, data)
  blocks, scales = _blocks(x, data)
  arrays: dict[str, Any] = _planes(x, blocks) | {"w_p": scales, "w_n": scales}
  return PackedTernary(**arrays, shape=x.shape, axis=packed_axis(x.shape, 0))


def _read(file: BinaryIO, x: Tensor) -> bytes:
  if x.type not in _DENSE | _TERNARY:
    raise ValueError(f"to_gguf writes no tensors of {x.type_name}")
  if x.is_ternary:
    block = _TERNARY[x.type].block
    if not x.shape or x.shape[-1] % block:
      raise ValueError(f"its rows are no multiple of {block}")
  if x.offset + x.nbytes > os.fstat(file.fileno()).st_size:
    raise ValueError("the file ends before it does")
  file.seek(x.offset)
  return file.read(x.nbytes)


def _dense(x: Tensor, data: bytes) -> np.ndarray:
  name, dtype = _DENSE[x.type]
  dense = np.frombuffer(data, dtype).reshape(x.shape)
  if name == "BF16":  # the upper half of a float32
    dense = (dense.astype("<u4") << 16).view("<f4")
  if not np.all(np.isfinite(dense)):
    raise ValueError("it has values that are not finite")
  return dense


def _blocks(x: Tensor, data: bytes) -> tuple[np.ndarray, np.ndarray]:
  """Returns the bytes of the codes, by block, and the scales, by row."""
  kind = _TERNARY[x.type]
  blocks = np.frombuffer(data, np.uint8).reshape(-1, kind.nbytes)
  scales = blocks[:, kind.scale].copy().view("<f2").astype(np.float32)
  if not np.all(np.isfinite(scales)):
    raise ValueError("it has scales that are not finite")
  scales = scales.reshape(*x.shape[:-1], -1)
  first = kind.scale.start == 0
  return blocks[:, 2:] if first else blocks[:, : kind.scale.start], scales


def _planes(x: Tensor, blocks: np.ndarray) -> dict[str, np.ndarray]:
  """Returns bit-planes, made part by part: codes take four times as much."""
  axis, block = packed_axis(x.shape, 0), _TERNARY[x.type].block
  decode = _DECODE[_TERNARY[x.type].name]
  inner = math.prod(x.shape[1:])
  # Along the first axis, in whole blocks and whole bytes.
  whole = 8 if len(x.shape) > 1 else block
  step = max(1, _PART // (whole * inner)) * whole
  shape = plane_shape(x.shape)
  nonzero, sign = np.empty(shape, np.uint8), np.empty(shape, np.uint8)
  for start in range(0, x.shape[0], step):
    n = min(step, x.shape[0] - start)
    part = slice(start * inner // block, (start + n) * inner // block)
    codes = decode(blocks[part]).reshape(n, *x.shape[1:])
    _check_codes(codes)
    first = start // 8 if axis == 0 else start
    for plane, bits in ((nonzero, codes != 0), (sign, codes < 0)):
      packed = np.packbits(bits, axis, bitorder="little")
      plane[first : first + len(packed)] = packed
  return {"nonzero": nonzero, "sign": sign}


def _check_codes(codes: np.ndarray) -> None:
  if np.any(codes > 1):
    raise ValueError("it has a code that is not -1, 0 or 1")


def _tq1_0(blocks: np.ndarray) -> np.ndarray:
  """Returns codes: a byte has 5 digits to the base 3, the last 4 have 4."""
  parts = []
  for part, n in (
    (blocks[:, :32], 5),
    (blocks[:, 32:48], 5),
    (blocks[:, 48:], 4),
  ):
    # A byte is a fraction of 256, of which the first digit is asked: powers of
    # 3 move the others there, modulo 256.
    moved = (part[:, None] * _POWERS[:n]).astype(np.uint16)
    parts.append((moved * 3 >> 8).reshape(len(part), -1))
  return np.concatenate(parts, axis=1).astype(np.int8) - np.int8(1)


def _tq2_0(blocks: np.ndarray) -> np.ndarray:
  """Returns codes: a byte has 4 of 2 bits, which lie 32 weights apart."""
  shifts = np.array([0, 2, 4, 6], np.uint8)[:, None]
  codes = blocks.reshape(-1, 2, 1, 32) >> shifts & 3
  return codes.reshape(len(blocks), -1).astype(np.int8) - np.int8(1)


def _q2_0(blocks: np.ndarray) -> np.ndarray:
  """Returns codes: a byte has 4 of 2 bits, one after the other."""
  codes = blocks[:, :, None] >> np.array([0, 2, 4, 6], np.uint8) & 3
  return codes.reshape(len(blocks), -1).astype(np.int8) - np.int8(1)


_DECODE = {"TQ1_0": _tq1_0, "TQ2_0": _tq2_0, "Q2_0": _q2_0}
