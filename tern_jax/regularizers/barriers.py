"""Alphas of WDR: where the barrier lies."""

import dataclasses
from typing import Any

from tern_jax.core.checks import call_repr, check_range
from tern_jax.targets.schedules import Schedulable, check_sparsity

#: Theta over the latents where the barrier is at a quantile: Adam moves latents
#: by its rate whatever they are, and with this gain its usual 1e-3 is right.
GAIN = 10.0


@dataclasses.dataclass(frozen=True, repr=False)
class AtSparsity:
  """An alpha made by `at_sparsity`."""

  sparsity: Schedulable
  every: int = 10
  gain: float = GAIN

  def __post_init__(self):
    check_sparsity(self.sparsity)
    check_range("every", self.every, 1, float("inf"), "count training steps")
    check_gain(self.gain)

  def __repr__(self) -> str:
    """Prints the call that made it."""
    return call_repr(self, "at_sparsity")


def at_sparsity(
  sparsity: Schedulable, every: int = 10, gain: float = GAIN
) -> AtSparsity:
  """Makes an alpha that keeps the barrier at a quantile of each leaf.

  `alpha = 2 q^2`, q the quantile of the leaf's |tanh(Theta)| at the asked
  sparsity, found anew every few updates: the same barrier as
  `SCA(sparsity=..., every=..., gain=...)` keeps for the same arguments, but for
  the last 5 % of the run of a `ramp`, in which SCA looks at each step.

  Args:
    sparsity: share of zeros in [0, 1), or a schedule of it; also `per_layer`
      or `across_layers`.
    every: updates between two looks at the quantile.
    gain: Theta over the parameters; 1 where they are Theta itself.

  Returns:
    An `alpha` for `wdr_transform`, printable as this call.

  Raises:
    ValueError: a concrete sparsity outside [0, 1), `every` below 1, or a gain
      that is not positive.

  >>> at_sparsity(0.9)
  at_sparsity(sparsity=0.9)
  """
  return AtSparsity(sparsity, every, gain)


def check_gain(gain: Any) -> None:
  """Raises a ValueError unless a gain is positive."""
  check_range("gain", gain, 1e-6, 1e6, "1 keeps Theta itself as parameters")
