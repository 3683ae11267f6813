"""The contract of a ternarization method."""

import abc
import dataclasses

from tern_jax.core.checks import call_repr
from tern_jax.core.containers import Array, Arrays, Ternary


@dataclasses.dataclass(frozen=True, repr=False)
class Ternarizer(abc.ABC):
  """One ternarization method, seen by one weight array at a time.

  A subclass is a frozen dataclass. Its fields are hyper-parameters: Python
  numbers, or traced arrays, so that a sweep over them is one `jax.vmap`. Its
  methods are pure functions. A field `channel_axis`, if it has one, is what
  `reduced_axes` takes; for groups it is replaced by a tuple of axes.
  """

  @property
  def soft(self) -> bool:
    """Whether the training forward is not yet ternary.

    Every other method's forward equals its discretization bit for bit.
    """
    return False

  def latent(self, w: Array) -> Array:
    """Returns the latent array to train, given the user's initial weights."""
    return w

  @abc.abstractmethod
  def init(self, w: Array) -> tuple[Arrays, Arrays]:
    """Returns (trainable scales, non-trainable state) for initial weights."""

  @abc.abstractmethod
  def __call__(self, w: Array, scales: Arrays, state: Arrays) -> Array:
    """Returns the effective weights of the training forward from latents."""

  @abc.abstractmethod
  def discretize(self, w: Array, scales: Arrays, state: Arrays) -> Ternary:
    """Returns the ternary weights that the latents stand for."""

  def after_step(
    self, w: Array, scales: Arrays, state: Arrays
  ) -> tuple[Arrays, Arrays]:
    """Returns (scales, state) for the next step: clamps, targets."""
    del w
    return scales, state

  def refresh(
    self, w: Array, scales: Arrays, state: Arrays
  ) -> tuple[Arrays, Arrays]:
    """Returns (scales, state) that fit these latents, before discretizing.

    A target is followed every few steps only; this meets it exactly, also for
    latents that training did not leave there, such as moving averages.
    """
    del w
    return scales, state

  def invert(
    self, ternary: Ternary, count: Array
  ) -> tuple[Array, Arrays, Arrays]:
    """Returns (latents, scales, state) of which these weights are the codes.

    Optional: `from_packed` needs it. Latents lie well inside their basins, so
    that neither `after_step` nor `refresh` changes a code. Those of one code
    are equal, or nearly so: what moves first is for the loss to say.

    Args:
      ternary: weights, with scales of the shape that `discretize` gives them.
      count: int32, 0-d, step at which schedules stand.

    Raises:
      ValueError: the method cannot make such weights.
    """
    del ternary, count
    raise ValueError(
      f"{self!r} cannot continue ternary weights: it defines no `invert`."
    )

  def __repr__(self) -> str:
    """Prints the call that made the method: fields that are not defaults."""
    return call_repr(self)
