"""Which model codes a plane in the fewest bits, decided in integers alone."""

import functools
import operator
from collections.abc import Iterator

import numpy as np

from tern_jax.storage.entropy.coding import ONE, Mask
from tern_jax.storage.entropy.layout import Layout, Tallies
from tern_jax.storage.entropy.models import Levels, Model, Neighbors, levels

# Costs are integers, in units of 1 / _BIT bits.
_BIT = 1 << 20
# Grids of levels to choose from.
_GRIDS = (3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192)


def fit(
  layout: Layout, plane: np.ndarray, mask: Mask, ks: Tallies, ns: Tallies | None
) -> Model:
  """Returns the model of least cost; `ks` and `ns` are of plane and mask."""
  cost = operator.itemgetter(0)
  best = min(_fit_neighbors(layout, plane, mask), key=cost)
  return min([best, *_fit_levels(layout, ks, ns, best[0])], key=cost)[1]


def _fit_neighbors(
  layout: Layout, plane: np.ndarray, mask: Mask
) -> Iterator[tuple[int, Neighbors]]:
  """Yields models by neighbors, first that without any, and their costs."""
  bits = _costs()
  starts = range(len(layout.shape))
  runs = [range(i, j) for i in starts for j in range(i + 1, len(starts) + 1)]
  runs = [range(0), *filter(layout.may_neighbor, runs)]
  counted: dict[range, np.ndarray] = {}
  for axes in runs:
    # The counts along most axes, added up, are those along fewer of them.
    wide = max((r for r in runs if {*axes} <= {*r}), key=len)
    if wide not in counted:
      counted[wide] = _count_neighbors(layout, plane, mask, wide)
    others = tuple(1 + i for i, axis in enumerate(wide) if axis not in axes)
    # Those of neighbors that have the same sum are added up.
    counts = counted[wide].sum(others)
    _, *states = counts.shape
    ks, ns = np.zeros((2, sum(states) - len(states) + 1), np.int64)
    for at in np.ndindex(*states):
      ks[sum(at)] += counts[0, *at]
      ns[sum(at)] += counts[1, *at]
    chances = _ratios(ks, ns, ONE // 2)
    cost = ks @ bits[chances] + (ns - ks) @ bits[ONE - chances]
    model = Neighbors(axes.start, len(axes), tuple(chances.tolist()))
    yield int(cost) + 8 * len(model.header()) * _BIT, model


def _count_neighbors(
  layout: Layout, plane: np.ndarray, mask: Mask, axes: range
) -> np.ndarray:
  """Counts the bits that are set, and all, by the neighbors along the axes."""
  # Eight weights are counted at once: as no neighbor lies along the axis that
  # is packed, the bits of a byte have theirs in one other byte.
  full = np.uint8(1 if layout.axis is None else 255)
  plane = _to_front(plane, axes)
  # A mask for each code that a neighbor can have, from the lowest: 0 and 1 of
  # `nonzero`; -1, 0 and 1 of `sign`.
  if mask is None:
    states, coded = [full & ~plane, plane], np.full_like(plane, full)
  else:
    coded = _to_front(mask, axes)
    states = [plane, full & ~coded, coded & ~plane]
  zero = len(states) - 2
  shifted = [
    [_shift(x, axis, full if i == zero else 0) for i, x in enumerate(states)]
    for axis in range(len(axes))
  ]
  counts = np.zeros((2, *[len(states)] * len(axes)), np.int64)
  for at in np.ndindex(counts.shape[1:]):
    here = coded
    for i, x in zip(at, shifted, strict=True):
      here = here & x[i]
    counts[:, *at] = _ones(here & plane), _ones(here)
  return counts


def _fit_levels(
  layout: Layout, tallies: Tallies, coded: Tallies | None, limit: int
) -> Iterator[tuple[int, Levels]]:
  """Yields models by levels, and their costs, that may be below a limit."""
  bits = _costs()
  for axis, ks in tallies.items():
    length = len(ks)
    ns = coded[axis] if coded else np.full(length, layout.size // length)
    n = ns.sum()
    mean = int(_ratios(ks.sum(), n, ONE // 2))
    ratios = _ratios(ks, ns, mean)
    if ks @ bits[ratios] + (ns - ks) @ bits[ONE - ratios] >= limit:
      continue  # No level codes an index at less than its own share does.
    for grid in _GRIDS:
      if grid * grid * length > 4 * n:
        break  # Finer than the counts are good for.
      index = np.searchsorted(_thresholds(grid), ratios, side="right")
      counts = np.bincount(index)
      low = int(np.flatnonzero(counts)[0])
      # e of the power of two, 2^(e - 1), that is closest in the logarithm.
      lengths = ((2 * c * c).bit_length() for c in counts[low:].tolist())
      weights = tuple(min(15, (size + 1) // 2) for size in lengths)
      model = Levels(axis, grid, low, weights, index)
      prior = np.array([1 << e >> 1 for e in weights])
      prior = _ratios(prior, prior.sum(), 0)
      chances = levels(grid)[index]
      cost = ks @ bits[chances] + (ns - ks) @ bits[ONE - chances]
      cost += counts[low:] @ bits[prior]
      # 8 bytes more: the number of words of the index, and their end.
      yield int(cost) + 8 * (len(model.header()) + 8) * _BIT, model


def _ratios(ks: np.ndarray, ns: np.ndarray, otherwise: int) -> np.ndarray:
  """Returns k / n in 1 / ONE, more than 0 and less than 1."""
  ratios = (ks * ONE + ns // 2) // np.maximum(ns, 1)
  # np.clip looks up the limits of the dtype, which takes longer than this.
  return np.minimum(np.maximum(np.where(ns, ratios, otherwise), 1), ONE - 1)


def _to_front(x: np.ndarray, axes: range) -> np.ndarray:
  """Returns an array with some axes in front, contiguous."""
  return np.ascontiguousarray(np.moveaxis(x, axes, range(len(axes))))


def _shift(x: np.ndarray, axis: int, edge: int | np.uint8) -> np.ndarray:
  """Returns an array of what is before each element along an axis."""
  moved = np.roll(x, 1, axis)
  moved[(*[slice(None)] * axis, 0)] = edge
  return moved


def _ones(x: np.ndarray) -> int:
  """Counts the bits that are set in bytes, eight bytes at a time."""
  flat, n = x.reshape(-1), x.size // 8 * 8
  parts = flat[:n].view(np.uint64), flat[n:]
  return sum(int(np.bitwise_count(x).sum(dtype=np.int64)) for x in parts)


@functools.cache
def _costs() -> np.ndarray:
  """Returns the cost of an event of probability i / ONE, for each i > 0."""
  # Except for powers of 2, which are exact, no logarithm is as close to the
  # middle of two multiples of 1 / _BIT as the floats of any platform are off:
  # the rounded costs are the same everywhere.
  logs = np.log2(np.arange(1, ONE + 1))
  return np.append(0, np.rint((16 - logs) * _BIT)).astype(np.int64)


@functools.cache
def _thresholds(grid: int) -> np.ndarray:
  """Returns the least k / n, in 1 / ONE, at which a level is the cheapest."""
  bits, p = _costs(), levels(grid)
  one, zero = -np.diff(bits[p]), np.diff(bits[ONE - p])
  return ONE * zero // (one + zero) + 1
