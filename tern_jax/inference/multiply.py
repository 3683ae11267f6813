"""Products of float arrays and packed ternary weights."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from tern_jax.core.types import Array
from tern_jax.inference import forms
from tern_jax.inference.layouts import LAYOUTS
from tern_jax.inference.matrix import Size, others, ranked, size_of
from tern_jax.inference.prepared import Prepared, prepared_of, stack_of
from tern_jax.inference.words import Fields
from tern_jax.storage.layout import plane_shape
from tern_jax.storage.operators import define
from tern_jax.storage.packed import PackedTernary, to_ternary

_FLOATS = [jnp.dtype(x) for x in ("float32", "bfloat16", "float16")]


def dot(x: Array, w: PackedTernary | Prepared) -> Array:
  """Returns the product of a float array and ternary weights.

    y[..., out] = Σ_in x[..., in] w[in, out]

  Prepared weights are read as they are: `prepare` them once. Packed ones are
  laid out anew at each call. It is x @ unpack(w) up to the order of sums, of
  its dtype, or that of rounded activations if w is prepared for int8. It has
  derivatives by x and the scales, where rounding counts as the identity, and
  works under jit, vmap, scan and shardings.

  Args:
    x: [..., in], or [..., *ins] where w is prepared for sums over several axes,
      as [heads, head_dim, out] is.
    w: [in, *outs], one layer.

  Returns:
    [..., *outs], of the dtype of x @ unpack(w).

  Raises:
    TypeError: w is neither packed nor prepared.
    ValueError: w is a stack of layers, or the shapes do not fit.

  >>> from tern_jax import Ternary, pack
  >>> codes = jnp.array([[1, -1], [0, 1]], jnp.int8)
  >>> w = pack(Ternary(codes, jnp.array(2.0), jnp.array(0.5)))
  >>> dot(jnp.array([[1.0, 10.0], [1.0, 0.0]]), w).tolist()
  [[2.0, 19.5], [2.0, -0.5]]
  """
  if not isinstance(w, PackedTernary | Prepared):
    raise TypeError(
      f"dot multiplies by PackedTernary or Prepared, got {type(w).__name__}:"
      " for arrays use x @ w, for Ternary dot(x, pack(w))."
    )
  x = jnp.asarray(x)
  lead = w.lead if isinstance(w, Prepared) else stack_of(w)
  if lead or len(w.shape) < 2:
    raise ValueError(
      f"dot multiplies by one layer [in, out], got {w}. Take the layers of a"
      " stack one by one, with lax.scan, jax.vmap or jax.tree.map(lambda a:"
      " a[i], w)."
    )
  inputs = w.inputs if isinstance(w, Prepared) else (0,)
  shape = tuple(w.shape[i] for i in inputs)
  if x.shape[max(0, x.ndim - len(shape)) :] != shape:
    raise ValueError(
      f"x of shape {x.shape} must end in the inputs of w, {shape}: w is {w}."
    )
  if _is_int8(w) and jnp.iscomplexobj(x):
    raise TypeError(
      f"int8 activations are real numbers, got {x.dtype}: multiply by the real"
      " and by the imaginary part."
    )
  return _dot(x, w)


@jax.jit
def _dot(x: Array, w: PackedTernary | Prepared) -> Array:
  dtype = jnp.result_type(x.dtype, w.dtype)
  inputs = w.inputs if isinstance(w, Prepared) else (0,)
  batch = x.shape[: x.ndim - len(inputs)]
  outputs = tuple(w.shape[i] for i in others(w.shape, inputs))
  if 0 in (x.size, w.size):
    return jnp.zeros((*batch, *outputs), dtype)
  int8 = _is_int8(w)
  if not int8 and dtype not in _FLOATS:
    axes = tuple(range(len(batch), x.ndim)), inputs
    dense = w.dequantize().astype(dtype)
    return jnp.tensordot(x.astype(dtype), dense, axes)
  if isinstance(w, PackedTernary):
    w = _fields(w)
  size = w.matrix
  rows = x.astype(jnp.float32).reshape(-1, size.inputs)
  y = _product(_Static(w.layout, size, int8), rows, *w.scales(), w.arrays)
  return y.astype(dtype).reshape(*batch, *outputs)


def _is_int8(w: PackedTernary | Prepared) -> bool:
  return isinstance(w, Prepared) and w.activations == "int8"


def _fields(w: PackedTernary) -> Prepared:
  """Lays packed weights out as fields, from their planes if that is quick."""
  shape, inputs = w.shape, (0,)
  w_p, w_n = (ranked(x, shape, 0) for x in (w.w_p, w.w_n))
  size = size_of(shape, inputs, w_p.shape, w_n.shape)
  whole = size.groups == 1 or size.group % 16 == 0
  if w.axis != 0 or not whole or w.nonzero.shape != plane_shape(shape):
    return prepared_of(to_ternary(w), inputs, "fields", "float32")
  planes = (x.reshape(x.shape[0], -1) for x in (w.nonzero, w.sign))
  arrays = Fields.of_planes(*planes)
  return Prepared(arrays, w_p, w_n, shape, inputs, "fields", "float32")


class _Static(NamedTuple):
  layout: str
  size: Size
  int8: bool


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _product(
  static: _Static, x: Array, w_p: Array, w_n: Array, arrays: Sequence[Array]
) -> Array:
  layout, size, int8 = static
  return LAYOUTS[layout].product(x, tuple(arrays), w_p, w_n, size, int8)


@functools.partial(_product.defjvp, symbolic_zeros=True)
def _derivative(
  static: _Static, primals: tuple, tangents: tuple
) -> tuple[Array, Array]:
  """Differentiates x @ dense(codes, w_p, w_n) by x and by the scales."""
  y = _product(static, *primals)

  def dense(x: Array, w_p: Array, w_n: Array, arrays: tuple) -> Array:
    codes = LAYOUTS[static.layout].codes(tuple(arrays), static.size)
    return forms.of_codes(x, codes, w_p, w_n, static.size, int8=False)

  return y, forms.derivative(dense, y, primals, tangents)


def _matmul(w: PackedTernary | Prepared, y: Array) -> Array:
  """Returns w @ y, as `jnp.matmul` does."""
  y = jnp.asarray(y)
  transposed = _summing(w, 1)
  if y.ndim < 2:
    return dot(y, transposed)
  return jnp.swapaxes(dot(jnp.swapaxes(y, -1, -2), transposed), -1, -2)


def _rmatmul(w: PackedTernary | Prepared, x: Array) -> Array:
  """Returns x @ w, as `jnp.matmul` does."""
  return dot(x, _summing(w, 0))


def _summing(
  w: PackedTernary | Prepared, axis: int
) -> PackedTernary | Prepared:
  """Returns a matrix, laid out for sums over an axis."""
  if len(w.shape) != 2:
    raise ValueError(
      f"@ multiplies by matrices, got {w}: use tern_jax.inference.dot(x, w) for"
      " several outputs, and one layer after the other of a stack."
    )
  if isinstance(w, Prepared):
    if w.inputs == (axis,):
      return w
    return prepared_of(w.ternary(), (axis,), "fields", w.activations)
  if axis == 0:
    return w
  return prepared_of(to_ternary(w), (axis,), "fields", "float32")


define(matmul=_matmul, rmatmul=_rmatmul)
