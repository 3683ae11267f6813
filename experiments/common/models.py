"""The models of the experiments, in Flax Linen."""

import functools

import jax.numpy as jnp
from flax import linen as nn
from jax import Array


class MLP(nn.Module):
  """Multi-layer perceptron with batch norm after each hidden layer.

  Args:
    hidden: widths of the hidden layers.
    classes: outputs.
    axis_name: mapped axis over which batch statistics are shared.
  """

  hidden: tuple[int, ...]
  classes: int
  axis_name: str | None = None

  @nn.compact
  def __call__(self, x: Array, train: bool) -> Array:
    """Maps images [B, H, W, C] to logits [B, classes]."""
    x = x.reshape((x.shape[0], -1))
    for width in self.hidden:
      x = nn.Dense(width, use_bias=False)(x)
      x = nn.BatchNorm(
        use_running_average=not train,
        momentum=0.9,
        axis_name=self.axis_name,
      )(x)
      x = nn.relu(x)
    return nn.Dense(self.classes)(x)


class LeNet5(nn.Module):
  """LeNet-5 of LeCun et al. (1998), with ReLU and max-pooling.

  Two 5x5 convolutions of 6 and 16 channels, then 120-84-classes; 61,706
  parameters on 28x28 gray images. No normalization layers.

  Args:
    classes: outputs.
    axis_name: not used, there are no batch statistics.
  """

  classes: int
  axis_name: str | None = None

  @nn.compact
  def __call__(self, x: Array, train: bool) -> Array:
    """Maps images [B, 28, 28, C] to logits [B, classes]."""
    del train
    for channels, padding in ((6, "SAME"), (16, "VALID")):
      x = nn.relu(nn.Conv(channels, (5, 5), padding=padding)(x))
      x = nn.max_pool(x, (2, 2), strides=(2, 2))
    x = x.reshape((x.shape[0], -1))
    for width in (120, 84):
      x = nn.relu(nn.Dense(width)(x))
    return nn.Dense(self.classes)(x)


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
      nn.Conv, self.channels, (3, 3), padding=1, use_bias=False
    )
    norm = functools.partial(
      nn.BatchNorm,
      use_running_average=not train,
      momentum=0.9,
      axis_name=self.axis_name,
    )
    y = nn.relu(norm()(conv(strides=self.stride)(x)))
    y = norm()(conv()(y))
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
    x = nn.Conv(16, (3, 3), padding=1, use_bias=False, name="stem")(x)
    x = nn.BatchNorm(
      use_running_average=not train, momentum=0.9, axis_name=self.axis_name
    )(x)
    x = nn.relu(x)
    for stage, channels in enumerate((16, 32, 64)):
      for i in range(self.blocks):
        stride = 2 if stage and not i else 1
        name = f"stage{stage}_block{i}"
        x = ResNetBlock(channels, stride, self.axis_name, name=name)(x, train)
    return nn.Dense(self.classes, name="head")(jnp.mean(x, (1, 2)))
