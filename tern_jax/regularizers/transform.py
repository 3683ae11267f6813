"""The optax transform that adds the gradient of WDR to any chain."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from tern_jax.core.containers import Array
from tern_jax.core.numerics import widen
from tern_jax.core.paths import check_patterns, matches_any, path_str
from tern_jax.regularizers.barriers import AtSparsity
from tern_jax.regularizers.formulas import (
  check_alpha,
  check_floating,
  wdr_barrier,
  wdr_grad,
)
from tern_jax.regularizers.strengths import LateKappa, Relative, check_strength
from tern_jax.targets.quantile import magnitude_threshold
from tern_jax.targets.schedules import (
  TOLERANCE,
  AcrossLayers,
  at,
  check_targets,
  target_of,
)


class WdrState(NamedTuple):
  """State of `wdr_transform`."""

  count: Array
  """Updates done."""
  threshold: Any
  """Of each leaf, where alpha is `at_sparsity`."""
  nonzero: Any
  """Bits: which weights were beyond the barrier 1 % of the steps before
  the onset of a `late_kappa`, then at it."""
  share: Array
  """Of kappa that is used, by how many of them changed in between."""


def wdr_transform(
  alpha: Any,
  strength: Any,
  mask: Any = None,
  stacked: tuple[str, ...] = (),
  sharp: bool = False,
) -> optax.GradientTransformation:
  """Adds the gradient of WDR to the updates, for any optax chain.

  Each leaf's update u becomes `u + strength * dR/dTheta`. Placed before Adam
  it is the loss term `loss + strength * R` (coupled); placed after Adam, and
  before the learning rate, it acts undisturbed by Adam's normalization
  (decoupled), as `optax.add_decayed_weights` does. With `relative(kappa)` the
  place matters too: kappa is measured against the update that arrives.

  Args:
    alpha: a number or traced array in [0, 2); a schedule; a tree of them that
      is a prefix of the parameters; or `at_sparsity(s)`.
    strength: the paper's lambda >= 0 as a number, traced array or schedule;
      or `relative(kappa)`.
    mask: a tree of bools or a function from parameters to one, as in
      `optax.masked`; None takes every leaf, biases too, so that most uses
      want `mask=tern_jax.kernels()`.
    stacked: patterns of leaves whose first axis enumerates layers (as made by
      `nn.scan`): `relative` and `at_sparsity` then look at each layer alone.
    sharp: whether the barrier is a kink, as a hard forward wants it.

  Returns:
    An `optax.GradientTransformation`. Updates keep their dtype; None updates
    stay None. `optax.flatten` joins all leaves into one, hence per-leaf
    statistics become global. Under `optax.inject_hyperparams`, name a
    callable mask in `static_args`.

  Raises:
    ValueError: alpha or strength out of range; `update` without `params`.
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
  if not isinstance(alpha, AtSparsity):
    jax.tree.map(check_alpha, alpha)
  if not isinstance(strength, Relative):
    check_strength("strength", strength)

  gain = alpha.gain if isinstance(alpha, AtSparsity) else 1.0
  late: Any = strength.kappa if isinstance(strength, Relative) else None
  if not (isinstance(late, LateKappa) and late.watches):
    late = None

  def lift(path: Any, fn: Any, in_axes: Any = 0) -> Any:
    is_stack = matches_any(stacked, path_str(path))
    return jax.vmap(fn, in_axes) if is_stack else fn

  def look(params: Any, old: Any, count: Array, tolerance: float) -> Any:
    """Returns the thresholds of `at_sparsity`, guessed by the old ones."""
    if isinstance(alpha.sparsity, AcrossLayers):
      leaves = jax.tree.leaves(params)
      target = at(alpha.sparsity.sparsity, count)
      found = magnitude_threshold(leaves, target, tolerance=tolerance)
      return jax.tree.map(lambda t: jnp.broadcast_to(found, t.shape), old)

    def find(path: Any, theta: Array, guess: Array) -> Array:
      target = at(target_of(alpha.sparsity, path_str(path)), count)
      return lift(
        path,
        lambda theta, guess: magnitude_threshold(
          theta, target, guess, tolerance
        ),
      )(theta, guess)

    return jax.tree_util.tree_map_with_path(find, params, old)

  def alphas_of(params: Any, threshold: Any) -> Any:
    if isinstance(alpha, AtSparsity):
      return jax.tree.map(
        lambda t: 2 * jnp.square(jnp.tanh(gain * t)), threshold
      )
    return jax.tree.broadcast(alpha, params)

  def beyond(params: Any, alphas: Any, count: Array) -> Any:
    """Returns which weights are beyond the barrier, eight to a byte."""

    def one(theta: Array, a: Array) -> Array:
      w = jnp.abs(jnp.tanh(gain * widen(theta)))
      return jnp.packbits(jnp.atleast_1d(w > wdr_barrier(a)), axis=-1)

    def of(path: Any, theta: Array, a: Any) -> Array:
      check_floating(path_str(path), theta)
      a = at(a, count, widen(theta).dtype)
      return lift(path, one, (0, 0 if a.ndim else None))(theta, a)

    return jax.tree_util.tree_map_with_path(of, params, alphas)

  def init(params: Any) -> WdrState:
    leaves = jax.tree_util.tree_leaves_with_path(params)
    paths = [path_str(path) for path, _ in leaves]
    check_patterns(stacked, paths)
    count = jnp.zeros((), jnp.int32)
    threshold = nonzero = ()
    if isinstance(alpha, AtSparsity):
      check_targets(alpha.sparsity, paths)
      unknown = jax.tree_util.tree_map_with_path(
        lambda path, x: jnp.zeros(
          x.shape[: matches_any(stacked, path_str(path))], jnp.float32
        ),
        params,
      )
      threshold = look(params, unknown, count, 0.0)
    if late is not None:
      nonzero = beyond(params, alphas_of(params, threshold), count)
    return WdrState(count, threshold, nonzero, jnp.ones((), jnp.float32))

  def update(
    updates: Any, state: Any, params: Any = None
  ) -> tuple[Any, WdrState]:
    if params is None:
      raise ValueError(
        "wdr_transform got no parameters, and WDR is a function of them:"
        " call tx.update(grads, opt_state, params)."
      )
    count, threshold, nonzero, share = state
    is_on, sets_in = _is_on(strength, count), _sets_in(strength, count)
    is_before = late is not None and _sets_in(strength, count + late.ahead)
    if isinstance(alpha, AtSparsity):
      due = is_before | sets_in | (is_on & (count % alpha.every == 0))
      threshold = jax.lax.cond(
        due,
        lambda old: look(params, old, count, TOLERANCE),
        lambda old: old,
        threshold,
      )
    alphas = alphas_of(params, threshold)
    if late is not None:
      now = jax.lax.cond(
        is_before | sets_in,
        lambda: beyond(params, alphas, count),
        lambda: nonzero,
      )
      share = jax.lax.cond(
        sets_in,
        lambda: late.share(_exchanged(nonzero, now)),
        lambda: share,
      )
      nonzero = now

    def add(path: Any, u: Array | None, theta: Array, a: Any) -> Array | None:
      if u is None:
        return None
      check_floating(path_str(path), theta)
      a = at(a, count, widen(theta).dtype)

      def add_one(u: Array, theta: Array, a: Array) -> Array:
        return _add(u, theta, a, gain, strength, share, count, sharp)

      in_axes = (0, 0, 0 if a.ndim else None)
      return lift(path, add_one, in_axes)(u, theta, a)

    updates = jax.tree_util.tree_map_with_path(
      add, updates, params, alphas, is_leaf=lambda x: x is None
    )
    count = jnp.asarray(optax.safe_increment(count))
    return updates, WdrState(count, threshold, nonzero, share)

  transform = optax.GradientTransformation(init, update)
  return transform if mask is None else optax.masked(transform, mask)


def _add(
  u: Array,
  latent: Array,
  a: Array,
  gain: float,
  strength: Any,
  share: Array,
  count: Array,
  sharp: bool,
) -> Array:
  """Returns u + strength * dR/dlatent in the dtype of u.

  Of the kappa of a relative strength, only a share is used.
  """

  def add(factor: Any) -> Array:
    r = gain * wdr_grad(gain * widen(latent), a, sharp)
    return (u.astype(r.dtype) + factor(r) * r).astype(u.dtype)

  if not isinstance(strength, Relative):
    return add(lambda r: at(strength, count, r.dtype))

  def balanced(r: Array) -> Array:
    # The ratio of norms is the ratio of root mean squares. The sharp r counts
    # as if it were 1 by Theta, its bound, everywhere.
    size = gain * r.size**0.5 if sharp else _norm(r)
    size = jnp.maximum(size, jnp.finfo(r.dtype).tiny)
    kappa = share.astype(r.dtype) * at(strength.kappa, count, r.dtype)
    return kappa * _norm(u.astype(r.dtype)) / size

  # A late WDR is off for most of a run, and must cost nothing then.
  return jax.lax.cond(_is_on(strength, count), lambda: add(balanced), lambda: u)


def _is_on(strength: Any, count: Array) -> Array | bool:
  """Says whether WDR does anything at a step."""
  return not isinstance(strength, Relative) or at(strength.kappa, count) > 0


def _sets_in(strength: Any, count: Array) -> Array:
  """Says whether WDR does something at a step, and nothing before."""
  was_on = _is_on(strength, count - 1)
  return _is_on(strength, count) & jnp.logical_not(was_on)


def _exchanged(before: Any, now: Any) -> Array:
  """Returns the share of the bits set now that were not so before."""

  def count(words: Any) -> Array:
    ones = (jnp.sum(jnp.bitwise_count(x)) for x in jax.tree.leaves(words))
    return sum((x.astype(jnp.float32) for x in ones), jnp.float32(0))

  new = jax.tree.map(lambda x, y: y & ~x, before, now)
  return count(new) / jnp.maximum(count(now), 1)


def _norm(x: Array) -> Array:
  return jnp.sqrt(jnp.sum(jnp.square(x)))
