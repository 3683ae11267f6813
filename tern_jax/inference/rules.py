"""What the rewriting of jaxprs does at the operations that it knows."""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.extend.core as jax_core
import jax.numpy as jnp

from tern_jax.core.types import Array
from tern_jax.inference import control, convolutions, products
from tern_jax.inference.forms import is_sharded
from tern_jax.inference.prepared import Prepared
from tern_jax.inference.rewrite import Rule, Scope, Sum, Value, aval
from tern_jax.inference.views import View

Eqn = jax_core.JaxprEqn
Outputs = list[Value] | None
_Mode = jax.lax.GatherScatterMode


def _dot_general(eqn: Eqn, inputs: list, scope: Scope) -> Outputs:
  contracted, batch = eqn.params["dimension_numbers"]
  side = 1 if isinstance(inputs[1], View) else 0
  view, x = inputs[side], inputs[1 - side]
  if isinstance(x, View):
    x = scope.dense(x, "a product of two packed weights")
  if is_sharded(x):
    return None
  axes, of_view = contracted[1 - side], contracted[side]
  stack, of_stack = batch[1 - side], batch[side]
  dtype = aval(eqn.outvars[0]).dtype
  free = [i for i in range(x.ndim) if i not in (*axes, *stack)]
  x = jnp.transpose(x, (*stack, *free, *axes))
  if not any(view.dims[i] for i in of_stack):
    kept = [i for i in range(len(view.dims)) if i not in of_stack]
    layer = view.arranged(view.dims[i] for i in kept)
    of_layer = [kept.index(i) for i in of_view]
    y = products.multiply(x, layer, of_layer, dtype)
  elif of_stack == (0,) and view.is_stack:
    layer, of_layer = view.first(), [i - 1 for i in of_view]
    y = products.multiply_stack(x, view, of_layer, dtype)
  else:
    return None
  if y is None:
    return None
  rows = math.prod(x.shape[i] for i in range(len(stack), x.ndim - len(axes)))
  scope.note(view, "packed product", _sum(layer, of_layer, rows))
  if side == 0:
    # The axes of the left operand come first.
    lead, split = len(stack), len(stack) + len(free)
    order = (*range(lead), *range(split, y.ndim), *range(lead, split))
    y = jnp.transpose(y, order)
  return [y]


def _sum(
  layer: View, axes: Sequence[int], rows: int, *, patches: bool = False
) -> Sum | None:
  """Returns the sum for which packed weights could be laid out."""
  inputs = products.inputs_of(layer, axes)
  if inputs is None or isinstance(layer.packed, Prepared):
    return None
  return Sum(inputs, len(layer.packed.shape), rows, patches)


def _convolution(eqn: Eqn, inputs: list, scope: Scope) -> Outputs:
  x, kernel = inputs
  groups = (eqn.params[f"{name}_group_count"] for name in ("feature", "batch"))
  if isinstance(x, View) or is_sharded(x) or set(groups) != {1}:
    return None
  _, spec, of_out = eqn.params["dimension_numbers"]
  out = aval(eqn.outvars[0])
  rows = math.prod(n for i, n in enumerate(out.shape) if i != of_out[1])
  pays = functools.partial(convolutions.pays, kernel, eqn.params, rows)
  sum_ = None
  if pays(prepared=True):
    sum_ = _sum(kernel, (*spec[2:], spec[1]), rows, patches=True)
  if not pays(prepared=isinstance(kernel.packed, Prepared)):
    scope.note(kernel, "dense: conv_general_dilated", sum_)
    return None
  y = convolutions.convolve(x, kernel, eqn.params)
  if y is None:
    return None
  scope.note(kernel, "packed convolution", sum_)
  return [y.astype(out.dtype)]


def _gather(eqn: Eqn, inputs: list, scope: Scope) -> Outputs:
  """Looks up whole rows, as `jnp.take(table, index, 0)` does."""
  view, index = inputs
  numbers, mode = eqn.params["dimension_numbers"], eqn.params["mode"]
  modes = _Mode.CLIP, _Mode.FILL_OR_DROP, _Mode.PROMISE_IN_BOUNDS
  if isinstance(index, View) or is_sharded(index) or mode not in modes:
    return None
  if (
    numbers.collapsed_slice_dims not in ((), (0,))
    or 0 not in numbers.start_index_map
    or numbers.operand_batching_dims
    or tuple(eqn.params["slice_sizes"]) != (1, *view.shape[1:])
  ):
    return None
  # Slices as long as an axis start at 0, unless others are to be dropped.
  if mode == _Mode.FILL_OR_DROP and numbers.start_index_map != (0,):
    return None
  index = index[..., numbers.start_index_map.index(0)]
  rows, there = _rows(view, index)
  if rows is None:
    return None
  scope.note(view, "rows")
  if mode == _Mode.FILL_OR_DROP:
    fill = eqn.params["fill_value"]
    fill = jnp.asarray(jnp.nan if fill is None else fill, rows.dtype)
    there = there.reshape(*there.shape, *(1,) * (rows.ndim - there.ndim))
    rows = jnp.where(there, rows, fill)
  if not numbers.collapsed_slice_dims:
    rows = jnp.expand_dims(rows, index.ndim)
  offsets = numbers.offset_dims
  return [jnp.moveaxis(rows, range(index.ndim, rows.ndim), offsets)]


def _rows(view: View, index: Array) -> tuple[Array | None, Array]:
  """Returns the rows next to indices, and whether the indices are theirs."""
  if jnp.iinfo(index.dtype).bits < 32:
    index = index.astype(jnp.int32)
  last = min(view.shape[0] - 1, jnp.iinfo(index.dtype).max)
  there = (index >= 0) & (index <= last)
  return products.rows(view, jnp.clip(index, 0, last)), there


def _convert(eqn: Eqn, inputs: list, scope: Scope) -> Outputs:
  dtype = eqn.params["new_dtype"]
  if not jnp.issubdtype(dtype, jnp.floating):
    return None
  return [inputs[0].rescaled(lambda w: w.astype(dtype))]


def _stop_gradient(eqn: Eqn, inputs: list, scope: Scope) -> Outputs:
  return [inputs[0].rescaled(jax.lax.stop_gradient)]


def _barrier(eqn: Eqn, inputs: list, scope: Scope) -> Outputs:
  return list(jax.lax.optimization_barrier(inputs))


def _same(eqn: Eqn, inputs: list, scope: Scope) -> Outputs:
  return inputs


def _device_put(eqn: Eqn, inputs: list, scope: Scope) -> Outputs:
  """Passes weights on that stay where they are."""
  moves = any(x is not None for x in eqn.params["devices"])
  return None if moves else inputs


def _transpose(eqn: Eqn, inputs: list, scope: Scope) -> Outputs:
  (view,) = inputs
  return [view.arranged(view.dims[i] for i in eqn.params["permutation"])]


def _reshape(eqn: Eqn, inputs: list, scope: Scope) -> Outputs:
  view, *sizes = inputs
  if sizes or eqn.params["dimensions"] is not None:
    return None
  view = view.reshaped(aval(eqn.outvars[0]).shape)
  return None if view is None else [view]


def _broadcast(eqn: Eqn, inputs: list, scope: Scope) -> Outputs:
  """Adds axes of one element; repeating weights needs them unpacked."""
  view, *sizes = inputs
  shape = aval(eqn.outvars[0]).shape
  if sizes or math.prod(shape) != math.prod(view.shape):
    return None
  dims: list[Any] = [()] * len(shape)
  for axis, dim in zip(
    eqn.params["broadcast_dimensions"], view.dims, strict=True
  ):
    dims[axis] = dim
  return [view.arranged(dims)]


def _squeeze(eqn: Eqn, inputs: list, scope: Scope) -> Outputs:
  (view,) = inputs
  gone = eqn.params["dimensions"]
  dims = (dim for i, dim in enumerate(view.dims) if i not in gone)
  return [view.arranged(dims)]


def _slice(eqn: Eqn, inputs: list, scope: Scope) -> Outputs:
  (view,) = inputs
  start, limit = eqn.params["start_indices"], eqn.params["limit_indices"]
  if eqn.params["strides"] is not None and set(eqn.params["strides"]) != {1}:
    return None
  sizes = [b - a for a, b in zip(start, limit, strict=True)]
  return _sliced(view, jnp.int32(start[0]), sizes, scope)


def _dynamic_slice(eqn: Eqn, inputs: list, scope: Scope) -> Outputs:
  view, *starts = inputs
  if isinstance(view, View) and starts:
    return _sliced(view, starts[0], eqn.params["slice_sizes"], scope)
  return None


def _sliced(
  view: View, start: Array, sizes: Sequence[int], scope: Scope
) -> Outputs:
  """Takes layers off a stack, one or several, or a row off a matrix."""
  count, *rest = sizes
  if tuple(sizes) == view.shape:
    return [view]
  if not count or tuple(rest) != view.shape[1:]:
    return None
  is_row = sum(size > 1 for size in rest) < 2
  if count == 1 and (is_row or not view.is_stack):
    row, _ = _rows(view, start)
    if row is None:
      return None
    scope.note(view, "rows")
    return [row[None]]
  if not view.is_stack:
    return None
  taken = jax.tree.map(
    lambda a: jax.lax.dynamic_slice_in_dim(a, start, count), view.stack()
  )
  if count > 1:
    return [view.layers(taken)]
  layer = view.layer(jax.tree.map(lambda a: a[0], taken))
  return [layer.arranged(((), *layer.dims))]


#: By the name of the primitive.
RULES: dict[str, Rule] = {
  "broadcast_in_dim": _broadcast,
  "conv_general_dilated": _convolution,
  "convert_element_type": _convert,
  "copy": _same,
  "copy_p": _same,
  "device_put": _device_put,
  "dot_general": _dot_general,
  "dynamic_slice": _dynamic_slice,
  "gather": _gather,
  "optimization_barrier": _barrier,
  "reshape": _reshape,
  "sharding_constraint": _same,
  "slice": _slice,
  "squeeze": _squeeze,
  "stop_gradient": _stop_gradient,
  "transpose": _transpose,
  **control.RULES,
}
