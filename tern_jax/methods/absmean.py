"""AbsMean: the ternary weights of BitNet b1.58."""

import dataclasses

import jax.numpy as jnp

from tern_jax.core.containers import Ternary, dense
from tern_jax.core.estimators import straight_through
from tern_jax.core.method import Ternarizer
from tern_jax.core.numerics import (
  mean_of,
  one_magnitude,
  reduced_axes,
  widen,
  with_mean,
)
from tern_jax.core.types import Array, Arrays, ChannelAxis, Floats


@dataclasses.dataclass(frozen=True, repr=False)
class AbsMean(Ternarizer):
  """Weights rounded in units of their mean magnitude, straight through.

  With `m = mean|w|` the code is `clip(round(w / m), -1, 1)` and the scale m:
  31 % zeros on normal weights. The gradient passes to w unchanged.

  Args:
    channel_axis: None for one m a tensor; else one for each index of this
      axis, -1 for the output channels of Flax and Haiku, 0 for Equinox's.

  >>> w = jnp.array([[0.1, -0.2], [0.3, -0.4]])
  >>> method = AbsMean()
  >>> ternary = method.discretize(w, *method.init(w))
  >>> ternary.codes.tolist(), float(ternary.w_p)
  ([[0, -1], [1, -1]], 0.25)

  Source: Ma et al., arXiv 2402.17764, equations 1 to 3.
  """

  channel_axis: ChannelAxis = None

  def init(self, w: Floats) -> tuple[Arrays, Arrays]:
    """Returns no scales and no state."""
    del w
    return {}, {}

  def __call__(self, w: Floats, scales: Arrays, state: Arrays) -> Floats:
    """Returns the ternary weights, with the gradient of w."""
    del scales, state
    codes, scale = self._ternarize(w)
    return straight_through(w, dense(codes, scale, scale))

  def discretize(self, w: Floats, scales: Arrays, state: Arrays) -> Ternary:
    """Returns the rounded codes and the mean magnitude."""
    del scales, state
    codes, scale = self._ternarize(w)
    return Ternary(codes.astype(jnp.int8), w_p=scale, w_n=scale)

  def invert(
    self, ternary: Ternary, count: Array
  ) -> tuple[Floats, Arrays, Arrays]:
    """Returns latents at 0 and at `+-m / share of nonzeros`, of mean m.

    A channel of zeros has no m: it comes back as 0.
    """
    del count
    m = one_magnitude(ternary, self)
    axes = reduced_axes(ternary.codes, self.channel_axis)
    keep = axes is not None
    share = jnp.mean(ternary.codes != 0, axes, widen(m).dtype, keepdims=keep)
    size = widen(m) / jnp.where(share > 0, share, 1)
    w = with_mean(ternary.codes, size, m.dtype, self.channel_axis)
    return w, {}, {}

  def _ternarize(self, w: Array) -> tuple[Array, Array]:
    magnitude = jnp.abs(widen(w))
    axes = reduced_axes(w, self.channel_axis)
    mean = mean_of(magnitude, axes)
    # Halves round to even, hence |w| = m / 2 to 0.
    codes = jnp.where(magnitude > mean / 2, jnp.sign(w), 0)
    return codes.astype(w.dtype), mean.astype(w.dtype)
