"""Ternary weights at 2 bits each: two bit-planes and two scales.

`pack` turns the `Ternary` leaves of any tree into `PackedTernary` leaves,
`unpack` turns those into dense arrays. Both are exact and run under `jax.jit`.
"""

import dataclasses
import math
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from tern_jax.core.checks import concrete
from tern_jax.core.containers import Ternary
from tern_jax.core.paths import path_str
from tern_jax.core.types import Array, KeyPath, PyTree


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PackedTernary:
  """Ternary weights as two bit-planes, "is not zero" and "is negative".

  Bit j, least significant first, of byte k along `axis` belongs to the element
  8 k + j along that axis:

    code = nonzero · (1 − 2 sign),  as in np.packbits(bitorder="little").

  The other axes of a plane are those of the weights, so a sharding of the
  weights over them is a sharding of the planes. A shape without an axis to
  pack is flattened first.

  Invariants, which `validate` checks:
    - `axis` is the first axis of `shape` whose size is a positive multiple of
      8; None if there is none;
    - the planes are uint8 of shape `shape` with `shape[axis] // 8` in place of
      `shape[axis]`, or of shape `[ceil(size / 8)]` if `axis` is None;
    - no bit of `sign` is set where that of `nonzero` is not;
    - the bits beyond the last element are zero;
    - the scales are floating, of one dtype, and each of their axis lengths
      divides that of `shape`, as in `Ternary`.

  Args:
    nonzero: uint8 bit-plane, set where the weight is not zero.
    sign: uint8 bit-plane, set where the weight is negative.
    w_p: float, magnitude of the +1 weights, as in `Ternary`.
    w_n: float, magnitude of the -1 weights.
    shape: of the weights.
    axis: of the weights that is packed, None if they are flattened.

  >>> codes = jnp.array([1, 0, -1, 0, 0, 0, 0, 1], jnp.int8)
  >>> packed = pack(Ternary(codes, jnp.array(2.0), jnp.array(3.0)))
  >>> packed.nonzero.tolist(), packed.sign.tolist(), packed.nbytes
  ([133], [4], 10)
  >>> packed.dequantize().tolist()
  [2.0, 0.0, -3.0, 0.0, 0.0, 0.0, 0.0, 2.0]
  """

  nonzero: Array
  sign: Array
  w_p: Array
  w_n: Array
  shape: tuple[int, ...] = dataclasses.field(metadata={"static": True})
  axis: int | None = dataclasses.field(metadata={"static": True})

  @property
  def dtype(self) -> np.dtype:
    """Dtype of the dense weights."""
    return self.w_p.dtype

  @property
  def size(self) -> int:
    """Number of weights."""
    return math.prod(self.shape)

  @property
  def nbytes(self) -> int:
    """Bytes of the planes and the scales."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(self))

  def dequantize(self) -> Array:
    """Returns the dense weights, of the given shape and the dtype of w_p."""
    return to_ternary(self).dequantize()


def pack(tree: PyTree) -> PyTree:
  """Packs the ternary leaves of a tree; other leaves pass through unchanged.

  Args:
    tree: any pytree with `Ternary` leaves, or one `Ternary`.

  Raises:
    TypeError: codes are not int8.
    ValueError: scales are not floating of one dtype or do not divide the
      codes, or codes outside {-1, 0, 1}; traced codes are not looked at.

  >>> codes = jnp.ones((16, 3), jnp.int8)
  >>> tree = {"kernel": Ternary(codes, jnp.array(1.0), jnp.array(1.0))}
  >>> packed = pack(tree)["kernel"]
  >>> packed.nonzero.shape, packed.shape, packed.axis
  ((2, 3), (16, 3), 0)
  """

  def leaf(path: KeyPath, x: PyTree) -> PyTree:
    if not isinstance(x, Ternary):
      return x
    _check_ternary(path_str(path) or "the leaf", x)
    axis = packed_axis(x.shape)
    # All arithmetic is int32: XLA:CPU miscompiles some fused int8 maths.
    codes = jnp.asarray(x.codes).astype(jnp.int32)
    planes = _pack_bits(codes != 0, axis), _pack_bits(codes < 0, axis)
    return PackedTernary(*planes, x.w_p, x.w_n, codes.shape, axis)

  return jax.tree_util.tree_map_with_path(
    leaf, tree, is_leaf=lambda x: isinstance(x, Ternary)
  )


def unpack(tree: PyTree) -> PyTree:
  """Expands the packed leaves of a tree to dense weights.

  They equal `Ternary.dequantize` bit for bit; other leaves pass through.

  Args:
    tree: any pytree with `PackedTernary` leaves, or one `PackedTernary`.

  >>> codes = jnp.array([[1, -1], [0, 1]], jnp.int8)
  >>> packed = pack(Ternary(codes, jnp.array(2.0), jnp.array(0.5)))
  >>> unpack(packed).tolist()
  [[2.0, -0.5], [0.0, 2.0]]
  """
  return jax.tree.map(
    lambda x: x.dequantize() if _is_packed(x) else x, tree, is_leaf=_is_packed
  )


def to_ternary(packed: PackedTernary) -> Ternary:
  """Returns the codes and scales of packed weights; the inverse of `pack`."""
  nonzero = _unpack_bits(packed.nonzero, packed.shape, packed.axis)
  sign = _unpack_bits(packed.sign, packed.shape, packed.axis)
  codes = (nonzero * (1 - 2 * sign)).astype(jnp.int8)
  return Ternary(codes, packed.w_p, packed.w_n)


def validate(tree: PyTree) -> None:
  """Checks the invariants of every packed leaf of a tree of concrete arrays.

  Raises:
    ValueError: a leaf breaks an invariant; names the leaf and what is wrong.

  >>> good = pack(Ternary(jnp.ones(8, jnp.int8), jnp.ones(()), jnp.ones(())))
  >>> validate(good)
  >>> validate({"w": dataclasses.replace(good, nonzero=jnp.zeros(1, jnp.uint8),
  ...                                    sign=jnp.ones(1, jnp.uint8))})
  Traceback (most recent call last):
  ValueError: w: 1 sign bits are set where the weight is zero.
  """
  for path, x in jax.tree_util.tree_leaves_with_path(tree, is_leaf=_is_packed):
    if _is_packed(x) and (wrong := "; ".join(_faults(x))):
      raise ValueError(f"{path_str(path) or 'the leaf'}: {wrong}.")


def _is_packed(x: object) -> bool:
  return isinstance(x, PackedTernary)


def packed_axis(shape: tuple[int, ...]) -> int | None:
  """Returns the axis of weights of a shape that is packed, None if none is."""
  return next((i for i, n in enumerate(shape) if n and n % 8 == 0), None)


def plane_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
  """Returns the shape of a plane of weights of a shape."""
  axis = packed_axis(shape)
  if axis is None:
    return (-(-math.prod(shape) // 8),)
  return (*shape[:axis], shape[axis] // 8, *shape[axis + 1 :])


def _pack_bits(bits: Array, axis: int | None) -> Array:
  if axis is None:
    bits = jnp.pad(bits.reshape(-1), (0, -bits.size % 8))
    axis = 0
  # The axis is split in place, not moved, and so keeps its sharding.
  before, n, after = bits.shape[:axis], bits.shape[axis], bits.shape[axis + 1 :]
  bits = bits.reshape(*before, n // 8, 8, *after).astype(jnp.int32)
  byte = jnp.sum(bits << _shifts(bits.ndim, axis + 1), axis + 1)
  return byte.astype(jnp.uint8)


def _unpack_bits(plane: Array, shape: tuple, axis: int | None) -> Array:
  at = (axis or 0) + 1
  byte = jnp.expand_dims(jnp.asarray(plane).astype(jnp.int32), at)
  bits = (byte >> _shifts(byte.ndim, at)) & 1
  if axis is None:
    bits = bits.reshape(-1)[: math.prod(shape)]
  return bits.reshape(shape)


def _shifts(ndim: int, axis: int) -> Array:
  shape = tuple(8 if i == axis else 1 for i in range(ndim))
  return jax.lax.broadcasted_iota(jnp.int32, shape, axis)


def _check_ternary(name: str, t: Ternary) -> None:
  if t.codes.dtype != jnp.int8:
    hint = "use codes.astype(jnp.int8)"
    raise TypeError(f"{name}: codes must be int8, got {t.codes.dtype}: {hint}.")
  if wrong := "; ".join(_scale_faults(t.w_p, t.w_n, t.codes.shape)):
    raise ValueError(f"{name}: {wrong}.")
  if concrete(t.codes):
    codes = jnp.asarray(t.codes).astype(jnp.int32)
    if not jnp.all(jnp.abs(codes) <= 1):
      got = f"values from {codes.min()} to {codes.max()}"
      hint = f"got {got}: discretize the weights first"
      raise ValueError(f"{name}: codes must be -1, 0 or 1, {hint}.")


def _scale_faults(w_p: Array, w_n: Array, shape: tuple) -> Iterator[str]:
  for name, w in (("w_p", w_p), ("w_n", w_n)):
    if not jnp.issubdtype(w.dtype, jnp.floating):
      yield f"{name} must be floating, got {w.dtype}"
    pairs = zip(w.shape[::-1], shape[::-1], strict=False)
    divides = all(m % n == 0 if n else m == 0 for n, m in pairs)
    if len(w.shape) > len(shape) or not divides:
      whole = f"weights of shape {shape}"
      yield f"{name} of shape {w.shape} does not divide {whole}"
  if w_p.dtype != w_n.dtype:
    yield f"w_p is {w_p.dtype}, but w_n is {w_n.dtype}"


def _faults(x: PackedTernary) -> Iterator[str]:
  yield from _scale_faults(x.w_p, x.w_n, x.shape)
  axis, wanted = packed_axis(x.shape), plane_shape(x.shape)
  wrong = []
  if x.axis != axis:
    wrong.append(f"axis must be {axis} for shape {x.shape}, got {x.axis}")
  for name, plane in (("nonzero", x.nonzero), ("sign", x.sign)):
    if plane.dtype != jnp.uint8 or plane.shape != wanted:
      found = f"{plane.dtype}{list(plane.shape)}"
      wrong.append(f"{name} must be uint8{list(wanted)}, got {found}")
  if wrong:
    yield from wrong
    return
  nonzero, sign = np.asarray(x.nonzero), np.asarray(x.sign)
  if stray := int(np.bitwise_count(sign & ~nonzero).sum()):
    yield f"{stray} sign bits are set where the weight is zero"
  if axis is None and x.size % 8 and (nonzero | sign)[-1] >> x.size % 8:
    yield "bits are set beyond the last weight"
