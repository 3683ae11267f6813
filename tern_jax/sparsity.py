"""Targets: the threshold that leaves exactly the asked share of zeros."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from tern_jax.base import Array, Arrays, call_repr, check_range, concrete

#: Share of the weights by which a target may be missed while it is followed.
TOLERANCE = 1e-3

#: A number, an array, or a schedule from the step count to one.
Schedulable = Any


def at(
  value: Schedulable, count: Array, dtype: DTypeLike = jnp.float32
) -> Array:
  """Returns a scheduled value at a step.

  >>> float(at(0.5, 0)), float(at(lambda count: 2. * count, 3))
  (0.5, 6.0)
  """
  return jnp.asarray(value(count) if callable(value) else value).astype(dtype)


def check_sparsity(sparsity: Schedulable) -> None:
  """Raises a ValueError unless a concrete sparsity lies in [0, 1)."""
  check_range(
    "sparsity", sparsity, 0, 1, "it is the share of zeros, for example 0.8"
  )


@dataclasses.dataclass(frozen=True, repr=False)
class Ramp:
  """Schedule made by `ramp`."""

  sparsity: float
  steps: int
  until: float = 0.5

  def __post_init__(self):
    check_sparsity(self.sparsity)
    check_range("until", self.until, 1e-9, 1 + 1e-9, "it is a share of steps")
    check_range("steps", self.steps, 1, float("inf"), "count training steps")

  def __call__(self, count: Array) -> Array:
    """Returns the sparsity asked for at a step."""
    done = jnp.asarray(count, jnp.float32) / (self.until * self.steps)
    return self.sparsity * (1.0 - (1.0 - jnp.minimum(done, 1.0)) ** 3)

  def __repr__(self) -> str:
    """Prints the call that made it."""
    return call_repr(self, "ramp")


def ramp(sparsity: float, steps: int, until: float = 0.5) -> Ramp:
  """Makes a cubic schedule of sparsity from 0 to the target, then flat.

  `s(n) = sparsity * (1 - (1 - n / (until * steps))^3)`.

  Args:
    sparsity: share of zeros in [0, 1) at the end.
    steps: training steps of the whole run.
    until: share of the run after which the target is reached.

  Returns:
    A schedule, printable as this call.

  >>> s = ramp(0.8, steps=1000)
  >>> [round(float(s(n)), 4) for n in (0, 250, 500, 1000)]
  [0.0, 0.7, 0.8, 0.8]

  Source: Zhu & Gupta, arXiv 1710.01878, equation 1.
  """
  return Ramp(sparsity, steps, until)


def magnitude_threshold(
  x: Array,
  sparsity: Array | float,
  guess: Array | None = None,
  tolerance: float = 0.0,
) -> Array:
  """Finds a threshold that the asked share of magnitudes lies under.

  With k = round(sparsity * n), it is a value v such that k magnitudes satisfy
  |x| <= v (more only if ties forbid k). Found by interpolated bisection over
  the bit patterns of non-negative floats, whose order is the floats' own: a
  few counting passes, no sorting, hence cheap, and exact on sharded arrays.

  Args:
    x: float, any shape; compared in float32.
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
  n = x.size
  if not n:
    return jnp.zeros((), jnp.float32)
  magnitude = jnp.atleast_1d(jnp.abs(x.astype(jnp.float32)))
  k = _share_of(n, sparsity)
  slack = jnp.asarray(tolerance * n, jnp.int32)

  def bits(value: Array) -> Array:
    return jax.lax.bitcast_convert_type(value, jnp.int32)

  def value(pattern: Array) -> Array:
    return jax.lax.bitcast_convert_type(pattern, jnp.float32)

  def count_under(threshold: Array) -> Array:
    # Rows are counted in float32, exactly, because XLA:CPU vectorizes that
    # and not the sum of integers.
    under = (magnitude <= threshold).astype(jnp.float32)
    return jnp.sum(jnp.sum(under, -1).astype(jnp.int32), dtype=jnp.int32)

  def proceed(carry: tuple[Array, ...]) -> Array:
    _, _, low, high, _, _, missed = carry
    return (high - low > 1) & (missed > slack)

  def narrow(carry: tuple[Array, ...]) -> tuple[Array, ...]:
    step, at, low, high, count_low, count_high, _ = carry
    count = count_under(value(at))
    enough = count >= k
    low = jnp.where(enough, low, at)
    high = jnp.where(enough, at, high)
    count_low = jnp.where(enough, count_low, count)
    count_high = jnp.where(enough, count, count_high)
    missed = jnp.abs(count - k)
    # Interpolation lands on k at once where the density is smooth; halving
    # values or bit patterns bounds the passes where it is not. Beyond the
    # largest magnitude seen there is nothing to interpolate to, so double.
    share = (k - count_low).astype(jnp.float32) / (
      count_high - count_low
    ).astype(jnp.float32)
    width = value(high) - value(low)
    bounded = jnp.isfinite(width)
    doubled = bits(2 * value(low))
    following = jnp.stack(
      [
        jnp.where(bounded, bits(value(low) + share * width), doubled),
        jnp.where(bounded, bits(value(low) + 0.5 * width), doubled),
        low + (high - low) // 2,
      ]
    )[jnp.array([0, 0, 1, 0, 2])[step % 5]]
    following = jnp.clip(following, low + 1, high - 1)
    at = jnp.where(missed > slack, following, at)
    return step + 1, at, low, high, count_low, count_high, missed

  # The largest magnitude would be the natural bound, but finding a maximum is
  # several times as slow as counting.
  zero, infinity = jnp.zeros((), jnp.int32), bits(jnp.array(jnp.inf))
  zeros = count_under(jnp.zeros((), jnp.float32))
  if guess is None:
    guess = jnp.zeros((), jnp.float32)
  # Without a guess, start where normal weights have their quantile.
  sigma = jnp.sqrt(jnp.mean(jnp.square(magnitude)))
  quantile = jax.scipy.special.erfinv(jnp.asarray(sparsity, jnp.float32))
  first = bits(jnp.where(guess > 0, guess, 2**0.5 * sigma * quantile))
  first = jnp.clip(first, 1, infinity - 1)
  start = (zero, first, zero, infinity, zeros, zero + n, zero + n)
  _, at, _, high, _, _, missed = jax.lax.while_loop(proceed, narrow, start)
  least = jnp.where(zeros >= k, 0.0, value(high))
  return jnp.where(missed <= slack, value(at), least)


def _share_of(n: int, sparsity: Array | float) -> Array:
  return jnp.round(jnp.asarray(sparsity, jnp.float32) * n).astype(jnp.int32)


def init_target(w: Array, sparsity: Schedulable) -> Arrays:
  """Returns the state that follows a sparsity: step count and threshold.

  Args:
    w: float, any shape, the latents at step 0.
    sparsity: share of zeros, or a schedule of it.

  Returns:
    {"count": int32 0-d, "threshold": float32 0-d}.
  """
  count = jnp.zeros((), jnp.int32)
  return {
    "count": count,
    "threshold": magnitude_threshold(w, at(sparsity, count)),
  }


def follow_target(
  state: Arrays, w: Array, sparsity: Schedulable, every: int
) -> Arrays:
  """Returns the state of the next step, from the latents after this one.

  Args:
    state: what `init_target` returned, or this function.
    w: float, any shape, the latents after the update.
    sparsity: share of zeros, or a schedule of it.
    every: steps between two looks at the quantile.

  Returns:
    The same kind of state, one step on.
  """
  count = state["count"] + 1
  due = count % every == 0
  threshold = renew(state["threshold"], w, sparsity, count, due)
  return {"count": count, "threshold": threshold}


def meet_target(state: Arrays, w: Array, sparsity: Schedulable) -> Arrays:
  """Returns the state with the threshold that fits the latents now.

  Args:
    state: what `init_target` or `follow_target` returned.
    w: float, any shape, latents.
    sparsity: share of zeros, or a schedule of it.

  Returns:
    The same kind of state, at the same step.
  """
  threshold = magnitude_threshold(
    w, at(sparsity, state["count"]), guess=state["threshold"]
  )
  return {**state, "threshold": threshold}


def check_zeros(codes: Array, sparsity: Schedulable, count: Array) -> None:
  """Raises a ValueError unless codes have the zeros of a target.

  They may have up to 1 % more, as ties among coarse latents leave.

  Args:
    codes: any shape, in {-1, 0, 1}.
    sparsity: share of zeros, or a schedule of it; traced ones pass.
    count: int32, 0-d, step.

  >>> check_zeros(jnp.array([0, 1, -1, 1]), 0.5, jnp.array(0))
  Traceback (most recent call last):
  ValueError: 1 of 4 weights are zero, but 2 are asked for by sparsity=0.5: \
give sparsity=0.25, or a method without a target.
  """
  asked, n = at(sparsity, count), codes.size
  if not (concrete(codes) and concrete(asked)):
    return
  zeros, wanted = int(jnp.sum(codes == 0)), int(_share_of(n, asked))
  if not wanted <= zeros <= wanted + 0.01 * n:
    moment = f" at step {count}" if callable(sparsity) else ""
    raise ValueError(
      f"{zeros} of {n} weights are zero, but {wanted} are asked for by"
      f" sparsity={sparsity}{moment}: give sparsity={zeros / n}, or a"
      " method without a target."
    )


def renew(
  threshold: Array,
  w: Array,
  sparsity: Schedulable,
  count: Array,
  due: Array,
) -> Array:
  """Returns the threshold of the asked sparsity, found anew if that is due.

  Args:
    threshold: float32, 0-d, the one in force.
    w: float, any shape, the latents at step `count`.
    sparsity: share of zeros, or a schedule of it.
    count: int32, 0-d, step.
    due: bool, 0-d, whether the threshold is found anew.

  Returns:
    float32, 0-d.
  """
  return jax.lax.cond(
    due,
    lambda: magnitude_threshold(
      w, at(sparsity, count), guess=threshold, tolerance=TOLERANCE
    ),
    lambda: threshold,
  )
