"""A target across layers, divided: which share of each layer is zero."""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp

from tern_jax.core.paths import matches_any
from tern_jax.core.types import Array, Scalar
from tern_jax.targets.quantile import magnitude_threshold
from tern_jax.targets.schedules import AcrossLayers, at, look_at


def shares_at(
  target: AcrossLayers,
  leaves: Mapping[str, Array],
  stacked: Sequence[str],
  count: Array,
  tolerance: Scalar = 0.0,
) -> dict[str, Array]:
  """Returns {path: share of zeros under one threshold for all leaves}.

  Of a stacked leaf it is one share for each layer.
  """
  asked = at(target.sparsity, count)
  threshold = magnitude_threshold(leaves.values(), asked, tolerance=tolerance)

  def share(path: str, w: Array) -> Array:
    axes = tuple(range(matches_any(stacked, path), w.ndim))
    under = jnp.abs(w.astype(jnp.float32)) <= threshold
    return jnp.mean(under, axes, jnp.float32)

  return {path: share(path, w) for path, w in leaves.items()}


def shares_if_due(
  target: AcrossLayers,
  leaves: Mapping[str, Array],
  stacked: Sequence[str],
  count: Array,
  every: Array | int,
) -> dict[str, Array]:
  """Returns the shares of a step, zeros where no method measures."""
  due, tolerance = look_at(every, target.sparsity, count)

  def divide() -> dict[str, Array]:
    return shares_at(target, leaves, stacked, count, tolerance)

  def zeros() -> dict[str, Array]:
    return jax.tree.map(jnp.zeros_like, jax.eval_shape(divide))

  return jax.lax.cond(due, divide, zeros)
