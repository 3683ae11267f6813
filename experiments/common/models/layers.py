"""Convolution and norm, as the networks of the experiments have them."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

INIT = nn.initializers.he_normal()

#: Floats of the images with which XLA:CPU is fast at a kernel's gradient.
_CACHED = 2**17
#: Parts of a batch at most, each of which is an operation of the program.
_PARTS = 16


def convolve(
  x: Array, kernel: Array, strides: Any, padding: Any, **kwargs: Any
) -> Array:
  """Convolves as `jax.lax.conv_general_dilated`; on CPU, with a fast gradient.

  For the gradient of a kernel XLA:CPU convolves the images with the gradient of
  the outputs. Where those of a batch exceed the cache, this takes most of the
  time of a step: 230 ms for 128 images [32, 32, 16] and a 3x3 kernel on one
  core, and 20 ms in parts of eight images.

  Args:
    x: images [B, H, W, C].
    kernel: [height, width, C, O].
    strides: as `jax.lax.conv_general_dilated` takes them.
    padding: likewise.
    **kwargs: its other arguments.
  """

  def conv(x: Array, kernel: Array) -> Array:
    return jax.lax.conv_general_dilated(x, kernel, strides, padding, **kwargs)

  if jax.default_backend() != "cpu":
    return conv(x, kernel)

  def forward(x: Array, kernel: Array) -> tuple[Array, Any]:
    return conv(x, kernel), (x, kernel)

  def backward(kept: Any, g: Array) -> tuple[Array, Array]:
    x, kernel = kept
    (to_x,) = jax.linear_transpose(lambda x: conv(x, kernel), x)(g)
    size = max(_CACHED // x[0].size, math.ceil(len(x) / _PARTS))
    to_kernel = jnp.zeros_like(kernel)
    for first in range(0, len(x), size):
      part = x[first : first + size]
      transpose = jax.linear_transpose(functools.partial(conv, part), kernel)
      to_kernel += transpose(g[first : first + size])[0]
    return to_x, to_kernel

  fast = jax.custom_vjp(conv)
  fast.defvjp(forward, backward)
  return fast(x, kernel)


Conv = functools.partial(nn.Conv, conv_general_dilated=convolve)


def conv(channels: int, size: int, stride: int, name: str) -> nn.Conv:
  """Returns a convolution without bias that keeps H and W at stride 1."""
  return Conv(
    channels,
    (size, size),
    stride,
    padding=size // 2,
    use_bias=False,
    kernel_init=INIT,
    name=name,
  )


def norm(
  axis_name: str | None, train: bool, name: str | None = None
) -> nn.BatchNorm:
  """Returns batch norm, with statistics shared over a mapped axis."""
  return nn.BatchNorm(
    use_running_average=not train, momentum=0.9, axis_name=axis_name, name=name
  )
