"""What `wrap` keeps in the state of an optimizer."""

import dataclasses
from typing import Any, NamedTuple

import jax
from jax.typing import DTypeLike

from tern_jax.core.containers import TernParams
from tern_jax.core.interop import serializable
from tern_jax.core.types import Array, PyTree, State


@serializable
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Dtypes:
  """The script's dtypes by path, where latents are wider: no part of a tree."""

  items: tuple[tuple[str, str], ...] = dataclasses.field(
    default=(), metadata={"static": True}
  )

  def of(self, path: str, default: DTypeLike) -> DTypeLike:
    """Returns the dtype of a leaf, the default where none is held."""
    return dict(self.items).get(path, default)


@serializable
class WrapState(NamedTuple):
  """State of `wrap`: the training by hand, kept by the optimizer.

  `tern(state.params, state.state)` are the weights that the script holds.
  """

  count: Array
  """Updates done, int32, 0-d."""
  params: TernParams
  """Latents and their scales."""
  state: State
  """Of the method."""
  inner: Any
  """Of the wrapped optimizer, and of WDR before it."""
  average: TernParams | None
  """The moving average of `params`, None without `ema`."""
  strayed: Array
  """Looks at which the script's weights were not those of `params`, int32."""
  dtypes: Dtypes
  """The script's, of weights whose latents are wider."""


def find(tree: PyTree) -> list[WrapState]:
  """Returns the states of `wrap` that any optimizer's state holds."""

  def is_wrap(node: object) -> bool:
    return isinstance(node, WrapState)

  found = [x for x in jax.tree.leaves(tree, is_leaf=is_wrap) if is_wrap(x)]
  return [jax.tree.map(_value, x, is_leaf=_is_variable) for x in found]


def _is_variable(node: object) -> bool:
  # Flax's nnx.Optimizer has each array in a variable, and Flax is not loaded.
  return hasattr(node, "get_value") and hasattr(node, "get_metadata")


def _value(node: Any) -> PyTree:
  return node.get_value() if _is_variable(node) else node
