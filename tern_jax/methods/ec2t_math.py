"""The costs of EC2T: its lambda, thresholds and codes, in closed form.

A weight w goes to the centroid c of {-w_n, 0, w_p} of the lowest cost
`(w - c)^2 - lambda log2 P_c`, where P_c is the share of the layer's weights
whose nearest centroid is c; P_0 is raised to `min_p_0`, at the others' expense.
For three centroids on a line that is two thresholds, found every few steps.

In all functions w is the latents, of any shape; w_p and w_n are positive, 0-d
or of the rank of w with ones beside the channels; lam is lambda >= 0, 0-d; and
min_p_0 lies in [0, 1). All results are float32 or wider, and finite.

Source: Marban et al., arXiv 2004.01077, section 3, solved for w and for lambda.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from tern_jax.core.numerics import mean_of, widen
from tern_jax.core.types import Array, Arrays, Scalar
from tern_jax.targets.quantile import (
  NO_CUT,
  bits_of,
  codes_beyond,
  count_of,
  count_rows,
  if_needed,
  index_after,
  pattern_of,
  search,
  value_of,
)

#: Bits that + and - cost more than 0, at the least, where lambda is solved for.
_LEAST_RATE = 1e-3


def ec2t_lambda_max(
  w: Array, w_p: Array, w_n: Array, min_p_0: Scalar = 0.5
) -> Array:
  """The least lambda at which one of the two sign clusters is empty.

  `lambda_p = (w_max^2 - (w_max - w_p)^2) / (log2 P_0 - log2 P_p)`, lambda_n
  likewise with |w_min| and w_n; the smaller of the two. A cluster of channels
  is empty once it is in all. One that is empty already, or that no lambda
  empties because P_0 is no larger, is left out; 0 if both are.


  >>> w, c = jnp.array([-1., 0., 0., 0., 2.]), jnp.array(.5)
  >>> round(float(ec2t_lambda_max(w, c, c)), 4)
  0.4732
  """
  ones = tuple(i for i, n in enumerate(w_p.shape) if n == 1)
  axes = ones if w_p.ndim else None
  rate_p, rate_n = _rates(w, w_p, w_n, min_p_0)

  def emptied_at(signed: Array, scale: Array, rate: Array) -> Array:
    # w_max^2 - (w_max - w_p)^2, without the cancellation.
    gain = widen(scale) * (2 * top_of(signed, axes) - widen(scale))
    gain = jnp.max(gain, initial=0)
    empties = (gain > 0) & (rate > 0)
    return jnp.where(empties, gain / jnp.where(empties, rate, 1), jnp.inf)

  lambda_p = emptied_at(widen(w), w_p, rate_p)
  least = jnp.minimum(lambda_p, emptied_at(-widen(w), w_n, rate_n))
  return jnp.where(jnp.isfinite(least), least, 0)


def ec2t_thresholds(
  w: Array, w_p: Array, w_n: Array, lam: Scalar, min_p_0: Scalar = 0.5
) -> tuple[Array, Array]:
  """Thresholds of the cheapest centroids: w_p above t_p, -w_n below -t_n.

  `t_p = (w_p^2 + lambda (log2 P_0 - log2 P_p)) / (2 w_p)`, likewise t_n. Where
  `t_p < -t_n`, possible for P_0 < 0.5 only, zero is nowhere the cheapest, and
  both become the point at which the signs cost the same.


  >>> w, c = jnp.array([-1., 0., 0., 0., 2.]), jnp.array(.5)
  >>> t_p, t_n = ec2t_thresholds(w, c, c, ec2t_lambda_max(w, c, c))
  >>> round(float(t_p), 4), round(float(t_n), 4)
  (1.0, 1.0)
  """
  rate_p, rate_n = _rates(w, w_p, w_n, min_p_0)
  w_p, w_n = widen(w_p), widen(w_n)
  half_lam = 0.5 * jnp.asarray(lam, w_p.dtype)
  # Centroids of dead channels are tiny: their thresholds must not overflow.
  big = float(jnp.finfo(w_p.dtype).max)
  t_p = jnp.clip(0.5 * w_p + half_lam * rate_p / w_p, -big, big)
  t_n = jnp.clip(0.5 * w_n + half_lam * rate_n / w_n, -big, big)
  even = (w_p * t_p - w_n * t_n) / (w_p + w_n)
  crossed = t_p < -t_n
  return jnp.where(crossed, even, t_p), jnp.where(crossed, -even, t_n)


def ec2t_assign(
  w: Array, w_p: Array, w_n: Array, lam: Scalar, min_p_0: Scalar = 0.5
) -> Array:
  """Codes of the cheapest centroids, `argmin_c (w - c)^2 - lambda log2 P_c`.

  Returns int8 of the shape of w; ties go to 0, and lam = 0 gives the nearest.


  >>> w, c = jnp.array([-1., 0., 0., 0., 2.]), jnp.array(.5)
  >>> ec2t_assign(w, c, c, 0.).tolist(), ec2t_assign(w, c, c, .6).tolist()
  ([-1, 0, 0, 0, 1], [0, 0, 0, 0, 1])
  """
  t_p, t_n = ec2t_thresholds(w, w_p, w_n, lam, min_p_0)
  return codes_of(w, t_p, t_n).astype(jnp.int8)


def ec2t_at_sparsity(
  w: Array,
  w_p: Array,
  w_n: Array,
  sparsity: Scalar,
  min_p_0: Scalar = 0.5,
  guess: Array | None = None,
  tolerance: Scalar = 0.0,
) -> tuple[Array, Array, Array]:
  """The lambda at which the asked share of weights is zero, and its thresholds.

  Zero is the cheapest centroid of w > 0 from `lambda = w_p (2 w - w_p) /
  (log2 P_0 - log2 P_p)` on, of w < 0 likewise with |w|, w_n and P_n; this is
  the quantile of those. It is negative where the nearest centroids alone leave
  more zeros than asked. Thresholds are as in `ec2t_thresholds`, but at least
  0: no weight changes its sign.

  The sparsity is that of the whole tensor, 0-d in [0, 1), and may be missed by
  the tolerance, a share of the weights; guess is where to look first, such as
  the last lambda, float32, 0-d.

  >>> w, c = jnp.array([-1., -.1, .1, .2, 2.]), jnp.array(.5)
  >>> lam, t_p, t_n = ec2t_at_sparsity(w, c, c, 0.8)
  >>> ((w > t_p) | (w < -t_n)).tolist(), bool(lam > 0)
  ([False, False, False, False, True], True)
  >>> lam, t_p, t_n = ec2t_at_sparsity(w, c, c, 0.4)
  >>> ((w > t_p) | (w < -t_n)).tolist(), bool(lam < 0)
  ([True, False, False, True, True], True)

  Differs from the paper: log2 P_0 - log2 P_c counts as .001 at least, so that a
  cluster as common as zero can be thinned out, too.
  """
  rate_p, rate_n = (
    jnp.maximum(r, _LEAST_RATE) for r in _rates(w, w_p, w_n, min_p_0)
  )
  w_p, w_n, wide = widen(w_p), widen(w_n), widen(w)
  scale = jnp.where(jnp.signbit(wide), w_n, w_p)
  turns = scale * (2 * jnp.abs(wide) - scale)
  turns /= jnp.where(jnp.signbit(wide), rate_n, rate_p)
  # A weight of 0 is zero at any lambda.
  never = jnp.maximum(w_p * w_p / rate_p, w_n * w_n / rate_n)
  turns = jnp.where(wide == 0, -jnp.max(never, initial=0), turns)

  n, zeros = w.size, count_of(w.size, sparsity)
  # Magnitudes are what is searched, so one side of lambda = 0 at a time.
  below = _count(turns > 0) < n - zeros
  sign = jnp.where(below, -1, 1).astype(turns.dtype)
  if guess is not None:
    guess = jnp.maximum(sign.astype(jnp.float32) * guess, 0)
  under = jnp.where(below, n - zeros, zeros)
  sides = (jnp.maximum(sign * turns, 0),)
  found = search(sides, under, guess, tolerance).threshold
  lam = sign.astype(jnp.float32) * found

  # A weight at lambda is zero, also if its threshold is rounded down: where
  # many tie, all of them would come back. Where none is asked for, none is.
  slack = 4 * float(jnp.finfo(jnp.float32).eps)
  slack = jnp.where(zeros > 0, slack, -slack)
  big = float(jnp.finfo(w_p.dtype).max) / 4

  def threshold(scale: Array, rate: Array) -> Array:
    half = 0.5 * scale
    shift = jnp.clip(0.5 * lam.astype(rate.dtype) * rate / scale, -big, big)
    return jnp.maximum(half + shift + slack * (half + jnp.abs(shift)), 0)

  return lam, threshold(w_p, rate_p), threshold(w_n, rate_n)


def ec2t_split(
  w: Array,
  w_p: Array,
  w_n: Array,
  t_p: Array,
  t_n: Array,
  zeros: Array,
  tolerance: Scalar = 0.0,
) -> Arrays:
  """The thresholds nearby, and cuts, under which exactly so many weights lie.

  Weights whose lambda agrees to rounding are zero in the order of |w|, those
  of one |w| in that of their flat indices: as `targets.quantile.split` does.

  The thresholds are those of `ec2t_at_sparsity`, which stay if they leave
  `zeros` weights, int32, 0-d, or miss that by the tolerance.

  Returns:
    {"cut_n", "cut_p": int32, "t_n", "t_p"}, of the shapes of t_n and t_p.

  >>> w, one = jnp.ones(5), jnp.ones(())
  >>> found = ec2t_split(w, one, one, one, one, jnp.array(2))
  >>> split_codes(w, found).tolist()
  [0.0, 0.0, 1.0, 1.0, 1.0]
  """

  def under(p: Array, n: Array) -> Array:
    return pattern_of(w) <= jnp.where(jnp.signbit(w), n, p)

  def find() -> Arrays:
    ends_p, ends_n = _ends(t_p, w_p), _ends(t_n, w_n)
    width = jnp.asarray(16 * jnp.finfo(jnp.float32).eps, jnp.float32)

    def misses(width: Array) -> Array:
      (low_p, high_p), (low_n, high_n) = ends_p(width), ends_n(width)
      too_many = _count(under(low_p, low_n)) > zeros
      too_few = _count(under(high_p, high_n)) < zeros
      return (too_many | too_few) & jnp.isfinite(width)

    width = jax.lax.while_loop(misses, lambda width: 64 * width, width)
    return _split_between(w, ends_p(width), ends_n(width), zeros)

  whole = {
    "cut_n": jnp.full_like(t_n, NO_CUT, jnp.int32),
    "cut_p": jnp.full_like(t_p, NO_CUT, jnp.int32),
    "t_n": t_n,
    "t_p": t_p,
  }
  if not w.size:
    return whole
  missed = jnp.abs(_count(under(*_patterns(t_p, t_n))) - zeros)
  slack = jnp.asarray(tolerance * w.size, jnp.int32)
  return if_needed(missed > slack, find, whole)


def split_codes(w: Array, state: Arrays) -> Array:
  """Returns the codes at what `ec2t_split` found, of the dtype of w.

  A zero beyond its cut has the code of its sign bit.
  """
  # A comparison would take subnormal weights for zeros.
  minus, cut = jnp.signbit(w), None
  if "cut_p" in state:
    cut = jnp.where(minus, state["cut_n"], state["cut_p"])
  return codes_beyond(w, jnp.where(minus, state["t_n"], state["t_p"]), cut)


def _patterns(*thresholds: Array) -> tuple[Array, ...]:
  """Returns bits to compare with those of magnitudes; -1 for negative ones."""
  narrow = (t.astype(jnp.float32) for t in thresholds)
  return tuple(jnp.where(t < 0, -1, bits_of(t)) for t in narrow)


def _ends(t: Array, scale: Array) -> Callable[[Array], tuple[Array, ...]]:
  """Returns the bits around a threshold, within a share of its terms."""
  half = 0.5 * widen(scale)

  def around(width: Array) -> tuple[Array, ...]:
    reach = width.astype(t.dtype) * (half + jnp.abs(t - half))
    return _patterns(t - reach, t + reach)

  return around


def _split_between(
  w: Array,
  ends_p: tuple[Array, ...],
  ends_n: tuple[Array, ...],
  zeros: Array,
) -> Arrays:
  """Splits by one magnitude, that each threshold takes within its ends."""

  def under(magnitude: Array) -> Array:
    p, n = (jnp.clip(magnitude, *ends) for ends in (ends_p, ends_n))
    return _count(pattern_of(w) <= jnp.where(jnp.signbit(w), n, p))

  def halve(ends: tuple[Array, Array]) -> tuple[Array, Array]:
    low, high = ends
    middle = low + (high - low) // 2
    enough = under(middle) >= zeros
    return jnp.where(enough, low, middle), jnp.where(enough, middle, high)

  low = jnp.minimum(jnp.min(ends_p[0]), jnp.min(ends_n[0])) - 1
  high = jnp.maximum(jnp.max(ends_p[1]), jnp.max(ends_n[1]))
  _, at = jax.lax.while_loop(lambda x: x[1] - x[0] > 1, halve, (low, high))
  moved = [(ends[0] < at) & (at <= ends[1]) for ends in (ends_p, ends_n)]
  tied = (pattern_of(w) == at) & jnp.where(jnp.signbit(w), moved[1], moved[0])
  cut = index_after(tied, zeros - under(at - 1))
  found = {}
  for name, ends, by in zip("pn", (ends_p, ends_n), moved, strict=True):
    pattern = jnp.clip(at, *ends)
    threshold = jnp.where(pattern < 0, -1.0, value_of(pattern))
    found[f"t_{name}"] = threshold.astype(widen(w).dtype)
    found[f"cut_{name}"] = jnp.where(by, cut, NO_CUT)
  return found


def _count(which: Array) -> Array:
  return jnp.sum(count_rows(which), dtype=jnp.int32)


def top_of(x: Array, axes: tuple[int, ...] | None) -> Array:
  """Returns the largest value over axes, at least 0."""
  return jnp.max(x, axes, keepdims=axes is not None, initial=0)


def codes_of(w: Array, t_p: Array, t_n: Array) -> Array:
  """Returns 1 above t_p, -1 below -t_n, else 0, of the shape of w."""
  plus, minus = widen(w) > t_p, widen(w) < -t_n
  return plus.astype(w.dtype) - minus.astype(w.dtype)


def _rates(
  w: Array, w_p: Array, w_n: Array, min_p_0: Scalar
) -> tuple[Array, Array]:
  """Bits that + and - cost more than 0; finite if a cluster is empty."""
  wide = widen(w)
  tiny = float(jnp.finfo(wide.dtype).tiny)
  p_p = mean_of((wide > 0.5 * widen(w_p)).astype(wide.dtype), None)
  p_n = mean_of((wide < -0.5 * widen(w_n)).astype(wide.dtype), None)
  p_0 = jnp.maximum(1 - p_p - p_n, min_p_0)
  shrink = (1 - p_0) / jnp.maximum(p_p + p_n, tiny)
  shares = jnp.stack([p_p * shrink, p_0, p_n * shrink])
  b_p, b_0, b_n = jnp.log2(jnp.maximum(shares, tiny))
  return b_0 - b_p, b_0 - b_n
