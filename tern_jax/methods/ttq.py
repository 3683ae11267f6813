"""TTQ: trained ternary quantization."""

import dataclasses
from typing import Literal

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
from tern_jax.estimators import scaled_straight_through


@dataclasses.dataclass(frozen=True, repr=False)
class TTQ(Ternarizer):
  """Ternary weights with two trained magnitudes, w_p and w_n.

  The code is `sign(w) 1[|w| > threshold * max|w|]`. The magnitudes learn by
  their true gradients, `dL/dw_p = sum of g over +1`, `dL/dw_n = -(sum of g
  over -1)`; the latents get g times the magnitude of their cluster, 1 at 0.

  Args:
    threshold: in units of max|w|, in [0, 1).
    start: where the magnitudes start: the "means" of their clusters, or at
      "one" as published.
    channel_axis: None for two magnitudes a tensor; else two for each index of
      this axis, -1 for the output channels of Flax and Haiku, 0 for
      Equinox's. The threshold is always that of the whole tensor.

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
  can be continued (`start="one"` undoes it), and stay positive.
  """

  threshold: float = 0.05
  start: Literal["means", "one"] = "means"
  channel_axis: int | None = None

  def __post_init__(self):
    check_range("threshold", self.threshold, 0, 1, "try 0.05")
    if self.start not in ("means", "one"):
      raise ValueError(
        f'start must be "means" or "one", got {self.start!r}: "one" is the'
        " published initialization."
      )

  def init(self, w: Array) -> tuple[Arrays, Arrays]:
    """Returns the two magnitudes, and no state."""
    axes = reduced_axes(w, self.channel_axis)
    keep = axes is not None
    codes = self._codes(w)
    magnitude = jnp.abs(widen(w))

    def start(sign: int) -> Array:
      cluster = codes == sign
      count = jnp.sum(cluster, axes, magnitude.dtype, keepdims=keep)
      if self.start == "one":
        return jnp.ones(count.shape, w.dtype)
      total = jnp.sum(jnp.where(cluster, magnitude, 0), axes, keepdims=keep)
      # An empty cluster has no mean; the largest magnitude keeps it alive.
      fallback = jnp.maximum(jnp.max(magnitude), float(jnp.finfo(w.dtype).tiny))
      mean = total / jnp.maximum(count, 1)
      return jnp.where(count > 0, mean, fallback).astype(w.dtype)

    return {"w_n": start(-1), "w_p": start(1)}, {}

  def __call__(self, w: Array, scales: Arrays, state: Arrays) -> Array:
    """Returns the ternary weights, with the gradients of the class."""
    del state
    codes = self._codes(w)
    hard = dense(codes, scales["w_p"], scales["w_n"])
    factor = jnp.where(codes == 0, jnp.ones((), w.dtype), jnp.abs(hard))
    return scaled_straight_through(w, hard, factor)

  def discretize(self, w: Array, scales: Arrays, state: Arrays) -> Ternary:
    """Returns the codes beyond the threshold and the trained magnitudes."""
    del state
    codes = self._codes(w).astype(jnp.int8)
    return Ternary(codes, w_p=scales["w_p"], w_n=scales["w_n"])

  def after_step(
    self, w: Array, scales: Arrays, state: Arrays
  ) -> tuple[Arrays, Arrays]:
    """Keeps the magnitudes positive."""
    tiny = jnp.asarray(jnp.finfo(w.dtype).tiny, w.dtype)
    return {name: jnp.maximum(s, tiny) for name, s in scales.items()}, state

  def _codes(self, w: Array) -> Array:
    magnitude = jnp.abs(widen(w))
    delta = jnp.asarray(self.threshold, magnitude.dtype) * jnp.max(magnitude)
    return jnp.where(magnitude > delta, jnp.sign(w), jnp.zeros((), w.dtype))
