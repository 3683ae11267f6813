"""What every module asks of its arguments, and how objects print."""

import dataclasses
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from tern_jax.core.types import Array, Shaped


def concrete(x: object) -> bool:
  """Whether a value is known now, that is, not traced."""
  return not isinstance(x, jax.core.Tracer)


def check_range(
  name: str, value: object, low: float, high: float, hint: str
) -> None:
  """Raises a ValueError unless low <= value < high; traced values pass.

  None and callables pass, too; the hint says what to do instead.

  >>> check_range("alpha", 3.0, 0, 2, "use alpha=0.1")
  Traceback (most recent call last):
  ValueError: alpha must lie in [0, 2), got 3.0: use alpha=0.1.
  """
  if value is None or callable(value) or not concrete(value):
    return
  v = np.asarray(cast(ArrayLike, value), dtype=np.float64)
  if not bool(np.all((v >= low) & (v < high))):
    raise ValueError(
      f"{name} must lie in [{low:g}, {high:g}), got {value}: {hint}."
    )


def check_weights(path: str, w: Array | Shaped) -> None:
  """Raises unless a leaf is a floating array without NaN or infinity."""
  if not jnp.issubdtype(w.dtype, jnp.floating):
    raise TypeError(
      f"{path} is {w.dtype}, but only floating-point weights can be trained"
      " ternary: convert it, or exclude it in kernels(exclude=...)."
    )
  if isinstance(w, jax.core.Tracer | jax.ShapeDtypeStruct):
    return
  bad = int(jnp.sum(~jnp.isfinite(w)))
  if bad:
    raise ValueError(
      f"{path} holds {bad} NaN or infinite values of {w.size}: start from"
      " finite weights."
    )


def call_repr(obj: Any, name: str | None = None) -> str:
  """Returns the shortest call that makes a dataclass instance again.

  >>> @dataclasses.dataclass(repr=False)
  ... class Point:
  ...   x: int = 0
  ...   y: int = 0
  >>> call_repr(Point(y=3))
  'Point(y=3)'
  """

  def differs(field: dataclasses.Field) -> bool:
    value = getattr(obj, field.name)
    if field.default is dataclasses.MISSING:
      return True
    same_kind = type(value) is type(field.default)
    return not (same_kind and value == field.default)

  shown = [
    f"{f.name}={getattr(obj, f.name)!r}"
    for f in dataclasses.fields(obj)
    if f.init and differs(f)
  ]
  return f"{name or type(obj).__name__}({', '.join(shown)})"
