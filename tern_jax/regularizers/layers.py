"""Functions of one layer, applied to leaves that may be stacks of them."""

from collections.abc import Callable, Sequence

import jax

from tern_jax.core.paths import matches_any, path_str
from tern_jax.core.types import Array, KeyPath


def stack_axes(stacked: Sequence[str], path: KeyPath) -> int:
  """Returns how many axes of a leaf enumerate layers: 1 or 0."""
  return int(matches_any(stacked, path_str(path)))


def lift(
  stacked: Sequence[str],
  path: KeyPath,
  fn: Callable[..., Array],
  in_axes: int | tuple[int | None, ...] = 0,
) -> Callable[..., Array]:
  """Returns a function of one layer as one of the leaf at a path."""
  return jax.vmap(fn, in_axes) if stack_axes(stacked, path) else fn
