"""Sparsities asked of TTQ, TGA and EC2T, met exactly."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import tern_jax
from tern_jax import EC2T, TGA, TTQ, ParamTransform
from tern_jax.methods.ec2t_math import (
  ec2t_at_sparsity,
  ec2t_split,
  ec2t_thresholds,
  split_codes,
)
from tern_jax.training import data_mesh
from tests import helpers, reference

CLASSES = [TTQ, TGA, EC2T]
SHARES = [0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.99]
RNG = np.random.default_rng(0)
SHAPE = (8, 32, 48)
WEIGHTS = {
  "normal": RNG.normal(0.02, 0.1, SHAPE),
  "uniform": RNG.uniform(-1, 1, SHAPE),
  "laplace": RNG.laplace(0, 0.1, SHAPE),
  "skewed": RNG.exponential(0.1, SHAPE) - 0.01,
  "heavy": RNG.lognormal(0, 1.5, SHAPE) - 0.3,
  "positive": RNG.uniform(0.1, 1, SHAPE),
}
#: Axes of which each index has its own scale: 8 groups of 48 channels.
GROUP = (0, -1)


at_sparsity = jax.jit(ec2t_at_sparsity)
weights = functools.partial(helpers.weights, mu=0.01)


def zeros(method, w, scales, state):
  return jnp.sum(method.discretize(w, scales, state).codes == 0)


def asked(share, n):
  return round(share * n)


@pytest.mark.sample(2)
@pytest.mark.parametrize(
  ("method_class", "axis", "dtype"),
  [
    (TTQ, None, jnp.float32),
    (TTQ, None, jnp.bfloat16),
    (functools.partial(TGA, mean=True), GROUP, jnp.float32),
    (EC2T, GROUP, jnp.float32),
    helpers.long(EC2T, None, jnp.float32),
    helpers.long(functools.partial(TGA, mean=True), GROUP, jnp.bfloat16),
    helpers.long(EC2T, GROUP, jnp.bfloat16),
    helpers.long(EC2T, None, jnp.bfloat16),
  ],
)
def test_every_share_of_every_distribution(method_class, axis, dtype):
  """At the start, after a look at latents that moved, and after `refresh`."""

  def counts(share, w, moved):
    method = method_class(sparsity=share, every=1, channel_axis=axis)
    start = method.init(w)
    looked = method.after_step(moved, *start)
    fresh = method.refresh(moved, *looked)
    return (
      zeros(method, w, *start),
      zeros(method, moved, *looked),
      zeros(method, moved, *fresh),
    )

  shares = jnp.array(SHARES)
  counted = jax.jit(jax.vmap(counts, (0, None, None)))
  for x in WEIGHTS.values():
    moved = 0.9 * x + 0.1 * np.random.default_rng(1).permuted(x)
    w, later = (jnp.asarray(a, jnp.float32).astype(dtype) for a in (x, moved))
    start, looked, fresh = counted(shares, w, later)
    wanted = np.array([asked(s, x.size) for s in SHARES])
    np.testing.assert_array_equal(start, wanted)
    np.testing.assert_array_equal(fresh, wanted)
    # Each step measures, so that looks are as close.
    np.testing.assert_array_equal(looked, wanted)


@pytest.mark.parametrize(
  ("method_class", "axis"), [(TTQ, None), (TGA, None), (TGA, -1)]
)
def test_the_threshold_is_the_quantile_of_magnitudes(method_class, axis):
  w = weights((64, 50))
  sizes = np.sort(np.abs(np.asarray(w)).ravel())

  def look(share):
    method = method_class(sparsity=share, channel_axis=axis)
    scales, state = method.init(w)
    return method.discretize(w, scales, state).codes, state["threshold"]

  codes, thresholds = jax.jit(jax.vmap(look))(jnp.array(SHARES))
  for i, share in enumerate(SHARES):
    k = asked(share, w.size)
    threshold = np.unique(thresholds[i])
    assert threshold.size == 1
    assert sizes[k - 1] <= threshold[0] < sizes[k]
    expected = reference.codes_at_sparsity(w, share)
    np.testing.assert_array_equal(codes[i], expected)


@pytest.mark.long
@pytest.mark.sample(3)
@pytest.mark.parametrize("axis", [None, -1])
@pytest.mark.parametrize("mean", [False, True])
def test_tga_takes_its_scale_from_the_quantile(mean, axis):
  w = weights((64, 50)) + 0.05
  method = TGA(sparsity=0.8, mean=mean, channel_axis=axis)
  scales, state = method.init(w)
  assert scales == {}
  got = method.discretize(w, scales, state)
  wide = np.asarray(w, np.float64)
  axes, keep = (None, False) if axis is None else (0, True)
  mu = mean * wide.mean(axes, keepdims=keep)
  np.testing.assert_array_equal(
    got.codes, reference.codes_at_sparsity(wide - mu, 0.8)
  )
  delta = np.asarray(state["threshold"])
  _, s, _ = reference.tga(wide, delta, mean, axis)
  np.testing.assert_allclose(got.w_p, s, rtol=1e-5)


def test_tga_has_no_bound_at_a_sparsity():
  w = jnp.asarray(WEIGHTS["heavy"], jnp.float32)
  method = TGA(sparsity=0.995)
  state = method.init(w)[1]
  sigma = float(jnp.sqrt(jnp.mean(w**2)))
  assert float(state["threshold"]) > 3 * sigma
  assert int(zeros(method, w, {}, state)) == asked(0.995, w.size)


@pytest.mark.sample(2)
@pytest.mark.parametrize("detach", [True, False])
def test_tga_trains_weights_alone_at_a_sparsity(detach):
  w, g = weights(), weights(seed=1)
  method = TGA(sparsity=0.6, surrogate=0.5, detach=detach)
  scales, state = method.init(w)
  got = jax.grad(lambda w: jnp.sum(method(w, scales, state) * g))(w)
  if detach:
    np.testing.assert_array_equal(got, g)
    return
  # sigma is a function of w: dS/dsigma = lambda - t lambda'.
  codes = np.asarray(method.discretize(w, scales, state).codes)
  sigma = np.sqrt(np.mean(np.square(w)))
  t = float(state["threshold"]) / sigma
  slope = reference.inverse_mills(t) - t * reference.inverse_mills_grad(t)
  through = np.sum(np.asarray(g) * codes) * slope * w / (sigma * w.size)
  np.testing.assert_allclose(got, g + through, rtol=1e-4, atol=1e-6)


def lambdas(w, w_p, w_n, min_p_0):
  """The lambda of each weight from which on zero is the cheapest."""
  shares = reference.ec2t_shares(w, w_p, w_n, min_p_0)
  p_0, p_p, p_n = np.maximum(shares, reference.TINY)
  scale = np.where(w < 0, w_n, w_p)
  rate = np.log2(p_0) - np.log2(np.where(w < 0, p_n, p_p))
  return (2 * np.abs(w) * scale - scale**2) / np.maximum(rate, 1e-3)


@pytest.mark.parametrize("min_p_0", [0.5, 0.05])
@pytest.mark.parametrize("w_n", [0.1, 0.17])
def test_ec2t_solves_for_lambda(w_n, min_p_0):
  w = weights((64, 50))
  wide = np.asarray(w, np.float64)
  turns = lambdas(wide, 0.12, w_n, min_p_0)
  ordered = np.sort(turns.ravel())
  signs = set()
  for share in (0.1, *SHARES):
    lam, t_p, t_n = at_sparsity(
      w, jnp.array(0.12), jnp.array(w_n), share, min_p_0
    )
    k = asked(share, w.size)
    slack = 1e-6 * max(abs(ordered[k]), 0.01)
    assert ordered[k - 1] - slack <= float(lam) <= ordered[k] + slack
    codes = (wide > float(t_p)).astype(int) - (wide < -float(t_n))
    np.testing.assert_array_equal(codes, np.sign(wide) * (turns > float(lam)))
    assert np.sum(codes == 0) == k
    signs.add(np.sign(float(lam)))
  assert signs == {-1, 1}


def test_at_its_lambda_ec2t_assigns_by_the_literal_argmin():
  w = weights((64, 50))
  c = jnp.array(0.12), jnp.array(0.1)
  for share in (0.6, 0.8, 0.95):
    lam, t_p, t_n = at_sparsity(w, *c, share, 0.5)
    assert lam > 0
    wide = [np.asarray(x, np.float64) for x in (w, *c)]
    codes = reference.ec2t_codes(*wide, float(lam))
    got = (w > t_p).astype(jnp.int8) - (w < -t_n).astype(jnp.int8)
    np.testing.assert_array_equal(got, codes)
    for got, expected in zip(
      (t_p, t_n), ec2t_thresholds(w, *c, lam), strict=True
    ):
      assert float(got) == pytest.approx(float(expected), rel=2e-6)


def test_the_rarer_sign_pays_more():
  rng = np.random.default_rng(0)
  w = np.where(rng.random(5000) < 0.8, 1, -1) * np.abs(rng.normal(0, 1, 5000))
  w, one = jnp.asarray(w, jnp.float32), jnp.ones(())
  _, t_p, t_n = ec2t_at_sparsity(w, one, one, 0.9)
  assert float(t_n) > float(t_p) > 0.5


@pytest.mark.long
@settings(deadline=None, max_examples=40, derandomize=True, database=None)
@example(23 * [-23 / 64] + [0.5], 0.0, 1.0, 0.0)  # half-way to the centroid
@example(
  # Its lambda is closer to the next weight's than its threshold is rounded.
  [
    *(7 * [0.0]),
    *(i / 64 for i in (35, 20, 2, 64, 145, 256, -161, -132, -197)),
    *(i / 64 for i in (-203, -205, -205, -206, -212, 223, -243, 256)),
  ],
  0.75,
  0.05,
  0.0,
)
@given(
  # No weight so close to 0 that its lambda rounds to that of 0.
  st.lists(
    st.integers(-256, 256).map(lambda i: i / 64), min_size=24, max_size=24
  ),
  st.sampled_from([0.0, 0.2, 0.5, 0.75, 0.95]),
  st.sampled_from([0.05, 1.0, 3.0]),
  st.sampled_from([0.0, 0.5, 0.9]),
)
def test_zeros_are_those_below_the_quantile_of_lambda(x, share, c, min_p_0):
  w, wide = jnp.asarray(x, jnp.float32), np.array(x)
  lam, t_p, t_n = at_sparsity(
    w, jnp.array(c), jnp.array(0.7 * c), share, min_p_0
  )
  assert all(bool(jnp.isfinite(v)) for v in (lam, t_p, t_n))
  assert min(float(t_p), float(t_n)) >= 0
  codes = (wide > float(t_p)).astype(int) - (wide < -float(t_n))
  turns = np.where(wide, lambdas(wide, c, 0.7 * c, min_p_0), -np.inf)
  k = asked(share, w.size)
  edge, above = np.concatenate([[-np.inf], np.sort(turns)])[k : k + 2]
  # Anywhere between the two, so within its rounding of the second, too.
  bound = np.clip(float(lam), edge, above)
  # Rounding, where a rate is the least.
  near = 4e-3 * c * (c + np.max(np.abs(wide)))
  assert not codes[turns < edge - near].any()
  beyond = (turns > bound + near) & (turns > -np.inf)
  np.testing.assert_array_equal(codes[beyond], np.sign(wide)[beyond])
  # To the weight, whatever agrees to rounding or ties.
  split = ec2t_split(
    w, jnp.array(c), jnp.array(0.7 * c), t_p, t_n, jnp.array(k)
  )
  got = np.asarray(split_codes(w, split))
  assert np.sum(got == 0) == k
  assert not got[turns < edge - near].any()
  np.testing.assert_array_equal(got[beyond], np.sign(wide)[beyond])
  # In the order of magnitudes, on each side.
  for sign in (-1, 1):
    side = np.sign(wide) == sign
    used = np.abs(wide)[side & (got != 0)]
    assert np.all(np.abs(wide)[side & (got == 0)] <= used.min(initial=np.inf))


@pytest.mark.sample(3)
@pytest.mark.parametrize("axis", [None, -1])
@pytest.mark.parametrize("method_class", CLASSES)
def test_few_or_equal_or_one_signed_weights(method_class, axis):
  method = method_class(sparsity=0.5, every=1, channel_axis=axis)

  def look(w):
    moment = method.after_step(w, *method.init(w))

    def total(w, scales):
      return jnp.sum(method(w, scales, moment[1]))

    grads = jax.grad(total, (0, 1))(w, moment[0])
    return method.discretize(w, *moment).codes, (moment, grads)

  w = np.zeros((5, 6, 4), np.float32)
  w[1], w[2], w[3, 0, 0], w[4] = 0.25, -0.25, 1, abs(weights((6, 4)))
  codes, rest = jax.jit(jax.vmap(look))(w)
  assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(rest))
  assert not np.any(np.asarray(codes) * w < 0)
  assert np.all(np.sum(np.asarray(codes) == 0, (1, 2)) == 12)


@pytest.mark.parametrize("method_class", CLASSES)
def test_a_schedule_is_looked_at_every_few_steps(method_class):
  target, w = tern_jax.ramp(0.9, 20, until=1.0), weights()
  method = method_class(sparsity=target, every=5)

  def step(carry, _):
    carry = method.after_step(w, *carry)
    return carry, zeros(method, w, *carry)

  start = method.init(w)
  assert int(zeros(method, w, *start)) == 0
  _, counts = jax.jit(lambda c: jax.lax.scan(step, c, length=22))(start)
  shares = np.asarray(counts) / w.size
  steps = np.arange(1, 23)
  # The last twentieth of a run looks at each step.
  looks = np.where(steps < 19, 5 * (steps // 5), np.minimum(steps, 20))
  wanted = [0.9 * (1 - (1 - n / 20) ** 3) for n in looks]
  np.testing.assert_allclose(shares, wanted, atol=2e-3)


@pytest.mark.sample(3)
@pytest.mark.parametrize(
  "method_class", [TTQ, TGA, pytest.param(EC2T, marks=pytest.mark.long)]
)
def test_a_sweep_equals_a_loop(method_class):
  w, g = weights((32, 24)), weights((32, 24), seed=1)

  def run(share):
    method = method_class(sparsity=share, every=2)

    def step(_, carry):
      w, scales, state = carry
      slope = jax.grad(lambda w: jnp.sum(method(w, scales, state) * g))(w)
      w -= 0.05 * slope
      return w, *method.after_step(w, scales, state)

    w_end, scales, state = jax.lax.fori_loop(0, 4, step, (w, *method.init(w)))
    return method.discretize(w_end, *method.refresh(w_end, scales, state))

  shares = jnp.array([0.25, 0.5, 0.875])
  swept = jax.jit(jax.vmap(run))(shares)
  one = jax.jit(run)
  for i, share in enumerate(shares):
    alone = one(share)
    np.testing.assert_array_equal(swept.codes[i], alone.codes)
    np.testing.assert_allclose(swept.w_p[i], alone.w_p, rtol=1e-5)
    assert int(jnp.sum(alone.codes == 0)) == asked(float(share), w.size)


@pytest.mark.long
@pytest.mark.sample(3)
@pytest.mark.parametrize("method_class", [TTQ, EC2T])
def test_weights_spread_over_devices_have_the_same_threshold(method_class):
  w = weights((64, 32))
  spread = jax.device_put(w, NamedSharding(data_mesh(), P("data")))
  method = method_class(sparsity=0.8, every=1)
  look = jax.jit(lambda w: method.after_step(w, *method.init(w))[1])
  there, here = look(spread), look(w)
  for name in here:
    np.testing.assert_allclose(there[name], here[name], rtol=1e-6)
  scales, _ = method.init(w)
  np.testing.assert_array_equal(
    method.discretize(spread, scales, there).codes,
    method.discretize(w, scales, here).codes,
  )


@pytest.mark.long
@pytest.mark.sample(3)
@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize(
  ("method_class", "axis"), [(TTQ, None), (TGA, -1), (EC2T, -1)]
)
def test_latents_scaled_decayed_or_averaged_meet_it_again(method_class, axis):
  tern = ParamTransform(method_class(sparsity=0.75, channel_axis=axis))
  params, state = tern.init({"w": weights()})
  tx = optax.adamw(1e-2, weight_decay=0.1)
  average, opt_state = params, tx.init(params)

  @jax.jit
  def step(params, state, opt_state, average, key):
    g = jax.random.normal(key, (48, 32))
    grads = jax.grad(lambda p: jnp.sum(tern(p, state)["w"] * g))(params)
    updates, opt_state = tx.update(grads, opt_state, params)
    params = optax.apply_updates(params, updates)
    average = jax.tree.map(lambda a, b: 0.8 * a + 0.2 * b, average, params)
    return *tern.after_step(params, state), opt_state, average

  for key in jax.random.split(jax.random.key(0), 13):
    params, state, opt_state, average = step(
      params, state, opt_state, average, key
    )

  @jax.jit
  def met(params):
    return tern.discretize(*tern.refresh(params, state))["w"]

  scaled = params.replace(latent={"w": 30 * params.latent["w"]})
  for other in (params, scaled, average):
    got = met(other)
    assert int(jnp.sum(got.codes == 0)) == 1152
    assert bool((got.w_p > 0).all())


def test_frozen_codes_ignore_the_target():
  w = weights()
  free = EC2T(sparsity=0.5, every=1)
  scales, state = free.init(w)
  held = EC2T(sparsity=0.9, every=1, frozen=True)
  for moment in (
    held.after_step(2 * w, scales, state),
    held.refresh(2 * w, scales, state),
  ):
    for name in ("t_n", "t_p", "lam"):
      assert float(moment[1][name]) == float(state[name])


def test_ec2t_zero_at_a_sparsity():
  w = weights()
  zeroed = tern_jax.ec2t_zero(w, EC2T(sparsity=0.75))
  kept = np.asarray(zeroed) != 0
  assert np.sum(~kept) == 1152
  np.testing.assert_array_equal(np.asarray(zeroed)[kept], np.asarray(w)[kept])


def test_a_target_leaves_methods_without_one_as_they_are():
  w = weights()
  for method in (TTQ(), TGA(), EC2T()):
    _, state = method.init(w)
    names = {"TTQ": {"count", "threshold"}, "TGA": set()}
    ec2t = {"count", "floor", "t_n", "t_p"}
    assert set(state) == names.get(type(method).__name__, ec2t)


@pytest.mark.parametrize("method_class", CLASSES)
def test_bad_input(method_class):
  for share in (-0.1, 1.0):
    with pytest.raises(ValueError, match=r"sparsity must lie in \[0, 1\)"):
      method_class(sparsity=share)
  with pytest.raises(ValueError, match="every must lie in"):
    method_class(sparsity=0.5, every=0)
