"""Targets: a sparsity as a number, on a ramp, per layer or across layers."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import jax.numpy as jnp
from jax.typing import DTypeLike

from tern_jax.core.checks import call_repr, check_range
from tern_jax.core.paths import check_patterns, exact, matches
from tern_jax.core.types import Array, Count, Scalar, Schedule
from tern_jax.targets.quantile import count_of

#: Share of the weights by which a target may be missed while it is followed.
TOLERANCE = 1e-3
#: Share of a run, its last, in which a target on a ramp is met at each step.
_LAST = 0.05


def at(value: "Target", count: Count, dtype: DTypeLike = jnp.float32) -> Array:
  """Returns a scheduled value at a step.

  >>> float(at(0.5, 0)), float(at(lambda count: 2. * count, 3))
  (0.5, 6.0)
  """
  if isinstance(value, PerLayer | AcrossLayers):
    raise TypeError(
      f"{value!r} is the target of a tree, and this is one array: use"
      " ParamTransform, or give the array a number."
    )
  if callable(value):
    value = value(count)  # pyrefly: ignore[bad-argument-type]
  return jnp.asarray(value).astype(dtype)


def check_sparsity(sparsity: "Target | None") -> None:
  """Raises a ValueError unless a concrete sparsity lies in [0, 1)."""
  if isinstance(sparsity, Mapping):
    raise ValueError(
      f"sparsity is a dict: give tern_jax.per_layer({sparsity}) instead."
    )
  if isinstance(sparsity, PerLayer | AcrossLayers):
    return
  check_range(
    "sparsity", sparsity, 0, 1, "it is the share of zeros, for example 0.8"
  )


@dataclasses.dataclass(frozen=True, repr=False)
class Ramp:
  """Schedule made by `ramp`."""

  sparsity: Scalar
  steps: int
  until: float = 0.5
  start: float = 0.0

  def __post_init__(self):
    check_sparsity(self.sparsity)
    check_range("start", self.start, 0, 1, "it is the share of zeros at first")
    check_range("until", self.until, 1e-9, 1 + 1e-9, "it is a share of steps")
    check_range("steps", self.steps, 1, float("inf"), "count training steps")

  def __call__(self, count: Count) -> Array:
    """Returns the sparsity asked for at a step."""
    done = jnp.asarray(count, jnp.float32) / (self.until * self.steps)
    left = (1.0 - jnp.minimum(done, 1.0)) ** 3
    start = jnp.minimum(self.start, self.sparsity)
    return self.sparsity - (self.sparsity - start) * left

  def __repr__(self) -> str:
    """Prints the call that made it."""
    return call_repr(self, "ramp")


def ramp(
  sparsity: "Scalar | PerLayer | AcrossLayers",
  steps: int,
  until: float = 0.5,
  start: float = 0.0,
) -> "Target":
  """Makes a cubic schedule of sparsity up to the target, then flat.

  `s(n) = sparsity - (sparsity - start) * (1 - n / (until * steps))^3`, with
  `start` at most the sparsity. As it tells where the run ends, methods with
  such a target measure at each of the last 5 % of its steps, and meet it to the
  weight there.

  Args:
    sparsity: share of zeros in [0, 1) at the end; or shares `per_layer` or
      `across_layers`, which then all are on such a ramp.
    steps: training steps of the whole run.
    until: share of the run after which the target is reached.
    start: share of zeros at step 0. With 0 all weights are nonzero then, which
      suits a net that has learned nothing yet.

  >>> s = ramp(0.8, steps=1000)
  >>> [round(float(s(n)), 4) for n in (0, 250, 500, 1000)]
  [0.0, 0.7, 0.8, 0.8]

  Source: Zhu & Gupta, arXiv 1710.01878, equation 1.
  """
  if isinstance(sparsity, PerLayer | AcrossLayers):
    # The shares of a ramp are numbers.
    return sparsity.map(lambda share: Ramp(share, steps, until, start))  # pyrefly: ignore
  return Ramp(sparsity, steps, until, start)


@dataclasses.dataclass(frozen=True, repr=False, init=False)
class PerLayer:
  """A sparsity that is another one for each layer.

  Takes the place of a number in `SCA(sparsity=...)`, that of any other method,
  `at_sparsity` and `ramp`. `tern_jax.per_layer` is this class.

  Args:
    targets: {pattern: share of zeros in [0, 1), or a schedule of it}; patterns
      are those of `kernels`, a whole path among them, and the first that
      matches counts. `fit_budget` returns such targets. Or one share, which
      each layer is to have: {"*": share}.

  >>> PerLayer({"head": 0.5, "*": 0.9}).of("Dense_0/kernel")
  0.9
  """

  # Pairs, not a dict: a method with such a target can be hashed.
  targets: "tuple[tuple[str, Target], ...]"

  def __init__(
    self,
    targets: "Mapping[str, Target] | Iterable[tuple[str, Target]] | Scalar",
  ):
    pairs: Any = targets
    if isinstance(targets, Mapping):
      pairs = targets.items()
    elif isinstance(targets, float | int) or hasattr(targets, "dtype"):
      pairs = [("*", targets)]
    object.__setattr__(self, "targets", tuple(pairs))
    for _, target in self.targets:
      check_sparsity(target)

  def map(self, fn: "Callable[[Target], Target]") -> "PerLayer":
    """Returns the targets that a function makes of these."""
    return PerLayer((k, fn(target)) for k, target in self.targets)

  def of(self, path: str) -> "Target":
    """Returns the target of a leaf: that of the first pattern that matches.

    Or of the one that is its exact path, as `fit_budget` returns them: it would
    match leaves below that path, too.
    """
    own = exact(path)
    for pattern, target in self.targets:
      if pattern == own:
        return target
    for pattern, target in self.targets:
      if matches(pattern, path):
        return target
    raise ValueError(f"{self!r} has no target for {path}: add one.")

  def __repr__(self) -> str:
    """Prints the call that makes it."""
    return f"per_layer({dict(self.targets)})"


@dataclasses.dataclass(frozen=True, repr=False)
class AcrossLayers:
  """A sparsity that all layers together have: one threshold for all.

  Takes the place of a number in `SCA(sparsity=...)`, that of any other method,
  `at_sparsity` and `ramp`. Which share of a layer is zero then follows from the
  magnitudes of its latents beside those of the others: `SCA` gives all layers
  latents of one spread, elsewhere they are those of the initialization.
  `tern_jax.across_layers` is this class.

  With a floor, each layer keeps that share of the nonzeros that a random sparse
  network of as many has there: in proportion to the sum of the axes of its
  kernel, inputs + outputs of a dense one, and its size at most. Small layers
  and those at the end are then never left with too few.

  Args:
    sparsity: share of zeros of all selected weights in [0, 1), or a schedule.
    floor: in [0, 1]: 0 leaves all to the magnitudes, with 1 the shares follow
      from the shapes alone.

  >>> AcrossLayers(0.9)
  across_layers(sparsity=0.9)

  Source: the shares of a random sparse network, Mocanu et al., arXiv
  1707.04780, of convolutions Evci et al., arXiv 1911.11134.
  """

  sparsity: "Scalar | Schedule"
  floor: float = 0.0

  def __post_init__(self):
    check_sparsity(self.sparsity)
    check_range("floor", self.floor, 0, 1 + 1e-9, "it is a share of nonzeros")

  def map(self, fn: "Callable[[Target], Target]") -> "AcrossLayers":
    """Returns the target that a function makes of this."""
    return AcrossLayers(fn(self.sparsity), self.floor)  # pyrefly: ignore

  def __repr__(self) -> str:
    """Prints the call that makes it."""
    return call_repr(self, "across_layers")


@dataclasses.dataclass(frozen=True)
class Share:
  """The part of one layer in a target across layers, at one step.

  The whole target tells when to measure.

  Args:
    zeros: int32, 0-d, how many of the layer's weights are zero.
    size: how many weights it has.
    whole: the target of all layers.
  """

  zeros: Array | int
  size: int
  whole: "Scalar | Schedule"

  def __call__(self, count: Count) -> Array:
    """Returns the share; it holds for the step it was made for only."""
    del count
    return jnp.asarray(self.zeros, jnp.float32) / max(self.size, 1)


#: Share of zeros: a number, an array, a schedule from the step count to one; of
#: a tree also one made by `per_layer` or `across_layers`, which are resolved to
#: one target for each leaf.
Target = Scalar | Schedule | PerLayer | AcrossLayers

per_layer = PerLayer
across_layers = AcrossLayers


_Given = TypeVar("_Given", bound=Target | None)


def target_of(sparsity: _Given | PerLayer, path: str) -> _Given | Target:
  """Returns the target of a leaf, where there is one of its own."""
  return sparsity.of(path) if isinstance(sparsity, PerLayer) else sparsity


def check_targets(sparsity: Target | None, paths: Sequence[str]) -> None:
  """Raises a ValueError unless each leaf has a target, and each a leaf."""
  if isinstance(sparsity, PerLayer):
    check_patterns([pattern for pattern, _ in sparsity.targets], paths)
    for path in paths:
      sparsity.of(path)


def zeros_at(target: Target, count: Count, n: int) -> Array:
  """Returns how many of n weights a target asks to be zero at a step, int32.

  That is `round(sparsity * n)`, of a ramp from the step on that reaches it.

  >>> int(zeros_at(ramp(0.3, 100), 50, 1000))
  300
  """
  if isinstance(target, Share):
    return jnp.asarray(target.zeros, jnp.int32)
  if isinstance(target, float | int):
    return count_of(n, target)
  asked = count_of(n, at(target, count))
  if isinstance(target, Ramp):
    reached = jnp.asarray(count, jnp.float32) >= target.until * target.steps
    return jnp.where(reached, count_of(n, target.sparsity), asked)
  return asked


def every_at(
  every: Array | int, sparsity: Target | None, count: Count
) -> Array | int:
  """Returns the steps between two measurements, as they are at a step.

  Those given, and 1 over the last 5 % of the run of a `ramp`: the network does
  not get used to the codes that the last measurement of all flips. After ten
  steps they are several, which with few weights a layer costs percents of
  accuracy; after one step they are few.

  >>> [int(every_at(10, ramp(0.8, 1000), n)) for n in (949, 950)]
  [10, 1]
  """
  whole = sparsity.whole if isinstance(sparsity, Share) else sparsity
  if not isinstance(whole, Ramp):
    return every
  return jnp.where(count >= round((1 - _LAST) * whole.steps), 1, every)


def look_at(
  every: Array | int, sparsity: Target | None, count: Count
) -> tuple[Array, Array]:
  """Returns whether a step measures the latents, and how closely.

  (due, tolerance) are a bool and the share of the weights by which a target may
  be missed, 0 where each step measures.
  """
  every = every_at(every, sparsity, count)
  return jnp.asarray(count % every == 0), jnp.where(every == 1, 0.0, TOLERANCE)
