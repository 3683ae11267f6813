"""Statistics of arrays and of their channels, in float32 or wider."""

import math
from collections.abc import Callable, Collection
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from tern_jax.core.checks import concrete
from tern_jax.core.containers import Ternary
from tern_jax.core.types import Array, ChannelAxis

_Made = TypeVar("_Made")


def widen(x: Array) -> Array:
  """Returns an array in the precision of the maths: float32, or its float64.

  >>> widen(jnp.ones(2, jnp.bfloat16)).dtype
  dtype('float32')
  """
  return x.astype(jnp.float64 if x.dtype == jnp.float64 else jnp.float32)


def either(
  choice: Array | bool,
  on_true: Callable[[], _Made],
  on_false: Callable[[], _Made],
) -> _Made:
  """Returns what one of two functions makes, as `jax.lax.cond` does.

  Outside of a program the choice is Python's: there each conditional would be
  compiled at each call.

  >>> either(True, lambda: 1, lambda: 2)
  1
  """
  if concrete(choice):
    return on_true() if choice else on_false()
  return jax.lax.cond(choice, on_true, on_false)


def whole(x: Array, axes: Collection[int]) -> Array:
  """Has axes whole on each device, as explicit meshes ask for to split them."""
  sharding = jax.typeof(x).sharding
  spec = [None if i in axes else s for i, s in enumerate(sharding.spec)]
  if spec == list(sharding.spec):
    return x
  return jax.sharding.reshard(x, NamedSharding(sharding.mesh, P(*spec)))


def reduced_axes(
  x: Array | np.ndarray, channel_axis: ChannelAxis
) -> tuple[int, ...] | None:
  """Axes over which a statistic of each channel is taken; None for all, 0-d.

  A tuple of axes has a channel for each combination of their indices.

  >>> reduced_axes(jnp.ones((3, 3, 8, 16)), -1)
  (0, 1, 2)
  >>> reduced_axes(jnp.ones((3, 3, 8, 16)), (0, -1))
  (1, 2)
  """
  if channel_axis is None:
    return None
  kept = channel_axis if isinstance(channel_axis, tuple) else (channel_axis,)
  if not all(isinstance(axis, int | np.integer) for axis in kept):
    raise TypeError(
      f"channel_axis={channel_axis!r} is no axis: give an int, a tuple of ints"
      " such as (-2, -1) for one scale for each pair, or None."
    )
  if not all(-x.ndim <= axis < x.ndim for axis in kept):
    raise ValueError(
      f"channel_axis={channel_axis} is no axis of an array of shape"
      f" {x.shape}: use -1 for the output channels of Flax kernels, 0 for"
      " Equinox weights, None for one scale a tensor."
    )
  return tuple(
    i for i in range(x.ndim) if i not in kept and i - x.ndim not in kept
  )


def mean_of(x: Array, axes: tuple[int, ...] | None) -> Array:
  """Mean over axes with ones in their place, or of all, 0-d; 0 of nothing.

  >>> mean_of(jnp.ones((2, 3)), (0,)).shape, float(mean_of(jnp.ones(0), None))
  ((1, 3), 0.0)
  """
  keep = axes is not None
  if not x.size:
    return jnp.sum(x, axes, keepdims=keep)
  return jnp.mean(x, axes, keepdims=keep)


def rms(x: Array, channel_axis: ChannelAxis = None) -> Array:
  """Root mean square of an array, or of each channel with ones beside them.

  >>> float(rms(jnp.array([3., 4.]))), rms(jnp.ones((2, 3)), -1).shape
  (3.535533905029297, (1, 3))
  """
  axes = reduced_axes(x, channel_axis)
  return jnp.sqrt(mean_of(jnp.square(widen(x)), axes))


def least_scale(dtype: DTypeLike) -> float:
  """Where trained magnitudes stop shrinking.

  Not the least number of the dtype: products of gradients with weights of that
  size would vanish, and the magnitude could never grow again.

  >>> least_scale(jnp.float32)
  1e-12
  """
  return max(1e-12, float(jnp.finfo(dtype).tiny))


def scale_floor(start: Array) -> Array:
  """Where a trained magnitude stops shrinking: a tenth of where it starts.

  Behind a normalization layer the loss does not depend on a magnitude, so Adam
  lets it wander; close to 0 its layer would give nothing and learn nothing.

  >>> float(scale_floor(jnp.array(2.0)))
  0.20000000298023224
  """
  floor = start * jnp.asarray(0.1, start.dtype)
  return jnp.maximum(floor, jnp.asarray(least_scale(start.dtype), start.dtype))


def alive(scale: Array) -> Array:
  """Magnitudes to train: in place of 0, which no weight has, the largest.

  >>> alive(jnp.array([[0.0, 0.5, 2.0]])).tolist(), float(alive(jnp.zeros(())))
  ([[2.0, 0.5, 2.0]], 1.0)
  """
  top = jnp.max(scale, initial=0)
  one = jnp.ones((), scale.dtype)
  return jnp.where(scale > 0, scale, jnp.where(top > 0, top, one))


def one_magnitude(ternary: Ternary, method: object) -> Array:
  """Returns the magnitude of both signs; a ValueError if concrete ones differ.

  >>> one = jnp.ones(())
  >>> float(one_magnitude(Ternary(jnp.ones(2, jnp.int8), one, one), None))
  1.0
  """
  w_p, w_n = ternary.w_p, ternary.w_n
  if concrete(w_p) and not jnp.array_equal(w_p, w_n):
    raise ValueError(
      f"{method!r} has one magnitude for both signs, but these weights have"
      f" two, up to {jnp.max(w_p):.6g} and {jnp.max(w_n):.6g}: take a method"
      " with two, such as TTQ."
    )
  return w_p


def with_mean(
  codes: Array, mean: Array, dtype: DTypeLike, channel_axis: ChannelAxis = None
) -> Array:
  """Latents of given codes and of a given mean magnitude of the nonzeros.

  The magnitudes are two neighboring multiples of a power of two, so coarse that
  sums of them are exact: a mean of many equal floats, summed one by one, would
  be off by more than its rounding, and differently in every order.

  Exact for up to 2^13 nonzeros of a channel, else to within 2^-10. The mean is
  float32 or wider, 0-d or one for each channel.

  >>> codes = jnp.ones(6, jnp.int8)
  >>> w = with_mean(codes, jnp.array(1 + 2**-8), jnp.bfloat16)
  >>> w.tolist()
  [1.0078125, 1.0078125, 1.0078125, 1.0, 1.0, 1.0]
  """
  axes = reduced_axes(codes, channel_axis)
  keep, axes = axes is not None, axes or tuple(range(codes.ndim))
  nonzero = codes != 0
  count = jnp.sum(nonzero, axes, mean.dtype, keepdims=keep)
  exponent, size = jnp.frexp(mean)[1], jnp.frexp(count)[1]
  bits = jnp.maximum(jnp.finfo(mean.dtype).nmant - size, 10)
  bits = jnp.minimum(bits, jnp.finfo(dtype).nmant)
  unit = jnp.ldexp(jnp.ones_like(mean), exponent - 1 - bits)
  total = jnp.round(count * (mean / unit))
  low = jnp.floor(total / jnp.maximum(count, 1))
  # As many as make up the sum are one unit larger: the first of a channel.
  front = tuple(range(len(axes)))
  moved = jnp.moveaxis(nonzero, axes, front)
  n, rest = math.prod(moved.shape[: len(axes)]), moved.shape[len(axes) :]
  flat = moved.reshape(n, *rest)
  rank = jnp.cumsum(flat, 0, mean.dtype).reshape(moved.shape)
  larger = jnp.moveaxis(rank, front, axes) <= total - low * count
  magnitude = unit * (low + larger.astype(mean.dtype))
  return codes.astype(dtype) * magnitude.astype(dtype)
