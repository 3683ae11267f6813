"""Networks for small images: MLP, LeNet-5, and a small convolutional net."""

import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from experiments.common.models.layers import INIT, Conv, norm


class MLP(nn.Module):
  """Multi-layer perceptron.

  Args:
    hidden: widths of the hidden layers.
    classes: outputs.
    axis_name: mapped axis over which batch statistics are shared.
    norm: batch norm after each hidden layer, instead of a bias in it.
  """

  hidden: tuple[int, ...]
  classes: int
  axis_name: str | None = None
  norm: bool = True

  @nn.compact
  def __call__(self, x: Array, train: bool) -> Array:
    """Maps images [B, H, W, C] to logits [B, classes]."""
    x = x.reshape((x.shape[0], -1))
    for width in self.hidden:
      x = nn.Dense(width, use_bias=not self.norm)(x)
      if self.norm:
        x = norm(self.axis_name, train)(x)
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
      x = nn.relu(Conv(channels, (5, 5), padding=padding)(x))
      x = nn.max_pool(x, (2, 2), strides=(2, 2))
    x = x.reshape((x.shape[0], -1))
    for width in (120, 84):
      x = nn.relu(nn.Dense(width)(x))
    return nn.Dense(self.classes)(x)


class PatchConv(nn.Module):
  """3x3 convolution of stride 2 without bias, as a product with patches.

  The same as `nn.Conv` with padding 1, and faster where XLA:CPU falls back to
  a slow convolution: in loops, and with other kernels for each mapped net.

  Args:
    channels: outputs.
  """

  channels: int

  @nn.compact
  def __call__(self, x: Array) -> Array:
    """Maps [B, H, W, C] to half of H and W, rounded up."""
    _, height, width, inputs = x.shape
    shape = 3, 3, inputs, self.channels
    kernel = self.param("kernel", INIT, shape, x.dtype)
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    shifted = [
      x[:, i : i + height : 2, j : j + width : 2]
      for i in range(3)
      for j in range(3)
    ]
    patches = jnp.concatenate(shifted, -1)
    return patches @ kernel.reshape(-1, self.channels)


class ConvNet(nn.Module):
  """Small convolutional net, for many trainings in one program.

  3x3 convolutions of stride 2, the first named `stem`, each with batch norm
  and ReLU, a mean over pixels, and a linear `head`.

  Args:
    channels: of the convolutions.
    classes: outputs.
    axis_name: mapped axis over which batch statistics are shared.
  """

  channels: tuple[int, ...]
  classes: int
  axis_name: str | None = None

  @nn.compact
  def __call__(self, x: Array, train: bool) -> Array:
    """Maps images [B, H, W, C] to logits [B, classes]."""
    for i, channels in enumerate(self.channels):
      x = PatchConv(channels, name=f"conv{i}" if i else "stem")(x)
      x = nn.relu(norm(self.axis_name, train)(x))
    return nn.Dense(self.classes, name="head")(jnp.mean(x, (1, 2)))
