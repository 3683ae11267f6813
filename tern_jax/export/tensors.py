"""The tensors that files of products by rows have, made of a tree's leaves.

A tensor has a name, and rows that lie along the inputs: a kernel [in, out] of
the tree is [out, in].
"""

import dataclasses
import itertools
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

import jax
import numpy as np

from tern_jax.core.axes import Axes, attention
from tern_jax.core.paths import as_patterns, check_patterns, matches, path_str
from tern_jax.core.types import PyTree
from tern_jax.export import files
from tern_jax.export.decoder import Order
from tern_jax.storage.leaves import Leaf
from tern_jax.storage.packed import PackedTernary, to_ternary

# Dense leaves that are laid out as ternary ones are.
_KERNELS = ("kernel", "weight", "w")
# A table of vectors, which lie along its rows in every library.
_TABLE = "token_embd.weight"
# How many names an error lists.
_LISTED = 8
_decode = jax.jit(lambda x: (to_ternary(x).codes, x.dequantize()))


@dataclasses.dataclass(frozen=True)
class Rows:
  """A tensor as it is to be stored.

  Args:
    name: of the tensor.
    x: the weights.
  """

  name: str
  x: np.ndarray


@dataclasses.dataclass(frozen=True)
class TernaryRows(Rows):
  """Ternary weights as they are to be stored.

  Args:
    codes: in float32.
    magnitudes_differ: whether w_p and w_n of the leaf do.
  """

  codes: np.ndarray
  magnitudes_differ: bool


@dataclasses.dataclass(frozen=True)
class Plan:
  """How the tensors of a file are made of a tree's leaves.

  Args:
    channel_axis: axis of the output channels of every weight matrix: -1 for
      Flax and Haiku, 0 for Equinox.
    names: {pattern of a path: tensor}, in which * is the number of a layer; by
      default a tensor is called by its path joined by dots.
    stacked: patterns of leaves whose first axis enumerates layers. The number
      of a layer stands behind what the pattern matches; where it stands there
      already, the leaf is one layer.
    order: {tensor: ("pairs" or "halves", heads)}, to which order the rows of
      each head go.
    shapes: {tensor: shape} of all tensors that there must be.
  """

  channel_axis: int = -1
  names: Mapping[str, str] | None = None
  stacked: str | Sequence[str] = ()
  order: Order = dataclasses.field(default_factory=dict)
  shapes: Mapping[str, Sequence[int]] | None = None

  def __post_init__(self) -> None:
    """Checks what does not depend on a tree."""
    if self.channel_axis not in (-1, 0):
      wanted = "-1 (Flax, Haiku) or 0 (Equinox)"
      raise ValueError(
        f"channel_axis must be {wanted}, got {self.channel_axis}."
      )
    for pattern, name in (self.names or {}).items():
      if pattern.count("*") != name.count("*") or name.count("*") > 1:
        raise ValueError(
          f"names has {pattern!r}: {name!r}, but one * at most, the number of a"
          " layer, must be in both."
        )

  def sources(self, tree: PyTree) -> list["Source"]:
    """Returns where each tensor comes from.

    Raises:
      ValueError: a leaf has no name or several, two have one, or a tensor is
        missing, superfluous or of another shape.
      TypeError: a leaf is neither packed nor an array.
    """
    found = [
      (path_str(keys), x) for keys, x in files.checked_leaves(tree).items()
    ]
    stacked = as_patterns(self.stacked, "stacked")
    if self.shapes is None:
      check_patterns(stacked, [path for path, _ in found])
    layers = {path: _layer_in(stacked, path) for path, _ in found}
    shapes = {path: x.shape[layers[path] is not None :] for path, x in found}
    heads = attention(shapes) if self.channel_axis == -1 else {}
    names, sources = _Names(self.names), list[Source]()
    for path, x in found:
      place = layers[path]
      if place is None:
        wholes = {None: path}
      elif not x.shape:
        raise ValueError(f"{path} is a number, but stacked= names its layers.")
      else:
        before, after = place
        wholes = {i: f"{before}/{i}{after}" for i in range(x.shape[0])}
      sources += [
        Source(names.of(whole), path, x, i, heads.get(path))
        for i, whole in wholes.items()
      ]
    names.check_all_used([path for path, _ in found], self.shapes is None)
    files.check_unique(x.name for x in sources)
    self._check_shapes(sources)
    return sources

  def rows(self, sources: Iterable["Source"]) -> Iterator[Rows]:
    """Yields the tensors; the layers of a stack are decoded together."""
    for _, layers in itertools.groupby(sources, key=lambda x: id(x.leaf)):
      codes, weights = None, None
      for source in layers:
        if weights is None:
          codes, weights = _arrays(source.leaf)
        yield self._tensor(source, codes, weights)

  def _tensor(
    self, source: "Source", codes: np.ndarray | None, weights: np.ndarray
  ) -> Rows:
    x = self._lie(source, weights)
    leaf = source.leaf
    if codes is None or not isinstance(leaf, PackedTernary):
      return Rows(source.name, x)
    codes = self._lie(source, codes)
    wide = np.promote_types(x.dtype, np.float32)
    differ = not np.array_equal(leaf.w_p, leaf.w_n)
    codes = codes.astype(np.float32)
    return TernaryRows(source.name, x.astype(wide), codes, differ)

  def _lie(self, source: "Source", x: np.ndarray) -> np.ndarray:
    """Returns one layer of an array with its inputs along the last axis."""
    if source.layer is not None:
      x = x[source.layer]
    packed = isinstance(source.leaf, PackedTernary)
    last = source.path.rpartition("/")[-1]
    if (packed or last in _KERNELS) and source.name != _TABLE:
      x = _rows(x, self.channel_axis, source.heads)
    if source.name in self.order:
      x = reordered(x, *self.order[source.name])
    return np.atleast_1d(x) if packed else x

  def _check_shapes(self, sources: list["Source"]) -> None:
    """Raises unless the tensors are those of `shapes`."""
    if self.shapes is None:
      return
    found = {
      x.name: self._lie(x, np.broadcast_to(np.int8(0), x.leaf.shape)).shape
      for x in sources
    }
    check_tensors(found, self.shapes)


@dataclasses.dataclass(frozen=True)
class Source:
  """Where a tensor comes from.

  Args:
    name: of the tensor.
    path: of the leaf.
    leaf: of the tree.
    layer: which of a stack, None of a leaf that is none.
    heads: the axes of a kernel of attention.
  """

  name: str
  path: str
  leaf: Leaf
  layer: int | None
  heads: Axes | None


class _Names:
  """Names of tensors by patterns of paths."""

  def __init__(self, names: Mapping[str, str] | None):
    self._names = names
    self._used: set[str] = set()
    self._missed: list[str] = []

  def of(self, path: str) -> str:
    """Returns the name of a leaf, or of a layer of it."""
    if self._names is None:
      return path.replace("/", ".") or "leaf"
    found = {}
    for pattern, name in self._names.items():
      top = "" if pattern.startswith("/") else "(?:.*/)?"
      parts = map(re.escape, pattern.lstrip("/").split("*"))
      if m := re.fullmatch(top + r"(\d+)".join(parts), path):
        number = m[1] if m.groups() else ""
        found[pattern] = name.replace("*", str(int(number or 0)))
    self._used |= found.keys()
    if len(set(found.values())) > 1:
      raise ValueError(f"{path} has several names: {found}.")
    if not found:
      self._missed.append(path)
      return path
    return next(iter(found.values()))

  def check_all_used(self, paths: list[str], strict: bool) -> None:
    """Raises if leaves have no name or, where it is strict, names no leaf."""
    if self._missed:
      raise ValueError(
        f"no pattern of names= tells which tensor is {some(self._missed)}:"
        " add one, or leave out what the file does not have. They are"
        f" {some(self._names or ())}."
      )
    unused = [x for x in self._names or () if x not in self._used]
    if strict and unused:
      leaves = some(paths) or "none"
      raise ValueError(
        f"names has {some(unused)}, which matches no leaf: they are {leaves}."
      )


def check_tensors(
  found: Mapping[str, Sequence[int]], wanted: Mapping[str, Sequence[int]]
) -> None:
  """Raises a ValueError unless the tensors are those that there must be."""
  faults = []
  if missing := [x for x in wanted if x not in found]:
    faults.append(f"missing are {some(missing)}")
  if extra := [x for x in found if x not in wanted]:
    faults.append(f"superfluous are {some(extra)}")
  shapes = [
    f"{name} is {[*found[name]]}, not {[*shape]}"
    for name, shape in wanted.items()
    if name in found and tuple(found[name]) != tuple(shape)
  ]
  faults += shapes[:_LISTED] + ["..."] * (len(shapes) > _LISTED)
  if faults:
    raise ValueError(
      f"the tensors are not those of such a model: {'; '.join(faults)}."
    )


def some(names: Collection[str]) -> str:
  """Returns the first of some names for a message."""
  shown = ", ".join(itertools.islice(names, _LISTED))
  return shown + f" and {len(names) - _LISTED} more" * (len(names) > _LISTED)


def reordered(x: np.ndarray, to: str, heads: int) -> np.ndarray:
  """Puts the rows of each head into the order of a rotation.

  Component i of a head that is rotated by halves is component 2 i of one that
  is rotated by pairs, and component i + d / 2 is 2 i + 1.

  >>> reordered(np.arange(8), "pairs", 2).tolist()
  [0, 2, 1, 3, 4, 6, 5, 7]
  """
  halves = (2, -1) if to == "pairs" else (-1, 2)
  parts = x.reshape(heads, *halves, *x.shape[1:])
  return parts.swapaxes(1, 2).reshape(x.shape)


def _layer_in(stacked: Sequence[str], path: str) -> tuple[str, str] | None:
  """Returns a path in two, between which the number of a layer belongs."""
  parts = path.split("/")
  for pattern in stacked:
    n = len(pattern.lstrip("/").split("/"))
    for i in range(len(parts) - n + 1):
      if pattern.startswith("/") and i:
        break
      if matches("/" + pattern.lstrip("/"), "/".join(parts[i : i + n])):
        rest = parts[i + n :]
        if rest and rest[0].isdecimal():
          return None
        return "/".join(parts[: i + n]), "".join(f"/{x}" for x in rest)
  return None


def _arrays(leaf: Leaf) -> tuple[np.ndarray | None, np.ndarray]:
  """Returns the codes of packed weights, None of others, and the weights."""
  if not isinstance(leaf, PackedTernary):
    return None, np.asarray(leaf)
  codes, weights = map(np.asarray, _decode(leaf))
  return codes, weights


def _rows(x: np.ndarray, channel_axis: int, heads: Axes | None) -> np.ndarray:
  """Moves the inputs of [..., in, out] or [out, in, ...] to the last axis."""
  if x.ndim < 2:
    return np.atleast_1d(x)
  if heads is not None:
    first, _ = max(heads, key=len)
    x = x.reshape(*x.shape[:first], -1, *x.shape[first + 2 :])
  return np.moveaxis(x, (-1, -2) if channel_axis == -1 else (0, 1), (-2, -1))
