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
    layer_norm: layer norm in the place of batch norm.
  """

  hidden: tuple[int, ...]
  classes: int
  axis_name: str | None = None
  norm: bool = True
  layer_norm: bool = False

  @nn.compact
  def __call__(self, x: Array, train: bool) -> Array:
    """Maps images [B, H, W, C] to logits [B, classes]."""
    x = x.reshape((x.shape[0], -1))
    for width in self.hidden:
      x = nn.Dense(width, use_bias=not self.norm)(x)
      x = _normalized(self, x, train)
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
  """3x3 convolution of stride 2, as a product with patches.

  The same as `nn.Conv` with padding 1, and faster where XLA:CPU falls back to
  a slow convolution: in loops, and with other kernels for each mapped net.

  Args:
    channels: outputs.
    use_bias: whether there is a bias.
  """

  channels: int
  use_bias: bool = False

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
    x = patches @ kernel.reshape(-1, self.channels)
    if self.use_bias:
      zeros = nn.initializers.zeros_init()
      bias = self.param("bias", zeros, (self.channels,), x.dtype)
      x += jnp.expand_dims(bias, (0, 1, 2))
    return x


class ConvNet(nn.Module):
  """Small convolutional net, for many trainings in one program.

  3x3 convolutions of stride 2, the first named `stem`, each with a norm and
  ReLU, a mean over pixels, and a linear `head`.

  Args:
    channels: of the convolutions.
    classes: outputs.
    axis_name: mapped axis over which batch statistics are shared.
    norm: batch norm after each convolution, instead of a bias in it.
    layer_norm: layer norm over channels in the place of batch norm.
  """

  channels: tuple[int, ...]
  classes: int
  axis_name: str | None = None
  norm: bool = True
  layer_norm: bool = False

  @nn.compact
  def __call__(self, x: Array, train: bool) -> Array:
    """Maps images [B, H, W, C] to logits [B, classes]."""
    for i, channels in enumerate(self.channels):
      name = f"conv{i}" if i else "stem"
      x = PatchConv(channels, not self.norm, name=name)(x)
      x = nn.relu(_normalized(self, x, train))
    return nn.Dense(self.classes, name="head")(jnp.mean(x, (1, 2)))


def _normalized(net: MLP | ConvNet, x: Array, train: bool) -> Array:
  """Returns activations after the norm of a net, which may have none."""
  if not net.norm:
    return x
  return nn.LayerNorm()(x) if net.layer_norm else norm(net.axis_name, train)(x)
