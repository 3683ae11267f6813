"""Many trainings of one small net as one compiled program.

All trainings are one `jax.vmap` of one `jax.lax.scan`, which takes less time
than one after another, and is shared by all local devices.
"""

import dataclasses
import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

import tern_jax
from experiments.common import build, cli, data
from experiments.common.errors import UsageError
from experiments.common.methods import Plan
from experiments.common.runner.record import REESTIMATION_BATCHES
from experiments.common.runner.stages import ternary_phase
from experiments.common.runner.step import make_step
from tern_jax import metrics

#: The columns of a run by their names.
SweepRow = dict[str, float]
#: train(value, seed, splits) -> {column: 0-d}.
Train = Callable[[Any, Any, Any], dict[str, Array]]


@dataclasses.dataclass(frozen=True)
class SmallNet:
  """Options of a sweep: the data, the network, and its training."""

  data: str = "digits"
  """Data set: digits, or any prepared set of images by its tfds name."""
  data_dir: str | None = None
  """Directory of prepared data sets; None for the usual one."""
  model: Literal["mlp", "convnet"] = "mlp"
  """Network."""
  hidden: tuple[int, ...] = (32, 32)
  """Widths of the hidden layers of mlp, channels of convnet."""
  norm: bool = True
  """Batch norm after the hidden layers of mlp, instead of biases in them."""
  exclude: tuple[str, ...] = ()
  """Patterns of kernels that stay float, such as stem."""
  epochs: int = 60
  """Passes over the training data."""
  batch_size: int = 64
  """Images a step."""

  def config(self, **options: Any) -> cli.Config:
    """Returns the options of one run; nothing of it is written."""
    return cli.Config(
      data=self.data,
      model=self.model,
      hidden=self.hidden,
      norm=self.norm,
      exclude=self.exclude,
      epochs=self.epochs,
      batch_size=self.batch_size,
      parallel="jit",
      workdir="runs",
      **options,
    )


@dataclasses.dataclass(frozen=True)
class Sweep:
  """Values x seeds of one training.

  Attributes:
    by: "alpha" or "sparsity", what the values are of.
    values: what is swept.
    seeds: runs of each value, seeded 0, 1, ...
    config: (value, seed) to the options of a run; both may be traced.
    devices: local devices that share the runs; None for all.
    change: see `ternary_phase`.
  """

  by: Literal["alpha", "sparsity"]
  values: tuple[float, ...]
  seeds: int
  config: Callable[[Any, Any], cli.Config]
  devices: int | None = None
  change: Callable[[Plan, int], Plan] | None = None

  def __post_init__(self):
    if self.seeds < 1:
      raise UsageError(f"seeds={self.seeds}, but it must be at least 1.")
    most = jax.local_device_count()
    if self.devices is not None and not 1 <= self.devices <= most:
      raise UsageError(
        f"devices={self.devices}, but there are {most} here: give 1 to {most}."
      )
    for value in self.values:
      try:
        given: Any = {self.by: value}
        tern_jax.SCA(**given)  # says what is wrong with a value
        self.config(value, 0)
      except ValueError as error:
        raise UsageError(str(error)) from error

  @property
  def grid(self) -> list[tuple[float, int]]:
    """(value, seed) of each run."""
    return list(itertools.product(self.values, range(self.seeds)))


class _Net:
  """One net of a sweep, in a traced function.

  Args:
    sweep: what it is of.
    dataset: tells the shape of images, and how they are standardized.
    value: of this net.
    seed: of this net.
    splits: of the data, on devices.
  """

  def __init__(
    self,
    sweep: Sweep,
    dataset: data.Dataset,
    value: Any,
    seed: Any,
    splits: Any,
  ):
    options = sweep.config(value, seed)
    self._dataset, self._splits = dataset, splits
    self._model: Any = build.make_model(options, dataset.num_classes)
    key = jax.random.key(seed)
    image = jnp.zeros((1, *dataset.input_shape))
    model_state: Any = dict(self._model.init(key, image, train=False))
    params = model_state.pop("params")
    images = len(dataset.train["label"])
    epoch_steps = images // options.batch_size
    steps = options.epochs * epoch_steps
    self.phase = ternary_phase(
      options, steps, params, model_state, sweep.change
    )
    self._step = make_step(options, self.phase.final, dataset.num_classes)
    keys = jax.random.split(jax.random.fold_in(key, 1), options.epochs)
    rows = jax.vmap(lambda k: jax.random.permutation(k, images))(keys)
    rows = rows[:, : epoch_steps * options.batch_size]
    #: Images of each step.
    self.rows = rows.reshape(steps, options.batch_size)

  def standardized(self, images: Array) -> Array:
    """Returns images as the network takes them."""
    dataset = self._dataset
    axes = tuple(range(images.ndim - 1))
    mean, std = (np.expand_dims(x, axes) for x in (dataset.mean, dataset.std))
    return (images.astype(jnp.float32) - mean) / std

  def batch(self, rows: Array) -> Any:
    """Returns a batch of training."""
    split = self._splits["train"]
    image = self.standardized(split["input"][rows])
    return {"input": image, "label": split["label"][rows]}

  def advance(self, state: Any, rows: Array) -> Any:
    """Trains by a step for each batch of rows."""

    def step(state: Any, rows: Array) -> Any:
      return self._step(state, self.batch(rows))

    return jax.lax.scan(step, state, rows)[0]

  def rounded(self, state: Any) -> Any:
    """Returns dense ternary variables, with statistics of their own."""
    ternary = self.phase.final.ternary(state)
    weights = dense(ternary.pop("params"))

    def reestimate(statistics: Any, rows: Array) -> tuple[Any, None]:
      _, statistics = self._model.apply(
        {"params": weights, **statistics},
        self.batch(rows)["input"],
        train=True,
        mutable=list(statistics),
      )
      return statistics, None

    if ternary:
      some = self.rows[:REESTIMATION_BATCHES]
      ternary = jax.lax.scan(reestimate, ternary, some)[0]
    return {"params": weights, **ternary}

  def accuracy(self, variables: Any, name: str) -> Array:
    """Returns the share of right answers on a split."""
    split = self._splits[name]

    def answer(image: Array) -> Array:
      batch = self.standardized(image)[None]
      return jnp.argmax(self._model.apply(variables, batch, train=False))

    # In parts, because activations of all images may not fit.
    answers = jax.lax.map(answer, split["input"], batch_size=1000)
    return jnp.mean(answers == split["label"])


def make_train(sweep: Sweep, dataset: data.Dataset) -> Train:
  """Makes the function that trains one net: pure, to be mapped and jitted.

  It is the training of `experiments.common.runner`, its loop a scan.

  Args:
    sweep: what the net is of.
    dataset: tells the shape of images, and how they are standardized.

  Returns:
    `train(value, seed, splits) -> {column: 0-d}`, with splits as on devices.
  """

  def predict(theta: Array, value: Any) -> Array:
    alpha = value
    if sweep.by == "sparsity":
      alpha = tern_jax.alpha_for_sparsity(theta, value)
    return theta.size * tern_jax.predicted_sparsity(theta, alpha)

  def train(value: Any, seed: Any, splits: Any) -> dict[str, Array]:
    net = _Net(sweep, dataset, value, seed, splits)
    stage, (_, onset, _) = net.phase.final, net.phase.snapshots
    at_onset = net.advance(net.phase.state, net.rows[:onset])
    state = net.advance(at_onset, net.rows[onset:])
    thetas = stage.latents(at_onset).values()
    zeros = sum(predict(theta, value) for theta in thetas)
    codes = stage.ternary(state)["params"]
    as_trained, rounded = stage.variables(state), net.rounded(state)
    return {
      "predicted": jnp.asarray(zeros) / sum(x.size for x in thetas),
      "zeros": metrics.sparsity(codes),
      "validation": net.accuracy(as_trained, "validation"),
      "validation_rounded": net.accuracy(rounded, "validation"),
      "test": net.accuracy(as_trained, "test"),
      "test_rounded": net.accuracy(rounded, "test"),
      "bits": metrics.entropy(codes),
    }

  return train


def dense(tree: Any) -> Any:
  """Returns a tree with dense weights for its `Ternary` leaves."""

  def is_ternary(node: Any) -> bool:
    return isinstance(node, tern_jax.Ternary)

  return jax.tree.map(
    lambda x: x.dequantize() if is_ternary(x) else x, tree, is_leaf=is_ternary
  )


def in_one_program(train: Train, devices: int) -> Train:
  """Maps a training over runs, which devices share.

  Args:
    train: of one net.
    devices: local devices; their last may repeat runs, to come out even.

  Returns:
    `train(values, seeds, splits) -> {column: [runs]}`, compiled.
  """
  mapped = jax.vmap(train, in_axes=(0, 0, None))
  if devices == 1:
    return jax.jit(mapped)
  spread = jax.pmap(
    mapped, in_axes=(0, 0, None), devices=jax.local_devices()[:devices]
  )

  def run_all(values: Any, seeds: Any, splits: Any) -> dict[str, Array]:
    runs = len(values)
    shape = devices, -(-runs // devices)
    values, seeds = np.resize(values, shape), np.resize(seeds, shape)
    columns = spread(values, seeds, splits)
    return jax.tree.map(lambda x: x.reshape(-1)[:runs], columns)

  return run_all


def run_sweep(sweep: Sweep, dataset: data.Dataset) -> list[SweepRow]:
  """Trains all nets of a sweep.

  Returns:
    A row for each run: its value and seed, and the columns of the record.
  """
  values, seeds, splits = arguments(sweep, dataset)
  devices = min(sweep.devices or jax.local_device_count(), len(values))
  program = in_one_program(make_train(sweep, dataset), devices)
  columns = jax.device_get(program(values, seeds, splits))
  return [
    {
      sweep.by: value,
      "seed": seed,
      **{name: float(column[i]) for name, column in columns.items()},
    }
    for i, (value, seed) in enumerate(sweep.grid)
  ]


def arguments(
  sweep: Sweep, dataset: data.Dataset
) -> tuple[np.ndarray, np.ndarray, Any]:
  """Returns what the program takes: values and seeds of all runs, splits."""
  values, seeds = zip(*sweep.grid, strict=True)
  splits = {
    name: getattr(dataset, name) for name in ("train", "validation", "test")
  }
  return (
    np.array(values, np.float32),
    np.array(seeds, np.int32),
    jax.device_put(splits),
  )


def compare(
  sweep: Sweep, dataset: data.Dataset, rounds: int = 5
) -> dict[str, float]:
  """Measures one program for all runs against one run after another.

  Both are compiled before; they take turns, so that a slow phase of a shared
  machine hits both.

  Returns:
    Median seconds of "one program" and of "one by one", and their "ratio".
  """
  values, seeds, splits = arguments(sweep, dataset)
  train = make_train(sweep, dataset)
  together, single = in_one_program(train, devices=1), jax.jit(train)

  def one_by_one() -> Any:
    pairs = zip(values, seeds, strict=True)
    return [single(value, seed, splits) for value, seed in pairs]

  ways: dict[str, Callable[[], Any]] = {
    "one program": lambda: together(values, seeds, splits),
    "one by one": one_by_one,
  }
  times: dict[str, list[float]] = {name: [] for name in ways}
  for turn in range(rounds + 1):
    for name, way in ways.items():
      start = time.perf_counter()
      jax.block_until_ready(way())
      if turn:  # the first one compiles
        times[name].append(time.perf_counter() - start)
  result = {name: statistics.median(seconds) for name, seconds in times.items()}
  return result | {"ratio": result["one program"] / result["one by one"]}
