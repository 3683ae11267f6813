"""Where WDR acts: on latents of tanh, or on the weights themselves.

On the weights w of a layer, WDR is half the squared distance to the ternary
weights that they stand for,

  `R(w) = sum_i (w_i - s c_i)^2 / 2`, `c = sign(w) 1[|w| > b]`,

with the scale `s = mean of |w| over |w| > b`, which is the best one for these
codes. Hence the gradient is `w - s c`, as if s were a constant: the derivative
of R by s is 0 there.
"""

import abc
import dataclasses

import jax
import jax.numpy as jnp

from tern_jax.core.numerics import reduced_axes, widen
from tern_jax.core.types import Array, ChannelAxis, PyTree
from tern_jax.regularizers.barriers import Barrier, FixedAlpha
from tern_jax.regularizers.formulas import wdr_barrier, wdr_grad


class Space(abc.ABC):
  """How the gradient of WDR follows from a parameter and its barrier."""

  #: Whether a `late_kappa` does less where few codes change: right where the
  #: forward pass is ternary anyway.
  holds_back = True
  #: The step along the gradient that leads to the codes, if one does: a
  #: decoupled WDR never goes beyond.
  reach = float("inf")

  @abc.abstractmethod
  def edges(self, kept: PyTree, alphas: PyTree) -> PyTree:
    """Returns for each leaf what tells `grad` its barrier.

    Args:
      kept: thresholds, () where alpha was given.
      alphas: those that were given, or those of the thresholds.
    """

  @abc.abstractmethod
  def grad(self, x: Array, edge: Array) -> tuple[Array, float | None]:
    """Returns the gradient by one layer, and its bound.

    The bound is the largest size of an entry, if the gradient shrinks as
    parameters settle and is to be taken as it is; None for none.
    """


@dataclasses.dataclass(frozen=True)
class Latents(Space):
  """Parameters are latents, gain times which is the Theta of W = tanh(Theta).

  An edge is an alpha.
  """

  gain: float
  sharp: bool

  def edges(self, kept: PyTree, alphas: PyTree) -> PyTree:
    """Returns the alphas."""
    del kept
    return alphas

  def grad(self, x: Array, edge: Array) -> tuple[Array, float | None]:
    """Returns dR/dx of R(tanh(gain * x))."""
    r = self.gain * wdr_grad(self.gain * widen(x), edge, self.sharp)
    return r, self.gain if self.sharp else None


@dataclasses.dataclass(frozen=True)
class Weights(Space):
  """Parameters are the weights that the model uses.

  An edge is an alpha, or the magnitude b that separates zeros from nonzeros.
  """

  channel_axis: ChannelAxis
  by_alpha: bool

  #: The forward pass is float until WDR has made the weights ternary.
  holds_back = False
  reach = 1.0

  def edges(self, kept: PyTree, alphas: PyTree) -> PyTree:
    """Returns the thresholds, or the alphas where those were given."""
    return alphas if self.by_alpha else kept

  def grad(self, x: Array, edge: Array) -> tuple[Array, float | None]:
    """Returns w - s c."""
    w = widen(x)
    if self.by_alpha:
      b = barrier_of_weights(w, edge, self.channel_axis)
    else:
      b = edge.astype(w.dtype)
    codes = jnp.where(jnp.abs(w) > b, jnp.sign(w), 0)
    return w - scale_beyond(w, b, self.channel_axis) * codes, None


def scale_beyond(w: Array, edge: Array, channel_axis: ChannelAxis) -> Array:
  """Returns the mean of |w| over |w| > edge, 0 where nothing is beyond.

  0-d, or one of each channel with ones beside them.
  """
  axes = reduced_axes(w, channel_axis)
  keep = axes is not None
  magnitude = jnp.abs(w)
  beyond = magnitude > edge
  number = jnp.sum(beyond, axes, w.dtype, keepdims=keep)
  total = jnp.sum(jnp.where(beyond, magnitude, 0), axes, keepdims=keep)
  return total / jnp.maximum(number, 1)


def barrier_of_weights(
  w: Array, alpha: Array, channel_axis: ChannelAxis = None
) -> Array:
  """Finds the barrier `b = s sqrt(alpha / 2)` that fits its own scale s.

  In units of the scale, `W = w / s`, it is the barrier of the latents' WDR. As
  s is the mean of |w| over |w| > b, either follows from the other, and the
  least pair of the two is taken. With the magnitudes in descending order and
  m_k the mean of the first k, it is `s = m_k` of the largest k whose magnitude
  is beyond `m_k sqrt(alpha / 2)`. It is found without sorting: from b = 0 on, s
  and b rise until no more weight falls below b, which takes a few passes.

  Args:
    w: float, any shape.
    alpha: 0-d, in [0, 2).
    channel_axis: as of `TWN`.

  Returns:
    b, in the precision of the maths, 0-d or one of each channel.

  >>> w = jnp.array([0.01, -0.02, 0.9, -1.1])
  >>> round(float(barrier_of_weights(w, jnp.array(0.5))), 6)
  0.5
  """
  w, ratio = widen(w), wdr_barrier(alpha)

  def rises(at: tuple[Array, Array]) -> Array:
    before, now = at
    return jnp.any(now > before)

  def rise(at: tuple[Array, Array]) -> tuple[Array, Array]:
    _, now = at
    return now, jnp.maximum(now, scale_beyond(w, ratio * now, channel_axis))

  first = scale_beyond(w, jnp.zeros((), w.dtype), channel_axis)
  _, s = jax.lax.while_loop(rises, rise, (jnp.full_like(first, -1), first))
  return ratio * s


def space_of(
  space: str, barrier: Barrier, sharp: bool, channel_axis: ChannelAxis
) -> Space:
  """Returns the space that users name.

  Raises:
    ValueError: it is neither "latents" nor "weights", or latents are given a
      channel_axis.
  """
  if space == "weights":
    return Weights(channel_axis, isinstance(barrier, FixedAlpha))
  if space != "latents":
    raise ValueError(
      f'space must be "latents", for a model that applies tanh to them, or'
      f' "weights", for one that uses its weights as they are; got {space!r}.'
    )
  if channel_axis is not None:
    raise ValueError(
      f"channel_axis={channel_axis} is for scales, which only"
      ' space="weights" has: leave it out.'
    )
  return Latents(barrier.gain, sharp)
