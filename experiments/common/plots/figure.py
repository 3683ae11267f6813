"""What all pictures share: colors, panels, and files."""

import io
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from experiments.common import files
from tern_jax.checkpoint import Place

# Okabe and Ito's colors, told apart by all eyes.
FLOAT, TERNARY, ACCENT = "#0072B2", "#D55E00", "#666666"


def make_panels(
  columns: int, rows: int = 1, *, width: float, height: float, **kwargs: Any
) -> tuple[Figure, list[Any]]:
  """Makes panels of the given size in inches, without pyplot's global state."""
  figure = Figure(
    figsize=(width * columns, height * rows), layout="constrained"
  )
  grid = figure.subplots(rows, columns, squeeze=False, **kwargs)
  axes = list(grid.ravel())
  for axis in axes:
    axis.spines[["top", "right"]].set_visible(False)
    axis.set_axisbelow(True)
    axis.grid(color="#E5E5E5", linewidth=0.7)
  return figure, axes


def save(figure: Figure, path: Place) -> None:
  """Writes a picture in the format that its name ends with."""
  FigureCanvasAgg(figure)
  content = io.BytesIO()
  figure.savefig(content, format=path.suffix[1:], dpi=120)
  files.write(path, content.getvalue())
