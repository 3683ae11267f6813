"""Whether options fit the machine, the data and the net."""

import dataclasses
import os
from typing import Any

import jax

import tern_jax
from experiments.common import build, data, processes
from experiments.common.cli import Config
from experiments.common.errors import UsageError


def device_count(config: Config) -> int:
  """Returns the number of local devices that share a batch.

  Raises:
    UsageError: they are not there, or cannot share it evenly.
  """
  most = 1 if config.parallel == "jit" else jax.local_device_count()
  devices = most if config.devices is None else config.devices
  if not 1 <= devices <= most:
    raise UsageError(
      f"devices={devices}, but parallel={config.parallel} can use 1 to {most}"
      " here: give fewer, or another --parallel."
    )
  shares = devices * jax.process_count()
  if config.batch_size % (shares * config.micro_batches):
    raise UsageError(
      f"batch_size={config.batch_size} cannot be shared by {shares} devices in"
      f" {config.micro_batches} micro-batches each: give a multiple of both, or"
      " fewer --devices or --micro-batches."
    )
  return devices


def count_steps(config: Config, images: int) -> tuple[int, int]:
  """Returns the steps of both trainings.

  Args:
    config: the options.
    images: to train on.

  Returns:
    (steps of the float net, 0 where it is given; steps of the ternary net)

  Raises:
    UsageError: the images are less than a batch.
  """
  epoch = images // config.batch_size
  if not epoch:
    raise UsageError(
      f"batch_size={config.batch_size} exceeds the {images} training images:"
      " give a smaller one."
    )
  float_epochs = config.float_epochs or config.epochs
  if config.float_from is not None:
    float_epochs = 0
  return float_epochs * epoch, config.epochs * epoch


#: Part of a device's memory in which training data are small.
RESIDENT_PART = 0.1


def is_resident(config: Config, dataset: data.Dataset) -> bool:
  """Whether the training data shall lie on the device.

  Raises:
    UsageError: they shall, but cannot.
  """
  if config.resident == "off":
    return False
  if config.resident == "auto" and not loops_well(config):
    # A call for each step is no faster than on streamed batches.
    return False
  obstacle = _obstacle(config, dataset)
  if obstacle and config.resident == "on":
    raise UsageError(
      f"resident=on, but {obstacle}: give --resident off, or auto."
    )
  return obstacle is None


def loops_well(config: Config) -> bool:
  """Whether a loop of steps is as fast as the steps."""
  # In a loop XLA's convolutions take several times as long on a CPU.
  return jax.default_backend() != "cpu" or not (
    build.NETWORKS[config.model].convolves
  )


def _obstacle(config: Config, dataset: data.Dataset) -> str | None:
  """Returns why training data stay on the host; None if they need not."""
  if isinstance(dataset.train["input"], data.Images):
    return f"images of {config.data} differ in size, and are read one by one"
  if build.AUGMENTATIONS[config.augment].change is None:
    return f"augment={config.augment} is done by the host alone"
  if processes.count() > 1:
    return f"{processes.count()} processes share each batch"
  size = sum(x.nbytes for x in dataset.train.values())
  memory = _device_memory()
  part = RESIDENT_PART if config.resident == "auto" else 1
  if size > part * memory:
    return (
      f"training data of {size / 2**20:,.0f} MiB do not fit into a device with"
      f" {memory / 2**20:,.0f} MiB"
    )
  return None


def _device_memory() -> int:
  """Returns the bytes of a device's memory."""
  known = jax.local_devices()[0].memory_stats() or {}
  if "bytes_limit" in known:
    return known["bytes_limit"]
  # A CPU does not tell: its memory is that of the machine.
  return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def fit(config: Config, params: Any, model_state: dict[str, Any]) -> Config:
  """Returns the config with sparsities in the place of asked bytes.

  Args:
    config: the options.
    params: at which the training of the ternary net starts.
    model_state: its other variables.

  Raises:
    UsageError: the options do not fit the method or the net.
  """
  where = tern_jax.kernels(exclude=config.exclude)
  try:
    method = config.method.fitted(params, model_state, where)
    method.plan(config.epochs, where.largest(params, config.stacked))
  except ValueError as error:
    raise UsageError(str(error)) from error
  workdir = str(config.directory)
  return dataclasses.replace(config, method=method, workdir=workdir)
