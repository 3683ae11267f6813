"""How weights are cut into chunks, and how their bits lie in the planes."""

import dataclasses
import math

import numpy as np
from numpy.typing import ArrayLike

from tern_jax.storage.entropy.coding import pack_bits
from tern_jax.storage.packed import packed_axis, plane_shape

# Weights of a chunk. Less costs bytes, more costs memory.
_CHUNK = 1 << 20
# Levels of an axis with fewer weights an index cost more than they save.
_FEWEST = 16
# Longest axis of neighbors: each of its indices is a step of its own.
_SHORT = 16

#: A block of an array: one slice for each axis.
Box = tuple[slice, ...]
#: How many bits are set at each index, by the axis.
Tallies = dict[int, np.ndarray]


def _ceil(n: int, by: int) -> int:
  return -(-n // by)


@dataclasses.dataclass(frozen=True)
class Layout:
  """How weights are cut into chunks.

  A chunk is a block of an array of shape `grid`: of a plane; or, for a shape
  without an axis to pack, of the bits of a plane in the shape of the weights.
  """

  shape: tuple[int, ...]  # of the weights, at least one axis
  axis: int | None  # of the weights, that the planes pack
  grid: tuple[int, ...]
  block: tuple[int, ...]  # of a chunk; the last of an axis may be shorter

  @classmethod
  def of(cls, shape: tuple[int, ...]) -> "Layout":
    """Returns the layout of weights of a shape."""
    axis, shape = packed_axis(shape), tuple(shape) or (1,)
    grid = shape if axis is None else plane_shape(shape)
    limit = _CHUNK if axis is None else _CHUNK // 8
    block = [max(1, n) for n in grid]
    # The longest axis is cut first: neighbors along short ones stay together.
    for i in sorted(range(len(grid)), key=lambda i: -shape[i]):
      most = max(1, limit // (math.prod(block) // block[i]))
      # All about as long: a short one would not be worth its header.
      block[i] = _ceil(block[i], _ceil(block[i], most))
    return cls(shape, axis, grid, tuple(block))

  @property
  def size(self) -> int:
    """Number of weights."""
    return math.prod(self.shape)

  @property
  def chunks(self) -> int:
    """Number of chunks."""
    return math.prod(map(_ceil, self.grid, self.block))

  def may_level(self, axis: int) -> bool:
    """Whether an axis has enough weights an index to gain from levels."""
    return self.size >= _FEWEST * self.shape[axis] > _FEWEST

  def may_neighbor(self, axes: range) -> bool:
    """Whether there are these axes, short and not packed."""
    sizes = [self.shape[i] for i in axes if i < len(self.shape)]
    if len(sizes) < len(axes) or self.axis in axes:
      return False
    return all(1 < n <= _SHORT for n in sizes) and math.prod(sizes) <= _SHORT**2

  def box(self, i: int) -> Box:
    """Returns where chunk i lies in an array of the grid."""
    counts = tuple(map(_ceil, self.grid, self.block))
    at = map(int, np.unravel_index(i, counts))
    blocks = zip(at, self.block, self.grid, strict=True)
    return tuple(slice(k * b, min((k + 1) * b, n)) for k, b, n in blocks)

  def weights(self, box: Box) -> Box:
    """Returns where a box of the grid lies in the array of weights."""
    unit = [8 if i == self.axis else 1 for i in range(len(box))]
    pairs = zip(unit, box, strict=True)
    return tuple(slice(k * s.start, k * s.stop) for k, s in pairs)

  def spread(self, plane: ArrayLike) -> np.ndarray:
    """Returns a plane as an array of the grid."""
    plane = np.asarray(plane)
    if self.axis is not None:
      return plane
    bits = np.unpackbits(plane, count=self.size, bitorder="little")
    return bits.reshape(self.grid)

  def gather(self, x: np.ndarray) -> np.ndarray:
    """Returns the plane that `spread` made an array of the grid."""
    return x if self.axis is not None else pack_bits(x)

  def unpack(self, x: np.ndarray) -> np.ndarray:
    """Returns a box of the grid as bools in the shape of its weights."""
    if self.axis is None:
      return x.view(bool)
    # Shifts are many times as fast as np.unpackbits along such an axis.
    bits = np.expand_dims(x, self.axis + 1) >> self._shifts()
    bits &= 1
    shape = (n * 8 if i == self.axis else n for i, n in enumerate(x.shape))
    return bits.reshape(*shape).view(bool)

  def pack(self, bits: np.ndarray) -> np.ndarray:
    """Returns what `unpack` unpacked."""
    if self.axis is None:
      return bits
    shape = list(bits.shape)
    shape[self.axis : self.axis + 1] = shape[self.axis] // 8, 8
    shifted = bits.view(np.uint8).reshape(shape) << self._shifts()
    return np.bitwise_or.reduce(shifted, axis=self.axis + 1)

  def tallies(self, x: np.ndarray) -> Tallies:
    """Counts the bits set at each index of the axes that may have levels."""
    axes = range(len(self.shape))
    return {i: self._tally(x, i) for i in axes if self.may_level(i)}

  def _tally(self, x: np.ndarray, axis: int) -> np.ndarray:
    rows = np.moveaxis(x, axis, 0).reshape(x.shape[axis], -1)
    if beyond := -rows.shape[1] % 8:
      rows = np.pad(rows, ((0, 0), (0, beyond)))
    # Eight bytes at a time.
    words = np.ascontiguousarray(rows).view(np.uint64)
    if axis != self.axis:
      return np.bitwise_count(words).sum(1, dtype=np.int64)
    # A byte holds eight indices of the packed axis: bit j of every byte of a
    # word belongs to the same one, and is counted in all of them at once.
    ones = np.uint64(0x0101010101010101)
    places = (np.bitwise_count(words & ones << j) for j in range(8))
    return np.stack([x.sum(1, np.int64) for x in places], -1).reshape(-1)

  def _shifts(self) -> np.ndarray:
    behind = self.shape[(self.axis or 0) + 1 :]
    return np.arange(8, dtype=np.uint8).reshape(8, *[1] * len(behind))
