"""The command line of the experiments: one typed config, read by tyro."""

import dataclasses
import json
from pathlib import Path
from typing import Any, Literal

import jax
import tyro

import tern_jax
from experiments.common import methods


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
  model: Literal["mlp", "lenet5"] = "mlp"
  """Network."""
  hidden: tuple[int, ...] = (64, 64)
  """Widths of the hidden layers of mlp."""
  exclude: tuple[str, ...] = ()
  """Patterns of the kernels that stay float, for example Dense_0."""
  init: Literal["scratch", "float"] = "scratch"
  """Whether the ternary net starts at random or from the float net."""
  epochs: int = 10
  """Passes over the training data, of the float and of the ternary net."""
  batch_size: int = 128
  """Images a step, over all devices."""
  learning_rate: float = 1e-2
  """Adam's first rate on latents; each rate decays to 5 % by a cosine."""
  scale_learning_rate: float = 1e-3
  """Adam's first rate on the scales of ternary weights."""
  float_learning_rate: float = 1e-3
  """Adam's first rate on the float net, and on biases and norms."""
  seed: int = 0
  """Seed of initial weights and of the order of the data."""
  parallel: Literal["jit", "pmap", "shard_map"] = "pmap"
  """How a step is spread over devices; jit takes one."""
  devices: int | None = None
  """Devices to use; None for all."""
  log_every: int = 100
  """Steps between two lines of metrics."""
  checkpoint_every: int = 1000
  """Steps between two checkpoints; a multiple of log_every."""
  workdir: str | None = None
  """Directory of the run; None for one under runs/ named by the method."""

  def __post_init__(self):
    if self.epochs < 1 or self.batch_size < 1 or self.log_every < 1:
      raise UsageError(
        f"got epochs={self.epochs}, batch_size={self.batch_size} and"
        f" log_every={self.log_every}: each must be at least 1."
      )
    if self.checkpoint_every < 1 or self.checkpoint_every % self.log_every:
      raise UsageError(
        f"checkpoint_every={self.checkpoint_every} is no multiple of"
        f" log_every={self.log_every}: a run resumes where its log has a line."
      )

  @property
  def directory(self) -> Path:
    """Where the run writes, absolute."""
    if self.workdir is not None:
      return Path(self.workdir).resolve()
    fields = dataclasses.asdict(self.method)
    if self.method.asked is not None:
      fields = {"sparsity": self.method.asked}
    given = [f"{name}{value}" for name, value in fields.items() if value]
    parts = [self.data, type(self.method).__name__.lower(), *given]
    return Path("runs", "-".join([*parts, f"seed{self.seed}"])).resolve()

  def to_json(self) -> dict[str, Any]:
    """Returns the config as JSON holds it, without where the run lies."""
    record = dataclasses.asdict(self)
    del record["workdir"]
    record["method"]["name"] = type(self.method).__name__
    return json.loads(json.dumps(record))


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


def count_steps(config: Config, params: Any, images: int) -> int:
  """Returns the steps of each training, once the options are known to fit.

  Raises:
    UsageError: they do not fit the method, the model or the data.
  """
  steps = config.epochs * (images // config.batch_size)
  if not steps:
    raise UsageError(
      f"batch_size={config.batch_size} exceeds the {images} training images:"
      " give a smaller one."
    )
  try:
    config.method.recipe(steps)
    tern_jax.kernels(exclude=config.exclude).paths(params)
  except ValueError as error:
    raise UsageError(str(error)) from error
  return steps


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
