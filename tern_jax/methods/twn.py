"""TWN: ternary weight networks, the straight-through reference."""

import dataclasses

import jax.numpy as jnp

from tern_jax.base import (
  Array,
  Arrays,
  Ternarizer,
  Ternary,
  check_range,
  dense,
  reduced_axes,
  widen,
)
from tern_jax.estimators import straight_through
from tern_jax.sparsity import (
  Schedulable,
  check_sparsity,
  follow_target,
  init_target,
  meet_target,
)


@dataclasses.dataclass(frozen=True, repr=False)
class TWN(Ternarizer):
  """Ternary weights nearest to the latents, trained straight through.

  `Delta = threshold * mean|w|`; the code is `sign(w) 1[|w| > Delta]`, the
  scale `mean of |w| over |w| > Delta`, and the gradient passes to w unchanged.
  `TWN(sparsity=s)` puts Delta at the quantile of |w| instead, so that exactly
  that share is zero.

  Args:
    threshold: Delta in units of mean|w|, >= 0; 0.7 gives 42 % zeros on normal
      weights. Not used where a sparsity is given.
    sparsity: share of zeros in [0, 1), a number, traced array or schedule.
    every: steps between two looks at the quantile.
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

  Source: Li, Zhang & Liu, arXiv 1605.04711, equations 5 and 6.
  """

  threshold: float = 0.7
  sparsity: Schedulable | None = None
  every: int = 10
  channel_axis: int | None = None

  def __post_init__(self):
    check_range("threshold", self.threshold, 0, float("inf"), "try 0.7")
    check_sparsity(self.sparsity)
    check_range("every", self.every, 1, float("inf"), "count training steps")

  def init(self, w: Array) -> tuple[Arrays, Arrays]:
    """Returns no scales, and the threshold where a sparsity is asked for."""
    if self.sparsity is None:
      return {}, {}
    return {}, init_target(w, self.sparsity)

  def __call__(self, w: Array, scales: Arrays, state: Arrays) -> Array:
    """Returns the ternary weights, with the gradient of w."""
    del scales
    codes, scale = self._ternarize(w, state)
    return straight_through(w, dense(codes, scale, scale))

  def discretize(self, w: Array, scales: Arrays, state: Arrays) -> Ternary:
    """Returns codes beyond Delta and the mean magnitude there."""
    del scales
    codes, scale = self._ternarize(w, state)
    return Ternary(codes.astype(jnp.int8), w_p=scale, w_n=scale)

  def after_step(
    self, w: Array, scales: Arrays, state: Arrays
  ) -> tuple[Arrays, Arrays]:
    """Keeps the threshold at the asked sparsity."""
    if self.sparsity is None:
      return scales, state
    return scales, follow_target(state, w, self.sparsity, self.every)

  def refresh(
    self, w: Array, scales: Arrays, state: Arrays
  ) -> tuple[Arrays, Arrays]:
    """Puts the threshold where these latents meet the asked sparsity."""
    if self.sparsity is None:
      return scales, state
    return scales, meet_target(state, w, self.sparsity)

  def _ternarize(self, w: Array, state: Arrays) -> tuple[Array, Array]:
    magnitude = jnp.abs(widen(w))
    axes = reduced_axes(w, self.channel_axis)
    keep = axes is not None
    if self.sparsity is None:
      mean = jnp.mean(magnitude, axes, keepdims=keep)
      delta = jnp.asarray(self.threshold, mean.dtype) * mean
    else:
      delta = state["threshold"].astype(magnitude.dtype)
    beyond = magnitude > delta
    count = jnp.sum(beyond, axes, magnitude.dtype, keepdims=keep)
    total = jnp.sum(jnp.where(beyond, magnitude, 0), axes, keepdims=keep)
    scale = (total / jnp.maximum(count, 1)).astype(w.dtype)
    return jnp.where(beyond, jnp.sign(w), jnp.zeros((), w.dtype)), scale
