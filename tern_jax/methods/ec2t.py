"""EC2T: entropy-constrained trained ternarization.

A weight w goes to the centroid c of {-w_n, 0, w_p} of the lowest cost
`(w - c)^2 - lambda log2 P_c`, where P_c is the share of the layer's weights
whose nearest centroid is c; P_0 is raised to `min_p_0`, at the others' expense.
For three centroids on a line that is two thresholds, found every few steps.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from tern_jax.core.checks import check_range, concrete
from tern_jax.core.containers import Array, Arrays, Ternary, dense
from tern_jax.core.estimators import straight_through, trained_scales
from tern_jax.core.method import Ternarizer
from tern_jax.core.numerics import alive, least_scale, reduced_axes, widen
from tern_jax.targets.follow import check_zeros
from tern_jax.targets.quantile import magnitude_threshold
from tern_jax.targets.schedules import Schedulable, at, check_sparsity, look_at

#: Bits that + and - cost more than 0, at the least, where lambda is solved for.
_LEAST_RATE = 1e-3


def ec2t_lambda_max(
  w: Array, w_p: Array, w_n: Array, min_p_0: float = 0.5
) -> Array:
  """The least lambda at which one of the two sign clusters is empty.

  `lambda_p = (w_max^2 - (w_max - w_p)^2) / (log2 P_0 - log2 P_p)`, lambda_n
  likewise with |w_min| and w_n; the smaller of the two. A cluster of channels
  is empty once it is in all. One that is empty already, or that no lambda
  empties because P_0 is no larger, is left out; 0 if both are.

  Args:
    w: float, any shape, latents.
    w_p: float, 0-d or of the rank of w with ones beside the channels, > 0.
    w_n: float, shape of w_p, > 0.
    min_p_0: least P_0, in [0, 1).

  Returns:
    0-d, float32 or wider, finite and >= 0.

  >>> w, c = jnp.array([-1., 0., 0., 0., 2.]), jnp.array(.5)
  >>> round(float(ec2t_lambda_max(w, c, c)), 4)
  0.4732

  Source: Marban et al., arXiv 2004.01077, section 3.
  """
  ones = tuple(i for i, n in enumerate(w_p.shape) if n == 1)
  axes = ones if w_p.ndim else None
  rate_p, rate_n = _rates(w, w_p, w_n, min_p_0)

  def emptied_at(signed: Array, scale: Array, rate: Array) -> Array:
    # w_max^2 - (w_max - w_p)^2, without the cancellation.
    gain = jnp.max(widen(scale) * (2 * _top(signed, axes) - widen(scale)))
    empties = (gain > 0) & (rate > 0)
    return jnp.where(empties, gain / jnp.where(empties, rate, 1), jnp.inf)

  lambda_p = emptied_at(widen(w), w_p, rate_p)
  least = jnp.minimum(lambda_p, emptied_at(-widen(w), w_n, rate_n))
  return jnp.where(jnp.isfinite(least), least, 0)


def ec2t_thresholds(
  w: Array, w_p: Array, w_n: Array, lam: Array | float, min_p_0: float = 0.5
) -> tuple[Array, Array]:
  """Thresholds of the cheapest centroids: w_p above t_p, -w_n below -t_n.

  `t_p = (w_p^2 + lambda (log2 P_0 - log2 P_p)) / (2 w_p)`, likewise t_n. Where
  `t_p < -t_n`, possible for P_0 < 0.5 only, zero is nowhere the cheapest, and
  both become the point at which the signs cost the same.

  Args:
    w: float, any shape, latents.
    w_p: float, 0-d or of the rank of w with ones beside the channels, > 0.
    w_n: float, shape of w_p, > 0.
    lam: 0-d, lambda >= 0.
    min_p_0: least P_0, in [0, 1).

  Returns:
    (t_p, t_n), each of the shape of w_p, float32 or wider, finite.

  >>> w, c = jnp.array([-1., 0., 0., 0., 2.]), jnp.array(.5)
  >>> t_p, t_n = ec2t_thresholds(w, c, c, ec2t_lambda_max(w, c, c))
  >>> round(float(t_p), 4), round(float(t_n), 4)
  (1.0, 1.0)

  Source: Marban et al., arXiv 2004.01077, section 3, solved for w.
  """
  rate_p, rate_n = _rates(w, w_p, w_n, min_p_0)
  w_p, w_n = widen(w_p), widen(w_n)
  half_lam = 0.5 * jnp.asarray(lam, w_p.dtype)
  # Centroids of dead channels are tiny: their thresholds must not overflow.
  big = float(jnp.finfo(w_p.dtype).max)
  t_p = jnp.clip(0.5 * w_p + half_lam * rate_p / w_p, -big, big)
  t_n = jnp.clip(0.5 * w_n + half_lam * rate_n / w_n, -big, big)
  even = (w_p * t_p - w_n * t_n) / (w_p + w_n)
  crossed = t_p < -t_n
  return jnp.where(crossed, even, t_p), jnp.where(crossed, -even, t_n)


def ec2t_assign(
  w: Array, w_p: Array, w_n: Array, lam: Array | float, min_p_0: float = 0.5
) -> Array:
  """Codes of the cheapest centroids, `argmin_c (w - c)^2 - lambda log2 P_c`.

  Args:
    w: float, any shape, latents.
    w_p: float, 0-d or of the rank of w with ones beside the channels, > 0.
    w_n: float, shape of w_p, > 0.
    lam: 0-d, lambda >= 0; 0 gives the nearest centroids.
    min_p_0: least P_0, in [0, 1).

  Returns:
    int8, shape of w, in {-1, 0, 1}; ties go to 0.

  >>> w, c = jnp.array([-1., 0., 0., 0., 2.]), jnp.array(.5)
  >>> ec2t_assign(w, c, c, 0.).tolist(), ec2t_assign(w, c, c, .6).tolist()
  ([-1, 0, 0, 0, 1], [0, 0, 0, 0, 1])

  Source: Marban et al., arXiv 2004.01077, section 3.
  """
  t_p, t_n = ec2t_thresholds(w, w_p, w_n, lam, min_p_0)
  return _codes(w, t_p, t_n).astype(jnp.int8)


def ec2t_at_sparsity(
  w: Array,
  w_p: Array,
  w_n: Array,
  sparsity: Array | float,
  min_p_0: float = 0.5,
  guess: Array | None = None,
  tolerance: Array | float = 0.0,
) -> tuple[Array, Array, Array]:
  """The lambda at which the asked share of weights is zero, and its thresholds.

  Zero is the cheapest centroid of w > 0 from `lambda = w_p (2 w - w_p) /
  (log2 P_0 - log2 P_p)` on, of w < 0 likewise with |w|, w_n and P_n; this is
  the quantile of those. It is negative where the nearest centroids alone leave
  more zeros than asked. Thresholds are as in `ec2t_thresholds`, but at least
  0: no weight changes its sign.

  Args:
    w: float, any shape, latents.
    w_p: float, 0-d or of the rank of w with ones beside the channels, > 0.
    w_n: float, shape of w_p, > 0.
    sparsity: 0-d, share of zeros of the whole tensor in [0, 1).
    min_p_0: least P_0, in [0, 1).
    guess: float32, 0-d, where to look first, such as the last lambda.
    tolerance: share of the weights by which the target may be missed.

  Returns:
    (lambda, t_p, t_n): float32 0-d, and each of the shape of w_p, float32 or
    wider, finite and >= 0.

  >>> w, c = jnp.array([-1., -.1, .1, .2, 2.]), jnp.array(.5)
  >>> lam, t_p, t_n = ec2t_at_sparsity(w, c, c, 0.8)
  >>> ((w > t_p) | (w < -t_n)).tolist(), bool(lam > 0)
  ([False, False, False, False, True], True)
  >>> lam, t_p, t_n = ec2t_at_sparsity(w, c, c, 0.4)
  >>> ((w > t_p) | (w < -t_n)).tolist(), bool(lam < 0)
  ([True, False, False, True, True], True)

  Source: Marban et al., arXiv 2004.01077, section 3, solved for lambda.
  Differs from the paper: log2 P_0 - log2 P_c counts as .001 at least, so that a
  cluster as common as zero can be thinned out, too.
  """
  rate_p, rate_n = (
    jnp.maximum(r, _LEAST_RATE) for r in _rates(w, w_p, w_n, min_p_0)
  )
  w_p, w_n, wide = widen(w_p), widen(w_n), widen(w)
  scale = jnp.where(wide < 0, w_n, w_p)
  turns = scale * (2 * jnp.abs(wide) - scale)
  turns /= jnp.where(wide < 0, rate_n, rate_p)
  # A weight of 0 is zero at any lambda.
  never = jnp.maximum(w_p * w_p / rate_p, w_n * w_n / rate_n)
  turns = jnp.where(wide == 0, -jnp.max(never), turns)

  share = jnp.round(jnp.asarray(sparsity, jnp.float32) * w.size) / w.size
  # Magnitudes are what is searched, so one side of lambda = 0 at a time.
  below = jnp.mean(turns > 0, dtype=jnp.float32) < 1 - share
  sign = jnp.where(below, -1, 1).astype(turns.dtype)
  if guess is not None:
    guess = jnp.maximum(sign.astype(jnp.float32) * guess, 0)
  found = magnitude_threshold(
    jnp.maximum(sign * turns, 0),
    jnp.where(below, 1 - share, share),
    guess,
    tolerance,
  )
  lam = sign.astype(jnp.float32) * found

  # A weight at lambda is zero, also if its threshold is rounded down: where
  # many tie, all of them would come back. Where none is asked for, none is.
  slack = 4 * float(jnp.finfo(jnp.float32).eps)
  slack = jnp.where(share > 0, slack, -slack)
  big = float(jnp.finfo(w_p.dtype).max) / 4

  def threshold(scale: Array, rate: Array) -> Array:
    half = 0.5 * scale
    shift = jnp.clip(0.5 * lam.astype(rate.dtype) * rate / scale, -big, big)
    return jnp.maximum(half + shift + slack * (half + jnp.abs(shift)), 0)

  return lam, threshold(w_p, rate_p), threshold(w_n, rate_n)


@dataclasses.dataclass(frozen=True, repr=False)
class EC2T(Ternarizer):
  """Trained ternary weights under an entropy constraint.

  The codes are `ec2t_assign` at `lambda = gamma delta ec2t_lambda_max`. The
  centroids learn by `dL/dw_p = sum of g over +1`, `dL/dw_n = -(sum of g over
  -1)`; the latents get g times the magnitude of their cluster, 1 at 0.
  `EC2T(sparsity=s)` takes the lambda of `ec2t_at_sparsity` instead, so that
  exactly that share is zero, and the rarer sign still pays more.

  Continue a trained float net, at a rate of the centroids far below that of
  the latents (1e-5 beside 1e-4). The last third of a run keeps the codes:

      method = dataclasses.replace(method, frozen=True)
      state = dataclasses.replace(state, opt_state=tx.init(state.params))

  Args:
    gamma: the knob of sparsity in [0, 1), a number, a traced array or a
      schedule. Not used where a sparsity is given, nor is largest.
    s: centroids start at `w_p = s max(W)`, `w_n = s |min(W)|`.
    largest: size of the largest ternary layer, `where.largest(params)`;
      smaller ones are spared by `delta = (size / largest + 0.05) / 1.05`. None
      for delta = 1.
    min_scale: centroids stay at or above `min_scale std(W)`.
    min_p_0: P_0 counts as at least this.
    scaled_gradient: False passes g to the latents unchanged.
    frozen: True or a traced array: thresholds stay, and latents get a gradient
      of 0. Momentum from before and weight decay would still move latents, so
      start the optimizer anew, as above, and mask decay.
    sparsity: share of zeros in [0, 1), a number, traced array or schedule.
    every: steps between two looks at the latents, in which shares, lambda and
      floor are found anew; 1 as published.
    channel_axis: None for two centroids a tensor; else two for each index of
      this axis, -1 for the output channels of Flax and Haiku, 0 for Equinox's.
      Shares, lambda and sparsity are always those of the whole tensor.

  Raises:
    ValueError: a hyper-parameter is out of range, or a layer is larger than
      the largest.

  >>> import tern_jax
  >>> w = jnp.array([[0.1, -0.2], [0.3, -0.4]])
  >>> params, where = {"a": {"w": w}, "b": {"w": 2 * w}}, tern_jax.kernels()
  >>> method = EC2T(gamma=0.5, s=0.9, largest=where.largest(params))
  >>> method
  EC2T(gamma=0.5, s=0.9, largest=4)
  >>> ternary = method.discretize(w, *method.init(w))
  >>> ternary.codes.tolist(), round(float(ternary.w_n), 4)
  ([[0, 0], [1, -1]], 0.36)

  Source: Marban, Becking, Wiedemann & Samek, arXiv 2004.01077, section 3.
  Differs from the paper: dL/dw_n has its true sign, which the authors' code
  reverses; shares, lambda and floor are found anew every 10 steps, not at each
  (`every=1` undoes it); the two floors are that code's; clusters that are empty
  keep lambda finite. Layers that stay float are zeroed by `ec2t_zero` ("ECP").
  A sparsity is this project's own.
  """

  gamma: Schedulable = 0.15
  s: float = 0.3
  largest: int | None = None
  min_scale: float = 0.675
  min_p_0: float = 0.5
  scaled_gradient: bool = True
  frozen: Any = False
  sparsity: Schedulable | None = None
  every: int = 10
  channel_axis: int | None = None

  def __post_init__(self):
    check_range("gamma", self.gamma, 0, 1, "0.05 is mild, 0.45 is sparse")
    check_range("s", self.s, 1e-6, 2, "the paper has 0.2 to 0.45")
    check_range("largest", self.largest, 1, float("inf"), "count weights")
    check_range("min_scale", self.min_scale, 0, float("inf"), "try 0.675")
    check_range("min_p_0", self.min_p_0, 0, 1, "0 lifts the floor")
    check_sparsity(self.sparsity)
    check_range("every", self.every, 1, float("inf"), "count training steps")

  def init(self, w: Array) -> tuple[Arrays, Arrays]:
    """Returns the centroids; as state their floor, thresholds and lambda."""
    axes = reduced_axes(w, self.channel_axis)
    sides = {"w_n": -widen(w), "w_p": widen(w)}
    tops = {k: _top(side, axes) for k, side in sides.items()}
    started = {k: self.s * top for k, top in tops.items()}
    count = jnp.zeros((), jnp.int32)
    seen = self._look(w, started, count)
    return self._clamp(w, started, seen["floor"]), {"count": count, **seen}

  def __call__(self, w: Array, scales: Arrays, state: Arrays) -> Array:
    """Returns the ternary weights, with the gradients of the class."""
    # Scales are widened so that their gradients are summed in float32.
    w_p, w_n = widen(scales["w_p"]), widen(scales["w_n"])
    codes = _codes(w, state["t_p"], state["t_n"]).astype(w_p.dtype)
    factor = jnp.where(codes == 0, 1, jnp.abs(dense(codes, w_p, w_n)))
    factor = factor if self.scaled_gradient else jnp.ones_like(w_p)
    factor = jnp.where(self.frozen, 0, factor)
    return trained_scales(widen(w), codes, w_p, w_n, factor).astype(w.dtype)

  def discretize(self, w: Array, scales: Arrays, state: Arrays) -> Ternary:
    """Returns the codes beyond the thresholds, and the centroids."""
    return Ternary(
      _codes(w, state["t_p"], state["t_n"]).astype(jnp.int8), **scales
    )

  def after_step(
    self, w: Array, scales: Arrays, state: Arrays
  ) -> tuple[Arrays, Arrays]:
    """Keeps the centroids at their floor, and assigns anew unless frozen."""
    count = state["count"] + 1
    held = {name: x for name, x in state.items() if name != "count"}
    due, tolerance = look_at(self.every, self.sparsity, count)
    seen = jax.lax.cond(
      due & jnp.logical_not(self.frozen),
      lambda: self._look(w, scales, count, held, tolerance),
      lambda: held,
    )
    return self._clamp(w, scales, seen["floor"]), {"count": count, **seen}

  def refresh(
    self, w: Array, scales: Arrays, state: Arrays
  ) -> tuple[Arrays, Arrays]:
    """Assigns these latents anew, unless frozen."""
    now = {**state, **self._look(w, scales, state["count"], state)}
    kept = {k: jnp.where(self.frozen, state[k], now[k]) for k in state}
    return scales, kept

  def invert(
    self, ternary: Ternary, count: Array
  ) -> tuple[Array, Arrays, Arrays]:
    """Returns the weights themselves, or nearly so, and the centroids.

    Latents are farther out where a threshold would be too close, and closer,
    down to .6 of the centroids, where those would be below their floor. At a
    sparsity, which must be that of these weights, lambda is 0.
    """
    scales = {"w_n": alive(ternary.w_n), "w_p": alive(ternary.w_p)}
    codes, dtype = ternary.codes, ternary.dtype
    wide = {k: widen(v) for k, v in scales.items()}
    w_p, w_n = wide["w_p"], wide["w_n"]
    if self.sparsity is None:
      seen = self._look(dense(codes, **scales), scales, count)
      w_p = jnp.maximum(w_p, 1.25 * seen["t_p"])
      w_n = jnp.maximum(w_n, 1.25 * seen["t_n"])
    w = dense(codes, w_p, w_n)
    least = jnp.minimum(wide["w_n"], wide["w_p"])
    share = 0.99 * least / self._floor(w)
    w = (w * jnp.clip(share, 0.6, 1)).astype(dtype)
    seen = self._look(w, scales, count)
    if self.sparsity is not None:
      check_zeros(codes, self.sparsity, count)
      half = {"t_n": wide["w_n"] / 2, "t_p": wide["w_p"] / 2}
      seen |= {"lam": jnp.zeros_like(seen["lam"]), **half}
    if concrete(least) and jnp.any(least < seen["floor"]):
      raise ValueError(
        f"{self!r} keeps magnitudes at or above min_scale std(W), but those of"
        " these weights are too unequal for that: take a smaller min_scale."
      )
    return w, scales, {"count": count, **seen}

  def _look(
    self,
    w: Array,
    scales: Arrays,
    count: Array,
    held: Arrays | None = None,
    tolerance: Array | float = 0.0,
  ) -> Arrays:
    """Returns the least centroids and the thresholds, both widened.

    At a sparsity also lambda, where the next look starts.
    """
    floor = self._floor(w)
    clamped = self._clamp(w, scales, floor)
    if self.sparsity is None:
      t_p, t_n = self._thresholds(w, count, **clamped)
      return {"floor": floor, "t_n": t_n, "t_p": t_p}
    lam, t_p, t_n = ec2t_at_sparsity(
      w,
      **clamped,
      sparsity=at(self.sparsity, count),
      min_p_0=self.min_p_0,
      guess=None if held is None else held["lam"],
      tolerance=tolerance,
    )
    return {"floor": floor, "lam": lam, "t_n": t_n, "t_p": t_p}

  def _floor(self, w: Array) -> Array:
    axes = reduced_axes(w, self.channel_axis)
    std = jnp.std(widen(w), axes, keepdims=axes is not None)
    # The least one keeps centroids positive where all weights are equal.
    return jnp.maximum(self.min_scale * std, least_scale(w.dtype))

  def _clamp(self, w: Array, scales: Arrays, floor: Array) -> Arrays:
    held = {k: jnp.maximum(widen(v), floor) for k, v in scales.items()}
    return {k: v.astype(w.dtype) for k, v in held.items()}

  def _thresholds(
    self, w: Array, count: Array, w_p: Array, w_n: Array
  ) -> tuple[Array, Array]:
    largest = w.size if self.largest is None else self.largest
    if w.size > largest:
      raise ValueError(
        f"EC2T got largest={largest} and a layer of {w.size} weights: give the"
        " size of the largest layer that is made ternary."
      )
    delta = (w.size / largest + 0.05) / 1.05
    most = ec2t_lambda_max(w, w_p, w_n, self.min_p_0)
    lam = at(self.gamma, count, most.dtype) * delta * most
    return ec2t_thresholds(w, w_p, w_n, lam, self.min_p_0)


def ec2t_zero(w: Array, method: EC2T) -> Array:
  """Float weights, zero where zero is the cheapest centroid: the paper's "ECP".

  `W = w 1[argmin_c (w - c)^2 - lambda log2 P_c != 0]`, with the centroids and
  lambda that the method starts with at w. The gradient passes to w unchanged,
  so that a zero can come back.

  For float kernels beside ternary ones, in every forward and once more for the
  file:

      where = tern_jax.kernels(include="project")
      floats = tern_jax.kernels(include=("reduce", "expand", "head"))
      tern = tern_jax.ParamTransform(EC2T(largest=where.largest(tree)), where)
      ecp = EC2T(gamma=0.15, s=0.25, largest=floats.largest(tree))
      chosen = floats(tree)

      def zeroed(tree):
        return jax.tree.map(
          lambda chosen, w: ec2t_zero(w, ecp) if chosen else w, chosen, tree)

      weights = zeroed(tern(params, state))  # what the loss takes
      packed = tern_jax.pack(zeroed(tern.discretize(params, state)))

  Args:
    w: float, any shape.
    method: its gamma, s, largest, min_scale, min_p_0 and channel_axis; largest
      is that of the layers that are zeroed.

  Returns:
    Shape and dtype of w; its values, or 0.

  Raises:
    ValueError: w is larger than the method's largest layer.

  >>> w = jnp.array([-1., -.5, -.125, .125, .25, 1.])
  >>> ec2t_zero(w, EC2T(gamma=0.)).tolist()
  [-1.0, -0.5, 0.0, 0.0, 0.25, 1.0]
  >>> ec2t_zero(w, EC2T(gamma=.5)).tolist()
  [-1.0, 0.0, 0.0, 0.0, 0.0, 1.0]

  Source: Marban et al., arXiv 2004.01077, and the authors' code.
  Differs from the paper: its centroids start the same and are trained, though
  the loss does not depend on them; its gradient is scaled by them; and it
  zeroes in a second run, in which the ternary layers stand still.
  """
  _, state = method.init(w)
  kept = _codes(w, state["t_p"], state["t_n"]) != 0
  return straight_through(w, jnp.where(kept, w, jnp.zeros((), w.dtype)))


def _top(x: Array, axes: tuple[int, ...] | None) -> Array:
  return jnp.max(x, axes, keepdims=axes is not None, initial=0)


def _codes(w: Array, t_p: Array, t_n: Array) -> Array:
  plus, minus = widen(w) > t_p, widen(w) < -t_n
  return plus.astype(w.dtype) - minus.astype(w.dtype)


def _rates(
  w: Array, w_p: Array, w_n: Array, min_p_0: float
) -> tuple[Array, Array]:
  """Bits that + and - cost more than 0; finite if a cluster is empty."""
  wide = widen(w)
  tiny = float(jnp.finfo(wide.dtype).tiny)
  p_p = jnp.mean(wide > 0.5 * widen(w_p), dtype=wide.dtype)
  p_n = jnp.mean(wide < -0.5 * widen(w_n), dtype=wide.dtype)
  p_0 = jnp.maximum(1 - p_p - p_n, min_p_0)
  shrink = (1 - p_0) / jnp.maximum(p_p + p_n, tiny)
  shares = jnp.stack([p_p * shrink, p_0, p_n * shrink])
  b_p, b_0, b_n = jnp.log2(jnp.maximum(shares, tiny))
  return b_0 - b_p, b_0 - b_n
