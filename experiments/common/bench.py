"""The records of benchmarks, and the tables that show them."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from experiments.common.tables import (
  Column,
  Table,
  mean_and_deviation,
  summary,
)

#: Of `accuracy_table`.
ACCURACY = (
  Column("validation %", "validation", 100),
  Column("test %", "test", 100),
  Column("zeros %", "sparsity", 100, ".1f"),
  Column("entropy, bit/weight", "entropy"),
)
#: Of `budget`.
BUDGET = (
  Column("bytes", "bytes", form=",.0f"),
  Column("zeros %", "sparsity", 100, ".1f"),
  Column("validation %", "validation", 100),
  Column("test %", "test", 100),
)
#: Of `one_line`.
ONE_LINE = (
  Column("at their code %", "near", 100),
  Column("validation %", "validation", 100),
  Column("rounded %", "validation_rounded", 100),
  Column("test %", "test", 100),
  Column("rounded %", "test_rounded", 100),
  Column("zeros %", "sparsity", 100, ".1f"),
)


class Figure(NamedTuple):
  """What a paper says of a network."""

  label: str
  test: float
  """Test accuracy in %."""
  zeros: float | None
  """In %; None where not told."""
  source: str


#: {data set: (network, figures)}
PUBLISHED: dict[str, tuple[str, tuple[Figure, ...]]] = {
  "cifar10": (
    "ResNet-20",
    (
      Figure("float", 91.67, None, "arXiv 2004.01077"),
      Figure("TTQ", 91.13, None, "arXiv 1612.01064"),
      Figure("EC2T-1", 91.16, 45.2, "arXiv 2004.01077"),
      Figure("EC2T-2", 91.01, 63.9, "arXiv 2004.01077"),
      Figure("EC2T-3", 90.76, 73.3, "arXiv 2004.01077"),
      Figure("TGA", 90.39, None, "arXiv 1810.01018, cited by arXiv 2004.01077"),
    ),
  )
}


def published(data: str, label: str | None) -> float | None:
  """Returns a published accuracy as a share; None where there is none.

  >>> published("cifar10", "EC2T-1"), published("cifar100", "EC2T-1")
  (0.9116, None)
  """
  _, figures = PUBLISHED.get(data, ("", ()))
  found = [figure.test for figure in figures if figure.label == label]
  return round(found[0] / 100, 4) if found else None


def paper(groups: Mapping[str, Sequence[Mapping[str, Any]]]) -> Table:
  """Sets the rows of `paper_table` beside what is published of them.

  Args:
    groups: {label: its records, one at least}.

  >>> record = {"validation": .9, "test": .9, "sparsity": .5, "entropy": 1.5}
  >>> paper({"EC2T": [record | {"published": .9116}]}).rows
  [('EC2T', '1', '90.00', '90.00', '50.0', '1.50', '91.16')]
  """
  table = summary(groups, ACCURACY)
  table.head += ("published: test %",)
  for n, (first, *_) in enumerate(groups.values()):
    share = first["published"]
    shown = "-" if share is None else f"{100 * share:.2f}"
    table.rows[n] += (shown,)
  return table


def ternary_record(result: Mapping[str, Any]) -> dict[str, Any]:
  """Returns what tables of several runs show of one.

  Args:
    result: what its result.json holds.
  """
  return {
    "validation": result["validation_accuracy"]["rounded"],
    "test": result["accuracy"],
    "sparsity": result["sparsity"],
    "entropy": result["entropy_bits_per_weight"],
    "command": result["command"],
    "commit": result["commit"],
  }


def equal_sparsity(
  record: Mapping[str, Mapping[str, Any]], sparsities: Sequence[float]
) -> Table:
  """Shows test accuracy as mean ± standard deviation, and the rate chosen.

  Args:
    record: {method: {sparsity: runs at its best rate}}; a rate of None is the
      method's own, and is not shown.
    sparsities: shares of zeros that were asked for.

  >>> cell = {"rate": .01, "test": [.91, .93], "zeros": [.9, .9]}
  >>> equal_sparsity({"SCA": {"0.9": cell}}, (.9,)).rows
  [('SCA', '92.00 ± 1.41 (0.01)')]
  """
  table = Table(("test %, zeros:", *(f"{s:g}" for s in sparsities)))
  for name, row in record.items():
    cells = []
    for sparsity in sparsities:
      found = row[str(sparsity)]
      test = mean_and_deviation([100 * x for x in found["test"]], ".2f")
      zeros = statistics.fmean(found["zeros"])
      notes = [] if found["rate"] is None else [f"{found['rate']:g}"]
      notes += [] if abs(zeros - sparsity) < 5e-3 else [f"zeros {zeros:.3f}"]
      cells.append(f"{test} ({', '.join(notes)})" if notes else test)
    table.rows.append((name, *cells))
  return table


def best_rate(tried: Mapping[Any, Any], sparsity: float) -> dict[str, Any]:
  """Returns the runs of a sparsity at the rate of best validation.

  Args:
    tried: {rate: record of its sweep}.
    sparsity: that was asked for.

  >>> def done(validation, test, commit):
  ...   row = {"sparsity": .9, "validation_rounded": validation,
  ...          "test_rounded": test, "zeros": .9}
  ...   return {"rows": [row], "command": "python", "commit": commit}
  >>> best = best_rate({1e-3: done(.8, .7, "07"), 1e-2: done(.9, .6, "b5")}, .9)
  >>> best["rate"], best["test"], best["commit"]
  (0.01, [0.6], 'b5')
  """
  runs = {
    rate: [row for row in done["rows"] if row["sparsity"] == sparsity]
    for rate, done in tried.items()
  }

  def validation(rate: Any) -> float:
    return statistics.fmean(row["validation_rounded"] for row in runs[rate])

  best = max(runs, key=validation)
  return {
    "rate": best,
    "validation": [row["validation_rounded"] for row in runs[best]],
    "test": [row["test_rounded"] for row in runs[best]],
    "zeros": [row["zeros"] for row in runs[best]],
    "command": tried[best]["command"],
    "commit": tried[best]["commit"],
  }
