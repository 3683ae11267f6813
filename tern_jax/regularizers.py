"""WDR, the weight discretization regularizer, and its gradient transform.

A latent Theta stands for the weight W = tanh(Theta). WDR is
`R(Theta) = sum (alpha - W^2) W^2`. Its only minima are W = 0 and W = +-1; the
barrier between them lies at |W| = sqrt(alpha / 2), so alpha controls which
weights end at zero. Its force fades towards the barrier, where a hard forward
wants it most: there, weights that the loss pulls to and fro flip their codes
again and again. The sharp WDR, half the squared distance to the codes, has
the same minima and the same barrier, and its full force beside it.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from tern_jax.base import Array, call_repr, check_range, path_str, widen
from tern_jax.select import check_patterns, matches_any
from tern_jax.sparsity import (
  TOLERANCE,
  AcrossLayers,
  Schedulable,
  at,
  check_sparsity,
  check_targets,
  magnitude_threshold,
  target_of,
)

#: Theta over the latents where the barrier is at a quantile: Adam moves latents
#: by its rate whatever they are, and with this gain its usual 1e-3 is right.
GAIN = 10.0


def wdr(theta: Array, alpha: Array | float, sharp: bool = False) -> Array:
  """Weight discretization regularizer of one array.

  `R(Theta) = sum_i (alpha - W_i^2) W_i^2` with `W = tanh(Theta)`; if sharp,
  `R(Theta) = sum_i (|W_i| - 1[|W_i| > barrier])^2 / 2`.

  Args:
    theta: float, any shape, latents.
    alpha: broadcastable to theta; ternary for 0 < alpha < 2.
    sharp: whether the barrier is a kink.

  Returns:
    0-d, float32 (float64 for float64 latents).

  Raises:
    TypeError: theta is not floating-point.

  >>> latents = jnp.array([0., 20., -20.])
  >>> [float(wdr(latents, 0.5, sharp)) for sharp in (False, True)]
  [-1.0, 0.0]

  Source: Deng & Zhang, arXiv 2011.00580; the sharp form is, for two codes, the
  W-shaped regularizer of Bai, Wang & Liberty, arXiv 1810.00861, squared.
  """
  w = jnp.tanh(_wide(theta))
  alpha = jnp.asarray(alpha, w.dtype)
  if sharp:
    return jnp.sum(jnp.square(_off(w, alpha))) / 2
  s = jnp.square(w)
  return jnp.sum((alpha - s) * s)


def wdr_grad(theta: Array, alpha: Array | float, sharp: bool = False) -> Array:
  """Gradient of WDR: `dR/dTheta = 2 W (1 - W^2) (alpha - 2 W^2)`.

  If sharp, `(W - sign(W) 1[|W| > barrier]) (1 - W^2)`.

  Args:
    theta: float, any shape, latents.
    alpha: broadcastable to theta.
    sharp: whether the barrier is a kink.

  Returns:
    Shape of theta, float32 (float64 for float64 latents).

  Raises:
    TypeError: theta is not floating-point.

  >>> at_barrier = jnp.arctanh(wdr_barrier(0.5))
  >>> abs(float(wdr_grad(at_barrier, alpha=0.5))) < 1e-6
  True
  """
  w = jnp.tanh(_wide(theta))
  alpha = jnp.asarray(alpha, w.dtype)
  s = jnp.square(w)
  slope = _off(w, alpha) if sharp else 2 * w * (alpha - 2 * s)
  return slope * (1 - s)


def _off(w: Array, alpha: Array) -> Array:
  """Returns by how much W is off the code on its side of the barrier."""
  return w - jnp.where(jnp.abs(w) > wdr_barrier(alpha), jnp.sign(w), 0)


def wdr_barrier(alpha: Array | float) -> Array:
  """Magnitude |W| that separates the basin of 0 from those of -1 and +1.

  `|W| = sqrt(alpha / 2)`, 0 for a negative alpha (binary weights).

  Args:
    alpha: any shape.

  Returns:
    Shape of alpha, float.

  >>> float(wdr_barrier(0.5))
  0.5
  """
  alpha = jnp.asarray(alpha)
  if not jnp.issubdtype(alpha.dtype, jnp.floating):
    alpha = alpha.astype(jnp.float32)
  return jnp.sqrt(jnp.maximum(alpha, 0) / 2)


def predicted_sparsity(theta: Array | float, alpha: Array | float) -> Array:
  """Share of zeros that WDR alone drives latents to.

  For an array the share of |tanh(Theta)| below the barrier; for a 0-d sigma,
  of latents N(0, sigma^2), `erf(arctanh(sqrt(alpha / 2)) / (sigma sqrt 2))`.

  Args:
    theta: latents of any shape, or a 0-d standard deviation sigma > 0.
    alpha: 0-d, in [0, 2).

  Returns:
    0-d, float32 (float64 for float64 input).

  Raises:
    ValueError: alpha lies outside [0, 2), or sigma is not positive.

  >>> round(float(predicted_sparsity(0.5, alpha=0.1)), 3)
  0.351
  """
  check_alpha(alpha)
  x = _wide(jnp.asarray(theta))
  limit = jnp.arctanh(wdr_barrier(jnp.asarray(alpha, x.dtype)))
  if x.ndim:
    return jnp.mean(jnp.abs(x) <= limit, dtype=x.dtype)
  check_range("sigma", theta, 1e-30, jnp.inf, "it is a standard deviation")
  return jax.scipy.special.erf(limit / (x * jnp.sqrt(2.0).astype(x.dtype)))


def alpha_for_sparsity(theta: Array | float, sparsity: Array | float) -> Array:
  """The alpha whose barrier leaves the asked share of weights in the 0 basin.

  For an array `2 q^2`, with q the quantile of |tanh(Theta)| at the sparsity;
  for a 0-d sigma, `2 tanh(sigma sqrt(2) erfinv(sparsity))^2`. It inverts
  `predicted_sparsity`.

  Args:
    theta: latents of any shape, or a 0-d standard deviation sigma > 0.
    sparsity: 0-d, share of zeros in [0, 1).

  Returns:
    0-d, float32 (float64 for a float64 sigma).

  Raises:
    ValueError: sparsity lies outside [0, 1), or sigma is not positive.

  >>> round(float(alpha_for_sparsity(0.5, sparsity=0.351)), 3)
  0.1
  """
  check_sparsity(sparsity)
  x = _wide(jnp.asarray(theta))
  if x.ndim:
    limit = magnitude_threshold(x, sparsity)
  else:
    check_range("sigma", theta, 1e-30, jnp.inf, "it is a standard deviation")
    share = jnp.asarray(sparsity, x.dtype)
    limit = x * jnp.sqrt(2.0).astype(x.dtype) * jax.scipy.special.erfinv(share)
  return 2 * jnp.square(jnp.tanh(limit))


@dataclasses.dataclass(frozen=True, repr=False)
class AtSparsity:
  """An alpha made by `at_sparsity`."""

  sparsity: Schedulable
  every: int = 10
  gain: float = GAIN

  def __post_init__(self):
    check_sparsity(self.sparsity)
    check_range("every", self.every, 1, float("inf"), "count training steps")
    check_gain(self.gain)

  def __repr__(self) -> str:
    """Prints the call that made it."""
    return call_repr(self, "at_sparsity")


def at_sparsity(
  sparsity: Schedulable, every: int = 10, gain: float = GAIN
) -> AtSparsity:
  """Makes an alpha that keeps the barrier at a quantile of each leaf.

  `alpha = 2 q^2`, q the quantile of the leaf's |tanh(Theta)| at the asked
  sparsity, found anew every few updates: the same barrier as
  `SCA(sparsity=..., every=..., gain=...)` keeps for the same arguments, but for
  the last 5 % of the run of a `ramp`, in which SCA looks at each step.

  Args:
    sparsity: share of zeros in [0, 1), or a schedule of it; also `per_layer`
      or `across_layers`.
    every: updates between two looks at the quantile.
    gain: Theta over the parameters; 1 where they are Theta itself.

  Returns:
    An `alpha` for `wdr_transform`, printable as this call.

  Raises:
    ValueError: a concrete sparsity outside [0, 1), `every` below 1, or a gain
      that is not positive.

  >>> at_sparsity(0.9)
  at_sparsity(sparsity=0.9)
  """
  return AtSparsity(sparsity, every, gain)


@dataclasses.dataclass(frozen=True, repr=False)
class Relative:
  """A strength made by `relative`."""

  kappa: Schedulable

  def __post_init__(self):
    _check_strength("kappa", self.kappa)

  def __repr__(self) -> str:
    """Prints the call that made it."""
    return call_repr(self, "relative")


def relative(kappa: Schedulable) -> Relative:
  """Makes a strength that is measured against the gradient that arrives.

  A leaf's gradient g becomes `g + kappa * (rms(g) / rms(r)) * r`, with r the
  gradient of WDR there. Whatever the loss, kappa = 1 makes WDR as strong as
  the loss in every layer, which no absolute strength can.

  The gradient of the sharp WDR by Theta is at most 1, and is added as it is,
  times `kappa * rms(g)`. Over its rms, which shrinks as latents settle, it
  would hold the last of them to whatever codes they have just then.

  Args:
    kappa: number >= 0, traced array, or a schedule.

  Returns:
    A `strength` for `wdr_transform`, printable as this call.

  Raises:
    ValueError: a concrete kappa is negative.

  >>> relative(0.5)
  relative(kappa=0.5)
  """
  return Relative(kappa)


@dataclasses.dataclass(frozen=True, repr=False)
class LateKappa:
  """Schedule made by `late_kappa`."""

  steps: int
  onset: float = 0.7
  full: float = 0.95
  first: float = 0.1
  last: float = 30.0
  churn: float | None = 0.15

  def __post_init__(self):
    check_range("steps", self.steps, 1, float("inf"), "count training steps")
    check_range("onset", self.onset, 0, self.full, "it comes before full")
    check_range("churn", self.churn, 1e-9, 1, "it is a share of the nonzeros")

  def __call__(self, count: Array) -> Array:
    """Returns kappa at a step."""
    done = jnp.asarray(count, jnp.float32) / self.steps
    share = jnp.clip((done - self.onset) / (self.full - self.onset), 0, 1)
    kappa = self.first * (self.last / self.first) ** share
    return jnp.where(done < self.onset, 0.0, kappa)

  @property
  def ahead(self) -> int:
    """Steps before the onset at which to start to look at what changes."""
    return max(round(self.steps / 100), 1)

  @property
  def watches(self) -> bool:
    """Whether what changes before the onset matters, and can be seen."""
    return self.churn is not None and self.onset * self.steps > self.ahead

  def share(self, exchanged: Array) -> Array:
    """Returns the share of kappa for that share of nonzeros that are new."""
    assert self.churn is not None
    return jnp.minimum(exchanged / self.churn, 1)

  def __repr__(self) -> str:
    """Prints the call that made it."""
    return call_repr(self, "late_kappa")


def late_kappa(
  steps: int,
  onset: float = 0.7,
  full: float = 0.95,
  first: float = 0.1,
  last: float = 30.0,
  churn: float | None = 0.15,
) -> LateKappa:
  """Makes the schedule of kappa that lets codes settle at the end of a run.

  0 before `onset`, then exponential from `first` to `last` at `full`, then
  constant: the loss has chosen the codes by then, WDR makes them stay.

  Whether they are worth keeping shows in the 1 % of the steps before the onset.
  Where many nonzeros have changed places by then, in small nets or at many
  zeros, codes are drawn by lot over and over, and the sooner that ends, the
  better. Where few have, the loss still improves the codes, and a strong WDR
  would stop it. `wdr_transform` therefore uses the share `min(1, c / churn)` of
  kappa, with c the share of all nonzeros that were zeros then.

  MNIST, 784-32-32-10, validation accuracy in %, means of 5 seeds, by `last`,
  which with the sharp WDR need not be tuned; all at Adam's 1e-3, without WDR at
  the better of that and half of it:

    zeros      no   smooth   sharp
              WDR       30       1       3      10      30     100
     0.5    95.91    96.23   96.25   96.23   96.18   96.32   96.27
     0.8    95.07    95.63   95.77   95.75   95.70   95.59   95.69
     0.9    93.35    93.96   94.78   95.01   94.86   94.77   94.89
     0.95   91.37    92.67   92.78   93.25   93.06   92.76   93.03

  Fashion-MNIST, 784-512-512-10 without norm, a net with capacity to spare, 75 %
  zeros, validation accuracy, two rates and seeds: 89.73 without WDR, 89.41 with
  all of kappa, 89.65 with the share that the codes there ask for, a tenth.

  Args:
    steps: training steps of the whole run.
    onset: share of the run at which WDR sets in.
    full: share of the run at which it has its full strength.
    first: kappa at the onset.
    last: kappa at full strength.
    churn: share of the nonzeros in (0, 1) that must be new in that time for
      all of kappa to be used; None always uses it.

  Returns:
    A schedule for `relative`, printable as this call.

  >>> kappa = late_kappa(1000)
  >>> [round(float(kappa(n)), 3) for n in (699, 700, 950, 1000)]
  [0.0, 0.1, 30.0, 30.0]
  """
  return LateKappa(steps, onset, full, first, last, churn)


class WdrState(NamedTuple):
  """State of `wdr_transform`."""

  count: Array
  """Updates done."""
  threshold: Any
  """Of each leaf, where alpha is `at_sparsity`."""
  nonzero: Any
  """Bits: which weights were beyond the barrier 1 % of the steps before
  the onset of a `late_kappa`, then at it."""
  share: Array
  """Of kappa that is used, by how many of them changed in between."""


def wdr_transform(
  alpha: Any,
  strength: Any,
  mask: Any = None,
  stacked: tuple[str, ...] = (),
  sharp: bool = False,
) -> optax.GradientTransformation:
  """Adds the gradient of WDR to the updates, for any optax chain.

  Each leaf's update u becomes `u + strength * dR/dTheta`. Placed before Adam
  it is the loss term `loss + strength * R` (coupled); placed after Adam, and
  before the learning rate, it acts undisturbed by Adam's normalization
  (decoupled), as `optax.add_decayed_weights` does. With `relative(kappa)` the
  place matters too: kappa is measured against the update that arrives.

  Args:
    alpha: a number or traced array in [0, 2); a schedule; a tree of them that
      is a prefix of the parameters; or `at_sparsity(s)`.
    strength: the paper's lambda >= 0 as a number, traced array or schedule;
      or `relative(kappa)`.
    mask: a tree of bools or a function from parameters to one, as in
      `optax.masked`; None takes every leaf, biases too, so that most uses
      want `mask=tern_jax.kernels()`.
    stacked: patterns of leaves whose first axis enumerates layers (as made by
      `nn.scan`): `relative` and `at_sparsity` then look at each layer alone.
    sharp: whether the barrier is a kink, as a hard forward wants it.

  Returns:
    An `optax.GradientTransformation`. Updates keep their dtype; None updates
    stay None. `optax.flatten` joins all leaves into one, hence per-leaf
    statistics become global. Under `optax.inject_hyperparams`, name a
    callable mask in `static_args`.

  Raises:
    ValueError: alpha or strength out of range; `update` without `params`.
    TypeError: a selected parameter is not floating-point.

  >>> tx = optax.chain(wdr_transform(alpha=0.5, strength=0.1), optax.sgd(1.0))
  >>> params = {"w": jnp.array([0.1, 2.0])}
  >>> updates, _ = tx.update({"w": jnp.zeros(2)}, tx.init(params), params)
  >>> [round(float(u), 5) for u in updates["w"]]  # to 0, and away from it
  [-0.00948, 0.01851]

  Source: Deng & Zhang, arXiv 2011.00580. Differs from the paper: the gradient
  is added to the update instead of the loss, which is the same before the
  first transform of a chain; `relative`, `at_sparsity` and the sharp form are
  not in it.
  """
  if not isinstance(alpha, AtSparsity):
    jax.tree.map(check_alpha, alpha)
  if not isinstance(strength, Relative):
    _check_strength("strength", strength)

  gain = alpha.gain if isinstance(alpha, AtSparsity) else 1.0
  late: Any = strength.kappa if isinstance(strength, Relative) else None
  if not (isinstance(late, LateKappa) and late.watches):
    late = None

  def lift(path: Any, fn: Any, in_axes: Any = 0) -> Any:
    is_stack = matches_any(stacked, path_str(path))
    return jax.vmap(fn, in_axes) if is_stack else fn

  def look(params: Any, old: Any, count: Array, tolerance: float) -> Any:
    """Returns the thresholds of `at_sparsity`, guessed by the old ones."""
    if isinstance(alpha.sparsity, AcrossLayers):
      leaves = jax.tree.leaves(params)
      target = at(alpha.sparsity.sparsity, count)
      found = magnitude_threshold(leaves, target, tolerance=tolerance)
      return jax.tree.map(lambda t: jnp.broadcast_to(found, t.shape), old)

    def find(path: Any, theta: Array, guess: Array) -> Array:
      target = at(target_of(alpha.sparsity, path_str(path)), count)
      return lift(
        path,
        lambda theta, guess: magnitude_threshold(
          theta, target, guess, tolerance
        ),
      )(theta, guess)

    return jax.tree_util.tree_map_with_path(find, params, old)

  def alphas_of(params: Any, threshold: Any) -> Any:
    if isinstance(alpha, AtSparsity):
      return jax.tree.map(
        lambda t: 2 * jnp.square(jnp.tanh(gain * t)), threshold
      )
    return jax.tree.broadcast(alpha, params)

  def beyond(params: Any, alphas: Any, count: Array) -> Any:
    """Returns which weights are beyond the barrier, eight to a byte."""

    def one(theta: Array, a: Array) -> Array:
      w = jnp.abs(jnp.tanh(gain * widen(theta)))
      return jnp.packbits(jnp.atleast_1d(w > wdr_barrier(a)), axis=-1)

    def of(path: Any, theta: Array, a: Any) -> Array:
      _check_floating(path_str(path), theta)
      a = at(a, count, widen(theta).dtype)
      return lift(path, one, (0, 0 if a.ndim else None))(theta, a)

    return jax.tree_util.tree_map_with_path(of, params, alphas)

  def init(params: Any) -> WdrState:
    leaves = jax.tree_util.tree_leaves_with_path(params)
    paths = [path_str(path) for path, _ in leaves]
    check_patterns(stacked, paths)
    count = jnp.zeros((), jnp.int32)
    threshold = nonzero = ()
    if isinstance(alpha, AtSparsity):
      check_targets(alpha.sparsity, paths)
      unknown = jax.tree_util.tree_map_with_path(
        lambda path, x: jnp.zeros(
          x.shape[: matches_any(stacked, path_str(path))], jnp.float32
        ),
        params,
      )
      threshold = look(params, unknown, count, 0.0)
    if late is not None:
      nonzero = beyond(params, alphas_of(params, threshold), count)
    return WdrState(count, threshold, nonzero, jnp.ones((), jnp.float32))

  def update(
    updates: Any, state: Any, params: Any = None
  ) -> tuple[Any, WdrState]:
    if params is None:
      raise ValueError(
        "wdr_transform got no parameters, and WDR is a function of them:"
        " call tx.update(grads, opt_state, params)."
      )
    count, threshold, nonzero, share = state
    is_on, sets_in = _is_on(strength, count), _sets_in(strength, count)
    is_before = late is not None and _sets_in(strength, count + late.ahead)
    if isinstance(alpha, AtSparsity):
      due = is_before | sets_in | (is_on & (count % alpha.every == 0))
      threshold = jax.lax.cond(
        due,
        lambda old: look(params, old, count, TOLERANCE),
        lambda old: old,
        threshold,
      )
    alphas = alphas_of(params, threshold)
    if late is not None:
      now = jax.lax.cond(
        is_before | sets_in,
        lambda: beyond(params, alphas, count),
        lambda: nonzero,
      )
      share = jax.lax.cond(
        sets_in,
        lambda: late.share(_exchanged(nonzero, now)),
        lambda: share,
      )
      nonzero = now

    def add(path: Any, u: Array | None, theta: Array, a: Any) -> Array | None:
      if u is None:
        return None
      _check_floating(path_str(path), theta)
      a = at(a, count, widen(theta).dtype)

      def add_one(u: Array, theta: Array, a: Array) -> Array:
        return _add(u, theta, a, gain, strength, share, count, sharp)

      in_axes = (0, 0, 0 if a.ndim else None)
      return lift(path, add_one, in_axes)(u, theta, a)

    updates = jax.tree_util.tree_map_with_path(
      add, updates, params, alphas, is_leaf=lambda x: x is None
    )
    count = jnp.asarray(optax.safe_increment(count))
    return updates, WdrState(count, threshold, nonzero, share)

  transform = optax.GradientTransformation(init, update)
  return transform if mask is None else optax.masked(transform, mask)


def _add(
  u: Array,
  latent: Array,
  a: Array,
  gain: float,
  strength: Any,
  share: Array,
  count: Array,
  sharp: bool,
) -> Array:
  """Returns u + strength * dR/dlatent in the dtype of u.

  Of the kappa of a relative strength, only a share is used.
  """

  def add(factor: Any) -> Array:
    r = gain * wdr_grad(gain * widen(latent), a, sharp)
    return (u.astype(r.dtype) + factor(r) * r).astype(u.dtype)

  if not isinstance(strength, Relative):
    return add(lambda r: at(strength, count, r.dtype))

  def balanced(r: Array) -> Array:
    # The ratio of norms is the ratio of root mean squares. The sharp r counts
    # as if it were 1 by Theta, its bound, everywhere.
    size = gain * r.size**0.5 if sharp else _norm(r)
    size = jnp.maximum(size, jnp.finfo(r.dtype).tiny)
    kappa = share.astype(r.dtype) * at(strength.kappa, count, r.dtype)
    return kappa * _norm(u.astype(r.dtype)) / size

  # A late WDR is off for most of a run, and must cost nothing then.
  return jax.lax.cond(_is_on(strength, count), lambda: add(balanced), lambda: u)


def _is_on(strength: Any, count: Array) -> Array | bool:
  """Says whether WDR does anything at a step."""
  return not isinstance(strength, Relative) or at(strength.kappa, count) > 0


def _sets_in(strength: Any, count: Array) -> Array:
  """Says whether WDR does something at a step, and nothing before."""
  was_on = _is_on(strength, count - 1)
  return _is_on(strength, count) & jnp.logical_not(was_on)


def _exchanged(before: Any, now: Any) -> Array:
  """Returns the share of the bits set now that were not so before."""

  def count(words: Any) -> Array:
    ones = (jnp.sum(jnp.bitwise_count(x)) for x in jax.tree.leaves(words))
    return sum((x.astype(jnp.float32) for x in ones), jnp.float32(0))

  new = jax.tree.map(lambda x, y: y & ~x, before, now)
  return count(new) / jnp.maximum(count(now), 1)


def _norm(x: Array) -> Array:
  return jnp.sqrt(jnp.sum(jnp.square(x)))


def _wide(theta: Array) -> Array:
  """Returns latents in the precision in which WDR is computed."""
  theta = jnp.asarray(theta)
  _check_floating("theta", theta)
  return widen(theta)


def _check_floating(name: str, theta: Array) -> None:
  if not jnp.issubdtype(theta.dtype, jnp.floating):
    raise TypeError(
      f"{name} is {theta.dtype}, but WDR is defined for floating-point"
      " latents: convert it, or leave it out by mask=."
    )


def check_alpha(alpha: Any) -> None:
  """Raises a ValueError unless a concrete alpha lies in [0, 2)."""
  check_range(
    "alpha",
    alpha,
    0,
    2,
    "0 gives binary weights, from 2 on every weight goes to 0; try 0.1",
  )


def check_gain(gain: Any) -> None:
  """Raises a ValueError unless a gain is positive."""
  check_range("gain", gain, 1e-6, 1e6, "1 keeps Theta itself as parameters")


def _check_strength(name: str, strength: Any) -> None:
  check_range(
    name, strength, 0, float("inf"), "WDR is added to a loss; try 1e-3"
  )
