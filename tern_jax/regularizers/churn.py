"""How many codes change before WDR sets in, which says how much it may do."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from tern_jax.core.numerics import either, whole, widen
from tern_jax.core.paths import lift, path_str
from tern_jax.core.types import Array, KeyPath, PyTree
from tern_jax.regularizers.formulas import check_floating, wdr_barrier
from tern_jax.regularizers.strengths import LateKappa, Relative, Strength


@dataclasses.dataclass(frozen=True)
class Churn:
  """The share of a late kappa that is used, by what changed before its onset.

  Args:
    strength: whose kappa it is; nothing is counted of another, or of None.
    gain: Theta over the parameters.
    stacked: patterns of leaves whose first axis enumerates layers.
  """

  strength: Strength | None
  gain: float
  stacked: Sequence[str]

  @property
  def late(self) -> LateKappa | None:
    """The schedule, None where nothing is counted."""
    kappa = self.strength.kappa if isinstance(self.strength, Relative) else None
    if isinstance(kappa, LateKappa) and kappa.counts_churn:
      return kappa
    return None

  def looks(self, count: Array) -> Array | bool:
    """Whether nonzeros are remembered at this update, or compared with."""
    if (late := self.late) is None:
      return False
    ahead = late.begins(count + late.ahead)
    return jnp.any(late.begins(count) | ahead)

  def init(self, params: PyTree, alphas: PyTree) -> PyTree:
    """Returns the nonzeros to begin with, () where none are counted."""
    return () if self.late is None else self._nonzero(params, alphas)

  def follow(
    self,
    nonzero: PyTree,
    shares: Array,
    params: PyTree,
    alphas: PyTree,
    count: Array,
  ) -> tuple[PyTree, Array]:
    """Returns the nonzeros to compare with and the shares of kappa in use."""
    if (late := self.late) is None:
      return nonzero, shares
    new = either(
      self.looks(count), lambda: self._nonzero(params, alphas), lambda: nonzero
    )
    begins = late.begins(count)

    def compared() -> Array:
      return jnp.where(begins, late.shares(_exchanged(nonzero, new)), shares)

    return new, either(jnp.any(begins), compared, lambda: shares)

  def _nonzero(self, params: PyTree, alphas: PyTree) -> PyTree:
    """Returns which weights are beyond the barrier, eight to a byte."""

    def layer(theta: Array, alpha: Array) -> Array:
      w = jnp.abs(jnp.tanh(self.gain * widen(theta)))
      nonzero = jnp.atleast_1d(w > wdr_barrier(alpha))
      return jnp.packbits(whole(nonzero, (nonzero.ndim - 1,)), axis=-1)

    def leaf(path: KeyPath, theta: Array, alpha: Array) -> Array:
      check_floating(printed := path_str(path), theta)
      in_axes = (0, 0 if alpha.ndim else None)
      return lift(self.stacked, printed, layer, in_axes)(theta, alpha)

    return jax.tree_util.tree_map_with_path(leaf, params, alphas)


def _exchanged(before: PyTree, now: PyTree) -> Array:
  """Returns the share of the bits set now that were not so before."""

  def count(words: PyTree) -> Array:
    ones = (jnp.sum(jnp.bitwise_count(x)) for x in jax.tree.leaves(words))
    return sum((x.astype(jnp.float32) for x in ones), jnp.float32(0))

  new = jax.tree.map(lambda x, y: y & ~x, before, now)
  return count(new) / jnp.maximum(count(now), 1)
