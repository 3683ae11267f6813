"""How containers print: on one line, whatever `jax.tree.map` put into them."""

import math
import reprlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tern_jax.core.types import PyTree


def weights_repr(
  name: str,
  shape: tuple[int, ...],
  arrays: Mapping[str, Any],
  count: Callable[[np.ndarray], Any] | None,
) -> str:
  """Returns a line about ternary weights.

  Values are read where there are any, not of tracers or shapes.

  Args:
    name: of the container.
    shape: of the weights.
    arrays: codes or planes and scales, by name. The first of them tells which
      weights are not zero.
    count: returns the number of these; None: do not count them.

  >>> arrays = {"codes": np.ones((2, 2), np.int8), "w_p": np.ones((1, 2))}
  >>> arrays["w_n"] = np.array(0.5)
  >>> weights_repr("Ternary", (2, 2), arrays, np.count_nonzero)
  'Ternary(float64[2, 2], sparsity=0, w_p=float64[1, 2], w_n=0.5)'
  """
  if not all(map(_is_shaped, arrays.values())):
    shown = [f"{field}={_short(x)}" for field, x in arrays.items()]
    return f"{name}({', '.join(shown)})"
  stored = next(iter(arrays.values()))
  shown = [f"{arrays['w_p'].dtype}{list(shape)}"]
  if count and 0 not in shape and _is_known(stored, jnp.integer):
    nonzero = int(count(np.asarray(stored)))
    shown.append(f"sparsity={1 - nonzero / math.prod(shape):.4g}")
  shown += (f"{field}={_scale_str(arrays[field])}" for field in ("w_p", "w_n"))
  return f"{name}({', '.join(shown)})"


def tree_str(tree: PyTree) -> str:
  """Returns how many values a tree has, or what else it is.

  >>> tree_str({"a": np.ones((2, 3)), "b": np.ones(1)}), tree_str("latent")
  ('<2 arrays, 7 values>', "'latent'")
  """
  sizes = [math.prod(x.shape) for x in jax.tree.leaves(tree) if _is_shaped(x)]
  if not sizes:
    return _short(tree)
  arrays = "1 array" if len(sizes) == 1 else f"{len(sizes)} arrays"
  return f"<{arrays}, {sum(sizes):,} values>"


def _scale_str(scale: Any) -> str:
  if not scale.shape and _is_known(scale, jnp.floating):
    return f"{float(scale):.4g}"
  return f"{scale.dtype}{list(scale.shape)}"


def _short(x: object) -> str:
  return " ".join(reprlib.repr(x).split())


def _is_shaped(x: object) -> bool:
  return isinstance(getattr(x, "shape", None), tuple) and hasattr(x, "dtype")


def _is_known(x: Any, kind: type) -> bool:
  """Whether an array's values are of a kind, and can be read here and now."""
  if not jnp.issubdtype(x.dtype, kind) or isinstance(x, jax.core.Tracer):
    return False
  if isinstance(x, jax.Array):
    return x.is_fully_addressable and not x.is_deleted()
  return isinstance(x, np.ndarray | np.generic)
