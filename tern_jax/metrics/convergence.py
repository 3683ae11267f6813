"""How far continuous weights have come to their codes.

Of weights w, float, of any shape, and of what they are rounded to; results are
float32 or wider, 0-d, in the unit of w.
"""

import jax
import jax.numpy as jnp

from tern_jax.core.containers import Ternary
from tern_jax.core.numerics import widen
from tern_jax.core.paths import path_str
from tern_jax.core.types import Array, PyTree
from tern_jax.metrics.codes import (
  entropy,
  flip_rate,
  same_leaves,
  sparsity,
  ternary_leaves,
)


def barrier(w: Array, ternary: Ternary) -> Array:
  """Largest magnitude among the weights that are zero once rounded.

  Where a layer has one threshold, the least upper bound of what lies below it,
  whatever the method: no weight lies between the two. 0 if no weight is zero.

  >>> one = jnp.ones(())
  >>> codes = Ternary(jnp.array([1, 0, 0, -1], jnp.int8), one, one)
  >>> float(barrier(jnp.array([0.75, 0.25, -0.5, -1.0]), codes))
  0.5
  """
  size = jnp.abs(widen(w))
  return jnp.max(size, where=_codes(ternary, size) == 0, initial=0)


def converged(w: Array, ternary: Ternary, within: float = 0.05) -> Array:
  """Share of the weights that lie within a distance of their codes.

  Weights are in the unit of the codes, as for `diagnose`.

  >>> one = jnp.ones(())
  >>> codes = Ternary(jnp.array([1, 0, 0, -1], jnp.int8), one, one)
  >>> float(converged(jnp.array([0.75, 0.0, -0.5, -1.01]), codes))
  0.5
  """
  w = widen(w)
  near = jnp.abs(w - _codes(ternary, w)) <= within
  return jnp.mean(near, dtype=w.dtype)


def zeros_rms(w: Array, ternary: Ternary) -> Array:
  """Root mean square of the weights that are zero once rounded.

  The signal that rounding takes away: 0 for converged weights.

  >>> one = jnp.ones(())
  >>> codes = Ternary(jnp.array([1, 0, 0, -1], jnp.int8), one, one)
  >>> float(zeros_rms(jnp.array([0.75, 3.0, -4.0, -1.0]), codes) ** 2)
  12.5
  """
  w = widen(w)
  zero = _codes(ternary, w) == 0
  count = jnp.maximum(jnp.sum(zero, dtype=w.dtype), 1)
  return jnp.sqrt(jnp.sum(jnp.square(w), where=zero) / count)


def diagnose(
  weights: PyTree, ternary: PyTree, before: PyTree = None
) -> dict[str, dict[str, Array]]:
  """How the weights of each layer come to their codes; pure, to be jitted.

  The continuous weights are in the unit of the codes, where rounded weights
  are -1, 0 and 1: `tanh(Theta)` for SCA; for the others, whose latents need
  not come to rest there, latents over the magnitude of the ternary weights.

  Args:
    weights: a tree with the structure of ternary, or {path: array}, in the unit
      of the codes; float where ternary has a ternary leaf.
    ternary: what they are rounded to, from `ParamTransform.discretize`.
    before: the same some steps earlier; None leaves out the flip rate.

  Returns:
    {path: {"sparsity", "entropy", "barrier", "converged", "zeros_rms",
    "flip_rate"}}, each of the function of that name, 0-d.

  Raises:
    ValueError: a ternary leaf has no continuous weights, or `before` holds
      other leaves.

  >>> one = jnp.ones(())
  >>> codes = Ternary(jnp.array([1, 0, 0, -1], jnp.int8), one, one)
  >>> theta = jnp.array([20.0, 0.0, -0.5, -2.0])
  >>> layer = diagnose({"w": jnp.tanh(theta)}, {"w": codes})["w"]
  >>> {name: round(float(value), 3) for name, value in layer.items()}
  {'sparsity': 0.5, 'entropy': 1.5, 'barrier': 0.462, 'converged': 0.75, \
'zeros_rms': 0.327}
  """
  leaves = ternary_leaves(ternary)
  old = {} if before is None else same_leaves(before, ternary)
  found = {
    path_str(path): w
    for path, w in jax.tree_util.tree_leaves_with_path(weights)
  }
  if missing := leaves.keys() - found.keys():
    raise ValueError(
      f"No continuous weights for {', '.join(sorted(missing))}: give a tree of"
      " the same structure, such as jax.tree.map(jnp.tanh, params.latent)."
    )

  def layer(path: str, leaf: Ternary) -> dict[str, Array]:
    w = found[path]
    measured = {
      "sparsity": sparsity(leaf),
      "entropy": entropy(leaf),
      "barrier": barrier(w, leaf),
      "converged": converged(w, leaf),
      "zeros_rms": zeros_rms(w, leaf),
    }
    if old:
      measured["flip_rate"] = flip_rate(old[path], leaf)
    return measured

  return {path: layer(path, leaf) for path, leaf in leaves.items()}


def _codes(ternary: Ternary, like: Array) -> Array:
  """Returns codes in the dtype of the weights that they are compared with."""
  return ternary.codes.astype(like.dtype)
