"""The command line of the experiments: one typed config, read by tyro."""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any, Literal

import jax
import tyro

import tern_jax
from experiments.common import methods, supernet

Model = Literal[
  "mlp",
  "lenet5",
  "resnet8",
  "resnet20",
  "resnet32",
  "resnet44",
  "resnet56",
  "micronet",
]


class UsageError(Exception):
  """What was asked for cannot be done; the message says what to do."""


@dataclasses.dataclass(frozen=True)
class Config:
  """All that a run depends on."""

  method: methods.Method = dataclasses.field(default_factory=methods.Sca)
  """How weights are made ternary."""
  data: str = "digits"
  """Data set: digits, or any prepared set of images by its tfds name."""
  data_dir: str | None = None
  """Directory of prepared data sets; None for the usual one."""
  augment: Literal["none", "flip_crop", "flip_crop_jitter_cutout"] = "none"
  """What is done to training images."""
  model: Model = "mlp"
  """Network."""
  hidden: tuple[int, ...] = (64, 64)
  """Widths of the hidden layers of mlp."""
  scaling: tuple[float, float, float] = (1.4, 1.2, 3.5)
  """Factors d and w of the depth and the width of micronet, and their exponent
  phi."""
  exclude: tuple[str, ...] = ()
  """Patterns of the kernels that stay float, for example Dense_0."""
  init: Literal["scratch", "float"] | None = None
  """Where the ternary net starts, at random or from the float net; None for
  what the method wants."""
  epochs: int = 10
  """Passes over the training data, of the ternary net."""
  float_epochs: int | None = None
  """Passes over the training data, of the float net; None for as many."""
  batch_size: int = 128
  """Images a step, over all devices."""
  learning_rate: float | None = None
  """Adam's first rate on latents, None for the method's own; each rate decays
  to 5 % by a cosine."""
  scale_learning_rate: float | None = None
  """Adam's first rate on the scales of ternary weights, None likewise."""
  float_learning_rate: float = 1e-3
  """The optimizer's first rate on the float net."""
  float_optimizer: Literal["adam", "sgd"] = "adam"
  """Optimizer of the float net; sgd has Nesterov's momentum of 0.9, and its
  rate decays to 0."""
  float_weight_decay: float = 0.0
  """L2 decay of all parameters of the float net, part of the gradient."""
  rest_learning_rate: float | None = None
  """Adam's first rate on what stays float in the ternary net; None for
  float_learning_rate."""
  seed: int = 0
  """Seed of initial weights and of the order of the data."""
  parallel: Literal["jit", "pmap", "shard_map"] = "pmap"
  """How a step is spread over devices; jit takes one."""
  devices: int | None = None
  """Devices to use; None for all."""
  log_every: int = 100
  """Steps between two lines of metrics."""
  checkpoint_every: int = 1000
  """Steps between two checkpoints."""
  dry_run: bool = False
  """Only tell shapes, sizes, memory and steps a second; nothing is written."""
  workdir: str | None = None
  """Directory of the run; None for one under runs/ named by the method. The
  float net is kept in float/ beside it, for all runs that start from it."""

  def __post_init__(self):
    for name in (
      "epochs",
      "float_epochs",
      "batch_size",
      "log_every",
      "checkpoint_every",
    ):
      value = getattr(self, name)
      if value is not None and value < 1:
        raise UsageError(f"{name}={value}, but it must be at least 1.")
    try:
      supernet.scale(*self.scaling)
    except ValueError as error:
      raise UsageError(f"scaling: {error}") from error

  @property
  def directory(self) -> Path:
    """Where the run writes, absolute."""
    if self.workdir is not None:
      return Path(self.workdir).resolve()
    fields = dataclasses.asdict(self.method)
    if self.method.asked is not None:
      fields = {"sparsity": self.method.asked}
    given = [
      name if value is True else f"{name}{round(value, 4):.10g}"
      for name, value in fields.items()
      if value
    ]
    name = type(self.method).__name__.lower()
    parts = [self.data, self.model, name, *given, f"seed{self.seed}"]
    return Path("runs", "-".join(parts)).resolve()

  @property
  def stacked(self) -> tuple[str, ...]:
    """Patterns of the kernels whose first axis enumerates layers."""
    return supernet.STACKED if self.model == "micronet" else ()

  @property
  def float_directory(self) -> Path:
    """Where the float net is kept, absolute; equal for equal float nets."""
    record = json.dumps(self.float_record(), sort_keys=True)
    digest = hashlib.sha256(record.encode()).hexdigest()[:8]
    name = f"{self.data}-{self.model}-seed{self.seed}-{digest}"
    return self.directory.parent / "float" / name

  def to_json(self) -> dict[str, Any]:
    """Returns the config as JSON holds it: all that a run depends on."""
    record = dataclasses.asdict(self)
    # Neither changes what a run comes to.
    del record["workdir"], record["dry_run"]
    record["method"]["name"] = type(self.method).__name__
    return json.loads(json.dumps(record))

  def float_record(self) -> dict[str, Any]:
    """Returns all that the float net depends on, as JSON holds it."""
    record = {name: getattr(self, name) for name in _OF_FLOAT}
    record["epochs"] = self.float_epochs or self.epochs
    later = {name: getattr(self, name) for name in _LATER_OF_FLOAT}
    record |= {k: v for k, v in later.items() if v != getattr(Config, k)}
    return json.loads(json.dumps(record))


#: Fields on which the float net depends, beside its epochs.
_OF_FLOAT = (
  "data",
  "augment",
  "model",
  "hidden",
  "batch_size",
  "float_learning_rate",
  "seed",
)

#: The same, told only where not at their defaults: a float net from before
#: there were these options is still found.
_LATER_OF_FLOAT = ("scaling", "float_optimizer", "float_weight_decay")


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
  if config.batch_size % shares:
    raise UsageError(
      f"batch_size={config.batch_size} cannot be shared by {shares} devices:"
      " give a multiple, or fewer --devices."
    )
  return devices


def count_steps(config: Config, images: int) -> tuple[int, int]:
  """Returns the steps of both trainings.

  Args:
    config: the options.
    images: to train on.

  Returns:
    (steps of the float net, steps of the ternary net)

  Raises:
    UsageError: the images are less than a batch.
  """
  epoch = images // config.batch_size
  if not epoch:
    raise UsageError(
      f"batch_size={config.batch_size} exceeds the {images} training images:"
      " give a smaller one."
    )
  return (config.float_epochs or config.epochs) * epoch, config.epochs * epoch


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
    method.recipe(config.epochs, where.largest(params, config.stacked))
  except ValueError as error:
    raise UsageError(str(error)) from error
  workdir = str(config.directory)
  return dataclasses.replace(config, method=method, workdir=workdir)


def parse(default: Config, description: str) -> Config:
  """Reads the command line of the process.

  Args:
    default: what the experiment takes where an option is not given.
    description: text of --help.
  """
  return tyro.cli(
    Config,
    default=default,
    description=description,
    # Options may also follow the method's name.
    config=(tyro.conf.CascadeSubcommandArgs,),
  )
