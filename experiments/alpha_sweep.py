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
import io
import itertools
import statistics
import sys
from pathlib import Path
from typing import Any, Literal

import tyro

from experiments.common import (
  cli,
  data,
  errors,
  files,
  lock,
  log,
  methods,
  sweep,
  terminal,
)
from experiments.common.plots import sweep as pictures
from experiments.common.tables import Table
from tern_jax.checkpoint import Place, absolute

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


@dataclasses.dataclass(frozen=True)
class SweepOptions(sweep.SmallNet):
  """All that a sweep depends on."""

  by: Literal["alpha", "sparsity"] = "alpha"
  """What is swept: the paper's controller, or the share of zeros asked for."""
  values: tuple[float, ...] = ()
  """Values of it; none given takes eight."""
  seeds: int = 3
  """Runs of each value, seeded 0, 1, ..."""
  strength: float = 0.2
  """Of the sweep over alpha: the final strength of WDR."""
  devices: int | None = None
  """Local devices that share the runs; None for all."""
  workdir: str | None = None
  """Directory of the record; None for one under runs/ named by the sweep."""
  compare: bool = False
  """Measure the one program against its runs one after another instead."""

  @property
  def directory(self) -> Place:
    """Where the sweep writes, absolute."""
    name = f"sweep-{self.data}-{self.by}"
    return absolute(self.workdir or Path("runs", name))

  def run(self, value: Any, seed: Any) -> cli.Config:
    """Returns the options of one run, whose value and seed may be traced."""
    face: dict[str, Any] = {self.by: value}
    method = methods.Sca(**face, strength=self.strength)
    return self.config(method=method, seed=seed)

  def sweep(self) -> sweep.Sweep:
    """Returns the runs.

    Raises:
      UsageError: they cannot be.
    """
    values = self.values or VALUES[self.by]
    return sweep.Sweep(self.by, values, self.seeds, self.run, self.devices)

  def to_json(self) -> dict[str, Any]:
    """Returns the options as JSON holds them, without where and how it runs."""
    record = dataclasses.asdict(self)
    for name in ("workdir", "devices", "compare", "data_dir"):
      del record[name]
    record["values"] = list(self.values or VALUES[self.by])
    lists = {"hidden": list(self.hidden), "exclude": list(self.exclude)}
    return record | lists


def main(options: SweepOptions) -> None:
  """Runs the sweep, or prints the table of one that is finished."""
  runs, directory = options.sweep(), options.directory
  if options.compare:
    dataset = data.load_dataset(options.data, options.data_dir)
    measured = sweep.compare(runs, dataset)
    print(f"{len(runs.grid)} runs, median seconds")
    for name, value in measured.items():
      print(f"  {name:<12} {value:7.3f}")
    return
  path = directory / "sweep.csv"
  if not (log.check(directory, options.to_json()) and path.exists()):
    with lock.held(directory):
      train(options)
  print(f"{table(read(path), options.by).text()}\n\n{directory}")


def train(options: SweepOptions) -> None:
  """Runs the sweep in its directory, which is locked."""
  runs, directory = options.sweep(), options.directory
  dataset = data.load_dataset(options.data, options.data_dir)
  log.claim(directory, options.to_json())
  terminal.say(
    f"{len(runs.grid)} trainings in one program, in {directory}", sys.stderr
  )
  rows = sweep.run_sweep(runs, dataset)
  pictures.sparsity(rows, options.by, directory / "sparsity.png")
  pictures.accuracy(rows, directory / "accuracy.png")
  # The last, because it tells that all is done.
  write(directory / "sweep.csv", rows)


def table(rows: list[sweep.SweepRow], by: str) -> Table:
  """Returns means over the seeds of each value."""
  lines = Table((by, *(title for title, _ in COLUMNS.values())))
  for value, group in itertools.groupby(rows, lambda row: row[by]):
    runs = list(group)
    means = [
      statistics.fmean(factor * row[name] for row in runs)
      for name, (_, factor) in COLUMNS.items()
    ]
    lines.rows.append((f"{value:g}", *(f"{mean:.2f}" for mean in means)))
  return lines


def read(path: Place) -> list[sweep.SweepRow]:
  """Reads the rows that `write` wrote."""
  rows = csv.DictReader(path.read_text().splitlines())
  return [{name: float(cell) for name, cell in row.items()} for row in rows]


def write(path: Place, rows: list[sweep.SweepRow]) -> None:
  """Writes one line a run, after a line of names."""
  text = io.StringIO()
  writer = csv.DictWriter(text, rows[0], lineterminator="\n")
  writer.writeheader()
  writer.writerows(rows)
  files.write(path, text.getvalue())


if __name__ == "__main__":
  with errors.explained():
    main(tyro.cli(SweepOptions, description=__doc__))
