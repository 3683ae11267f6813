"""The optax transform that adds the gradient of WDR to any chain."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from tern_jax.core.containers import TernParams
from tern_jax.core.interop import serializable
from tern_jax.core.numerics import either
from tern_jax.core.paths import check_patterns, lift, path_str
from tern_jax.core.selection import every_path
from tern_jax.core.types import (
  Array,
  ChannelAxis,
  KeyPath,
  PyTree,
  Scalar,
  Schedule,
)
from tern_jax.regularizers.barriers import Barrier, barrier_of
from tern_jax.regularizers.churn import Churn
from tern_jax.regularizers.formulas import check_floating
from tern_jax.regularizers.masking import (
  Held,
  Where,
  hides_masks,
  merge,
  one_of,
  plain,
  select,
  unboxed,
)
from tern_jax.regularizers.spaces import Space, Weights, space_of
from tern_jax.regularizers.strengths import Strength, strength_of
from tern_jax.targets.schedules import Target, look_at


@serializable
class WdrState(NamedTuple):
  """State of `wdr_transform`."""

  count: Array
  """Updates done."""
  threshold: PyTree
  """Of each leaf, where alpha is `at_sparsity`."""
  nonzero: PyTree
  """Bits: which weights were beyond the barrier 1 % of the steps before a
  `late_kappa` may set in, then at that time."""
  shares: Array
  """Of kappa that are used, by how many of them changed in between: from early
  on, and from the onset on."""


@hides_masks
def wdr_transform(
  alpha: Barrier | Scalar | Schedule,
  strength: Strength | Scalar | Schedule,
  where: Where | Held | None = None,
  stacked: Sequence[str] = (),
  sharp: bool = False,
  *,
  space: str = "latents",
  channel_axis: ChannelAxis = None,
  after_optimizer: bool = False,
  mask: Where | Held | None = None,
) -> optax.GradientTransformationExtraArgs:
  """Adds the gradient of WDR to the updates, for any optax chain.

  Before the optimizer, `optax.chain(wdr_transform(...), optax.adam(1e-3))`,
  each leaf's gradient g becomes `g + strength * dR/dx`: the loss is
  `loss + strength * R`. After the optimizer, where updates already point
  downhill, it must be told so, or it would climb WDR:
  `optax.chain(optax.adam(1e-3), wdr_transform(..., after_optimizer=True))`
  makes an update u `u - strength * dR/dx`, as decoupled weight decay does.
  Between `optax.scale_by_adam()` and the learning rate it is decoupled, too,
  and must not be told.

  In `space="latents"`, a parameter is the Theta of a weight W = tanh(Theta),
  and the model must apply tanh, as `SCA` does. In `space="weights"`, for a
  model that uses its weights as they are, R is `sum (w - s c)^2 / 2`, with
  `c = sign(w) 1[|w| > b]` and the scale `s = mean of |w| over |w| > b`, so that
  weights come to -s, 0 and s. The barrier b is the quantile of |w| for
  `at_sparsity`; for a number it is `s sqrt(alpha / 2)`, found together with s:
  of the magnitudes in descending order, s is the mean m_k of the first k, for
  the largest k whose magnitude is beyond `m_k sqrt(alpha / 2)`.

  On weights, WDR is best placed after the optimizer. A strength is then the
  share of the distance to its code by which each update moves a weight, at most
  1. With a schedule from 0 to 1, whatever the loss and the optimizer, weights
  end at their codes, up to the size of the last update:
  `optax.linear_schedule(0.0, 1.0, 0.6 * steps, 0.2 * steps)`. Before Adam,
  which moves a weight by no more than its rate, some may not arrive.

  Args:
    alpha: a number or traced array in [0, 2); a schedule; or `at_sparsity(s)`.
    strength: the paper's lambda >= 0 as a number, traced array or schedule; or
      `relative(kappa)`, measured against the update that arrives.
    where: which leaves: `kernels(...)`, a function of (path, leaf) to a bool, a
      function of the parameters to a tree of bools, or such a tree, also of a
      part of the levels. None takes every array, biases too, so that most uses
      want `tern_jax.kernels()`.
    stacked: patterns of leaves whose first axis enumerates layers (as made by
      `nn.scan`): scales, `relative` and `at_sparsity` see each layer alone.
    sharp: whether the barrier is a kink, as a hard forward wants it; on weights
      it always is.
    space: "latents" or "weights".
    channel_axis: with weights, None for one scale a tensor; -1 (Flax, Haiku)
      or 0 (Equinox) for one an output channel. A quantile is always that of
      the whole tensor.
    after_optimizer: whether what arrives will be added to the parameters as it
      is.
    mask: the same as where, by the name that optax has for it.

  Returns:
    An `optax.GradientTransformationExtraArgs`. Updates keep their dtype; None
    updates stay None, and parameters may hold functions there. `optax.flatten`
    joins all leaves into one, hence per-leaf statistics become global.

  Raises:
    ValueError: alpha or strength out of range; an unknown space; both where
      and mask; `update` without `params`.
    TypeError: alpha, strength or where is of a wrong type; a selected parameter
      is not floating-point.

  >>> tx = optax.chain(wdr_transform(alpha=0.5, strength=0.1), optax.sgd(1.0))
  >>> params = {"w": jnp.array([0.1, 2.0])}
  >>> updates, _ = tx.update({"w": jnp.zeros(2)}, tx.init(params), params)
  >>> [round(float(u), 5) for u in updates["w"]]  # to 0, and away from it
  [-0.00948, 0.01851]

  Source: Deng & Zhang, arXiv 2011.00580. Differs from the paper: the gradient
  is added to the update instead of the loss, which is the same before the
  first transform of a chain; `relative`, `at_sparsity`, the sharp form and
  that of weights are not in it.
  """
  chosen = one_of(where, mask)
  barrier, force = barrier_of(alpha), strength_of(strength)
  stacked = tuple(stacked)
  form = space_of(space, barrier, sharp, channel_axis)
  if isinstance(form, Weights):
    barrier = barrier.of_weights()
  wdr = _Wdr(barrier, force, form, stacked, after_optimizer)

  # The state is that of optax.masked, which cannot take a model's functions.
  def init(params: PyTree) -> PyTree:
    _, selected = plain(params, chosen)
    state = wdr.init(_latents(selected, selected))
    state = _map_trees(_whole, state, selected)
    return state if chosen is None else optax.MaskedState(state)

  def update(
    updates: PyTree, state: PyTree, params: PyTree | None = None, **extra: Any
  ) -> tuple[PyTree, PyTree]:
    del extra
    if params is None:
      raise ValueError(
        "wdr_transform got no parameters, and WDR is a function of them:"
        " call tx.update(grads, opt_state, params)."
      )
    mask, selected = plain(params, chosen)
    given = select(mask, unboxed(updates))
    inner = state if chosen is None else state.inner_state
    new, inner = wdr.update(
      _latents(given, selected),
      _map_trees(_latents, inner, selected),
      _latents(selected, selected),
    )
    new, inner = _whole(new, selected), _map_trees(_whole, inner, selected)
    state = inner if chosen is None else optax.MaskedState(inner)
    return merge(mask, new, updates), state

  return optax.GradientTransformationExtraArgs(init, update)


def _latents(tree: PyTree, params: PyTree) -> PyTree:
  """Returns the latents of a tree like `TernParams` of which no scale is taken.

  Patterns of a sparsity or of stacked layers are those of the user's tree.
  """
  return tree.latent if _has_latents_alone(params) else tree


def _whole(latents: PyTree, params: PyTree) -> PyTree:
  """Puts back what `_latents` has taken out of a tree."""
  return (
    params.replace(latent=latents) if _has_latents_alone(params) else latents
  )


def _has_latents_alone(params: PyTree) -> bool:
  return isinstance(params, TernParams) and not jax.tree.leaves(params.scales)


def _map_trees(
  fn: Callable[[PyTree, PyTree], PyTree], state: WdrState, params: PyTree
) -> WdrState:
  """Maps one of the two functions above over the trees of a state."""
  if not _has_latents_alone(params):
    return state

  def changed(tree: PyTree) -> PyTree:
    is_empty = isinstance(tree, tuple) and not tree
    return tree if is_empty else fn(tree, params)

  return state._replace(
    threshold=changed(state.threshold), nonzero=changed(state.nonzero)
  )


@dataclasses.dataclass(frozen=True)
class _Wdr:
  """The transform of a plain tree, all of whose leaves are selected."""

  barrier: Barrier
  force: Strength
  space: Space
  stacked: tuple[str, ...]
  descends: bool

  @property
  def _churn(self) -> Churn:
    force = self.force if self.space.holds_back else None
    return Churn(force, self.barrier.gain, self.stacked)

  def init(self, params: PyTree) -> WdrState:
    if jax.tree.leaves(params):
      # Among the stacked layers may be norms, which a mask hides.
      check_patterns(self.stacked, sorted(every_path(params)))
    count = jnp.zeros((), jnp.int32)
    threshold = self.barrier.init(params, self.stacked)
    alphas = self.barrier.alphas(threshold, params, count)
    nonzero = self._churn.init(params, alphas)
    shares = jnp.array([0, 1], jnp.float32)
    return WdrState(count, threshold, nonzero, shares)

  def update(
    self, updates: PyTree, state: WdrState, params: PyTree
  ) -> tuple[PyTree, WdrState]:
    count, threshold, nonzero, shares = state
    force, churn, stacked = self.force, self._churn, self.stacked
    on = force.is_on(count, shares)
    sets_in = on & jnp.logical_not(force.is_on(count - 1, shares))
    now = churn.looks(count) | sets_in

    def when(every: Array | int, target: Target) -> tuple[Array | bool, Scalar]:
      due, tolerance = look_at(every, target, count)
      return now | (on & due), tolerance

    threshold = self.barrier.follow(threshold, params, count, when, stacked)
    alphas = self.barrier.alphas(threshold, params, count)
    edges = self.space.edges(threshold, alphas)
    nonzero, shares = churn.follow(nonzero, shares, params, alphas, count)
    on = force.is_on(count, shares)

    def layer(u: Array, x: Array, edge: Array) -> Array:
      def added() -> Array:
        r, bound = self.space.grad(x, edge)
        wide = u.astype(r.dtype)
        factor = force.factor(wide, r, count, shares, bound)
        if self.descends:
          factor = -jnp.minimum(factor, self.space.reach)
        return (wide + factor * r).astype(u.dtype)

      # A late WDR is off for most of a run, and must cost nothing then.
      return either(on, added, lambda: u)

    def leaf(
      path: KeyPath, u: Array | None, x: Array, edge: Array
    ) -> Array | None:
      if u is None:
        return None
      check_floating(printed := path_str(path), x)
      in_axes = (0, 0, 0 if edge.ndim else None)
      return lift(stacked, printed, layer, in_axes)(u, x, edge)

    updates = jax.tree_util.tree_map_with_path(
      leaf, updates, params, edges, is_leaf=lambda x: x is None
    )
    count = jnp.asarray(optax.safe_increment(count))
    return updates, WdrState(count, threshold, nonzero, shares)
