"""What the probability of a bit depends on: its neighbors, or an index.

A model divides the bits of a chunk into groups of one probability, the same
groups for both directions: `put_bits` codes each of them, `get_bits` fills in
each of them before it asks for the next, which may depend on it.
"""

import dataclasses
import functools
import itertools
import struct
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from tern_jax.storage.entropy.coder import (
  ONE,
  Reader,
  categorical,
  get,
  give,
  put,
  symbols,
  take,
)
from tern_jax.storage.entropy.layout import Box, Layout, lengths

# The first byte of a model is this and the axis that has levels; or less.
_LEVELS = 128

#: Bits, where in them some are coded (None for everywhere), and, for these,
#: (where, probability) of each context, None where there is but one.
Part = tuple[
  np.ndarray,
  np.ndarray | None,
  Iterable[tuple[np.ndarray | None, int]],
]


@dataclasses.dataclass(frozen=True)
class Neighbors:
  """One probability for each sum of neighbors; for all bits, if m is 0.

  The neighbors of a weight are those before it along m axes from `first`.
  Beyond the edge of a chunk they are 0.

  Args:
    first: the first of the axes.
    m: how many.
    chances: probability at each sum: 0 ... m for `nonzero`, -m ... m for
      `sign`.
  """

  first: int
  m: int
  chances: tuple[int, ...]

  def header(self) -> bytes:
    """Returns what `read` reads."""
    head = [self.m, self.first] if self.m else [0]
    return bytes(head) + struct.pack(f"<{len(self.chances)}H", *self.chances)

  def arrange(self, x: np.ndarray, box: Box) -> np.ndarray:
    """Returns an array with the axes of the neighbors in front."""
    del box
    return to_front(x, range(self.first, self.first + self.m))

  def restore(self, x: np.ndarray, box: Box) -> np.ndarray:
    """Returns what `arrange` arranged."""
    del box
    axes = range(self.first, self.first + self.m)
    return np.moveaxis(x, range(self.m), axes)

  def parts(
    self, bits: np.ndarray, mask: np.ndarray | None, box: Box
  ) -> Iterator[Part]:
    """Yields the bits at each index of the axes of the neighbors.

    When a part is asked for, the bits of those before it must be known.

    Args:
      bits: arranged bits of the chunk.
      mask: where they are coded, arranged likewise; None for everywhere.
      box: of the chunk in the weights.
    """
    del box
    # What neighbors count for: a bit of `nonzero`, a code beside a `sign`.
    values = np.zeros(bits.shape if self.m else 0, np.int8)
    for step in np.ndindex(bits.shape[: self.m]):
      here = (*step, ...)
      coded = None if mask is None else mask[here]
      near = [
        values[*step[:i], k - 1, *step[i + 1 :], ...]
        for i, k in enumerate(step)
        if k
      ]
      if near:
        sums = functools.reduce(np.add, near).reshape(-1)
        if coded is not None:
          sums = take(sums, coded.reshape(-1))
        least = self.m + 1 - len(self.chances)
        contexts = (
          (sums == total, p) for total, p in enumerate(self.chances, least)
        )
      else:
        # All neighbors are beyond the edge: the sum is 0.
        contexts = ((None, self.chances[-1 - self.m]),)
      yield bits[here], coded, contexts
      if self.m:
        values[here] = _values(bits[here], coded)


@dataclasses.dataclass
class Levels:
  """One probability for each index of an axis, from a grid of levels.

  Args:
    axis: of the weights.
    grid: number of levels of the grid.
    low: lowest level in use.
    weights: e_j of each level from there on.
    index: int [shape[axis]], the level of each index of the axis.
  """

  axis: int
  grid: int
  low: int
  weights: tuple[int, ...]
  index: Any = None

  def header(self) -> bytes:
    """Returns what `read` reads."""
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
      self.index += symbols(coder, self._prior(), n)

  def arrange(self, x: np.ndarray, box: Box) -> np.ndarray:
    """Returns an array with the indices of the axis sorted by their level."""
    return x.take(self._order(box), self.axis)

  def restore(self, x: np.ndarray, box: Box) -> np.ndarray:
    """Returns what `arrange` arranged."""
    return x.take(np.argsort(self._order(box)), self.axis)

  def parts(
    self, bits: np.ndarray, mask: np.ndarray | None, box: Box
  ) -> Iterator[Part]:
    """Yields the bits of each level, as `Neighbors.parts`."""
    used, counts = np.unique(self.index[box[self.axis]], return_counts=True)
    ends = itertools.pairwise([0, *np.cumsum(counts).tolist()])
    chances = levels(self.grid)[used].tolist()
    for (start, stop), p in zip(ends, chances, strict=True):
      here = (*[slice(None)] * self.axis, slice(start, stop))
      yield bits[here], None if mask is None else mask[here], ((None, p),)

  def _order(self, box: Box) -> np.ndarray:
    # The sort must be stable: each side sorts for itself.
    return np.argsort(self.index[box[self.axis]], kind="stable")

  def _prior(self) -> Any:
    return categorical(tuple(1 << e >> 1 for e in self.weights))


#: A model of `nonzero`, or of `sign`.
Model = Neighbors | Levels


def put_bits(
  coder: Any, model: Model, box: Box, bits: np.ndarray, mask: np.ndarray | None
) -> None:
  """Codes the bits of a chunk.

  Args:
    coder: encoder of constriction.
    model: of the bits.
    box: of the chunk in the weights.
    bits: bool, of the shape of the box.
    mask: where they are coded; None for everywhere.
  """
  if mask is not None:
    mask = model.arrange(mask, box)
  for part, coded, contexts in model.parts(model.arrange(bits, box), mask, box):
    flat = part.reshape(-1)
    if coded is not None:
      flat = take(flat, coded.reshape(-1))
    for at, p in contexts:
      put(coder, flat if at is None else take(flat, at), p)


def get_bits(
  coder: Any, model: Model, box: Box, mask: np.ndarray | None
) -> np.ndarray:
  """Decodes what `put_bits` coded; bits that are not coded are 0."""
  bits = model.arrange(np.zeros(lengths(box), bool), box)
  if mask is not None:
    mask = model.arrange(mask, box)
  for part, coded, contexts in model.parts(bits, mask, box):
    n = part.size if coded is None else int(np.count_nonzero(coded))
    flat = np.empty(n, bool)
    for at, p in contexts:
      if at is None:
        flat = get(coder, n, p)
      else:
        give(flat, at, get(coder, int(np.count_nonzero(at)), p))
    if coded is not None:
      found, flat = flat, np.zeros(part.size, bool)
      give(flat, coded.reshape(-1), found)
    part[...] = flat.reshape(part.shape)
  return model.restore(bits, box)


def read(reader: Reader, layout: Layout, signed: bool) -> Model:
  """Reads the header of a model of `nonzero`, or of `sign`."""
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
    return Neighbors(first, kind, chances)
  axis = kind - _LEVELS
  if axis >= len(layout.shape) or not layout.may_level(axis):
    raise ValueError(f"axis {axis} of {layout.shape} has no levels.")
  grid, low, n = reader.numbers("<BBB")
  halves = reader.take((n + 1) // 2)
  weights = tuple(e for byte in halves for e in (byte & 15, byte >> 4))[:n]
  if grid < 2 or low + n > grid or not any(weights):
    raise ValueError(f"{n} levels from {low} are not of a grid of {grid}.")
  return Levels(axis, grid, low, weights)


@functools.cache
def levels(grid: int) -> np.ndarray:
  """Returns the probability of each level of a grid, in 1 / ONE.

  The standard error of k / n is ½ / √n in units of arcsin √p. x²(3 - 2x) is
  close to the sine squared of ½π x, and rational.
  """
  x = 2 * np.arange(grid) + 1
  p = x * x * (3 * grid - x) * ONE // (4 * grid**3)
  return np.clip(p, 1, ONE - 1)


def to_front(x: np.ndarray, axes: range) -> np.ndarray:
  """Returns an array with some axes in front, contiguous."""
  return np.ascontiguousarray(np.moveaxis(x, axes, range(len(axes))))


def _values(bits: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
  """Returns bits as int8; or codes, -1 and 1 where there are signs, else 0."""
  values = bits.view(np.int8)
  if mask is None:
    return values
  twice = values + values
  return np.subtract(mask.view(np.int8), twice, out=twice)
