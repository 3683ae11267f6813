"""The command line of the experiments: one typed config, read by tyro."""

import dataclasses
from typing import TYPE_CHECKING, Literal

import tyro

from experiments.common import build, methods, places
from experiments.common.data import text
from experiments.common.errors import UsageError
from experiments.common.models import micronet
from tern_jax.checkpoint import Place

if TYPE_CHECKING:
  Model = Augmentation = str
else:
  Model = Literal[tuple(build.NETWORKS)]
  Augmentation = Literal[tuple(build.AUGMENTATIONS)]
Parallel = Literal["jit", "pmap", "shard_map"]


@dataclasses.dataclass(frozen=True)
class Config:
  """All that a run depends on."""

  method: methods.Method = dataclasses.field(default_factory=methods.Sca)
  """How weights are made ternary."""
  data: str = "digits"
  """Data set: digits, any prepared set of images by its tfds name, pydoc (what
  Python's help() says), or any text by its path, which ends in .txt."""
  data_dir: str | None = None
  """Directory of prepared data sets; None for the usual one."""
  image_size: int | None = None
  """Side to which images are cropped where they differ in size, in pixels."""
  augment: Augmentation = "none"
  """What is done to training images."""
  model: Model = "mlp"
  """Network."""
  hidden: tuple[int, ...] = (64, 64)
  """Widths of the hidden layers of mlp, channels of convnet."""
  norm: bool = True
  """Batch norm after the hidden layers of mlp and convnet, instead of biases in
  them."""
  layer_norm: bool = False
  """Layer norm in the place of that batch norm."""
  scaling: tuple[float, float, float] = (1.4, 1.2, 3.5)
  """Factors d and w of the depth and the width of micronet, and their exponent
  phi."""
  layers: int = 4
  """Blocks of transformer."""
  width: int = 128
  """Channels of transformer; each 32 are a head."""
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
  """Images, or windows of text, a step, over all devices."""
  learning_rate: float | None = None
  """Adam's first rate on latents, None for the method's own."""
  scale_learning_rate: float | None = None
  """First rate on the scales of ternary weights, None likewise."""
  float_from: str | None = None
  """Float net that was trained before, instead of training one: its directory
  in an earlier run's float/, or, for resnet18, resnet34 and resnet50, a
  safetensors file with torchvision's names."""
  float_learning_rate: float = 1e-3
  """The optimizer's first rate on the float net."""
  float_optimizer: Literal["adam", "sgd"] = "adam"
  """Optimizer of the float net; sgd has Nesterov's momentum of 0.9."""
  float_weight_decay: float = 0.0
  """L2 decay of all parameters of the float net, part of the gradient."""
  rest_learning_rate: float | None = None
  """Adam's first rate on what stays float in the ternary net; None for
  float_learning_rate."""
  scale_optimizer: Literal["adam", "sgd"] = "adam"
  """Optimizer of the scales of ternary weights; sgd as of the float net. Adam
  makes steps of rounding noise where a norm layer takes the gradient away."""
  schedule: Literal["cosine", "step", "one_cycle"] = "cosine"
  """How all rates change: they fall by a cosine, to 5 % (a float net's sgd: 0);
  or to a tenth at half of the steps, and again at three quarters; or they rise
  for .3 of the steps from .04 of what is given, and fall almost to 0."""
  label_smoothing: float = 0.0
  """Share of the labels that is spread evenly over all classes."""
  ema: float | None = None
  """Decay of a moving average of the parameters, which is what is evaluated,
  made ternary and packed; None for the parameters themselves."""
  compute: Literal["float32", "bfloat16"] = "float32"
  """Type of weights and activations in training; latents, statistics, losses
  and evaluations are float32."""
  micro_batches: int = 1
  """Parts in which each device takes its share of a batch, one after the other,
  where it does not fit into memory; batch statistics are those of a part."""
  seed: int = 0
  """Seed of initial weights and of the order of the data."""
  parallel: Parallel = "pmap"
  """How a step is spread over devices; jit takes one."""
  devices: int | None = None
  """Devices to use; None for all."""
  resident: Literal["auto", "on", "off"] = "auto"
  """Whether training data lie on the device, and many steps there are one call;
  auto: where that is faster, and the data are a small part of its memory. The
  images, their order and their changes are the same."""
  log_every: int = 100
  """Steps between two lines of metrics."""
  checkpoint_every: int = 1000
  """Steps between two checkpoints."""
  distributed: bool = False
  """Be one of the processes of a run, one on each host of a TPU slice, say;
  they share --workdir. On Cloud TPU, Kubernetes, Slurm and Open MPI they find
  one another; elsewhere give each JAX_COORDINATOR_ADDRESS (host:port of process
  0), JAX_NUM_PROCESSES and JAX_PROCESS_ID."""
  dry_run: bool = False
  """Only tell shapes, sizes, memory and steps a second; nothing is written."""
  workdir: str | None = None
  """Directory of the run, or gs://bucket/path; None for one under runs/ named
  by the method. The float net is kept in float/ beside it, for all runs that
  start from it."""

  def __post_init__(self):
    for name in (
      "epochs",
      "float_epochs",
      "image_size",
      "batch_size",
      "log_every",
      "checkpoint_every",
      "micro_batches",
      "layers",
      "width",
    ):
      value = getattr(self, name)
      if value is not None and value < 1:
        raise UsageError(f"{name}={value}, but it must be at least 1.")
    for name in ("label_smoothing", "ema"):
      value = getattr(self, name)
      if value is not None and not 0 <= value < 1:
        raise UsageError(f"{name}={value}, but it must be in [0, 1).")
    for name, known in (
      ("model", build.NETWORKS),
      ("augment", build.AUGMENTATIONS),
    ):
      value = getattr(self, name)
      if value not in known:
        raise UsageError(f"{name}={value}, but there are {', '.join(known)}.")
    is_text = text.is_text(self.data)
    if is_text != build.NETWORKS[self.model].reads_text:
      raise UsageError(
        f"model={self.model} does not go with data={self.data}: text, pydoc or"
        " a path that ends in .txt, takes a transformer, and images do not."
      )
    if is_text and self.augment != "none":
      raise UsageError(f"augment={self.augment} is for images, not for text.")
    if self.width % 32:
      raise UsageError(f"width={self.width}, but it must be a multiple of 32.")
    if self.layer_norm and not self.norm:
      raise UsageError("layer_norm is given with no norm: give one of them.")
    if self.layer_norm and not build.NETWORKS[self.model].norms:
      known = ", ".join(k for k, net in build.NETWORKS.items() if net.norms)
      raise UsageError(
        f"layer_norm is given with model={self.model}, but only {known} take"
        " it: leave it out."
      )
    try:
      micronet.scale(*self.scaling)
    except ValueError as error:
      raise UsageError(f"scaling: {error}") from error

  @property
  def directory(self) -> Place:
    """Where the run writes, absolute."""
    return places.run_directory(self)

  @property
  def float_directory(self) -> Place:
    """Where the float net is kept, absolute; equal for equal float nets."""
    return places.float_directory(self)

  @property
  def stacked(self) -> tuple[str, ...]:
    """Patterns of the kernels whose first axis enumerates layers."""
    return build.NETWORKS[self.model].stacks


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
