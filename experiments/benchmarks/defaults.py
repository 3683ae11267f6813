"""What the recipe is worth as it comes: defaults only, no rate chosen.

  python -m experiments.benchmarks.defaults
  python -m experiments.benchmarks.defaults --nets digits mnist7 --norm layer \
    --length 0.25 --start float

Small nets, trained by scripts that only their optimizer makes ternary:
`tern_jax.recipe(sparsity, steps).optimizer()`, with nothing else given, but
`warm=True` from a float net. Beside it are straight-through training (TWN, each
layer at the asked sparsity, after a ramp over the first quarter) at Adam's
usual rate and at its best rate of four, and float weights pruned on the same
ramp, at their best rate of three; "dense" passes gradients to their zeros, too.
Rates are chosen by validation accuracy, at each sparsity; the test split is
read once a run, at its end. All seeds and sparsities of one rate are one
program.

What is done lies under --root: the command can be stopped and given again.
After a change of the recipe, give another --root, or remove the Sca.json there.
"""

import dataclasses
import functools
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import optax
import tyro

import tern_jax
from experiments.common import (
  bench,
  cli,
  data,
  errors,
  files,
  lock,
  log,
  sweep,
  terminal,
)
from experiments.common.errors import DataNotPreparedError, UsageError
from experiments.common.pruning import Pruned
from experiments.common.tables import Row
from tern_jax.trees.wrap import Wrapped


class Setting(NamedTuple):
  """A network and its data.

  Attributes:
    net: as it is trained at the usual length, with batch norm.
    block: side of the blocks of pixels that are averaged, 1 for none.
  """

  net: sweep.SmallNet
  block: int = 1


#: By their names on the command line.
SETTINGS = {
  "digits": Setting(sweep.SmallNet("digits", epochs=60, batch_size=64)),
  "mnist": Setting(sweep.SmallNet("mnist", epochs=10, batch_size=128)),
  "mnist7": Setting(
    sweep.SmallNet("mnist", hidden=(16, 16), epochs=10, batch_size=128), block=4
  ),
  "fashion_mnist": Setting(
    sweep.SmallNet("fashion_mnist", hidden=(64, 64), epochs=10, batch_size=128)
  ),
  "cifar10": Setting(
    sweep.SmallNet(
      "cifar10",
      model="convnet",
      hidden=(8, 16, 32),
      exclude=("stem",),
      epochs=6,
      batch_size=128,
    )
  ),
}


class Racer(NamedTuple):
  """A method as it is trained here.

  Attributes:
    name: of its files.
    rates: Adam's first rates; None for those of the recipe.
    usual: the rate that has a row of its own, None for no such row.
    method: from the ramp of the sparsity to the method; None for the recipe.
  """

  name: str
  rates: tuple[float | None, ...]
  usual: float | None = None
  method: Callable[..., tern_jax.Ternarizer] | None = None


#: By their names in the table.
RACERS = {
  "SCA": Racer("Sca", (None,)),
  "straight-through": Racer(
    "Twn", (3e-4, 1e-3, 3e-3, 1e-2), usual=1e-3, method=tern_jax.TWN
  ),
  "pruned float": Racer("Pruned", (1e-3, 3e-3, 1e-2), method=Pruned),
  "pruned float, dense": Racer(
    "PrunedDense",
    (1e-3, 3e-3, 1e-2),
    method=functools.partial(Pruned, dense=True),
  ),
}


@dataclasses.dataclass(frozen=True)
class DefaultsOptions:
  """Command line of the benchmark."""

  nets: tuple[str, ...] = tuple(SETTINGS)
  """Networks and their data."""
  racers: tuple[str, ...] = tuple(RACERS)
  """Methods, by their names in the table."""
  norm: Literal["batch", "layer", "none"] = "batch"
  """What comes after hidden layers; without a norm they have biases."""
  length: float = 1.0
  """Factor of the usual number of steps."""
  start: Literal["scratch", "float"] = "scratch"
  """Whether nets are trained from scratch, or first as float nets, for a share
  of the same steps."""
  float_share: float = 0.5
  """That share."""
  sparsities: tuple[float, ...] = (0.5, 0.8, 0.9, 0.95, 0.98)
  """Shares of zeros."""
  seeds: int = 5
  """Runs of each."""
  data_dir: str | None = None
  """Directory of prepared data sets; None for the usual one."""
  root: Path = Path("runs/defaults")
  """Where what is done lies."""

  def __post_init__(self):
    for name, given, known in (
      ("nets", self.nets, SETTINGS),
      ("racers", self.racers, RACERS),
    ):
      if unknown := set(given) - set(known):
        listed = ", ".join(map(repr, known))
        raise UsageError(f"{name}={unknown}, but there are {listed}.")

  def place(self, name: str) -> Path:
    """Returns where the runs of a network lie."""
    parts = [name, self.norm, f"x{self.length:g}", self.start]
    return self.root / "-".join(parts)

  def sweep(self, name: str, label: str) -> sweep.Sweep:
    """Returns the runs of a method on one network."""
    net = dataclasses.replace(
      SETTINGS[name].net,
      norm=self.norm != "none",
      layer_norm=self.norm == "layer",
    )
    where = tern_jax.kernels(exclude=net.exclude)

    def config(sparsity: Any, seed: Any) -> cli.Config:
      del sparsity
      return net.config(seed=seed)

    def optimizer(sparsity: Any, steps: int, rate: Any) -> Wrapped:
      return optimizer_of(RACERS[label], sparsity, steps, where, rate, warm)

    warm = self.start == "float"
    share = self.float_share if warm else 0.0
    script = sweep.Script(optimizer, self.length, share)
    return sweep.Sweep(
      "sparsity", self.sparsities, self.seeds, config, script=script
    )


def optimizer_of(
  racer: Racer,
  sparsity: Any,
  steps: int,
  where: Any,
  rate: Any,
  warm: bool = False,
) -> Wrapped:
  """Returns the optimizer of a script.

  Args:
    racer: the method.
    sparsity: that is asked for, a number or traced.
    steps: of the ternary net.
    where: which leaves are ternary.
    rate: Adam's first rate, a number or traced; not used by the recipe.
    warm: whether nets start from a float net, which the recipe is told.
  """
  if racer.method is None:
    return tern_jax.recipe(sparsity, steps, where, warm=warm).optimizer()
  target = tern_jax.ramp(sparsity, steps, until=0.25)
  tern = tern_jax.ParamTransform(racer.method(sparsity=target), where)
  schedule = optax.cosine_decay_schedule(rate, steps, alpha=0.05)
  return tern_jax.wrap(optax.adam(schedule), tern)


def main(options: DefaultsOptions) -> None:
  """Runs what is not done yet, and prints a table for each network."""
  for name in options.nets:
    try:
      dataset = loaded(SETTINGS[name], options.data_dir)
    except DataNotPreparedError as error:
      why = str(error).splitlines()[0]
      terminal.say(f"{name} is left out: {why}", sys.stderr)
      continue
    print(f"\n{options.place(name).name}\n\n{table_of(options, name, dataset)}")


def loaded(setting: Setting, data_dir: str | None) -> data.Dataset:
  """Returns the data of a network."""
  dataset = data.load_dataset(setting.net.data, data_dir)
  return dataset if setting.block == 1 else averaged(dataset, setting.block)


def averaged(dataset: data.Dataset, block: int) -> data.Dataset:
  """Returns the data with means over square blocks of pixels for images."""
  height, width, channels = dataset.input_shape
  shape = height // block, width // block, channels

  def smaller(split: Mapping[str, Any]) -> dict[str, Any]:
    images = split["input"].reshape(
      -1, shape[0], block, shape[1], block, channels
    )
    means = images.mean((2, 4), dtype=np.float32)
    return {**split, "input": means.round().astype(np.uint8)}

  train = smaller(dataset.train)
  mean, std = data.channel_statistics(train["input"])
  return dataclasses.replace(
    dataset,
    input_shape=shape,
    mean=mean,
    std=std,
    train=train,
    validation=smaller(dataset.validation),
    test=smaller(dataset.test),
  )


def table_of(options: DefaultsOptions, name: str, dataset: data.Dataset) -> str:
  """Runs what is not done yet on one network, and returns its table."""
  place = options.place(name)
  sweeps = {label: options.sweep(name, label) for label in options.racers}
  # What the name of the directory does not tell.
  record = {
    "sparsities": list(options.sparsities),
    "seeds": options.seeds,
    "float_share": options.float_share,
  }
  log.check(place, record)
  table: dict[str, Any] = {}
  with lock.held(place):
    log.claim(place, record)
    for label, runs in sweeps.items():
      racer, tried = RACERS[label], {}
      run = sweep.runner_of(runs, dataset)
      for rate in racer.rates:
        file = racer.name if rate is None else f"{racer.name}-{rate:g}"
        tried[rate] = sweep.run_once(
          place / f"{file}.json", functools.partial(run, rate)
        )
      for row, some in shown(label, tried).items():
        table[row] = {
          str(s): bench.best_rate(some, s) for s in options.sparsities
        }
      lines = bench.equal_sparsity(table, options.sparsities)
      lines.rows += ahead(table, options.sparsities)
      files.write_table(place, lines.markdown(), table)
  return lines.markdown()


def shown(label: str, tried: dict[Any, Any]) -> dict[str, dict[Any, Any]]:
  """Returns the rows of a method, and the runs of which they show the best.

  >>> list(shown("straight-through", {1e-3: {}, 1e-2: {}}))
  ['straight-through, 0.001', 'straight-through, best']
  >>> list(shown("SCA", {None: {}}))
  ['SCA']
  """
  usual = RACERS[label].usual
  if usual is None:
    return {label: tried}
  one = {f"{label}, {usual:g}": {usual: tried[usual]}}
  return one | {f"{label}, best": tried}


def ahead(
  table: Mapping[str, Mapping[str, Any]], sparsities: Sequence[float]
) -> list[Row]:
  """Returns by how many points SCA is ahead of the others, in the mean.

  >>> table = {"SCA": {"0.9": {"test": [.91, .93]}},
  ...          "float": {"0.9": {"test": [.925, .925]}}}
  >>> ahead(table, (.9,))
  [('SCA - float', '-0.50')]
  """

  def mean(name: str, sparsity: float) -> float:
    return 100 * statistics.fmean(table[name][str(sparsity)]["test"])

  others = [name for name in table if name != "SCA"] if "SCA" in table else []
  return [
    (
      f"SCA - {name}",
      *(f"{mean('SCA', s) - mean(name, s):+.2f}" for s in sparsities),
    )
    for name in others
  ]


if __name__ == "__main__":
  with errors.explained():
    main(tyro.cli(DefaultsOptions, description=__doc__))
