"""Whether what a method makes of initial weights can be trained."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from tern_jax.core.checks import concrete
from tern_jax.core.containers import TernParams
from tern_jax.core.types import Array, Arrays, PyTree, State

if TYPE_CHECKING:
  from tern_jax.trees.transform import ParamTransform


def checked_start(
  tern: ParamTransform, tree: PyTree, params: TernParams, state: State
) -> tuple[TernParams, State]:
  """Returns (params, state); a ValueError if they hold NaN or infinity.

  Those that are traced pass.
  """
  weights = tern.selected(tree)
  if not all(map(concrete, weights.values())):
    return params, state
  # What is of a usual size overflows in no method: no need to compute it all.
  weights = {k: w for k, w in weights.items() if not _is_usual(w)}
  latents = tern.selected(params.latent)
  latents = {path: latents[path] for path in weights}
  made = tern.layers.discretize(latents, params.scales, state)
  for path, ternary in made.items():
    arrays = {"latents": latents[path], **params.scales[path], **state[path]}
    arrays |= {"w_n": ternary.w_n, "w_p": ternary.w_p}
    bad = [k for k, finite in _are_finite(arrays).items() if not finite]
    if bad:
      w = weights[path]
      top = float(jnp.max(jnp.abs(w), initial=0))
      raise ValueError(
        f"{path}: {tern.method!r} makes {', '.join(sorted(bad))} infinite or"
        f" NaN: magnitudes of weights are up to {top:.4g}, and what is computed"
        f" of them overflows {w.dtype} or float32. Scale these weights down,"
        " take a wider dtype, or exclude this leaf in kernels(exclude=...)."
      )
  return params, state


def _is_usual(w: Array) -> bool:
  top, most = (
    float(jnp.max(jnp.abs(w), initial=0)),
    float(jnp.finfo(w.dtype).max),
  )
  return top == 0 or 1e-15 < top < min(1e15, most**0.5)


@jax.jit
def _are_finite(arrays: Arrays) -> Arrays:
  return {k: jnp.all(jnp.isfinite(x)) for k, x in arrays.items()}
