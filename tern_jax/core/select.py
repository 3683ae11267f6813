"""Which leaves are ternarized: `kernels`, functions and trees of bools."""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from tern_jax.core.checks import call_repr
from tern_jax.core.containers import TernParams
from tern_jax.core.names import Found
from tern_jax.core.paths import (
  as_patterns,
  check_patterns,
  exact,
  matches,
  matches_any,
  names_leaf,
  path_str,
)
from tern_jax.core.selection import Selector, every_path, shape_str
from tern_jax.core.types import PyTree

#: Why a function or a tree of bools leaves a leaf, as `describe` says it.
_NOT_CHOSEN = "not chosen"
#: Paths that a tree of bools prints.
_PRINTED = 8


@dataclasses.dataclass(frozen=True, repr=False, init=False)
class Kernels(Selector):
  """Selects weight matrices and convolution kernels, never biases or norms.

  By itself it takes a leaf of two or more axes if its name, the last component
  of its path that is no number, is one of Linen, NNX and Keras (`kernel`,
  `recurrent_kernel`, `depthwise_kernel`, `pointwise_kernel`), Equinox and
  PyTorch (`weight`, `weight_ih`, `weight_hh`, `in_proj_weight`) or Haiku (`w`,
  `w_i`, `w_h`), or `weights` or `W`. In a flat name, "l1.weight", that is what
  comes after the last dot. Of a tuple or list (weight, bias) it takes the
  first. But never norms and embeddings, stacked ones included, which it tells
  by the first of these that says something:

  1. a bias beside it: one of the same shape is that of a norm, any other that
     of a layer;
  2. the class that holds it, where the tree has classes (Equinox);
  3. four or more axes: a convolution;
  4. the last name of its path but one: a word in it that is or ends with norm
     ("LayerNorm_0", "ln_f", "bn1", "layer_normalization"), or has to do with
     embedding ("embed", "tok_emb", "wte").

  A pattern in `include` that ends with a leaf's own name takes that leaf,
  whatever it is and is called: "embed/embedding". One that names a module takes
  its matrices, unknown names and embeddings among them, but no norms and no
  biases. With `include`, nothing else is taken. `describe` tells what becomes
  of each matrix of a tree.

  A pattern matches whole path components, anywhere in the path, with shell
  wildcards inside a component: "Dense_0" does not match "Dense_01/kernel",
  "Dense_*" does. With a slash in front it begins at the top: "/Dense_0" does
  not match "head/Dense_0/kernel"; neither does "Dense_0/kernel" if that is the
  path of a leaf. A component matches itself, whatever characters are in it:
  "block[0]".

  Called on a tree, it returns a tree of bools, for optax's `mask=`.
  `tern_jax.kernels` is this class.

  Args:
    include: patterns of which one must match; none given takes all kernels.
    exclude: patterns of which none may match.

  >>> import jax.numpy as jnp
  >>> tree = {"Dense_0": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)},
  ...         "head": {"kernel": jnp.ones((3, 2))}}
  >>> where = Kernels(exclude="head")
  >>> where
  kernels(exclude=('head',))
  >>> where.paths(tree)
  ['Dense_0/kernel']
  """

  include: tuple[str, ...] = ()
  exclude: tuple[str, ...] = ()

  def __init__(
    self, include: str | Sequence[str] = (), exclude: str | Sequence[str] = ()
  ):
    object.__setattr__(self, "include", as_patterns(include, "include"))
    object.__setattr__(self, "exclude", as_patterns(exclude, "exclude"))

  def of(self, tree: PyTree) -> Selector:
    """Returns the same with whole paths of the tree as such."""
    given = [p for p in self.include + self.exclude if "/" in p]
    whole = every_path(tree).intersection(given) if given else ()
    if not whole:
      return self
    include, exclude = (
      tuple(exact(p) if p in whole else p for p in patterns)
      for patterns in (self.include, self.exclude)
    )
    return Kernels(include, exclude)

  def why_not(self, leaf: Found) -> str:
    """Returns why a leaf stays float, "" if it is ternary."""
    path, _, what = leaf
    if what == "vector":
      return "fewer than 2 axes"
    if not self.include and what != "kernel":
      return what
    if self.include:
      asking = [p for p in self.include if matches(p, path)]
      if not asking:
        return "not included"
      named = any(names_leaf(p, path) for p in asking)
      if what in ("norm", "bias") and not named:
        return what
    return "excluded" if matches_any(self.exclude, path) else ""

  def check(self, leaves: list[Found]) -> None:
    """Raises a ValueError if a pattern matches nothing, or includes nothing."""
    check_patterns(self.include + self.exclude, [x.path for x in leaves])
    for pattern in self.include:
      matched = [x for x in leaves if matches(pattern, x.path)]
      if not any(map(self.takes, matched)):
        why = ", ".join(f"{x.path} ({self._reason(x)})" for x in matched)
        raise ValueError(
          f"The pattern {pattern!r} in include selects nothing: a leaf needs 2"
          " or more axes, norms and biases must be named themselves, and"
          f" exclude= wins. It matches {why}."
        )

  def _reason(self, leaf: Found) -> str:
    return f"{self.why_not(leaf)}: {shape_str(leaf)}"

  def __repr__(self) -> str:
    """Prints the call that made it."""
    return call_repr(self, "kernels")


kernels = Kernels


@dataclasses.dataclass(frozen=True, repr=False)
class Function(Selector):
  """Selects the leaves for which a function of (path, leaf) is true."""

  fn: Callable[[str, Any], bool]

  def why_not(self, leaf: Found) -> str:
    """Returns why a leaf stays float, "" if it is ternary."""
    says: object = self.fn(leaf.path, leaf.leaf)
    if not _is_bool(says):
      raise TypeError(
        f"where={self!r} returned {says!r} for {leaf.path}: it must return True"
        " or False, from the path, shape and dtype of a leaf."
      )
    return "" if says else _NOT_CHOSEN

  def check(self, leaves: list[Found]) -> None:
    """Checks nothing: a function asks for nothing by name."""

  def __repr__(self) -> str:
    """Prints the name of the function."""
    return getattr(self.fn, "__qualname__", type(self.fn).__name__)


@dataclasses.dataclass(frozen=True, repr=False)
class Bools(Selector):
  """Selects the leaves at which a tree of bools is True, kept by path.

  A True at an inner node stands for the kernels below it, as `kernels()` has
  them; at a leaf it takes that leaf.
  """

  true: tuple[str, ...]
  false: tuple[str, ...]

  def why_not(self, leaf: Found) -> str:
    """Returns why a leaf stays float, "" if it is ternary."""
    if leaf.path in self.true:
      return ""
    if any(_is_below(leaf.path, top) for top in self.true):
      return kernels().why_not(leaf)
    return _NOT_CHOSEN

  def check(self, leaves: list[Found]) -> None:
    """Raises a ValueError unless the bools are of this tree."""
    paths = [x.path for x in leaves]
    for top in self.true:
      if not any(path == top or _is_below(path, top) for path in paths):
        raise ValueError(
          f"{self!r} is no tree of bools of these parameters: it has True at"
          f" {top!r}, but they have no such leaf. The leaves are:"
          f" {', '.join(paths) or 'none'}."
        )
    bools = self.true + self.false
    for path in paths:
      if not any(path == top or _is_below(path, top) for top in bools):
        raise ValueError(
          f"{self!r} has no bool for {path}: a tree of bools has one for each"
          " leaf, or one for all leaves below a node."
        )

  def __repr__(self) -> str:
    """Prints the paths that are True, the first of many."""
    shown, more = self.true[:_PRINTED], len(self.true) - _PRINTED
    rest = [f"and {more} more"] if more > 0 else []
    return f"bools({', '.join([*shown, *rest])})"


@dataclasses.dataclass(frozen=True, repr=False)
class Mask(Selector):
  """Selects by an optax mask: a function from a tree to one of bools."""

  fn: Callable[[PyTree], PyTree]

  def why_not(self, leaf: Found) -> str:
    """Raises a TypeError: one leaf is no tree."""
    raise TypeError(
      f"where={self!r} takes a tree, and this is one leaf, {leaf.path}: give a"
      " function of (path, leaf)."
    )

  def check(self, leaves: list[Found]) -> None:
    """Checks nothing: the bools of a tree do."""

  def of(self, tree: PyTree) -> Selector:
    """Returns what selects in one tree of the user's parameters."""
    return selector(self.fn(tree))

  def __repr__(self) -> str:
    """Prints the name of the function."""
    return getattr(self.fn, "__qualname__", type(self.fn).__name__)


def selector(where: Any = None) -> Selector:
  """Returns which leaves are selected, of whatever a `where=` may be.

  Args:
    where: None for `kernels()`; a `kernels(...)`; a function of (path, leaf)
      that returns a bool, path being printed as `kernels(...).paths` does; a
      tree of bools of the user's parameters, or of their inner nodes; or, as
      optax has masks, a function from a tree to one of bools.

  Returns:
    An object that can be hashed, with `paths`, `describe`, and a call that
    makes a tree of bools.

  Raises:
    TypeError: it is none of these.

  >>> selector({"a": {"kernel": True, "bias": False}})
  bools(a/kernel)
  """
  if where is None:
    return Kernels()
  if isinstance(where, Selector):
    return where
  if isinstance(where, type):
    raise TypeError(
      f"where={where.__name__.lower()} is a class: call it, kernels()."
    )
  if isinstance(where, TernParams):
    if any(jax.tree.leaves(where.scales)):
      raise ValueError("where= has True at scales: only latents are ternary.")
    where = where.latent
  if isinstance(where, functools.partial):  # That of jax.tree_util is a node.
    return _by_signature(where)
  leaves = jax.tree_util.tree_leaves_with_path(where)
  if all(path and _is_bool(x) for path, x in leaves):
    if leaves:
      true, false = (
        tuple(path_str(path) for path, x in leaves if bool(x) == wanted)
        for wanted in (True, False)
      )
      return Bools(true, false)
  elif callable(where) and (len(leaves) == 1 and not leaves[0][0]):
    return _by_signature(where)
  raise TypeError(
    f"where={_shown(where)} selects nothing: give kernels(...), such as"
    ' kernels(include="Dense_0"), a function of (path, leaf) that returns a'
    " bool, or a tree of bools of the parameters."
  )


def _by_signature(fn: Callable[..., Any]) -> Selector:
  """Returns a function's selector, by how many arguments it needs."""
  try:
    given = inspect.signature(fn).parameters.values()
  except ValueError:
    return Function(fn)
  positional = [
    p
    for p in given
    if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    and p.default is p.empty
  ]
  more = any(p.kind is p.VAR_POSITIONAL for p in given)
  if len(positional) == 2 or (more and len(positional) < 2):
    return Function(fn)
  if len(positional) == 1:
    return Mask(fn)
  raise TypeError(
    f"where={fn!r} takes {len(positional)} arguments: give a function of"
    " (path, leaf) that returns a bool."
  )


def _is_bool(x: Any) -> bool:
  if isinstance(x, bool | np.bool_):
    return True
  return getattr(x, "shape", None) == () and x.dtype == bool


def _shown(where: object) -> str:
  text = repr(where)
  return text if len(text) < 80 else f"a {type(where).__name__}"


def _is_below(path: str, top: str) -> bool:
  return path.startswith(f"{top}/")
