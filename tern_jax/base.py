"""The contract of a ternarizer, and the three containers that flow through it.

Data flows one way: latent parameters are ternarized, ternary weights are
packed, packed weights are saved or exported.
"""

import abc
import dataclasses
import math
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

Array = jax.Array
#: A dict of named arrays that a method keeps for one weight array.
Arrays = dict[str, Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Ternary:
  """Ternary weights: codes in {-1, 0, +1} and their two magnitudes.

  The dense weight is `w_p` where the code is +1, `-w_n` where it is -1 and 0
  elsewhere. The granularity is the scales' shape: 0-d for one scale a tensor;
  else the rank of `codes` with axis lengths that divide those of `codes`: 1 for
  one scale along the axis, n / g for one for each g consecutive weights.

  Args:
    codes: int8, any shape, values in {-1, 0, 1}.
    w_p: float, magnitude of the +1 weights.
    w_n: float, magnitude of the -1 weights, of the dtype of w_p.

  >>> t = Ternary(jnp.array([1, 0, -1], jnp.int8), jnp.array(2.), jnp.array(3.))
  >>> t.dequantize().tolist()
  [2.0, 0.0, -3.0]
  >>> groups = jnp.array([2., 5.])
  >>> Ternary(jnp.ones(4, jnp.int8), groups, groups).dequantize().tolist()
  [2.0, 2.0, 5.0, 5.0]
  """

  codes: Array
  w_p: Array
  w_n: Array

  @property
  def shape(self) -> tuple[int, ...]:
    """Shape of the weights."""
    return self.codes.shape

  @property
  def dtype(self) -> np.dtype:
    """Dtype of the dense weights."""
    return self.w_p.dtype

  def dequantize(self) -> Array:
    """Returns the dense weights, of the shape of codes and dtype of w_p."""
    return dense(self.codes, self.w_p, self.w_n)


def dense(codes: Array, w_p: Array, w_n: Array) -> Array:
  """Returns w_p where a code is +1, -w_n where it is -1, 0 elsewhere.

  Args:
    codes: int8 or float, any shape, values in {-1, 0, 1}.
    w_p: float, of a granularity of `Ternary`.
    w_n: float, of the dtype of w_p.

  Returns:
    Shape of codes, dtype of w_p.
  """
  # Codes are compared in float: XLA:CPU miscompiles some fused int8 maths.
  c = codes.astype(w_p.dtype)
  w_p, w_n = (_repeat(s, codes.shape) for s in (w_p, w_n))
  zero = jnp.zeros((), w_p.dtype)
  return jnp.where(c > 0, w_p, jnp.where(c < 0, -w_n, zero))


def _repeat(scale: Array, shape: tuple[int, ...]) -> Array:
  """Makes a scale of any granularity broadcastable to the shape of weights."""
  for axis in range(-scale.ndim, 0):
    n, size = scale.shape[axis], shape[axis]
    if n not in (1, size):
      scale = jnp.repeat(scale, size // n, axis)
  return scale


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TernParams:
  """What the optimizer trains: latent weights and, beside them, their scales.

  Args:
    latent: the user's own parameter tree, of the user's own structure.
    scales: `{path: {name: array}}` for the ternarized leaves.
  """

  latent: Any
  scales: Any

  def replace(self, **changes: Any) -> "TernParams":
    """Returns a copy with the named fields replaced."""
    return dataclasses.replace(self, **changes)


#: Prefix tree of labels for `optax.partition`: {"latent": tx, "scales": tx}.
LABELS = TernParams(latent="latent", scales="scales")


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


def call_repr(obj: Any, name: str | None = None) -> str:
  """Returns the shortest call that makes a dataclass instance again.

  Args:
    obj: dataclass instance.
    name: of the function that makes it, if that is not its class.

  >>> @dataclasses.dataclass(repr=False)
  ... class Point:
  ...   x: int = 0
  ...   y: int = 0
  >>> call_repr(Point(y=3))
  'Point(y=3)'
  """

  def differs(field: dataclasses.Field) -> bool:
    value = getattr(obj, field.name)
    if field.default is dataclasses.MISSING:
      return True
    same_kind = type(value) is type(field.default)
    return not (same_kind and value == field.default)

  shown = [
    f"{f.name}={getattr(obj, f.name)!r}"
    for f in dataclasses.fields(obj)
    if f.init and differs(f)
  ]
  return f"{name or type(obj).__name__}({', '.join(shown)})"


def least_scale(dtype: DTypeLike) -> float:
  """Where trained magnitudes stop shrinking.

  Not the least number of the dtype: products of gradients with weights of that
  size would vanish, and the magnitude could never grow again.

  >>> least_scale(jnp.float32)
  1e-12
  """
  return max(1e-12, float(jnp.finfo(dtype).tiny))


def scale_floor(start: Array) -> Array:
  """Where a trained magnitude stops shrinking: a tenth of where it starts.

  Behind a normalization layer the loss does not depend on a magnitude, so Adam
  lets it wander; close to 0 its layer would give nothing and learn nothing.

  >>> float(scale_floor(jnp.array(2.0)))
  0.20000000298023224
  """
  floor = start * jnp.asarray(0.1, start.dtype)
  return jnp.maximum(floor, jnp.asarray(least_scale(start.dtype), start.dtype))


def one_magnitude(ternary: Ternary, method: Ternarizer) -> Array:
  """Returns the magnitude of both signs, for a method that has only one.

  Raises:
    ValueError: the two magnitudes differ; traced ones are not looked at.

  >>> one = jnp.ones(())
  >>> float(one_magnitude(Ternary(jnp.ones(2, jnp.int8), one, one), None))
  1.0
  """
  w_p, w_n = ternary.w_p, ternary.w_n
  if concrete(w_p) and not jnp.array_equal(w_p, w_n):
    raise ValueError(
      f"{method!r} has one magnitude for both signs, but these weights have"
      f" two, up to {jnp.max(w_p):.6g} and {jnp.max(w_n):.6g}: take a method"
      " with two, such as TTQ."
    )
  return w_p


def alive(scale: Array) -> Array:
  """Magnitudes to train, where those that no weight has may be 0.

  A trained magnitude must not be 0; the largest of the array takes its place.

  >>> alive(jnp.array([[0.0, 0.5, 2.0]])).tolist(), float(alive(jnp.zeros(())))
  ([[2.0, 0.5, 2.0]], 1.0)
  """
  top = jnp.max(scale, initial=0)
  one = jnp.ones((), scale.dtype)
  return jnp.where(scale > 0, scale, jnp.where(top > 0, top, one))


def with_mean(
  codes: Array,
  mean: Array,
  dtype: DTypeLike,
  channel_axis: int | tuple[int, ...] | None = None,
) -> Array:
  """Latents of given codes and of a given mean magnitude of the nonzeros.

  The magnitudes are two neighboring multiples of a power of two, so coarse that
  sums of them are exact: a mean of many equal floats, summed one by one, would
  be off by more than its rounding, and differently in every order.

  Args:
    codes: int8, any shape, in {-1, 0, 1}.
    mean: float32 or wider, >= 0, 0-d or one for each channel.
    dtype: of the latents.
    channel_axis: as in `reduced_axes`.

  Returns:
    Shape of codes; exact for up to 2^13 nonzeros, else equal to within 2^-10.

  >>> codes = jnp.ones(6, jnp.int8)
  >>> w = with_mean(codes, jnp.array(1 + 2**-8), jnp.bfloat16)
  >>> w.tolist()
  [1.0078125, 1.0078125, 1.0078125, 1.0, 1.0, 1.0]
  """
  axes = reduced_axes(codes, channel_axis)
  keep, axes = axes is not None, axes or tuple(range(codes.ndim))
  nonzero = codes != 0
  count = jnp.sum(nonzero, axes, mean.dtype, keepdims=keep)
  exponent, size = jnp.frexp(mean)[1], jnp.frexp(count)[1]
  bits = jnp.maximum(jnp.finfo(mean.dtype).nmant - size, 10)
  bits = jnp.minimum(bits, jnp.finfo(dtype).nmant)
  unit = jnp.ldexp(jnp.ones_like(mean), exponent - 1 - bits)
  total = jnp.round(count * (mean / unit))
  low = jnp.floor(total / jnp.maximum(count, 1))
  # As many as make up the sum are one unit larger: the first of a channel.
  front = tuple(range(len(axes)))
  moved = jnp.moveaxis(nonzero, axes, front)
  n, rest = math.prod(moved.shape[: len(axes)]), moved.shape[len(axes) :]
  flat = moved.reshape(n, *rest)
  rank = jnp.cumsum(flat, 0, mean.dtype).reshape(moved.shape)
  larger = jnp.moveaxis(rank, front, axes) <= total - low * count
  magnitude = unit * (low + larger.astype(mean.dtype))
  return codes.astype(dtype) * magnitude.astype(dtype)


def widen(x: Array) -> Array:
  """Returns an array in the precision of the maths: float32, or its float64.

  >>> widen(jnp.ones(2, jnp.bfloat16)).dtype
  dtype('float32')
  """
  return x.astype(jnp.float64 if x.dtype == jnp.float64 else jnp.float32)


def rms(x: Array, channel_axis: int | tuple[int, ...] | None = None) -> Array:
  """Root mean square of an array, or of each of its channels.

  Args:
    x: float, any shape.
    channel_axis: None for one value; else one for each index of this axis, or
      of these axes.

  Returns:
    float32 or wider, 0-d, or of the rank of x with ones beside the channels.

  >>> float(rms(jnp.array([3., 4.]))), rms(jnp.ones((2, 3)), -1).shape
  (3.535533905029297, (1, 3))
  """
  axes = reduced_axes(x, channel_axis)
  squares = jnp.square(widen(x))
  return jnp.sqrt(jnp.mean(squares, axes, keepdims=axes is not None))


def reduced_axes(
  x: Array, channel_axis: int | tuple[int, ...] | None
) -> tuple[int, ...] | None:
  """Axes over which a statistic of each channel is taken; None for all.

  A statistic over None is 0-d; one over a tuple of axes keeps them as ones.

  >>> reduced_axes(jnp.ones((3, 3, 8, 16)), -1)
  (0, 1, 2)
  >>> reduced_axes(jnp.ones((3, 3, 8, 16)), (0, -1))
  (1, 2)
  """
  if channel_axis is None:
    return None
  kept = channel_axis if isinstance(channel_axis, tuple) else (channel_axis,)
  if not all(-x.ndim <= axis < x.ndim for axis in kept):
    raise ValueError(
      f"channel_axis={channel_axis} is no axis of an array of shape"
      f" {x.shape}: use -1 for the output channels of Flax kernels, 0 for"
      " Equinox weights, None for one scale a tensor."
    )
  return tuple(
    i for i in range(x.ndim) if i not in kept and i - x.ndim not in kept
  )


def path_str(path: Iterable[Any]) -> str:
  """Prints a key path of `jax.tree_util` as components joined by slashes.

  The trailing `value` under which NNX states and boxed Linen parameters hold
  their array is no component.

  >>> tree = {"Dense_0": {"kernel": 1.0}}
  >>> [path_str(p) for p, _ in jax.tree_util.tree_leaves_with_path(tree)]
  ['Dense_0/kernel']
  """
  names = [key_str(key) for key in path]
  if len(names) > 1 and names[-1] == "value":
    names.pop()
  return "/".join(names)


def key_str(key: Any) -> str:
  """Prints one key of a `jax.tree_util` key path.

  >>> key_str(jax.tree_util.SequenceKey(2)), key_str("kernel")
  ('2', 'kernel')
  """
  for attribute in ("key", "name", "idx"):
    if hasattr(key, attribute):
      return str(getattr(key, attribute))
  return str(key)


def concrete(x: Any) -> bool:
  """Says whether a value can be looked at now, that is, is not traced."""
  return not isinstance(x, jax.core.Tracer)


def check_range(
  name: str, value: Any, low: float, high: float, hint: str
) -> None:
  """Raises a ValueError unless low <= value < high; traced values pass.

  Args:
    name: what the value is called where the caller gave it.
    value: number or array; None, callables and traced arrays are not checked.
    low: least admissible value.
    high: first value that is too large.
    hint: what to do instead.

  Raises:
    ValueError: a concrete value lies outside the range or is not a number.

  >>> check_range("alpha", 3.0, 0, 2, "use alpha=0.1")
  Traceback (most recent call last):
  ValueError: alpha must lie in [0, 2), got 3.0: use alpha=0.1.
  """
  if value is None or callable(value) or not concrete(value):
    return
  v = np.asarray(value, dtype=np.float64)
  if not bool(np.all((v >= low) & (v < high))):
    raise ValueError(
      f"{name} must lie in [{low:g}, {high:g}), got {value}: {hint}."
    )
