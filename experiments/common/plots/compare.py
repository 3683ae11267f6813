"""Pictures that set methods, or layouts of devices, side by side."""

import re
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import ticker

from experiments.common.plots.figure import (
  ACCENT,
  FLOAT,
  TERNARY,
  make_panels,
  save,
)
from tern_jax.checkpoint import Place

#: Of what a row of a benchmark is called by its first word; others are gray.
FAMILIES = {
  "float": FLOAT,
  "SCA": TERNARY,
  "TWN": "#009E73",
  "TTQ": "#CC79A7",
  "TGA": "#E69F00",
  "EC2T": "#56B4E9",
  "AbsMean": "#222222",
}
#: Of the first, second, ... row of a family.
MARKERS, DASHES = "osD^v", ("-", "--", ":", "-.")


def accuracy_over_bits(
  panels: Mapping[str, Mapping[str, Sequence[tuple[float | None, float]]]],
  path: Place,
) -> None:
  """Draws what each method pays in accuracy for fewer bits.

  Args:
    panels: {title: {label: (bits a weight, accuracy in %) of each run}}, from
      top to bottom, a point of accuracy as long in each; what has no bits is
      a line. The last is ours; others have hollow markers and no legend.
    path: picture to write.
  """
  values = [
    [y for runs in p.values() for _, y in runs] for p in panels.values()
  ]
  spans = [max(ys) - min(ys) for ys in values]
  # A narrow range gets room for its labels.
  heights = [1.24 * max(span, 0.4 * max(spans) or 1) for span in spans]
  figure, axes = make_panels(
    1,
    len(panels),
    width=4.8,
    height=(2.5 + 1.3 * len(panels)) / len(panels),
    sharex=True,
    height_ratios=heights,
  )
  for axis, (title, points), ys, height in zip(
    axes, panels.items(), values, heights, strict=True
  ):
    axis.set_title(title, fontsize=9, loc="left")
    _draw_methods(axis, points, ours=axis is axes[-1])
    middle = (max(ys) + min(ys)) / 2
    axis.set_ylim(middle - height / 2, middle + height / 2)
  axes[-1].set_xlim(0, 1.68)
  axes[-1].set_xlabel("entropy (bits a weight)")
  figure.supylabel("test accuracy (%)", fontsize=10)
  figure.legend(
    frameon=False, loc="outside lower center", ncols=3, fontsize=8.5
  )
  save(figure, path)


def _draw_methods(
  axis: Any,
  points: Mapping[str, Sequence[tuple[float | None, float]]],
  ours: bool,
) -> None:
  """Draws a panel: a marker for each method, a line for each family."""
  lines: dict[str, list[tuple[float, float]]] = {}
  for label, runs in points.items():
    family, color = _family(label)
    text: dict[str, Any] = {
      "textcoords": "offset points",
      "fontsize": 7.5,
      "color": color,
    }
    y, spread = _mean_and_deviation([value for _, value in runs])
    bits = [value for value, _ in runs if value is not None]
    if not bits:
      style = "--" if family == "float" else ":"
      axis.axhline(y, color=color, linestyle=style, linewidth=1.3)
      left = ("axes fraction", "data")
      axis.annotate(label, (0, y), (4, 3), xycoords=left, **text)
      continue
    x, width = _mean_and_deviation(bits)
    line = lines.setdefault(family, [])
    axis.errorbar(
      x,
      y,
      spread or None,
      width or None,
      color=color,
      marker=MARKERS[len(line) % len(MARKERS)],
      markerfacecolor=None if ours else "white",
      markersize=6,
      linewidth=1.2,
      linestyle="none",
      label=label if ours else None,
    )
    if not ours:
      text["bbox"] = {"color": "white", "pad": 0.5}
      axis.annotate(label, (x, y), (0, -12), ha="center", **text)
    line.append((x, y))
  for family, line in lines.items():
    color = _family(family)[1]
    # Behind the markers.
    axis.plot(*np.transpose(sorted(line)), color=color, lw=0.8, zorder=1)


def accuracy_over_sparsity(
  methods: Mapping[str, Mapping[float, Sequence[float]]], path: Place
) -> None:
  """Draws mean and standard deviation of accuracies over the sparsity.

  Args:
    methods: {label: {share of zeros, below 1: accuracies of runs in %}}.
    path: picture to write.
  """
  figure, (axis,) = make_panels(1, width=4.8, height=3.9)
  families: list[str] = []
  for label, row in methods.items():
    family, color = _family(label)
    # Both axes by what is left, so that 98 % are as far from 95 % as they feel.
    kept = [100 * (1 - sparsity) for sparsity in row]
    mean, spread = zip(*map(_mean_and_deviation, row.values()), strict=True)
    error = np.maximum(100 - np.asarray(mean), 0.1)
    low = np.maximum(error - spread, 0.1)
    style = DASHES[families.count(family) % len(DASHES)]
    axis.fill_between(kept, low, error + spread, color=color, alpha=0.15, lw=0)
    axis.plot(
      kept, error, style, color=color, marker="o", markersize=4, label=label
    )
    families.append(family)
  axis.set(xscale="log", yscale="log")
  upper = (80, 90, 95, 98, 99, 99.5)
  for side, rest in (
    (axis.xaxis, (20, 50, 70)),
    (axis.yaxis, range(0, 80, 10)),
  ):
    low, high = side.get_view_interval()
    shown = [s for s in (*rest, *upper) if low < 100 - s < high]
    if len(shown) < 3:
      ticks = ticker.MaxNLocator(5).tick_values(100 - high, 100 - low)
      shown = [s for s in ticks if low < 100 - s < high]
    side.set_ticks([100 - s for s in shown], [f"{s:g}" for s in shown])
  axis.minorticks_off()
  axis.invert_xaxis()
  axis.invert_yaxis()
  axis.set(xlabel="zeros (%)", ylabel="test accuracy (%)")
  axis.legend(frameon=False, loc="lower left", fontsize=9)
  save(figure, path)


def step_times(times: Mapping[str, float], path: Place) -> None:
  """Draws the time of a step on several layouts of devices.

  Args:
    times: {layout: milliseconds}.
    path: PNG to write.
  """
  figure, (axis,) = make_panels(1, width=5.2, height=3.2)
  bars = axis.bar(list(times), list(times.values()), color=TERNARY, width=0.6)
  axis.bar_label(bars, fmt="%.0f", fontsize=9)
  axis.set(xlabel="processes x devices", ylabel="time of a step (ms)")
  axis.grid(visible=False, axis="x")
  save(figure, path)


def _family(label: str) -> tuple[str, str]:
  """Returns the first word of a label, and its color."""
  family = re.split(r"[ ,(-]", label)[0]
  return family, FAMILIES.get(family, ACCENT)


def _mean_and_deviation(values: Sequence[float]) -> tuple[float, float]:
  deviation = statistics.stdev(values) if len(values) > 1 else 0.0
  return statistics.fmean(values), deviation
