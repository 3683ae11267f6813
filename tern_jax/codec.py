"""Bit-planes at the entropy of the weights, by the coder of constriction.

`encode` turns packed weights into bytes, `decode` turns those into planes. The
planes are coins to be coded, a coin of `nonzero` for each weight and a coin of
`sign` for each that is not zero. All coins of a plane have one probability; or
one for each index of an axis (row, column, channel), from a grid of levels; or
one for each sum of the neighbors that are known already along short axes, such
as those of a convolution: whatever takes fewest bits, its own included. Eight
coins of one probability are one symbol of a range coder.

How few bytes: let H be the entropy, in bits, by the shares of -1, 0 and +1 in
the tensor; or by the share of non-zeros in each row (column, channel) of n
weights and the share of signs in the tensor, and

  log2 C(n),  C(n) = Σ_k binom(n, k) (k/n)^k (1 - k/n)^(n-k) ≈ √(½πn)

more for each row. Of rows of 100 weights and more, a leaf takes at most 1.005
times the lesser of both, and 64 bytes. Of rows of 20 weights that are far from
alike it has been .8 % instead of .5 %. The entropy by rows alone cannot be met:
whatever the code, some weights of a row take at least log2 C(n) bits more
(Shtarkov 1987), since a reader does not know their share. This is more than
.5 % of the entropy itself in rows of less than 2,000 weights if 90 % are zeros,
of less than 16,000 if 99 % are.

Weights are cut into chunks of about a million that are coded on their own: a
leaf is shared by threads, and a shard is decoded without the others. Bytes are

  u8           version, 1
  two models   of `nonzero` and of `sign`, each of one of two kinds:
    u8 m       neighbors along m axes, 0 if none are looked at;
    u8 first   only if m is not 0: the first of those axes,
    u16s       p: p / 65536 is the probability of a bit, for each sum of the
               neighbors; of bits, 0 ... m, for `nonzero`; of codes, -m ... m,
               for `sign`. Those beyond the edge of the chunk count as 0.
    u8 128 + i one level for each index of axis i,
    u8 L       from a grid of L levels,
    u8 low     of which low ... low + n - 1 are in use,
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
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from tern_jax.storage.packed import (
  PackedTernary,
  packed_axis,
  plane_shape,
  validate,
)

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
# Longest axis of neighbors: each of its indices is a step of its own.
_SHORT = 16
# Weights, or symbols, that are looked at in one go: indices take 8 bytes each,
# which of a whole chunk are more than all the rest of it.
_BLOCK = 1 << 16
# What the first byte of a model adds to an axis of levels.
_LEVELS = 128

_Box = tuple[slice, ...]


def encode(packed: PackedTernary) -> bytes:
  """Codes the planes of packed weights; their scales are no part of it.

  With k_i of n_i bits set at index i, or beside neighbors of sum i, paid are

    sum_i -k_i log2 p_i - (n_i - k_i) log2(1 - p_i)

  bits and those of the model. A probability of all or of one sum takes 2 bytes,
  a level some ½ log2 n_i bits: it stands for p = x²(3 - 2x), x = (l + ½) / L, a
  spacing that follows the error of a measured k_i / n_i, and L is the best of a
  few. Headers and ends take some 20 bytes a leaf.

  Args:
    packed: weights of any shape, on the host or a device.

  Returns:
    The same bytes for the same planes, wherever they are coded.

  Raises:
    ValueError: the weights break an invariant of `PackedTernary`.
    ImportError: constriction is not installed.

  >>> import jax.numpy as jnp
  >>> from tern_jax.core.containers import Ternary
  >>> from tern_jax.storage.packed import pack
  >>> codes = jnp.eye(64, dtype=jnp.int8)
  >>> packed = pack(Ternary(codes, jnp.ones(()), jnp.ones(())))
  >>> data = encode(packed)
  >>> packed.nonzero.size + packed.sign.size, len(data)
  (1024, 75)
  >>> nonzero, sign = decode(data, (64, 64))
  >>> bool((nonzero == packed.nonzero).all() & (sign == packed.sign).all())
  True

  Source: the range coder and its models are those of Bamler, arXiv 2201.01741;
  ½ log2 n bits for a parameter, Rissanen, doi 10.1109/TIT.1984.1056936; C(n),
  Shtarkov, "Universal sequential coding of single messages", 1987.
  """
  validate(packed)
  stream, layout = _stream(), _Layout.of(packed.shape)
  planes = [layout.spread(x) for x in (packed.nonzero, packed.sign)]
  tallies = [layout.tallies(x) for x in planes]
  models = (
    _fit(layout, planes[0], None, tallies[0], None),
    _fit(layout, planes[1], planes[0], *tallies[::-1]),
  )
  parts = [bytes([VERSION]), *(m.header() for m in models)]
  if leveled := [m for m in models if isinstance(m, _Levels)]:
    coder = stream.queue.RangeEncoder()
    for m in leveled:
      m.put_index(coder)
    words = _bytes(coder)
    parts += struct.pack("<I", len(words) // 4), words

  def chunk(i: int) -> tuple[bytes, bytes]:
    box = layout.box(i)
    where = layout.weights(box)
    nonzero, sign = (layout.unpack(x[box]) for x in planes)
    coder = stream.queue.RangeEncoder()
    for bits, p in models[0].split(where, nonzero, None):
      _put(coder, bits, p)
    for bits, p in models[1].split(where, sign, nonzero):
      _put(coder, bits, p)
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
  models = [_read(reader, layout, signed) for signed in (False, True)]
  levels = b""
  if leveled := [m for m in models if isinstance(m, _Levels)]:
    levels = reader.take(4 * reader.numbers("<I")[0])
  table = np.frombuffer(reader.take(8 * layout.chunks), "<u4").reshape(-1, 2)
  ends = [0, *np.cumsum(table[:, 0], dtype=np.int64).tolist()]
  chunks = reader.take(4 * ends[-1])
  if reader.left:
    raise ValueError(f"{reader.left} bytes are left over.")
  coder = stream.queue.RangeDecoder(_words(levels))
  for m in leveled:
    m.get_index(coder, layout.shape[m.axis])
  wanted = layout.region(region)
  planes = [np.zeros(_lengths(wanted), np.uint8) for _ in range(2)]

  def chunk(i: int) -> None:
    box = layout.box(i)
    shared = _intersection(box, wanted)
    if any(s.start >= s.stop for s in shared):
      return
    words = _words(chunks[4 * ends[i] : 4 * ends[i + 1]])
    get = functools.partial(_get, stream.queue.RangeDecoder(words))
    where = layout.weights(box)
    nonzero = models[0].join(where, get, None)
    sign = models[1].join(where, get, nonzero)
    if _crc(nonzero, sign) != table[i, 1]:
      raise ValueError(f"the crc32 of chunk {i} of {layout.chunks} differs.")
    to, of = _within(shared, wanted), _within(shared, box)
    for plane, bits in zip(planes, (nonzero, sign), strict=True):
      plane[to] = layout.pack(bits)[of]

  _threads(chunk, layout.chunks)
  nonzero, sign = (layout.gather(x, region) for x in planes)
  return nonzero, sign


# Which weights are in which chunk.


@dataclasses.dataclass(frozen=True)
class _Layout:
  """How weights are cut into chunks.

  A chunk is a block of an array of shape `grid`: a plane; or, of a shape
  without an axis to pack, the bits of a plane in the shape of the weights.
  """

  shape: tuple[int, ...]
  axis: int | None
  grid: tuple[int, ...]
  block: tuple[int, ...]

  @classmethod
  def of(cls, shape: tuple[int, ...]) -> "_Layout":
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
    return math.prod(self.shape)

  @property
  def counts(self) -> tuple[int, ...]:
    """Number of blocks along each axis."""
    return tuple(map(_ceil, self.grid, self.block))

  @property
  def chunks(self) -> int:
    return math.prod(self.counts)

  def may_level(self, axis: int) -> bool:
    """Whether an axis has enough weights an index to gain from levels."""
    return self.size >= _FEWEST * self.shape[axis] > _FEWEST

  def may_neighbor(self, axes: range) -> bool:
    """Whether there are these axes, short and not packed."""
    lengths = [self.shape[i] for i in axes if i < len(self.shape)]
    return (
      len(lengths) == len(axes)
      and all(1 < n <= _SHORT for n in lengths)
      and math.prod(lengths) <= _SHORT**2
      and self.axis not in axes
    )

  def box(self, i: int) -> _Box:
    """Returns where chunk i lies in an array of the grid."""
    at = map(int, np.unravel_index(i, self.counts))
    blocks = zip(at, self.block, self.grid, strict=True)
    return tuple(slice(k * b, min((k + 1) * b, n)) for k, b, n in blocks)

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

  def tallies(self, x: np.ndarray) -> dict[int, np.ndarray]:
    """Counts the bits set at each index of the axes that may have levels."""
    axes = filter(self.may_level, range(len(self.shape)))
    return {axis: self._tally(x, axis) for axis in axes}

  def _tally(self, x: np.ndarray, axis: int) -> np.ndarray:
    rows = np.moveaxis(x, axis, 0).reshape(x.shape[axis], -1)
    if beyond := -rows.shape[1] % 8:
      rows = np.pad(rows, ((0, 0), (0, beyond)))
    words = np.ascontiguousarray(rows).view(np.uint64)
    if axis != self.axis:
      return np.bitwise_count(words).sum(1, dtype=np.int64)
    # Bits of one place are counted in all bytes of a word at once.
    ones = np.uint64(0x0101010101010101)
    places = [np.bitwise_count(words & ones << j) for j in range(8)]
    return np.stack([x.sum(1, np.int64) for x in places], -1).reshape(-1)

  def _shifts(self) -> np.ndarray:
    behind = self.shape[(self.axis or 0) + 1 :]
    return np.arange(8, dtype=np.uint8).reshape(8, *[1] * len(behind))


# What the probability of a coin depends on.


@dataclasses.dataclass(frozen=True)
class _Neighbors:
  """One probability for each sum of neighbors; for all coins, if m is 0.

  The neighbors of a coin are those before it along m axes from `first`. Beyond
  the edge of a chunk they are 0.

  Attributes:
    first: the first of the axes.
    m: how many.
    chances: of each sum, which is 0 ... m for `nonzero`, -m ... m for `sign`.
  """

  first: int
  m: int
  chances: tuple[int, ...]

  def header(self) -> bytes:
    """Returns what `_read` reads."""
    head = [self.m, self.first] if self.m else [0]
    return bytes(head) + struct.pack(f"<{len(self.chances)}H", *self.chances)

  def split(
    self, where: _Box, bits: np.ndarray, among: np.ndarray | None
  ) -> Iterator[tuple[np.ndarray, int]]:
    """Yields the coins of each probability, flat, and that.

    Args:
      where: of the chunk in the weights.
      bits: of the chunk.
      among: bits of the chunk, where there are coins; None for everywhere.
    """
    del where
    bits, among = self._to_front(bits), self._to_front(among)
    values = _values(bits, among) if self.m else bits
    for step in np.ndindex(bits.shape[: self.m]):
      # Bits, and the sum beside each of them in the bits above.
      flat = bits[*step, ...].reshape(-1).view(np.int8)
      sums = self._sums(step, values)
      if sums is not None:
        flat = flat + 2 * sums
      if among is not None:
        flat = _take(flat, among[*step, ...].reshape(-1))
      if sums is None:
        yield flat.view(bool), self._alone()
        continue
      sums = flat >> 1
      for total, p in self._totals():
        yield (_take(flat, sums == total) & 1).view(bool), p

  def join(
    self,
    where: _Box,
    get: Callable[[int, int], np.ndarray],
    among: np.ndarray | None,
  ) -> np.ndarray:
    """Returns the bits that `split` split, from get(number of coins, p)."""
    among = self._to_front(among)
    bits = self._to_front(np.zeros(_lengths(where), bool))
    values = np.zeros(bits.shape, np.int8)
    for step in np.ndindex(bits.shape[: self.m]):
      here = (*step, ...)
      flat, sums, coins = bits[here].reshape(-1), self._sums(step, values), None
      n = flat.size
      if among is not None:
        coins = among[here].reshape(-1)
        n = int(np.count_nonzero(coins))
        sums = sums if sums is None else _take(sums, coins)
      if sums is None:
        found = get(n, self._alone())
      else:
        found = np.empty(n, bool)
        for total, p in self._totals():
          at = sums == total
          _give(found, at, get(int(np.count_nonzero(at)), p))
      if coins is None:
        flat[:] = found
      else:
        _give(flat, coins, found)
      values[here] = _values(bits[here], None if among is None else among[here])
    return np.moveaxis(bits, range(self.m), self._axes())

  def _axes(self) -> range:
    return range(self.first, self.first + self.m)

  def _to_front(self, x: Any) -> Any:
    return None if x is None else _to_front(x, self._axes())

  def _sums(
    self, step: tuple[int, ...], values: np.ndarray
  ) -> np.ndarray | None:
    """Returns the flat sums of the neighbors of a step, None if it has none."""
    near = [
      values[*step[:i], k - 1, *step[i + 1 :], ...]
      for i, k in enumerate(step)
      if k
    ]
    return functools.reduce(np.add, near).reshape(-1) if near else None

  def _totals(self) -> Iterator[tuple[int, int]]:
    """Yields each sum of neighbors and its probability."""
    return enumerate(self.chances, self.m + 1 - len(self.chances))

  def _alone(self) -> int:
    """Returns the probability without neighbors, that of a sum of 0."""
    return self.chances[-1 - self.m]


@dataclasses.dataclass
class _Levels:
  """One probability for each index of an axis, from a grid of levels.

  Attributes:
    axis: of the weights.
    grid: number of levels of the grid.
    low: lowest level in use.
    weights: e_j of each level from there on.
    index: level of each index of the axis.
  """

  axis: int
  grid: int
  low: int
  weights: tuple[int, ...]
  index: Any = None

  def header(self) -> bytes:
    """Returns what `_read` reads."""
    facts = _LEVELS + self.axis, self.grid, self.low, len(self.weights)
    pairs = itertools.zip_longest(*[iter(self.weights)] * 2, fillvalue=0)
    return bytes((*facts, *(a | b << 4 for a, b in pairs)))

  def put_index(self, coder: Any) -> None:
    """Codes the level of each index."""
    if len(self.weights) > 1:
      coder.encode((self.index - self.low).astype(np.int32), self._prior())

  def get_index(self, coder: Any, n: int) -> None:
    """Decodes what `put_index` coded."""
    self.index = np.full(n, self.low)
    if len(self.weights) > 1:
      self.index += _decode(coder, self._prior(), n)

  def split(
    self, where: _Box, bits: np.ndarray, among: np.ndarray | None
  ) -> Iterator[tuple[np.ndarray, int]]:
    """As `_Neighbors.split`."""
    order, groups = self._groups(where)
    bits = bits.take(order, self.axis)
    if among is not None:
      among = among.take(order, self.axis)
    for at, p in groups:
      flat = bits[at].reshape(-1)
      if among is not None:
        flat = _take(flat, among[at].reshape(-1))
      yield flat, p

  def join(
    self,
    where: _Box,
    get: Callable[[int, int], np.ndarray],
    among: np.ndarray | None,
  ) -> np.ndarray:
    """As `_Neighbors.join`."""
    order, groups = self._groups(where)
    bits = np.zeros(_lengths(where), bool)
    if among is not None:
      among = among.take(order, self.axis)
    for at, p in groups:
      part = bits[at]
      if among is None:
        part[...] = get(part.size, p).reshape(part.shape)
        continue
      flat, coins = np.zeros(part.size, bool), among[at].reshape(-1)
      _give(flat, coins, get(int(np.count_nonzero(coins)), p))
      part[...] = flat.reshape(part.shape)
    return bits.take(np.argsort(order), self.axis)

  def _groups(
    self, where: _Box
  ) -> tuple[np.ndarray, list[tuple[tuple[slice, ...], int]]]:
    """Returns the order of indices by level, and where each is in that."""
    index = self.index[where[self.axis]]
    levels, counts = np.unique(index, return_counts=True)
    ends = itertools.pairwise([0, *np.cumsum(counts).tolist()])
    ahead = [slice(None)] * self.axis
    at = [(*ahead, slice(a, b)) for a, b in ends]
    chances = _levels(self.grid)[levels].tolist()
    # The sort must be stable: each side sorts for itself.
    order = np.argsort(index, kind="stable")
    return order, list(zip(at, chances, strict=True))

  def _prior(self) -> Any:
    return _categorical(tuple(1 << e >> 1 for e in self.weights))


def _read(
  reader: "_Reader", layout: _Layout, signed: bool
) -> _Neighbors | _Levels:
  """Reads a model of `nonzero`, or of `sign`."""
  (kind,) = reader.numbers("<B")
  if kind < _LEVELS:
    first = reader.numbers("<B")[0] if kind else 0
    if not layout.may_neighbor(range(first, first + kind)):
      raise ValueError(
        f"{layout.shape} has no neighbors along {kind} axes from {first}."
      )
    chances = reader.numbers(f"<{(1 + signed) * kind + 1}H")
    if 0 in chances:
      raise ValueError("a probability must not be 0.")
    return _Neighbors(first, kind, chances)
  axis = kind - _LEVELS
  if axis >= len(layout.shape) or not layout.may_level(axis):
    raise ValueError(f"axis {axis} of {layout.shape} has no levels.")
  grid, low, n = reader.numbers("<BBB")
  halves = reader.take(_ceil(n, 2))
  weights = tuple(e for byte in halves for e in (byte & 15, byte >> 4))[:n]
  if grid < 2 or low + n > grid or not any(weights):
    raise ValueError(f"{n} levels from {low} are not of a grid of {grid}.")
  return _Levels(axis, grid, low, weights)


def _fit(
  layout: _Layout,
  plane: np.ndarray,
  among: np.ndarray | None,
  ks: dict[int, np.ndarray],
  ns: dict[int, np.ndarray] | None,
) -> _Neighbors | _Levels:
  """Returns the model of least cost.

  Args:
    layout: of the plane.
    plane: array of the grid.
    among: where there are coins, None for everywhere.
    ks: tallies of the plane.
    ns: tallies of the coins, None for everywhere.
  """

  def cost(costed: tuple[int, Any]) -> int:
    return costed[0]

  best = min(_fit_neighbors(layout, plane, among), key=cost)
  levels = _fit_levels(layout, ks, ns, best[0])
  return min(itertools.chain([best], levels), key=cost)[1]


def _fit_neighbors(
  layout: _Layout, plane: np.ndarray, among: np.ndarray | None
) -> Iterator[tuple[int, _Neighbors]]:
  """Yields models by neighbors, first that without any, and their costs."""
  bits = _costs()
  starts = range(len(layout.shape))
  runs = [range(i, j) for i in starts for j in range(i + 1, len(starts) + 1)]
  runs = [range(0), *filter(layout.may_neighbor, runs)]
  counted: dict[range, np.ndarray] = {}
  for axes in runs:
    # What is counted for most axes has the counts for fewer of them.
    wide = max((r for r in runs if {*axes} <= {*r}), key=len)
    if wide not in counted:
      counted[wide] = _count_neighbors(layout, plane, among, wide)
    others = tuple(1 + i for i, axis in enumerate(wide) if axis not in axes)
    ks, ns = _by_sum(counted[wide].sum(others))
    chances = _ratios(ks, ns, _ONE // 2)
    cost = ks @ bits[chances] + (ns - ks) @ bits[_ONE - chances]
    model = _Neighbors(axes.start, len(axes), tuple(chances.tolist()))
    yield int(cost) + 8 * len(model.header()) * _BIT, model


def _by_sum(counts: np.ndarray) -> np.ndarray:
  """Adds up what has one sum of neighbors."""
  _, *states = counts.shape
  added = np.zeros((2, sum(states) - len(states) + 1), np.int64)
  for at in np.ndindex(*states):
    added[:, sum(at)] += counts[:, *at]
  return added


def _count_neighbors(
  layout: _Layout, plane: np.ndarray, among: np.ndarray | None, axes: range
) -> np.ndarray:
  """Counts the bits that are set, and all coins, by the codes of neighbors.

  Returns:
    int64 [2, codes of the neighbor along each axis, from the lowest].
  """
  # Planes are as good as bits, but along the axis that is packed.
  full = np.uint8(1 if layout.axis is None else 255)
  plane = _to_front(plane, axes)
  if among is None:
    states, coins = [full & ~plane, plane], np.full_like(plane, full)
  else:
    coins = _to_front(among, axes)
    states = [plane, full & ~coins, coins & ~plane]
  zero = len(states) - 2
  shifted = [
    [_shift(x, axis, full if i == zero else 0) for i, x in enumerate(states)]
    for axis in range(len(axes))
  ]
  counts = np.zeros((2, *[len(states)] * len(axes)), np.int64)
  for at in np.ndindex(counts.shape[1:]):
    mask = coins
    for i, x in zip(at, shifted, strict=True):
      mask = mask & x[i]
    counts[:, *at] = _ones(mask & plane), _ones(mask)
  return counts


def _fit_levels(
  layout: _Layout,
  tallies: dict[int, np.ndarray],
  among: dict[int, np.ndarray] | None,
  limit: int,
) -> Iterator[tuple[int, _Levels]]:
  """Yields models by levels, and their costs, that may be below a limit."""
  bits = _costs()
  for axis, ks in tallies.items():
    length = len(ks)
    if among is None:
      ns = np.full(length, layout.size // length)
    else:
      ns = among[axis]
    n = int(ns.sum())
    mean = int(_ratios(ks.sum(), n, _ONE // 2))
    ratios = _ratios(ks, ns, mean)
    if ks @ bits[ratios] + (ns - ks) @ bits[_ONE - ratios] >= limit:
      continue  # No level codes an index at less than its own share.
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
      model = _Levels(axis, grid, low, weights, index)
      prior = np.array([1 << e >> 1 for e in weights])
      prior = _ratios(prior, prior.sum(), 0)
      chances = _levels(grid)[index]
      cost = (
        counts[low:] @ bits[prior]
        + ks @ bits[chances]
        + (ns - ks) @ bits[_ONE - chances]
      )
      # And the number of words, and their end.
      yield int(cost) + 8 * (len(model.header()) + 8) * _BIT, model


def _ratios(ks: Any, ns: Any, otherwise: int) -> np.ndarray:
  """Returns k / n in 1 / _ONE, more than 0 and less than 1."""
  ratios = (ks * _ONE + ns // 2) // np.maximum(ns, 1)
  # np.clip looks up the limits of the dtype, which takes longer than this.
  return np.minimum(np.maximum(np.where(ns, ratios, otherwise), 1), _ONE - 1)


def _to_front(x: np.ndarray, axes: range) -> np.ndarray:
  """Returns an array with some axes in front, contiguous."""
  return np.ascontiguousarray(np.moveaxis(x, axes, range(len(axes))))


def _shift(x: np.ndarray, axis: int, edge: Any) -> np.ndarray:
  """Returns an array of what is before each element along an axis."""
  moved = np.roll(x, 1, axis)
  moved[(*[slice(None)] * axis, 0)] = edge
  return moved


def _values(bits: np.ndarray, among: np.ndarray | None) -> np.ndarray:
  """Returns bits as int8; as -1 if they are among others and set, else 1."""
  values = bits.view(np.int8)
  if among is None:
    return values
  twice = values + values
  return np.subtract(among.view(np.int8), twice, out=twice)


def _take(x: np.ndarray, mask: np.ndarray) -> np.ndarray:
  """Returns x[mask] of flat arrays, in less time and memory."""
  found, n = np.empty_like(x), 0
  for i in range(0, x.size, _BLOCK):
    (at,) = mask[i : i + _BLOCK].nonzero()
    # Nothing is out of bounds; to be sure, NumPy would make a copy otherwise.
    x[i : i + _BLOCK].take(at, out=found[n : n + at.size], mode="clip")
    n += at.size
  return found[:n]


def _give(x: np.ndarray, mask: np.ndarray, found: np.ndarray) -> None:
  """Sets x[mask] of flat arrays to what was found, as `_take` takes it."""
  n = 0
  for i in range(0, x.size, _BLOCK):
    (at,) = mask[i : i + _BLOCK].nonzero()
    x[i : i + _BLOCK][at] = found[n : n + at.size]
    n += at.size


def _ones(x: np.ndarray) -> int:
  """Counts the bits that are set in bytes, of eight bytes at a time."""
  flat, n = x.reshape(-1), x.size // 8 * 8
  parts = flat[:n].view(np.uint64), flat[n:]
  return sum(int(np.bitwise_count(x).sum(dtype=np.int64)) for x in parts)


def _lengths(box: _Box) -> list[int]:
  return [s.stop - s.start for s in box]


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


@functools.lru_cache(1024)
def _coins(p: int, n: int) -> Any:
  """Returns the model of up to eight coins, the first in the lowest bit."""
  by_heads = [p**k * (_ONE - p) ** (n - k) for k in range(n + 1)]
  return _categorical(tuple(by_heads[i.bit_count()] for i in range(1 << n)))


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
  data, (n, rest) = _pack(bits), divmod(bits.size, 8)
  for i in range(0, n, _BLOCK):
    coder.encode(data[i : min(i + _BLOCK, n)].astype(np.int32), _coins(p, 8))
  if rest:
    coder.encode(data[n:].astype(np.int32), _coins(p, rest))


def _get(coder: Any, size: int, p: int) -> np.ndarray:
  """Decodes what `_put` coded."""
  n, rest = divmod(size, 8)
  data = np.empty(n + (rest > 0), np.uint8)
  data[:n] = _decode(coder, _coins(p, 8), n)
  if rest:
    data[n:] = _decode(coder, _coins(p, rest), 1)
  return _unpack(data, size)


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
  """Returns f(0), ..., f(n - 1), of a few threads."""
  if n < 2:
    return list(map(f, range(n)))
  return list(_pool().map(f, range(n)))


@functools.cache
def _pool() -> concurrent.futures.Executor:
  """Returns the threads, always the same: each keeps some memory for itself."""
  # They share what NumPy does; the coder itself is of one thread at a time. A
  # thread keeps some 4 MB, four times its chunk: a save must not take more of
  # them where there are more cores.
  return concurrent.futures.ThreadPoolExecutor(min(2, os.cpu_count() or 1))


if hasattr(os, "register_at_fork"):  # a child has no threads but its own
  os.register_at_fork(after_in_child=_pool.cache_clear)


@functools.cache
def _stream() -> Any:
  """Returns the module of constriction's stream codes."""
  try:
    return importlib.import_module("constriction").stream
  except ImportError as e:
    raise ImportError(
      "codec='entropy' needs constriction: pip install 'tern_jax[codec]'."
    ) from e
