"""Products and look-ups of views of packed weights."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from tern_jax.core.containers import Ternary, aligned
from tern_jax.core.types import Array
from tern_jax.inference.multiply import dot
from tern_jax.inference.prepared import prepared_of
from tern_jax.inference.views import Part, View, arranged, parts_of
from tern_jax.storage.packed import PackedTernary, to_ternary

#: Dtypes of products.
FLOATS = {jnp.dtype(x) for x in ("float32", "bfloat16", "float16")}
Axes = Sequence[int]


def inputs_of(view: View, axes: Axes) -> tuple[int, ...] | None:
  """Returns the packed axes of which axes of a view consist.

  None if they are not whole, or the weights are a vector, or laid out for other
  sums.
  """
  packed = view.packed
  if len(packed.shape) < 2:
    return None
  parts = [part for axis in axes for part in view.dims[axis]]
  inputs = tuple(sorted({part.axis for part in parts}))
  whole = math.prod(packed.shape[i] for i in inputs)
  if not inputs or math.prod(part.size for part in parts) != whole:
    return None
  if isinstance(packed, PackedTernary):
    return inputs
  # Axes of one element may be summed over or not.
  long = tuple(i for i in packed.inputs if packed.layer[i] > 1)
  return packed.inputs if inputs == long and not packed.lead else None


def multiply(x: Array, view: View, axes: Axes, dtype: Any) -> Array | None:
  """Sums products of an array and of packed weights over axes of these.

  Args:
    x: [*batch, *axes].
    view: weights.
    axes: of the view, in the order in which x has them.
    dtype: of the product.

  Returns:
    [*batch, *others], with the other axes of the view; None if the weights have
    no product of this kind.
  """
  inputs = inputs_of(view, axes)
  dtypes = {jnp.dtype(d) for d in (x.dtype, view.dtype, dtype)}
  if inputs is None or not dtypes <= FLOATS:
    return None
  wide = dtypes.pop() if len(dtypes) == 1 else jnp.dtype("float32")
  packed = view.rescaled(lambda w: w.astype(wide)).packed
  if isinstance(packed, PackedTernary) and not _is_matrix(packed, inputs):
    packed = prepared_of(to_ternary(packed), inputs, "fields", "float32")
  batch = x.shape[: x.ndim - len(axes)]
  dims = [view.dims[axis] for axis in axes]
  parts = [part for dim in dims for part in dim]
  x = x.reshape(*batch, *(part.size for part in parts))
  merged = [
    tuple(p for p in parts_of(dims) if p.axis == axis) for axis in inputs
  ]
  y = dot(arranged(x.astype(wide), parts, merged), packed)
  rest = [dim for i, dim in enumerate(view.dims) if i not in axes]
  parts = parts_of(rest)
  y = y.reshape(*batch, *(part.size for part in parts))
  return arranged(y, parts, rest).astype(dtype)


def _is_matrix(packed: PackedTernary, inputs: Axes) -> bool:
  """Whether `dot` takes packed weights as they are."""
  return inputs == (0,) and (packed.lead == 0 or len(packed.shape) == 2)


def multiply_stack(
  x: Array, view: View, axes: Axes, dtype: Any
) -> Array | None:
  """Multiplies each layer of a stack by its own part of x.

  Args:
    x: [layers, *batch, *axes].
    view: stack of layers.
    axes: of a layer.
    dtype: of the product.

  Returns:
    [layers, *batch, *others], or None.
  """
  if multiply(x[0], view.first(), axes, dtype) is None:
    return None
  return jax.vmap(lambda x, w: multiply(x, view.layer(w), axes, dtype))(
    x, view.stack()
  )


def rows(view: View, index: Array) -> Array | None:
  """Returns weights of some indices along the first axis, unpacked alone.

  Args:
    view: weights.
    index: int, any shape, all within the axis.

  Returns:
    [*index, *others], or None if that needs all weights.
  """
  packed = view.packed
  dims, parts = view.dims[1:], parts_of(view.dims[1:])
  if not isinstance(packed, PackedTernary) or view.dims[0] != (
    Part(0, 1, packed.shape[0]),
  ):
    return None
  # Bits of flattened weights are counted in int32.
  if packed.size > 2**31 - 1 or (packed.lead and not view.is_stack):
    return None
  found = _rows(view, index).dequantize()
  found = found.reshape(*index.shape, *(part.size for part in parts))
  return arranged(found, parts, dims)


def _rows(view: View, index: Array) -> PackedTernary | Ternary:
  packed: Any = view.packed
  shape = packed.shape
  if view.is_stack:
    return jax.tree.map(lambda a: a[index], view.stack())
  rest = (1,) * (len(shape) - 1)
  if packed.axis == 0:
    at, bit = index >> 3, (index & 7).reshape(*index.shape, *rest)
  else:
    size = math.prod(shape[1:])
    within = jnp.arange(size, dtype=index.dtype).reshape(shape[1:])
    first = (index * size).reshape(*index.shape, *rest)
    flat = first + within.reshape((1,) * index.ndim + within.shape)
    at, bit = flat >> 3, flat & 7
  # All arithmetic is int32: XLA:CPU miscompiles some fused int8 maths.
  nonzero, sign = (
    (plane[at].astype(jnp.int32) >> bit.astype(jnp.int32)) & 1
    for plane in (packed.nonzero, packed.sign)
  )
  codes = (nonzero * (1 - 2 * sign)).astype(jnp.int8)
  w_p, w_n = (_rows_of_scale(w, shape, index) for w in (packed.w_p, packed.w_n))
  return Ternary(codes, w_p, w_n)


def _rows_of_scale(w: Array, shape: Axes, index: Array) -> Array:
  """Returns the scales of rows, of the rank of the rows."""
  w = aligned(w, tuple(shape))
  w = w.reshape((1,) * (len(shape) - w.ndim) + w.shape)
  if w.shape[0] == 1:
    return w.reshape((1,) * (index.ndim - 1) + w.shape) if index.ndim else w[0]
  return w[index // (shape[0] // w.shape[0])]
