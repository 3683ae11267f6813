"""A size shared over the layers against one sparsity for all of them.

  python -m experiments.benchmarks.budget
  python -m experiments.benchmarks.budget --sparsities 0.9 --seeds 0 1 2

Trains a net with the same sparsity in every layer, then one of the same method,
start and epochs that is asked for the bytes which that came to: `fit_budget`
shares them. Sizes are those of whole models at the entropy of their codes. The
test split is read once a run, at its end. Runs lie in their own directories
under --root: the command can be stopped and given again.
"""

import dataclasses
from pathlib import Path
from typing import Any

import tyro

from experiments.common import bench, configs, errors, files, lock, methods
from experiments.common.runner import run
from experiments.common.tables import summary


@dataclasses.dataclass(frozen=True)
class BudgetOptions:
  """Command line of the benchmark."""

  sparsities: tuple[float, ...] = (0.8, 0.9, 0.95)
  """Shares of zeros that all layers have in the one net."""
  seeds: tuple[int, ...] = (0,)
  """Seeds, one after the other."""
  data_dir: str | None = None
  """Directory of prepared data sets; None for the usual one."""
  root: Path = Path("runs/budget")
  """Where the runs lie."""


def main(options: BudgetOptions) -> None:
  """Trains what is not trained yet, and prints the table."""
  config = dataclasses.replace(
    configs.CIFAR10, data_dir=options.data_dir, **configs.SLOW_SCA
  )
  place = options.root / f"{config.data}-{config.model}"
  table: dict[str, list[Any]] = {}

  def train(label: str, seed: int, method: methods.Method) -> dict[str, Any]:
    own = dataclasses.replace(config, seed=seed, method=method)
    workdir = str(place / own.directory.name)
    result = run.run(dataclasses.replace(own, workdir=workdir))
    record = bench.ternary_record(result)
    record["bytes"] = result["entropy_bytes"]
    table.setdefault(label, []).append(record)
    text = summary(table, bench.BUDGET).markdown()
    files.write_table(place, text, table)
    return result

  with lock.held(place):
    for seed in options.seeds:
      for sparsity in options.sparsities:
        alike = methods.Sca(sparsity=sparsity)
        whole = train(f"{sparsity:g} in all", seed, alike)
        shared = methods.Sca(bytes=int(whole["entropy_bytes"]))
        train(f"{sparsity:g}, shared", seed, shared)
  print(summary(table, bench.BUDGET).markdown())


if __name__ == "__main__":
  with errors.explained():
    main(tyro.cli(BudgetOptions, description=__doc__))
