"""Thresholds that exactly the asked number of magnitudes lie under."""

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from tern_jax.core.types import Array, Arrays, PyTree, Scalar

#: The cut where all magnitudes that equal the threshold lie under it.
NO_CUT = 2**31 - 1

_Tree = TypeVar("_Tree", bound=PyTree)


def magnitude_threshold(
  x: Array | Iterable[Array],
  sparsity: Scalar,
  guess: Array | None = None,
  tolerance: Scalar = 0.0,
) -> Array:
  """Finds a threshold that the asked share of magnitudes lies under.

  With k = round(sparsity * n), it is a value v such that k magnitudes satisfy
  |x| <= v (more only if ties forbid k). Found by secants and bisection over
  the bit patterns of non-negative floats, whose order is the floats' own: a
  few counting passes, no sorting, hence cheap, and exact on sharded arrays.

  Args:
    x: float, any shape; compared in float32. Or several such arrays, which
      count as one.
    sparsity: 0-d, share of zeros in [0, 1].
    guess: float32, 0-d, where to look first, such as the last threshold.
    tolerance: share of the weights by which k may be missed.

  Returns:
    float32, 0-d; 0 for an empty array.

  >>> float(magnitude_threshold(jnp.array([-.1, .2, -.3, .4]), 0.)) < .1
  True
  >>> 0.2 <= float(magnitude_threshold(jnp.array([-.1, .2, -.3, .4]), .5)) < .3
  True
  """
  arrays = (x,) if isinstance(x, jax.Array | np.ndarray) else tuple(x)
  zeros = count_of(sum(a.size for a in arrays), sparsity)
  return search(arrays, zeros, guess, tolerance).threshold


def split(
  x: Array,
  zeros: Array | int,
  guess: Array | None = None,
  tolerance: Scalar = 0.0,
) -> Arrays:
  """Finds what exactly so many magnitudes lie under, whatever ties there are.

  Beside the threshold of `magnitude_threshold` it is a cut: of the magnitudes
  that equal the threshold, those at flat indices (row-major) below the cut lie
  under it, the others beyond. `beyond` and `codes_beyond` take both.

  Args:
    x: float, any shape; compared in float32.
    zeros: int32, 0-d, how many; at most x.size.
    guess: float32, 0-d, where to look first, such as the last threshold.
    tolerance: share of the weights by which they may be missed.

  Returns:
    {"cut": int32, "threshold": float32}, both 0-d.

  >>> w = jnp.ones(4)
  >>> codes_beyond(w, **split(w, 3)).tolist()
  [0.0, 0.0, 0.0, 1.0]
  """
  found = search((x,), zeros, guess, tolerance)
  return {
    "cut": first_beyond(x, found.threshold, zeros, found.is_split),
    "threshold": found.threshold,
  }


def beyond(x: Array, threshold: Array, cut: Array | None = None) -> Array:
  """Returns which magnitudes lie beyond a threshold and its cut, bool.

  x is float, of any shape; the threshold, float, and the cut, int32, are
  broadcastable to it. Compared in float32.
  """
  at = bits_of(threshold.astype(jnp.float32))
  if cut is not None:
    at -= _past(x.shape, cut).astype(jnp.int32)
  return pattern_of(x) > at


def equals(x: Array, threshold: Array) -> Array:
  """Returns which magnitudes equal a threshold, bool, in float32."""
  return pattern_of(x) == bits_of(threshold.astype(jnp.float32))


def codes_beyond(x: Array, threshold: Array, cut: Array | None = None) -> Array:
  """Returns sign(x) beyond a threshold and its cut, else 0, of x's dtype.

  A zero beyond the cut has the code of its sign bit.
  """
  sign = jnp.copysign(jnp.ones((), x.dtype), x)
  return jnp.where(beyond(x, threshold, cut), sign, jnp.zeros((), x.dtype))


class Found(NamedTuple):
  """What a search has found."""

  threshold: Array  # float32, 0-d
  is_split: Array  # whether ties leave more under it than were asked for


def search(
  arrays: tuple[Array | np.ndarray, ...],
  zeros: Array | int,
  guess: Array | None = None,
  tolerance: Scalar = 0.0,
  most: tuple[Array, ...] | None = None,
) -> Found:
  """Searches for the threshold that so many magnitudes lie under.

  Of each array no more than `most` count, int32: 0-d, or [layers] for each part
  of an array along its first axis.
  """
  n = sum(a.size for a in arrays)
  if not n:
    return Found(jnp.zeros((), jnp.float32), jnp.zeros((), bool))
  if n > NO_CUT:
    raise ValueError(
      f"A target for {n:,} weights at once is not supported, but one for"
      f" {NO_CUT:,} is: take a sparsity for each layer."
    )
  if guess is not None:
    guess = jnp.asarray(guess, jnp.float32)
  zeros = jnp.asarray(zeros, jnp.int32)
  return _searched(arrays, zeros, guess, tolerance, most)


class _Search(NamedTuple):
  """Where the search for a threshold stands; patterns are bits of floats."""

  step: Array
  pattern: Array  # to be tried next
  low: Array  # too few magnitudes lie under it, or it is -1
  high: Array  # enough do
  last_value: Array  # of the trial before, and its score
  last_score: Array
  missed: Array  # by how many weights it did


# Compiled by itself: outside of a program, each of its operations would be; and
# inside of one it is traced once for all arrays of a shape.
@jax.jit
def _searched(
  arrays: tuple[Array, ...],
  k: Array,
  guess: Array | None,
  tolerance: Scalar,
  most: tuple[Array, ...] | None,
) -> Found:
  n = sum(a.size for a in arrays)
  patterns = [pattern_of(a) for a in arrays]
  slack = jnp.asarray(tolerance * n, jnp.int32)

  def score(count: Array) -> Array:
    # Under which multiple of sigma * sqrt(2) normal weights are so many.
    share = jnp.clip(count.astype(jnp.float32), 0.5, n - 0.5) / n
    return jax.scipy.special.erfinv(share)

  def proceed(at: _Search) -> Array:
    return (at.high - at.low > 1) & (at.missed > slack)

  def narrow(at: _Search) -> _Search:
    value = value_of(at.pattern)
    count = _count_under(patterns, at.pattern, most)
    enough = count >= k
    low = jnp.where(enough, at.low, at.pattern)
    high = jnp.where(enough, at.pattern, at.high)
    missed = jnp.abs(count - k)
    # A secant through the last two trials, against the scores of a normal
    # distribution, for which it is exact; the first passes through the origin.
    # Halving values or bit patterns bounds the passes where it does not help.
    rise = score(count) - at.last_score
    slope = (value - at.last_value) / jnp.where(rise == 0, jnp.inf, rise)
    secant = value + slope * (score(k) - score(count))
    lowest = value_of(jnp.maximum(low, 0))
    middle = 0.5 * (lowest + value_of(high))
    # Beyond the largest magnitude seen there is nothing to halve.
    halved = jnp.where(jnp.isfinite(middle), middle, 2 * lowest)
    by_secant = bits_of(jnp.clip(secant, 0.25 * value, 4 * value))
    candidates = jnp.stack(
      [by_secant, bits_of(halved), low + (high - low) // 2]
    )
    turns = jnp.array([0, 0, 0, 1, 0, 2])  # which of them a step takes
    following = jnp.clip(candidates[turns[at.step % 6]], low + 1, high - 1)
    pattern = jnp.where(missed > slack, following, at.pattern)
    return _Search(at.step + 1, pattern, low, high, value, score(count), missed)

  def normal() -> Array:
    squares = sum(jnp.sum(jnp.square(a.astype(jnp.float32))) for a in arrays)
    quantile = bits_of(2**0.5 * jnp.sqrt(squares / n) * score(k))
    # To seven bits, such that the order of a sum over shards changes nothing.
    return quantile & -(1 << 16)

  # The largest magnitude would be the natural bound, but finding a maximum is
  # several times as slow as counting.
  zero, infinity = jnp.zeros((), jnp.int32), bits_of(jnp.float32(jnp.inf))
  if guess is None:
    first = normal()
  else:
    first = jax.lax.cond(guess > 0, lambda: bits_of(guess), normal)
  first = jnp.clip(first, 1, infinity - 1)
  origin = (jnp.zeros((), jnp.float32),) * 2
  start = _Search(zero, first, zero - 1, infinity, *origin, zero + n)
  end = jax.lax.while_loop(proceed, narrow, start)
  is_split = end.missed > slack
  pattern = jnp.where(is_split, end.high, end.pattern)
  return Found(value_of(pattern), is_split)


def first_beyond(
  x: Array, threshold: Array, zeros: Array | int, is_split: Array
) -> Array:
  """Returns the cut at a threshold that leaves so many magnitudes under it.

  `NO_CUT` unless the ties are to be split.
  """
  if not x.size:
    return jnp.asarray(NO_CUT, jnp.int32)
  return _first_beyond(x, threshold, jnp.asarray(zeros, jnp.int32), is_split)


@jax.jit
def _first_beyond(
  x: Array, threshold: Array, zeros: Array, is_split: Array
) -> Array:
  def find() -> Array:
    patterns, at = pattern_of(x), bits_of(threshold)
    under = _count_under([patterns], at - 1)
    return index_after(patterns == at, zeros - under)

  return if_needed(is_split, find, jnp.asarray(NO_CUT, jnp.int32))


def if_needed(
  needed: Array, find: Callable[[], _Tree], otherwise: _Tree
) -> _Tree:
  """Returns what find() does if it is needed, else `otherwise`.

  A loop of at most one turn: mapped over layers, none of which needs it, it
  does not run, and a conditional would.
  """
  end = jax.lax.while_loop(
    lambda at: at[0],
    lambda _: (jnp.zeros_like(needed), find()),
    (needed, otherwise),
  )
  return end[1]


def index_after(which: Array, number: Array) -> Array:
  """Returns a flat index below which exactly so many are true, int32, 0-d."""
  which = jnp.atleast_1d(which)
  cut, stride = jnp.zeros((), jnp.int32), which.size
  # Axis by axis: which slabs lie below it as a whole, then what of the next.
  for axis, n in enumerate(which.shape):
    stride //= n
    others = tuple(i for i in range(which.ndim) if i != axis)
    counts = jnp.sum(which, others, jnp.int32)
    index = jax.lax.iota(jnp.int32, n)
    whole, used = _slabs(counts, index, number)
    number -= used
    cut += stride * whole
    which &= jax.lax.expand_dims(index == whole, others)
  return cut


def _slabs(counts: Array, index: Array, rest: Array) -> tuple[Array, Array]:
  """Returns the most leading counts of a sum of at most rest, and that sum."""

  def total(number: Array) -> Array:
    return jnp.sum(jnp.where(index < number, counts, 0), dtype=jnp.int32)

  def halve(_: Array, ends: tuple[Array, Array]) -> tuple[Array, Array]:
    low, high = ends
    middle = (low + high) // 2
    fits = total(middle) <= rest
    return jnp.where(fits, middle, low), jnp.where(fits, high, middle)

  n = counts.size
  ends = jnp.zeros((), jnp.int32), jnp.asarray(n + 1, jnp.int32)
  whole, _ = jax.lax.fori_loop(0, (n + 1).bit_length(), halve, ends)
  return whole, total(whole)


def _past(shape: tuple[int, ...], cut: Array) -> Array:
  """Returns where flat indices are at or past a cut, broadcastable."""
  # By the index within its row: a flat index costs a division an element.
  start, stride = jnp.zeros((1,) * len(shape), jnp.int32), math.prod(shape)
  for axis, n in enumerate(shape[:-1]):
    stride //= max(n, 1)
    start += stride * _index(shape, axis)
  index = _index(shape, len(shape) - 1) if shape else start
  return index >= cut - start


def _index(shape: tuple[int, ...], axis: int) -> Array:
  """Returns the index along an axis, with ones beside it."""
  along = tuple(n if i == axis else 1 for i, n in enumerate(shape))
  return jax.lax.broadcasted_iota(jnp.int32, along, axis)


def pattern_of(x: Array) -> Array:
  """Returns the bits of |x| in float32, int32, in the order of the floats.

  Compared as they are, also where a device takes subnormal floats for 0.
  """
  return bits_of(jnp.abs(x).astype(jnp.float32))


def bits_of(value: Array) -> Array:
  """Returns the bits of float32, int32, negative for negative floats."""
  return jax.lax.bitcast_convert_type(value, jnp.int32)


def value_of(pattern: Array) -> Array:
  """Returns the float32 of such bits."""
  return jax.lax.bitcast_convert_type(pattern, jnp.float32)


def _count_under(
  patterns: list[Array],
  pattern: Array,
  most: tuple[Array, ...] | None = None,
) -> Array:
  counts = [count_parts(p <= pattern, 0) for p in patterns]
  if most is not None:
    parts = zip(patterns, most, strict=True)
    counts = [
      jnp.minimum(count_parts(p <= pattern, m.ndim), m) for p, m in parts
    ]
  return sum((jnp.sum(c, dtype=jnp.int32) for c in counts), jnp.int32(0))


def count_parts(which: Array, axes: int) -> Array:
  """Returns how many are true at each index of so many first axes, int32."""
  rows = count_rows(which if which.ndim > axes else which[..., None])
  return jnp.sum(rows, tuple(range(axes, rows.ndim)), jnp.int32)


def count_rows(which: Array) -> Array:
  """Returns how many of the last axis are true, int32."""
  # In float32, exactly, because XLA:CPU vectorizes that and not the sum of
  # integers.
  which = jnp.atleast_1d(which)
  dtype = jnp.float32 if which.shape[-1] <= 2**24 else jnp.int32
  return jnp.sum(which.astype(dtype), -1).astype(jnp.int32)


def count_of(n: int, sparsity: Scalar) -> Array:
  """Returns how many of n weights a sparsity asks to be zero, int32, 0-d.

  A Python number is rounded as in Python, where float32 has too few digits for
  large arrays.

  >>> int(count_of(100_000_001, 0.8))
  80000001
  """
  if isinstance(sparsity, float | int):
    return jnp.asarray(round(sparsity * n), jnp.int32)
  return jnp.round(jnp.asarray(sparsity, jnp.float32) * n).astype(jnp.int32)
