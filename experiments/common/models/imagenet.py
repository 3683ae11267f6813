"""Residual networks for images of 224x224."""

import functools

import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from experiments.common.models.layers import conv, norm


class ImageNetBlock(nn.Module):
  """Residual block: two 3x3 convolutions, or 1x1, 3x3 and 1x1 as a bottleneck.

  Batch norm follows each convolution. The shortcut is the identity, or a 1x1
  convolution with norm where the shape changes.

  Args:
    channels: outputs, a quarter of them of a bottleneck.
    stride: of the first 3x3 convolution and of the shortcut.
    bottleneck: which kind of block.
    axis_name: mapped axis over which batch statistics are shared.
  """

  channels: int
  stride: int
  bottleneck: bool
  axis_name: str | None = None

  @nn.compact
  def __call__(self, x: Array, train: bool) -> Array:
    """Maps [B, H, W, C] to [B, H / stride, W / stride, outputs]."""
    normed = functools.partial(norm, self.axis_name, train)
    width = self.channels
    layers = ((width, 3, self.stride), (width, 3, 1))
    if self.bottleneck:
      layers = ((width, 1, 1), (width, 3, self.stride), (4 * width, 1, 1))
    y = x
    for n, (channels, size, stride) in enumerate(layers, 1):
      y = normed(f"norm{n}")(conv(channels, size, stride, f"conv{n}")(y))
      y = nn.relu(y) if n < len(layers) else y
    if y.shape != x.shape:
      x = conv(y.shape[-1], 1, self.stride, "shortcut")(x)
      x = normed("shortcut_norm")(x)
    return nn.relu(x + y)


class ImageNetResNet(nn.Module):
  """ResNet of He et al. (arXiv 1512.03385) for images of 224x224.

  A 7x7 convolution at stride 2, `stem`, max-pooling, four layers of blocks, a
  mean over pixels, and a linear `head`. With 1000 classes ResNet-18 has
  11,689,512 parameters, ResNet-34 21,797,672, and ResNet-50, of bottlenecks,
  25,557,032.

  Args:
    blocks: of each layer.
    bottleneck: which kind of block.
    classes: outputs.
    axis_name: mapped axis over which batch statistics are shared.
    width: channels of the first layer.

  Differs from the paper: a bottleneck has its stride in the 3x3 convolution,
  not in the first 1x1, as in "v1.5" and in torchvision.
  """

  blocks: tuple[int, ...]
  bottleneck: bool
  classes: int
  axis_name: str | None = None
  width: int = 64

  @nn.compact
  def __call__(self, x: Array, train: bool) -> Array:
    """Maps images [B, H, W, C] to logits [B, classes]."""
    x = conv(self.width, 7, 2, "stem")(x)
    x = nn.relu(norm(self.axis_name, train, "stem_norm")(x))
    x = nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))
    for layer, blocks in enumerate(self.blocks):
      for i in range(blocks):
        x = ImageNetBlock(
          self.width * 2**layer,
          2 if layer and not i else 1,
          self.bottleneck,
          self.axis_name,
          name=f"layer{layer + 1}_block{i}",
        )(x, train)
    return nn.Dense(self.classes, name="head")(jnp.mean(x, (1, 2)))
