"""TGA: weights and threshold optimized together, by truncated Gaussians."""

import dataclasses

import jax
import jax.numpy as jnp

from tern_jax.core.checks import check_range
from tern_jax.core.containers import Ternary
from tern_jax.core.estimators import (
  clamp_gradient,
  straight_through,
  trained_scale,
)
from tern_jax.core.numerics import (
  mean_of,
  one_magnitude,
  reduced_axes,
  widen,
)
from tern_jax.core.types import Array, Arrays, ChannelAxis, Floats
from tern_jax.methods.tga_math import truncated_gaussian_scale
from tern_jax.targets.quantile import NO_CUT
from tern_jax.targets.schedules import Target
from tern_jax.targets.targeted import Look, Targeted


@dataclasses.dataclass(frozen=True, repr=False)
class TGA(Targeted):
  """Threshold trained with the weights, through the scale that it implies.

  `W = S sign(w) 1[|w| > Delta]` with `S = sigma lambda(Delta / sigma)`, sigma
  the root mean square of w. The gradient passes to w unchanged. Delta learns
  through S only: `dL/dDelta = lambda'(Delta / sigma) sum_i dL/dW_i code_i`.

  Behind a normalization layer the loss does not depend on S, so that sum is
  zero and Delta stays where it starts; Adam turns its rounding noise into
  full steps. There, use SGD on the scales, freeze them, or give a `surrogate`,
  which lets the changing codes speak. Elsewhere Delta tends to run to 3 sigma,
  that is to all zeros: it must not travel sigma in a run, so keep `steps *
  rate * clamp / (1 - momentum)` of SGD below; with a surrogate it holds. A
  run with Delta frozen (rate 0) is the control for any claim that the
  threshold learned something.

  `TGA(sparsity=s)` trains no threshold: Delta is the quantile of |w| over the
  whole tensor, so that exactly that share is zero, and S is as above.

  Args:
    delta: where Delta starts, in units of sigma; 0.612 has the least squared
      error on normal weights, with 46 % zeros.
    of_max: start at `delta * max|w|` instead.
    clamp: bound of |dL/dDelta|; None for none. Each device clamps before
      gradients are averaged; for the same numbers on any number of devices
      give None, and `optax.clip(1e-3)` before the optimizer of the scales.
    mean: the codes lie around mu = mean(w), `sign(w - mu) 1[|w - mu| >
      Delta]`, `S = mu + sigma lambda(Delta / sigma)` and sigma is about mu.
    detach: take mu and sigma as constants in the gradient.
    surrogate: width, in units of sigma, of the box around the threshold in
      which Delta also sees codes change: `dL/dDelta -= sum_i dL/dW_i S
      sign(w_i) 1[||w_i| - Delta| < h / 2] / h`; None for none.
    sparsity: share of zeros in [0, 1), a number, traced array or schedule;
      delta, of_max, clamp and surrogate are then not used. With `mean` it is
      the quantile of |w - mu|, and the codes lie around the mu of that look.
    every: steps between two updates of Delta at a sparsity.
    channel_axis: None for one Delta and S a tensor; else one for each index
      of this axis, -1 for the output channels of Flax and Haiku, 0 for
      Equinox's. With a sparsity, which is always that of the whole tensor,
      all have the same Delta, and each its own S.

  Raises:
    ValueError: a hyper-parameter is out of range.

  >>> w = jnp.array([[0.1, -0.2], [0.3, -0.4]])
  >>> method = TGA()
  >>> scales, state = method.init(w)
  >>> round(float(scales["delta"]), 4)
  0.1643
  >>> method.discretize(w, scales, state).codes.tolist()
  [[0, -1], [1, -1]]

  Source: He & Fan, arXiv 1810.01018. Differs from the paper, which is
  `TGA(delta=0.05, of_max=True, mean=True, detach=False)`: sigma divides by n,
  not n - 1; the gradient of Delta passes the bounds [0, 3 sigma], so that it
  can come back from them. Weights and Delta step together; the paper's two
  steps a batch are a matter of the training step. A sparsity is this project's
  own; its Delta has no bound, as tails may be heavier than a Gaussian's.
  """

  delta: float = 0.6
  of_max: bool = False
  clamp: float | None = 1e-3
  mean: bool = False
  detach: bool = True
  surrogate: float | None = None
  sparsity: Target | None = None
  every: int = 10
  channel_axis: ChannelAxis = None

  def __post_init__(self):
    inf = float("inf")
    hint = "try 0.6, or 0.05 with of_max=True"
    check_range("delta", self.delta, 0, inf, hint)
    check_range("clamp", self.clamp, 0, inf, "try 1e-3, or None")
    check_range("surrogate", self.surrogate, 1e-6, inf, "try 0.5, or None")
    super().__post_init__()

  def init(self, w: Floats) -> tuple[Arrays, Arrays]:
    """Returns the threshold, of w's dtype; that of a sparsity as state."""
    if self.sparsity is not None:
      return {}, self.state_at(w, {})
    _, _, sigma = self._moments(w)
    unit = sigma
    if self.of_max:
      axes = reduced_axes(w, self.channel_axis)
      keep = axes is not None
      unit = jnp.max(jnp.abs(widen(w)), axes, keepdims=keep, initial=0)
    delta = jnp.asarray(self.delta).astype(unit.dtype) * unit
    return {"delta": _bound(delta, sigma).astype(w.dtype)}, {}

  def __call__(self, w: Floats, scales: Arrays, state: Arrays) -> Floats:
    """Returns the ternary weights, with gradients of w and Delta."""
    x, sigma, delta, codes, s = self._ternarize(w, scales, state)
    soft = widen(w)
    if self.surrogate is not None and self.sparsity is None:
      h = jnp.asarray(self.surrogate).astype(s.dtype) * sigma
      h = jax.lax.stop_gradient(jnp.where(h > 0, h, 1))
      x, jump = jax.lax.stop_gradient((x, s * jnp.sign(x)))
      # Only the gradient of this is used.
      soft += jump * jnp.clip((jnp.abs(x) - delta) / h, -0.5, 0.5)
    one = jnp.ones_like(s)
    return trained_scale(soft, codes, s, factor=one).astype(w.dtype)

  def discretize(self, w: Floats, scales: Arrays, state: Arrays) -> Ternary:
    """Returns the codes beyond Delta and their scale S."""
    *_, codes, s = self._ternarize(w, scales, state)
    narrow = s.astype(w.dtype)
    return Ternary(codes.astype(jnp.int8), w_p=narrow, w_n=narrow)

  @property
  def measures(self) -> bool:
    """Whether there is a target, for which Delta must move."""
    return self.sparsity is not None

  def measure(
    self, w: Floats, scales: Arrays, look: Look, held: Arrays | None = None
  ) -> Arrays:
    """Returns mu, and Delta at the asked sparsity, of the shape of sigma.

    Beside them the cut of `split`.
    """
    del scales
    _, mu, sigma = self._moments(w)
    if self.mean:
      # Rounded before it is subtracted, to one bit less than it has: where a
      # mean and a difference are computed as one, ties would differ from those
      # of codes.
      info = jnp.finfo(mu.dtype)
      mu = jax.lax.reduce_precision(mu, info.nexp, info.nmant - 1)
    found = self.split(self._about(w, mu), look, held)
    # Of the sharding of sigma, too.
    delta = jnp.full_like(sigma, found["threshold"])
    seen = {"cut": found["cut"], "mu": mu, "threshold": delta}
    if held is None:
      return seen

    def used(look: Arrays) -> Array:
      return self.beyond(self._about(w, look["mu"]), look)

    # Anywhere in a gap Delta gives these codes, but not this S: the one that
    # `invert` chose stays.
    same = jnp.sum(used(held) != used(seen), dtype=jnp.float32) == 0
    return {k: jnp.where(same, held.get(k, x), x) for k, x in seen.items()}

  def project(self, w: Floats, scales: Arrays, state: Arrays) -> Arrays:
    """Keeps a trained threshold in (0, 3 sigma]."""
    del state
    if self.sparsity is not None:
      return scales
    _, _, sigma = self._moments(w)
    return {"delta": _bound(widen(scales["delta"]), sigma).astype(w.dtype)}

  def invert(
    self, ternary: Ternary, count: Array
  ) -> tuple[Floats, Arrays, Arrays]:
    """Returns latents around 0 with the S of these weights, and Delta.

    Zeros are at 0, nonzeros at both signs of one magnitude, Delta half-way
    between them, but at most 2.9 sigma. A channel of zeros has no S: it comes
    back as 0.
    """
    if self.mean:
      raise ValueError(
        f"{self!r} cannot continue ternary weights: they do not tell the"
        " mean of the latents, around which it puts its codes. Take mean=False."
      )
    self.check_zeros(ternary.codes, count)
    s = one_magnitude(ternary, self)
    wide = widen(s)
    unit = ternary.codes.astype(wide.dtype)
    _, mu, sigma = self._moments(unit)
    # Below the bound of 3 sigma, so that no rounding puts Delta beyond it.
    delta = jnp.minimum(jnp.full_like(sigma, 0.5), 2.9 * sigma)
    implied = truncated_gaussian_scale(delta, sigma, mu)
    alive = implied > 0
    size = jnp.where(alive, wide / jnp.where(alive, implied, 1), 0)
    # With so few digits sums of squares are exact, and so is sigma.
    size = jax.lax.reduce_precision(size, 8, 6)
    w, delta = (unit * size).astype(s.dtype), delta * size
    _, mu, sigma = self._moments(w)
    # S grows .64 to 1 times as much as Delta: each of these leaves at most .36
    # of the error of the one before.
    for _ in range(12):
      delta += wide - truncated_gaussian_scale(delta, sigma, mu)
    # Rounded to the dtype of the weights, a neighbor may give a closer S.
    near = delta.astype(s.dtype)
    ends = jnp.zeros_like(near), jnp.full_like(near, jnp.inf)
    tried = jnp.stack([near, *(jnp.nextafter(near, end) for end in ends)])
    got = truncated_gaussian_scale(widen(tried), sigma[None], mu[None])
    miss = jnp.abs(got.astype(s.dtype) - s[None])
    best = jnp.argmin(miss, 0, keepdims=True)
    delta = jnp.take_along_axis(tried, best, 0)[0]
    if self.sparsity is None:
      return w, {"delta": delta}, {}
    cut = jnp.asarray(NO_CUT, jnp.int32)
    seen = {"cut": cut, "mu": mu, "threshold": widen(delta)}
    return w, {}, {"count": count, **seen}

  def _moments(self, w: Array) -> tuple[Array, Array, Array]:
    """Returns centered weights, mu and sigma, widened."""
    x, axes = widen(w), reduced_axes(w, self.channel_axis)
    mu = mean_of(x, axes)
    if not self.mean:
      mu = jnp.zeros_like(mu)
    x = x - mu
    square = mean_of(jnp.square(x), axes)
    # The gradient of a square root at 0 is infinite.
    spread = square > 0
    sigma = jnp.where(spread, jnp.sqrt(jnp.where(spread, square, 1)), 0)
    if self.detach:
      mu, sigma = jax.lax.stop_gradient((mu, sigma))
    return x, mu, sigma

  def _about(self, w: Array, mu: Array) -> Array:
    # Where a subtraction of 0 would make subnormal weights 0, none is done.
    return widen(w) - mu if self.mean else widen(w)

  def _threshold(self, scales: Arrays, sigma: Array) -> Array:
    """Returns Delta within its bounds, with a clamped gradient."""
    delta = widen(scales["delta"])
    limit = jnp.inf if self.clamp is None else self.clamp
    delta = clamp_gradient(delta, jnp.asarray(limit).astype(delta.dtype))
    return straight_through(delta, _bound(delta, sigma))

  def _ternarize(
    self, w: Array, scales: Arrays, state: Arrays
  ) -> tuple[Array, Array, Array, Array, Array]:
    """Returns centered weights, sigma, Delta, codes and S, all widened."""
    x, mu, sigma = self._moments(w)
    if self.sparsity is None:
      delta = self._threshold(scales, sigma)
      codes = jnp.where(jnp.abs(x) > delta, jnp.sign(x), 0)
    else:
      # The mu of the look, because ties are as exact as mu is.
      x = self._about(w, state["mu"])
      codes = self.codes(x, state)
      tiny = jnp.asarray(jnp.finfo(x.dtype).tiny, x.dtype)
      delta = jnp.maximum(state["threshold"], tiny)
    s = truncated_gaussian_scale(delta, sigma, mu)
    return x, sigma, delta, codes, s


def _bound(delta: Array, sigma: Array) -> Array:
  # Never quite 0: weights that are all zero then have zero codes still.
  tiny = jnp.asarray(jnp.finfo(delta.dtype).tiny, delta.dtype)
  return jnp.clip(delta, tiny, jnp.maximum(3 * sigma, tiny))
