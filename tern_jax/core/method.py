"""The contract of a ternarization method."""

import abc
import dataclasses
from typing import TYPE_CHECKING, Any, TypeVar

from tern_jax.core.checks import call_repr
from tern_jax.core.containers import Ternary
from tern_jax.core.types import Array, Arrays, ChannelAxis, Floats

_Method = TypeVar("_Method", bound="Ternarizer")


class Ternarizer(abc.ABC):
  """One ternarization method, seen by one weight array at a time.

  A subclass is a frozen dataclass, made with `repr=False`. Its fields are
  hyper-parameters: Python numbers, or traced arrays, so that a sweep over them
  is one `jax.vmap`. Its methods are pure functions. A method that finds its
  threshold anew every few steps, or has a target for its sparsity, subclasses
  `tern_jax.Targeted` instead.

  Attributes:
    channel_axis: None for one scale a tensor, else the axis with one scale for
      each index. What `group_size` divides: for groups it is replaced by a
      tuple of axes, as `numerics.reduced_axes` takes.
    sparsity: None, or the asked share of zeros. `ParamTransform` replaces a
      target per layer or across layers by that of the leaf.
    every: steps between two updates of what a target asks for; the state has
      the "count" of steps then.
  """

  # Defaults, no fields: a subclass that lets users choose one of these has it
  # as a field of its own, which is read-only as a frozen dataclass is.
  if TYPE_CHECKING:

    @property
    def channel_axis(self) -> ChannelAxis: ...  # noqa: D102
    @property
    def sparsity(self) -> Any: ...  # noqa: D102
    @property
    def every(self) -> Array | int: ...  # noqa: D102

  else:
    channel_axis, sparsity, every = None, None, 10

  @property
  def soft(self) -> bool:
    """Whether the training forward is not yet ternary.

    Every other method's forward equals its discretization bit for bit.
    """
    return False

  def latent(self, w: Floats) -> Floats:
    """Returns the latent array to train, given the user's initial weights."""
    return w

  @abc.abstractmethod
  def init(self, w: Floats) -> tuple[Arrays, Arrays]:
    """Returns (trainable scales, non-trainable state) for initial weights."""

  @abc.abstractmethod
  def __call__(self, w: Floats, scales: Arrays, state: Arrays) -> Floats:
    """Returns the effective weights of the training forward from latents."""

  @abc.abstractmethod
  def discretize(self, w: Floats, scales: Arrays, state: Arrays) -> Ternary:
    """Returns the ternary weights that the latents stand for."""

  def after_step(
    self, w: Floats, scales: Arrays, state: Arrays
  ) -> tuple[Arrays, Arrays]:
    """Returns (scales, state) for the next step: clamps, targets."""
    del w
    return scales, state

  def refresh(
    self, w: Floats, scales: Arrays, state: Arrays
  ) -> tuple[Arrays, Arrays]:
    """Returns (scales, state) that fit these latents, before discretizing.

    A target is followed every few steps only; this meets it exactly, also for
    latents that training did not leave there, such as moving averages.
    """
    del w
    return scales, state

  def invert(
    self, ternary: Ternary, count: Array
  ) -> tuple[Floats, Arrays, Arrays]:
    """Returns latents, scales and state that `discretize` maps to weights.

    Optional: `from_packed` needs it. Latents lie well inside their basins, so
    that neither `after_step` nor `refresh` changes a code. Those of one code
    are equal, or nearly so: the loss decides which weights change first.

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

  def replace(self: _Method, **changes: object) -> _Method:
    """Returns a copy with the named hyper-parameters replaced."""
    return dataclasses.replace(self, **changes)  # pyrefly: ignore

  def __repr__(self) -> str:
    """Prints the call that made the method: fields that are not defaults."""
    return call_repr(self)
