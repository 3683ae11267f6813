"""The leaves of a tree, as checkpoints and exports store them.

A leaf is named arrays on the host and what describes them: kind, shape, dtype
and the crc32 of its bytes.
"""

import dataclasses
import functools
import math
import os
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from tern_jax.core.containers import Ternary
from tern_jax.core.paths import key_str
from tern_jax.core.types import Array, PyTree
from tern_jax.storage.packed import PackedTernary

#: The keys that lead to a leaf.
Path = tuple[str, ...]
#: What a leaf is once it is loaded.
Leaf = Array | np.ndarray | PackedTernary
#: What names a file or folder.
PathLike = str | os.PathLike[str]
#: A JSON object: what a file says of itself, or of a leaf.
Json = dict[str, Any]

#: The key of what is in a box.
BOX = "value"
#: Most keys of a path: a deeper tree could overflow a reader's stack.
DEPTH = 64
#: The fields of `PackedTernary` that are arrays.
FIELDS = ("nonzero", "sign", "w_p", "w_n")


class CheckpointError(ValueError):
  """A checkpoint cannot be written, is damaged, or does not fit the request."""


class MisfitError(CheckpointError):
  """What is asked for is not what a checkpoint has, which is whole."""


def is_whole(x: object) -> bool:
  """Whether a node is one leaf, although JAX sees several arrays in it."""
  return isinstance(x, Ternary | PackedTernary)


def flatten(tree: PyTree, depth: float = DEPTH) -> tuple[dict[Path, Any], Any]:
  """Returns the leaves by path, weights whole, and the tree's structure."""
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


def boxes(tree: PyTree) -> dict[Path, Json]:
  """Returns what entries of leaves say of a last key `value`, by path.

  As the only field of a node it is that of a box, such as a variable of NNX or
  a partitioned parameter of Linen; as a key of a dict it is the user's own.
  """
  flat, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_whole)
  keys = {tuple(map(key_str, path)): path for path, _ in flat}
  return {
    path: {"boxed": isinstance(keys[path][-1], jax.tree_util.GetAttrKey)}
    for path in _only_values(keys)
  }


def _only_values(paths: Iterable[Path]) -> list[Path]:
  """Returns the paths that end in `value`, without another key beside it."""
  paths = list(paths)
  beside = Counter(path[:i] for path in paths for i in range(len(path)))
  return [p for p in paths if p[1:] and p[-1] == BOX and beside[p[:-1]] == 1]


def unboxed(entries: Mapping[Path, Json]) -> dict[Path, Path]:
  """Returns the paths of leaves without the boxes that they were in.

  Args:
    entries: of the leaves. Where an old file does not say whether `value` was
      that of a box, it was.
  """
  boxed = {p for p in _only_values(entries) if entries[p].get("boxed", True)}
  return {path: path[:-1] if path in boxed else path for path in entries}


def nest(leaves: Mapping[Path, PyTree], entries: Mapping[Path, Json]) -> PyTree:
  """Returns nested dicts of leaves, without the boxes that they were in.

  Args:
    leaves: by path. One without a path is the whole tree.
    entries: of the leaves, by path.
  """
  paths, root = unboxed(entries), {}
  for keys, x in leaves.items():
    path = paths[keys]
    if not path:
      return x
    node = root
    for key in path[:-1]:
      node = node.setdefault(key, {})
    node[path[-1]] = x
  return root


def printable(text: object, most: int = 200) -> str:
  r"""Returns text of a file as messages print it: on one line, and not long.

  Control characters, line ends, marks that change the direction of text and
  whatever else is not seen are escaped.

  >>> printable("a\x1b[2J\nb"), printable("βάρος/权重"), printable("x" * 9, 5)
  ('a\\x1b[2J\\nb', 'βάρος/权重', 'xxxxx... (9 characters)')
  """
  text = str(text)
  shown = "".join(
    c if c.isprintable() else c.encode("unicode_escape").decode()
    for c in text[:most]
  )
  return shown + f"... ({len(text)} characters)" * (len(text) > most)


def name_of(path: Iterable[str]) -> str:
  """Returns a path as errors print it."""
  return printable("/".join(path)) or "the leaf"


def clash(paths: list[Path]) -> bool:
  """Whether two leaves have one path, or one lies inside another."""
  unique = set(paths)
  above = {path[:i] for path in unique for i in range(len(path))}
  return len(unique) < len(paths) or not unique.isdisjoint(above)


def kind_of(name: str, x: object, *, keys: bool = False) -> str:
  """Returns "ternary", "dense" or, if allowed, "key"; raises for the rest."""
  if isinstance(x, Ternary):
    raise TypeError(f"{name} is a Ternary: call tern_jax.pack first.")
  if isinstance(x, PackedTernary):
    return "ternary"
  if not isinstance(x, jax.Array | np.ndarray | np.generic):
    wanted = "leaves must be arrays or PackedTernary"
    got = f"{type(x).__name__}: leave it out of the tree"
    raise TypeError(f"{name}: {wanted}, got {got}.")
  if keys and jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
    return "key"
  if is_dense(x.dtype):
    return "dense"
  raise TypeError(f"{name}: cannot save an array of dtype {x.dtype}.")


def is_dense(dtype: np.dtype) -> bool:
  """Whether arrays of a dtype can be stored as they are."""
  return any(jnp.issubdtype(dtype, x) for x in (bool, jnp.number))


def is_path(x: object) -> bool:
  """Whether a JSON value is the path of a leaf."""
  keys = x if isinstance(x, list) and len(x) <= DEPTH else [None]
  return all(isinstance(key, str) for key in keys)


def is_shape(x: object) -> bool:
  """Whether a JSON value is a shape that NumPy could have."""
  sizes = x if isinstance(x, list) and len(x) <= 32 else [None]
  return all(type(n) is int and 0 <= n < 2**63 for n in sizes)


def host(x: Array | np.ndarray | np.generic) -> np.ndarray:
  """Returns an array of any device or process, whole, in C order, here."""
  if isinstance(x, jax.Array) and not (
    x.is_fully_addressable or x.is_fully_replicated
  ):
    x = multihost_utils.process_allgather(x, tiled=True)
  x = np.asarray(x, order="C")
  return x if x.dtype.isnative else x.astype(x.dtype.newbyteorder("="))


def host_packed(x: PackedTernary) -> PackedTernary:
  """Returns packed weights, valid or not, with their arrays on the host."""
  arrays: dict[str, Any] = {k: host(getattr(x, k)) for k in FIELDS}
  return dataclasses.replace(x, **arrays)


def place(x: Leaf, like: object = None, source: str = "it") -> Any:
  """Puts a loaded leaf on the devices of `like`, else on the default device."""
  if isinstance(x, PackedTernary):
    pairs = ((k, getattr(x, k), getattr(like, k, None)) for k in FIELDS)
    fields = {k: place(a, b, source) for k, a, b in pairs}
    return dataclasses.replace(x, **fields)
  # An array that was free to move to another device stays so.
  fixed = getattr(like, "committed", True)
  sharding = getattr(like, "sharding", None) if fixed else None
  placed = jax.device_put(x, sharding)  # jnp.asarray may copy twice
  if placed.dtype != x.dtype:
    hint = "set jax_enable_x64 to load them"
    raise MisfitError(f"{source} has {x.dtype} arrays: {hint}.")
  return placed


def describe(arrays: Mapping[str, Array | np.ndarray]) -> Json:
  """Returns {name: {"dtype", "shape"}}."""
  facts = ((k, a.dtype.name, list(a.shape)) for k, a in arrays.items())
  return {k: {"dtype": dtype, "shape": shape} for k, dtype, shape in facts}


def size_of(described: Json) -> int:
  """Returns the bytes of an array that a file describes; trusts nothing."""
  shape, dtype = described["shape"], described["dtype"]
  if not is_shape(shape):
    raise ValueError(f"{printable(shape)} is no shape of an array")
  if not isinstance(dtype, str) or not (size := _itemsize(dtype)):
    raise ValueError(f"{printable(dtype)} is no dtype of an array")
  return math.prod(shape) * size


@functools.lru_cache(256)
def _itemsize(name: str) -> int:
  """Returns the bytes of an element, 0 if arrays of a dtype are not stored."""
  try:
    dtype = jnp.dtype(name)
  except TypeError:
    return 0
  return dtype.itemsize if dtype.name == name and is_dense(dtype) else 0


def bytes_of(x: np.ndarray) -> memoryview:
  """Returns the bytes of an array on the host, in C order, little-endian."""
  return np.ascontiguousarray(x).reshape(-1).view(np.uint8).data


def crc_of(arrays: Mapping[str, np.ndarray]) -> int:
  """Returns the crc32 of the bytes of arrays, sorted by name, in C order."""
  crc = 0
  for name in sorted(arrays):
    crc = zlib.crc32(bytes_of(arrays[name]), crc)
  return crc
