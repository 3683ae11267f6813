"""EC2T: entropy-constrained trained ternarization."""

import dataclasses

import jax.numpy as jnp

from tern_jax.core.checks import check_range, concrete
from tern_jax.core.containers import Ternary, dense
from tern_jax.core.estimators import straight_through, trained_scales
from tern_jax.core.numerics import alive, least_scale, reduced_axes, widen
from tern_jax.core.types import (
  Array,
  Arrays,
  ChannelAxis,
  Floats,
  Scalar,
  Schedule,
)
from tern_jax.methods.ec2t_math import (
  codes_of,
  ec2t_at_sparsity,
  ec2t_lambda_max,
  ec2t_split,
  ec2t_thresholds,
  split_codes,
  top_of,
)
from tern_jax.targets.quantile import NO_CUT
from tern_jax.targets.schedules import Target, at
from tern_jax.targets.targeted import Look, Targeted


@dataclasses.dataclass(frozen=True, repr=False)
class EC2T(Targeted):
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
    frozen: True or a traced array: thresholds stay, and latents get a gradient
      of 0. Momentum from before and weight decay would still move latents, so
      start the optimizer anew, as above, and mask decay.
    sparsity: share of zeros in [0, 1), a number, traced array or schedule.
    every: steps between two updates, in which shares, lambda and floor are
      found anew; 1 as published.
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

  gamma: float | Array | Schedule = 0.15
  s: float = 0.3
  largest: int | None = None
  min_scale: float = 0.675
  min_p_0: Scalar = 0.5
  frozen: Array | bool = False
  sparsity: Target | None = None
  every: int = 10
  channel_axis: ChannelAxis = None

  def __post_init__(self):
    check_range("gamma", self.gamma, 0, 1, "0.05 is mild, 0.45 is sparse")
    check_range("s", self.s, 1e-6, 2, "the paper has 0.2 to 0.45")
    check_range("largest", self.largest, 1, float("inf"), "count weights")
    check_range("min_scale", self.min_scale, 0, float("inf"), "try 0.675")
    check_range("min_p_0", self.min_p_0, 0, 1, "0 lifts the floor")
    super().__post_init__()

  def init(self, w: Floats) -> tuple[Arrays, Arrays]:
    """Returns the centroids; as state their floor, thresholds and lambda."""
    axes = reduced_axes(w, self.channel_axis)
    sides = {"w_n": -widen(w), "w_p": widen(w)}
    tops = {k: top_of(side, axes) for k, side in sides.items()}
    started = {k: self.s * top for k, top in tops.items()}
    state = self.state_at(w, started)
    return self.project(w, started, state), state

  def __call__(self, w: Floats, scales: Arrays, state: Arrays) -> Floats:
    """Returns the ternary weights, with the gradients of the class."""
    # Scales are widened so that their gradients are summed in float32.
    w_p, w_n = widen(scales["w_p"]), widen(scales["w_n"])
    codes = self._codes(w, state).astype(w_p.dtype)
    factor = jnp.where(codes == 0, 1, jnp.abs(dense(codes, w_p, w_n)))
    factor = jnp.where(self.frozen, 0, factor)
    return trained_scales(widen(w), codes, w_p, w_n, factor).astype(w.dtype)

  def discretize(self, w: Floats, scales: Arrays, state: Arrays) -> Ternary:
    """Returns the codes beyond the thresholds, and the centroids."""
    return Ternary(self._codes(w, state).astype(jnp.int8), **scales)

  def measure(
    self, w: Floats, scales: Arrays, look: Look, held: Arrays | None = None
  ) -> Arrays:
    """Returns the least centroids and the thresholds, both widened.

    At a sparsity also their cuts, and lambda, where the next search starts.
    """
    floor = self._floor(w)
    clamped = self.project(w, scales, {"floor": floor})
    if self.sparsity is None:
      t_p, t_n = self._thresholds(w, look.count, **clamped)
      return {"floor": floor, "t_n": t_n, "t_p": t_p}
    lam, t_p, t_n = ec2t_at_sparsity(
      w,
      **clamped,
      sparsity=self.asked(look.count),
      min_p_0=self.min_p_0,
      guess=None if held is None else held["lam"],
      tolerance=look.tolerance,
    )
    zeros = self.zeros_of(look.count, w.size)
    found = ec2t_split(
      w, **clamped, t_p=t_p, t_n=t_n, zeros=zeros, tolerance=look.tolerance
    )
    return {"floor": floor, "lam": lam, **found}

  def project(self, w: Floats, scales: Arrays, state: Arrays) -> Arrays:
    """Keeps the centroids at or above their floor."""
    held = {k: jnp.maximum(widen(v), state["floor"]) for k, v in scales.items()}
    return {k: v.astype(w.dtype) for k, v in held.items()}

  def invert(
    self, ternary: Ternary, count: Array
  ) -> tuple[Floats, Arrays, Arrays]:
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
      seen = self.measure(dense(codes, **scales), scales, Look(count))
      w_p = jnp.maximum(w_p, 1.25 * seen["t_p"])
      w_n = jnp.maximum(w_n, 1.25 * seen["t_n"])
    w = dense(codes, w_p, w_n)
    least = jnp.minimum(wide["w_n"], wide["w_p"])
    share = 0.99 * least / self._floor(w)
    w = (w * jnp.clip(share, 0.6, 1)).astype(dtype)
    seen = self.measure(w, scales, Look(count))
    if self.sparsity is not None:
      self.check_zeros(codes, count)
      half = {"t_n": wide["w_n"] / 2, "t_p": wide["w_p"] / 2}
      cuts = {k: jnp.full_like(seen[k], NO_CUT) for k in ("cut_n", "cut_p")}
      seen |= {"lam": jnp.zeros_like(seen["lam"]), **half, **cuts}
    if concrete(least) and jnp.any(least < seen["floor"]):
      raise ValueError(
        f"{self!r} keeps magnitudes at or above min_scale std(W), but those of"
        " these weights are too unequal for that: take a smaller min_scale."
      )
    return w, scales, {"count": count, **seen}

  def _codes(self, w: Array, state: Arrays) -> Array:
    if self.sparsity is not None:
      return split_codes(w, state)
    return codes_of(w, state["t_p"], state["t_n"])

  def _floor(self, w: Array) -> Array:
    axes = reduced_axes(w, self.channel_axis)
    keep = axes is not None
    if not w.size:
      return top_of(widen(w), axes) + least_scale(w.dtype)
    std = jnp.std(widen(w), axes, keepdims=keep)
    # The least one keeps centroids positive where all weights are equal.
    return jnp.maximum(self.min_scale * std, least_scale(w.dtype))

  def _thresholds(
    self, w: Array, count: Array, w_p: Array, w_n: Array
  ) -> tuple[Array, Array]:
    largest = w.size if self.largest is None else self.largest
    if w.size > largest:
      raise ValueError(
        f"EC2T got largest={largest} and a layer of {w.size} weights: give the"
        " size of the largest layer that is made ternary."
      )
    delta = (w.size / max(largest, 1) + 0.05) / 1.05
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
  scales, state = method.init(w)
  kept = method.discretize(w, scales, state).codes != 0
  return straight_through(w, jnp.where(kept, w, jnp.zeros((), w.dtype)))
