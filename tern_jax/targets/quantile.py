"""The threshold that leaves exactly the asked share of magnitudes under it."""

from collections.abc import Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tern_jax.core.types import Array, Scalar


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
  if not sum(a.size for a in arrays):
    return jnp.zeros((), jnp.float32)
  return _magnitude_threshold(arrays, sparsity, guess, tolerance)


class _Search(NamedTuple):
  """Where the search for a threshold stands; patterns are bits of floats."""

  step: Array
  pattern: Array  # to be tried next
  low: Array  # too few magnitudes lie under it, or it is 0
  high: Array  # enough do
  last_value: Array  # of the trial before, and its score
  last_score: Array
  missed: Array  # by how many weights it did


# Compiled by itself: outside of a program, each of its operations would be; and
# inside of one it is traced once for all arrays of a shape.
@jax.jit
def _magnitude_threshold(
  arrays: tuple[Array, ...],
  sparsity: Scalar,
  guess: Array | None,
  tolerance: Scalar,
) -> Array:
  n = sum(a.size for a in arrays)
  magnitudes = [jnp.atleast_1d(jnp.abs(a.astype(jnp.float32))) for a in arrays]
  k = count_of(n, sparsity)
  slack = jnp.asarray(tolerance * n, jnp.int32)

  def score(count: Array) -> Array:
    # Under which multiple of sigma * sqrt(2) normal weights are so many.
    share = jnp.clip(count.astype(jnp.float32), 0.5, n - 0.5) / n
    return jax.scipy.special.erfinv(share)

  def proceed(at: _Search) -> Array:
    return (at.high - at.low > 1) & (at.missed > slack)

  def narrow(at: _Search) -> _Search:
    value = _value(at.pattern)
    count = _count_under(magnitudes, value)
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
    middle = 0.5 * (_value(low) + _value(high))
    # Beyond the largest magnitude seen there is nothing to halve.
    halved = jnp.where(jnp.isfinite(middle), middle, 2 * _value(low))
    by_secant = _bits(jnp.clip(secant, 0.25 * value, 4 * value))
    candidates = jnp.stack([by_secant, _bits(halved), low + (high - low) // 2])
    turns = jnp.array([0, 0, 0, 1, 0, 2])  # which of them a step takes
    following = jnp.clip(candidates[turns[at.step % 6]], low + 1, high - 1)
    pattern = jnp.where(missed > slack, following, at.pattern)
    return _Search(at.step + 1, pattern, low, high, value, score(count), missed)

  def normal() -> Array:
    squares = sum(jnp.sum(jnp.square(m)) for m in magnitudes)
    quantile = _bits(2**0.5 * jnp.sqrt(squares / n) * score(k))
    # To seven bits, such that the order of a sum over shards changes nothing.
    return quantile & -(1 << 16)

  # The largest magnitude would be the natural bound, but finding a maximum is
  # several times as slow as counting.
  zero, infinity = jnp.zeros((), jnp.int32), _bits(jnp.float32(jnp.inf))
  zeros = _count_under(magnitudes, jnp.zeros((), jnp.float32))
  if guess is None:
    first = normal()
  else:
    first = jax.lax.cond(guess > 0, lambda: _bits(guess), normal)
  first = jnp.clip(first, 1, infinity - 1)
  origin = (jnp.zeros((), jnp.float32),) * 2
  start = _Search(zero, first, zero, infinity, *origin, zero + n)
  end = jax.lax.while_loop(proceed, narrow, start)
  least = jnp.where(zeros >= k, 0.0, _value(end.high))
  return jnp.where(end.missed <= slack, _value(end.pattern), least)


def _bits(value: Array) -> Array:
  return jax.lax.bitcast_convert_type(value, jnp.int32)


def _value(pattern: Array) -> Array:
  return jax.lax.bitcast_convert_type(pattern, jnp.float32)


def _count_under(magnitudes: list[Array], threshold: Array) -> Array:
  # Rows are counted in float32, exactly, because XLA:CPU vectorizes that and
  # not the sum of integers.
  under = [(m <= threshold).astype(jnp.float32) for m in magnitudes]
  rows = [jnp.sum(u, -1).astype(jnp.int32) for u in under]
  return sum((jnp.sum(r, dtype=jnp.int32) for r in rows), jnp.int32(0))


def count_of(n: int, sparsity: Scalar) -> Array:
  """Returns how many of n weights a sparsity asks to be zero, int32, 0-d."""
  return jnp.round(jnp.asarray(sparsity, jnp.float32) * n).astype(jnp.int32)
