"""The optax transform that adds the gradient of WDR to any chain."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from tern_jax.core.interop import serializable
from tern_jax.core.numerics import widen
from tern_jax.core.paths import check_patterns, lift, path_str
from tern_jax.core.selection import every_path
from tern_jax.core.types import Array, KeyPath, PyTree, Scalar, Schedule
from tern_jax.regularizers.barriers import Barrier, barrier_of
from tern_jax.regularizers.churn import Churn
from tern_jax.regularizers.formulas import check_floating, wdr_grad
from tern_jax.regularizers.strengths import Strength, strength_of
from tern_jax.targets.schedules import Target, look_at

#: A tree of bools, or a function from parameters to one.
Where = PyTree | Callable[[PyTree], PyTree]


@serializable
class WdrState(NamedTuple):
  """State of `wdr_transform`."""

  count: Array
  """Updates done."""
  threshold: PyTree
  """Of each leaf, where alpha is `at_sparsity`."""
  nonzero: PyTree
  """Bits: which weights were beyond the barrier 1 % of the steps before
  the onset of a `late_kappa`, then at it."""
  share: Array
  """Of kappa that is used, by how many of them changed in between."""


def wdr_transform(
  alpha: Barrier | Scalar | Schedule,
  strength: Strength | Scalar | Schedule,
  where: Where | None = None,
  stacked: Sequence[str] = (),
  sharp: bool = False,
  *,
  mask: Where | None = None,
) -> optax.GradientTransformation:
  """Adds the gradient of WDR to the updates, for any optax chain.

  Each leaf's update u becomes `u + strength * dR/dTheta`. Placed before Adam
  it is the loss term `loss + strength * R` (coupled); placed after Adam, and
  before the learning rate, it acts undisturbed by Adam's normalization
  (decoupled), as `optax.add_decayed_weights` does. With `relative(kappa)` the
  place matters too: kappa is measured against the update that arrives.

  Args:
    alpha: a number or traced array in [0, 2); a schedule; or `at_sparsity(s)`.
    strength: the paper's lambda >= 0 as a number, traced array or schedule;
      or `relative(kappa)`.
    where: a tree of bools or a function from parameters to one; None takes
      every leaf, biases too, so that most uses want `tern_jax.kernels()`.
    stacked: patterns of leaves whose first axis enumerates layers (as made by
      `nn.scan`): `relative` and `at_sparsity` then see each layer alone.
    sharp: whether the barrier is a kink, as a hard forward wants it.
    mask: the same as where, by the name that optax has for it.

  Returns:
    An `optax.GradientTransformation`. Updates keep their dtype; None updates
    stay None. `optax.flatten` joins all leaves into one, hence per-leaf
    statistics become global. Under `optax.inject_hyperparams`, name a
    callable mask in `static_args`.

  Raises:
    ValueError: alpha or strength out of range; both where and mask; `update`
      without `params`.
    TypeError: a selected parameter is not floating-point.

  >>> tx = optax.chain(wdr_transform(alpha=0.5, strength=0.1), optax.sgd(1.0))
  >>> params = {"w": jnp.array([0.1, 2.0])}
  >>> updates, _ = tx.update({"w": jnp.zeros(2)}, tx.init(params), params)
  >>> [round(float(u), 5) for u in updates["w"]]  # to 0, and away from it
  [-0.00948, 0.01851]

  Source: Deng & Zhang, arXiv 2011.00580. Differs from the paper: the gradient
  is added to the update instead of the loss, which is the same before the
  first transform of a chain; `relative`, `at_sparsity` and the sharp form are
  not in it.
  """
  where = _one_of(where, mask)
  barrier, force = barrier_of(alpha), strength_of(strength)
  gain, churn = barrier.gain, Churn(force, barrier.gain, stacked)

  def init(params: PyTree) -> WdrState:
    # Among the stacked layers may be norms, which a mask hides.
    check_patterns(stacked, sorted(every_path(params)))
    count = jnp.zeros((), jnp.int32)
    threshold = barrier.init(params, stacked)
    nonzero = churn.init(params, barrier.alphas(threshold, params, count))
    return WdrState(count, threshold, nonzero, jnp.ones((), jnp.float32))

  def update(
    updates: PyTree, state: PyTree, params: PyTree | None = None
  ) -> tuple[PyTree, WdrState]:
    if params is None:
      raise ValueError(
        "wdr_transform got no parameters, and WDR is a function of them:"
        " call tx.update(grads, opt_state, params)."
      )
    count, threshold, nonzero, share = state
    on, sets_in = force.is_on(count), force.sets_in(count)
    now = churn.begins(count) | sets_in

    def when(every: Array | int, target: Target) -> tuple[Array | bool, Scalar]:
      due, tolerance = look_at(every, target, count)
      return now | (on & due), tolerance

    threshold = barrier.follow(threshold, params, count, when, stacked)
    alphas = barrier.alphas(threshold, params, count)
    nonzero, share = churn.follow(nonzero, share, params, alphas, now, sets_in)

    def layer(u: Array, theta: Array, alpha: Array) -> Array:
      def added() -> Array:
        r = gain * wdr_grad(gain * widen(theta), alpha, sharp)
        wide, bound = u.astype(r.dtype), gain if sharp else None
        factor = force.factor(wide, r, count, share, bound)
        return (wide + factor * r).astype(u.dtype)

      # A late WDR is off for most of a run, and must cost nothing then.
      return added() if on is True else jax.lax.cond(on, added, lambda: u)

    def leaf(
      path: KeyPath, u: Array | None, theta: Array, alpha: Array
    ) -> Array | None:
      if u is None:
        return None
      check_floating(printed := path_str(path), theta)
      in_axes = (0, 0, 0 if alpha.ndim else None)
      return lift(stacked, printed, layer, in_axes)(u, theta, alpha)

    updates = jax.tree_util.tree_map_with_path(
      leaf, updates, params, alphas, is_leaf=lambda x: x is None
    )
    count = jnp.asarray(optax.safe_increment(count))
    return updates, WdrState(count, threshold, nonzero, share)

  transform = optax.GradientTransformation(init, update)
  return transform if where is None else optax.masked(transform, where)


def _one_of(where: Where | None, mask: Where | None) -> Where | None:
  if where is not None and mask is not None:
    raise ValueError(
      f"wdr_transform got where={where!r} and mask={mask!r}, which mean the"
      " same: give one of them."
    )
  return mask if where is None else where
