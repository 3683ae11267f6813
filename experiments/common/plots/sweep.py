"""The pictures of a sweep."""

from collections.abc import Sequence

import numpy as np

from experiments.common.plots.figure import (
  ACCENT,
  FLOAT,
  TERNARY,
  make_panels,
  save,
)
from tern_jax.checkpoint import Place


def sparsity(rows: Sequence[dict[str, float]], by: str, path: Place) -> None:
  """Draws predicted and measured sparsity over what was swept.

  Args:
    rows: of a sweep, one a run.
    by: name of what was swept.
    path: PNG to write.
  """
  figure, (left, right) = make_panels(2, width=4.2, height=3.4)
  values = sorted({row[by] for row in rows})
  for key, color, marker in (
    ("predicted", FLOAT, "x"),
    ("zeros", TERNARY, "o"),
  ):
    means = [
      np.mean([100 * row[key] for row in rows if row[by] == value])
      for value in values
    ]
    name = "measured" if key == "zeros" else "predicted at WDR's onset"
    left.plot(values, means, color=color, linewidth=1.5, label=name)
    left.plot(
      [row[by] for row in rows],
      [100 * row[key] for row in rows],
      marker,
      color=color,
      markersize=5,
    )
  left.set(xlabel=by, ylabel="zeros (%)", ylim=(0, 102))
  left.legend(frameon=False, loc="lower right")
  right.plot([0, 100], [0, 100], color=ACCENT, linewidth=1, linestyle=":")
  right.plot(
    [100 * row["predicted"] for row in rows],
    [100 * row["zeros"] for row in rows],
    "o",
    color=TERNARY,
    markersize=5,
  )
  right.set(
    xlabel="zeros predicted at WDR's onset (%)",
    ylabel="zeros measured (%)",
    xlim=(0, 102),
    ylim=(0, 102),
  )
  save(figure, path)


def accuracy(rows: Sequence[dict[str, float]], path: Place) -> None:
  """Draws accuracy before and after rounding, and bits, over the zeros.

  Args:
    rows: of a sweep, one a run.
    path: PNG to write.
  """
  figure, (left, right) = make_panels(2, width=4.2, height=3.4)
  zeros = [100 * row["zeros"] for row in rows]
  for key, color, marker, name in (
    ("test", FLOAT, "x", "as trained"),
    ("test_rounded", TERNARY, "o", "rounded"),
  ):
    shares = [100 * row[key] for row in rows]
    left.plot(zeros, shares, marker, color=color, markersize=5, label=name)
  left.set(xlabel="zeros (%)", ylabel="test accuracy (%)")
  left.legend(frameon=False, loc="lower left")
  share = np.linspace(0, 1, 201)[1:-1]
  signs = 1 - share
  even = -share * np.log2(share) - signs * np.log2(signs) + signs
  right.plot(
    100 * share,
    even,
    color=ACCENT,
    linewidth=1,
    label="layers alike, as many -1 as +1",
  )
  bits = [row["bits"] for row in rows]
  right.plot(zeros, bits, "o", color=TERNARY, markersize=5, label="measured")
  right.set(xlabel="zeros (%)", ylabel="entropy (bits a weight)", ylim=(0, 1.7))
  right.legend(frameon=False, loc="lower left")
  save(figure, path)
