"""Targets: the threshold that leaves exactly the asked share of zeros."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from tern_jax.base import Array, Arrays, call_repr, check_range, concrete
from tern_jax.select import check_patterns, matches

#: Share of the weights by which a target may be missed while it is followed.
TOLERANCE = 1e-3
#: Share of a run, its last, in which a target on a ramp is met at each step.
_LAST = 0.05

#: A number, an array, or a schedule from the step count to one. A sparsity may
#: also be made by `per_layer` or `across_layers`, which whoever walks a tree
#: resolves to the target of each leaf.
Schedulable = Any


def at(
  value: Schedulable, count: Array, dtype: DTypeLike = jnp.float32
) -> Array:
  """Returns a scheduled value at a step.

  >>> float(at(0.5, 0)), float(at(lambda count: 2. * count, 3))
  (0.5, 6.0)
  """
  if isinstance(value, PerLayer | AcrossLayers):
    raise TypeError(
      f"{value!r} is the target of a tree, and this is one array: use"
      " ParamTransform, or give the array a number."
    )
  return jnp.asarray(value(count) if callable(value) else value).astype(dtype)


def check_sparsity(sparsity: Schedulable) -> None:
  """Raises a ValueError unless a concrete sparsity lies in [0, 1)."""
  if isinstance(sparsity, Mapping):
    raise ValueError(
      f"sparsity is a dict: give tern_jax.per_layer({sparsity}) instead."
    )
  if isinstance(sparsity, PerLayer | AcrossLayers):
    return
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


def ramp(sparsity: Any, steps: int, until: float = 0.5) -> Any:
  """Makes a cubic schedule of sparsity from 0 to the target, then flat.

  `s(n) = sparsity * (1 - (1 - n / (until * steps))^3)`. As it tells where the
  run ends, methods with such a target look at each of the last 5 % of its
  steps, and meet it to the weight there.

  Args:
    sparsity: share of zeros in [0, 1) at the end; or shares `per_layer` or
      `across_layers`, which then all are on such a ramp.
    steps: training steps of the whole run.
    until: share of the run after which the target is reached.

  Returns:
    A schedule, printable as this call.

  >>> s = ramp(0.8, steps=1000)
  >>> [round(float(s(n)), 4) for n in (0, 250, 500, 1000)]
  [0.0, 0.7, 0.8, 0.8]

  Source: Zhu & Gupta, arXiv 1710.01878, equation 1.
  """

  def rise(share: Any) -> Ramp:
    return Ramp(share, steps, until)

  if isinstance(sparsity, PerLayer | AcrossLayers):
    return sparsity.map(rise)
  return rise(sparsity)


@dataclasses.dataclass(frozen=True, repr=False)
class PerLayer:
  """Targets made by `per_layer`."""

  targets: tuple[tuple[str, Schedulable], ...]

  def __post_init__(self):
    for _, target in self.targets:
      check_sparsity(target)

  def map(self, fn: Callable[[Any], Any]) -> "PerLayer":
    """Returns the targets that a function makes of these."""
    return PerLayer(tuple((k, fn(target)) for k, target in self.targets))

  def of(self, path: str) -> Schedulable:
    """Returns the target of a leaf: that of the first pattern that matches.

    Raises:
      ValueError: none does.
    """
    for pattern, target in self.targets:
      if matches(pattern, path):
        return target
    raise ValueError(f"{self!r} has no target for {path}: add one.")

  def __repr__(self) -> str:
    """Prints the call that made it."""
    return f"per_layer({dict(self.targets)})"


def per_layer(targets: Mapping[str, Schedulable]) -> PerLayer:
  """Makes a sparsity that is another one for each layer.

  Takes the place of a number in `SCA(sparsity=...)`, that of any other method,
  `at_sparsity` and `ramp`.

  Args:
    targets: {pattern: share of zeros in [0, 1), or a schedule of it}; patterns
      are those of `kernels`, a whole path among them, and the first that
      matches counts. `fit_budget` returns the like.

  Returns:
    Hashable, printable as this call.

  Raises:
    ValueError: a concrete share lies outside [0, 1).

  >>> per_layer({"head": 0.5, "*": 0.9}).of("Dense_0/kernel")
  0.9
  """
  return PerLayer(tuple(targets.items()))


@dataclasses.dataclass(frozen=True, repr=False)
class AcrossLayers:
  """A target made by `across_layers`."""

  sparsity: Schedulable

  def __post_init__(self):
    check_sparsity(self.sparsity)

  def map(self, fn: Callable[[Any], Any]) -> "AcrossLayers":
    """Returns the target that a function makes of this."""
    return AcrossLayers(fn(self.sparsity))

  def __repr__(self) -> str:
    """Prints the call that made it."""
    return call_repr(self, "across_layers")


def across_layers(sparsity: Schedulable) -> AcrossLayers:
  """Makes a sparsity that all layers together have: one threshold for all.

  Takes the place of a number in `SCA(sparsity=...)`, that of any other method,
  `at_sparsity` and `ramp`. Which share of a layer is zero then follows from the
  magnitudes of its latents beside those of the others: `SCA` gives all layers
  latents of one spread, elsewhere they are those of the initialization.

  Args:
    sparsity: share of zeros of all selected weights in [0, 1), or a schedule.

  Returns:
    Hashable, printable as this call.

  Raises:
    ValueError: a concrete share lies outside [0, 1).

  >>> across_layers(0.9)
  across_layers(sparsity=0.9)
  """
  return AcrossLayers(sparsity)


def target_of(sparsity: Schedulable, path: str) -> Schedulable:
  """Returns the target of a leaf, where there is one of its own."""
  return sparsity.of(path) if isinstance(sparsity, PerLayer) else sparsity


def check_targets(sparsity: Schedulable, paths: Sequence[str]) -> None:
  """Raises a ValueError unless each leaf has a target, and each a leaf."""
  if isinstance(sparsity, PerLayer):
    check_patterns([pattern for pattern, _ in sparsity.targets], paths)
    for path in paths:
      sparsity.of(path)


def magnitude_threshold(
  x: Array | Iterable[Array],
  sparsity: Array | float,
  guess: Array | None = None,
  tolerance: Array | float = 0.0,
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


# Compiled by itself: outside of a program, each of its operations would be; and
# inside of one it is traced once for all arrays of a shape.
@jax.jit
def _magnitude_threshold(
  arrays: tuple[Array, ...],
  sparsity: Array | float,
  guess: Array | None,
  tolerance: Array | float,
) -> Array:
  n = sum(a.size for a in arrays)
  magnitudes = [jnp.atleast_1d(jnp.abs(a.astype(jnp.float32))) for a in arrays]
  k = _share_of(n, sparsity)
  slack = jnp.asarray(tolerance * n, jnp.int32)

  def bits(value: Array) -> Array:
    return jax.lax.bitcast_convert_type(value, jnp.int32)

  def value(pattern: Array) -> Array:
    return jax.lax.bitcast_convert_type(pattern, jnp.float32)

  def count_under(threshold: Array) -> Array:
    # Rows are counted in float32, exactly, because XLA:CPU vectorizes that
    # and not the sum of integers.
    under = [(m <= threshold).astype(jnp.float32) for m in magnitudes]
    rows = [jnp.sum(u, -1).astype(jnp.int32) for u in under]
    return sum((jnp.sum(r, dtype=jnp.int32) for r in rows), jnp.int32(0))

  def score(count: Array) -> Array:
    # Under which multiple of sigma * sqrt(2) normal weights are so many.
    share = jnp.clip(count.astype(jnp.float32), 0.5, n - 0.5) / n
    return jax.scipy.special.erfinv(share)

  def proceed(carry: tuple[Array, ...]) -> Array:
    _, _, low, high, _, _, missed = carry
    return (high - low > 1) & (missed > slack)

  def narrow(carry: tuple[Array, ...]) -> tuple[Array, ...]:
    step, at, low, high, last_value, last_score, _ = carry
    count = count_under(value(at))
    enough = count >= k
    low = jnp.where(enough, low, at)
    high = jnp.where(enough, at, high)
    missed = jnp.abs(count - k)
    # A secant through the last two looks, against the scores of a normal
    # distribution, for which it is exact; the first passes through the origin.
    # Halving values or bit patterns bounds the passes where it does not help.
    rise = score(count) - last_score
    slope = (value(at) - last_value) / jnp.where(rise == 0, jnp.inf, rise)
    secant = value(at) + slope * (score(k) - score(count))
    halved = 0.5 * (value(low) + value(high))
    following = jnp.stack(
      [
        bits(jnp.clip(secant, 0.25 * value(at), 4 * value(at))),
        # Beyond the largest magnitude seen there is nothing to halve.
        bits(jnp.where(jnp.isfinite(halved), halved, 2 * value(low))),
        low + (high - low) // 2,
      ]
    )[jnp.array([0, 0, 0, 1, 0, 2])[step % 6]]
    following = jnp.clip(following, low + 1, high - 1)
    looked = value(at), score(count)
    at = jnp.where(missed > slack, following, at)
    return step + 1, at, low, high, *looked, missed

  # The largest magnitude would be the natural bound, but finding a maximum is
  # several times as slow as counting.
  zero, infinity = jnp.zeros((), jnp.int32), bits(jnp.float32(jnp.inf))
  zeros = count_under(jnp.zeros((), jnp.float32))

  def normal() -> Array:
    squares = sum(jnp.sum(jnp.square(m)) for m in magnitudes)
    quantile = bits(2**0.5 * jnp.sqrt(squares / n) * score(k))
    # To seven bits, such that the order of a sum over shards changes nothing.
    return quantile & -(1 << 16)

  if guess is None:
    first = normal()
  else:
    first = jax.lax.cond(guess > 0, lambda: bits(guess), normal)
  first = jnp.clip(first, 1, infinity - 1)
  origin = (jnp.zeros((), jnp.float32),) * 2
  start = (zero, first, zero, infinity, *origin, zero + n)
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


def every_at(
  every: Array | int, sparsity: Schedulable, count: Array
) -> Array | int:
  """Returns the steps between two looks at a target, as they are at a step.

  Those given, and 1 over the last 5 % of the run of a `ramp`: the network does
  not get used to the codes that the last look of all flips. After ten steps
  they are several, which with few weights a layer costs percents of accuracy;
  after one step they are few.

  >>> [int(every_at(10, ramp(0.8, 1000), n)) for n in (949, 950)]
  [10, 1]
  """
  if not isinstance(sparsity, Ramp):
    return every
  return jnp.where(count >= round((1 - _LAST) * sparsity.steps), 1, every)


def look_at(
  every: Array | int, sparsity: Schedulable, count: Array
) -> tuple[Array, Array]:
  """Returns whether a step looks at the latents, and how closely.

  Args:
    every: steps between two looks.
    sparsity: share of zeros, a schedule of it, or None.
    count: int32, 0-d, step.

  Returns:
    (due, tolerance): bool, and the share of the weights by which a target may
    be missed, which is 0 where each step looks.
  """
  every = every_at(every, sparsity, count)
  return count % every == 0, jnp.where(every == 1, 0.0, TOLERANCE)


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
  due, tolerance = look_at(every, sparsity, count)
  threshold = jax.lax.cond(
    due,
    lambda guess: magnitude_threshold(
      w, at(sparsity, count), guess=guess, tolerance=tolerance
    ),
    lambda held: held,
    state["threshold"],
  )
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
