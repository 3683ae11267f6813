"""The records of benchmarks, and the tables that show them."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from experiments.common.tables import Column, Table, mean_and_deviation

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
