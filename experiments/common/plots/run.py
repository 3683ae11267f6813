"""The pictures of a run: curves, histograms of latents, sparsity by layer."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib import colormaps

from experiments.common import cli, log
from experiments.common.plots.figure import (
  ACCENT,
  FLOAT,
  TERNARY,
  make_panels,
  save,
)
from tern_jax import load_packed, metrics
from tern_jax.checkpoint import Place
from tern_jax.core.paths import matches_any

CODES = {-1: "#56B4E9", 0: "#999999", 1: "#D55E00"}
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
  figure, axes = make_panels(3, width=3.6, height=3.0)
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
  save(figure, path)


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
  figure, axes = make_panels(3, 2, width=3.4, height=2.3, sharex=True)
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
  save(figure, path)


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
  figure, axes = make_panels(
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
  save(figure, path)


def layers(result: dict[str, Any], path: Place) -> None:
  """Draws the sparsity of each layer: reached, asked and predicted.

  Args:
    result: what result.json holds.
    path: PNG to write.
  """
  shares = result["layers"]
  names, rows = list(shares), np.arange(len(shares))
  figure, (axis,) = make_panels(1, width=6.4, height=1.6 + 0.4 * len(shares))
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
  save(figure, path)
