"""Ternary weights back to latents, scales and state, leaf by leaf."""

import jax
import jax.numpy as jnp

from tern_jax.core.checks import check_weights, concrete
from tern_jax.core.containers import Ternary
from tern_jax.core.types import Array, Arrays, PyTree, Shaped
from tern_jax.trees.leaf import Leaf


def invert(
  leaf: Leaf, ternary: Ternary, count: Array, owner: object
) -> tuple[Array, Arrays, Arrays]:
  """Returns latents, scales and state that `discretize` maps to these weights.

  Raises a ValueError, which names the owner, where a magnitude is not positive,
  the scales are finer than the method's, or it has no latents for these codes.
  """
  w, path = ternary.dequantize(), leaf.path
  check_weights(path, w)
  if concrete(w) and jnp.any(jnp.sign(w).astype(jnp.int8) != ternary.codes):
    raise ValueError(
      f"{path}: magnitudes must be positive where weights have them, got"
      f" {jnp.min(ternary.w_p):.6g} and {jnp.min(ternary.w_n):.6g} at the"
      " least: such weights can be deployed, but not trained."
    )
  latent, scales, state = leaf.invert(_fit(leaf, ternary, owner), count)
  axes = tuple(range(leaf.is_stack, w.ndim))
  share = jnp.sum(ternary.codes == 0, axes, jnp.int32)
  fresh = leaf(
    lambda method, *args: method.refresh(*args),
    *(latent, scales, state),
    share=share,
  )
  codes = leaf(
    lambda method, *args: method.discretize(*args), latent, *fresh
  ).codes
  if concrete(codes) and jnp.any(codes != ternary.codes):
    raise ValueError(
      f"{path}: {leaf.method!r} has no latents for these codes, of which"
      f" {jnp.sum(ternary.codes == 0)} of {codes.size} are zero: take other"
      " hyper-parameters, or another method."
    )
  return latent, scales, state


def _fit(leaf: Leaf, ternary: Ternary, owner: object) -> Ternary:
  """Gives the scales the shape in which the method makes them."""

  def blank(w: Array) -> Ternary:
    return leaf(
      lambda method, w: method.discretize(method.latent(w), *method.init(w)), w
    )

  made = jax.eval_shape(blank, dense_shape(ternary)).w_p.shape
  ones = (1,) * (len(ternary.shape) - len(made)) if made else ()

  def fit(scale: Array) -> Array:
    if scale.size == 1:
      scale = scale.reshape(())
    try:
      return jnp.broadcast_to(scale, made + ones).reshape(made)
    except ValueError as error:
      raise ValueError(
        f"{leaf.path}: scales of shape {scale.shape} do not fit those of"
        f" {owner!r}, which are of shape {made + ones}: set channel_axis,"
        " group_size and stacked as in the training."
      ) from error

  return Ternary(ternary.codes, fit(ternary.w_p), fit(ternary.w_n))


def is_ternary(node: object) -> bool:
  """Whether a node of a tree is a `Ternary`."""
  return isinstance(node, Ternary)


def dense_shape(leaf: PyTree) -> PyTree:
  """Returns the shape and dtype of the dense weights that a leaf stands for."""
  if isinstance(leaf, Ternary):
    return Shaped(leaf.shape, leaf.dtype)
  return leaf
