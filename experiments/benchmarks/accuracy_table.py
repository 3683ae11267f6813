"""What each method is worth: accuracy, sparsity and size, side by side.

  python -m experiments.benchmarks.accuracy_table mnist
  python -m experiments.benchmarks.accuracy_table cifar10 --seeds 0 1 2

Every method continues the same float net of its seed for the same number of
epochs, with rates chosen on the validation split; the float row is a float net
trained from the start for the epochs of both. The test split is read once a
run, at its end. Runs lie in their own directories under --root: the command can
be stopped and given again, and `table.md` there holds what is done so far.
"""

import dataclasses
from pathlib import Path
from typing import Any, Literal

import tyro

from experiments.common import (
  bench,
  build,
  cli,
  configs,
  data,
  errors,
  evaluate,
  files,
  lock,
  log,
  methods,
)
from experiments.common.configs import SLOW_SCA
from experiments.common.runner import float_net, run
from experiments.common.tables import Table, summary

#: Rates of Adam that suit all but SCA better than their own on MNIST.
FAST = {"learning_rate": 3e-3, "scale_learning_rate": 3e-4}
FAST_EC2T = {"learning_rate": 3e-3, "scale_learning_rate": 1e-4}
#: {row: (method, options that differ from the experiment's)}
Rows = dict[str, tuple[methods.Method, dict[str, Any]]]
MNIST: Rows = {
  "TWN": (methods.Twn(), FAST),
  "TTQ": (methods.Ttq(), FAST),
  "AbsMean": (methods.Absmean(), FAST),
  "TGA": (methods.Tga(), FAST),
  "EC2T, γ = .5": (methods.Ec2t(gamma=0.5, s=0.7), FAST_EC2T),
  "SCA, .8": (methods.Sca(sparsity=0.8), {}),
}
CIFAR10: Rows = {
  "TWN": (methods.Twn(), {}),
  "TTQ": (methods.Ttq(), {}),
  "TGA": (methods.Tga(), {}),
  "TGA, frozen Δ": (methods.Tga(frozen=True), {}),
  "EC2T, γ = 0": (methods.Ec2t(gamma=0.0), {}),
  "EC2T, γ = .2": (methods.Ec2t(gamma=0.2), {}),
  "EC2T, γ = .4": (methods.Ec2t(gamma=0.4), {}),
  "SCA, .5": (methods.Sca(sparsity=0.5), SLOW_SCA),
  "SCA, .65": (methods.Sca(sparsity=0.65), SLOW_SCA),
  "SCA, .75": (methods.Sca(sparsity=0.75), SLOW_SCA),
  "SCA, .9": (methods.Sca(sparsity=0.9), SLOW_SCA),
}
EXPERIMENTS = {
  "mnist": (
    MNIST,
    dataclasses.replace(configs.MNIST, init="float", epochs=8, float_epochs=3),
  ),
  "cifar10": (CIFAR10, configs.CIFAR10),
}
Record = dict[str, float | str | None]


@dataclasses.dataclass(frozen=True)
class AccuracyOptions:
  """Command line of the benchmark."""

  experiment: tyro.conf.Positional[Literal["mnist", "cifar10"]]
  """Data and network; the rows are those methods that suit it."""
  seeds: tuple[int, ...] = (0, 1, 2)
  """Seeds, one after the other."""
  model: cli.Model | None = None
  """Network, None for the experiment's own."""
  epochs: int | None = None
  """Passes of each ternary net, None for the experiment's own."""
  float_epochs: int | None = None
  """Passes of the float net that they start from, None likewise."""
  data_dir: str | None = None
  """Directory of prepared data sets; None for the usual one."""
  root: Path = Path("runs/accuracy")
  """Where the runs lie."""


def main(options: AccuracyOptions) -> None:
  """Trains what is not trained yet, and prints the table."""
  rows, config = EXPERIMENTS[options.experiment]
  given = {
    name: getattr(options, name)
    for name in ("model", "epochs", "float_epochs", "data_dir")
    if getattr(options, name) is not None
  }
  config = dataclasses.replace(config, **given)
  dataset = data.load_dataset(config.data, config.data_dir)
  place = options.root / f"{config.data}-{config.model}"
  table: dict[str, list[Record]] = {label: [] for label in ("float", *rows)}
  with lock.held(place):
    train(options, config, dataset, place, table)
  print(shown(table).markdown())


def train(
  options: AccuracyOptions,
  config: cli.Config,
  dataset: data.Dataset,
  place: Path,
  table: dict[str, list[Record]],
) -> None:
  """Adds to a table what is done, and what it then does."""
  rows, _ = EXPERIMENTS[options.experiment]
  for seed in options.seeds:
    # The directory is that of no run: it only tells where the float net lies.
    seeded = dataclasses.replace(config, seed=seed, workdir=str(place / "none"))
    for label, (method, changes) in rows.items():
      own = dataclasses.replace(seeded, method=method, workdir=None, **changes)
      workdir = str(place / own.directory.name)
      result = run.run(dataclasses.replace(own, workdir=workdir))
      table[label].append(bench.ternary_record(result))
      write(table, place)
    table["float"].append(float_record(seeded, dataset))
    write(table, place)


def write(table: dict[str, list[Record]], place: Path) -> None:
  """Writes what is done so far."""
  files.write_table(place, shown(table).markdown(), table)


def shown(table: dict[str, list[Record]]) -> Table:
  """Returns mean ± standard deviation of each row, and nothing where none is.

  >>> rows = {"float": [{"validation": .9, "test": .89, "sparsity": None,
  ...                    "entropy": None}]}
  >>> shown(rows).rows
  [('float', '1', '90.00', '89.00', '-', '-')]
  """
  return summary(table, bench.ACCURACY)


def float_record(config: cli.Config, dataset: data.Dataset) -> Record:
  """Trains a float net for the epochs of both trainings, and evaluates it."""
  both = (config.float_epochs or config.epochs) + config.epochs
  config = dataclasses.replace(config, float_epochs=both)
  variables: Any = float_net.train(config, dataset)
  model = build.make_model(config, dataset.num_classes)
  score = evaluate.make_scorer(model, dataset)
  return {
    "validation": score(variables, dataset.validation).accuracy,
    "test": score(variables, dataset.test).accuracy,
    "sparsity": None,
    "entropy": None,
    **log.provenance(),
  }


if __name__ == "__main__":
  with errors.explained():
    main(tyro.cli(AccuracyOptions, description=__doc__))
