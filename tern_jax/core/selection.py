"""What selects leaves: paths, masks for optax, and a text for people."""

import abc
import math
from collections.abc import Sequence
from typing import Any

import jax
import optax

from tern_jax.core.containers import TernParams
from tern_jax.core.names import KERNEL_NAMES, Found, found, kind
from tern_jax.core.paths import check_patterns, matches_any, path_str
from tern_jax.core.types import PyTree


class Selector(abc.ABC):
  """Which leaves of a tree are ternary; also a mask for optax."""

  @abc.abstractmethod
  def why_not(self, leaf: Found) -> str:
    """Returns why a leaf stays float, "" if it is ternary."""

  @abc.abstractmethod
  def check(self, leaves: list[Found]) -> None:
    """Raises a ValueError unless what was asked for is in a tree."""

  def of(self, tree: PyTree) -> "Selector":
    """Returns what selects in one tree of the user's parameters."""
    del tree
    return self

  def selects(self, path: str, leaf: Any) -> bool:
    """Whether a leaf is selected, as far as it and its printed path tell.

    `paths` and a call see the whole tree, that is, what lies beside a leaf and
    the class that holds it: use those where there is a tree.
    """
    if not hasattr(leaf, "shape"):
      return False
    return self.takes(Found(path, leaf, kind(path, leaf, {})))

  def chosen(self, tree: PyTree) -> set[str]:
    """Returns the printed paths of the selected leaves; it checks nothing."""
    tree = latent_of(tree)
    own = self.of(tree)
    return {x.path for x in found(tree) if own.takes(x)}

  def paths(self, tree: PyTree) -> list[str]:
    """Returns the printed paths of the selected leaves, in tree order.

    Raises:
      ValueError: nothing is selected, or a pattern matches no leaf.
    """
    return [x.path for x in self._selected(tree)]

  def __call__(self, tree: PyTree) -> PyTree:
    """Returns a tree of bools: True where the leaf is selected.

    Args:
      tree: parameters, their gradients, or `TernParams` (whose scales are
        never selected). Leaves that optax masked out are passed over.

    Raises:
      ValueError: nothing is selected, or a pattern matches no leaf.
    """
    if isinstance(tree, TernParams):
      nothing = jax.tree.map(lambda _: False, tree.scales)
      return TernParams(latent=self(tree.latent), scales=nothing)
    # Under optax.masked or optax.partition a part of the tree is hidden: then
    # a pattern without a match is no sign of a mistake.
    if not is_partial(tree):
      self.paths(tree)
    chosen = self.chosen(tree)
    return jax.tree_util.tree_map_with_path(
      lambda path, _: path_str(path) in chosen, tree
    )

  def largest(self, tree: PyTree, stacked: str | Sequence[str] = ()) -> int:
    """Returns the size of the largest selected layer, as `EC2T` asks for it.

    Args:
      tree: the user's parameters, or their shapes.
      stacked: patterns of leaves whose first axis enumerates layers, as given
        to `ParamTransform`: one of the layers counts.

    >>> import jax.numpy as jnp
    >>> tree = {"layers": {"kernel": jnp.ones((4, 3, 3))},
    ...         "head": {"kernel": jnp.ones((3, 5)), "bias": jnp.ones(50)}}
    >>> import tern_jax
    >>> where = tern_jax.kernels()
    >>> where.largest(tree), where.largest(tree, stacked="layers")
    (36, 15)
    """
    leaves = self._selected(tree)
    check_patterns(stacked, [x.path for x in found(latent_of(tree))])
    return max(
      math.prod(x.leaf.shape[matches_any(stacked, x.path) :]) for x in leaves
    )

  def describe(self, tree: PyTree) -> str:
    """Returns a text that tells what becomes of each matrix of a tree.

    Which leaves are ternary; and which of two or more axes stay float, and why:
    norm, embedding, bias, excluded, not included, not chosen (by a function or
    a tree of bools), name unknown.

    >>> import jax.numpy as jnp
    >>> tree = {"embed": {"embedding": jnp.ones((9, 4))},
    ...         "head": {"kernel": jnp.ones((4, 2)), "bias": jnp.ones(2)}}
    >>> import tern_jax
    >>> print(tern_jax.kernels().describe(tree))
    kernels() makes 1 leaf ternary, 8 of 46 weights:
      head/kernel      [4, 2]
    1 leaf of two or more axes stays float:
      embed/embedding  [9, 4]  embedding
    """
    tree = latent_of(tree)
    own, leaves = self.of(tree), found(tree)
    taken = [x for x in leaves if own.takes(x)]
    left = [x for x in leaves if x.leaf.ndim >= 2 and not own.takes(x)]
    size = sum(math.prod(x.leaf.shape) for x in taken)
    total = sum(math.prod(x.leaf.shape) for x in leaves)
    path_width = max((len(x.path) for x in taken + left), default=0)
    shape_width = max((len(shape_str(x)) for x in left), default=0)

    def line(x: Found) -> str:
      text = f"  {x.path:{path_width}}  {shape_str(x):{shape_width}}"
      return f"{text}  {own.why_not(x)}".rstrip()

    plural = "leaf" if len(taken) == 1 else "leaves"
    lines = [
      f"{self!r} makes {len(taken)} {plural} ternary, {size:,} of {total:,}"
      f" weights{':' if taken else '.'}",
      *map(line, taken),
    ]
    if left:
      stay = "leaf of two or more axes stays"
      stay = stay if len(left) == 1 else "leaves of two or more axes stay"
      lines += [f"{len(left)} {stay} float:", *map(line, left)]
    return "\n".join(lines)

  def takes(self, leaf: Found) -> bool:
    """Whether a leaf is ternary."""
    return not self.why_not(leaf)

  def _selected(self, tree: PyTree) -> list[Found]:
    """Returns the selected leaves, after checks."""
    tree = latent_of(tree)
    own, leaves = self.of(tree), found(tree)
    if not is_partial(tree):
      own.check(leaves)
    selected = [x for x in leaves if own.takes(x)]
    if not selected:
      raise ValueError(
        f"{self!r} selects no leaf: kernels() takes arrays of 2 or more axes"
        f" whose name is one of {', '.join(KERNEL_NAMES)}, and any matrix that"
        " include= names; or give where= a function of (path, leaf) that"
        " returns a bool, or a tree of bools. The leaves are:"
        f" {', '.join(x.path for x in leaves) or 'none'}."
      )
    return selected


def shape_str(leaf: Found) -> str:
  """Prints the shape of a leaf."""
  return f"[{', '.join(map(str, leaf.leaf.shape))}]"


def latent_of(tree: PyTree) -> PyTree:
  """Returns the user's tree where there are scales beside it."""
  return tree.latent if isinstance(tree, TernParams) else tree


def every_path(tree: PyTree) -> set[str]:
  """Returns the printed paths of all leaves, hidden ones included."""
  leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=_is_hidden)
  return {path_str(path) for path, _ in leaves}


def _leaves(tree: PyTree) -> list[Any]:
  return jax.tree.leaves(tree, is_leaf=is_masked)


def is_partial(tree: PyTree) -> bool:
  """Whether optax hides a part of a tree, by a mask or by labels."""
  return any(map(is_masked, _leaves(tree)))


def is_masked(node: object) -> bool:
  """Whether a node stands for what optax hides."""
  return isinstance(node, optax.MaskedNode)


def _is_hidden(node: object) -> bool:
  return node is None or is_masked(node)
