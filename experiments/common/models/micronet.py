"""The supernets of EC2T: one family of residual nets, scaled to a budget.

A small net is scaled in depth and width until its float accuracy suffices, and
only then made ternary. Identical blocks are one scan over stacked parameters,
so that on an accelerator a deep net compiles as fast as a shallow one; give
each layer of a stack its own scales by
`ParamTransform(method, where, stacked=STACKED)`.
"""

import functools
import math

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from experiments.common.models import layers

#: The published factors (d, w) of depth and width: `d w^2` is close to 2, which
#: doubles the operations of a net with each 1 that phi grows.
GRID = ((1.0, 1.4), (1.2, 1.3), (1.4, 1.2), (1.6, 1.1), (1.7, 1.1), (1.9, 1.0))

#: Patterns of the kernels whose first axis enumerates layers.
STACKED = ("blocks",)


def scale(d: float, w: float, phi: float) -> tuple[int, tuple[int, int, int]]:
  """Depth and widths of the residual net of a scaling.

  `blocks = ceil(7 d^phi)` in each of the three stages, whose channels are 16,
  32 and 64 times `w^phi`, rounded to the nearest multiple of 8, halves up, but
  up where the nearest would take away more than a tenth.

  Args:
    d: factor of the depth, > 0.
    w: factor of the width, > 0.
    phi: how often both are applied, >= 0; 0 for the unscaled net.

  Returns:
    (blocks, widths): blocks of each stage, and the channels of the stages.

  Raises:
    ValueError: a factor is not positive, or phi is negative.

  >>> scale(1.4, 1.2, 3.5)
  (23, (32, 64, 120))
  >>> scale(1.4, 1.2, 1), scale(1, 1, 0)
  ((10, (24, 40, 80)), (7, (16, 32, 64)))

  Source: Marban et al., arXiv 2004.01077, and the authors' code. Differs from
  the paper: the tenth is that code's, and gives the published sizes.
  """
  if not (d > 0 and w > 0 and phi >= 0):
    raise ValueError(
      f"got d={d}, w={w} and phi={phi}: d and w must be positive, and phi at"
      " least 0. The published supernet is d=1.4, w=1.2, phi=3.5."
    )

  def width(channels: int) -> int:
    wanted = channels * w**phi
    nearest = 8 * max(1, math.floor(wanted / 8 + 0.5))
    return nearest if nearest >= 0.9 * wanted else nearest + 8

  return math.ceil(7 * d**phi), (width(16), width(32), width(64))


class Block(nn.Module):
  """Residual block: norm, convolution, norm, ReLU, convolution, norm.

  Dropout at rate 0.2 stands before the second convolution. The shortcut is the
  identity, or a 1x1 convolution with norm where the shape changes; nothing
  follows the sum.

  Args:
    channels: outputs.
    stride: of the first convolution and of the shortcut.
    axis_name: mapped axis over which batch statistics are shared.
  """

  channels: int
  stride: int = 1
  axis_name: str | None = None

  @nn.compact
  def __call__(self, x: Array, train: bool) -> Array:
    """Maps [B, H, W, C] to [B, H / stride, W / stride, channels]."""
    norm = functools.partial(layers.norm, self.axis_name, train)
    y = norm("norm1")(x)
    y = layers.conv(self.channels, 3, self.stride, "conv1")(y)
    y = nn.relu(norm("norm2")(y))
    dropping = train and self.has_rng("dropout")
    y = nn.Dropout(0.2, deterministic=not dropping)(y)
    y = layers.conv(self.channels, 3, 1, "conv2")(y)
    y = norm("norm3")(y)
    if y.shape != x.shape:
      x = layers.conv(self.channels, 1, self.stride, "shortcut")(x)
      x = norm("shortcut_norm")(x)
    return x + y


class ResidualStage(nn.Module):
  """Residual blocks of one width, those that keep the shape in one scan.

  Args:
    blocks: how many.
    channels: outputs.
    stride: of the first block.
    axis_name: mapped axis over which batch statistics are shared.
  """

  blocks: int
  channels: int
  stride: int = 1
  axis_name: str | None = None

  @nn.compact
  def __call__(self, x: Array, train: bool) -> Array:
    """Maps [B, H, W, C] to [B, H / stride, W / stride, channels]."""
    blocks = self.blocks
    if self.stride > 1 or x.shape[-1] != self.channels:
      first = Block(self.channels, self.stride, self.axis_name, name="first")
      x, blocks = first(x, train), blocks - 1
    if blocks:
      # XLA:CPU takes 40 times as long for gradients of convolutions in a loop.
      in_a_row = blocks if jax.default_backend() == "cpu" else 1
      rest = nn.scan(
        lambda block, x, _: (block(x, train), None),
        variable_axes={"params": 0, "batch_stats": 0},
        split_rngs={"params": True, "dropout": True},
        length=blocks,
        unroll=in_a_row,
      )
      block = Block(self.channels, axis_name=self.axis_name, name="blocks")
      x, _ = rest(block, x, None)
    return x


class MicroNet(nn.Module):
  """The supernet that EC2T makes ternary: a ResNet-44, scaled by (d, w, phi).

  A 3x3 convolution, `stem`, with norm and ReLU, three stages of blocks at
  strides 1, 2 and 2 (see `scale`), ReLU, a mean over pixels, and a linear
  `head`. All that is made ternary are the convolutions of the blocks,
  `kernels(exclude=("stem", "head", "shortcut"))`: with d=1.4, w=1.2, phi=3.5
  and 10 classes 138 layers with 8,002,368 of 8,044,234 parameters. In training
  it wants `rngs={"dropout": key}`; without, it drops nothing, as is right for
  batch statistics that are only estimated anew.

  Args:
    d: factor of the depth.
    w: factor of the width.
    phi: how often both are applied.
    classes: outputs.
    axis_name: mapped axis over which batch statistics are shared.

  Source: Marban et al., arXiv 2004.01077, and the authors' code. Differs from
  the paper: its 8.02 M parameters are those of this net with norms folded into
  16-bit biases, 8.019 M, and its sizes at phi 1.5, 2, 3 and 4 those of d=1.2,
  w=1.3; the initial weights have no tails beyond two standard deviations.
  """

  d: float
  w: float
  phi: float
  classes: int
  axis_name: str | None = None

  @nn.compact
  def __call__(self, x: Array, train: bool) -> Array:
    """Maps images [B, H, W, C] to logits [B, classes]."""
    blocks, widths = scale(self.d, self.w, self.phi)
    x = layers.conv(widths[0], 3, 1, "stem")(x)
    x = nn.relu(layers.norm(self.axis_name, train, "stem_norm")(x))
    for n, width in enumerate(widths):
      stride = 2 if n else 1
      x = ResidualStage(
        blocks, width, stride, self.axis_name, name=f"stage{n}"
      )(x, train)
    x = jnp.mean(nn.relu(x), (1, 2))
    return nn.Dense(self.classes, kernel_init=layers.INIT, name="head")(x)
