"""Strengths of WDR: absolute, or relative to the gradient, late in a run."""

import abc
import dataclasses

import jax.numpy as jnp

from tern_jax.core.checks import call_repr, check_range
from tern_jax.core.types import Array, Count, Scalar, Schedule
from tern_jax.regularizers.formulas import is_scalar_or_schedule
from tern_jax.targets.schedules import at

#: Late, and in the end stronger than the loss, as rounding asks for.
_TRY = "try optax.linear_schedule(0.0, 1.0, 0.6 * steps, 0.2 * steps)"


class Strength(abc.ABC):
  """How much of the gradient r of WDR `wdr_transform` adds to an update u.

  Of a strength that is held back while codes still improve, only shares are
  used, float32 [2]: see `LateKappa`.
  """

  def is_on(self, count: Array, shares: Array) -> Array | bool:
    """Whether anything is added at an update; True for always."""
    del count, shares
    return True

  @abc.abstractmethod
  def factor(
    self, u: Array, r: Array, count: Array, shares: Array, bound: float | None
  ) -> Array:
    """Returns the factor of r for one layer, in its precision.

    The bound is the largest |r| there can be, if r shrinks as latents settle.
    """


@dataclasses.dataclass(frozen=True)
class Absolute(Strength):
  """The paper's lambda: a number, a traced array or a schedule."""

  strength: Scalar | Schedule

  def __post_init__(self):
    if isinstance(self.strength, LateKappa):
      raise TypeError(
        f"strength={self.strength!r} is a schedule of kappa, which is relative"
        f" to the gradient: give tern_jax.relative({self.strength!r})."
      )
    check_strength("strength", self.strength, _TRY)

  def factor(
    self, u: Array, r: Array, count: Array, shares: Array, bound: float | None
  ) -> Array:
    """Returns lambda."""
    del u, shares, bound
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
    check_strength("kappa", self.kappa, "try tern_jax.late_kappa(steps)")

  def is_on(self, count: Array, shares: Array) -> Array | bool:
    """Whether kappa is positive."""
    return self._kappa(count, shares) > 0

  def factor(
    self, u: Array, r: Array, count: Array, shares: Array, bound: float | None
  ) -> Array:
    """Returns kappa * rms(u) / rms(r)."""
    # The ratio of norms is the ratio of root mean squares. Smaller norms have
    # lost their digits, and over them the ratio could overflow.
    size = _norm(r) if bound is None else bound * r.size**0.5
    size = jnp.maximum(size, float(jnp.finfo(r.dtype).tiny) ** 0.5)
    kappa = self._kappa(count, shares).astype(r.dtype)
    return kappa * _norm(u) / size

  def _kappa(self, count: Array, shares: Array) -> Array:
    if isinstance(self.kappa, LateKappa):
      return self.kappa.used(count, shares)
    return at(self.kappa, count)

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
  zeros, codes keep changing at random, and it is best to stop that. Where few
  have, the loss still improves the codes, and a strong WDR would stop it.
  `wdr_transform` therefore uses the share `min(1, c / churn)` of kappa, with c
  the share of all nonzeros that were zeros then.

  Where codes change at random, the sooner it ends the better the net learns
  with those that it has. At `early` changes are therefore counted, too, and the
  share `(c / churn - 0.4) / 0.25`, from 0 to 1, of a kappa that rises from
  there on to the same `last` is used where it is more.

  In `space="weights"`, where the forward is float until WDR has made it
  ternary, it always uses all of kappa, from the onset on.
  `tern_jax.late_kappa` is this class.

  Args:
    steps: training steps of the whole run.
    onset: share of the run at which WDR sets in.
    full: share of the run at which it has its full strength.
    first: kappa at the onset.
    last: kappa at full strength.
    churn: share of the nonzeros in (0, 1) that must be new in that time for
      all of kappa to be used; None always uses it, from the onset on.
    early: share of the run at which WDR sets in where codes change at random;
      None, or what is not before the onset, for the onset.

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
  early: float | None = 0.3

  def __post_init__(self):
    check_range("steps", self.steps, 1, float("inf"), "count training steps")
    check_range("onset", self.onset, 0, self.full, "it comes before full")
    check_range("churn", self.churn, 1e-9, 1, "it is a share of the nonzeros")
    check_range("early", self.early, 0, 1, "it is a share of the run")

  def __call__(self, count: Count) -> Array:
    """Returns kappa at a step, all that is used from the onset on."""
    return self._risen(self.onset, count)

  def used(self, count: Count, shares: Array) -> Array:
    """Returns kappa at a step, by its shares from early on and the onset."""
    early, onset = self._begin
    kappa = shares[0] * self._risen(early, count)
    return jnp.maximum(kappa, shares[1] * self._risen(onset, count))

  def _risen(self, begin: float, count: Count) -> Array:
    """Returns the kappa that begins at a share of the run."""
    done = self._done(count)
    share = jnp.clip((done - begin) / (self.full - begin), 0, 1)
    kappa = self.first * (self.last / self.first) ** share
    return jnp.where(done < begin, 0.0, kappa)

  def _done(self, count: Count) -> Array:
    return jnp.asarray(count, jnp.float32) / self.steps

  @property
  def _begin(self) -> tuple[float, float]:
    """Shares of the run, early and the onset, which may be the same."""
    early = self.onset if self.early is None else min(self.early, self.onset)
    return (early if self._seen(early) else self.onset), self.onset

  def _seen(self, begin: float) -> bool:
    return self.churn is not None and begin * self.steps > self.ahead

  @property
  def ahead(self) -> int:
    """Steps before the onset from which on changes of codes are counted."""
    return max(round(self.steps / 100), 1)

  @property
  def counts_churn(self) -> bool:
    """Whether what changes before the onset matters, and can be seen."""
    return self._seen(self.onset)

  def begins(self, count: Array) -> Array:
    """Whether a step is the first from early on, and from the onset on."""
    before, now = self._done(count - 1), self._done(count)
    return jnp.stack([(before < x) & (now >= x) for x in self._begin])

  def shares(self, exchanged: Array) -> Array:
    """Returns the shares of kappa for that share of nonzeros that are new."""
    assert self.churn is not None
    times = exchanged / self.churn
    early = jnp.clip((times - 0.4) / 0.25, 0, 1)
    return jnp.stack([early, jnp.minimum(times, 1)])

  def __repr__(self) -> str:
    """Prints the call that makes it."""
    return call_repr(self, "late_kappa")


relative = Relative
late_kappa = LateKappa


def strength_of(strength: Strength | Scalar | Schedule) -> Strength:
  """Returns the strength that users give, as an object."""
  return strength if isinstance(strength, Strength) else Absolute(strength)


def check_strength(name: str, strength: Scalar | Schedule, hint: str) -> None:
  """Raises unless a strength is a number >= 0, an array or a schedule.

  Raises:
    TypeError: it is nothing of that kind.
    ValueError: a concrete strength is negative.
  """
  if not is_scalar_or_schedule(strength):
    raise TypeError(
      f"{name} must be a number, an array or a schedule of the step, got"
      f" {strength!r}: {hint}."
    )
  check_range(name, strength, 0, float("inf"), f"WDR is added; {hint}")


def _norm(x: Array) -> Array:
  return jnp.sqrt(jnp.sum(jnp.square(x)))
