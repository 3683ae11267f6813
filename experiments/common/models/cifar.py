"""Networks for images of 32x32: residual nets and VGG-small."""

import functools

import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from experiments.common.models.layers import Conv, norm


class ResNetBlock(nn.Module):
  """Two 3x3 convolutions with batch norm, and a shortcut without parameters.

  Args:
    channels: outputs.
    stride: of the first convolution and of the shortcut.
    axis_name: mapped axis over which batch statistics are shared.
  """

  channels: int
  stride: int
  axis_name: str | None = None

  @nn.compact
  def __call__(self, x: Array, train: bool) -> Array:
    """Maps [B, H, W, C] to [B, H / stride, W / stride, channels]."""
    conv = functools.partial(
      Conv, self.channels, (3, 3), padding=1, use_bias=False
    )
    normed = functools.partial(norm, self.axis_name, train)
    y = nn.relu(normed()(conv(strides=self.stride)(x)))
    y = normed()(conv()(y))
    x = x[:, :: self.stride, :: self.stride]
    more = self.channels - x.shape[-1]
    return nn.relu(y + jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, more))))


class ResNet(nn.Module):
  """ResNet of He et al. (arXiv 1512.03385) for images of 32x32.

  A 3x3 convolution, `stem`, three stages of blocks with 16, 32 and 64
  channels, a mean over pixels, and a linear `head`: 6 * blocks + 2 layers.
  ResNet-8 has 75,290 parameters, ResNet-20 269,722.

  Args:
    blocks: of a stage.
    classes: outputs.
    axis_name: mapped axis over which batch statistics are shared.
  """

  blocks: int
  classes: int
  axis_name: str | None = None

  @nn.compact
  def __call__(self, x: Array, train: bool) -> Array:
    """Maps images [B, H, W, C] to logits [B, classes]."""
    x = Conv(16, (3, 3), padding=1, use_bias=False, name="stem")(x)
    x = nn.relu(norm(self.axis_name, train)(x))
    for stage, channels in enumerate((16, 32, 64)):
      for i in range(self.blocks):
        stride = 2 if stage and not i else 1
        name = f"stage{stage}_block{i}"
        x = ResNetBlock(channels, stride, self.axis_name, name=name)(x, train)
    return nn.Dense(self.classes, name="head")(jnp.mean(x, (1, 2)))


class VGGSmall(nn.Module):
  """VGG-7 of TWN (arXiv 1605.04711) for images of 32x32, later "VGG-small".

  Two 3x3 convolutions of 128 channels, two of 256 and two of 512, max-pooling
  after each pair, a layer of 1024, and a linear `head`; batch norm and ReLU
  follow all but the head. The first convolution is `stem`. 12,979,082
  parameters with 10 classes. Nets of the same name in other papers have no
  layer of 1024.

  Args:
    classes: outputs.
    axis_name: mapped axis over which batch statistics are shared.
  """

  classes: int
  axis_name: str | None = None

  @nn.compact
  def __call__(self, x: Array, train: bool) -> Array:
    """Maps images [B, H, W, C] to logits [B, classes]."""
    normed = functools.partial(norm, self.axis_name, train)
    for stage, channels in enumerate((128, 256, 512)):
      for i in range(2):
        name = f"stage{stage}_conv{i}" if stage or i else "stem"
        x = Conv(channels, (3, 3), padding=1, use_bias=False, name=name)(x)
        x = nn.relu(normed()(x))
      x = nn.max_pool(x, (2, 2), strides=(2, 2))
    x = x.reshape((x.shape[0], -1))
    x = nn.relu(normed()(nn.Dense(1024, use_bias=False, name="dense")(x)))
    return nn.Dense(self.classes, name="head")(x)
