"""How each method is trained: one small dataclass a method, read by tyro."""

import abc
import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple, Self

import jax
import jax.numpy as jnp
import optax

import tern_jax
from tern_jax import Ternarizer
from tern_jax.targets.schedules import target_of


class PlannedStage(NamedTuple):
  """A part of the training of a ternary net."""

  method: Ternarizer
  last: int
  """Its last step, counted from the start of the training."""
  keep_best: bool = False
  """Whether what goes on is the state of the best validation accuracy."""


class Plan(NamedTuple):
  """How a method is trained."""

  stages: tuple[PlannedStage, ...]
  """One after the other, each with an optimizer of its own."""
  regularizer: optax.GradientTransformation
  """Transform of the latents' gradients, before Adam."""
  onset: int
  """Step at which codes start to settle."""
  strength: Callable[[Any], Any] | None = None
  """Of WDR by the step; None without WDR."""


class Rates(NamedTuple):
  """Adam's first rates."""

  latent: float
  scale: float


@dataclasses.dataclass(frozen=True)
class Targeted:
  """What those methods share that can be asked for a sparsity or a size."""

  sparsity: float | None = None
  """Asked share of zeros; None leaves it to the method."""
  bytes: int | None = None
  """Asked size of the whole model at the entropy of its weights, instead of a
  sparsity: `tern_jax.fit_budget` shares it over the layers."""
  across_layers: bool = False
  """Whether the asked sparsity is that of all layers together, which then share
  one threshold, instead of each layer's own."""

  @property
  def asked(self) -> Any:
    """The sparsity asked for; None where the method chooses."""
    return self.sparsity

  def asked_of(self, path: str) -> Any:
    """Returns the sparsity asked of a layer; None where it has none."""
    return None if self.across_layers else target_of(self.asked, path)

  def target(self, steps: int) -> Any:
    """Returns the ramp of the sparsity over a run of so many steps."""
    share = self.asked
    if share is None:
      return None
    if self.across_layers:
      share = tern_jax.across_layers(share)
    return tern_jax.ramp(share, steps, tern_jax.recipes.UNTIL)

  def fitted(self, params: Any, model_state: Any, where: Any) -> Self:
    """Returns the method with the sparsity of each layer that fits the bytes.

    Args:
      params: at which the training starts.
      model_state: the other variables, which take their bytes as they are.
      where: which leaves are ternary.

    Raises:
      ValueError: the bytes are too few, or options do not go together.
    """
    if self.across_layers and self.asked is None:
      raise ValueError(
        "across_layers is given, but no sparsity that all layers could share:"
        " give one, and neither alpha nor bytes."
      )
    if self.bytes is None:
      return self
    if self.sparsity is not None:
      raise ValueError(
        f"sparsity={self.sparsity} and bytes={self.bytes} are both given: give"
        " one of them."
      )
    # Side by side, such that paths are those of the parameters.
    whole = {**params, **model_state}
    shares: Any = tern_jax.fit_budget(whole, bytes=self.bytes, where=where)
    return dataclasses.replace(self, sparsity=shares, bytes=None)


@dataclasses.dataclass(frozen=True)
class Sca(Targeted):
  """SCA at an asked sparsity, or with the paper's alpha."""

  start: ClassVar[str] = "scratch"

  alpha: float | None = None
  """The paper's controller of sparsity, instead of an asked one."""
  strength: float = 0.05
  """With alpha: the final strength of WDR, after a quadratic ramp."""
  kappa: float = 30.0
  """With a sparsity: the final strength of WDR, relative to the gradient."""
  sharp: bool = True
  """With a sparsity: whether WDR has its full force beside the barrier."""

  @property
  def asked(self) -> Any:
    """The sparsity asked for, 0.7 where nothing is; None for alpha or bytes."""
    if self.sparsity is self.alpha is self.bytes is None:
      return 0.7
    return self.sparsity

  @property
  def rates(self) -> Rates:
    """Adam's first rates, where the options give none."""
    return Rates(latent=1e-3 if self.alpha is None else 1e-2, scale=1e-3)

  def method(self, steps: int) -> tern_jax.SCA:
    """Returns the ternarizer of a run."""
    if self.asked is None or self.alpha is not None:
      return tern_jax.SCA(alpha=self.alpha, sparsity=self.sparsity)
    return tern_jax.SCA(sparsity=self.target(steps))

  def plan(
    self, steps: int, largest: int, stacked: tuple[str, ...] = ()
  ) -> Plan:
    """Returns the recipe of `tern_jax.SCA`, or the paper's for alpha.

    Args:
      steps: of the run.
      largest: not used.
      stacked: patterns of the kernels whose first axis enumerates layers.
    """
    del largest
    method = self.method(steps)
    if not method.soft:
      target: Any = method.sparsity
      kappa = tern_jax.late_kappa(steps, last=self.kappa)
      return Plan(
        (PlannedStage(method, steps),),
        tern_jax.wdr_transform(
          tern_jax.at_sparsity(target),
          tern_jax.relative(kappa),
          stacked=stacked,
          sharp=self.sharp,
        ),
        round(kappa.onset * steps),
        kappa,
      )

    alpha: Any = self.alpha

    def strength(count: jax.Array) -> jax.Array:
      done = jnp.asarray(count, jnp.float32) / steps
      return self.strength * jnp.clip((done - 0.3) / 0.5, 0, 1) ** 2

    return Plan(
      (PlannedStage(method, steps),),
      tern_jax.wdr_transform(alpha, strength),
      round(0.3 * steps),
      strength,
    )

  def predict(self, path: str, theta: jax.Array) -> float | None:
    """Returns the sparsity that WDR will make of the latents at its onset.

    None where it follows from those of other layers, too.
    """
    alpha: Any = self.alpha
    if self.asked is not None:
      asked = self.asked_of(path)
      if asked is None:
        return None
      alpha = tern_jax.alpha_for_sparsity(theta, asked)
    return float(tern_jax.predicted_sparsity(theta, alpha))

  axis_label: ClassVar[str] = "W = tanh Θ"

  def shown(self, path: str, theta: jax.Array) -> jax.Array:
    """Returns what a histogram of latents shows, on the way to -1, 0, 1."""
    del path
    return self.method(1).weights(theta)


@dataclasses.dataclass(frozen=True)
class StraightThrough(abc.ABC):
  """What methods share that are trained by the loss alone."""

  start: ClassVar[str] = "scratch"
  axis_label: ClassVar[str] = "latents / scale"

  @property
  def rates(self) -> Rates:
    """Adam's first rates, where the options give none."""
    return Rates(latent=1e-3, scale=1e-4)

  @property
  def asked(self) -> Any:
    """The sparsity asked for; None where the method chooses."""
    return None

  def fitted(self, params: Any, model_state: Any, where: Any) -> Self:
    """Returns the method itself: it asks for no bytes."""
    del params, model_state, where
    return self

  @abc.abstractmethod
  def method(self, steps: int, largest: int) -> Ternarizer:
    """Returns the ternarizer of a run.

    Args:
      steps: of the run.
      largest: size of the largest layer that is made ternary.
    """

  def plan(
    self, steps: int, largest: int, stacked: tuple[str, ...] = ()
  ) -> Plan:
    """Returns plain training."""
    del stacked
    stage = PlannedStage(self.method(steps, largest), steps)
    return Plan((stage,), optax.identity(), steps // 2)

  def predict(self, path: str, theta: jax.Array) -> None:
    """Returns None: there is no prediction."""
    del path, theta

  def asked_of(self, path: str) -> Any:
    """Returns None: no sparsity is asked of a layer."""
    del path

  def alone(self, path: str) -> Self:
    """Returns the method for one layer: of a target for each, its own."""
    del path
    return self

  def shown(self, path: str, theta: jax.Array) -> jax.Array:
    """Returns the latents in units of the scale that they start with."""
    method = self.alone(path).method(1, theta.size)
    ternary = method.discretize(theta, *method.init(theta))
    return 2 * theta / (ternary.w_p + ternary.w_n)


@dataclasses.dataclass(frozen=True)
class TargetedStraightThrough(Targeted, StraightThrough):
  """What those of them share that can be asked for a sparsity or a size."""

  def alone(self, path: str) -> Self:
    """Returns the method for one layer: of a target for each, its own."""
    target: Any = target_of(self.sparsity, path)
    return dataclasses.replace(self, sparsity=target, across_layers=False)


@dataclasses.dataclass(frozen=True)
class Twn(TargetedStraightThrough):
  """TWN, trained straight through."""

  def method(self, steps: int, largest: int) -> Ternarizer:
    """Returns TWN."""
    del largest
    return tern_jax.TWN(sparsity=self.target(steps))


@dataclasses.dataclass(frozen=True)
class Ttq(TargetedStraightThrough):
  """TTQ, with two trained magnitudes a layer."""

  threshold: float = 0.05
  """Largest latent that is zero, in units of the largest of the layer; not
  used where a sparsity is asked for."""

  def method(self, steps: int, largest: int) -> Ternarizer:
    """Returns TTQ."""
    del largest
    return tern_jax.TTQ(self.threshold, sparsity=self.target(steps))


@dataclasses.dataclass(frozen=True)
class Ec2t(TargetedStraightThrough):
  """EC2T, with two trained centroids a layer; wants a trained float net."""

  gamma: float = 0.2
  """Knob of the entropy constraint at its full strength, in [0, 1); not used
  where a sparsity is asked for."""
  s: float = 0.3
  """Where the centroids start, in units of the largest latents."""
  frozen: float = 1 / 3
  """Share of the steps, at the end, in which no weight changes its code."""

  start: ClassVar[str] = "float"

  @property
  def rates(self) -> Rates:
    """Adam's first rates, where the options give none."""
    # Fast centroids empty whole layers where the constraint is strong.
    return Rates(latent=1e-3, scale=1e-5)

  def method(self, steps: int, largest: int) -> tern_jax.EC2T:
    """Returns EC2T, its codes not frozen."""
    gamma: Any = tern_jax.ramp(self.gamma, steps)
    target = self.target(steps)
    return tern_jax.EC2T(gamma, self.s, largest, sparsity=target)

  def plan(
    self, steps: int, largest: int, stacked: tuple[str, ...] = ()
  ) -> Plan:
    """Returns training with codes free, then, from the best state, frozen.

    The constraint rises in the first half of what is free, a sparsity in its
    first quarter; the best state is one of the second half, where both are in
    full force.
    """
    del stacked
    onset = round((1 - self.frozen) * steps)
    free = self.method(onset, largest)
    best = PlannedStage(free, onset, keep_best=True)
    held = PlannedStage(dataclasses.replace(free, frozen=True), steps)
    stages = (best, held)
    if onset > 1:
      stages = (PlannedStage(free, onset // 2), *stages)
    return Plan(stages, optax.identity(), onset)


@dataclasses.dataclass(frozen=True)
class Tga(TargetedStraightThrough):
  """TGA, with a threshold a layer, trained where no sparsity is asked for."""

  surrogate: float | None = 0.5
  """Width of the window in which the threshold sees codes change, in sigma;
  None lets it learn through the scale alone, at rates far below 1e-3."""
  published: bool = False
  """The paper's start at .05 of the largest weight, codes around the mean, and
  gradients through mean and sigma; without a surrogate."""
  frozen: bool = False
  """Keep each threshold where it starts: the control for what one learns."""

  @property
  def rates(self) -> Rates:
    """Adam's first rates; of the thresholds 0 if they are frozen."""
    return Rates(latent=1e-3, scale=0.0 if self.frozen else 1e-4)

  def method(self, steps: int, largest: int) -> Ternarizer:
    """Returns TGA.

    Raises:
      ValueError: as published, but with a surrogate.
    """
    del largest
    target = self.target(steps)
    if not self.published:
      return tern_jax.TGA(surrogate=self.surrogate, sparsity=target)
    if self.surrogate is not None:
      raise ValueError(
        f"published and surrogate={self.surrogate} are both given, but the"
        " paper has no surrogate: give surrogate None with it."
      )
    return tern_jax.TGA(
      delta=0.05, of_max=True, mean=True, detach=False, sparsity=target
    )


@dataclasses.dataclass(frozen=True)
class Absmean(StraightThrough):
  """AbsMean, the ternary weights of BitNet b1.58."""

  def method(self, steps: int, largest: int) -> Ternarizer:
    """Returns AbsMean."""
    del steps, largest
    return tern_jax.AbsMean()


Method = Sca | Twn | Ttq | Ec2t | Tga | Absmean
METHODS = {m.__name__: m for m in (Sca, Twn, Ttq, Ec2t, Tga, Absmean)}
