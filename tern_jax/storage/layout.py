"""Where the bits of packed weights lie: which axis is packed, and of what.

A plane packs the layers of a stack one by one: behind a number of leading axes,
`lead`, it is the plane of one layer. Files have planes of the whole, lead 0.
"""

import math

import numpy as np

from tern_jax.core.containers import aligned
from tern_jax.core.types import Array

Shape = tuple[int, ...]


def packed_axis(shape: Shape, lead: int = 0) -> int | None:
  """Returns the axis that is packed behind leading ones, None if none is."""
  axes = range(lead, len(shape))
  return next((i for i in axes if shape[i] and shape[i] % 8 == 0), None)


def plane_shape(shape: Shape, lead: int = 0) -> Shape:
  """Returns the shape of a plane of weights of a shape.

  >>> plane_shape((3, 16, 5)), plane_shape((3, 5)), plane_shape((8, 3, 5), 1)
  ((3, 2, 5), (2,), (8, 2))
  """
  axis = packed_axis(shape, lead)
  if axis is None:
    return (*shape[:lead], -(-math.prod(shape[lead:]) // 8))
  return (*shape[:axis], shape[axis] // 8, *shape[axis + 1 :])


def lead_of(shape: Shape, *scales: Array | np.ndarray) -> int:
  """Returns how many leading axes are those of a stack, and never packed.

  They are the ones along which each index has scales of its own, since only
  these can be taken off planes and scales alike, by `lax.scan` or indexing.

  >>> lead_of((8, 16, 4), np.ones((8, 1, 1))), lead_of((8, 4), np.ones(()))
  (1, 0)
  """
  lead = 0
  while lead < len(shape) - 1 and all(
    len(s.shape) == len(shape) and s.shape[lead] == shape[lead] for s in scales
  ):
    lead += 1
  return lead


def relaid_plane(
  plane: Array, shape: Shape, axis: int | None, lead: int
) -> Array | np.ndarray:
  """Returns a plane on the host, packed behind other leading axes."""
  to = packed_axis(shape, lead)
  if to == axis and plane.shape == plane_shape(shape, lead):
    return plane
  if axis is not None and to is not None:
    return _packed_along(np.asarray(plane), axis, to)
  return _pack(_unpack(plane, shape, axis), to, lead)


def _packed_along(plane: np.ndarray, axis: int, to: int) -> np.ndarray:
  """Returns a plane packed along another axis, both multiples of 8 weights.

  Bit j of byte i becomes bit i of byte j, in squares of 8 by 8 bits: twenty
  times as fast as with a byte for each bit.

  Source: Warren, "Hacker's Delight", 2nd edition, section 7-3.
  """
  *before, n = plane.shape[: to + 1]
  rows = plane.reshape(*before, n // 8, 8, *plane.shape[to + 1 :])
  x = np.ascontiguousarray(np.moveaxis(rows, to + 1, -1)).view("<u8")[..., 0]
  for shift, mask in (
    (7, 0x00AA00AA00AA00AA),
    (14, 0x0000CCCC0000CCCC),
    (28, 0x00000000F0F0F0F0),
  ):
    moved = (x ^ (x >> np.uint64(shift))) & np.uint64(mask)
    x = x ^ moved ^ (moved << np.uint64(shift))
  words = x.astype("<u8", copy=False)[..., None]
  columns = np.moveaxis(words.view(np.uint8), -1, axis + 1)
  *before, n, eight = columns.shape[: axis + 2]
  return columns.reshape(*before, n * eight, *columns.shape[axis + 2 :])


def _unpack(plane: Array, shape: Shape, axis: int | None) -> np.ndarray:
  at = plane.ndim - 1 if axis is None else axis
  count = math.prod(shape[at:]) if axis is None else shape[at]
  bits = np.unpackbits(
    np.asarray(plane), axis=at, count=count, bitorder="little"
  )
  return bits.reshape(shape)


def _pack(bits: np.ndarray, axis: int | None, lead: int) -> np.ndarray:
  if axis is None:
    layer = math.prod(bits.shape[lead:])
    bits, axis = bits.reshape(*bits.shape[:lead], layer), lead
  return np.packbits(bits, axis=axis, bitorder="little")


def trailing(scale: Array, shape: Shape) -> Array:
  """Gives scales of the last axes of weights, as files have them, their rank.

  Only those that `aligned` would take for scales of the first axes change.
  """
  ndim = scale.ndim
  if 0 < ndim < len(shape) and scale.shape == shape[:ndim]:
    return scale.reshape((1,) * (len(shape) - ndim) + scale.shape)
  return scale


def scale_fault(name: str, scale: Array, shape: Shape) -> str:
  """Returns what is wrong with the shape of a scale, "" if nothing is."""
  whole = f"weights of shape {shape}"
  try:
    dims = aligned(scale, shape).shape
  except ValueError as error:
    return f"{name}: {str(error).removesuffix('.')}"
  pairs = zip(dims[::-1], shape[::-1], strict=False)
  divides = all(m % n == 0 if n else m == 0 for n, m in pairs)
  if len(dims) > len(shape) or not divides:
    return f"{name} of shape {scale.shape} does not divide {whole}"
  return ""
