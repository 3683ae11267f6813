"""The end of a training: its ternary weights, after a look at what there is."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from tern_jax.core.checks import concrete
from tern_jax.core.containers import Ternary, TernParams
from tern_jax.core.paths import path_str
from tern_jax.core.selection import is_masked
from tern_jax.core.types import Arrays, PyTree, State
from tern_jax.targets.schedules import AcrossLayers, Ramp, at, target_of
from tern_jax.trees.invert import is_ternary
from tern_jax.trees.state import Dtypes, WrapState, find

if TYPE_CHECKING:
  from tern_jax.trees.transform import ParamTransform

#: Latents of a soft method have settled if all but this share of them are
#: within this distance of their code, in units of its magnitude.
_UNSETTLED, _NEAR = 0.05, 0.1


def finalize(
  tern: ParamTransform, trained: PyTree, rest: PyTree, early: bool
) -> PyTree:
  """Returns ternary weights; see `ParamTransform.finalize`."""
  params, state, dtypes = _parts(trained, rest)
  check_finite(params)
  state = {
    path: _at_the_end(path, target_of(tern.method.sparsity, path), own, early)
    for path, own in state.items()
  }
  params, state = tern.refresh(params, state)
  args = tern.selected(params.latent), params.scales, state
  made = tern.layers.discretize(*args)
  if tern.method.soft and not early:
    _check_settled(tern.layers.weights(*args), made)
  made = {
    path: _of_dtype(t, dtypes.of(path, t.dtype)) for path, t in made.items()
  }
  tree = _filled(tern.replaced(params.latent, made), rest)
  _check_finite(tree, "its magnitude does not fit this dtype, take a wider one")
  return tree


def check_finite(params: TernParams) -> None:
  """Raises a ValueError if a latent, scale or float leaf is NaN or infinite."""
  for tree in params.latent, params.scales:
    _check_finite(tree, "the training has diverged, go back to before that")


def _parts(trained: PyTree, rest: PyTree) -> tuple[TernParams, State, Dtypes]:
  """Returns parameters, state, and dtypes, of what `finalize` was given."""
  if isinstance(trained, TernParams):
    if not isinstance(rest, dict):
      raise TypeError(
        "finalize got TernParams, but not the state that is carried beside"
        f" them (it got {type(rest).__name__}): call finalize(params, state)."
      )
    return trained, rest, Dtypes()
  found = find(trained)
  if len(found) != 1:
    raise TypeError(
      f"finalize found {len(found) or 'no'} states of tern_jax.wrap in what it"
      f" got, {type(trained).__name__}: give the TernParams and the state of"
      " a training by hand, or one optimizer state of"
      " tern_jax.wrap(tx, tern).init(params)."
    )
  (own,) = found
  if concrete(own.strayed) and own.strayed > 0:
    _raise_strayed(own)
  params = own.params if own.average is None else own.average
  return params, own.state, own.dtypes


def _raise_strayed(own: WrapState) -> None:
  raise ValueError(
    f"At {own.strayed} of the looks in {own.count} updates the parameters given"
    " to tern_jax.wrap were not the ternary weights of its state, but something"
    " else that changes them: weight decay, averaging, Lookahead or"
    " schedule_free around tern_jax.wrap, or parameters of another run. Put"
    " such transforms inside, tern_jax.wrap(optax.chain(...), tern), averaging"
    " as ema=."
  )


def _filled(tree: PyTree, params: PyTree) -> PyTree:
  """Puts the script's parameters where a mask hid them from the optimizer."""
  hidden = [
    path_str(path)
    for path, leaf in jax.tree_util.tree_leaves_with_path(
      tree, is_leaf=is_masked
    )
    if is_masked(leaf)
  ]
  if not hidden:
    return tree
  if params is None:
    raise ValueError(
      f"The optimizer does not see {', '.join(hidden)}, as a mask hides them:"
      " give the script's parameters too, finalize(opt_state, params)."
    )
  return jax.tree.map(
    lambda x, p: p if is_masked(x) else x,
    *(tree, params),
    is_leaf=lambda x: is_masked(x) or is_ternary(x),
  )


def _at_the_end(path: str, target: Any, own: Arrays, early: bool) -> Arrays:
  """Returns the state of a leaf, at the end of its schedule."""
  if isinstance(target, AcrossLayers):
    target = target.sparsity
  if not callable(target) or "count" not in own:
    return own
  count = jnp.max(own["count"])
  on_ramp = isinstance(target, Ramp)
  # The end of another schedule is not known, its start is.
  last = math.ceil(target.until * target.steps - 1e-6) if on_ramp else 1
  if early:
    return {**own, "count": jnp.maximum(own["count"], last)} if on_ramp else own
  if concrete(count) and count < last:
    run = f" of {target.steps}" if on_ramp else ""
    goal = f", and for {target.sparsity:g} from {last} on" if on_ramp else ""
    raise ValueError(
      f"{path}: at step {count}{run} its schedule asks for"
      f" {float(at(target, count)):.3g} of zeros{goal}: call tern.after_step"
      " after each update, which counts the steps; or give early=True"
      f" {'to have them now' if on_ramp else 'if that is what you want'}."
    )
  return own


def _check_finite(tree: PyTree, hint: str) -> None:
  """Raises a ValueError if a floating leaf holds NaN or infinity."""
  leaves = {
    path_str(path): leaf
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    if concrete(leaf)
    and hasattr(leaf, "dtype")
    and jnp.issubdtype(leaf.dtype, jnp.floating)
  }
  for path, bad in _count_bad(leaves).items():
    if bad:
      raise ValueError(
        f"{path} holds {bad} NaN or infinite values of {leaves[path].size}:"
        f" {hint}."
      )


@jax.jit
def _count_bad(leaves: Arrays) -> Arrays:
  return {k: jnp.sum(~jnp.isfinite(x)) for k, x in leaves.items()}


def _check_settled(soft: Arrays, made: dict[str, Ternary]) -> None:
  """Raises a ValueError if soft weights are not yet near their codes."""
  for path, t in made.items():
    off = jnp.abs(soft[path] - t.dequantize()) > _NEAR * jnp.max(t.w_p)
    share = jnp.mean(off, dtype=jnp.float32)
    if concrete(share) and share > _UNSETTLED:
      raise ValueError(
        f"{path}: {float(share):.0%} of the weights are far from their codes,"
        " so that rounding would change the network: train on with"
        " wdr_transform, which moves them there, or give early=True."
      )


def _of_dtype(t: Ternary, dtype: DTypeLike) -> Ternary:
  """Returns ternary weights with magnitudes of a dtype."""
  return Ternary(t.codes, t.w_p.astype(dtype), t.w_n.astype(dtype))
