"""What a run is judged by: sparsity, entropy, storage, flips, convergence."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tern_jax.core.containers import Ternary
from tern_jax.core.numerics import reduced_axes, widen
from tern_jax.core.paths import path_str
from tern_jax.core.types import Array
from tern_jax.storage.packed import PackedTernary, to_ternary

#: Last path component of a shift: Flax, NNX and Equinox; Haiku.
SHIFT_NAMES = ("bias", "offset")


def ternary_leaves(tree: Any) -> dict[str, Ternary]:
  """Returns the ternary leaves of a tree by their printed paths.

  Args:
    tree: what `ParamTransform.discretize` or `pack` returned.

  Returns:
    {path: Ternary}, in tree order.

  Raises:
    ValueError: the tree holds no ternary leaf.
  """
  leaves = {
    path_str(path): leaf if isinstance(leaf, Ternary) else to_ternary(leaf)
    for path, leaf in jax.tree_util.tree_leaves_with_path(
      tree, is_leaf=_is_ternary
    )
    if _is_ternary(leaf)
  }
  if not leaves:
    raise ValueError(
      "The tree holds no ternary leaf: give what ParamTransform.discretize"
      " or tern_jax.pack returned."
    )
  return leaves


def sparsity(tree: Any) -> Array:
  """Share of zeros among all ternary weights of a tree.

  Args:
    tree: a Ternary, a PackedTernary, or a tree of them; other leaves are not
      counted.

  Returns:
    float32, 0-d.

  >>> codes = jnp.array([0, 1, 0, -1], jnp.int8)
  >>> float(sparsity(Ternary(codes, jnp.ones(()), jnp.ones(()))))
  0.5
  """
  return code_shares(tree)[1]


def code_shares(tree: Any) -> Array:
  """Shares of the codes -1, 0 and +1 among all ternary weights of a tree.

  Args:
    tree: a Ternary, a PackedTernary, or a tree of them.

  Returns:
    float32 [3], summing to 1.
  """
  leaves = ternary_leaves(tree).values()
  counts = jnp.zeros(3, jnp.float32)
  for leaf in leaves:
    # Summed in float: a count in int32 would overflow on very large leaves.
    codes = leaf.codes.astype(jnp.float32)
    counts += jnp.stack(
      [jnp.sum(codes == c, dtype=jnp.float32) for c in (-1.0, 0.0, 1.0)]
    )
  return counts / max(sum(leaf.codes.size for leaf in leaves), 1)


def entropy(tree: Any) -> Array:
  """Order-0 entropy of the codes: what an ideal coder spends.

  `H = sum_l n_l H_l / sum_l n_l`, with `H_l = -sum_c p_c log2 p_c` of layer l.

  Args:
    tree: a Ternary, a PackedTernary, or a tree of them.

  Returns:
    float32, 0-d, bits a weight.

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


def bits_per_weight(tree: Any) -> float:
  """Bits that packed weights take in memory, planes and scales, per weight.

  Args:
    tree: a PackedTernary or a tree of them; other leaves are not counted.

  Returns:
    8 * bytes / weights.

  Raises:
    ValueError: the tree holds no packed leaf.
  """

  def is_packed(node: Any) -> bool:
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


def entropy_bytes(tree: Any) -> float:
  """Size of a whole packed model whose codes are stored at their entropy.

  `sum_l n_l H_l / 8`, and the scales and all other leaves as they are: what
  `fit_budget` keeps under its bytes, and `save_packed(codec="entropy")` comes
  to but for its container.

  Args:
    tree: what `tern_jax.pack` returned.

  Returns:
    Bytes.

  Raises:
    ValueError: the tree holds no ternary leaf.

  >>> from tern_jax.storage.packed import pack
  >>> codes, one = jnp.array([0, 1, 0, -1] * 20, jnp.int8), jnp.ones(())
  >>> round(entropy_bytes({"w": pack(Ternary(codes, one, one)), "b": one}), 3)
  27.0
  """
  weights = sum(leaf.codes.size for leaf in ternary_leaves(tree).values())
  planes = sum(
    leaf.nonzero.nbytes + leaf.sign.nbytes
    for leaf in jax.tree.leaves(tree, is_leaf=_is_ternary)
    if isinstance(leaf, PackedTernary)
  )
  whole = sum(x.nbytes for x in jax.tree.leaves(tree))
  return whole - planes + float(entropy(tree)) * weights / 8


def storage_score(tree: Any, channel_axis: int = -1) -> int:
  """EC2T's storage score: parameters in 32-bit equivalents, nothing coded.

  `sum_l ceil(bits_l / 32)` over the ternary and the floating arrays, with
  `bits_l` of `storage_bits`: the cheapest of five sparse formats for ternary
  weights, 16 bits for every other number. A vector beside a `bias` or `offset`
  of its own shape is the scale (or a statistic) of a normalization, counted as
  folded: a normalization costs 16 bits a channel.

  Args:
    tree: parameters with Ternary or PackedTernary leaves, as `pack` takes and
      returns them; one that is all floating scores the network at 16 bits.
      Leaves that are no floating arrays are not counted.
    channel_axis: axis of the output channels of every array with two or more:
      -1 for Flax and Haiku, 0 for Equinox.

  Returns:
    Number of 32-bit parameters, on the host.

  Raises:
    ValueError: the tree holds nothing to count, or an array has no such axis.

  >>> codes = jnp.array([[1, -1], [0, 1]], jnp.int8).repeat(32, 0)
  >>> kernel = Ternary(codes, jnp.ones(()), jnp.ones(()))
  >>> norm = {"scale": jnp.ones(2), "bias": jnp.ones(2)}
  >>> storage_score({"dense": {"kernel": kernel}, "norm": norm})
  9

  Source: Marbán, Becking, Wiedemann & Samek, arXiv 2004.01077, "#P" of the
  tables, and the authors' scoring code. As published, the scale of a folded
  normalization is free, though it would make the two magnitudes of a tensor
  two of each channel. Differs from the paper: an input channel is dead if its
  own weights are zero, not if the layer before does not compute it, as a bias
  or a shortcut may still feed it; so biases of dead channels are counted; and
  floating arrays are rounded up too. The released ResNet-20 for CIFAR-10 with
  45.2, 63.9 and 73.3 % zeros score 13,447, 11,808 and 10,995; by the authors'
  rules 13,441, 11,810 and 10,990; published are 13.4K, 11.8K and 11.0K. Zeros
  spread evenly score 13,808, 12,233 and 11,432, as no channel is dead then.
  """
  leaves = {
    path_str(path): leaf
    for path, leaf in jax.tree_util.tree_leaves_with_path(
      tree, is_leaf=_is_ternary
    )
    if _is_ternary(leaf) or _is_floating(leaf)
  }
  if not leaves:
    raise ValueError(
      "The tree holds no ternary leaf and no floating array: give parameters,"
      " with what ParamTransform.discretize or tern_jax.pack returned."
    )

  def folds(path: str, leaf: Any) -> bool:
    folder, slash, name = path.rpartition("/")
    if _is_ternary(leaf) or leaf.ndim != 1 or name in SHIFT_NAMES:
      return False
    shifts = (leaves.get(folder + slash + shift) for shift in SHIFT_NAMES)
    return any(x is not None and x.shape == leaf.shape for x in shifts)

  return sum(
    -(-storage_bits(leaf, channel_axis) // 32)
    for path, leaf in leaves.items()
    if not folds(path, leaf)
  )


def storage_bits(leaf: Any, channel_axis: int = -1) -> int:
  """Fewest bits in which EC2T's score stores one array.

  All-zero input and output channels are dropped. Of N weights left, nz are not
  zero, in M output channels; the s elements of `w_p` and `w_n`, of whichever
  granularity, take 16 bits each. Ternary weights take the fewest bits of

    N + nz + 16 s                   bitmask, and a sign for each non-zero
    2 N + 16 s                      two bitmasks: never fewer
    N + 16 nz                       bitmask, and a value for each non-zero
    17 nz + 16 (M + 1) + 16 s       compressed sparse rows (CSR)
    16 nz + 32 (M + 1) + 16 s       compressed entropy rows (CER)

  and floating arrays min(16 N, N + 16 nz), but vectors 16 N: folding fills the
  zeros of a shift. Indices and row pointers are taken to fit into 16 bits, and
  which channels are left is not counted, as published.

  Args:
    leaf: a Ternary, a PackedTernary, or a floating array of any shape; with
      less than two axes it has no channels to drop, and M = 1.
    channel_axis: axis of the output channels: -1 for Flax and Haiku, 0 for
      Equinox. The input channels lie beside it: before it, or after axis 0.

  Returns:
    Bits, on the host, not rounded to whole parameters.

  Raises:
    TypeError: the leaf is neither ternary nor a floating array.
    ValueError: the array has no such axis.

  >>> codes = jnp.array([[1, 0, -1, 0], [0, 0, 1, 0]], jnp.int8).repeat(8, 0)
  >>> storage_bits(Ternary(codes, jnp.ones(()), jnp.ones(())))
  88
  >>> 16 * 2 + (8 + 8 + 8) + 2 * 16  # two of the four outputs are dead
  88

  Source: Marbán, Becking, Wiedemann & Samek, arXiv 2004.01077, and the
  authors' scoring code, there for the one pair of magnitudes of a tensor, s=2.
  """
  if isinstance(leaf, PackedTernary):
    leaf = to_ternary(leaf)
  if not (ternary := isinstance(leaf, Ternary)) and not _is_floating(leaf):
    raise TypeError(
      "storage_bits takes a Ternary, a PackedTernary or a floating array, got"
      f" {getattr(leaf, 'dtype', type(leaf).__name__)}: score a whole tree by"
      " storage_score."
    )
  nonzero = np.asarray(leaf.codes if ternary else leaf) != 0
  n, m = _live(nonzero, channel_axis)
  nz = int(np.count_nonzero(nonzero))
  if not ternary:
    return 16 * n if nonzero.ndim < 2 else min(16 * n, n + 16 * nz)
  scales = 16 * (leaf.w_p.size + leaf.w_n.size)
  return min(
    n + nz + scales,
    n + 16 * nz,
    17 * nz + 16 * (m + 1) + scales,
    16 * nz + 32 * (m + 1) + scales,
  )


def flip_rate(before: Any, after: Any) -> Array:
  """Share of the codes that differ between two discretizations.

  Args:
    before: a Ternary, a PackedTernary, or a tree of them.
    after: the same leaves later.

  Returns:
    float32, 0-d.

  Raises:
    ValueError: the trees hold different ternary leaves.

  >>> ones = jnp.ones(())
  >>> a = Ternary(jnp.array([0, 1, 0, -1], jnp.int8), ones, ones)
  >>> b = Ternary(jnp.array([0, 1, 1, -1], jnp.int8), ones, ones)
  >>> float(flip_rate(a, b))
  0.25
  """
  old, new = _same_leaves(before, after), ternary_leaves(after)
  flips = jnp.zeros((), jnp.float32)
  for path, leaf in new.items():
    flips += jnp.sum(leaf.codes != old[path].codes, dtype=jnp.float32)
  return flips / max(sum(leaf.codes.size for leaf in new.values()), 1)


def distance_to_ternary(theta: Array) -> Array:
  """How far latents have converged: rms of tanh(Theta) from its nearest code.

  0 for converged weights, at most 1 / 2. Small residuals in many zeros can
  still carry a signal, so judge by the accuracy after rounding too.

  Args:
    theta: float, any shape, latents.

  Returns:
    float32 or wider, 0-d.

  >>> theta = jnp.array([0., 20., jnp.arctanh(.3)])
  >>> round(float(distance_to_ternary(theta)), 4)
  0.1732
  """
  w = jnp.tanh(widen(theta))
  return jnp.sqrt(jnp.mean(jnp.square(w - jnp.round(w))))


def barrier(w: Array, ternary: Ternary) -> Array:
  """Largest magnitude among the weights that are zero once rounded.

  Where a layer has one threshold, the least upper bound of what lies below it,
  whatever the method: no weight lies between the two.

  Args:
    w: float, any shape, continuous weights.
    ternary: what they are rounded to.

  Returns:
    float32 or wider, 0-d, in the unit of w; 0 if no weight is zero.

  >>> one = jnp.ones(())
  >>> codes = Ternary(jnp.array([1, 0, 0, -1], jnp.int8), one, one)
  >>> float(barrier(jnp.array([0.75, 0.25, -0.5, -1.0]), codes))
  0.5
  """
  size = jnp.abs(widen(w))
  return jnp.max(size, where=_codes(ternary, size) == 0, initial=0)


def converged(w: Array, ternary: Ternary, within: float = 0.05) -> Array:
  """Share of the weights that lie within a distance of their codes.

  Args:
    w: float, any shape, continuous weights in the unit of the codes, as for
      `diagnose`.
    ternary: what they are rounded to.
    within: largest distance.

  Returns:
    float32 or wider, 0-d.

  >>> one = jnp.ones(())
  >>> codes = Ternary(jnp.array([1, 0, 0, -1], jnp.int8), one, one)
  >>> float(converged(jnp.array([0.75, 0.0, -0.5, -1.01]), codes))
  0.5
  """
  w = widen(w)
  near = jnp.abs(w - _codes(ternary, w)) <= within
  return jnp.mean(near, dtype=w.dtype)


def zeros_rms(w: Array, ternary: Ternary) -> Array:
  """Root mean square of the weights that are zero once rounded.

  The signal that rounding takes away: 0 for converged weights.

  Args:
    w: float, any shape, continuous weights.
    ternary: what they are rounded to.

  Returns:
    float32 or wider, 0-d, in the unit of w; 0 if no weight is zero.

  >>> one = jnp.ones(())
  >>> codes = Ternary(jnp.array([1, 0, 0, -1], jnp.int8), one, one)
  >>> float(zeros_rms(jnp.array([0.75, 3.0, -4.0, -1.0]), codes) ** 2)
  12.5
  """
  w = widen(w)
  zero = _codes(ternary, w) == 0
  count = jnp.maximum(jnp.sum(zero, dtype=w.dtype), 1)
  return jnp.sqrt(jnp.sum(jnp.square(w), where=zero) / count)


def diagnose(
  weights: Any, ternary: Any, before: Any = None
) -> dict[str, dict[str, Array]]:
  """How the weights of each layer come to their codes; pure, to be jitted.

  The continuous weights are in the unit of the codes, where rounded weights
  are -1, 0 and 1: `tanh(Theta)` for SCA; for the others, whose latents need
  not come to rest there, latents over the magnitude of the ternary weights.

  Args:
    weights: a tree with the structure of ternary, or {path: array}, in the unit
      of the codes; float where ternary has a ternary leaf.
    ternary: what they are rounded to, from `ParamTransform.discretize`.
    before: the same some steps earlier; None leaves out the flip rate.

  Returns:
    {path: {"sparsity", "entropy", "barrier", "converged", "zeros_rms",
    "flip_rate"}}, each of the function of that name, 0-d.

  Raises:
    ValueError: a ternary leaf has no continuous weights, or `before` holds
      other leaves.

  >>> one = jnp.ones(())
  >>> codes = Ternary(jnp.array([1, 0, 0, -1], jnp.int8), one, one)
  >>> theta = jnp.array([20.0, 0.0, -0.5, -2.0])
  >>> layer = diagnose({"w": jnp.tanh(theta)}, {"w": codes})["w"]
  >>> {name: round(float(value), 3) for name, value in layer.items()}
  {'sparsity': 0.5, 'entropy': 1.5, 'barrier': 0.462, 'converged': 0.75, \
'zeros_rms': 0.327}
  """
  leaves = ternary_leaves(ternary)
  old = {} if before is None else _same_leaves(before, ternary)
  found = {
    path_str(path): w
    for path, w in jax.tree_util.tree_leaves_with_path(weights)
  }
  if missing := leaves.keys() - found.keys():
    raise ValueError(
      f"No continuous weights for {', '.join(sorted(missing))}: give a tree of"
      " the same structure, such as jax.tree.map(jnp.tanh, params.latent)."
    )

  def layer(path: str, leaf: Ternary) -> dict[str, Array]:
    w = found[path]
    measured = {
      "sparsity": sparsity(leaf),
      "entropy": entropy(leaf),
      "barrier": barrier(w, leaf),
      "converged": converged(w, leaf),
      "zeros_rms": zeros_rms(w, leaf),
    }
    if old:
      measured["flip_rate"] = flip_rate(old[path], leaf)
    return measured

  return {path: layer(path, leaf) for path, leaf in leaves.items()}


def _codes(ternary: Ternary, like: Array) -> Array:
  """Returns codes in the dtype of the weights that they are compared with."""
  return ternary.codes.astype(like.dtype)


def _is_ternary(node: Any) -> bool:
  return isinstance(node, Ternary | PackedTernary)


def _same_leaves(before: Any, after: Any) -> dict[str, Ternary]:
  """Returns the ternary leaves of `before`, which are those of `after`."""
  old, new = ternary_leaves(before), ternary_leaves(after)
  if old.keys() != new.keys():
    raise ValueError(
      "The trees hold different ternary leaves:"
      f" {', '.join(sorted(old.keys() ^ new.keys()))} are in one only."
    )
  return old


def _is_floating(node: Any) -> bool:
  return isinstance(node, jax.Array | np.ndarray) and jnp.issubdtype(
    node.dtype, jnp.floating
  )


def _live(nonzero: Any, channel_axis: int) -> tuple[int, int]:
  """Counts the weights and the outputs left without all-zero channels."""
  if nonzero.ndim < 2:
    return nonzero.size, 1
  sizes = list(nonzero.shape)

  def drop_dead(axis: int) -> None:
    alive = nonzero.any(reduced_axes(nonzero, axis))
    sizes[axis] = int(np.count_nonzero(alive))

  drop_dead(channel_axis)
  out = channel_axis % nonzero.ndim
  drop_dead(out - 1 if out else 1)
  return math.prod(sizes), sizes[out]
