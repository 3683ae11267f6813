"""The leaves of a tree, as checkpoints and exports store them.

A leaf is named arrays on the host and what describes them: kind, shape, dtype
and the crc32 of its bytes.
"""

import dataclasses
import zlib
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from tern_jax.core.containers import Ternary
from tern_jax.core.paths import key_str
from tern_jax.storage.packed import PackedTernary

#: The keys that lead to a leaf.
Path = tuple[str, ...]

#: Most keys of a path: a deeper tree could overflow a reader's stack.
DEPTH = 64
#: The fields of `PackedTernary` that are arrays.
FIELDS = ("nonzero", "sign", "w_p", "w_n")


class CheckpointError(ValueError):
  """A checkpoint cannot be written, is damaged, or does not fit the request."""


# Trees.


def is_whole(x: Any) -> bool:
  """Whether a node is one leaf, although JAX sees several arrays in it."""
  return isinstance(x, Ternary | PackedTernary)


def flatten(tree: Any, depth: float = DEPTH) -> tuple[dict[Path, Any], Any]:
  """Returns the leaves by path, weights whole, and the tree's structure.

  Raises:
    ValueError: two leaves have one path, or a path has more keys than `depth`.
  """
  flat, treedef = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_whole)
  leaves = {}
  for keys, x in flat:
    path = tuple(map(key_str, keys))
    if path in leaves:
      raise ValueError(f"two leaves have the path {name_of(path)}.")
    if len(path) > depth:
      raise ValueError(f"a path is at most {depth} keys, got {name_of(path)}.")
    # A plain number is the array that JAX takes it for.
    leaves[path] = jnp.asarray(x) if isinstance(x, bool | int | float) else x
  return leaves, treedef


def nest(leaves: Mapping[Path, Any]) -> Any:
  """Returns nested dicts of leaves; a leaf without a path is the whole tree.

  >>> nest({("a", "b"): 1, ("a", "c"): 2})
  {'a': {'b': 1, 'c': 2}}
  """
  tree: dict[str, Any] = {}
  for path, x in leaves.items():
    if not path:
      return x
    *parents, last = path
    node = tree
    for key in parents:
      node = node.setdefault(key, {})
    node[last] = x
  return tree


def name_of(path: Iterable[str]) -> str:
  """Returns a path as errors print it."""
  return "/".join(path) or "the leaf"


def clash(paths: list[Path]) -> bool:
  """Whether two leaves have one path, or one lies inside another."""
  unique = set(paths)
  above = {path[:i] for path in unique for i in range(len(path))}
  return len(unique) < len(paths) or not unique.isdisjoint(above)


# Leaves.


def kind_of(name: str, x: Any, *, keys: bool = False) -> str:
  """Returns the kind of a leaf: "ternary", "dense", or "key" if those may be.

  Raises:
    TypeError: it cannot be stored; says why.
  """
  if isinstance(x, Ternary):
    raise TypeError(f"{name} is a Ternary: call tern_jax.pack first.")
  if isinstance(x, PackedTernary):
    return "ternary"
  if not isinstance(x, jax.Array | np.ndarray | np.generic):
    raise TypeError(
      f"{name}: leaves must be arrays or PackedTernary, got"
      f" {type(x).__name__}: leave it out of the tree."
    )
  if keys and jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
    return "key"
  if x.dtype == bool or jnp.issubdtype(x.dtype, jnp.number):
    return "dense"
  raise TypeError(f"{name}: cannot save an array of dtype {x.dtype}.")


def host(x: Any) -> np.ndarray:
  """Returns an array of any device or process, whole, in C order, here."""
  if isinstance(x, jax.Array) and not (
    x.is_fully_addressable or x.is_fully_replicated
  ):
    x = multihost_utils.process_allgather(x, tiled=True)
  x = np.asarray(x, order="C")
  return x if x.dtype.isnative else x.astype(x.dtype.newbyteorder("="))


def place(x: Any, like: Any = None, source: str = "it") -> Any:
  """Puts a loaded leaf on the devices of `like`, else on the default device.

  Raises:
    CheckpointError: a 64-bit dtype, while JAX is restricted to 32 bits.
  """
  if isinstance(x, PackedTernary):
    fields = {
      k: place(getattr(x, k), getattr(like, k, None), source) for k in FIELDS
    }
    return dataclasses.replace(x, **fields)
  # An array that was free to move to another device stays so.
  if getattr(like, "sharding", None) and getattr(like, "committed", True):
    placed = jax.device_put(x, like.sharding)
  else:
    placed = jnp.asarray(x)
  if placed.dtype != x.dtype:
    raise CheckpointError(
      f"{source} has {x.dtype} arrays: set jax_enable_x64 to load them."
    )
  return placed


# Arrays.


def describe(arrays: Mapping[str, Any]) -> dict[str, Any]:
  """Returns {name: {"dtype", "shape"}}, as JSON."""
  return {
    k: {"dtype": a.dtype.name, "shape": list(a.shape)}
    for k, a in arrays.items()
  }


def crc_of(arrays: Mapping[str, np.ndarray]) -> int:
  """Returns the crc32 of the bytes of arrays, sorted by name, in C order."""
  crc = 0
  for name in sorted(arrays):
    flat = np.ascontiguousarray(arrays[name]).reshape(-1)
    crc = zlib.crc32(flat.view(np.uint8).data, crc)
  return crc
