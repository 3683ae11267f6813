"""What alpha makes of a net: values x seeds, trained by one compiled program.

    python -m experiments.alpha_sweep
    python -m experiments.alpha_sweep --by sparsity
    python -m experiments.alpha_sweep --data mnist --epochs 5 --batch-size 128

Claim: how many weights end at zero can be told from the latents when WDR sets
in. All trainings are one `jax.vmap` of one `jax.lax.scan`, which takes less
time than one after another, and is shared by all local devices.

Writes sweep.csv, a line for each run, and two pictures.

Expected, digits, MLP 64-32-32-10, means of 3 seeds in %, bits a weight: the
paper's recipe rounds at a cost of up to 3 points up to some 70 % of zeros, and
breaks down beyond, where small weights still carry the answers,

  alpha  predicted  zeros  validation  rounded   test  rounded  bits
  0.01       20.93  14.25       95.93    94.63  95.65    93.33  1.43
  0.02       28.54  24.10       95.93    95.37  96.11    94.54  1.53
  0.05       44.10  41.65       96.11    94.44  95.37    95.09  1.52
  0.1        59.55  57.69       95.56    95.19  95.00    93.70  1.35
  0.15       69.85  67.83       95.19    93.52  94.81    92.69  1.16
  0.2        77.01  75.36       94.07    88.70  93.70    89.07  0.97
  0.3        86.06  85.14       93.33    65.56  94.35    67.59  0.65
  0.4        91.45  90.99       94.07    33.15  94.26    31.39  0.42

while a hard forward with the barrier at a quantile gets what was asked for:

  sparsity  predicted  zeros  validation  rounded   test  rounded  bits
  0.3           29.98  29.98       96.48    96.48  97.59    97.78  1.57
  0.5           50.00  50.00       97.41    97.22  97.50    97.50  1.49
  0.6           59.99  59.99       96.85    97.04  97.50    97.59  1.37
  0.7           70.02  70.02       96.48    96.48  97.69    97.59  1.18
  0.8           79.98  79.98       96.48    96.48  97.13    97.13  0.92
  0.9           90.01  90.01       95.93    96.30  96.30    95.93  0.56
  0.95          95.02  95.02       90.00    89.63  90.56    90.83  0.32
  0.98          98.02  98.02       62.41    62.41  61.76    61.85  0.16

Time: about 20 s of CPU time each, most of it to compile.

    python -m experiments.alpha_sweep --compare --epochs 5 --seeds 2

measures the program against its 16 runs one after another, both compiled, in
turns; medians of 5 on 2 CPU cores, in two runs: .56 and .79 of the time with
alpha, .70 and .71 with --by sparsity.
"""

import csv
import dataclasses
import itertools
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro

import tern_jax
from experiments.common import cli, data, evaluate, log, methods, plot, run
from tern_jax import metrics
from tern_jax.checkpoint import Place, absolute
from tern_jax.core.containers import Array, Ternary

#: Where nothing else is asked for.
VALUES = {
  "alpha": (0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4),
  "sparsity": (0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98),
}

#: Columns of the record: what the table calls them, and a factor there.
COLUMNS = {
  "predicted": ("predicted", 100),
  "zeros": ("zeros", 100),
  "validation": ("validation", 100),
  "validation_rounded": ("rounded", 100),
  "test": ("test", 100),
  "test_rounded": ("rounded", 100),
  "bits": ("bits", 1),
}

Row = dict[str, float]
#: train(value, seed, splits) -> {column: 0-d}.
Train = Callable[[Any, Any, Any], dict[str, Array]]


@dataclasses.dataclass(frozen=True)
class Config:
  """All that a sweep depends on."""

  by: Literal["alpha", "sparsity"] = "alpha"
  """What is swept: the paper's controller, or the share of zeros asked for."""
  values: tuple[float, ...] = ()
  """Values of it; none given takes eight."""
  seeds: int = 3
  """Runs of each value, seeded 0, 1, ..."""
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
  strength: float = 0.2
  """Of the sweep over alpha: the final strength of WDR."""
  devices: int | None = None
  """Local devices that share the runs; None for all."""
  workdir: str | None = None
  """Directory of the record; None for one under runs/ named by the sweep."""
  compare: bool = False
  """Measure the one program against its runs one after another instead."""

  def __post_init__(self):
    if self.seeds < 1:
      raise cli.UsageError(f"seeds={self.seeds}, but it must be at least 1.")
    most = jax.local_device_count()
    if self.devices is not None and not 1 <= self.devices <= most:
      raise cli.UsageError(
        f"devices={self.devices}, but there are {most} here: give 1 to {most}."
      )
    for value in self.values:
      try:
        self.run(value)
      except ValueError as error:
        raise cli.UsageError(str(error)) from error

  @property
  def directory(self) -> Place:
    """Where the sweep writes, absolute."""
    name = f"sweep-{self.data}-{self.by}"
    return absolute(self.workdir or Path("runs", name))

  @property
  def grid(self) -> list[tuple[float, int]]:
    """(value, seed) of each run."""
    values = self.values or VALUES[self.by]
    return list(itertools.product(values, range(self.seeds)))

  def run(self, value: Any, seed: Any = 0) -> cli.Config:
    """Returns the config of one run, whose value and seed may be traced."""
    face: dict[str, Any] = {self.by: value}
    method = methods.Sca(**face, strength=self.strength)
    tern_jax.SCA(**face)  # says what is wrong with a value
    return cli.Config(
      method=method,
      data=self.data,
      model=self.model,
      hidden=self.hidden,
      norm=self.norm,
      exclude=self.exclude,
      epochs=self.epochs,
      batch_size=self.batch_size,
      seed=seed,
      parallel="jit",
      workdir=str(self.directory),
    )

  def to_json(self) -> dict[str, Any]:
    """Returns the config as JSON holds it, without where and how it runs."""
    record = dataclasses.asdict(self)
    for name in ("workdir", "devices", "compare", "data_dir"):
      del record[name]
    record["values"] = list(self.values or VALUES[self.by])
    lists = {"hidden": list(self.hidden), "exclude": list(self.exclude)}
    return record | lists


def make_train(config: Config, dataset: data.Dataset) -> Train:
  """Makes the function that trains one net: pure, to be mapped and jitted.

  It is the training of `experiments.common.run`, its loop a scan.

  Args:
    config: of the sweep.
    dataset: tells the shape of images, and how they are standardized.

  Returns:
    `train(value, seed, splits) -> {column: 0-d}`, with splits as on devices.
  """
  images = len(dataset.train["label"])
  epoch_steps = images // config.batch_size

  def standardized(images: Array) -> Array:
    axes = tuple(range(images.ndim - 1))
    mean, std = (np.expand_dims(x, axes) for x in (dataset.mean, dataset.std))
    return (images.astype(jnp.float32) - mean) / std

  def train(value: Any, seed: Any, splits: Any) -> dict[str, Array]:
    options = config.run(value, seed)
    model: Any = evaluate.make_model(options, dataset.num_classes)
    key = jax.random.key(seed)
    image = jnp.zeros((1, *dataset.input_shape))
    model_state: Any = dict(model.init(key, image, train=False))
    params = model_state.pop("params")
    steps = config.epochs * epoch_steps
    phase = run.ternary_phase(options, steps, params, model_state)
    stage, (_, onset, _) = phase.final, phase.snapshots
    step = run.make_step(options, stage, dataset.num_classes)

    def batch(rows: Array) -> Any:
      split = splits["train"]
      image = standardized(split["input"][rows])
      return {"input": image, "label": split["label"][rows]}

    def advance(state: Any, rows: Array) -> Any:
      return jax.lax.scan(lambda s, r: step(s, batch(r)), state, rows)[0]

    keys = jax.random.split(jax.random.fold_in(key, 1), config.epochs)
    rows = jax.vmap(lambda k: jax.random.permutation(k, images))(keys)
    rows = rows[:, : epoch_steps * config.batch_size]
    rows = rows.reshape(steps, config.batch_size)
    at_onset = advance(phase.state, rows[:onset])
    state = advance(at_onset, rows[onset:])

    def predict(theta: Array) -> Array:
      alpha = value
      if config.by == "sparsity":
        alpha = tern_jax.alpha_for_sparsity(theta, value)
      return theta.size * tern_jax.predicted_sparsity(theta, alpha)

    thetas = stage.latents(at_onset).values()
    zeros = sum(map(predict, thetas))
    ternary = stage.ternary(state)
    weights = dense(ternary.pop("params"))

    def reestimate(statistics: Any, rows: Array) -> tuple[Any, None]:
      _, statistics = model.apply(
        {"params": weights, **statistics},
        batch(rows)["input"],
        train=True,
        mutable=list(statistics),
      )
      return statistics, None

    rounded = {"params": weights, **ternary}
    if ternary:
      some = rows[: evaluate.REESTIMATION_BATCHES]
      rounded |= jax.lax.scan(reestimate, ternary, some)[0]

    def accuracy(variables: Any, split: Any) -> Array:
      def answer(image: Array) -> Array:
        batch = standardized(image)[None]
        return jnp.argmax(model.apply(variables, batch, train=False))

      # In parts, because activations of all images may not fit.
      answers = jax.lax.map(answer, split["input"], batch_size=1000)
      return jnp.mean(answers == split["label"])

    codes, as_trained = stage.ternary(state)["params"], stage.variables(state)
    return {
      "predicted": jnp.asarray(zeros) / sum(x.size for x in thetas),
      "zeros": metrics.sparsity(codes),
      "validation": accuracy(as_trained, splits["validation"]),
      "validation_rounded": accuracy(rounded, splits["validation"]),
      "test": accuracy(as_trained, splits["test"]),
      "test_rounded": accuracy(rounded, splits["test"]),
      "bits": metrics.entropy(codes),
    }

  return train


def dense(tree: Any) -> Any:
  """Returns a tree with dense weights for its `Ternary` leaves."""

  def is_ternary(node: Any) -> bool:
    return isinstance(node, Ternary)

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


def sweep(config: Config, dataset: data.Dataset) -> list[Row]:
  """Trains all nets of a sweep.

  Returns:
    A row for each run: its value and seed, and the columns of the record.
  """
  values, seeds, splits = arguments(config, dataset)
  devices = min(config.devices or jax.local_device_count(), len(values))
  program = in_one_program(make_train(config, dataset), devices)
  columns = jax.device_get(program(values, seeds, splits))
  return [
    {
      config.by: value,
      "seed": seed,
      **{name: float(column[i]) for name, column in columns.items()},
    }
    for i, (value, seed) in enumerate(config.grid)
  ]


def arguments(
  config: Config, dataset: data.Dataset
) -> tuple[np.ndarray, np.ndarray, Any]:
  """Returns what the program takes: values and seeds of all runs, splits."""
  values, seeds = zip(*config.grid, strict=True)
  splits = {
    name: getattr(dataset, name) for name in ("train", "validation", "test")
  }
  return (
    np.array(values, np.float32),
    np.array(seeds, np.int32),
    jax.device_put(splits),
  )


def compare(
  config: Config, dataset: data.Dataset, rounds: int = 5
) -> dict[str, float]:
  """Measures one program for all runs against one run after another.

  Both are compiled before; they take turns, so that a slow phase of a shared
  machine hits both.

  Returns:
    Median seconds of "one program" and of "one by one", and their "ratio".
  """
  values, seeds, splits = arguments(config, dataset)
  train = make_train(config, dataset)
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


def table(rows: list[Row], by: str) -> str:
  """Prints means over seeds for people, in lines of at most 80 columns."""
  lines: log.Rows = [
    (
      by,
      "predicted",
      "zeros",
      "validation",
      "rounded",
      "test",
      "rounded",
      "bits",
    )
  ]
  for value, group in itertools.groupby(rows, lambda row: row[by]):
    runs = list(group)
    means = [
      statistics.fmean(factor * row[name] for row in runs)
      for name, (_, factor) in COLUMNS.items()
    ]
    lines.append((f"{value:g}", *(f"{mean:.2f}" for mean in means)))
  return log.aligned(lines)


def read(path: Place) -> list[Row]:
  """Reads the rows that `write` wrote."""
  rows = csv.DictReader(path.read_text().splitlines())
  return [{name: float(cell) for name, cell in row.items()} for row in rows]


def write(path: Place, rows: list[Row]) -> None:
  """Writes one line a run, after a line of names."""
  with path.open("w") as file:
    writer = csv.DictWriter(file, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)


def main(config: Config) -> None:
  """Runs the sweep, or prints the table of one that is finished."""
  dataset = data.load_dataset(config.data, config.data_dir)
  if config.compare:
    measured = compare(config, dataset)
    print(f"{len(config.grid)} runs, median seconds")
    for name, value in measured.items():
      print(f"  {name:<12} {value:7.3f}")
    return
  directory = config.directory
  log.claim(directory, config.to_json())
  path = directory / "sweep.csv"
  if not path.exists():
    rows = sweep(config, dataset)
    plot.sweep_sparsity(rows, config.by, directory / "sparsity.png")
    plot.sweep_accuracy(rows, directory / "accuracy.png")
    write(path, rows)
  print(f"{table(read(path), config.by)}\n\n{directory}")


if __name__ == "__main__":
  with evaluate.explained_errors():
    main(tyro.cli(Config, description=__doc__))
