"""Strengths of WDR: absolute, or relative to the gradient, late in a run."""

import abc
import dataclasses

import jax.numpy as jnp

from tern_jax.core.checks import call_repr, check_range
from tern_jax.core.types import Array, Count, Scalar, Schedule
from tern_jax.targets.schedules import at


class Strength(abc.ABC):
  """How much of the gradient r of WDR `wdr_transform` adds to an update u."""

  def is_on(self, count: Array) -> Array | bool:
    """Whether anything is added at an update; True for always."""
    del count
    return True

  def sets_in(self, count: Array) -> Array:
    """Whether WDR does something at an update, and did nothing before it."""
    return self.is_on(count) & jnp.logical_not(self.is_on(count - 1))

  @abc.abstractmethod
  def factor(
    self, u: Array, r: Array, count: Array, share: Array, bound: float | None
  ) -> Array:
    """Returns the factor of r for one layer, in its precision.

    Of a strength that is held back while codes still improve, only a share is
    used; bound is the largest |r| there can be, if r shrinks as latents settle.
    """


@dataclasses.dataclass(frozen=True)
class Absolute(Strength):
  """The paper's lambda: a number, a traced array or a schedule."""

  strength: Scalar | Schedule

  def __post_init__(self):
    check_strength("strength", self.strength)

  def factor(
    self, u: Array, r: Array, count: Array, share: Array, bound: float | None
  ) -> Array:
    """Returns lambda."""
    del u, share, bound
    return at(self.strength, count, r.dtype)


@dataclasses.dataclass(frozen=True, repr=False)
class Relative(Strength):
  """A strength that is measured against the gradient that arrives.

  A leaf's gradient g becomes `g + kappa * (rms(g) / rms(r)) * r`, with r the
  gradient of WDR there. Whatever the loss, kappa = 1 makes WDR as strong as
  the loss in every layer, which no absolute strength can.

  The gradient of the sharp WDR by Theta is at most 1, and is added as it is,
  times `kappa * rms(g)`. Over its rms, which shrinks as latents settle, it
  would hold the last of them to whatever codes they have just then.
  `tern_jax.relative` is this class.

  Args:
    kappa: number >= 0, traced array, or a schedule.

  >>> Relative(0.5)
  relative(kappa=0.5)
  """

  kappa: Scalar | Schedule

  def __post_init__(self):
    check_strength("kappa", self.kappa)

  def is_on(self, count: Array) -> Array | bool:
    """Whether kappa is positive."""
    return at(self.kappa, count) > 0

  def factor(
    self, u: Array, r: Array, count: Array, share: Array, bound: float | None
  ) -> Array:
    """Returns kappa * share * rms(u) / rms(r)."""
    # The ratio of norms is the ratio of root mean squares.
    size = _norm(r) if bound is None else bound * r.size**0.5
    kappa = share.astype(r.dtype) * at(self.kappa, count, r.dtype)
    # Weights that are all 0, or all at the barrier, have no gradient to scale.
    return jnp.where(
      size > 0, kappa * _norm(u) / jnp.where(size > 0, size, 1), 0
    )

  def __repr__(self) -> str:
    """Prints the call that makes it."""
    return call_repr(self, "relative")


@dataclasses.dataclass(frozen=True, repr=False)
class LateKappa:
  """The schedule of kappa that stops codes from changing at the end of a run.

  0 before `onset`, then exponential from `first` to `last` at `full`, then
  constant: the loss has chosen the codes by then, WDR makes them stay.

  Whether they are worth keeping shows in the 1 % of the steps before the onset.
  Where many nonzeros have changed places by then, in small nets or at many
  zeros, codes keep changing at random, and it is best to stop that early. Where
  few have, the loss still improves the codes, and a strong WDR would stop it.
  `wdr_transform` therefore uses the share `min(1, c / churn)` of kappa, with c
  the share of all nonzeros that were zeros then. `tern_jax.late_kappa` is this
  class.

  Args:
    steps: training steps of the whole run.
    onset: share of the run at which WDR sets in.
    full: share of the run at which it has its full strength.
    first: kappa at the onset.
    last: kappa at full strength.
    churn: share of the nonzeros in (0, 1) that must be new in that time for
      all of kappa to be used; None always uses it.

  >>> kappa = LateKappa(1000)
  >>> [round(float(kappa(n)), 3) for n in (699, 700, 950, 1000)]
  [0.0, 0.1, 30.0, 30.0]
  """

  steps: int
  onset: float = 0.7
  full: float = 0.95
  first: float = 0.1
  last: float = 30.0
  churn: float | None = 0.15

  def __post_init__(self):
    check_range("steps", self.steps, 1, float("inf"), "count training steps")
    check_range("onset", self.onset, 0, self.full, "it comes before full")
    check_range("churn", self.churn, 1e-9, 1, "it is a share of the nonzeros")

  def __call__(self, count: Count) -> Array:
    """Returns kappa at a step."""
    done = jnp.asarray(count, jnp.float32) / self.steps
    share = jnp.clip((done - self.onset) / (self.full - self.onset), 0, 1)
    kappa = self.first * (self.last / self.first) ** share
    return jnp.where(done < self.onset, 0.0, kappa)

  @property
  def ahead(self) -> int:
    """Steps before the onset from which on changes of codes are counted."""
    return max(round(self.steps / 100), 1)

  @property
  def counts_churn(self) -> bool:
    """Whether what changes before the onset matters, and can be seen."""
    return self.churn is not None and self.onset * self.steps > self.ahead

  def share(self, exchanged: Array) -> Array:
    """Returns the share of kappa for that share of nonzeros that are new."""
    assert self.churn is not None
    return jnp.minimum(exchanged / self.churn, 1)

  def __repr__(self) -> str:
    """Prints the call that makes it."""
    return call_repr(self, "late_kappa")


relative = Relative
late_kappa = LateKappa


def strength_of(strength: Strength | Scalar | Schedule) -> Strength:
  """Returns the strength that users give, as an object."""
  return strength if isinstance(strength, Strength) else Absolute(strength)


def check_strength(name: str, strength: Scalar | Schedule) -> None:
  """Raises a ValueError if a concrete strength is negative."""
  check_range(
    name, strength, 0, float("inf"), "WDR is added to a loss; try 1e-3"
  )


def _norm(x: Array) -> Array:
  return jnp.sqrt(jnp.sum(jnp.square(x)))
