"""Which leaves `wdr_transform` sees, and in which form.

A model may hold functions and None beside its arrays, and Flax puts arrays of
which it knows a sharding into boxes. Here trees become plain: None where there
is no array, no boxes, `optax.MaskedNode` where a leaf is not selected.
"""

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax

from tern_jax.core.checks import concrete
from tern_jax.core.containers import TernParams
from tern_jax.core.paths import path_str
from tern_jax.core.select import selector
from tern_jax.core.selection import is_partial
from tern_jax.core.types import PyTree

#: A tree of bools, or a function to one from parameters, or to a bool from the
#: printed path of a leaf and the leaf.
Where = PyTree | Callable[..., Any]

_HOW = (
  "give tern_jax.kernels(...), a function of (path, leaf) to a bool, a function"
  " of the parameters to a tree of bools, or such a tree"
)


@dataclasses.dataclass(frozen=True)
class Held:
  """A callable mask on its way through `optax.inject_hyperparams`."""

  where: Callable


class _Signature(inspect.Signature):
  """A signature that hides masks from `optax.inject_hyperparams`.

  It binds the arguments of what it wraps, takes every callable among them for a
  schedule, and would call a mask with the step.
  """

  def bind(self, *args: Any, **kwargs: Any) -> inspect.BoundArguments:
    bound = super().bind(*args, **kwargs)
    for name in ("where", "mask"):
      if callable(where := bound.arguments.get(name)):
        bound.arguments[name] = Held(where)
    return bound


_Function = TypeVar("_Function", bound=Callable)


def hides_masks(fn: _Function) -> _Function:
  """Lets `optax.inject_hyperparams` pass masks to a function as they are."""
  vars(fn)["__signature__"] = _Signature.from_callable(fn)
  return fn


def one_of(where: Where | Held | None, mask: Where | Held | None) -> Where:
  """Returns what users gave as where, or by optax's name for it, as mask.

  Raises:
    ValueError: both are given.
    TypeError: it is nothing that selects leaves.
  """
  if where is not None and mask is not None:
    raise ValueError(
      f"wdr_transform got where={where!r} and mask={mask!r}, which mean the"
      " same: give one of them."
    )
  name, given = ("mask", mask) if where is None else ("where", where)
  if isinstance(given, Held):
    given = given.where
  if isinstance(given, type):
    raise TypeError(
      f"{name} is the class {given.__name__} itself: call it, as in"
      f" {name}=tern_jax.kernels()."
    )
  if isinstance(given, str):
    raise TypeError(
      f"{name} is the string {given!r}: give a selection, as in"
      f" {name}=tern_jax.kernels(include={given!r}), which takes matrices on"
      " whose path that name is."
    )
  if given is not None and not callable(given):
    _check_bools(name, given)
  return given


def plain(params: PyTree, where: Where) -> tuple[PyTree, PyTree]:
  """Returns a tree of bools, and the parameters that it selects.

  Raises:
    TypeError: where returns no bools.
  """
  arrays = jax.tree.map(_array_or_none, unboxed(params))
  if not jax.tree.leaves(arrays):
    # Nothing to choose from, as in optax.tree_map_params.
    return arrays, arrays
  mask = unboxed(_mask_of(where, arrays))
  return mask, select(mask, arrays)


def select(mask: PyTree, tree: PyTree) -> PyTree:
  """Returns a plain tree of what a mask, or a prefix of one, selects."""
  return jax.tree.map(lambda m, x: x if m else optax.MaskedNode(), mask, tree)


def merge(mask: PyTree, new: PyTree, old: PyTree) -> PyTree:
  """Returns the old tree, boxes and all, with what is new where selected."""
  leaves = jax.tree.map(lambda m, x, y: x if m else y, mask, new, unboxed(old))
  return jax.tree.unflatten(jax.tree.structure(old), jax.tree.leaves(leaves))


def unboxed(tree: PyTree) -> PyTree:
  """Returns a tree without the boxes in which Flax keeps how to shard arrays.

  They would give the sharding of a kernel to whatever is made of it by
  `jax.tree.map`, a 0-d threshold for instance.
  """

  def inside(x: PyTree) -> PyTree:
    if not _is_box(x):
      return x
    (value,) = jax.tree.leaves(x, is_leaf=lambda y: y is not x)
    return value

  return jax.tree.map(inside, tree, is_leaf=_is_box)


def _is_box(x: PyTree) -> bool:
  # Told by what they can do, as Flax need not be there: boxes of Linen, and
  # NNX variables of which a sharding is known. Other variables stay, so that
  # states which were saved with them can be restored.
  if hasattr(x, "unbox") and hasattr(x, "replace_boxed"):
    return True
  if hasattr(x, "get_metadata") and hasattr(x, "get_value"):
    return x.get_metadata().get("out_sharding") is not None
  return False


def _array_or_none(x: Any) -> Any:
  """Returns numeric arrays, and None in place of functions, keys and so on."""
  is_numeric = hasattr(x, "shape") and hasattr(x, "dtype")
  return x if is_numeric and jnp.issubdtype(x.dtype, np.number) else None


def _mask_of(where: Where, arrays: PyTree) -> PyTree:
  if where is None:
    return jax.tree.map(lambda _: True, arrays)
  if not callable(where):
    mask = where
    if isinstance(arrays, TernParams) and not isinstance(mask, TernParams):
      mask = TernParams(latent=mask, scales=False)
  elif _takes_two(where):
    mask = selector(where)(arrays)
  else:
    mask = where(arrays)
  _check_bools(f"what {where!r} returns", mask)
  # Where a part is hidden, by optax.multi_transform, all may lie in there.
  if not any(jax.tree.leaves(mask)) and not is_partial(arrays):
    leaves = jax.tree_util.tree_leaves_with_path(arrays)
    raise ValueError(
      f"{where!r} selects no leaf, and WDR would do nothing. The leaves are:"
      f" {', '.join(path_str(path) for path, _ in leaves)}."
    )
  return mask


def _takes_two(where: Callable) -> bool:
  try:
    inspect.signature(where).bind(None, None)
  except (TypeError, ValueError):
    return False
  return True


def _check_bools(name: str, mask: PyTree) -> None:
  """Raises a TypeError unless the leaves of a mask are bools."""
  for leaf in jax.tree.leaves(unboxed(mask)):
    if not (isinstance(leaf, bool) or _is_bool_array(leaf)):
      raise TypeError(f"{name} holds {leaf!r}, which is no bool: {_HOW}.")


def _is_bool_array(x: Any) -> bool:
  is_scalar = getattr(x, "shape", None) == () and concrete(x)
  return is_scalar and jnp.issubdtype(x.dtype, np.bool_)
