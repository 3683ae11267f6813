"""How many codes change before WDR sets in, which says how much it may do."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from tern_jax.core.numerics import widen
from tern_jax.core.paths import path_str
from tern_jax.core.types import Array, KeyPath, PyTree
from tern_jax.regularizers.formulas import check_floating, wdr_barrier
from tern_jax.regularizers.layers import lift
from tern_jax.regularizers.strengths import LateKappa, Relative, Strength


@dataclasses.dataclass(frozen=True)
class Churn:
  """The share of a late kappa that is used, by what changed before its onset.

  Args:
    late: the schedule, None where its whole kappa is always used.
    strength: of which it is the kappa.
    gain: Theta over the parameters.
    stacked: patterns of leaves whose first axis enumerates layers.
  """

  late: LateKappa | None
  strength: Strength
  gain: float
  stacked: Sequence[str]

  @classmethod
  def of(
    cls, strength: Strength, gain: float, stacked: Sequence[str]
  ) -> "Churn":
    """Returns what a strength asks for."""
    kappa = strength.kappa if isinstance(strength, Relative) else None
    late = kappa if isinstance(kappa, LateKappa) else None
    late = late if late is not None and late.counts_churn else None
    return cls(late, strength, gain, stacked)

  def begins(self, count: Array) -> Array | bool:
    """Whether the nonzeros of this update are those to compare with."""
    if self.late is None:
      return False
    return self.strength.sets_in(count + self.late.ahead)

  def init(self, params: PyTree, alphas: PyTree) -> PyTree:
    """Returns the nonzeros to begin with, nothing where none are counted."""
    return () if self.late is None else self._nonzero(params, alphas)

  def follow(
    self,
    params: PyTree,
    alphas: PyTree,
    count: Array,
    kept: tuple[PyTree, Array],
  ) -> tuple[PyTree, Array]:
    """Returns the nonzeros to compare with and the share of kappa in use."""
    nonzero, share = kept
    late = self.late
    if late is None:
      return kept
    ends = self.strength.sets_in(count)
    now = jax.lax.cond(
      self.begins(count) | ends,
      lambda: self._nonzero(params, alphas),
      lambda: nonzero,
    )
    share = jax.lax.cond(
      ends, lambda: late.share(_exchanged(nonzero, now)), lambda: share
    )
    return now, share

  def _nonzero(self, params: PyTree, alphas: PyTree) -> PyTree:
    """Returns which weights are beyond the barrier, eight to a byte."""

    def layer(theta: Array, alpha: Array) -> Array:
      w = jnp.abs(jnp.tanh(self.gain * widen(theta)))
      return jnp.packbits(jnp.atleast_1d(w > wdr_barrier(alpha)), axis=-1)

    def leaf(path: KeyPath, theta: Array, alpha: Array) -> Array:
      check_floating(path_str(path), theta)
      in_axes = (0, 0 if alpha.ndim else None)
      return lift(self.stacked, path, layer, in_axes)(theta, alpha)

    return jax.tree_util.tree_map_with_path(leaf, params, alphas)


def _exchanged(before: PyTree, now: PyTree) -> Array:
  """Returns the share of the bits set now that were not so before."""

  def count(words: PyTree) -> Array:
    ones = (jnp.sum(jnp.bitwise_count(x)) for x in jax.tree.leaves(words))
    return sum((x.astype(jnp.float32) for x in ones), jnp.float32(0))

  new = jax.tree.map(lambda x, y: y & ~x, before, now)
  return count(new) / jnp.maximum(count(now), 1)
