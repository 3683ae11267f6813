"""Methods that follow a target: the one home of `sparsity` and `every`."""

import abc
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp

from tern_jax.core.checks import check_range, concrete
from tern_jax.core.method import Ternarizer
from tern_jax.core.types import Array, Arrays, Floats, Scalar
from tern_jax.targets.quantile import count_of, magnitude_threshold
from tern_jax.targets.schedules import at, check_sparsity, look_at


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
    return {"count": count, **self.measure(w, scales, Look(count))}

  def after_step(
    self, w: Floats, scales: Arrays, state: Arrays
  ) -> tuple[Arrays, Arrays]:
    """Returns (scales, state) for the next step: measures, then projects."""
    if self.measures:
      old = {**state, "count": state["count"] + 1}
      due, tolerance = look_at(self.every, self.sparsity, old["count"])
      if self.frozen is not False:
        due &= jnp.logical_not(self.frozen)
      state = jax.lax.cond(
        due, lambda: self._measured(w, scales, old, tolerance), lambda: old
      )
    return self.project(w, scales, state), state

  def refresh(
    self, w: Floats, scales: Arrays, state: Arrays
  ) -> tuple[Arrays, Arrays]:
    """Returns (scales, state) that meet the target exactly at these latents."""
    if not self.measures:
      return scales, state
    now = self._measured(w, scales, state, 0.0)
    if self.frozen is not False:
      now = {k: jnp.where(self.frozen, state[k], now[k]) for k in state}
    return scales, now

  def asked(self, count: Array) -> Array:
    """Returns the asked share of zeros at a step, float32, 0-d."""
    assert self.sparsity is not None
    return at(self.sparsity, count)

  def quantile(self, x: Floats, look: Look, held: Arrays | None) -> Array:
    """Returns the threshold that the asked share of |x| lies under, float32.

    The search starts at the least "threshold" of the state held.
    """
    guess = None if held is None else jnp.min(held["threshold"])
    asked = self.asked(look.count)
    return magnitude_threshold(x, asked, guess, look.tolerance)

  def check_zeros(self, codes: Array, count: Array) -> None:
    """Raises a ValueError unless codes have the zeros of the target, if any.

    They may have up to 1 % more, as ties among coarse latents leave. Traced
    codes pass.
    """
    if self.sparsity is None:
      return
    asked, n = self.asked(count), codes.size
    if not (concrete(codes) and concrete(asked)):
      return
    zeros, wanted = int(jnp.sum(codes == 0)), int(count_of(n, asked))
    if not wanted <= zeros <= wanted + 0.01 * n:
      moment = f" at step {count}" if callable(self.sparsity) else ""
      raise ValueError(
        f"{zeros} of {n} weights are zero, but {wanted} are asked for by"
        f" sparsity={self.sparsity}{moment}: give sparsity={zeros / n}, or a"
        " method without a target."
      )

  def _measured(
    self, w: Floats, scales: Arrays, state: Arrays, tolerance: Scalar
  ) -> Arrays:
    look = Look(state["count"], tolerance)
    return {**state, **self.measure(w, scales, look, state)}
