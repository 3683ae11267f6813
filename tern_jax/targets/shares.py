"""A target across layers, divided: how many weights of each layer are zero."""

import math
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp

from tern_jax.core.numerics import either
from tern_jax.core.paths import matches_any
from tern_jax.core.types import Array, Scalar
from tern_jax.targets.quantile import beyond, count_parts, equals, search
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
  in the order of the tree, are zero. No layer has more than `floor` leaves it.
  """
  n = sum(w.size for w in leaves.values())
  asked = zeros_at(target.sparsity, count, n)
  most = None
  if target.floor:
    most = _most(leaves, stacked, n - asked, target.floor)

  def counts(which: Callable[[Array], Array]) -> dict[str, Array]:
    found = {
      k: count_parts(which(w), _axes(k, stacked)) for k, w in leaves.items()
    }
    return found if most is None else jax.tree.map(jnp.minimum, found, most)

  bounds = None if most is None else tuple(most[path] for path in leaves)
  found = search(tuple(leaves.values()), asked, None, tolerance, bounds)
  under = counts(lambda w: ~beyond(w, found.threshold))

  def divide() -> dict[str, Array]:
    fewer = counts(
      lambda w: ~beyond(w, found.threshold) & ~equals(w, found.threshold)
    )
    ties = jax.tree.map(jnp.subtract, under, fewer)
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


def _most(
  leaves: Mapping[str, Array],
  stacked: Sequence[str],
  nonzeros: Array,
  floor: float,
) -> dict[str, Array]:
  """Returns how many weights of each layer may be zero, given all nonzeros."""
  axes = {path: _axes(path, stacked) for path in leaves}
  layers = {k: w.shape[: axes[k]] for k, w in leaves.items()}
  shapes = {k: w.shape[axes[k] :] for k, w in leaves.items()}
  sizes = {k: math.prod(shape) for k, shape in shapes.items()}
  # A layer has min(size, scale * weight) nonzeros, for one scale of all layers.
  weights = {k: max(sum(shape), 1) for k, shape in shapes.items()}
  # The scales that fill a layer, and all nonzeros there; between, it is linear.
  scales = [0.0, *sorted(sizes[k] / weights[k] for k in leaves)]
  totals = [
    sum(
      math.prod(layers[k]) * min(sizes[k], scale * weights[k]) for k in leaves
    )
    for scale in scales
  ]
  scale = jnp.interp(
    nonzeros.astype(jnp.float32),
    jnp.array(totals, jnp.float32),
    jnp.array(scales, jnp.float32),
  )
  floor *= 1 - 1e-5  # In float32, floors must not add up to more than there is.
  return {
    k: jnp.broadcast_to(
      sizes[k]
      - (floor * jnp.minimum(scale * weights[k], sizes[k])).astype(jnp.int32),
      layers[k],
    )
    for k in leaves
  }


def _axes(path: str, stacked: Sequence[str]) -> int:
  """Returns how many first axes of a leaf enumerate layers."""
  return int(matches_any(stacked, path))


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
