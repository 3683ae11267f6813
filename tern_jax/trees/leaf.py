"""A method applied to one leaf: to each layer of a stack, in groups."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from tern_jax.core.containers import Ternary
from tern_jax.core.method import Ternarizer
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
        return fn(method, *args)
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
        return method.invert(ternary, count)
      grouped, axis, view = self._grouped(method, ternary.shape)
      w_p, w_n = (
        jnp.expand_dims(scale, axis + 1) if scale.ndim else scale
        for scale in (ternary.w_p, ternary.w_n)
      )
      viewed = Ternary(ternary.codes.reshape(view), w_p, w_n)
      w, scales, state = grouped.invert(viewed, count)
      return w.reshape(ternary.shape), scales, state
    except ValueError as error:
      raise ValueError(f"{self.path}: {error}") from error

  def _in_groups(
    self, method: Ternarizer, fn: OfMethod, w: Array, *args: Any
  ) -> Any:
    """Applies a function to one layer, with groups as its channels."""
    grouped, axis, view = self._grouped(method, w.shape)
    out = fn(grouped, w.reshape(view), *args)
    if isinstance(out, Ternary):
      w_p, w_n = (
        scale.squeeze(axis + 1) if scale.ndim else scale
        for scale in (out.w_p, out.w_n)
      )
      return Ternary(out.codes.reshape(w.shape), w_p, w_n)
    return out.reshape(w.shape) if isinstance(out, jax.Array) else out

  def _grouped(
    self, method: Ternarizer, shape: tuple[int, ...]
  ) -> tuple[Ternarizer, int, tuple[int, ...]]:
    """Returns the method of a layer's groups, their axis, and their view."""
    axis, g = self._input_axis(shape), self.group_size or 1
    # The axis is split in place, not moved, and so keeps its sharding.
    view = (*shape[:axis], shape[axis] // g, g, *shape[axis + 1 :])
    groups = tuple(i for i in range(len(view)) if i != axis + 1)
    return method.replace(channel_axis=groups), axis, view

  def _input_axis(self, shape: tuple[int, ...]) -> int:
    """Returns the axis of a layer that is divided into groups."""
    g, axes = self.group_size or 1, {-1: len(shape) - 2, 0: 1}
    channel = self.method.channel_axis
    if channel not in axes or len(shape) < 2:
      raise ValueError(
        f"{self.path}: group_size={g} divides the channels of a layer of two"
        " or more axes by a method with channel_axis=-1 (Flax, Haiku) or 0"
        f" (Equinox); got shape {shape} and {self.method!r}."
      )
    axis = axes[channel]
    if shape[axis] % g:
      raise ValueError(
        f"{self.path}: group_size={g} does not divide the {shape[axis]} inputs,"
        f" axis {axis} of shape {shape}: choose a divisor, or exclude this leaf"
        " in kernels(exclude=...)."
      )
    return axis


def aligned(ternary: Ternary) -> Ternary:
  """Gives the scales of stacked layers, [layers], the rank of the codes."""

  def align(scale: Array) -> Array:
    if scale.ndim in (0, ternary.codes.ndim):
      return scale
    missing = ternary.codes.ndim - scale.ndim
    return scale.reshape(scale.shape + (1,) * missing)

  return dataclasses.replace(
    ternary, w_p=align(ternary.w_p), w_n=align(ternary.w_n)
  )
