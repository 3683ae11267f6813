"""The models of the experiments, in Flax Linen."""

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
  11,689,512 parameters, ResNet-50, of bottlenecks, 25,557,032.

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


#: (blocks of each layer, bottleneck) by the name of a network for ImageNet.
IMAGENET = {
  "resnet18": ((2, 2, 2, 2), False),
  "resnet50": ((3, 4, 6, 3), True),
}


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


class TransformerBlock(nn.Module):
  """Causal self-attention and a perceptron, each on a norm, added to its input.

  Six kernels without biases: `query`, `key`, `value` and `out`, `up` to four
  times the width and `down` again. A head has 32 channels.
  """

  @nn.compact
  def __call__(self, x: Array) -> Array:
    """Maps [B, T, width] to the same, each position by those up to it."""
    width = x.shape[-1]
    dense = functools.partial(nn.Dense, use_bias=False)
    y = nn.RMSNorm(name="norm1")(x)
    query, key, value = (
      dense(width, name=name)(y).reshape((*y.shape[:-1], -1, 32))
      for name in ("query", "key", "value")
    )
    y = jax.nn.dot_product_attention(query, key, value, is_causal=True)
    x = x + dense(width, name="out")(y.reshape(x.shape))
    y = nn.gelu(dense(4 * width, name="up")(nn.RMSNorm(name="norm2")(x)))
    return x + dense(width, name="down")(y)


class Transformer(nn.Module):
  """Language model: a transformer that guesses the token after each position.

  Embeddings of tokens and of positions, `blocks` in one scan over stacked
  parameters, a norm, and a linear `head`. No dropout.

  Args:
    layers: blocks.
    width: channels, a multiple of 32.
    context: positions at most.
    classes: tokens there are.
    axis_name: not used, there are no batch statistics.
  """

  layers: int
  width: int
  context: int
  classes: int
  axis_name: str | None = None

  @nn.compact
  def __call__(self, x: Array, train: bool) -> Array:
    """Maps tokens, int [B, T], to logits [B, T, classes]."""
    del train
    positions = jnp.arange(x.shape[1])
    x = nn.Embed(self.classes, self.width, name="tokens")(x)
    x += nn.Embed(self.context, self.width, name="positions")(positions[None])
    blocks = nn.scan(
      lambda block, x, _: (block(x), None),
      variable_axes={"params": 0},
      split_rngs={"params": True},
      length=self.layers,
    )
    x, _ = blocks(TransformerBlock(name="blocks"), x, None)
    return nn.Dense(self.classes, name="head")(nn.RMSNorm(name="norm")(x))
