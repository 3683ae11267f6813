"""What the options name: networks, data sets, and changes of images.

Each is a registry by name, from which the command line takes its choices and
the report its titles. A new network or change of images is an entry here; a new
data set is one in `data.SETS`.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
from flax import linen as nn

from experiments.common import data, models
from experiments.common.data import augment, text
from experiments.common.errors import UsageError
from experiments.common.models.micronet import STACKED


@dataclasses.dataclass(frozen=True)
class Network:
  """A network by name.

  Attributes:
    title: What tables call it.
    make: From the options of a run, the number of outputs and the mapped axis
      over which batch statistics are shared, or None, to the network.
    stacks: Patterns of the kernels whose first axis enumerates layers.
    reads_text: Whether it takes text, not images.
    norms: Whether the options choose its norm.
    convolves: Whether it has convolutions.
  """

  title: str
  make: Callable[[Any, int, str | None], nn.Module]
  stacks: tuple[str, ...] = ()
  reads_text: bool = False
  norms: bool = False
  convolves: bool = True


def _resnet(depth: int) -> Network:
  """Returns a residual network for images of 32x32."""
  return Network(
    f"ResNet-{depth}",
    lambda _, classes, axis: models.ResNet((depth - 2) // 6, classes, axis),
  )


def _imagenet_resnet(
  depth: int, blocks: tuple[int, ...], bottleneck: bool
) -> Network:
  """Returns a residual network for ImageNet of so many blocks a layer."""
  return Network(
    f"ResNet-{depth}",
    lambda _, classes, axis: models.ImageNetResNet(
      blocks, bottleneck, classes, axis
    ),
  )


NETWORKS = {
  "mlp": Network(
    "MLP",
    lambda c, classes, axis: models.MLP(
      c.hidden, classes, axis, c.norm, c.layer_norm
    ),
    norms=True,
    convolves=False,
  ),
  "convnet": Network(
    "ConvNet",
    lambda c, classes, axis: models.ConvNet(
      c.hidden, classes, axis, c.norm, c.layer_norm
    ),
    norms=True,
  ),
  "lenet5": Network(
    "LeNet-5", lambda _, classes, axis: models.LeNet5(classes, axis)
  ),
  "vgg_small": Network(
    "VGG-small", lambda _, classes, axis: models.VGGSmall(classes, axis)
  ),
  "resnet8": _resnet(8),
  "resnet18": _imagenet_resnet(18, (2, 2, 2, 2), bottleneck=False),
  "resnet20": _resnet(20),
  "resnet32": _resnet(32),
  "resnet34": _imagenet_resnet(34, (3, 4, 6, 3), bottleneck=False),
  "resnet44": _resnet(44),
  "resnet50": _imagenet_resnet(50, (3, 4, 6, 3), bottleneck=True),
  "resnet56": _resnet(56),
  "micronet": Network(
    "MicroNet",
    lambda c, classes, axis: models.MicroNet(
      *c.scaling, classes=classes, axis_name=axis
    ),
    stacks=STACKED,
  ),
  "transformer": Network(
    "transformer",
    lambda c, classes, axis: models.Transformer(
      c.layers, c.width, text.CONTEXT, classes, axis
    ),
    stacks=STACKED,
    reads_text=True,
    convolves=False,
  ),
}


@dataclasses.dataclass(frozen=True)
class Augmentation:
  """A change of training images by name.

  Attributes:
    make: From the data set to the change, or None.
    any_size: Whether it takes images that differ in size.
    change: The same on the device; None for what the host alone can do.
  """

  make: Callable[[data.Dataset], augment.Augment | None]
  any_size: bool = False
  change: data.resident.Change | None = None


AUGMENTATIONS = {
  "none": Augmentation(
    lambda _: None, any_size=True, change=data.resident.UNCHANGED
  ),
  "flip_crop": Augmentation(
    lambda _: augment.flip_and_crop, change=data.resident.FLIP_AND_CROP
  ),
  "flip_crop_jitter_cutout": Augmentation(
    lambda dataset: augment.chain(
      augment.flip_and_crop,
      augment.color_jitter,
      functools.partial(augment.cutout, fill=dataset.mean),
    )
  ),
  "resized_crop": Augmentation(
    lambda dataset: functools.partial(
      augment.random_resized_crop, size=dataset.input_shape[0]
    ),
    any_size=True,
  ),
}


def title_of(name: str) -> str:
  """Returns what tables call a data set or a network.

  >>> title_of("cifar10"), title_of("resnet8"), title_of("mine")
  ('CIFAR-10', 'ResNet-8', 'mine')
  """
  if name in NETWORKS:
    return NETWORKS[name].title
  return data.SETS.get(name, data.DataSet()).title or name


def make_model(
  config: Any, classes: int, axis_name: str | None = None
) -> nn.Module:
  """Returns the network of a run.

  Args:
    config: its options, a `cli.Config`.
    classes: outputs.
    axis_name: mapped axis over which batch statistics are shared.
  """
  return NETWORKS[config.model].make(config, classes, axis_name)


def initial_variables(
  config: Any, dataset: data.Dataset
) -> tuple[Any, dict[str, Any]]:
  """Returns random parameters, and the other variables of the network."""
  model = make_model(config, dataset.num_classes)
  key = jax.random.key(config.seed)
  variables = model.init(key, dataset.blank, train=False)
  # On the host, because shard_map_step takes over the arrays it is given.
  model_state = jax.device_get(variables)
  return model_state.pop("params"), model_state


def load_dataset(config: Any) -> data.Dataset:
  """Returns the data of a run.

  Raises:
    UsageError: the options do not fit its images.
    DataNotPreparedError: it is not there.
  """
  size = config.image_size
  try:
    dataset = data.load_dataset(config.data, config.data_dir, size)
  except ValueError as error:
    raise UsageError(str(error)) from error
  streamed = isinstance(dataset.train["input"], data.Images)
  if streamed and not AUGMENTATIONS[config.augment].any_size:
    raise UsageError(
      f"augment={config.augment} keeps the sizes of images, in which those of"
      f" {config.data} differ: give --augment resized_crop."
    )
  return dataset


def augmentation(config: Any, dataset: data.Dataset) -> augment.Augment | None:
  """Returns what is done to training images."""
  return AUGMENTATIONS[config.augment].make(dataset)


def training_batches(
  config: Any, dataset: data.Dataset, shared: bool = True
) -> Any:
  """Returns the iterator over training batches.

  Args:
    config: the options, which name what is done to images.
    dataset: the data.
    shared: give this process its part of each batch, not the whole.
  """
  return data.batches(
    dataset.train,
    config.batch_size,
    seed=config.seed,
    mean=dataset.mean,
    std=dataset.std,
    augment=augmentation(config, dataset),
    process_index=jax.process_index() if shared else 0,
    process_count=jax.process_count() if shared else 1,
  )


def training_plans(config: Any, dataset: data.Dataset) -> data.resident.Plans:
  """Returns the plans of the training batches, for data on the device."""
  change = AUGMENTATIONS[config.augment].change
  assert change is not None
  return data.resident.Plans(
    len(dataset.train["label"]),
    config.batch_size,
    seed=config.seed,
    draw=change.draw,
  )
