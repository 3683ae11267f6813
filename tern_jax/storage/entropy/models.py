"""What the probability of a bit depends on: its neighbors, or an index.

A model divides the bits of a chunk into parts, and those into contexts of one
probability. Both directions go through the same parts: `put_bits` codes each of
them, `get_bits` fills in each before it asks for the next, which may depend on
it.
"""

import dataclasses
import functools
import itertools
import struct
from collections.abc import Iterable, Iterator

import numpy as np

from tern_jax.storage.entropy import coding
from tern_jax.storage.entropy.coding import Decoder, Encoder, Mask, Reader
from tern_jax.storage.entropy.layout import Box, Layout

# The first byte of a model is this and the axis that has levels; or less.
_LEVELS = 128

#: Index of bits in the chunk; where they are coded, flat, None for everywhere;
#: and, of those that are coded, (where, probability) of each context.
Part = tuple[tuple, Mask, Iterable[tuple[Mask, int]]]


@dataclasses.dataclass(frozen=True)
class Neighbors:
  """One probability for each sum of neighbors; for all bits, if m is 0.

  The neighbors of a weight are those before it along m axes from `first`.
  Beyond the edge of a chunk they are 0. `chances` has the probability at each
  sum: 0 ... m for `nonzero`, -m ... m for `sign`.
  """

  first: int
  m: int
  chances: tuple[int, ...]

  def header(self) -> bytes:
    """Returns what `read` reads."""
    head = [self.m, self.first] if self.m else [0]
    return bytes(head) + struct.pack(f"<{len(self.chances)}H", *self.chances)

  def arrange(self, x: np.ndarray, box: Box, back: bool = False) -> np.ndarray:
    """Moves the axes of the neighbors to the front, or back."""
    del box
    axes, front = range(self.first, self.first + self.m), range(self.m)
    if back:
      return np.moveaxis(x, front, axes)
    return np.ascontiguousarray(np.moveaxis(x, axes, front))

  def parts(self, box: Box, bits: np.ndarray, mask: Mask) -> Iterator[Part]:
    """Yields the parts; bits of one are known when the next is asked for."""
    del box
    # What a neighbor counts for: its bit of `nonzero`, or its code if the bits
    # are those of `sign`.
    values: dict[tuple[int, ...], np.ndarray] = {}
    for step in np.ndindex(bits.shape[: self.m]):
      here = (*step, ...)
      coded = None if mask is None else mask[here].reshape(-1)
      at = ((*step[:i], k - 1, *step[i + 1 :]) for i, k in enumerate(step) if k)
      near = [values[x] for x in at]
      if near:
        sums = coding.take(functools.reduce(np.add, near), coded)
        totals = enumerate(self.chances, self.m + 1 - len(self.chances))
        yield here, coded, ((sums == total, p) for total, p in totals)
      else:
        # All neighbors are beyond the edge: the sum is 0.
        yield here, coded, [(None, self.chances[-1 - self.m])]
      if self.m:
        flat = bits[here].reshape(-1).view(np.int8)
        values[step] = flat if coded is None else coded.view(np.int8) - 2 * flat


@dataclasses.dataclass
class Levels:
  """One probability for each index of an axis, from a grid of levels."""

  axis: int
  grid: int  # number of levels
  low: int  # the lowest in use
  weights: tuple[int, ...]  # e_j of each from there on
  index: np.ndarray  # int [shape[axis]], the level of each index

  def header(self) -> bytes:
    """Returns what `read` reads."""
    facts = _LEVELS + self.axis, self.grid, self.low, len(self.weights)
    pairs = itertools.zip_longest(*[iter(self.weights)] * 2, fillvalue=0)
    return bytes((*facts, *(a | b << 4 for a, b in pairs)))

  def put_index(self, coder: Encoder) -> None:
    """Codes the level of each index."""
    if len(self.weights) > 1:
      coder.symbols(self.index - self.low, self._prior())

  def get_index(self, coder: Decoder, n: int) -> None:
    """Decodes what `put_index` coded."""
    self.index = np.full(n, self.low)
    if len(self.weights) > 1:
      self.index += coder.symbols(n, self._prior())

  def arrange(self, x: np.ndarray, box: Box, back: bool = False) -> np.ndarray:
    """Sorts the indices of the axis by their level, or undoes that."""
    # The sort must be stable: each side sorts for itself.
    order = np.argsort(self.index[box[self.axis]], kind="stable")
    return x.take(np.argsort(order) if back else order, self.axis)

  def parts(self, box: Box, bits: np.ndarray, mask: Mask) -> Iterator[Part]:
    """Yields the parts, one for each level."""
    del bits
    used, counts = np.unique(self.index[box[self.axis]], return_counts=True)
    ends = np.cumsum([0, *counts])
    for level, start, stop in zip(used, ends, ends[1:], strict=False):
      here = (*[slice(None)] * self.axis, slice(start, stop))
      coded = None if mask is None else mask[here].reshape(-1)
      yield here, coded, [(None, int(levels(self.grid)[level]))]

  def _prior(self) -> object:
    return coding.categorical(tuple(1 << e >> 1 for e in self.weights))


#: A model of `nonzero`, or of `sign`.
Model = Neighbors | Levels


def put_bits(
  coder: Encoder, model: Model, box: Box, bits: np.ndarray, mask: Mask
) -> None:
  """Codes the bits of a chunk."""
  bits = model.arrange(bits, box)
  mask = mask if mask is None else model.arrange(mask, box)
  for here, coded, contexts in model.parts(box, bits, mask):
    flat = coding.take(bits[here].reshape(-1), coded)
    for at, p in contexts:
      coder.bits(coding.take(flat, at), p)


def get_bits(coder: Decoder, model: Model, box: Box, mask: Mask) -> np.ndarray:
  """Decodes what `put_bits` coded; bits that are not coded are 0."""
  mask = mask if mask is None else model.arrange(mask, box)
  empty = np.zeros([s.stop - s.start for s in box], bool)
  bits = model.arrange(empty, box) if mask is None else np.zeros_like(mask)
  for here, coded, contexts in model.parts(box, bits, mask):
    flat = np.zeros(bits[here].size, bool)
    found = np.zeros(_count(coded, flat.size), bool)
    for at, p in contexts:
      coding.give(found, at, coder.bits(_count(at, found.size), p))
    coding.give(flat, coded, found)
    bits[here] = flat.reshape(bits[here].shape)
  return model.arrange(bits, box, back=True)


def read(reader: Reader, layout: Layout, signed: bool) -> Model:
  """Reads the header of a model of `nonzero`, or of `sign`."""
  (kind,) = reader.numbers("<B")
  if kind < _LEVELS:
    first = reader.numbers("<B")[0] if kind else 0
    if not layout.may_neighbor(range(first, first + kind)):
      fault = f"no neighbors along {kind} axes from {first}"
      raise ValueError(f"{layout.shape} has {fault}.")
    chances = reader.numbers(f"<{(1 + signed) * kind + 1}H")
    if 0 in chances:
      raise ValueError("a probability must not be 0.")
    return Neighbors(first, kind, chances)
  axis = kind - _LEVELS
  if axis >= len(layout.shape) or not layout.may_level(axis):
    raise ValueError(f"axis {axis} of {layout.shape} has no levels.")
  grid, low, n = reader.numbers("<BBB")
  halves = reader.take((n + 1) // 2)
  weights = tuple(e for byte in halves for e in (byte & 15, byte >> 4))[:n]
  if grid < 2 or low + n > grid or not any(weights):
    raise ValueError(f"{n} levels from {low} are not of a grid of {grid}.")
  return Levels(axis, grid, low, weights, np.zeros(0, int))


@functools.cache
def levels(grid: int) -> np.ndarray:
  """Returns the probability of each level of a grid, in 1 / coding.ONE.

  The standard error of k / n is ½ / √n in units of arcsin √p. x²(3 - 2x) is
  close to the sine squared of ½π x, and rational.
  """
  x = 2 * np.arange(grid) + 1
  p = x * x * (3 * grid - x) * coding.ONE // (4 * grid**3)
  return np.clip(p, 1, coding.ONE - 1)


def _count(mask: Mask, size: int) -> int:
  return size if mask is None else int(np.count_nonzero(mask))
