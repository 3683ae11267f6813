"""Which leaves are ternarized: printable path predicates, also optax masks."""

import dataclasses
import math
from collections.abc import Sequence

import jax
import optax

from tern_jax.core.checks import call_repr
from tern_jax.core.containers import TernParams
from tern_jax.core.paths import check_patterns, matches_any, path_str
from tern_jax.core.types import PyTree

#: Last path component of weight matrices: Linen, NNX; Equinox; Haiku.
KERNEL_NAMES = ("kernel", "weight", "w")


@dataclasses.dataclass(frozen=True, repr=False, init=False)
class Kernels:
  """Selects weight matrices and convolution kernels, never biases or norms.

  A leaf is taken if it has two or more axes and its last path component is
  `kernel` (Linen, NNX), `weight` (Equinox) or `w` (Haiku). A pattern matches
  whole path components, anywhere in the path, with shell wildcards inside a
  component: "Dense_0" does not match "Dense_01/kernel", "Dense_*" does.

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
    for name, given in (("include", include), ("exclude", exclude)):
      patterns = (given,) if isinstance(given, str) else tuple(given)
      object.__setattr__(self, name, patterns)

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
    if not _is_partial(tree):
      self.paths(tree)
    return jax.tree_util.tree_map_with_path(
      lambda path, leaf: self.selects(path_str(path), leaf), tree
    )

  def selects(self, path: str, leaf: object) -> bool:
    """Whether the leaf at a printed path is selected."""
    name = path.rsplit("/", 1)[-1]
    return (
      name in KERNEL_NAMES
      and getattr(leaf, "ndim", 0) >= 2
      and (not self.include or matches_any(self.include, path))
      and not matches_any(self.exclude, path)
    )

  def paths(self, tree: PyTree) -> list[str]:
    """Returns the printed paths of the selected leaves, in tree order.

    Raises:
      ValueError: nothing is selected, or a pattern matches no leaf.
    """
    return [path for path, _ in self._selected(tree)]

  def largest(self, tree: PyTree, stacked: Sequence[str] = ()) -> int:
    """Returns the size of the largest selected layer, as `EC2T` asks for it.

    Args:
      tree: the user's parameters, or their shapes.
      stacked: patterns of leaves whose first axis enumerates layers, as given
        to `ParamTransform`: one of the layers counts.

    >>> import jax.numpy as jnp
    >>> tree = {"layers": {"kernel": jnp.ones((4, 3, 3))},
    ...         "head": {"kernel": jnp.ones((3, 5)), "bias": jnp.ones(50)}}
    >>> kernels().largest(tree), kernels().largest(tree, stacked=["layers"])
    (36, 15)
    """
    leaves = self._selected(tree)
    check_patterns(stacked, [path for path, _ in leaves])
    return max(
      math.prod(leaf.shape[matches_any(stacked, path) :])
      for path, leaf in leaves
    )

  def _selected(self, tree: PyTree) -> list[tuple[str, PyTree]]:
    """Returns the selected leaves with their printed paths."""
    leaves = [
      (path_str(path), leaf)
      for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    ]
    everything = [path for path, _ in leaves]
    check_patterns(self.include + self.exclude, everything)
    selected = [pair for pair in leaves if self.selects(*pair)]
    if not selected:
      raise ValueError(
        f"{self!r} selects no leaf: it takes arrays of 2 or more axes whose"
        f" name is one of {', '.join(KERNEL_NAMES)}. The leaves are:"
        f" {', '.join(everything) or 'none'}."
      )
    return selected

  def __repr__(self) -> str:
    """Prints the call that made it."""
    return call_repr(self, "kernels")


kernels = Kernels


def _is_partial(tree: PyTree) -> bool:
  def is_masked(node: object) -> bool:
    return isinstance(node, optax.MaskedNode)

  return any(map(is_masked, jax.tree.leaves(tree, is_leaf=is_masked)))
