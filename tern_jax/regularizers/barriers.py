"""Alphas of WDR: where the barrier lies."""

import abc
import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from tern_jax.core.checks import call_repr, check_range
from tern_jax.core.numerics import either, widen
from tern_jax.core.paths import lift, matches_any, path_str
from tern_jax.core.types import Array, KeyPath, PyTree, Scalar, Schedule
from tern_jax.regularizers.formulas import check_alpha, is_scalar_or_schedule
from tern_jax.targets import schedules
from tern_jax.targets.quantile import search
from tern_jax.targets.schedules import AcrossLayers, Ramp, Target
from tern_jax.targets.shares import shares_at

#: Theta over the latents where the barrier is at a quantile: Adam moves latents
#: by its rate whatever they are, and with this gain its usual 1e-3 is right.
GAIN = 10.0

#: Of `every` and a target: whether to search for the barrier, and how closely.
When = Callable[[Array | int, Target], tuple[Array | bool, Scalar]]


class Barrier(abc.ABC):
  """What tells `wdr_transform` the alpha of each leaf.

  `kept` is what is kept of each leaf between updates, () for nothing; `stacked`
  are patterns of leaves whose first axis enumerates layers.
  """

  @property
  def gain(self) -> float:
    """Theta over the parameters."""
    return 1.0

  def init(self, params: PyTree, stacked: Sequence[str]) -> PyTree:
    """Returns what is kept at first."""
    del params, stacked
    return ()

  def follow(
    self,
    kept: PyTree,
    params: PyTree,
    count: Array,
    when: When,
    stacked: Sequence[str],
  ) -> PyTree:
    """Returns what is kept at an update that has these parameters."""
    del params, count, when, stacked
    return kept

  def of_weights(self) -> "Barrier":
    """Returns the same barrier for parameters that are the weights."""
    return self

  @abc.abstractmethod
  def alphas(self, kept: PyTree, params: PyTree, count: Array) -> PyTree:
    """Returns alpha for each leaf, 0-d, or one for each layer of a stack."""


@dataclasses.dataclass(frozen=True)
class FixedAlpha(Barrier):
  """One alpha for all leaves: a number, a traced array or a schedule."""

  alpha: Scalar | Schedule

  def __post_init__(self):
    check_alpha(self.alpha)

  def alphas(self, kept: PyTree, params: PyTree, count: Array) -> PyTree:
    """Returns alpha at this update in the precision of each leaf."""
    del kept
    return jax.tree.map(
      lambda theta: schedules.at(self.alpha, count, widen(theta).dtype), params
    )


@dataclasses.dataclass(frozen=True, repr=False)
class AtSparsity(Barrier):
  """An alpha that keeps the barrier at a quantile of each leaf.

  `alpha = 2 q^2`, q the quantile of the leaf's |tanh(Theta)| at the asked
  sparsity, found anew every few updates: the same barrier as
  `SCA(sparsity=..., every=..., gain=...)` keeps for the same arguments, at each
  of the last 5 % of the steps of a `ramp`, too. `tern_jax.at_sparsity` is this
  class.

  Args:
    sparsity: share of zeros in [0, 1), or a schedule of it; also `per_layer`
      or `across_layers`.
    every: updates between two searches for the quantile.
    gain: Theta over the parameters, > 0; 1 where they are Theta itself. Not
      used in `space="weights"`.

  >>> AtSparsity(0.9)
  at_sparsity(sparsity=0.9)
  """

  sparsity: Target
  every: int = 10
  gain: float = GAIN

  def __post_init__(self):
    schedules.check_sparsity(self.sparsity)
    check_range("every", self.every, 1, float("inf"), "count training steps")
    check_gain(self.gain)

  def init(self, params: PyTree, stacked: Sequence[str]) -> PyTree:
    """Returns the exact threshold of each leaf, or of each layer of a stack."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    schedules.check_targets(self.sparsity, [path_str(k) for k, _ in leaves])

    def unknown(path: KeyPath, x: Array) -> Array:
      layers = x.shape[: matches_any(stacked, path_str(path))]
      return jnp.zeros(layers, jnp.float32)

    kept = jax.tree_util.tree_map_with_path(unknown, params)
    count = jnp.zeros((), jnp.int32)
    return self.follow(kept, params, count, lambda *_: (True, 0.0), stacked)

  def follow(
    self,
    kept: PyTree,
    params: PyTree,
    count: Array,
    when: When,
    stacked: Sequence[str],
  ) -> PyTree:
    """Returns the thresholds, found anew where that is due."""
    if isinstance(self.sparsity, AcrossLayers):
      target, leaves = self.sparsity.sparsity, jax.tree.leaves(params)
      due, tolerance = when(self.every, target)

      def together() -> PyTree:
        if self.sparsity.floor:
          return self._divided(
            self.sparsity, kept, params, count, tolerance, stacked
          )
        n = sum(x.size for x in leaves)
        asked = schedules.zeros_at(target, count, n)
        found = self.search(leaves, asked, None, tolerance)
        return jax.tree.map(lambda t: jnp.broadcast_to(found, t.shape), kept)

      return either(due, together, lambda: kept)

    def leaf(path: KeyPath, held: Array, theta: Array) -> Array:
      printed = path_str(path)
      target = schedules.target_of(self.sparsity, printed)
      due, tolerance = when(self.every, target)

      def find(theta: Array, guess: Array) -> Array:
        asked = schedules.zeros_at(target, count, theta.size)
        return self.search(theta, asked, guess, tolerance)

      return either(
        due, lambda: lift(stacked, printed, find)(theta, held), lambda: held
      )

    return jax.tree_util.tree_map_with_path(leaf, kept, params)

  def _divided(
    self,
    target: AcrossLayers,
    kept: PyTree,
    params: PyTree,
    count: Array,
    tolerance: Scalar,
    stacked: Sequence[str],
  ) -> PyTree:
    """Returns the thresholds of layers, each of which keeps some nonzeros."""
    found = jax.tree_util.tree_leaves_with_path(params)
    leaves = {path_str(path): x for path, x in found}
    zeros = shares_at(target, leaves, stacked, count, tolerance)

    def leaf(path: KeyPath, held: Array, theta: Array) -> Array:
      printed = path_str(path)

      def find(theta: Array, zeros: Array, guess: Array) -> Array:
        return self.search(theta, zeros, guess, tolerance)

      return lift(stacked, printed, find)(theta, zeros[printed], held)

    return jax.tree_util.tree_map_with_path(leaf, kept, params)

  def alphas(self, kept: PyTree, params: PyTree, count: Array) -> PyTree:
    """Returns the alphas whose barriers are the thresholds."""
    del count

    def alpha(threshold: Array, theta: Array) -> Array:
      two_squares = 2 * jnp.square(jnp.tanh(self.gain * threshold))
      return two_squares.astype(widen(theta).dtype)

    return jax.tree.map(alpha, kept, params)

  def search(
    self,
    x: Array | list[Array],
    zeros: Array,
    guess: Array | None,
    tolerance: Scalar,
  ) -> Array:
    """Returns the threshold of an array, or of several as one."""
    arrays = tuple(x) if isinstance(x, list) else (x,)
    return search(arrays, zeros, guess, tolerance).threshold

  def of_weights(self) -> "Barrier":
    """Returns the same barrier for parameters that are the weights."""
    return _AtSparsityOfWeights(self.sparsity, self.every)

  def __repr__(self) -> str:
    """Prints the call that makes it."""
    return call_repr(self, "at_sparsity")


@dataclasses.dataclass(frozen=True, repr=False)
class _AtSparsityOfWeights(AtSparsity):
  """The barrier at a quantile of weights that are drawn to 0 and one magnitude.

  Once they are there, any threshold between the two is at the quantile. That in
  the middle stays so when the magnitude changes. It is exact, as nothing else
  makes weights ternary: what it misses stays missed.
  """

  def search(
    self,
    x: Array | list[Array],
    zeros: Array,
    guess: Array | None,
    tolerance: Scalar,
  ) -> Array:
    """Returns the middle of the gap that leaves most nearly as many under it.

    Of equal magnitudes, either all are under it or none: they may be all the
    nonzeros that there are.
    """
    del tolerance
    found = super().search(x, zeros, guess, 0.0)
    magnitudes = [
      jnp.abs(array.astype(jnp.float32))
      for array in (x if isinstance(x, list) else [x])
    ]
    top = _largest(magnitudes, lambda m: m <= found)
    next_one = -_largest([-m for m in magnitudes], lambda m: -m > found)
    before = jnp.maximum(_largest(magnitudes, lambda m: m < top), 0)
    many = sum(jnp.sum(m <= found, dtype=jnp.int32) for m in magnitudes)
    few = sum(jnp.sum(m < top, dtype=jnp.int32) for m in magnitudes)
    lower = zeros - few <= many - zeros
    low, high = jnp.where(lower, before, top), jnp.where(lower, top, next_one)
    middle = low + (high - low) / 2
    return jnp.where(jnp.isfinite(middle), middle, found)


def _largest(arrays: list[Array], among: Callable[[Array], Array]) -> Array:
  """Returns the largest of the chosen entries, -infinity where none is."""
  each = (
    jnp.max(jnp.where(among(x), x, -jnp.inf), initial=-jnp.inf) for x in arrays
  )
  return functools.reduce(jnp.maximum, each, jnp.float32(-jnp.inf))


at_sparsity = AtSparsity


def barrier_of(alpha: Barrier | Scalar | Schedule) -> Barrier:
  """Returns the barrier of an alpha as users give it."""
  if isinstance(alpha, Barrier):
    return alpha
  if isinstance(alpha, Ramp):
    raise TypeError(
      f"alpha={alpha!r} is a schedule of sparsity, not of alpha: give"
      f" tern_jax.at_sparsity({alpha!r})."
    )
  if not is_scalar_or_schedule(alpha):
    raise TypeError(
      "alpha must be a number, an array, a schedule of the step or"
      f" at_sparsity(...), got {alpha!r}: try tern_jax.at_sparsity(0.8)."
    )
  return FixedAlpha(alpha)


def check_gain(gain: float | None) -> None:
  """Raises a ValueError unless a gain is positive."""
  check_range("gain", gain, 1e-6, 1e6, "1 keeps Theta itself as parameters")
