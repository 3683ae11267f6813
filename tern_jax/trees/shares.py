"""A target across layers, divided: how many weights of each layer are zero."""

from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp

from tern_jax.core.numerics import either
from tern_jax.core.paths import matches_any
from tern_jax.core.types import Array, Scalar
from tern_jax.targets.quantile import beyond, count_rows, equals, search
from tern_jax.targets.schedules import AcrossLayers, look_at, zeros_at


def shares_at(
  target: AcrossLayers,
  leaves: Mapping[str, Array],
  stacked: Sequence[str],
  count: Array,
  tolerance: Scalar = 0.0,
) -> dict[str, Array]:
  """Returns {path: number of zeros under one threshold for all leaves}, int32.

  Of a stacked leaf it is one number for each layer. They add up to what is
  asked for: of magnitudes that equal the threshold, those of the first layers,
  in the order of the tree, are zero.
  """
  n = sum(w.size for w in leaves.values())
  asked = zeros_at(target.sparsity, count, n)
  found = search(tuple(leaves.values()), asked, tolerance=tolerance)
  under = _counts(leaves, stacked, lambda w: ~beyond(w, found.threshold))

  def divide() -> dict[str, Array]:
    ties = _counts(leaves, stacked, lambda w: equals(w, found.threshold))
    fewer = jax.tree.map(jnp.subtract, under, ties)
    rest = asked - _total(fewer)
    zeros = {}
    # In the order of the tree, in which dicts of a transformation are not.
    for path in leaves:
      before = jnp.cumsum(ties[path].ravel()).reshape(ties[path].shape)
      before -= ties[path]
      zeros[path] = fewer[path] + jnp.clip(rest - before, 0, ties[path])
      rest -= jnp.sum(ties[path], dtype=jnp.int32)
    return zeros

  return either(found.is_split, divide, lambda: under)


def _counts(
  leaves: Mapping[str, Array],
  stacked: Sequence[str],
  which: Callable[[Array], Array],
) -> dict[str, Array]:
  """Returns {path: number of a leaf's weights}, of each layer of a stack."""
  counts = {}
  for path, w in leaves.items():
    is_stack = matches_any(stacked, path)
    chosen = which(w)
    if chosen.ndim == is_stack:
      chosen = chosen[..., None]
    rows = count_rows(chosen)
    counts[path] = jnp.sum(rows, tuple(range(is_stack, rows.ndim)), jnp.int32)
  return counts


def _total(counts: Mapping[str, Array]) -> Array:
  return sum(
    (jnp.sum(c, dtype=jnp.int32) for c in counts.values()), jnp.int32(0)
  )


def shares_if_due(
  target: AcrossLayers,
  leaves: Mapping[str, Array],
  stacked: Sequence[str],
  count: Array,
  every: Array | int,
) -> dict[str, Array]:
  """Returns the numbers of a step, zeros where no method measures."""
  due, tolerance = look_at(every, target.sparsity, count)

  def divide() -> dict[str, Array]:
    return shares_at(target, leaves, stacked, count, tolerance)

  def zeros() -> dict[str, Array]:
    return jax.tree.map(jnp.zeros_like, jax.eval_shape(divide))

  return either(due, divide, zeros)
