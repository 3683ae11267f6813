"""Bit-planes at the entropy of the weights, by the coder of constriction.

`encode` turns packed weights into bytes, `decode` turns those into planes. The
planes are coins to be coded, a coin of `nonzero` for each weight and a coin of
`sign` for each that is not zero. A plane has one probability, or one for each
index of an axis (row, column, channel) from a grid of levels: whatever takes
fewest bits, those of the levels included. Eight coins of one probability are
one symbol of a range coder.

Weights are cut into chunks of about a million that are coded on their own: a
leaf is shared by threads, and a shard is decoded without the others. Bytes are

  u8           version, 1
  two models   of `nonzero` and of `sign`, each of one of two kinds:
    u8 0       one probability for the whole plane,
    u16 p      p / 65536 that a bit is set;
    u8 i       one level for each index of axis i - 1,
    u8 L       from a grid of L levels,
    u8 low     of which low, ..., low + n - 1 are in use,
    u8 n       level low + j with a weight of 2^(e_j - 1), or 0 if e_j is 0:
    n nibbles  the e_j, the low half of a byte first
  u32, words   if an axis has levels: how many words, and the coded levels
  u32, u32     for each chunk: how many words, and the crc32 of its weights
  words        of all chunks

without gaps, little-endian, in words of 32 bits. All decisions and all
probabilities are made in integers: the bytes are a function of the weights. The
crc32 is over what a chunk decodes to, bits of `nonzero` and then of `sign` in C
order, so that no damage to any of the bytes passes for weights.

Needs constriction: pip install 'tern_jax[codec]'.
"""

import concurrent.futures
import dataclasses
import functools
import importlib
import itertools
import math
import os
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from tern_jax.packed import PackedTernary, packed_axis, plane_shape, validate

#: Version of the bytes that this module writes, and the only one it reads.
VERSION = 1

# Weights of a chunk. Less costs bytes, more costs memory.
_CHUNK = 1 << 20
# Probabilities are in 1 / _ONE, costs in 1 / _BIT bits.
_ONE = 1 << 16
_BIT = 1 << 20
# What the fixed-point probabilities of constriction add up to.
_TOTAL = 1 << 24
# Grids of levels to choose from.
_GRIDS = (3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192)
# An axis of fewer weights an index has nothing to gain from levels.
_FEWEST = 16

_Box = tuple[slice, ...]


def encode(packed: PackedTernary) -> bytes:
  """Codes the planes of packed weights; their scales are no part of it.

  With k_i of n_i bits set at index i, the bits that are paid are

    sum_i -k_i log2 p_i - (n_i - k_i) log2(1 - p_i)  + those of the model.

  A model of one p is 3 bytes. A model of levels takes some ½ log2 n_i bits an
  index: its p_i are x²(3 - 2x) at x = (l + ½) / L, a spacing that follows the
  error of a measured k_i / n_i, and L is the best of a few. Headers and ends
  take some 25 bytes a leaf and 14 a chunk.

  Args:
    packed: weights of any shape, on the host or a device.

  Returns:
    The same bytes for the same planes, wherever they are coded.

  Raises:
    ValueError: the weights break an invariant of `PackedTernary`.
    ImportError: constriction is not installed.

  >>> import jax.numpy as jnp
  >>> from tern_jax.base import Ternary
  >>> from tern_jax.packed import pack
  >>> codes = jnp.eye(64, dtype=jnp.int8)
  >>> packed = pack(Ternary(codes, jnp.ones(()), jnp.ones(())))
  >>> data = encode(packed)
  >>> packed.nonzero.size + packed.sign.size, len(data)
  (1024, 75)
  >>> nonzero, sign = decode(data, (64, 64))
  >>> bool((nonzero == packed.nonzero).all() & (sign == packed.sign).all())
  True

  Source: the range coder and its models are those of Bamler, arXiv 2201.01741;
  ½ log2 n bits for a parameter, Rissanen, doi 10.1109/TIT.1984.1056936.
  """
  validate(packed)
  stream, layout = _stream(), _Layout.of(packed.shape)
  planes = [layout.spread(x) for x in (packed.nonzero, packed.sign)]
  models = _fit(layout, planes[0], None), _fit(layout, planes[1], planes[0])
  parts = [bytes([VERSION]), *(m.header() for m in models)]
  if any(m.grid for m in models):
    coder = stream.queue.RangeEncoder()
    for m in models:
      m.put_levels(coder)
    words = _bytes(coder)
    parts += struct.pack("<I", len(words) // 4), words

  def chunk(i: int) -> tuple[bytes, bytes]:
    box = layout.box(i)
    nonzero, sign = (layout.unpack(x[box]) for x in planes)
    coder = stream.queue.RangeEncoder()
    for part, p in models[0].groups(layout, box).split(nonzero):
      _put(coder, part, p)
    groups = models[1].groups(layout, box)
    both = zip(groups.split(nonzero), groups.split(sign), strict=True)
    for (among, _), (part, p) in both:
      _put(coder, part[np.flatnonzero(among)], p)
    words = _bytes(coder)
    return struct.pack("<II", len(words) // 4, _crc(nonzero, sign)), words

  chunks = _threads(chunk, layout.chunks)
  parts += (entry for entry, _ in chunks)
  parts += (words for _, words in chunks)
  return b"".join(parts)


def decode(
  data: Any, shape: tuple[int, ...], region: tuple[slice, ...] = ()
) -> tuple[np.ndarray, np.ndarray]:
  """Decodes the planes of packed weights, or a part of them.

  Nothing in the bytes is trusted: what is allocated, and for how long it is
  decoded, follows from `shape` and from the number of bytes. A shape that is
  far too large for the bytes is refused before anything is allocated.

  Args:
    data: what `encode` returned: bytes, or a buffer or array of bytes.
    shape: shape of the weights.
    region: slices of the planes, such as the index of a shard; axes left out
      are whole. Chunks that lie outside are not decoded. Planes of a shape
      that has no axis to pack are decoded whole, and then cut.

  Returns:
    (nonzero, sign), uint8, of the shape of the planes in the region.

  Raises:
    ValueError: the bytes are damaged, or are not those of such a shape.
    ImportError: constriction is not installed.
  """
  stream, layout = _stream(), _Layout.of(shape)
  reader = _Reader(memoryview(data).cast("B"))
  (version,) = reader.numbers("<B")
  if version != VERSION:
    raise ValueError(f"the version must be {VERSION}, got {version}.")
  models = [_Model.read(reader, layout) for _ in range(2)]
  levels = b""
  if any(m.grid for m in models):
    levels = reader.take(4 * reader.numbers("<I")[0])
  table = np.frombuffer(reader.take(8 * layout.chunks), "<u4").reshape(-1, 2)
  ends = [0, *np.cumsum(table[:, 0], dtype=np.int64).tolist()]
  chunks = reader.take(4 * ends[-1])
  if reader.left:
    raise ValueError(f"{reader.left} bytes are left over.")
  coder = stream.queue.RangeDecoder(_words(levels))
  models = [m.get_levels(coder, layout) for m in models]
  wanted = layout.region(region)
  planes = [
    np.zeros([s.stop - s.start for s in wanted], np.uint8) for _ in "ns"
  ]

  def chunk(i: int) -> None:
    box = layout.box(i)
    shared = _intersection(box, wanted)
    if any(s.start >= s.stop for s in shared):
      return
    words = _words(chunks[4 * ends[i] : 4 * ends[i + 1]])
    coder = stream.queue.RangeDecoder(words)
    groups = models[0].groups(layout, box)
    nonzero = groups.join(_get(coder, n, p) for n, p in groups.sizes())
    groups = models[1].groups(layout, box)

    def signs() -> Iterator[np.ndarray]:
      for among, p in groups.split(nonzero):
        part = np.zeros(among.size, bool)
        at = np.flatnonzero(among)
        part[at] = _get(coder, at.size, p)
        yield part

    sign = groups.join(signs())
    if _crc(nonzero, sign) != table[i, 1]:
      raise ValueError(f"the crc32 of chunk {i} of {layout.chunks} differs.")
    to, of = _within(shared, wanted), _within(shared, box)
    for plane, bits in zip(planes, (nonzero, sign), strict=True):
      plane[to] = layout.pack(bits)[of]

  _threads(chunk, layout.chunks)
  nonzero, sign = (layout.gather(x, region) for x in planes)
  return nonzero, sign


@dataclasses.dataclass(frozen=True)
class _Layout:
  """How weights are cut into chunks.

  A chunk is a box of an array of shape `grid`: a plane; or, of a shape without
  an axis to pack, the bits of a plane in the shape of the weights. It has one
  index of each axis before `split`, `step` of that one, and all others whole.
  """

  shape: tuple[int, ...]
  axis: int | None
  grid: tuple[int, ...]
  split: int
  step: int
  chunks: int

  @classmethod
  def of(cls, shape: tuple[int, ...]) -> "_Layout":
    axis, shape = packed_axis(shape), tuple(shape) or (1,)
    grid = shape if axis is None else plane_shape(shape)
    limit = _CHUNK if axis is None else _CHUNK // 8
    behind = [math.prod(grid[i + 1 :]) for i in range(len(grid))]
    split = next(i for i, n in enumerate(behind) if n <= limit)
    most = limit // max(1, behind[split])
    # All about as long: a short one would not be worth its header.
    step = max(1, _ceil(grid[split], max(1, _ceil(grid[split], most))))
    chunks = math.prod(grid[:split]) * _ceil(grid[split], step)
    return cls(shape, axis, grid, split, step, chunks if math.prod(grid) else 0)

  @property
  def size(self) -> int:
    return math.prod(self.shape)

  def may_level(self, axis: int) -> bool:
    """Whether an axis has enough weights an index to gain from levels."""
    return self.size >= _FEWEST * self.shape[axis] > _FEWEST

  def box(self, i: int) -> _Box:
    """Returns where chunk i lies in an array of the grid."""
    n, ahead = self.grid[self.split], self.grid[: self.split]
    outer, inner = divmod(i, _ceil(n, self.step))
    at = [int(k) for k in np.unravel_index(outer, ahead)]
    start = inner * self.step
    return (
      *(slice(k, k + 1) for k in at),
      slice(start, min(start + self.step, n)),
      *(slice(0, k) for k in self.grid[self.split + 1 :]),
    )

  def weights(self, box: _Box) -> _Box:
    """Returns where a box of the grid lies in the array of weights."""
    unit = [8 if i == self.axis else 1 for i in range(len(box))]
    pairs = zip(unit, box, strict=True)
    return tuple(slice(k * s.start, k * s.stop) for k, s in pairs)

  def region(self, region: tuple[slice, ...]) -> _Box:
    """Returns a region of the planes as a box of the grid."""
    if self.axis is None:
      region = ()
    region = (*region, *[slice(None)] * (len(self.grid) - len(region)))
    bounds = [s.indices(n) for s, n in zip(region, self.grid, strict=True)]
    if any(step != 1 for _, _, step in bounds):
      raise ValueError(f"the steps of a region must be 1, got {region}.")
    return tuple(slice(a, max(a, b)) for a, b, _ in bounds)

  def spread(self, plane: Any) -> np.ndarray:
    """Returns a plane as an array of the grid."""
    plane = np.asarray(plane)
    if self.axis is not None:
      return plane
    return _unpack(plane, self.size).view(np.uint8).reshape(self.grid)

  def gather(self, x: np.ndarray, region: tuple[slice, ...]) -> np.ndarray:
    """Returns the plane that `spread` spread, or a region of it."""
    return x if self.axis is not None else _pack(x)[region]

  def unpack(self, x: np.ndarray) -> np.ndarray:
    """Returns a box of the grid as bits in the shape of its weights."""
    if self.axis is None:
      return x.view(bool)
    # Shifts are many times as fast as np.unpackbits along such an axis.
    bits = np.expand_dims(x, self.axis + 1) >> self._shifts()
    bits &= 1
    shape = list(x.shape)
    shape[self.axis] *= 8
    return bits.reshape(shape).view(bool)

  def pack(self, bits: np.ndarray) -> np.ndarray:
    """Returns what `unpack` unpacked."""
    if self.axis is None:
      return bits
    shape = list(bits.shape)
    shape[self.axis : self.axis + 1] = shape[self.axis] // 8, 8
    shifted = bits.view(np.uint8).reshape(shape) << self._shifts()
    return np.bitwise_or.reduce(shifted, axis=self.axis + 1)

  def counts(self, x: np.ndarray, axis: int) -> np.ndarray:
    """Counts the bits set at each index of an axis of the weights."""
    others = tuple(i for i in range(x.ndim) if i != axis)
    if axis != self.axis:
      return np.bitwise_count(x).sum(others, dtype=np.int64)
    bits = [(x >> j & 1).sum(others, dtype=np.int64) for j in range(8)]
    return np.stack(bits, -1).reshape(-1)

  def _shifts(self) -> np.ndarray:
    behind = self.shape[(self.axis or 0) + 1 :]
    return np.arange(8, dtype=np.uint8).reshape(8, *[1] * len(behind))


@dataclasses.dataclass(frozen=True)
class _Model:
  """Probabilities of the coins of a plane: `p`, or those of levels.

  Attributes:
    p: probability of the whole plane.
    grid: number of levels of the grid; 0 if the plane has one probability.
    axis: of the weights, each index of which has a level.
    low: lowest level in use.
    weights: e_j of each level from there on.
    index: level of each index of the axis.
  """

  p: int = 0
  grid: int = 0
  axis: int = 0
  low: int = 0
  weights: tuple[int, ...] = ()
  index: Any = None

  def header(self) -> bytes:
    """Returns the model, without the level of each index, as bytes."""
    if not self.grid:
      return struct.pack("<BH", 0, self.p)
    facts = self.axis + 1, self.grid, self.low, len(self.weights)
    pairs = itertools.zip_longest(*[iter(self.weights)] * 2, fillvalue=0)
    return bytes((*facts, *(a | b << 4 for a, b in pairs)))

  @classmethod
  def read(cls, reader: "_Reader", layout: _Layout) -> "_Model":
    """Reads what `header` returned."""
    (axis,) = reader.numbers("<B")
    if axis == 0:
      (p,) = reader.numbers("<H")
      if p == 0:
        raise ValueError("a probability must not be 0.")
      return cls(p)
    axis -= 1
    if axis >= len(layout.shape) or not layout.may_level(axis):
      raise ValueError(f"axis {axis} of {layout.shape} has no levels.")
    grid, low, n = reader.numbers("<BBB")
    halves = reader.take(_ceil(n, 2))
    weights = [e for byte in halves for e in (byte & 15, byte >> 4)][:n]
    if grid < 2 or low + n > grid or not any(weights):
      raise ValueError(f"{n} levels from {low} are not of a grid of {grid}.")
    return cls(0, grid, axis, low, tuple(weights))

  def put_levels(self, coder: Any) -> None:
    """Codes the level of each index."""
    if len(self.weights) > 1:
      coder.encode((self.index - self.low).astype(np.int32), self._prior())

  def get_levels(self, coder: Any, layout: _Layout) -> "_Model":
    """Decodes what `put_levels` coded."""
    if not self.grid:
      return self
    n, index = layout.shape[self.axis], np.zeros((), np.int32)
    if len(self.weights) > 1:
      index = _decode(coder, self._prior(), n)
    return dataclasses.replace(self, index=np.broadcast_to(index, n) + self.low)

  def groups(self, layout: _Layout, box: _Box) -> "_Groups":
    """Returns how the weights of a chunk are grouped by their probability."""
    weights = layout.weights(box)
    shape = tuple(s.stop - s.start for s in weights)
    if not self.grid:
      return _Groups(shape, 0, None, [0, shape[0]], [self.p])
    index = self.index[weights[self.axis]]
    levels, counts = np.unique(index, return_counts=True)
    # The order of indices of one level is their own: the sort is stable.
    order = np.argsort(index, kind="stable") if levels.size > 1 else None
    bounds = [0, *np.cumsum(counts).tolist()]
    chances = _levels(self.grid)[levels].tolist()
    return _Groups(shape, self.axis, order, bounds, chances)

  def _prior(self) -> Any:
    return _categorical(tuple(1 << e >> 1 for e in self.weights))


@dataclasses.dataclass(frozen=True)
class _Groups:
  """Bits of a chunk, sorted along an axis by their probability.

  Attributes:
    shape: of the weights of the chunk.
    axis: along which the indices are sorted.
    order: indices in the order of the groups, None if there is one group.
    bounds: where each group begins in that order, and where the last ends.
    chances: probability of each group.
  """

  shape: tuple[int, ...]
  axis: int
  order: np.ndarray | None
  bounds: list[int]
  chances: list[int]

  def split(self, bits: np.ndarray) -> Iterator[tuple[np.ndarray, int]]:
    """Yields the bits of each group, flat, and their probability."""
    if self.order is not None:
      bits = bits.take(self.order, self.axis)
    for at, p in zip(self._slices(), self.chances, strict=True):
      yield bits[at].reshape(-1), p

  def sizes(self) -> Iterator[tuple[int, int]]:
    """Yields the number of bits of each group, and their probability."""
    row = math.prod(self.shape) // self.shape[self.axis]
    for (a, b), p in zip(
      itertools.pairwise(self.bounds), self.chances, strict=True
    ):
      yield row * (b - a), p

  def join(self, parts: Iterable[np.ndarray]) -> np.ndarray:
    """Returns the bits that `split` split."""
    bits = np.empty(self.shape, bool)
    for at, part in zip(self._slices(), parts, strict=True):
      bits[at] = part.reshape(bits[at].shape)
    if self.order is None:
      return bits
    return bits.take(np.argsort(self.order), self.axis)

  def _slices(self) -> Iterator[tuple[slice, ...]]:
    for a, b in itertools.pairwise(self.bounds):
      yield (*[slice(None)] * self.axis, slice(a, b))


def _fit(layout: _Layout, plane: np.ndarray, among: Any) -> _Model:
  """Returns the model of least cost.

  Args:
    layout: of the plane.
    plane: in the grid.
    among: plane of the coins that are coded, None for all weights.
  """

  def number(x: np.ndarray) -> int:
    return int(np.bitwise_count(x).sum(dtype=np.int64))

  bits = _costs()
  k, n = number(plane), layout.size if among is None else number(among)
  p = min(max((k * _ONE + n // 2) // max(n, 1), 1), _ONE - 1)
  best = _Model(p)
  least = 24 * _BIT + k * int(bits[p]) + (n - k) * int(bits[_ONE - p])
  for axis, length in enumerate(layout.shape):
    if not layout.may_level(axis):
      continue
    ks = layout.counts(plane, axis)
    if among is None:
      ns = np.full(length, layout.size // length)
    else:
      ns = layout.counts(among, axis)
    ratios = np.where(ns, (ks * _ONE + ns // 2) // np.maximum(ns, 1), p)
    for grid in _GRIDS:
      if grid * grid * length > 4 * n:
        break  # Finer than what the counts are good for.
      index = np.searchsorted(_thresholds(grid), ratios, side="right")
      counts = np.bincount(index)
      low = int(np.flatnonzero(counts)[0])
      # Rounded in the logarithm.
      weights = tuple(
        min(15, ((2 * c * c).bit_length() + 1) // 2)
        for c in counts[low:].tolist()
      )
      model = _Model(0, grid, axis, low, weights, index)
      prior = np.array([1 << e >> 1 for e in weights])
      prior = np.maximum(prior * _ONE // prior.sum(), 1)
      chances = _levels(grid)[index]
      cost = (
        8 * (len(model.header()) + 8) * _BIT
        + int(counts[low:] @ bits[prior])
        + int(ks @ bits[chances] + (ns - ks) @ bits[_ONE - chances])
      )
      if cost < least:
        best, least = model, cost
  return best


@functools.cache
def _costs() -> np.ndarray:
  """Returns the cost of an event of probability i / _ONE, for each i > 0."""
  # No logarithm but those of powers of 2, which are exact, is as close to the
  # middle of two multiples of 1 / _BIT as the floats of any platform are off.
  logs = np.log2(np.arange(1, _ONE + 1))
  return np.append(0, np.rint((16 - logs) * _BIT)).astype(np.int64)


@functools.cache
def _levels(grid: int) -> np.ndarray:
  """Returns the probability of each level of a grid.

  Of k / n, the standard error is ½ / √n in units of arcsin √p. x²(3 - 2x) is
  close to the sine squared of ½π x, and rational.
  """
  x = 2 * np.arange(grid) + 1
  p = x * x * (3 * grid - x) * _ONE // (4 * grid**3)
  return np.clip(p, 1, _ONE - 1)


@functools.cache
def _thresholds(grid: int) -> np.ndarray:
  """Returns the least k / n, in 1 / _ONE, that a level codes at less cost."""
  bits, p = _costs(), _levels(grid)
  one, zero = -np.diff(bits[p]), np.diff(bits[_ONE - p])
  return _ONE * zero // (one + zero) + 1


@functools.cache
def _coins(p: int) -> Any:
  """Returns the model of eight coins, the first in the lowest bit."""
  q = _ONE - p
  by_heads = [p**k * q ** (8 - k) for k in range(9)]
  return _categorical(tuple(by_heads[i.bit_count()] for i in range(256)))


def _categorical(weights: tuple[int, ...]) -> Any:
  """Returns a model of probabilities in proportion to integers.

  Of what it is given, scaled to _TOTAL less the number of symbols, the library
  takes the integer parts and adds 1 to each. Integers that have that sum are
  scaled by exactly 1, and are exact in float32.
  """
  total = _TOTAL - len(weights)
  chances = [w * total // sum(weights) for w in weights]
  chances[weights.index(max(weights))] += total - sum(chances)
  model = _stream().model.Categorical
  return model(np.array(chances, np.float32), lazy=False, perfect=False)


def _put(coder: Any, bits: np.ndarray, p: int) -> None:
  """Codes bits of one probability."""
  data = _pack(bits)
  if bits.size % 8 and 2 * p > _ONE:
    data[-1] |= 255 << bits.size % 8 & 255  # Fills up with what costs less.
  coder.encode(data.astype(np.int32), _coins(p))


def _get(coder: Any, n: int, p: int) -> np.ndarray:
  """Decodes what `_put` coded."""
  return _unpack(_decode(coder, _coins(p), _ceil(n, 8)).astype(np.uint8), n)


def _decode(coder: Any, model: Any, n: int) -> np.ndarray:
  """Decodes n symbols."""
  try:
    return coder.decode(model, n)
  except AssertionError as e:
    raise ValueError(f"the coded words are damaged: {e}") from e


def _pack(bits: np.ndarray) -> np.ndarray:
  return np.packbits(bits, bitorder="little")


def _unpack(data: np.ndarray, n: int) -> np.ndarray:
  return np.unpackbits(data, count=n, bitorder="little").view(bool)


def _crc(nonzero: np.ndarray, sign: np.ndarray) -> int:
  return zlib.crc32(_pack(sign).data, zlib.crc32(_pack(nonzero).data))


def _bytes(coder: Any) -> bytes:
  return coder.get_compressed().astype("<u4").tobytes()


def _words(data: Any) -> np.ndarray:
  return np.frombuffer(data, "<u4").astype(np.uint32)


@dataclasses.dataclass
class _Reader:
  """Reads bytes from the front."""

  data: memoryview

  @property
  def left(self) -> int:
    return len(self.data)

  def take(self, n: int) -> memoryview:
    if n > self.left:
      raise ValueError(f"{n} bytes are expected where {self.left} are left.")
    taken, self.data = self.data[:n], self.data[n:]
    return taken

  def numbers(self, layout: str) -> tuple[int, ...]:
    return struct.unpack(layout, self.take(struct.calcsize(layout)))


def _intersection(a: _Box, b: _Box) -> _Box:
  pairs = zip(a, b, strict=True)
  return tuple(
    slice(max(s.start, t.start), min(s.stop, t.stop)) for s, t in pairs
  )


def _within(inner: _Box, outer: _Box) -> _Box:
  pairs = zip(inner, outer, strict=True)
  return tuple(slice(s.start - t.start, s.stop - t.start) for s, t in pairs)


def _ceil(n: int, by: int) -> int:
  return -(-n // by)


def _threads(f: Callable[[int], Any], n: int) -> list[Any]:
  """Returns f(0), ..., f(n - 1); threads share all that numpy does."""
  if n < 2:
    return list(map(f, range(n)))
  with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
    return list(pool.map(f, range(n)))


@functools.cache
def _stream() -> Any:
  """Returns the module of constriction's stream codes."""
  try:
    return importlib.import_module("constriction").stream
  except ImportError as e:
    raise ImportError(
      "codec='entropy' needs constriction: pip install 'tern_jax[codec]'."
    ) from e
