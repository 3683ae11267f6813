"""Many trainings of one small net as one compiled program.

All trainings are one `jax.vmap` of one `jax.lax.scan`, which takes less time
than one after another, and is shared by all local devices.
"""

import dataclasses
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

import tern_jax
from experiments.common import (
  build,
  cli,
  data,
  files,
  log,
  optimizers,
  terminal,
)
from experiments.common.errors import UsageError
from experiments.common.methods import Plan
from experiments.common.runner.record import REESTIMATION_BATCHES
from experiments.common.runner.stages import Stage, ternary_phase
from experiments.common.runner.step import pure_step
from tern_jax import metrics, training
from tern_jax.trees.wrap import Wrapped

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
  """Batch norm after the hidden layers, instead of biases in them."""
  layer_norm: bool = False
  """Layer norm in the place of that batch norm."""
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
      layer_norm=self.layer_norm,
      exclude=self.exclude,
      epochs=self.epochs,
      batch_size=self.batch_size,
      parallel="jit",
      workdir="runs",
      **options,
    )


@dataclasses.dataclass(frozen=True)
class Script:
  """A user's script, made ternary by its optimizer alone.

  Attributes:
    optimizer: (sparsity, steps, rate) to what `tern_jax.wrap` returns; the
      sparsity is traced, and so is the rate, unless it is None.
    length: of the run, in units of the epochs that the options say.
    float_share: share of the steps, the first ones, in which a float net is
      trained by Adam, from which the ternary net starts; 0 for none.
  """

  optimizer: Callable[[Any, int, Any], Wrapped]
  length: float = 1.0
  float_share: float = 0.0

  def __post_init__(self):
    if self.length <= 0:
      raise UsageError(f"length={self.length}, but it must be above 0.")
    if not 0 <= self.float_share < 1:
      raise UsageError(
        f"float_share={self.float_share}, but it must be in [0, 1)."
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
    script: what trains instead of the options' method; of a sparsity.
  """

  by: Literal["alpha", "sparsity"]
  values: tuple[float, ...]
  seeds: int
  config: Callable[[Any, Any], cli.Config]
  devices: int | None = None
  change: Callable[[Plan, int], Plan] | None = None
  script: Script | None = None

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
    options: of its run.
    dataset: tells the shape of images, and how they are standardized.
    splits: of the data, on devices.
    length: of the run, in units of the epochs that the options say.

  Attributes:
    params: where it starts.
    model_state: its other variables likewise.
    rows: images of each step, int32 [steps, batch].
  """

  def __init__(
    self,
    options: cli.Config,
    dataset: data.Dataset,
    splits: Any,
    length: float = 1.0,
  ):
    self._options, self._dataset, self._splits = options, dataset, splits
    self._model: Any = build.make_model(options, dataset.num_classes)
    key = jax.random.key(options.seed)
    image = jnp.zeros((1, *dataset.input_shape))
    self.model_state: Any = dict(self._model.init(key, image, train=False))
    self.params = self.model_state.pop("params")
    images = len(dataset.train["label"])
    epoch_steps = images // options.batch_size
    steps = max(round(length * options.epochs * epoch_steps), 1)
    epochs = -(-steps // epoch_steps)
    keys = jax.random.split(jax.random.fold_in(key, 1), epochs)
    rows = jax.vmap(lambda k: jax.random.permutation(k, images))(keys)
    rows = rows[:, : epoch_steps * options.batch_size]
    self.rows = rows.reshape(-1, options.batch_size)[:steps]

  def batch(self, rows: Array) -> Any:
    """Returns a batch of training."""
    return data.resident.make_batch(self._splits["train"], {"rows": rows})

  def step_of(self, stage: Stage) -> Callable[[Any, Array], Any]:
    """Returns the step of a stage, which takes rows for a batch."""
    step = pure_step(self._options, stage, self._dataset.num_classes)
    return lambda state, rows: step(state, self.batch(rows))

  def trained(
    self, tx: Any, params: Any, model_state: Any, rows: Array
  ) -> training.TrainState:
    """Returns what an optimizer alone comes to, by a step for each batch."""
    # Nothing asks for the rate, which is the optimizer's own.
    stage = Stage(None, tx, len(rows), rate=optax.constant_schedule(0.0))
    seed = self._options.seed
    state = training.init_state(params, tx, None, model_state, seed)
    return jax.lax.scan(self.step_of(stage), state, rows)[0]

  def rounded(self, codes: Any, model_state: Any) -> Any:
    """Returns dense ternary variables, with statistics of their own."""
    weights = dense(codes)

    def reestimate(statistics: Any, rows: Array) -> tuple[Any, None]:
      _, statistics = self._model.apply(
        {"params": weights, **statistics},
        self.batch(rows)["input"],
        train=True,
        mutable=list(statistics),
      )
      return statistics, None

    if model_state:
      some = self.rows[:REESTIMATION_BATCHES]
      model_state = jax.lax.scan(reestimate, model_state, some)[0]
    return {"params": weights, **model_state}

  def accuracy(self, variables: Any, name: str) -> Array:
    """Returns the share of right answers on a split."""
    split = self._splits[name]

    def answer(image: Array) -> Array:
      batch = data.resident.standardize(
        image[None], split["mean"], split["std"]
      )
      return jnp.argmax(self._model.apply(variables, batch, train=False))

    # In parts, because activations of all images may not fit.
    answers = jax.lax.map(answer, split["input"], batch_size=1000)
    return jnp.mean(answers == split["label"])

  def judged(self, codes: Any, variables: Any) -> dict[str, Array]:
    """Returns what every training is judged by.

    Args:
      codes: its parameters with `Ternary` leaves.
      variables: as `rounded` returns them.
    """
    return {
      "zeros": metrics.sparsity(codes),
      "validation_rounded": self.accuracy(variables, "validation"),
      "test_rounded": self.accuracy(variables, "test"),
      "bits": metrics.entropy(codes),
    }


def make_train(sweep: Sweep, dataset: data.Dataset) -> Train:
  """Makes the function that trains one net: pure, to be mapped and jitted.

  It is the training of `experiments.common.runner`, its loop a scan; or that of
  a script, which has no columns of what was predicted and of what it is worth
  before it is rounded.

  Args:
    sweep: what the net is of.
    dataset: tells the shape of images, and how they are standardized.

  Returns:
    `train(value, seed, splits) -> {column: 0-d}`, with splits as on devices.
  """
  if sweep.script is not None:
    return _make_train_script(sweep, sweep.script, dataset)

  def predict(theta: Array, value: Any) -> Array:
    alpha = value
    if sweep.by == "sparsity":
      alpha = tern_jax.alpha_for_sparsity(theta, value)
    return theta.size * tern_jax.predicted_sparsity(theta, alpha)

  def train(value: Any, seed: Any, splits: Any) -> dict[str, Array]:
    options = sweep.config(value, seed)
    net = _Net(options, dataset, splits)
    phase = ternary_phase(
      options, len(net.rows), net.params, net.model_state, sweep.change
    )
    stage, (_, onset, _) = phase.final, phase.snapshots
    step = net.step_of(stage)
    at_onset, _ = jax.lax.scan(step, phase.state, net.rows[:onset])
    state, _ = jax.lax.scan(step, at_onset, net.rows[onset:])
    thetas = stage.latents(at_onset).values()
    zeros = sum(predict(theta, value) for theta in thetas)
    codes = stage.ternary(state)["params"]
    as_trained = stage.variables(state)
    return {
      "predicted": jnp.asarray(zeros) / sum(x.size for x in thetas),
      "validation": net.accuracy(as_trained, "validation"),
      "test": net.accuracy(as_trained, "test"),
      **net.judged(codes, net.rounded(codes, state.model_state)),
    }

  return train


def _make_train_script(
  sweep: Sweep, script: Script, dataset: data.Dataset
) -> Train:
  """Makes the function that trains one net as a user's script does.

  Beside the splits it takes the "rate" of the optimizer, if it has one.
  """

  def train(value: Any, seed: Any, splits: Any) -> dict[str, Array]:
    options = sweep.config(value, seed)
    net = _Net(options, dataset, splits, script.length)
    params, model_state = net.params, net.model_state
    steps = len(net.rows)
    onset = round(script.float_share * steps)
    if onset:
      adam = optimizers.of_float_net(options, onset)
      start = net.trained(adam, params, model_state, net.rows[:onset])
      params, model_state = start.params, start.model_state
    tx = script.optimizer(value, steps - onset, splits.get("rate"))
    state = net.trained(tx, params, model_state, net.rows[onset:])
    codes = tx.tern.finalize(state.opt_state)
    return net.judged(codes, net.rounded(codes, state.model_state))

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
  return runner_of(sweep, dataset)()


def runner_of(
  sweep: Sweep, dataset: data.Dataset
) -> Callable[..., list[SweepRow]]:
  """Returns what `run_sweep` does, compiled once for all rates of a script.

  Returns:
    A function of the rate, which may be left out.
  """
  values, seeds, splits = arguments(sweep, dataset)
  devices = min(sweep.devices or jax.local_device_count(), len(values))
  program = in_one_program(make_train(sweep, dataset), devices)

  def run(rate: float | None = None) -> list[SweepRow]:
    given = {} if rate is None else {"rate": np.float32(rate)}
    columns = jax.device_get(program(values, seeds, splits | given))
    return [
      {
        sweep.by: value,
        "seed": seed,
        **{name: float(column[i]) for name, column in columns.items()},
      }
      for i, (value, seed) in enumerate(sweep.grid)
    ]

  return run


def run_once(path: Path, run: Callable[[], list[SweepRow]]) -> Any:
  """Returns the record of runs, {"rows": ...} and where they come from.

  Args:
    path: its file; what is done is not done again.
    run: does it.
  """
  if (done := log.read_object(path)) is None:
    done = {"rows": run(), **log.provenance()}
    files.write(path, json.dumps(done, indent=2) + "\n")
    terminal.say(f"{path}: done", sys.stderr)
  return done


def arguments(
  sweep: Sweep, dataset: data.Dataset
) -> tuple[np.ndarray, np.ndarray, Any]:
  """Returns what the program takes: values and seeds of all runs, splits."""
  values, seeds = zip(*sweep.grid, strict=True)
  splits = {
    name: data.resident.hold(getattr(dataset, name), dataset.mean, dataset.std)
    for name in ("train", "validation", "test")
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
