"""Methods that follow a target: the one home of `sparsity` and `every`."""

import abc
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp

from tern_jax.core.checks import check_range, concrete
from tern_jax.core.method import Ternarizer
from tern_jax.core.numerics import either
from tern_jax.core.types import Array, Arrays, Floats, Scalar
from tern_jax.targets.quantile import (
  NO_CUT,
  beyond,
  codes_beyond,
  magnitude_threshold,
  split,
)
from tern_jax.targets.schedules import at, check_sparsity, look_at, zeros_at


class Look(NamedTuple):
  """At which step latents are measured, and how closely."""

  count: Array  # int32, 0-d
  tolerance: Scalar = 0.0  # share of the weights by which it may be missed


class Targeted(Ternarizer):
  """A method that measures its latents every few steps, at a target or not.

  A subclass says in `measure` what it finds: a threshold, which a target asks
  for, a scale, a floor. What was found is kept in the state, beside the step
  count, until the next time. `ParamTransform` gives each leaf its own target
  by replacing `sparsity`.

  `split` finds what a target asks for, and `beyond` and `codes` compare with
  it: the asked number of weights is zero then, to the weight, also where many
  have one magnitude.

  Attributes:
    every: steps between two measurements; in the last 5 % of a `ramp`'s run
      each step measures.
    frozen: True or a traced array: what was found stays as it is.
  """

  if TYPE_CHECKING:

    @property
    def frozen(self) -> Array | bool: ...  # noqa: D102

  else:
    frozen = False

  def __post_init__(self):
    check_sparsity(self.sparsity)
    check_range("every", self.every, 1, float("inf"), "count training steps")

  @property
  def measures(self) -> bool:
    """Whether anything is measured; if not, the state has no count."""
    return True

  @abc.abstractmethod
  def measure(
    self, w: Floats, scales: Arrays, look: Look, held: Arrays | None = None
  ) -> Arrays:
    """Returns what these latents ask for, to be kept in the state.

    Args:
      w: float, any shape, latents.
      scales: trained scales, {} before there are any.
      look: at which step, and how closely.
      held: the state so far, where a search may start; None at first.

    Returns:
      {name: array}, the same names, shapes and dtypes at each call.
    """

  def project(self, w: Floats, scales: Arrays, state: Arrays) -> Arrays:
    """Returns the scales within their bounds, after each update."""
    del w, state
    return scales

  def state_at(
    self, w: Floats, scales: Arrays, count: Array | int = 0
  ) -> Arrays:
    """Returns the state of a step: its count, and what is measured there."""
    count = jnp.asarray(count, jnp.int32)
    seen = self.measure(self._stored(w), scales, Look(count))
    return {"count": count, **seen}

  def after_step(
    self, w: Floats, scales: Arrays, state: Arrays
  ) -> tuple[Arrays, Arrays]:
    """Returns (scales, state) for the next step: measures, then projects."""
    if self.measures:
      old = {**state, "count": state["count"] + 1}
      due, tolerance = look_at(self.every, self.sparsity, old["count"])
      if self.frozen is not False:
        due &= jnp.logical_not(self.frozen)

      def look() -> Arrays:
        now = self._measured(w, scales, old, tolerance)
        # A state from before there were cuts goes on without one.
        return {name: now[name] for name in old}

      state = either(due, look, lambda: old)
    return self.project(w, scales, state), state

  def refresh(
    self, w: Floats, scales: Arrays, state: Arrays
  ) -> tuple[Arrays, Arrays]:
    """Returns (scales, state) that meet the target exactly at these latents."""
    if not self.measures:
      return scales, state
    now = self._measured(w, scales, state, 0.0)
    if self.frozen is not False:
      held = {**now, **state}
      now = {k: jnp.where(self.frozen, held[k], x) for k, x in now.items()}
    return scales, now

  def asked(self, count: Array) -> Array:
    """Returns the asked share of zeros at a step, float32, 0-d."""
    assert self.sparsity is not None
    return at(self.sparsity, count)

  def zeros_of(self, count: Array, n: int) -> Array:
    """Returns how many of n weights are asked to be zero, int32, 0-d."""
    assert self.sparsity is not None
    return zeros_at(self.sparsity, count, n)

  def quantile(self, x: Floats, look: Look, held: Arrays | None) -> Array:
    """Returns the threshold that the asked share of |x| lies under, float32.

    More do where several magnitudes equal it; `split` tells which of them.
    The search starts at the least "threshold" of the state held.
    """
    guess = (
      None if held is None else jnp.min(held["threshold"], initial=jnp.inf)
    )
    asked = self.asked(look.count)
    return magnitude_threshold(x, asked, guess, look.tolerance)

  def split(self, x: Floats, look: Look, held: Arrays | None) -> Arrays:
    """Returns a "threshold" and "cut" that the asked number of |x| lie under.

    They go into the state. The cut is the first flat index at which a magnitude
    that equals the threshold is not under it: the first of those that tie are
    zero. The search starts at the least "threshold" of the state held.
    """
    guess = (
      None if held is None else jnp.min(held["threshold"], initial=jnp.inf)
    )
    zeros = self.zeros_of(look.count, x.size)
    return split(x, zeros, guess, look.tolerance)

  def beyond(self, x: Floats, state: Arrays) -> Array:
    """Returns which |x| lie beyond what `split` put into the state, bool."""
    return beyond(x, state["threshold"], state.get("cut"))

  def codes(self, x: Floats, state: Arrays) -> Floats:
    """Returns sign(x) beyond what `split` put into the state, else 0.

    A zero that must not be zero has the code of its sign bit, 1 but for -0.
    """
    return codes_beyond(x, state["threshold"], state.get("cut"))

  def halfway(self, size: Array, count: Array) -> Arrays:
    """Returns the state of latents that are 0 or of magnitude size, 0-d.

    What `invert` needs of a sparsity: the threshold between the two.
    """
    threshold = (size / 2).astype(jnp.float32)
    cut = jnp.asarray(NO_CUT, jnp.int32)
    return {"count": count, "cut": cut, "threshold": threshold}

  def check_zeros(self, codes: Array, count: Array) -> None:
    """Raises a ValueError unless codes have the zeros of the target, if any.

    Traced codes pass.
    """
    if self.sparsity is None:
      return
    asked, n = self.zeros_of(count, codes.size), codes.size
    if not (concrete(codes) and concrete(asked)):
      return
    zeros, wanted = int(jnp.sum(codes == 0)), int(asked)
    if zeros != wanted:
      moment = f" at step {count}" if callable(self.sparsity) else ""
      raise ValueError(
        f"{zeros} of {n} weights are zero, but {wanted} are asked for by"
        f" sparsity={self.sparsity}{moment}: give sparsity={zeros / max(n, 1)},"
        " or a method without a target."
      )

  def _measured(
    self, w: Floats, scales: Arrays, state: Arrays, tolerance: Scalar
  ) -> Arrays:
    look = Look(state["count"], tolerance)
    return {**state, **self.measure(self._stored(w), scales, look, state)}

  def _stored(self, w: Floats) -> Floats:
    # What a forward will read: a compiler that fuses the update of the weights
    # into the search may leave out their rounding, and break the count.
    return w if self.sparsity is None else jax.lax.optimization_barrier(w)
