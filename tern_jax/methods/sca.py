"""SCA: the sparsity-control approach to ternary weight networks."""

import dataclasses

import jax.numpy as jnp

from tern_jax.core.checks import check_range, concrete
from tern_jax.core.containers import Ternary
from tern_jax.core.estimators import trained_scale
from tern_jax.core.numerics import alive, one_magnitude, rms, scale_floor, widen
from tern_jax.core.types import Array, Arrays, ChannelAxis, Floats, Scalar
from tern_jax.regularizers.barriers import GAIN, check_gain
from tern_jax.regularizers.formulas import check_alpha, wdr_barrier
from tern_jax.targets.schedules import Target
from tern_jax.targets.targeted import Look, Targeted

#: |W| of weights that have settled at -1 or 1: beyond it gradients vanish.
_SETTLED = 0.99


@dataclasses.dataclass(frozen=True, repr=False)
class SCA(Targeted):
  """Sparsity control by the barrier of WDR, on latents Theta, W = tanh(Theta).

  Two modes, each to be trained together with `wdr_transform`:

  * `SCA(alpha=0.1)`, the paper's. The forward is soft, `a tanh(Theta)`, no
    gradient estimator; WDR moves all weights to {-1, 0, 1}. The zeros are the
    latents under the barrier, |W| <= sqrt(alpha / 2). Which share that will be
    is `predicted_sparsity(sigma, alpha)`: 0.744 for the defaults.
  * `SCA(sparsity=0.9)`, with which the asked sparsity is exact: to 0.1 % in
    training, to the weight at the end of a `ramp` and after
    `ParamTransform.refresh`. The barrier sits at that quantile of |W|, so
    `alpha = 2 quantile^2`; the forward is hard,
    `a sign(Theta) 1[|W| > barrier]`, with the gradient of tanh(Theta). The
    loss chooses the codes; a late WDR, the sharp one, makes them settle.
    `recipe(0.9, steps)` makes both, with their schedules.

  Train that by Adam at its usual rate of 1e-3, decayed to 5 % by a cosine: at a
  rate that stays high, codes still change while WDR makes them settle. No
  weight decay on the latents. Where 99 % of a small layer would be zero,
  `across_layers(s)` leaves it more.

  Args:
    alpha: controller of WDR in [0, 2), a number or a traced array.
    sparsity: share of zeros in [0, 1), a number, traced array or schedule of
      the step. Exactly one of alpha and sparsity is given.
    sigma: root mean square of Theta at the start, whatever the scale of the
      user's initial weights; None keeps them, as `arctanh(w)`.
    gain: Theta over the latents, which are what is trained. None is 10 with a
      sparsity, as in `at_sparsity`: Theta must move by many times its spread,
      and Adam moves latents by its rate whatever they are. A gain g makes the
      rate of SGD g^2 times as effective. With alpha it is 1.
    every: steps between two updates of the threshold at a sparsity.
    scaled: train a scale a, started such that the ternary weights have the
      root mean square of the user's initial ones, and never less than a tenth
      of that; False fixes a = 1.
    channel_axis: None for one scale a tensor; else one for each index of this
      axis, -1 for the output channels of Flax and Haiku, 0 for Equinox's.

  Raises:
    ValueError: a hyper-parameter is out of range, not exactly one of alpha and
      sparsity is given, or a gain with alpha.

  >>> w = jnp.array([[0.1, -0.2], [0.3, -0.4]])
  >>> method = SCA(sparsity=0.5)
  >>> method
  SCA(sparsity=0.5)
  >>> scales, state = method.init(w)
  >>> method.discretize(method.latent(w), scales, state).codes.tolist()
  [[0, 0], [1, -1]]

  Source: Deng & Zhang, arXiv 2011.00580. Differs from the paper: latents are
  normalized to `sigma`, so that one alpha means one sparsity in every layer,
  and a scale is trained, so that nets without normalization layers work
  (`sigma=None, scaled=False` undoes both). It is bounded from below because
  behind a normalization layer no gradient holds it: it wanders, and at 0 the
  layer would be dead. Unconverged weights are rounded at the barrier instead of
  0.5; the mode with a sparsity is this project's own.
  """

  alpha: Scalar | None = None
  sparsity: Target | None = None
  sigma: float | None = 0.2
  gain: float | None = None
  every: int = 10
  scaled: bool = True
  channel_axis: ChannelAxis = None

  def __post_init__(self):
    if (self.alpha is None) == (self.sparsity is None):
      raise ValueError(
        f"SCA got alpha={self.alpha} and sparsity={self.sparsity}: give"
        " exactly one, SCA(alpha=0.1) or SCA(sparsity=0.8)."
      )
    check_alpha(self.alpha)
    super().__post_init__()
    check_range("sigma", self.sigma, 1e-6, 10, "0.2 works throughout")
    check_gain(self.gain)
    if self.soft and self.gain is not None:
      raise ValueError(
        f"SCA got alpha={self.alpha} and gain={self.gain}, but with alpha the"
        " latents are Theta itself, as wdr_transform(alpha) takes them: give no"
        " gain."
      )

  @property
  def soft(self) -> bool:
    """Whether the training forward is not yet ternary."""
    return self.sparsity is None

  def weights(self, w: Array) -> Array:
    """Returns W = tanh(Theta) of latents."""
    return jnp.tanh(self._gain * w)

  @property
  def _gain(self) -> float:
    if self.gain is None:
      return 1.0 if self.soft else GAIN
    return self.gain

  def latent(self, w: Floats) -> Floats:
    """Returns Theta / gain for the user's initial weights."""
    wide = widen(w)
    if self.sigma is None:
      edge = 1 - float(jnp.finfo(w.dtype).eps)
      theta = jnp.arctanh(jnp.clip(wide, -edge, edge))
    else:
      size = rms(wide)
      factor = jnp.where(size > 0, self.sigma / size, 1)
      # Not 0, which would be as silent as it is wrong.
      theta = wide * jnp.where(jnp.isfinite(size), factor, jnp.nan)
    return (theta / self._gain).astype(w.dtype)

  def init(self, w: Floats) -> tuple[Arrays, Arrays]:
    """Returns the scale, and the threshold where there is a sparsity."""
    latent = self.latent(w)
    state = {} if self.soft else self.state_at(latent, {})
    if not self.scaled:
      return {}, state
    make = self.weights if self.soft else lambda w: self._codes(w, state)
    unscaled = make(latent)

    def ratio(axis: ChannelAxis, otherwise: Array | float) -> Array:
      want, have = rms(w, axis), rms(unscaled, axis)
      started = (want > 0) & (have > 0)
      return jnp.where(started, want / jnp.where(started, have, 1), otherwise)

    # An array of zeros has no spread to keep; 1 / sqrt(fan-in) lets it learn.
    # A channel without a code has none either, but its array may have.
    axis = 0 if self.channel_axis == 0 else -1
    fan_in = max(w.size // w.shape[axis], 1) if w.size and w.ndim else 1
    a = ratio(self.channel_axis, ratio(None, fan_in**-0.5)).astype(w.dtype)
    return {"a": a}, {**state, "floor": scale_floor(a)}

  def __call__(self, w: Floats, scales: Arrays, state: Arrays) -> Floats:
    """Returns `a tanh(Theta)`, or its ternary codes times a."""
    a = scales["a"] if self.scaled else jnp.ones((), w.dtype)
    if self.soft:
      return a * self.weights(w)
    return trained_scale(self.weights(w), self._codes(w, state), a, factor=a)

  def discretize(self, w: Floats, scales: Arrays, state: Arrays) -> Ternary:
    """Returns the codes on the latents' side of the barrier."""
    a = scales["a"] if self.scaled else jnp.ones((), w.dtype)
    codes = self._codes(w, state).astype(jnp.int8)
    return Ternary(codes=codes, w_p=a, w_n=a)

  @property
  def measures(self) -> bool:
    """Whether there is a target, for which the threshold must move."""
    return not self.soft

  def measure(
    self, w: Floats, scales: Arrays, look: Look, held: Arrays | None = None
  ) -> Arrays:
    """Returns the threshold at the asked quantile of the latents, and cut."""
    del scales
    return self.split(w, look, held)

  def project(self, w: Floats, scales: Arrays, state: Arrays) -> Arrays:
    """Keeps the scale at or above its floor."""
    del w
    if not self.scaled:
      return scales
    return {"a": jnp.maximum(scales["a"], state["floor"])}

  def invert(
    self, ternary: Ternary, count: Array
  ) -> tuple[Floats, Arrays, Arrays]:
    """Returns latents at 0 and on both sides of the barrier, and the scale.

    With alpha, nonzeros are at |W| = .99 (or half-way from the barrier to 1),
    so that the soft forward is .99 of the ternary weights. With a sparsity,
    which must be that of these weights, Theta has the root mean square sigma,
    as at the start, unless |W| would be beyond .99.
    """
    a = one_magnitude(ternary, self)
    if not self.scaled and concrete(a) and jnp.any(a != 1):
      raise ValueError(
        f"{self!r} has the magnitude 1, but that of these weights is up to"
        f" {jnp.max(a):.6g}: take scaled=True."
      )
    codes = ternary.codes.astype(a.dtype)
    scales = {"a": alive(a)} if self.scaled else {}
    state = {"floor": scale_floor(scales["a"])} if self.scaled else {}
    settled = jnp.arctanh(jnp.asarray(_SETTLED, widen(a).dtype))
    if self.soft:
      barrier = wdr_barrier(jnp.asarray(self.alpha, settled.dtype))
      theta = jnp.maximum(settled, jnp.arctanh((1 + barrier) / 2)) / self._gain
      return codes * theta.astype(a.dtype), scales, state
    self.check_zeros(ternary.codes, count)
    size = rms(codes)
    sigma = jnp.inf if self.sigma is None else self.sigma
    theta = jnp.minimum(sigma / jnp.where(size > 0, size, 1), settled)
    theta /= self._gain
    state |= self.halfway(theta, count)
    return codes * theta.astype(a.dtype), scales, state

  def _codes(self, w: Array, state: Arrays) -> Array:
    # Compared on the latents, not on W = tanh(Theta): tanh saturates, and
    # ties there would break the exact count.
    if not self.soft:
      return self.codes(w, state)
    barrier = wdr_barrier(jnp.asarray(self.alpha, jnp.float32))
    threshold = jnp.arctanh(barrier) / self._gain
    beyond = jnp.abs(w).astype(jnp.float32) > threshold
    return jnp.where(beyond, jnp.sign(w), jnp.zeros((), w.dtype))
