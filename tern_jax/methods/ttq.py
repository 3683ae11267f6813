"""TTQ: trained ternary quantization."""

import dataclasses
from typing import Literal

import jax.numpy as jnp

from tern_jax.core.checks import check_range
from tern_jax.core.containers import Ternary, dense
from tern_jax.core.estimators import trained_scales
from tern_jax.core.numerics import alive, least_scale, reduced_axes, widen
from tern_jax.core.types import Array, Arrays, ChannelAxis, Floats
from tern_jax.targets.schedules import Target
from tern_jax.targets.targeted import Look, Targeted


@dataclasses.dataclass(frozen=True, repr=False)
class TTQ(Targeted):
  """Ternary weights with two trained magnitudes, w_p and w_n.

  The code is `sign(w) 1[|w| > threshold * max|w|]`. The magnitudes learn by
  their true gradients, `dL/dw_p = sum of g over +1`, `dL/dw_n = -(sum of g
  over -1)`; the latents get g times the magnitude of their cluster, 1 at 0.
  `TTQ(sparsity=s)` puts the threshold at the quantile of |w| instead, so that
  exactly that share is zero.

  Args:
    threshold: in units of max|w|, in [0, 1). Not used where a sparsity is
      given.
    start: where the magnitudes start: the "means" of their clusters, or at
      "one" as published.
    sparsity: share of zeros in [0, 1), a number, traced array or schedule.
    every: steps between two updates of the threshold; 1 as published.
    channel_axis: None for two magnitudes a tensor; else two for each index of
      this axis, -1 for the output channels of Flax and Haiku, 0 for
      Equinox's. Threshold and sparsity are always those of the whole tensor.

  Raises:
    ValueError: a hyper-parameter is out of range.

  >>> w = jnp.array([[0.01, -0.2], [0.3, -0.4]])
  >>> method = TTQ()
  >>> scales, state = method.init(w)
  >>> {name: round(float(s), 3) for name, s in scales.items()}
  {'w_n': 0.3, 'w_p': 0.3}
  >>> method.discretize(w, scales, state).codes.tolist()
  [[0, -1], [1, -1]]

  Source: Zhu, Han, Mao & Dally, arXiv 1612.01064, equations 6 to 9. Differs
  from the paper: magnitudes start at the cluster means, so that any network
  can be continued (`start="one"` undoes it), and stay positive; max|w| is found
  anew every 10 steps, not at each; a sparsity is this project's own.
  """

  threshold: float = 0.05
  start: Literal["means", "one"] = "means"
  sparsity: Target | None = None
  every: int = 10
  channel_axis: ChannelAxis = None

  def __post_init__(self):
    check_range("threshold", self.threshold, 0, 1, "try 0.05")
    if self.start not in ("means", "one"):
      raise ValueError(
        f'start must be "means" or "one", got {self.start!r}: "one" is the'
        " published initialization."
      )
    super().__post_init__()

  def init(self, w: Floats) -> tuple[Arrays, Arrays]:
    """Returns the two magnitudes, and the threshold as state."""
    axes = reduced_axes(w, self.channel_axis)
    keep = axes is not None
    state = self.state_at(w, {})
    codes = self._codes(w, state)
    magnitude = jnp.abs(widen(w))
    least = least_scale(w.dtype)

    def start(sign: int) -> Array:
      cluster = codes == sign
      count = jnp.sum(cluster, axes, magnitude.dtype, keepdims=keep)
      if self.start == "one":
        return jnp.ones(count.shape, w.dtype)
      total = jnp.sum(jnp.where(cluster, magnitude, 0), axes, keepdims=keep)
      # An empty cluster has no mean; the largest magnitude keeps it alive.
      mean = total / jnp.maximum(count, 1)
      mean = jnp.where(count > 0, mean, jnp.max(magnitude, initial=0))
      return jnp.maximum(mean, least).astype(w.dtype)

    return {"w_n": start(-1), "w_p": start(1)}, state

  def __call__(self, w: Floats, scales: Arrays, state: Arrays) -> Floats:
    """Returns the ternary weights, with the gradients of the class."""
    # Widened, as gradients are divided by magnitudes, which may be tiny.
    w_p, w_n = widen(scales["w_p"]), widen(scales["w_n"])
    codes = self._codes(w, state).astype(w_p.dtype)
    factor = jnp.where(codes == 0, 1, jnp.abs(dense(codes, w_p, w_n)))
    return trained_scales(widen(w), codes, w_p, w_n, factor).astype(w.dtype)

  def discretize(self, w: Floats, scales: Arrays, state: Arrays) -> Ternary:
    """Returns the codes beyond the threshold and the trained magnitudes."""
    return Ternary(self._codes(w, state).astype(jnp.int8), **scales)

  def measure(
    self, w: Floats, scales: Arrays, look: Look, held: Arrays | None = None
  ) -> Arrays:
    """Returns the threshold, widened; of a sparsity what `split` finds."""
    del scales
    if self.sparsity is None:
      top = jnp.max(jnp.abs(widen(w)), initial=0)
      return {"threshold": jnp.asarray(self.threshold, top.dtype) * top}
    return self.split(w, look, held)

  def project(self, w: Floats, scales: Arrays, state: Arrays) -> Arrays:
    """Keeps the magnitudes positive."""
    del state
    least = jnp.asarray(least_scale(w.dtype), w.dtype)
    return {name: jnp.maximum(s, least) for name, s in scales.items()}

  def invert(
    self, ternary: Ternary, count: Array
  ) -> tuple[Floats, Arrays, Arrays]:
    """Returns latents at 0 and at both signs of the mean magnitude.

    The threshold of a sparsity, which must be that of these weights, is half
    that magnitude.
    """
    size = jnp.sum(jnp.abs(widen(ternary.dequantize())))
    size /= jnp.maximum(jnp.sum(ternary.codes != 0, dtype=size.dtype), 1)
    w = ternary.codes.astype(ternary.dtype) * size.astype(ternary.dtype)
    scales = {"w_n": alive(ternary.w_n), "w_p": alive(ternary.w_p)}
    if self.sparsity is None:
      return w, scales, self.state_at(w, scales, count)
    self.check_zeros(ternary.codes, count)
    return w, scales, self.halfway(size, count)

  def _codes(self, w: Array, state: Arrays) -> Array:
    if self.sparsity is not None:
      return self.codes(w, state)
    beyond = jnp.abs(widen(w)) > state["threshold"]
    return jnp.where(beyond, jnp.sign(w), jnp.zeros((), w.dtype))
