"""Convolutions of images with views of packed kernels."""

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tern_jax.core.types import Array
from tern_jax.inference import cpu, forms, products
from tern_jax.inference.layouts import LAYOUTS
from tern_jax.inference.matrix import Size
from tern_jax.inference.native import Native
from tern_jax.inference.prepared import Prepared
from tern_jax.inference.views import View, parts_of

Axes = Sequence[int]
_Spec = jax.lax.ConvDimensionNumbers
#: Those of `conv_general_dilated` that are fields of a `Window`, in order.
_PARAMS = ("window_strides", "padding", "lhs_dilation", "rhs_dilation")
_EXACT = jax.lax.Precision.HIGHEST


class Window(NamedTuple):
  """How a kernel moves over images.

  Args:
    images: axes of the batch, of the channels, and of space.
    sizes: of the kernel, along the axes of space.
    strides: of `conv_general_dilated`, as what follows.
    padding: low and high, along each axis of space.
    lhs_dilation: of the images.
    rhs_dilation: of the kernel.
  """

  images: tuple[int, ...]
  sizes: tuple[int, ...]
  strides: tuple[int, ...]
  padding: tuple[tuple[int, int], ...]
  lhs_dilation: tuple[int, ...]
  rhs_dilation: tuple[int, ...]

  @classmethod
  def of(cls, view: View, params: dict[str, Any]) -> "Window":
    """Returns that of a kernel, for parameters of `conv_general_dilated`."""
    images, kernel, _ = params["dimension_numbers"]
    return cls(
      tuple(images),
      tuple(view.shape[i] for i in kernel[2:]),
      *(tuple(params[name]) for name in _PARAMS),
    )

  def places(self, shape: Axes) -> list[int]:
    """Returns to how many places the kernel moves on images of a shape."""
    places = []
    for i, axis in enumerate(self.images[2:]):
      size = (shape[axis] - 1) * self.lhs_dilation[i] + 1 if shape[axis] else 0
      reach = (self.sizes[i] - 1) * self.rhs_dilation[i] + 1
      room = size + sum(self.padding[i]) - reach
      places.append(max(0, room // self.strides[i] + 1))
    return places


class _Static(NamedTuple):
  """A convolution of native code.

  Args:
    window: that moves.
    order: of the axes of space and of that of the channels, which comes after
      them: the order in which the inputs of the matrix run over them.
    size: of the matrix.
    layout: of the codes.
    int8: whether patches are rounded.
  """

  window: Window
  order: tuple[int, ...]
  size: Size
  layout: str
  int8: bool


def pays(
  view: View, params: dict[str, Any], rows: Any, *, prepared: bool
) -> bool:
  """Whether a packed convolution is faster than XLA's, with unpacked weights.

  With native code it is, once the kernel is prepared. As a product with patches
  it is for few pixels, measured on a CPU core: the more pixels share a kernel,
  the less its unpacking matters, and the more the copies of patches do.

  Args:
    view: kernel.
    params: those of `conv_general_dilated`.
    rows: pixels of all outputs, an int unless the batch is symbolic.
    prepared: whether the kernel is, or will be.
  """
  _, kernel, _ = params["dimension_numbers"]
  pointwise = not any(view.dims[i] for i in kernel[2:])
  if prepared and (pointwise or _is_native(view, params)):
    return True
  outputs = view.shape[kernel[0]]
  few = 2 * outputs if prepared else outputs // 4
  return isinstance(rows, int) and rows <= few


def convolve(x: Array, view: View, params: dict[str, Any]) -> Array | None:
  """Convolves with a packed kernel.

  Args:
    x: images.
    view: kernel.
    params: those of `conv_general_dilated`.

  Returns:
    What the convolution returns, which has no groups; None if weights have no
    product of this kind.
  """
  _, kernel, out = params["dimension_numbers"]
  window, dtype = Window.of(view, params), params["preferred_element_type"]
  dtype = dtype or x.dtype
  if isinstance(view.packed, Prepared) and _is_native(view, params):
    y = _natively(x, view, params, dtype)
  else:
    axes = (*kernel[2:], kernel[1])
    y = products.multiply(patches_of(x, window), view, axes, dtype)
  if y is None:
    return None
  # From [batch, *space, channels] to the order that is asked for.
  order = (out[0], *out[2:], out[1])
  return jnp.transpose(y, [order.index(i) for i in range(y.ndim)])


def patches_of(x: Array, window: Window) -> Array:
  """Returns the patches [B, *space, *window, C] of images."""
  places = window.places(x.shape)
  batch, channels, *space = window.images
  shape = (x.shape[batch], *places, *window.sizes, x.shape[channels])
  if 0 in places:
    return jnp.zeros(shape, x.dtype)
  x = jnp.transpose(x, (batch, *space, channels))
  edges = zip(window.padding, window.lhs_dilation, strict=True)
  edges = [(*pads, dilation - 1) for pads, dilation in edges]
  x = jax.lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *edges, (0, 0, 0)])
  shifted = []
  for offset in itertools.product(*map(range, window.sizes)):
    start = [i * d for i, d in zip(offset, window.rhs_dilation, strict=True)]
    limit = [
      s + (n - 1) * stride + 1
      for s, n, stride in zip(start, places, window.strides, strict=True)
    ]
    shifted.append(
      jax.lax.slice(
        x,
        (0, *start, 0),
        (x.shape[0], *limit, x.shape[-1]),
        (1, *window.strides, 1),
      )
    )
  # Along the channels: one copy of each patch, whatever the window.
  return jnp.concatenate(shifted, -1).reshape(shape)


def _is_native(view: View, params: dict[str, Any]) -> bool:
  """Whether native code convolves with a kernel, prepared or to be so."""
  if cpu.isa() is None or _order(view, params) is None:
    return False
  if isinstance(view.packed, Prepared):
    return isinstance(LAYOUTS[view.packed.layout], Native)
  return jax.default_backend() == "cpu"


def _order(view: View, params: dict[str, Any]) -> tuple[int, ...] | None:
  """Returns the order of `_Static`, None if it is finer than by axis."""
  _, kernel, _ = params["dimension_numbers"]
  axes, out = (*kernel[2:], kernel[1]), view.dims[kernel[0]]
  dims = [view.dims[axis] for axis in axes]
  if (
    len(axes) < 2
    or products.inputs_of(view, axes) is None
    or any(len(dim) > 1 for dim in dims)
    or list(out) != parts_of([out])
  ):
    return None
  order = [dims.index((part,)) for part in parts_of(dims)]
  return (*order, *(i for i, dim in enumerate(dims) if not dim))


def _natively(
  x: Array, view: View, params: dict[str, Any], dtype: Any
) -> Array | None:
  dtypes = {jnp.dtype(d) for d in (x.dtype, view.dtype, dtype)}
  order, packed = _order(view, params), view.packed
  if not dtypes <= products.FLOATS or order is None:
    return None
  wide = dtypes.pop() if len(dtypes) == 1 else jnp.dtype("float32")
  packed = view.rescaled(lambda w: w.astype(wide)).packed
  if not isinstance(packed, Prepared):
    return None
  static = _Static(
    Window.of(view, params),
    order,
    packed.matrix,
    packed.layout,
    packed.activations == "int8",
  )
  x = x.astype(wide).astype(jnp.float32)
  return _convolution(static, x, *packed.scales(), packed.arrays).astype(dtype)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _convolution(
  static: _Static, x: Array, w_p: Array, w_n: Array, arrays: tuple[Array, ...]
) -> Array:
  def unpacked(x: Array, w_p: Array, w_n: Array, *arrays: Array) -> Array:
    if not static.int8:
      return _dense(static, x, w_p, w_n, arrays)
    window, size = static.window, static.size
    rows = patches_of(x, window)
    codes = LAYOUTS[static.layout].codes(arrays, size)
    shape = rows.shape[: len(window.images) - 1]
    rank = len(window.sizes) + 1
    order = (*range(rank), *(rank + i for i in static.order))
    rows = jnp.transpose(rows, order).reshape(-1, size.inputs)
    y = forms.of_codes(rows, codes, w_p, w_n, size, int8=True)
    return y.reshape(*shape, size.outputs)

  operands = x, w_p, w_n, *arrays
  native = _call(static, x.shape)
  return jax.lax.platform_dependent(*operands, cpu=native, default=unpacked)


def _call(static: _Static, shape: Axes) -> Callable[..., Array]:
  """Returns a function of images, w_p, w_n and the arrays, for CPUs."""
  window, size = static.window, static.size
  images = shape[window.images[0]], *window.places(shape), size.outputs
  y = jax.ShapeDtypeStruct(images, jnp.float32)
  numbers = {
    "images": window.images,
    "window": window.sizes,
    "strides": window.strides,
    "low": [low for low, _ in window.padding],
    "lhs_dilation": window.lhs_dilation,
    "rhs_dilation": window.rhs_dilation,
    "order": static.order,
  }
  attributes: dict[str, Any] = {
    name: np.array(x, np.int64) for name, x in numbers.items()
  }
  attributes["isa"] = np.int32(-1)  # the one in use where it runs
  name = "tern_jax_list_convolution"
  if static.layout == "tiles":
    name = "tern_jax_convolution"
    attributes |= {"int8": static.int8, "groups": np.int64(size.groups)}
  target = jax.ffi.ffi_call(name, y, vmap_method="expand_dims")
  return lambda x, w_p, w_n, *arrays: target(x, *arrays, w_p, w_n, **attributes)


def _dense(
  static: _Static, x: Array, w_p: Array, w_n: Array, arrays: tuple[Array, ...]
) -> Array:
  """Convolves with unpacked weights."""
  window, size, order = static.window, static.size, static.order
  codes = LAYOUTS[static.layout].codes(arrays, size)
  kernel = forms.dense(codes, w_p, w_n, size)
  sizes = *window.sizes, size.inputs // math.prod(window.sizes)
  kernel = kernel.reshape(*(sizes[i] for i in order), size.outputs)
  rank = len(window.sizes)
  axes = (rank + 1, order.index(rank), *map(order.index, range(rank)))
  return jax.lax.conv_general_dilated(
    x,
    kernel,
    window.strides,
    window.padding,
    window.lhs_dilation,
    window.rhs_dilation,
    _Spec(window.images, axes, (0, rank + 1, *range(1, rank + 1))),
    precision=_EXACT,
  )


@functools.partial(_convolution.defjvp, symbolic_zeros=True)
def _derivative(
  static: _Static, primals: tuple, tangents: tuple
) -> tuple[Array, Array]:
  """Differentiates by x and by the scales; rounding counts as the identity."""
  y = _convolution(static, *primals)
  dense = functools.partial(_dense, static)
  return y, forms.derivative(dense, y, primals, tangents)
