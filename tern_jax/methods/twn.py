"""TWN: ternary weight networks, the straight-through reference."""

import dataclasses

import jax.numpy as jnp

from tern_jax.core.checks import check_range
from tern_jax.core.containers import Ternary, dense
from tern_jax.core.estimators import straight_through
from tern_jax.core.numerics import (
  mean_of,
  one_magnitude,
  reduced_axes,
  widen,
  with_mean,
)
from tern_jax.core.types import Array, Arrays, ChannelAxis, Floats
from tern_jax.targets.schedules import Target
from tern_jax.targets.targeted import Look, Targeted


@dataclasses.dataclass(frozen=True, repr=False)
class TWN(Targeted):
  """Ternary weights nearest to the latents, trained straight through.

  `Delta = threshold * mean|w|`; the code is `sign(w) 1[|w| > Delta]`, the
  scale `mean of |w| over |w| > Delta`, and the gradient passes to w unchanged.
  `TWN(sparsity=s)` puts Delta at the quantile of |w| instead, so that exactly
  that share is zero.

  Args:
    threshold: Delta in units of mean|w|, >= 0; 0.7 gives 42 % zeros on normal
      weights. Not used where a sparsity is given.
    sparsity: share of zeros in [0, 1), a number, traced array or schedule.
    every: steps between two updates, in which Delta and the scale are found
      anew; 1 as published.
    channel_axis: None for one Delta and scale a tensor; else one for each
      index of this axis, -1 for the output channels of Flax and Haiku, 0 for
      Equinox's. A sparsity is always that of the whole tensor.

  Raises:
    ValueError: a hyper-parameter is out of range.

  >>> w = jnp.array([[0.1, -0.2], [0.3, -0.4]])
  >>> method = TWN()
  >>> scales, state = method.init(w)
  >>> ternary = method.discretize(w, scales, state)
  >>> ternary.codes.tolist(), round(float(ternary.w_p), 4)
  ([[0, -1], [1, -1]], 0.3)

  Source: Li, Zhang & Liu, arXiv 1605.04711, equations 5 and 6. Differs from
  the paper: Delta and the scale are found anew every 10 steps, not at each
  (`every=1` undoes it), so that a step costs little more than the float one.
  """

  threshold: float = 0.7
  sparsity: Target | None = None
  every: int = 10
  channel_axis: ChannelAxis = None

  def __post_init__(self):
    check_range("threshold", self.threshold, 0, float("inf"), "try 0.7")
    super().__post_init__()

  def init(self, w: Floats) -> tuple[Arrays, Arrays]:
    """Returns no scales, and Delta and the scale as state."""
    return {}, self.state_at(w, {})

  def __call__(self, w: Floats, scales: Arrays, state: Arrays) -> Floats:
    """Returns the ternary weights, with the gradient of w."""
    del scales
    scale = state["scale"].astype(w.dtype)
    return straight_through(w, dense(self._codes(w, state), scale, scale))

  def discretize(self, w: Floats, scales: Arrays, state: Arrays) -> Ternary:
    """Returns codes beyond Delta and the mean magnitude there."""
    del scales
    scale = state["scale"].astype(w.dtype)
    codes = self._codes(w, state).astype(jnp.int8)
    return Ternary(codes, w_p=scale, w_n=scale)

  def measure(
    self, w: Floats, scales: Arrays, look: Look, held: Arrays | None = None
  ) -> Arrays:
    """Returns Delta, as "threshold", and the scale, both widened.

    At a sparsity Delta is float32, with the cut of `split` beside it.
    """
    del scales
    magnitude = jnp.abs(widen(w))
    axes = reduced_axes(w, self.channel_axis)
    keep = axes is not None
    if self.sparsity is None:
      mean = mean_of(magnitude, axes)
      found = {"threshold": jnp.asarray(self.threshold, mean.dtype) * mean}
      beyond = magnitude > found["threshold"]
    else:
      found = self.split(w, look, held)
      beyond = self.beyond(w, found)
    number = jnp.sum(beyond, axes, magnitude.dtype, keepdims=keep)
    total = jnp.sum(jnp.where(beyond, magnitude, 0), axes, keepdims=keep)
    return {"scale": total / jnp.maximum(number, 1), **found}

  def invert(
    self, ternary: Ternary, count: Array
  ) -> tuple[Floats, Arrays, Arrays]:
    """Returns the weights, of this scale in all digits, Delta and the scale.

    Delta is `threshold * share of nonzeros * scale`, which must be less than
    the scale; for a sparsity, which must be that of these weights, it is half
    the least magnitude.
    """
    scale = widen(one_magnitude(ternary, self))
    codes, dtype = ternary.codes, ternary.dtype
    w = with_mean(codes, scale, dtype, self.channel_axis)
    state = {**self.state_at(w, {}, count), "scale": scale}
    if self.sparsity is not None:
      self.check_zeros(codes, count)
      top = jnp.max(scale, initial=0)
      used = jnp.where(codes == 0, top, jnp.abs(widen(w)))
      state |= self.halfway(jnp.min(used, initial=top), count)
    return w, {}, state

  def _codes(self, w: Array, state: Arrays) -> Array:
    if self.sparsity is not None:
      return self.codes(w, state)
    beyond = jnp.abs(widen(w)) > state["threshold"]
    return jnp.where(beyond, jnp.sign(w), jnp.zeros((), w.dtype))
