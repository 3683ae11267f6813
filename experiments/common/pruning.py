"""Magnitude pruning of float weights, the reference of ternary ones."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax import Array

import tern_jax
from tern_jax.core.estimators import straight_through
from tern_jax.targets.targeted import Look

#: Of a method's scales and state.
Arrays = dict[str, Array]


@dataclasses.dataclass(frozen=True, repr=False)
class Pruned(tern_jax.Targeted):
  """Gradual magnitude pruning: `w 1[|w| > Delta]`, at an asked sparsity.

  What is discretized has float magnitudes, one for each weight.

  Args:
    sparsity: share of zeros, a number, traced array or schedule; or
      `across_layers`.
    every: steps between two updates of Delta.
    dense: whether the gradient passes to all weights, straight through, so that
      those that are zero can come back; else only to the others, as published.

  >>> w = jnp.array([[0.1, -0.2], [0.3, -0.4]])
  >>> method = Pruned(0.5)
  >>> method.discretize(w, *method.init(w)).dequantize().round(1).tolist()
  [[0.0, 0.0], [0.30000001192092896, -0.4000000059604645]]

  Source: Zhu & Gupta, arXiv 1710.01878. Differs from the paper: Delta is found
  anew every 10 steps, not every 100, and to the end of the training.
  """

  sparsity: Any
  every: int = 10
  dense: bool = False

  def init(self, w: Array) -> tuple[Arrays, Arrays]:
    """Returns no scales, and Delta as state."""
    return {}, self.state_at(w, {})

  def __call__(self, w: Array, scales: Arrays, state: Arrays) -> Array:
    """Returns the weights beyond Delta, else 0."""
    del scales
    kept = jnp.where(self.beyond(w, state), w, jnp.zeros((), w.dtype))
    return straight_through(w, kept) if self.dense else kept

  def discretize(
    self, w: Array, scales: Arrays, state: Arrays
  ) -> tern_jax.Ternary:
    """Returns the same weights: their signs, and all their magnitudes."""
    del scales
    size = jnp.abs(w)
    codes = self.codes(w, state).astype(jnp.int8)
    return tern_jax.Ternary(codes, w_p=size, w_n=size)

  def measure(
    self, w: Array, scales: Arrays, look: Look, held: Arrays | None = None
  ) -> Arrays:
    """Returns Delta, as "threshold", and its cut."""
    del scales
    return self.split(w, look, held)
