"""Alphas of WDR: where the barrier lies."""

import abc
import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tern_jax.core.checks import call_repr, check_range
from tern_jax.core.numerics import widen
from tern_jax.core.paths import path_str
from tern_jax.core.types import Array, KeyPath, PyTree, Scalar, Schedule
from tern_jax.regularizers.formulas import check_alpha
from tern_jax.regularizers.layers import lift, stack_axes
from tern_jax.targets.quantile import magnitude_threshold
from tern_jax.targets.schedules import (
  AcrossLayers,
  PerLayer,
  Target,
  at,
  check_sparsity,
  check_targets,
  look_at,
)

#: Theta over the latents where the barrier is at a quantile: Adam moves latents
#: by its rate whatever they are, and with this gain its usual 1e-3 is right.
GAIN = 10.0
_NUMBERS = (float, int, np.ndarray, np.generic, jax.Array)


class Moment(NamedTuple):
  """An update, as a barrier sees it."""

  count: Array
  """Updates done, int32, 0-d."""
  on: Array | bool
  """Whether WDR does anything at this one."""
  now: Array | bool
  """Whether the barrier must fit the latents now."""


class Barrier(abc.ABC):
  """What tells `wdr_transform` the alpha of each leaf."""

  @property
  def gain(self) -> float:
    """Theta over the parameters."""
    return 1.0

  def init(self, params: PyTree, stacked: Sequence[str]) -> PyTree:
    """Returns what is kept of each leaf between updates."""
    del params, stacked
    return ()

  def follow(
    self, params: PyTree, kept: PyTree, moment: Moment, stacked: Sequence[str]
  ) -> PyTree:
    """Returns what is kept after an update that has these parameters."""
    del params, moment, stacked
    return kept

  @abc.abstractmethod
  def alphas(self, params: PyTree, kept: PyTree, count: Array) -> PyTree:
    """Returns alpha for each leaf, 0-d, or one for each layer of a stack."""


@dataclasses.dataclass(frozen=True)
class FixedAlpha(Barrier):
  """One alpha for all leaves: a number, a traced array or a schedule."""

  alpha: Scalar | Schedule

  def __post_init__(self):
    check_alpha(self.alpha)

  def alphas(self, params: PyTree, kept: PyTree, count: Array) -> PyTree:
    """Returns alpha at this update in the precision of each leaf."""
    del kept
    return jax.tree.map(
      lambda theta: at(self.alpha, count, widen(theta).dtype), params
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
    gain: Theta over the parameters; 1 where they are Theta itself.

  Raises:
    ValueError: a concrete sparsity outside [0, 1), `every` below 1, or a gain
      that is not positive.

  >>> AtSparsity(0.9)
  at_sparsity(sparsity=0.9)
  """

  sparsity: Target
  every: int = 10
  gain: float = GAIN

  def __post_init__(self):
    check_sparsity(self.sparsity)
    check_range("every", self.every, 1, float("inf"), "count training steps")
    check_gain(self.gain)

  def init(self, params: PyTree, stacked: Sequence[str]) -> PyTree:
    """Returns the exact threshold of each leaf, or of each layer of a stack."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    check_targets(self.sparsity, [path_str(path) for path, _ in leaves])
    unknown = jax.tree_util.tree_map_with_path(
      lambda path, x: jnp.zeros(
        x.shape[: stack_axes(stacked, path)], jnp.float32
      ),
      params,
    )
    start = Moment(jnp.zeros((), jnp.int32), on=True, now=True)
    return self._search(params, unknown, start, stacked, exact=True)

  def follow(
    self, params: PyTree, kept: PyTree, moment: Moment, stacked: Sequence[str]
  ) -> PyTree:
    """Returns the thresholds, found anew where that is due."""
    return self._search(params, kept, moment, stacked)

  def alphas(self, params: PyTree, kept: PyTree, count: Array) -> PyTree:
    """Returns the alphas whose barriers are the thresholds."""
    del count

    def alpha(theta: Array, threshold: Array) -> Array:
      two_squares = 2 * jnp.square(jnp.tanh(self.gain * threshold))
      return two_squares.astype(widen(theta).dtype)

    return jax.tree.map(alpha, params, kept)

  def _search(
    self,
    params: PyTree,
    kept: PyTree,
    moment: Moment,
    stacked: Sequence[str],
    exact: bool = False,
  ) -> PyTree:
    count, on, now = moment

    def due(target: Target) -> tuple[Array | bool, Scalar]:
      regular, tolerance = look_at(self.every, target, count)
      return now | (on & regular), 0.0 if exact else tolerance

    if isinstance(self.sparsity, AcrossLayers):
      target, leaves = self.sparsity.sparsity, jax.tree.leaves(params)
      asked = at(target, count)
      search, tolerance = due(target)

      def together() -> PyTree:
        found = magnitude_threshold(leaves, asked, tolerance=tolerance)
        return jax.tree.map(lambda t: jnp.broadcast_to(found, t.shape), kept)

      return jax.lax.cond(search, together, lambda: kept)

    def leaf(path: KeyPath, theta: Array, held: Array) -> Array:
      target = self.sparsity
      if isinstance(target, PerLayer):
        target = target.of(path_str(path))
      asked = at(target, count)
      search, tolerance = due(target)

      def find(theta: Array, guess: Array) -> Array:
        return magnitude_threshold(theta, asked, guess, tolerance)

      return jax.lax.cond(
        search, lambda: lift(stacked, path, find)(theta, held), lambda: held
      )

    return jax.tree_util.tree_map_with_path(leaf, params, kept)

  def __repr__(self) -> str:
    """Prints the call that makes it."""
    return call_repr(self, "at_sparsity")


at_sparsity = AtSparsity


def barrier_of(alpha: Barrier | Scalar | Schedule) -> Barrier:
  """Returns the barrier of an alpha as users give it.

  Raises:
    TypeError: alpha is nothing that could be one.
  """
  if isinstance(alpha, Barrier):
    return alpha
  if not (callable(alpha) or isinstance(alpha, _NUMBERS)):
    raise TypeError(
      "alpha must be a number, an array, a schedule of the step or"
      f" at_sparsity(...), got {alpha!r}: try alpha=0.1."
    )
  return FixedAlpha(alpha)


def check_gain(gain: float | None) -> None:
  """Raises a ValueError unless a gain is positive."""
  check_range("gain", gain, 1e-6, 1e6, "1 keeps Theta itself as parameters")
