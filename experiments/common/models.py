"""The models of the experiments, in Flax Linen."""

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
