"""Packed weights, laid out for products."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from tern_jax.core.containers import Ternary, aligned
from tern_jax.core.interop import serializable
from tern_jax.core.types import Array
from tern_jax.inference.layouts import LAYOUTS
from tern_jax.inference.matrix import (
  Size,
  merged,
  others,
  parted,
  ranked,
  scale_of,
  size_of,
)
from tern_jax.storage.layout import lead_of
from tern_jax.storage.operators import Matrix
from tern_jax.storage.packed import PackedTernary

Shape = tuple[int, ...]
ACTIVATIONS = ("float32", "int8")
#: Whose sums, of 127 times 2 each, fit int32.
_MOST_INPUTS = 2**23


@serializable
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class Prepared(Matrix):
  """Ternary weights that `prepare` has laid out for `dot`.

  As with `PackedTernary`, the leading axes of a stack of layers come and go
  with those of the arrays, under `lax.scan`, `jax.vmap` and indexing.

  Args:
    arrays: codes, as the layout has them.
    w_p: float, magnitude of the +1 weights, of the rank of the weights.
    w_n: float, magnitude of the -1 weights, likewise.
    layer: shape of the weights, without the axes of a stack.
    inputs: axes of a layer that products sum over.
    layout: a name of `layouts.LAYOUTS`.
    activations: "float32" or "int8".
  """

  arrays: tuple[Array, ...]
  w_p: Array
  w_n: Array
  layer: Shape = dataclasses.field(metadata={"static": True})
  inputs: Shape = dataclasses.field(metadata={"static": True})
  layout: str = dataclasses.field(metadata={"static": True})
  activations: str = dataclasses.field(metadata={"static": True})

  @property
  def lead(self) -> int:
    """Number of axes of a stack."""
    return self.w_p.ndim - len(self.layer)

  @property
  def shape(self) -> Shape:
    """Shape of the weights."""
    return (*self.w_p.shape[: self.lead], *self.layer)

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
    """Bytes of the codes and the scales."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(self))

  @property
  def outputs(self) -> Shape:
    """Shape of a product behind the axes of a batch."""
    return tuple(self.layer[i] for i in others(self.layer, self.inputs))

  @property
  def matrix(self) -> Size:
    """Size of a layer as a matrix."""
    scales = (w.shape[self.lead :] for w in (self.w_p, self.w_n))
    return size_of(self.layer, self.inputs, *scales)

  def scales(self) -> tuple[Array, Array]:
    """Returns w_p and w_n of a layer as float32 [groups or 1, outputs or 1]."""
    w_p, w_n = (
      scale_of(w, self.layer, self.inputs, self.matrix).astype(jnp.float32)
      for w in (self.w_p, self.w_n)
    )
    return w_p, w_n

  def ternary(self) -> Ternary:
    """Returns the codes and scales."""

    def of_layer(*arrays: Array) -> Array:
      codes = LAYOUTS[self.layout].codes(arrays, self.matrix)
      return parted(codes, self.layer, self.inputs)

    for _ in range(self.lead):
      of_layer = jax.vmap(of_layer)
    return Ternary(of_layer(*self.arrays), self.w_p, self.w_n)

  def dequantize(self) -> Array:
    """Returns the dense weights, of the given shape and the dtype of w_p."""
    return self.ternary().dequantize()

  def __repr__(self) -> str:
    """Prints what the weights are on one line, and none of their values."""
    shape = list(getattr(self.w_p, "shape", ()))[: -len(self.layer)]
    dtype = getattr(self.w_p, "dtype", "")
    return (
      f"Prepared({dtype}{[*shape, *self.layer]}, {self.layout},"
      f" {self.activations} activations)"
    )


def stack_of(x: PackedTernary) -> int:
  """Returns the number of leading axes along which scales say it is a stack.

  Scales of each input of a matrix make no stack.
  """
  lead = lead_of(x.shape, *(aligned(w, x.shape) for w in (x.w_p, x.w_n)))
  return lead if len(x.shape) - lead > 1 else 0


def prepared_of(
  x: Ternary, inputs: Shape, layout: str, activations: str, lead: int = 0
) -> Prepared:
  """Lays ternary weights out, of which the leading axes are a stack.

  Args:
    x: codes and scales; traced ones for all layouts but lists.
    inputs: axes of a layer that products sum over, ascending.
    layout: a name of `layouts.LAYOUTS`.
    activations: "float32" or "int8".
    lead: axes of a stack, which come first.

  Raises:
    ValueError: sums of int8 activations would overflow.
  """
  shape = x.codes.shape
  w_p, w_n = (ranked(w, shape, lead) for w in (x.w_p, x.w_n))
  layer = shape[lead:]
  size = size_of(layer, inputs, w_p.shape[lead:], w_n.shape[lead:])
  if activations == "int8" and size.group > _MOST_INPUTS:
    raise ValueError(
      f"sums of {size.group} inputs do not fit int32: give activations="
      f"'float32', or scales to groups of at most {_MOST_INPUTS}."
    )
  build = _lists if layout == "lists" else _arrays
  arrays = build(jnp.asarray(x.codes), inputs, layout, size, lead)
  return Prepared(arrays, w_p, w_n, layer, inputs, layout, activations)


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4))
def _arrays(
  codes: Array, inputs: Shape, layout: str, size: Size, lead: int
) -> tuple[Array, ...]:
  def build(codes: Array) -> tuple[Array, ...]:
    return LAYOUTS[layout].build(merged(codes, inputs), size)

  for _ in range(lead):
    build = jax.vmap(build)
  return build(codes)


def _lists(
  codes: Array, inputs: Shape, layout: str, size: Size, lead: int
) -> tuple[Array, ...]:
  """Builds layer by layer: each has lists of its own lengths."""
  stack = codes.shape[:lead]
  layers = [
    LAYOUTS[layout].build(merged(x, inputs), size)
    for x in codes.reshape(math.prod(stack), *codes.shape[lead:])
  ]
  longest = max(x[0].size for x in layers)
  entries = [jnp.pad(x[0], (0, longest - x[0].size)) for x in layers]
  begins = [x[1] for x in layers]
  return tuple(
    jnp.stack(x).reshape(*stack, *x[0].shape) for x in (entries, begins)
  )
