"""What a leaf is, by names, classes and what lies beside it."""

import functools
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

from tern_jax.core.paths import path_str
from tern_jax.core.types import KeyPath, PyTree

#: Names of weight matrices: Linen, NNX; Equinox; Haiku; Keras; recurrent cells.
KERNEL_NAMES = (
  "kernel",
  "weight",
  "weights",
  "w",
  "W",
  "weight_ih",
  "weight_hh",
  "w_i",
  "w_h",
  "recurrent_kernel",
  "depthwise_kernel",
  "pointwise_kernel",
  "in_proj_weight",
)
_BIASES = ("bias", "biases", "b", "offset", "beta")
_GAINS = ("scale", "gamma", "gain")
_LAYER = re.compile("linear|dense|conv|cell")
_NORM = re.compile(r"[a-z]*norms?|normali[sz][a-z]*|ln|bn|gn|rms")
_EMBEDDING = re.compile(r"[a-z]*embed[a-z]*|[a-z]*emb|wte|wpe")


class Found(NamedTuple):
  """An array of a tree, and what it is."""

  path: str
  leaf: Any
  kind: str
  """"kernel", "norm", "embedding", "bias" or "name unknown"; "vector" if it has
  fewer than two axes."""


def found(tree: PyTree) -> list[Found]:
  """Returns the arrays of a tree and what they are, in its order.

  >>> import jax.numpy as jnp
  >>> norm = {"weight": jnp.ones((4, 8)), "bias": jnp.ones((4, 8))}
  >>> tree = {"a": norm, "b": {"w": jnp.ones((8, 2))}}
  >>> [(x.path, x.kind) for x in found(tree)]
  [('a/bias', 'bias'), ('a/weight', 'norm'), ('b/w', 'kernel')]
  """
  leaves = [
    (keys, path_str(keys), leaf)
    for keys, leaf in jax.tree_util.tree_leaves_with_path(tree)
    if hasattr(leaf, "shape") and hasattr(leaf, "ndim")
  ]
  beside: dict[tuple[str, ...], dict[str, Any]] = {}
  for _, path, leaf in leaves:
    *module, name = _parts(path)
    beside.setdefault(tuple(module), {})[name] = leaf
  return [
    Found(
      path,
      leaf,
      kind(
        path,
        leaf,
        beside[_parts(path)[:-1]],
        functools.partial(_holder, tree, keys),
      ),
    )
    for keys, path, leaf in leaves
  ]


def kind(
  path: str,
  leaf: Any,
  beside: Mapping[str, Any],
  holder: Callable[[], str] = str,
) -> str:
  """Returns what a leaf is, as `Found` tells.

  Args:
    path: where it is.
    leaf: an array, or its shape and dtype.
    beside: the leaves of its module by their last names, itself among them;
      {} if they are not known.
    holder: returns the name of the class that holds it, "" if there is none.
  """
  if leaf.ndim < 2:
    return "vector"
  name, module = _name_and_module(path)
  if _is_weight_of_pair(path, leaf, beside):
    return "kernel"
  if name not in KERNEL_NAMES:
    return _kind_of_name(name)
  bias = next((beside[b] for b in _BIASES if b in beside), None)
  if bias is not None:
    # A gain has the shape of its bias, a kernel has more axes or other ones.
    return "norm" if bias.shape == leaf.shape else "kernel"
  class_name = holder()
  if of_class := _kind_of_module(class_name):
    return of_class
  # Tables and gains of a stack have three axes, more are of a convolution.
  if _LAYER.search(class_name.lower()) or leaf.ndim > 3:
    return "kernel"
  return _kind_of_module(module) or "kernel"


def _is_weight_of_pair(path: str, leaf: Any, beside: Mapping[str, Any]) -> bool:
  """Whether a nameless leaf is the first of a (weight, bias) pair."""
  if _parts(path)[-1] != "0" or set(beside) != {"0", "1"}:
    return False
  bias = tuple(n for n in beside["1"].shape if n != 1)
  first, *_, last = leaf.shape
  # Of one layer, or of each of a stack.
  return bias in ((first,), (last,), (first, last)) and leaf.shape != bias


def _kind_of_name(name: str) -> str:
  """Returns what a leaf is whose name is none of a kernel."""
  if name in _BIASES:
    return "bias"
  if name in _GAINS:
    return "norm"
  return _kind_of_module(name) or "name unknown"


@functools.lru_cache(maxsize=65536)
def _kind_of_module(name: str) -> str:
  """Returns "norm" or "embedding" if a name says so, else ""."""
  words = _words(name)
  if any(map(_NORM.fullmatch, words)):
    return "norm"
  return "embedding" if any(map(_EMBEDDING.fullmatch, words)) else ""


def _words(name: str) -> list[str]:
  """Returns the words of a name, in lower case.

  >>> _words("LayerNorm_0"), _words("layernorm1"), _words("ln_f")
  (['layer', 'norm'], ['layernorm'], ['ln', 'f'])
  """
  return [w.lower() for w in re.findall(r"[A-Z]*[a-z]+|[A-Z]+", name)]


@functools.lru_cache(maxsize=65536)
def _parts(path: str) -> tuple[str, ...]:
  """Returns the components of a path, those of flat names apart."""
  return tuple(re.split("[/.]", path))


@functools.lru_cache(maxsize=65536)
def _name_and_module(path: str) -> tuple[str, str]:
  """Returns the last name in a path and the one before, without numbers.

  >>> _name_and_module("layers/0/norm/1/weight"), _name_and_module("l1.w")
  (('weight', 'norm'), ('w', 'l1'))
  """
  names = [part for part in _parts(path) if not re.fullmatch(r"\d*|~", part)]
  *_, module, name = ("", "", *names)
  # Layers of a recurrent net: weight_ih_l0.
  return re.sub(r"_l\d+(_reverse)?$", "", name), module


def role_of(path: str) -> tuple[tuple[str, ...], str]:
  """Returns the path of a kernel's module and what the kernel is in there.

  >>> role_of("blocks/0/attn/query/kernel"), role_of("attn.q_proj.weight")
  ((('blocks', '0', 'attn'), 'query'), (('attn',), 'q_proj'))
  """
  parts = _parts(path)
  if len(parts) > 1 and parts[-1] in KERNEL_NAMES:
    parts = parts[:-1]
  return parts[:-1], parts[-1]


def _holder(tree: PyTree, keys: KeyPath) -> str:
  """Returns the name of the class that holds a leaf, in a list or by itself."""
  holder = node = tree
  for key in keys[:-1]:
    if isinstance(key, jax.tree_util.GetAttrKey):
      node = getattr(node, key.name)
    elif isinstance(key, jax.tree_util.DictKey):
      node = node[key.key]
    elif isinstance(key, jax.tree_util.SequenceKey):
      node = node[key.idx]
    else:
      return ""
    if type(node) not in (list, tuple):
      holder = node
  return type(holder).__name__
