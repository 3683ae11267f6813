"""`wrap`: an optax transformation that makes any training script ternary."""

import dataclasses
from collections.abc import Collection
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax

from tern_jax.core.checks import check_range
from tern_jax.core.containers import TernParams
from tern_jax.core.numerics import either, widen
from tern_jax.core.paths import path_str
from tern_jax.core.types import Array, Arrays, KeyPath, PyTree
from tern_jax.trees.state import Dtypes, WrapState
from tern_jax.trees.transform import ParamTransform

#: Updates between two looks at the parameters that the script holds.
_EVERY = 10
#: By how many units in the last place of the largest they may be off.
_ULPS = 16
#: What line searches and SAM hand on: functions of the script's parameters.
_FUNCTIONS = "value_fn", "grad_fn"


class Wrapped(optax.GradientTransformationExtraArgs):
  """What `wrap` returns: an optax transformation that knows its `tern`."""

  @property
  def tern(self) -> ParamTransform:
    """Which leaves are ternary, and how."""
    return cast(Any, self.init).__self__.tern


def wrap(
  tx: optax.GradientTransformation,
  tern: ParamTransform,
  wdr: optax.GradientTransformation | None = None,
  *,
  ema: float | None = None,
) -> Wrapped:
  """Makes a training script ternary by its optimizer alone.

  The latents, their scales and the method's state live in the optimizer's
  state; the parameters that the script holds are the ternary weights. An update
  takes the gradient g at those, pulls it back through the ternarizer,
  `(d tern / d params)^T g`, has WDR and the wrapped optimizer update latents
  and scales, calls `after_step`, and returns new weights minus old ones.

      tern, wdr = tern_jax.recipe(0.8, steps)
      tx = tern_jax.wrap(optax.adam(schedule), tern, wdr)
      ...  # the script as it is
      packed = tern_jax.pack(tern.finalize(opt_state))

  Weights are float in the first forward, which comes before the first update;
  `tern(s.params, s.state)` of `s = tx.init(params)` are those to start from
  otherwise. What changes the parameters around it (weight decay, averaging,
  Lookahead, schedule_free) is overwritten at the next update, and `finalize`
  says so: put such transforms inside. SAM goes around, in its opaque mode.
  Weights whose sign flips in an update may be off by a unit in the last place
  until the next one.

  Args:
    tx: the script's optimizer. It sees `TernParams`: a tree of labels or masks
      is `TernParams(latent=labels, scales=label)` there, and stays as it is
      around `wrap`.
    tern: which leaves are ternary, and how.
    wdr: the regularizer of latents, before tx, as `recipe` returns it.
    ema: decay in (0, 1) of a moving average of latents and scales, and of all
      other leaves, from which `finalize` takes the weights then; after n
      updates at most `(1 + n) / (10 + n)`.

  Returns:
    An optax transformation, with tern as an attribute. Its state, a
    `WrapState`, has one more copy of the parameters. Latents of less than 32
    bits are float32, whatever the script has.

  Raises:
    TypeError: tern is no `ParamTransform`; or, by `update`, a line search or
      SAM is inside, which need a loss of the latents.
    ValueError: ema out of range; or, by `update`, no parameters are given, or a
      selected leaf has no gradient.

  >>> import tern_jax
  >>> tern = ParamTransform(tern_jax.TWN(sparsity=0.5))
  >>> tx = wrap(optax.sgd(0.1), tern)
  >>> params = {"kernel": jnp.array([[0.1, -0.2], [0.3, -0.4]])}
  >>> state = tx.init(params)
  >>> grads = {"kernel": jnp.zeros((2, 2))}
  >>> updates, state = tx.update(grads, state, params)
  >>> optax.apply_updates(params, updates)["kernel"] > 0
  Array([[False, False],
         [ True, False]], dtype=bool)
  >>> tern.finalize(state)["kernel"].codes.tolist()
  [[0, 0], [1, -1]]
  """
  if not isinstance(tern, ParamTransform):
    raise TypeError(
      f"wrap got {type(tern).__name__} as tern, but needs a ParamTransform:"
      " tern_jax.wrap(tx, tern, wdr) with tern, wdr = tern_jax.recipe(0.8,"
      " steps), for example."
    )
  check_range("ema", ema, 1e-9, 1, "try 0.999")
  inner = optax.with_extra_args_support(
    tx if wdr is None else optax.chain(wdr, tx)
  )
  made: Any = _Wrap(inner, tern, ema)
  return Wrapped(made.init, made.update)


@dataclasses.dataclass(frozen=True)
class _Wrap:
  """The two functions of the transformation; see `wrap`."""

  inner: optax.GradientTransformationExtraArgs
  tern: ParamTransform
  ema: float | None

  def init(self, params: PyTree) -> WrapState:
    """Returns the state at the script's initial parameters."""
    wide, dtypes = _widened(self.tern, params)
    made, of_method = self.tern.init(wide)
    # A step that donates the parameters and this state must not give any buffer
    # away twice.
    trained = _copied(made)
    return WrapState(
      jnp.zeros((), jnp.int32),
      trained,
      of_method,
      _inner_state(self.inner, trained),
      None if self.ema is None else _copied(trained),
      jnp.zeros((), jnp.int32),
      dtypes,
    )

  def update(
    self,
    updates: PyTree,
    state: WrapState,
    params: PyTree | None = None,
    **extra: Any,
  ) -> tuple[PyTree, WrapState]:
    """Returns new weights minus the script's, and the new state."""
    _check_update(params, extra)
    tern = self.tern
    old = state.params.replace(
      latent=_with_latents(tern, state.params.latent, params)
    )
    grads: Any = _pulled(tern, old, state, updates)
    updated = self.inner.update(grads, state.inner, cast(Any, old), **extra)
    moved, of_inner = cast(Any, updated)
    # What is kept and what the script makes of it are of one rounding: programs
    # may compute a sum twice, and not to the same last bit.
    moved = moved.replace(latent=_rounded(moved.latent, state.state))
    new, of_method = jax.lax.optimization_barrier(
      tern.after_step(_moved(old, moved), state.state)
    )
    weights = tern.layers.weights(
      tern.selected(new.latent), new.scales, of_method
    )
    changes = _changes(weights, _at(weights, params))
    return tern.replaced(moved.latent, changes), WrapState(
      jnp.asarray(optax.safe_increment(state.count)),
      new,
      of_method,
      of_inner,
      self._averaged(new, state),
      _strayed(tern, state, params),
      state.dtypes,
    )

  def _averaged(self, new: TernParams, state: WrapState) -> TernParams | None:
    if self.ema is None:
      return None
    n = state.count.astype(jnp.float32)
    rate = 1 - jnp.minimum(self.ema, (1 + n) / (10 + n))
    now, average = cast(Any, new), cast(Any, state.average)
    return cast(Any, optax.incremental_update(now, average, rate))


def _inner_state(tx: Any, trained: TernParams) -> PyTree:
  try:
    return tx.init(trained)
  except ValueError as error:
    if TernParams.__name__ not in str(error):
      raise
    raise ValueError(
      "A tree of labels or masks inside tern_jax.wrap does not fit what it is"
      " for: TernParams. Give TernParams(latent=tree, scales=label or mask), or"
      " put the transform that has it around tern_jax.wrap."
    ) from error


def _check_update(params: PyTree, extra: dict[str, Any]) -> None:
  if params is None:
    raise ValueError(
      "tern_jax.wrap got no parameters, and it returns what makes them ternary:"
      " call tx.update(grads, opt_state, params)."
    )
  if given := [name for name in _FUNCTIONS if extra.get(name) is not None]:
    raise TypeError(
      f"tern_jax.wrap got {given[0]}=: line searches, L-BFGS and SAM follow the"
      " loss as a function of what they update, but those are latents here, on"
      " which a ternary network depends in steps. Take a first-order optimizer."
    )


def _widened(tern: ParamTransform, params: PyTree) -> tuple[PyTree, Dtypes]:
  """Returns parameters to train, and the dtypes of those that are wider now."""
  held = []

  def leaf(path: str, w: Array) -> Array:
    if not jnp.issubdtype(w.dtype, jnp.floating) or w.dtype.itemsize >= 4:
      return w
    held.append((path, str(w.dtype)))
    return widen(w)

  return tern.map(leaf, params), Dtypes(tuple(held))


def _copied(tree: Any) -> Any:
  arrays = jax.Array, np.ndarray
  return jax.tree.map(
    lambda x: jnp.array(x) if isinstance(x, arrays) else x, tree
  )


def _with_latents(
  tern: ParamTransform, latent: PyTree, params: PyTree
) -> PyTree:
  """Returns the script's parameters, but latents at the selected leaves.

  What is not ternary is the script's own, whatever it does to it. The structure
  is that of the latents: parameters may hold more, such as functions.
  """
  chosen = tern.where.chosen(latent)

  def leaf(path: KeyPath, w: Array | None, p: Array) -> Array | None:
    return w if w is None or path_str(path) in chosen else p

  return jax.tree_util.tree_map_with_path(
    leaf, latent, params, is_leaf=lambda x: x is None
  )


def _pulled(
  tern: ParamTransform, old: TernParams, state: WrapState, grads: PyTree
) -> TernParams:
  """Returns gradients of latents and scales, from those of the weights."""
  leaves = tern.selected(old.latent)
  given = _at(leaves, grads)
  if missing := sorted(leaves.keys() - given.keys()):
    raise ValueError(
      f"{missing[0]} has no gradient, but is to be ternary: leave it out, as in"
      " tern_jax.kernels(exclude=...), or differentiate the loss by it."
    )

  def weights(leaves: Arrays, scales: PyTree) -> Arrays:
    return tern.layers.weights(leaves, scales, state.state)

  _, pull = jax.vjp(weights, leaves, old.scales)
  of_leaves, of_scales = pull(
    {path: given[path].astype(w.dtype) for path, w in leaves.items()}
  )
  return TernParams(latent=tern.replaced(grads, of_leaves), scales=of_scales)


def _moved(old: Any, by: Any) -> Any:
  """Returns updated parameters; what has no update stays."""

  def leaf(p: Array | None, u: Array | None) -> Array | None:
    return p if p is None or u is None else (p + u).astype(p.dtype)

  return jax.tree.map(leaf, old, by, is_leaf=lambda x: x is None)


def _rounded(updates: PyTree, weights: Collection[str]) -> PyTree:
  """Has updates computed once, which the script adds by itself."""

  def leaf(path: KeyPath, u: Array) -> Array:
    own = path_str(path) not in weights
    return jax.lax.optimization_barrier(u) if own else u

  return jax.tree_util.tree_map_with_path(leaf, updates)


def _at(paths: Collection[str], tree: PyTree) -> Arrays:
  """Returns the leaves of a tree at some paths, as far as they are there."""
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  named = ((path_str(path), leaf) for path, leaf in leaves)
  return {path: leaf for path, leaf in named if path in paths}


def _changes(weights: Arrays, held: Arrays) -> Arrays:
  """Returns what makes the parameters that the script holds these weights."""

  def change(w: Array, p: Array) -> Array:
    # Both exactly as the script has them; rounded once.
    wide = w.astype(p.dtype).astype(w.dtype) - p.astype(w.dtype)
    return wide.astype(p.dtype)

  return {path: change(w, held[path]) for path, w in weights.items()}


def _strayed(tern: ParamTransform, state: WrapState, params: PyTree) -> Array:
  """Counts the looks at which the script's weights are not those given it.

  The smallest leaf tells: what goes around an optimizer changes all of them,
  and a look at all would cost a tenth of a step.
  """
  latent = tern.selected(state.params.latent)
  held = _at(latent, params)
  path = min(
    latent, key=lambda path: (latent[path].size == 0, latent[path].size)
  )

  def look() -> Array:
    weights = tern.layers.weights(
      {path: latent[path]}, state.params.scales, state.state
    )
    off = _is_off(held[path], weights[path])
    return state.strayed + off.astype(jnp.int32)

  # The parameters of the first update are the script's initial ones.
  return either(state.count % _EVERY == 1, look, lambda: state.strayed)


def _is_off(p: Array, w: Array) -> Array:
  if not w.size:
    return jnp.zeros((), bool)
  ulp = jnp.asarray(float(jnp.finfo(p.dtype).eps), w.dtype)
  off = jnp.max(jnp.abs(p.astype(w.dtype) - w))
  return off > _ULPS * ulp * jnp.max(jnp.abs(w))
