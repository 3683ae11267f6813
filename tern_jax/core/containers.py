"""The containers that flow through the package, and dense weights of codes."""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from tern_jax.core.interop import serializable
from tern_jax.core.printing import tree_str, weights_repr
from tern_jax.core.types import Array, PyTree


@serializable
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class Ternary:
  """Ternary weights: codes in {-1, 0, +1} and their two magnitudes.

  The dense weight is `w_p` where the code is +1, `-w_n` where it is -1 and 0
  elsewhere. The granularity is the scales' shape: 0-d for one scale a tensor;
  else the rank of `codes` with axis lengths that divide those of `codes`: 1 for
  one scale along the axis, n / g for one for each g consecutive weights. Scales
  of fewer axes belong to the leading ones if these are as long, as they are
  after `jax.vmap` or a stack of layers, and else to the trailing ones.

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

  def __repr__(self) -> str:
    """Prints what the weights are on one line, and none of their values."""
    arrays = {"codes": self.codes, "w_p": self.w_p, "w_n": self.w_n}
    shape = getattr(self.codes, "shape", ())
    return weights_repr("Ternary", shape, arrays, np.count_nonzero)


def dense(codes: Array, w_p: Array, w_n: Array) -> Array:
  """Returns w_p where a code is +1, -w_n where it is -1, 0 elsewhere.

  Of the shape of the codes, int8 or float, and the dtype of the magnitudes,
  which have a granularity of `Ternary`.
  """
  # Codes are compared in float: XLA:CPU miscompiles some fused int8 maths.
  c = codes.astype(w_p.dtype)
  w_p, w_n = (_repeat(aligned(s, codes.shape), codes.shape) for s in (w_p, w_n))
  zero = jnp.zeros((), w_p.dtype)
  return jnp.where(c > 0, w_p, jnp.where(c < 0, -w_n, zero))


def aligned(scale: Array, shape: tuple[int, ...]) -> Array:
  """Gives scales of the leading axes of weights the rank of the weights.

  Raises:
    ValueError: they may as well be scales of the trailing axes.

  >>> aligned(jnp.ones(4), (4, 16, 16)).shape
  (4, 1, 1)
  """
  ndim, missing = scale.ndim, len(shape) - scale.ndim
  if not ndim or missing <= 0 or scale.shape != shape[:ndim]:
    return scale
  ones = (1,) * missing
  if scale.shape == shape[missing:] and scale.size != 1:
    raise ValueError(
      f"scales of shape {scale.shape} fit both the first and the last axes of"
      f" weights of shape {shape}: reshape them to {(*scale.shape, *ones)} or"
      f" to {(*ones, *scale.shape)}, or call this under jax.vmap."
    )
  return scale.reshape((*scale.shape, *ones))


def own(x: Array) -> Array:
  """Returns an array in a buffer of its own, so that it can be donated."""
  return jnp.copy(x) if isinstance(x, jax.Array) else x


def _repeat(scale: Array, shape: tuple[int, ...]) -> Array:
  """Makes a scale of any granularity broadcastable to the shape of weights."""
  for axis in range(-scale.ndim, 0):
    n, size = scale.shape[axis], shape[axis]
    if n not in (1, size):
      scale = jnp.repeat(scale, size // n, axis)
  return scale


@serializable
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class TernParams:
  """What the optimizer trains: latent weights and, beside them, their scales.

  Where a tree of labels or of bools is asked for, beside the parameters, give
  it for the latents, and one value for all scales:

  >>> import optax
  >>> params = TernParams(
  ...   latent={"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)},
  ...   scales={"kernel": {"scale": jnp.ones(())}},
  ... )
  >>> labels = {"kernel": "slow", "bias": "fast"}
  >>> tx = optax.multi_transform(
  ...   {"slow": optax.sgd(0.25), "fast": optax.sgd(1.0)},
  ...   TernParams(latent=labels, scales="fast"),
  ... )
  >>> updates, _ = tx.update(params, tx.init(params))
  >>> updates.latent["bias"].tolist(), updates.latent["kernel"][0].tolist()
  ([-1.0, -1.0], [-0.25, -0.25])
  >>> decayed = {"kernel": True, "bias": False}
  >>> mask = TernParams(latent=decayed, scales=False)
  >>> tx = optax.adamw(1e-3, mask=mask)

  Args:
    latent: the user's own parameter tree, of the user's own structure.
    scales: `{path: {name: array}}` for the ternarized leaves.
  """

  latent: PyTree
  scales: PyTree

  def replace(self, **changes: PyTree) -> "TernParams":
    """Returns a copy with the named fields replaced."""
    return dataclasses.replace(self, **changes)

  def __contains__(self, name: object) -> bool:
    """Whether the latents have a collection of this name.

    Flax's TrainState asks for "_overwrite_with_gradient".
    """
    return isinstance(self.latent, Mapping) and name in self.latent

  def __getitem__(self, name: object) -> PyTree:
    """Raises a TypeError: the latents are a field.

    Flax's TrainState would take collections apart, and lose the scales.
    """
    raise TypeError(
      f"TernParams has no item {name!r}: use params.latent[{name!r}]. If this"
      " is Flax's TrainState and there are parameters to be overwritten with"
      " their gradient, make only the others ternary: params, state ="
      " tern.init(variables['params']), and give it {'params': params,"
      " '_overwrite_with_gradient': variables['_overwrite_with_gradient']}."
    )

  def __repr__(self) -> str:
    """Prints how many values there are, and none of them."""
    fields = (("latent", self.latent), ("scales", self.scales))
    shown = (f"{name}={tree_str(tree)}" for name, tree in fields)
    return f"TernParams({', '.join(shown)})"


#: Prefix tree of labels for `optax.partition`: {"latent": tx, "scales": tx}.
LABELS = TernParams(latent="latent", scales="scales")
