"""The pictures of a run: curves, histograms of latents, sparsity by layer.

And those that set runs side by side: of sweeps, and of whole benchmarks.
"""

import functools
import re
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib import colormaps, ticker
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from experiments.common import cli, log
from tern_jax import metrics
from tern_jax.checkpoint import Place, load_packed
from tern_jax.core.paths import matches_any

# Okabe and Ito's colors, told apart by all eyes.
FLOAT, TERNARY, ACCENT = "#0072B2", "#D55E00", "#666666"
CODES = {-1: "#56B4E9", 0: "#999999", 1: "#D55E00"}
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
#: First layer dark, last layer light, and how many have a name in a legend.
DEPTH = colormaps["viridis"]
MOST_NAMED = 4


def draw(
  config: cli.Config, result: dict[str, Any], snapshots: Sequence[int]
) -> None:
  """Draws the pictures of a run into its directory.

  Args:
    config: of the run.
    result: what result.json holds.
    snapshots: steps whose latents were kept.
  """
  workdir, label = config.directory, config.method.axis_label

  def weights_at(step: int) -> dict[str, np.ndarray]:
    latents = log.load_latents(workdir, step).items()
    return {
      path: np.asarray(shown(config, path, jnp.asarray(latent)))
      for path, latent in latents
    }

  weights = {f"step {step:,}": weights_at(step) for step in snapshots}
  packed = load_packed(workdir / "packed")["params"]
  codes = {
    path: np.asarray(leaf.codes)
    for path, leaf in metrics.ternary_leaves(packed).items()
  }
  records = [
    *log.read_metrics(config.float_directory),
    *log.read_metrics(workdir),
  ]
  curves(records, workdir / "curves.png")
  diagnostics(records, list(codes), label, workdir / "diagnostics.png")
  histograms(weights, codes, label, workdir / "histograms.png")
  layers(result, workdir / "layers.png")


def shown(config: cli.Config, path: str, latent: jax.Array) -> jax.Array:
  """Returns latents of a layer in the unit of their codes.

  Args:
    config: of the run.
    path: of the layer, or of a stack of layers.
    latent: its latents.
  """
  # Each layer of a stack has scales of its own.
  stacked = matches_any(config.stacked, path)
  unit = functools.partial(config.method.shown, path)
  return (jax.vmap(unit) if stacked else unit)(latent)


def curves(records: Sequence[dict[str, Any]], path: Place) -> None:
  """Draws loss, validation accuracy and sparsity over the steps.

  Args:
    records: lines of metrics.jsonl.
    path: PNG to write.
  """
  figure, axes = _figure(3, width=3.6, height=3.0)
  panels = (
    ("loss", "training loss", 1, "log"),
    ("validation_accuracy", "validation accuracy (%)", 100, "linear"),
    ("sparsity", "zeros among ternary weights (%)", 100, "linear"),
  )
  for axis, (key, label, factor, scale) in zip(axes, panels, strict=True):
    for phase, color in (("float", FLOAT), ("ternary", TERNARY)):
      points = [r for r in records if r["phase"] == phase and key in r]
      axis.plot(
        [r["step"] for r in points],
        [factor * r[key] for r in points],
        color=color,
        label=phase if points else None,
        linewidth=1.8,
      )
    axis.set(xlabel="step", ylabel=label, yscale=scale)
  axes[1].legend(frameon=False, loc="lower right")
  axes[2].set_ylim(0, 100)
  _save(figure, path)


def diagnostics(
  records: Sequence[dict[str, Any]],
  layers: Sequence[str],
  label: str,
  path: Place,
) -> None:
  """Draws how the weights of each layer come to their codes.

  Args:
    records: lines of metrics.jsonl.
    layers: paths, first to last, by which lines are colored.
    label: the unit of weights.
    path: PNG to write.
  """
  figure, axes = _figure(3, 2, width=3.4, height=2.3, sharex=True)
  panels = (
    ("sparsity", "zeros", "%", 100),
    ("flip_rate", "codes changed since the last look", "%", 100),
    ("entropy", "entropy", "bits a weight", 1),
    ("converged", "weights within .05 of their code", "%", 100),
    ("zeros_rms", "root mean square of the zeros", label, 1),
    ("barrier", "barrier: the largest zero", label, 1),
  )
  # The lightest shades are hard to see on white.
  shades = DEPTH(np.linspace(0, 0.85, len(layers)))
  named = layers if len(layers) <= MOST_NAMED else (layers[0], layers[-1])
  for axis, (key, title, unit, factor) in zip(axes, panels, strict=True):
    for layer, color in zip(layers, shades, strict=True):
      points = [r for r in records if f"{key}/{layer}" in r]
      axis.plot(
        [r["step"] for r in points],
        [factor * r[f"{key}/{layer}"] for r in points],
        color=color,
        label=layer if layer in named else None,
        linewidth=1.5,
      )
    axis.set_title(title, fontsize=9)
    axis.set_ylabel(unit, fontsize=9)
    axis.set_ylim(bottom=0)
  for axis in axes[3:]:
    axis.set_xlabel("step")
  handles, names = axes[0].get_legend_handles_labels()
  figure.legend(
    handles, names, frameon=False, loc="outside upper right", ncols=4
  )
  _save(figure, path)


def histograms(
  snapshots: dict[str, dict[str, np.ndarray]],
  codes: dict[str, np.ndarray],
  label: str,
  path: Place,
) -> None:
  """Draws how the weights of each layer come to -1, 0 and 1.

  Args:
    snapshots: {title: {layer: weights}}, in the order of time.
    codes: {layer: final codes}, by which weights are colored throughout.
    label: what is shown, under the lowest row.
    path: PNG to write.
  """
  titles = list(snapshots)
  layers = list(snapshots[titles[0]])
  figure, axes = _figure(
    len(snapshots), len(layers), width=3.0, height=1.7, sharex=True
  )
  # Latents in units of their scale reach beyond the codes; tanh does not.
  largest = max(np.abs(w).max() for w in snapshots[titles[-1]].values())
  limit = 1.05 if largest <= 1 else 2.5
  edges = np.linspace(-limit, limit, 64)
  for column, (title, weights) in enumerate(snapshots.items()):
    for row, layer in enumerate(layers):
      axis = axes[row * len(snapshots) + column]
      values = np.clip(weights[layer], edges[0], edges[-1])
      share = 100 / values.size
      groups = [values[codes[layer] == code] for code in CODES]
      axis.hist(
        groups,
        edges,
        weights=[np.full(group.size, share) for group in groups],
        color=list(CODES.values()),
        label=[f"ends as {code}" for code in CODES],
        stacked=True,
      )
      for code in (-1, 0, 1):
        axis.axvline(code, color=ACCENT, linewidth=0.8, linestyle=":")
      axis.set_xticks([-1, 0, 1])
      if row == 0:
        axis.set_title(title, fontsize=10)
      if row == len(layers) - 1:
        axis.set_xlabel(label)
      if column == 0:
        axis.set_ylabel(f"{layer}\n% of weights", fontsize=8)
  handles, names = axes[0].get_legend_handles_labels()
  figure.legend(
    handles, names, frameon=False, loc="outside upper right", ncols=3
  )
  _save(figure, path)


def layers(result: dict[str, Any], path: Place) -> None:
  """Draws the sparsity of each layer: reached, asked and predicted.

  Args:
    result: what result.json holds.
    path: PNG to write.
  """
  shares = result["layers"]
  names, rows = list(shares), np.arange(len(shares))
  figure, (axis,) = _figure(1, width=6.4, height=1.6 + 0.4 * len(shares))
  reached = [100 * shares[name]["reached"] for name in names]
  axis.barh(rows, reached, height=0.55, color=TERNARY, label="reached")
  for row, value in zip(rows, reached, strict=True):
    inside = {"va": "center", "color": "white", "weight": "bold"}
    axis.text(1, row, f"{value:.2f}", **inside)
  for key, color, marker in (("asked", FLOAT, "|"), ("predicted", "k", "x")):
    values = [shares[name][key] for name in names]
    if None not in values:
      axis.plot(
        [100 * value for value in values],
        rows,
        marker,
        color=color,
        markersize=18 if marker == "|" else 7,
        markeredgewidth=2,
        label=key,
      )
  axis.set_yticks(rows, names)
  axis.invert_yaxis()
  axis.set(xlim=(0, 100), xlabel="zeros (%)")
  figure.legend(frameon=False, loc="outside upper right", ncols=3)
  _save(figure, path)


def sweep_sparsity(
  rows: Sequence[dict[str, float]], by: str, path: Place
) -> None:
  """Draws predicted and measured sparsity over what was swept.

  Args:
    rows: of a sweep, one a run.
    by: name of what was swept.
    path: PNG to write.
  """
  figure, (left, right) = _figure(2, width=4.2, height=3.4)
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
  _save(figure, path)


def sweep_accuracy(rows: Sequence[dict[str, float]], path: Place) -> None:
  """Draws accuracy before and after rounding, and bits, over the zeros.

  Args:
    rows: of a sweep, one a run.
    path: PNG to write.
  """
  figure, (left, right) = _figure(2, width=4.2, height=3.4)
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
  _save(figure, path)


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
  figure, axes = _figure(
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
    ours = axis is axes[-1]
    lines: dict[str, list[tuple[float, float]]] = {}
    axis.set_title(title, fontsize=9, loc="left")
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
    middle = (max(ys) + min(ys)) / 2
    axis.set_ylim(middle - height / 2, middle + height / 2)
  axes[-1].set_xlim(0, 1.68)
  axes[-1].set_xlabel("entropy (bits a weight)")
  figure.supylabel("test accuracy (%)", fontsize=10)
  figure.legend(
    frameon=False, loc="outside lower center", ncols=3, fontsize=8.5
  )
  _save(figure, path)


def accuracy_over_sparsity(
  methods: Mapping[str, Mapping[float, Sequence[float]]], path: Place
) -> None:
  """Draws mean and standard deviation of accuracies over the sparsity.

  Args:
    methods: {label: {share of zeros, below 1: accuracies of runs in %}}.
    path: picture to write.
  """
  figure, (axis,) = _figure(1, width=4.8, height=3.9)
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
  _save(figure, path)


def step_times(times: Mapping[str, float], path: Place) -> None:
  """Draws the time of a step on several layouts of devices.

  Args:
    times: {layout: milliseconds}.
    path: PNG to write.
  """
  figure, (axis,) = _figure(1, width=5.2, height=3.2)
  bars = axis.bar(list(times), list(times.values()), color=TERNARY, width=0.6)
  axis.bar_label(bars, fmt="%.0f", fontsize=9)
  axis.set(xlabel="processes x devices", ylabel="time of a step (ms)")
  axis.grid(visible=False, axis="x")
  _save(figure, path)


def _family(label: str) -> tuple[str, str]:
  """Returns the first word of a label, and its color."""
  family = re.split(r"[ ,-]", label)[0]
  return family, FAMILIES.get(family, ACCENT)


def _mean_and_deviation(values: Sequence[float]) -> tuple[float, float]:
  deviation = statistics.stdev(values) if len(values) > 1 else 0.0
  return statistics.fmean(values), deviation


def _figure(
  columns: int, rows: int = 1, *, width: float, height: float, **kwargs: Any
) -> tuple[Figure, list[Any]]:
  """Makes panels of the given size in inches, without pyplot's global state."""
  figure = Figure(
    figsize=(width * columns, height * rows), layout="constrained"
  )
  grid = figure.subplots(rows, columns, squeeze=False, **kwargs)
  panels = list(grid.ravel())
  for axis in panels:
    axis.spines[["top", "right"]].set_visible(False)
    axis.set_axisbelow(True)
    axis.grid(color="#E5E5E5", linewidth=0.7)
  return figure, panels


def _save(figure: Figure, path: Place) -> None:
  FigureCanvasAgg(figure)
  with path.open("wb") as file:
    figure.savefig(file, format=path.suffix[1:], dpi=120)
