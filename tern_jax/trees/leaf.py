"""A method applied to one leaf: to each layer of a stack, in groups."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tern_jax.core.axes import axes_of
from tern_jax.core.containers import Ternary, own
from tern_jax.core.method import Ternarizer
from tern_jax.core.numerics import reduced_axes
from tern_jax.core.types import Array, Arrays
from tern_jax.targets.schedules import AcrossLayers, Share

#: A function of a method and of what it is given of one array.
OfMethod = Callable[..., Any]


@dataclasses.dataclass(frozen=True)
class Leaf:
  """How the method of a tree is applied to one of its leaves.

  The method has the target of this leaf; a target across layers stays, and is
  replaced by the leaf's share of it at each call.
  """

  path: str
  method: Ternarizer
  is_stack: bool
  group_size: int | None

  def __call__(
    self, fn: OfMethod, *args: Any, share: Array | None = None
  ) -> Any:
    """Returns fn(method, *args), for each layer of a stack by itself.

    The share of a target across layers, its number of zeros, is given where the
    method measures: 0-d, or one for each layer.
    """

    def one(share: Array | None, *args: Any) -> Any:
      method, target = self.method, self.method.sparsity
      if isinstance(target, AcrossLayers):
        zeros = 0 if share is None else share
        own = Share(zeros, args[0].size, target.sparsity)
        method = method.replace(sparsity=own)
      if self.group_size is None:
        return fn(self._with_channels(method, args[0].shape), *args)
      return self._in_groups(method, fn, *args)

    return (jax.vmap(one) if self.is_stack else one)(share, *args)

  def invert(
    self, ternary: Ternary, count: Array
  ) -> tuple[Array, Arrays, Arrays]:
    """Returns latents, scales and state that stand for these weights."""
    if not self.is_stack:
      return self._invert_one(ternary, count)
    # A loop and no vmap, as methods look at the values.
    layers = [
      self._invert_one(jax.tree.map(lambda x: x[i], ternary), count)  # noqa: B023
      for i in range(ternary.shape[0])
    ]
    return jax.tree.map(lambda *x: jnp.stack(x), *layers)

  def _invert_one(
    self, ternary: Ternary, count: Array
  ) -> tuple[Array, Arrays, Arrays]:
    method = self.method
    if isinstance(method.sparsity, AcrossLayers):
      zeros = jnp.sum(ternary.codes == 0, dtype=jnp.int32)
      own = Share(zeros, ternary.codes.size, method.sparsity.sparsity)
      method = method.replace(sparsity=own)
    try:
      if self.group_size is None:
        method = self._with_channels(method, ternary.shape)
        return method.invert(ternary, count)
      grouped = self._grouped(method, ternary.shape)
      w_p, w_n = (
        scale.reshape(grouped.scales) if scale.ndim else scale
        for scale in (ternary.w_p, ternary.w_n)
      )
      viewed = Ternary(ternary.codes.reshape(grouped.view), w_p, w_n)
      w, scales, state = grouped.method.invert(viewed, count)
      return w.reshape(ternary.shape), scales, state
    except ValueError as error:
      raise ValueError(f"{self.path}: {error}") from error

  def _in_groups(
    self, method: Ternarizer, fn: OfMethod, w: Array, *args: Any
  ) -> Any:
    """Applies a function to one layer, with groups as its channels."""
    grouped = self._grouped(method, w.shape)
    out = fn(grouped.method, w.reshape(grouped.view), *args)
    if isinstance(out, Ternary):
      w_p, w_n = (
        scale.reshape(grouped.own_scales) if scale.ndim else scale
        for scale in (out.w_p, out.w_n)
      )
      return Ternary(out.codes.reshape(w.shape), w_p, w_n)
    return out.reshape(w.shape) if isinstance(out, jax.Array) else out

  def _with_channels(
    self, method: Ternarizer, shape: tuple[int, ...]
  ) -> Ternarizer:
    """Returns the method of one layer, with its output axes as channels."""
    channel = method.channel_axis
    if channel is None:
      return method
    if channel == -1 and len(shape) > 1:
      outputs = axes_of(self.path, shape, -1).outputs
      if len(outputs) > 1:
        channel = tuple(i - len(shape) for i in outputs)
        method = method.replace(channel_axis=channel)
    if shape and reduced_axes(np.empty((1,) * len(shape)), channel) == ():
      raise ValueError(
        f"{self.path}: channel_axis={channel} names all axes of shape {shape},"
        " so that each weight would have a scale of its own: take fewer axes,"
        " or exclude this leaf."
      )
    return method

  def _grouped(self, method: Ternarizer, shape: tuple[int, ...]) -> "_Groups":
    """Returns how a layer is divided into groups."""
    *outer, axis = self._input_axes(shape)
    g, n = self.group_size or 1, shape[axis]
    view, own, made = (list(shape) for _ in range(3))
    # Axes are split in place, not moved, and so keep their sharding.
    if n % g == 0:
      view[axis : axis + 1] = n // g, g
      own[axis] = n // g
      made[axis : axis + 1] = n // g, 1
      inside = [axis + 1]
    else:  # A group has several heads.
      (head,) = outer
      heads = g // n
      view[head : head + 1] = shape[head] // heads, heads
      own[head : axis + 1] = shape[head] // heads, 1
      made[head : axis + 1] = shape[head] // heads, 1, 1
      inside = [head + 1, axis + 1]
    groups = tuple(i for i in range(len(view)) if i not in inside)
    method = method.replace(channel_axis=groups)
    return _Groups(method, tuple(view), tuple(made), tuple(own))

  def _input_axes(self, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the axes of a layer that are divided into groups."""
    g, channel = self.group_size or 1, self.method.channel_axis
    axes: tuple[int, ...] | None = None
    if len(shape) > 1 and channel in (-1, 0):
      axes = axes_of(self.path, shape, channel).inputs
    elif isinstance(channel, tuple):
      axes = reduced_axes(np.empty((1,) * len(shape)), channel)
    if axes is None or (len(axes) != 1 and isinstance(channel, tuple)):
      raise ValueError(
        f"{self.path}: group_size={g} divides the channels of a layer of two"
        " or more axes by a method with channel_axis=-1 (Flax, Haiku) or 0"
        " (Equinox), or a tuple of all axes but one; got shape"
        f" {shape} and {self.method!r}."
      )
    n, inputs = shape[axes[-1]], math.prod(shape[i] for i in axes)
    if n % g and (inputs % g or g % n):
      plural = "axis" if len(axes) == 1 else "axes"
      heads = "" if len(axes) == 1 else " in whole heads or parts of one"
      raise ValueError(
        f"{self.path}: group_size={g} does not divide the {inputs} inputs,"
        f" {plural} {', '.join(map(str, axes))} of shape {shape}{heads}: choose"
        " a divisor, or exclude this leaf in kernels(exclude=...)."
      )
    return axes


class _Groups(NamedTuple):
  """A layer divided into groups."""

  method: Ternarizer
  """With groups as its channels."""
  view: tuple[int, ...]
  """The shape in which it sees the layer."""
  scales: tuple[int, ...]
  """The shape of its scales there."""
  own_scales: tuple[int, ...]
  """The shape of the scales of a `Ternary` of the layer's shape."""


def aligned(ternary: Ternary) -> Ternary:
  """Gives the scales of stacked layers, [layers], the rank of the codes.

  Each scale is in a buffer of its own, although a method may have returned one
  array for both, or what it trains.
  """

  def align(scale: Array) -> Array:
    if scale.ndim in (0, ternary.codes.ndim):
      return own(scale)
    missing = ternary.codes.ndim - scale.ndim
    return own(scale.reshape(scale.shape + (1,) * missing))

  return dataclasses.replace(
    ternary, w_p=align(ternary.w_p), w_n=align(ternary.w_n)
  )
