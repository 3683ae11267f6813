"""Packed weights as the operations of a model see them: transposed, reshaped.

A view says which parts of the packed axes each of its axes runs over, so that
rearranging weights costs nothing until they are multiplied or unpacked.
"""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from tern_jax.core.types import Array
from tern_jax.inference.matrix import ranked
from tern_jax.inference.prepared import Prepared
from tern_jax.storage.packed import PackedTernary

Packed = PackedTernary | Prepared
Shape = tuple[int, ...]


class Part(NamedTuple):
  """Indices `stride * i`, for i < size, of an axis of the packed weights."""

  axis: int
  stride: int
  size: int


#: An axis of a view: it runs over these parts, the last one fastest.
Dim = tuple[Part, ...]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class View:
  """Packed weights, rearranged.

  Args:
    packed: the weights.
    dims: the axes of the view.
    name: path of the weights in the arguments.
  """

  packed: Packed
  dims: tuple[Dim, ...] = dataclasses.field(metadata={"static": True})
  name: str = dataclasses.field(metadata={"static": True})

  @property
  def shape(self) -> Shape:
    """Shape of the view."""
    return tuple(math.prod(p.size for p in dim) for dim in self.dims)

  @property
  def dtype(self) -> Any:
    """Dtype of the dense weights."""
    return self.packed.dtype

  def dense(self) -> Array:
    """Returns the dense weights."""
    # Behind the barrier the compiler cannot fuse the unpacking into a product,
    # which would then unpack the weights again for each row.
    w = jax.lax.optimization_barrier(self.packed.dequantize())
    parts = parts_of(self.dims)
    return arranged(w.reshape([p.size for p in parts]), parts, self.dims)

  def arranged(self, dims: Iterable[Dim]) -> "View":
    """Returns a view of the same weights with other axes."""
    return dataclasses.replace(self, dims=tuple(dims))

  def rescaled(self, change: Any) -> "View":
    """Returns a view with changed magnitudes, for what acts on each weight."""
    magnitudes = {
      "w_p": change(self.packed.w_p),
      "w_n": change(self.packed.w_n),
    }
    packed = dataclasses.replace(self.packed, **magnitudes)
    return dataclasses.replace(self, packed=packed)

  def reshaped(self, shape: Shape) -> "View | None":
    """Returns a view of another shape, None if that cuts across parts."""
    left = [part for dim in self.dims for part in dim]
    dims = []
    for size in shape:
      dim: list[Part] = []
      while size > 1:
        part = left.pop(0)
        if size % part.size:
          # The axis ends within this part, which is cut in two.
          if part.size % size:
            return None
          rest = part.size // size
          left.insert(0, Part(part.axis, part.stride, rest))
          part = Part(part.axis, part.stride * rest, size)
        dim.append(part)
        size //= part.size
      dims.append(tuple(dim))
    return self.arranged(dims)

  @property
  def is_stack(self) -> bool:
    """Whether layers can be taken off the first axis one by one."""
    if not self.dims or not self.packed.lead:
      return False
    shape = self.packed.shape
    if self.dims[0] != (Part(0, 1, shape[0]),):
      return False
    scales = self.packed.w_p, self.packed.w_n
    return all(_lead(w, shape) in (1, shape[0]) for w in scales)

  def stack(self) -> Packed:
    """Returns the weights of a stack, of which JAX can take off layers."""
    packed = self.packed
    if isinstance(packed, Prepared):
      return packed
    w_p, w_n = (ranked(w, packed.shape, 1) for w in (packed.w_p, packed.w_n))
    return dataclasses.replace(packed, w_p=w_p, w_n=w_n)

  def layer(self, packed: Packed) -> "View":
    """Returns the view of a layer that was taken off `stack()`."""
    dims = (
      tuple(Part(p.axis - 1, p.stride, p.size) for p in dim)
      for dim in self.dims[1:]
    )
    return View(packed, tuple(dims), self.name)

  def first(self) -> "View":
    """Returns the view of the first layer of a stack."""
    return self.layer(jax.tree.map(lambda a: a[0], self.stack()))

  def layers(self, packed: Packed) -> "View":
    """Returns the view of several layers of `stack()`."""
    first = (Part(0, 1, packed.shape[0]),)
    return View(packed, (first, *self.dims[1:]), self.name)


def view_of(packed: Packed, name: str) -> View:
  """Returns the view of packed weights as they are."""
  dims = (
    (Part(axis, 1, size),) if size > 1 else ()
    for axis, size in enumerate(packed.shape)
  )
  return View(packed, tuple(dims), name)


def parts_of(dims: Iterable[Dim]) -> list[Part]:
  """Returns the parts of axes in the order in which they are packed."""
  parts = (part for dim in dims for part in dim)
  return sorted(parts, key=lambda part: (part.axis, -part.stride))


def arranged(x: Array, parts: Sequence[Part], dims: Sequence[Dim]) -> Array:
  """Rearranges an array's axes behind those of a batch.

  Args:
    x: [*batch, *parts], of one axis for each part.
    parts: all parts of `dims`, in the order of x.
    dims: axes that are wanted.

  Returns:
    [*batch, *dims].
  """
  free = x.ndim - len(parts)
  order = [parts.index(part) + free for dim in dims for part in dim]
  x = jnp.transpose(x, (*range(free), *order))
  shape = (math.prod(p.size for p in dim) for dim in dims)
  return x.reshape(*x.shape[:free], *shape)


def _lead(scale: Array, shape: Shape) -> int:
  """Returns how long scales are along the first axis of weights."""
  fills = scale.ndim == len(shape) or scale.shape == shape[: scale.ndim]
  return scale.shape[0] if scale.ndim and fills else 1
