"""The containers that flow through the package, and dense weights of codes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from tern_jax.core.types import Array, PyTree


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Ternary:
  """Ternary weights: codes in {-1, 0, +1} and their two magnitudes.

  The dense weight is `w_p` where the code is +1, `-w_n` where it is -1 and 0
  elsewhere. The granularity is the scales' shape: 0-d for one scale a tensor;
  else the rank of `codes` with axis lengths that divide those of `codes`: 1 for
  one scale along the axis, n / g for one for each g consecutive weights.

  Args:
    codes: int8, any shape, values in {-1, 0, 1}.
    w_p: float, magnitude of the +1 weights.
    w_n: float, magnitude of the -1 weights, of the dtype of w_p.

  >>> t = Ternary(jnp.array([1, 0, -1], jnp.int8), jnp.array(2.), jnp.array(3.))
  >>> t.dequantize().tolist()
  [2.0, 0.0, -3.0]
  >>> groups = jnp.array([2., 5.])
  >>> Ternary(jnp.ones(4, jnp.int8), groups, groups).dequantize().tolist()
  [2.0, 2.0, 5.0, 5.0]
  """

  codes: Array
  w_p: Array
  w_n: Array

  @property
  def shape(self) -> tuple[int, ...]:
    """Shape of the weights."""
    return self.codes.shape

  @property
  def dtype(self) -> np.dtype:
    """Dtype of the dense weights."""
    return self.w_p.dtype

  def dequantize(self) -> Array:
    """Returns the dense weights, of the shape of codes and dtype of w_p."""
    return dense(self.codes, self.w_p, self.w_n)


def dense(codes: Array, w_p: Array, w_n: Array) -> Array:
  """Returns w_p where a code is +1, -w_n where it is -1, 0 elsewhere.

  Of the shape of the codes, int8 or float, and the dtype of the magnitudes,
  which have a granularity of `Ternary`.
  """
  # Codes are compared in float: XLA:CPU miscompiles some fused int8 maths.
  c = codes.astype(w_p.dtype)
  w_p, w_n = (_repeat(s, codes.shape) for s in (w_p, w_n))
  zero = jnp.zeros((), w_p.dtype)
  return jnp.where(c > 0, w_p, jnp.where(c < 0, -w_n, zero))


def _repeat(scale: Array, shape: tuple[int, ...]) -> Array:
  """Makes a scale of any granularity broadcastable to the shape of weights."""
  for axis in range(-scale.ndim, 0):
    n, size = scale.shape[axis], shape[axis]
    if n not in (1, size):
      scale = jnp.repeat(scale, size // n, axis)
  return scale


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TernParams:
  """What the optimizer trains: latent weights and, beside them, their scales.

  Args:
    latent: the user's own parameter tree, of the user's own structure.
    scales: `{path: {name: array}}` for the ternarized leaves.
  """

  latent: PyTree
  scales: PyTree

  def replace(self, **changes: PyTree) -> "TernParams":
    """Returns a copy with the named fields replaced."""
    return dataclasses.replace(self, **changes)


#: Prefix tree of labels for `optax.partition`: {"latent": tx, "scales": tx}.
LABELS = TernParams(latent="latent", scales="scales")
