"""What each method is worth: accuracy, sparsity and size, side by side.

  python -m experiments.benchmarks.accuracy_table mnist
  python -m experiments.benchmarks.accuracy_table cifar10 --seeds 0 1 2
  python -m experiments.benchmarks.accuracy_table mnist --rows "TGA()" TWN

Every method continues the same float net of its seed for the same number of
epochs, with rates chosen on the validation split; the float row is a float net
trained from the start for the epochs of both. The test split is read once a
run, at its end. Runs lie in their own directories under --root: the command can
be stopped and given again, and `table.md` there holds what is done so far.

The rates of "TGA()" and "TGA as published" were not chosen: they are those of
the other rows, on thresholds as on weights, as in TGA's paper. Differs from it:
weights are trained by Adam, and together with the thresholds.
"""

import dataclasses
from pathlib import Path
from typing import Literal

import tyro

from experiments.common import (
  bench,
  cli,
  configs,
  errors,
  files,
  lock,
  methods,
  trials,
)
from experiments.common.configs import SLOW_SCA
from experiments.common.tables import summary
from experiments.common.trials import Record, Rows

#: Rates of Adam that suit all but SCA better than their own on MNIST.
FAST = {"learning_rate": 3e-3, "scale_learning_rate": 3e-4}
FAST_EC2T = {"learning_rate": 3e-3, "scale_learning_rate": 1e-4}
MNIST: Rows = {
  "TWN": (methods.Twn(), FAST),
  "TTQ": (methods.Ttq(), FAST),
  "AbsMean": (methods.Absmean(), FAST),
  "TGA(surrogate=0.5)": (methods.Tga(), FAST),
  "TGA()": (trials.PLAIN_TGA, trials.by_sgd(3e-3)),
  "TGA as published": (trials.PUBLISHED_TGA, trials.by_sgd(3e-3)),
  "EC2T, γ = .5": (methods.Ec2t(gamma=0.5, s=0.7), FAST_EC2T),
  "SCA, .8": (methods.Sca(sparsity=0.8), {}),
}
CIFAR10: Rows = {
  "TWN": (methods.Twn(), {}),
  "TTQ": (methods.Ttq(), {}),
  "TGA(surrogate=0.5)": (methods.Tga(), {}),
  "TGA(surrogate=0.5), frozen Δ": (methods.Tga(frozen=True), {}),
  "TGA()": (trials.PLAIN_TGA, trials.by_sgd(1e-3)),
  "TGA as published": (trials.PUBLISHED_TGA, trials.by_sgd(1e-3)),
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


@dataclasses.dataclass(frozen=True)
class AccuracyOptions:
  """Command line of the benchmark."""

  experiment: tyro.conf.Positional[Literal["mnist", "cifar10"]]
  """Data and network; the rows are those methods that suit it."""
  rows: tuple[str, ...] = ()
  """The only rows to train and to show, "float" among them; all where none is
  given."""
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
  labels = trials.chosen(options.rows, ("float", *rows))
  given = {
    name: getattr(options, name)
    for name in ("model", "epochs", "float_epochs", "data_dir")
    if getattr(options, name) is not None
  }
  config = dataclasses.replace(config, **given)
  place = options.root / f"{config.data}-{config.model}"
  table: dict[str, list[Record]] = {label: [] for label in labels}
  with lock.held(place):
    for seed in options.seeds:
      seeded = dataclasses.replace(config, seed=seed)
      # The float row last: it takes longest, and no other waits for it.
      for label in sorted(labels, key=lambda label: label == "float"):
        record = record_of(label, rows, seeded, place)
        table[label].append(record)
        text = summary(table, bench.ACCURACY).markdown()
        files.write_table(place, text, table)
  print(summary(table, bench.ACCURACY).markdown())


def record_of(
  label: str, rows: Rows, config: cli.Config, place: Path
) -> Record:
  """Trains the net of a row, and returns what the table shows of it."""
  if label != "float":
    return bench.ternary_record(trials.ternary(config, place, *rows[label]))
  both = (config.float_epochs or config.epochs) + config.epochs
  config = dataclasses.replace(config, float_epochs=both)
  return trials.float_only(config, place)


if __name__ == "__main__":
  with errors.explained():
    main(tyro.cli(AccuracyOptions, description=__doc__))
