"""Metrics of ternary codes: sparsity, entropy, storage, flips."""

from typing import TypeGuard

import jax
import jax.numpy as jnp

from tern_jax.core.containers import Ternary
from tern_jax.core.paths import path_str
from tern_jax.core.types import Array, PyTree
from tern_jax.storage.packed import PackedTernary, to_ternary


def ternary_leaves(tree: PyTree) -> dict[str, Ternary]:
  """Returns {path: Ternary} of what `discretize` or `pack` returned.

  Raises a ValueError if the tree holds no ternary leaf.
  """
  leaves = {
    path_str(path): leaf if isinstance(leaf, Ternary) else to_ternary(leaf)
    for path, leaf in jax.tree_util.tree_leaves_with_path(
      tree, is_leaf=is_ternary
    )
    if is_ternary(leaf)
  }
  if not leaves:
    raise ValueError(
      "The tree holds no ternary leaf: give what ParamTransform.discretize"
      " or tern_jax.pack returned."
    )
  return leaves


def sparsity(tree: PyTree) -> Array:
  """Share of zeros among all ternary weights of a tree, float32, 0-d.

  Args:
    tree: a Ternary, a PackedTernary, or a tree of them; other leaves are not
      counted.

  >>> codes = jnp.array([0, 1, 0, -1], jnp.int8)
  >>> float(sparsity(Ternary(codes, jnp.ones(()), jnp.ones(()))))
  0.5
  """
  return code_shares(tree)[1]


def code_shares(tree: PyTree) -> Array:
  """Shares of the codes -1, 0 and +1, as in `sparsity`; float32 [3]."""
  leaves = ternary_leaves(tree).values()
  counts = jnp.zeros(3, jnp.float32)
  for leaf in leaves:
    # Summed in float: a count in int32 would overflow on very large leaves.
    codes = leaf.codes.astype(jnp.float32)
    counts += jnp.stack(
      [jnp.sum(codes == c, dtype=jnp.float32) for c in (-1.0, 0.0, 1.0)]
    )
  return counts / max(sum(leaf.codes.size for leaf in leaves), 1)


def entropy(tree: PyTree) -> Array:
  """Order-0 entropy of the codes in bits a weight: what an ideal coder spends.

  `H = sum_l n_l H_l / sum_l n_l`, with `H_l = -sum_c p_c log2 p_c` of layer l.

  Args:
    tree: a Ternary, a PackedTernary, or a tree of them.

  >>> codes = jnp.array([0, 1, 0, -1], jnp.int8)
  >>> float(entropy(Ternary(codes, jnp.ones(()), jnp.ones(()))))
  1.5
  """
  total, weights = jnp.zeros((), jnp.float32), 0
  for leaf in ternary_leaves(tree).values():
    p = code_shares(leaf)
    nats = -jnp.sum(jax.scipy.special.xlogy(p, p))
    total += leaf.codes.size * nats / jnp.log(2.0)
    weights += leaf.codes.size
  return total / max(weights, 1)


def bits_per_weight(tree: PyTree) -> float:
  """Bits that packed weights take in memory, planes and scales, per weight.

  Raises a ValueError if the tree holds no PackedTernary; other leaves are not
  counted.
  """

  def is_packed(node: object) -> bool:
    return isinstance(node, PackedTernary)

  leaves = [
    leaf for leaf in jax.tree.leaves(tree, is_leaf=is_packed) if is_packed(leaf)
  ]
  if not leaves:
    raise ValueError(
      "The tree holds no packed leaf: give what tern_jax.pack returned."
    )
  weights = sum(leaf.size for leaf in leaves)
  return 8 * sum(leaf.nbytes for leaf in leaves) / max(weights, 1)


def entropy_bytes(tree: PyTree) -> float:
  """Bytes of a whole packed model whose codes are stored at their entropy.

  `sum_l n_l H_l / 8`, and the scales and all other leaves as they are: what
  `fit_budget` keeps under its bytes, and `save_packed(codec="entropy")` comes
  to but for its container. The tree is what `tern_jax.pack` returned.

  >>> from tern_jax.storage.packed import pack
  >>> codes, one = jnp.array([0, 1, 0, -1] * 20, jnp.int8), jnp.ones(())
  >>> round(entropy_bytes({"w": pack(Ternary(codes, one, one)), "b": one}), 3)
  27.0
  """
  weights = sum(leaf.codes.size for leaf in ternary_leaves(tree).values())
  planes = sum(
    leaf.nonzero.nbytes + leaf.sign.nbytes
    for leaf in jax.tree.leaves(tree, is_leaf=is_ternary)
    if isinstance(leaf, PackedTernary)
  )
  whole = sum(x.nbytes for x in jax.tree.leaves(tree))
  return whole - planes + float(entropy(tree)) * weights / 8


def flip_rate(before: PyTree, after: PyTree) -> Array:
  """Share of the codes that differ between two discretizations, float32, 0-d.

  Args:
    before: a Ternary, a PackedTernary, or a tree of them.
    after: the same leaves later; a ValueError if they are others.

  >>> ones = jnp.ones(())
  >>> a = Ternary(jnp.array([0, 1, 0, -1], jnp.int8), ones, ones)
  >>> b = Ternary(jnp.array([0, 1, 1, -1], jnp.int8), ones, ones)
  >>> float(flip_rate(a, b))
  0.25
  """
  old, new = same_leaves(before, after), ternary_leaves(after)
  flips = jnp.zeros((), jnp.float32)
  for path, leaf in new.items():
    flips += jnp.sum(leaf.codes != old[path].codes, dtype=jnp.float32)
  return flips / max(sum(leaf.codes.size for leaf in new.values()), 1)


def is_ternary(node: object) -> TypeGuard[Ternary | PackedTernary]:
  """Whether a node of a tree is ternary, packed or not."""
  return isinstance(node, Ternary | PackedTernary)


def same_leaves(before: PyTree, after: PyTree) -> dict[str, Ternary]:
  """Returns the ternary leaves of `before`, which are those of `after`."""
  old, new = ternary_leaves(before), ternary_leaves(after)
  if old.keys() != new.keys():
    raise ValueError(
      "The trees hold different ternary leaves:"
      f" {', '.join(sorted(old.keys() ^ new.keys()))} are in one only."
    )
  return old
