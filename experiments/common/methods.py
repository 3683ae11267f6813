"""How each method is trained: one small dataclass a method, read by tyro."""

import abc
import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import optax

import tern_jax
from tern_jax.base import Ternarizer


class Recipe(NamedTuple):
  """How a method is trained."""

  method: Ternarizer
  regularizer: optax.GradientTransformation
  """Transform of the latents' gradients, before Adam."""
  onset: int
  """Step at which codes start to settle."""


@dataclasses.dataclass(frozen=True)
class Sca:
  """SCA at an asked sparsity, or with the paper's alpha."""

  sparsity: float | None = None
  """Asked share of zeros; 0.7 where no alpha is given."""
  alpha: float | None = None
  """The paper's controller of sparsity, instead of an asked one."""
  strength: float = 0.05
  """With alpha: the final strength of WDR, after a quadratic ramp."""

  @property
  def asked(self) -> float | None:
    """The sparsity asked for; None where alpha was given."""
    if self.sparsity is None and self.alpha is None:
      return 0.7
    return self.sparsity

  def recipe(self, steps: int) -> Recipe:
    """Returns the recipe of `tern_jax.SCA`, or the paper's for alpha."""
    if self.asked is not None and self.alpha is None:
      target = tern_jax.ramp(self.asked, steps)
      kappa = tern_jax.late_kappa(steps)
      return Recipe(
        tern_jax.SCA(sparsity=target),
        tern_jax.wdr_transform(
          tern_jax.at_sparsity(target), tern_jax.relative(kappa)
        ),
        round(kappa.onset * steps),
      )

    def strength(count: jax.Array) -> jax.Array:
      done = jnp.asarray(count, jnp.float32) / steps
      return self.strength * jnp.clip((done - 0.3) / 0.5, 0, 1) ** 2

    return Recipe(
      tern_jax.SCA(alpha=self.alpha, sparsity=self.sparsity),
      tern_jax.wdr_transform(self.alpha, strength),
      round(0.3 * steps),
    )

  def predict(self, theta: jax.Array) -> float:
    """Returns the sparsity that WDR will make of the latents at its onset."""
    alpha: Any = self.alpha
    if self.asked is not None:
      alpha = tern_jax.alpha_for_sparsity(theta, self.asked)
    return float(tern_jax.predicted_sparsity(theta, alpha))

  axis_label: ClassVar[str] = "tanh of the latents"

  def shown(self, theta: jax.Array) -> jax.Array:
    """Returns what a histogram of latents shows, on the way to -1, 0, 1."""
    return jnp.tanh(theta)


@dataclasses.dataclass(frozen=True)
class StraightThrough(abc.ABC):
  """What methods share that are trained by the loss alone."""

  axis_label: ClassVar[str] = "latents / scale"

  @property
  def asked(self) -> float | None:
    """The sparsity asked for; None where the method chooses."""
    return None

  @abc.abstractmethod
  def method(self, steps: int) -> Ternarizer:
    """Returns the ternarizer for a run of some steps."""

  def recipe(self, steps: int) -> Recipe:
    """Returns plain training."""
    return Recipe(self.method(steps), optax.identity(), steps // 2)

  def predict(self, theta: jax.Array) -> None:
    """Returns None: there is no prediction."""
    del theta

  def shown(self, theta: jax.Array) -> jax.Array:
    """Returns the latents in units of the scale that they start with."""
    method = self.method(1)
    ternary = method.discretize(theta, *method.init(theta))
    return 2 * theta / (ternary.w_p + ternary.w_n)


@dataclasses.dataclass(frozen=True)
class Twn(StraightThrough):
  """TWN, trained straight through."""

  sparsity: float | None = None
  """Asked share of zeros; None leaves it to TWN's own threshold."""

  @property
  def asked(self) -> float | None:
    """The sparsity asked for; None where TWN chooses."""
    return self.sparsity

  def method(self, steps: int) -> Ternarizer:
    """Returns TWN, its target on a ramp."""
    if self.sparsity is None:
      return tern_jax.TWN()
    return tern_jax.TWN(sparsity=tern_jax.ramp(self.sparsity, steps))


@dataclasses.dataclass(frozen=True)
class Ttq(StraightThrough):
  """TTQ, with two trained magnitudes a layer."""

  threshold: float = 0.05
  """Largest latent that is zero, in units of the largest of the layer."""

  def method(self, steps: int) -> Ternarizer:
    """Returns TTQ."""
    del steps
    return tern_jax.TTQ(self.threshold)


@dataclasses.dataclass(frozen=True)
class Tga(StraightThrough):
  """TGA, with a trained threshold a layer."""

  surrogate: float | None = 0.5
  """Width of the window in which the threshold sees codes change, in sigma;
  None lets it learn through the scale alone, at rates far below 1e-3."""

  def method(self, steps: int) -> Ternarizer:
    """Returns TGA."""
    del steps
    return tern_jax.TGA(surrogate=self.surrogate)


@dataclasses.dataclass(frozen=True)
class Absmean(StraightThrough):
  """AbsMean, the ternary weights of BitNet b1.58."""

  def method(self, steps: int) -> Ternarizer:
    """Returns AbsMean."""
    del steps
    return tern_jax.AbsMean()


Method = Sca | Twn | Ttq | Tga | Absmean
METHODS = {m.__name__: m for m in (Sca, Twn, Ttq, Tga, Absmean)}
