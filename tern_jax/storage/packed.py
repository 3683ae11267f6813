"""Ternary weights at 2 bits each: two bit-planes and two scales.

`pack` turns the `Ternary` leaves of any tree into `PackedTernary` leaves,
`unpack` turns those into dense arrays. Both are exact and run under `jax.jit`.
"""

import dataclasses
import math
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tern_jax.core.checks import concrete
from tern_jax.core.containers import Ternary, TernParams, aligned, own
from tern_jax.core.interop import serializable
from tern_jax.core.numerics import whole
from tern_jax.core.paths import path_str
from tern_jax.core.printing import weights_repr
from tern_jax.core.select import Kernels
from tern_jax.core.types import Array, KeyPath, PyTree
from tern_jax.storage.layout import (
  lead_of,
  packed_axis,
  plane_shape,
  relaid_plane,
  scale_fault,
)
from tern_jax.storage.operators import Matrix


@serializable
@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True, repr=False)
class PackedTernary(Matrix):
  """Ternary weights as two bit-planes, "is not zero" and "is negative".

  Bit j, least significant first, of byte k along `axis` belongs to the element
  8 k + j along that axis:

    code = nonzero · (1 − 2 sign),  as in np.packbits(bitorder="little").

  The other axes of a plane are those of the weights, so a sharding of the
  weights over them is a sharding of the planes. A shape without an axis to
  pack is flattened first.

  The leading axes of a stack of layers are neither packed nor flattened if each
  layer has scales of its own, as with `ParamTransform(stacked=...)`. They come
  and go with those of the arrays: under `lax.scan`, `jax.vmap` and `jax.pmap`,
  `jax.tree.map(lambda x: x[i], packed)` and `jax.tree.map(stack, *layers)`, the
  shape is that of what is there. All other axes are static. A stack with one
  scale for all layers cannot be taken apart: make it with `stacked`.

  Invariants, which `validate` checks:
    - `axis` is the first axis of `shape`, behind those of a stack, whose size
      is a positive multiple of 8; None if there is none;
    - the planes are uint8 of shape `shape` with `shape[axis] // 8` in place of
      `shape[axis]`, or, if `axis` is None, with `ceil(size / 8)` of a layer in
      place of its axes;
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

  A matrix [in, out] multiplies arrays as x @ packed and packed @ y; many times
  faster after `tern_jax.inference.prepare`.
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

  @property
  def lead(self) -> int:
    """Number of leading axes that are neither packed nor flattened."""
    if self.axis is not None:
      return self.axis
    return min(max(len(_dims(self.nonzero)) - 1, 0), len(self.shape))

  def dequantize(self) -> Array:
    """Returns the dense weights, of the given shape and the dtype of w_p."""
    return to_ternary(self).dequantize()

  def tree_flatten_with_keys(self) -> tuple[list[tuple], tuple[int, ...]]:
    """Tells JAX the arrays, and the part of the shape that is static."""
    names = ("nonzero", "sign", "w_p", "w_n")
    keys = map(jax.tree_util.GetAttrKey, names)
    arrays = (getattr(self, name) for name in names)
    return list(zip(keys, arrays, strict=True)), self.shape[self.lead :]

  @classmethod
  def tree_unflatten(
    cls, static: tuple[int, ...], arrays: Iterable[Array]
  ) -> "PackedTernary":
    """Returns the weights of arrays, which may have other leading axes."""
    nonzero, *rest = arrays
    lead = max(0, len(_dims(nonzero)) - len(plane_shape(static)))
    shape = (*_dims(nonzero)[:lead], *static)
    return cls(nonzero, *rest, shape=shape, axis=packed_axis(shape, lead))

  def __repr__(self) -> str:
    """Prints what the weights are on one line, and none of their values."""
    fields = dataclasses.fields(self)[:4]
    arrays = {field.name: getattr(self, field.name) for field in fields}
    fits = _dims(self.nonzero) == plane_shape(self.shape, self.lead)
    count = _count_bits if fits else None
    return weights_repr("PackedTernary", self.shape, arrays, count)


def pack(tree: PyTree) -> PyTree:
  """Packs the ternary leaves of a tree; other leaves pass through unchanged.

  Args:
    tree: any pytree with `Ternary` leaves, or one `Ternary`.

  Raises:
    TypeError: codes are not int8, or latents are given.
    ValueError: kernels are there, but none is ternary; scales are not floating
      of one dtype or do not divide the codes, or codes outside {-1, 0, 1};
      traced codes are not looked at.

  >>> codes = jnp.ones((16, 3), jnp.int8)
  >>> tree = {"kernel": Ternary(codes, jnp.array(1.0), jnp.array(1.0))}
  >>> packed = pack(tree)["kernel"]
  >>> packed.nonzero.shape, packed.shape, packed.axis
  ((2, 3), (16, 3), 0)
  """
  check_is_ternary("pack", tree)

  def leaf(path: KeyPath, x: PyTree) -> PyTree:
    if not isinstance(x, Ternary):
      return x
    name = path_str(path) or "the leaf"
    _check_ternary(name, x)
    codes = jnp.asarray(x.codes)
    # Methods may use one array for both scales, and for what they train.
    w_p, w_n = (own(aligned(w, codes.shape)) for w in (x.w_p, x.w_n))
    lead = lead_of(codes.shape, w_p, w_n)
    # All arithmetic is int32: XLA:CPU miscompiles some fused int8 maths.
    codes = codes.astype(jnp.int32)
    nonzero, sign = _pack_bits(codes != 0, lead), _pack_bits(codes < 0, lead)
    axis = packed_axis(codes.shape, lead)
    return PackedTernary(nonzero, sign, w_p, w_n, codes.shape, axis)

  return jax.tree_util.tree_map_with_path(
    leaf, tree, is_leaf=lambda x: isinstance(x, Ternary)
  )


def check_is_ternary(caller: str, tree: PyTree) -> None:
  """Raises if a tree has latents, or kernels of which none is ternary."""
  nodes = Ternary, PackedTernary, TernParams
  found = jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, nodes))
  hint = "ternary weights are what tern.finalize(params, state) returns"
  if any(isinstance(x, TernParams) for x in found):
    raise TypeError(f"{caller} got TernParams, which are latents: {hint}.")
  if any(isinstance(x, nodes) for x in found):
    return
  if floating := sorted(Kernels().chosen(tree)):
    raise ValueError(
      f"{caller} got no ternary weights, but float ones, {floating[0]} for"
      f" example: {hint}."
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
  """Returns the codes and scales of packed weights; the inverse of `pack`.

  Raises:
    ValueError: the planes are not those of the shape.
  """
  wanted = plane_shape(packed.shape, packed.lead)
  for plane in (packed.nonzero, packed.sign):
    if plane.shape != wanted:
      raise ValueError(
        f"planes of shape {plane.shape} are not those of weights of shape"
        f" {packed.shape}, packed along axis {packed.axis}, which are {wanted}:"
        " only leading axes can be added or taken off, all others are static."
        " Unpack first, or give planes of another shape by"
        " dataclasses.replace(packed, shape=..., axis=...)."
      )
  nonzero = _unpack_bits(packed.nonzero, packed.shape, packed.axis)
  sign = _unpack_bits(packed.sign, packed.shape, packed.axis)
  codes = (nonzero * (1 - 2 * sign)).astype(jnp.int8)
  return Ternary(codes, packed.w_p, packed.w_n)


def stored(x: PackedTernary) -> PackedTernary:
  """Returns weights on the host as files have them: packed as one whole."""
  w_p, w_n = (aligned(w, x.shape) for w in (x.w_p, x.w_n))
  return relaid(dataclasses.replace(x, w_p=w_p, w_n=w_n), 0)


def relaid(x: PackedTernary, lead: int) -> PackedTernary:
  """Returns weights on the host, packed behind other leading axes."""
  layout: dict[str, Any] = {
    name: relaid_plane(getattr(x, name), x.shape, x.axis, lead)
    for name in ("nonzero", "sign")
  }
  axis = packed_axis(x.shape, lead)
  return dataclasses.replace(x, **layout, axis=axis)


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


def _dims(x: object) -> tuple[int, ...]:
  """Returns the shape of an array, () of anything else in its place."""
  shape = getattr(x, "shape", ())
  return shape if isinstance(shape, tuple) else ()


def _count_bits(plane: np.ndarray) -> np.integer:
  return np.bitwise_count(plane).sum(dtype=np.int64)


def _pack_bits(bits: Array, lead: int) -> Array:
  axis = packed_axis(bits.shape, lead)
  bits = whole(bits, range(lead, bits.ndim) if axis is None else (axis,))
  if axis is None:
    axis, size = lead, math.prod(bits.shape[lead:])
    bits = bits.reshape(*bits.shape[:lead], size)
    bits = jnp.pad(bits, [(0, 0)] * axis + [(0, -size % 8)])
  # The axis is split in place, not moved, and so keeps its sharding.
  before, n, after = bits.shape[:axis], bits.shape[axis], bits.shape[axis + 1 :]
  bits = bits.reshape(*before, n // 8, 8, *after).astype(jnp.int32)
  byte = jnp.sum(bits << _shifts(bits.ndim, axis + 1), axis + 1)
  return byte.astype(jnp.uint8)


def _unpack_bits(plane: Array, shape: tuple, axis: int | None) -> Array:
  at = plane.ndim if axis is None else axis + 1
  byte = jnp.expand_dims(jnp.asarray(plane).astype(jnp.int32), at)
  bits = (byte >> _shifts(byte.ndim, at)) & 1
  if axis is None:
    flat = (*plane.shape[:-1], 8 * plane.shape[-1])
    bits = bits.reshape(flat)[..., : math.prod(shape[plane.ndim - 1 :])]
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
  for field, w in (("w_p", t.w_p), ("w_n", t.w_n)):
    if concrete(w) and not jnp.all(jnp.isfinite(w)):
      raise ValueError(
        f"{name}: {field} is NaN or infinite: the training has diverged, or the"
        f" magnitudes do not fit {w.dtype}."
      )
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
    if fault := scale_fault(name, w, shape):
      yield fault
  if w_p.dtype != w_n.dtype:
    yield f"w_p is {w_p.dtype}, but w_n is {w_n.dtype}"


def _faults(x: PackedTernary) -> Iterator[str]:
  yield from _scale_faults(x.w_p, x.w_n, x.shape)
  # A layout that no plane has is a false one: they must be those of a whole.
  fits = plane_shape(x.shape, x.lead) in (x.nonzero.shape, x.sign.shape)
  lead = x.lead if fits and x.axis == packed_axis(x.shape, x.lead) else 0
  axis, wanted = packed_axis(x.shape, lead), plane_shape(x.shape, lead)
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
  beyond = math.prod(x.shape[lead:]) % 8
  if axis is None and beyond and np.any((nonzero | sign)[..., -1] >> beyond):
    yield "bits are set beyond the last weight"
