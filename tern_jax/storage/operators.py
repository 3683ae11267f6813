"""`x @ w` and `w @ y` of packed weights.

How they multiply is the matter of `inference`, which storage never imports: it
defines the operators when `tern_jax` is imported.
"""

from collections.abc import Callable
from typing import Any

from tern_jax.core.types import Array

_OPERATORS: dict[str, Callable[[Any, Any], Array]] = {}


def define(**operators: Callable[[Any, Any], Array]) -> None:
  """Sets `matmul` and `rmatmul`, functions of the weights and the array."""
  _OPERATORS.update(operators)


class Matrix:
  """Weights that stand on either side of @."""

  # NumPy's arrays leave products to this class.
  __array_ufunc__ = None

  def __matmul__(self, y: Any) -> Array:
    """Returns the product with the array on the right."""
    return _OPERATORS["matmul"](self, y)

  def __rmatmul__(self, x: Any) -> Array:
    """Returns the product of the array on the left and these."""
    return _OPERATORS["rmatmul"](self, x)
