import functools
import re

import equinox as eqx
import haiku as hk
import hypothesis
import hypothesis.extra.numpy
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from hypothesis import strategies as st

import tern_jax
from tern_jax.regularizers.formulas import wdr_grad
from tern_jax.regularizers.spaces import barrier_of_weights
from tern_jax.training import split_batch
from tests import reference
from tests.helpers import assert_same, long

rng = np.random.default_rng(0)
THETA = rng.normal(0, 0.5, (40, 30))


@pytest.fixture
def x64():
  with jax.enable_x64(True):
    yield


def tree(dtype=jnp.float32):
  """Parameters and gradients of two layers and a bias."""
  r = np.random.default_rng(1)
  shapes = {"a": {"kernel": (8, 6), "bias": (6,)}, "b": {"kernel": (6, 4)}}

  def draw(scale):
    return jax.tree.map(
      lambda s: jnp.asarray(r.normal(0, scale, s), dtype),
      shapes,
      is_leaf=lambda s: isinstance(s, tuple),
    )

  return draw(0.5), draw(0.1)


def added(tx, grads, params, steps=1):
  """What a transform adds to the gradients at its last of some updates."""
  state = tx.init(params)
  update = jax.jit(tx.update)
  for _ in range(steps):
    updates, state = update(grads, state, params)
  return jax.tree.map(lambda u, g: u - g, updates, grads)


@pytest.mark.parametrize("sharp", [False, True])
@pytest.mark.parametrize("alpha", [0.0, 0.1, 0.5, 1.0, 1.9])
def test_wdr_and_its_gradient_in_float64(x64, alpha, sharp):
  theta = jnp.asarray(THETA)
  assert theta.dtype == jnp.float64
  np.testing.assert_allclose(
    tern_jax.wdr(theta, alpha, sharp),
    reference.wdr(THETA, alpha, sharp),
    rtol=1e-12,
  )
  closed = reference.wdr_grad(THETA, alpha, sharp)
  np.testing.assert_allclose(
    wdr_grad(theta, alpha, sharp), closed, rtol=1e-11, atol=1e-14
  )
  np.testing.assert_allclose(
    jax.grad(tern_jax.wdr)(theta, alpha, sharp),
    closed,
    rtol=1e-11,
    atol=1e-14,
  )
  tx = tern_jax.wdr_transform(alpha, strength=0.25, sharp=sharp)
  got = added(tx, jnp.zeros_like(theta), theta)
  np.testing.assert_allclose(got, 0.25 * closed, rtol=1e-11, atol=1e-14)
  h = 1e-6
  for i, j in ((0, 0), (3, 7), (39, 29)):
    up, down = THETA.copy(), THETA.copy()
    up[i, j] += h
    down[i, j] -= h
    rise = reference.wdr(up, alpha, sharp) - reference.wdr(down, alpha, sharp)
    slope = rise / (2 * h)
    assert got[i, j] == pytest.approx(0.25 * slope, abs=1e-7)


@pytest.mark.parametrize("alpha", [0.05, 0.3, 1.0])
@pytest.mark.parametrize("sigma", [0.1, 0.3, 1.0])
def test_predicted_sparsity_and_its_inverse(sigma, alpha):
  closed = reference.predicted_sparsity(sigma, alpha)
  got = tern_jax.predicted_sparsity(sigma, alpha)
  assert float(got) == pytest.approx(closed, abs=1e-6)
  sample = np.random.default_rng(0).normal(0, sigma, 200_000)
  theta = jnp.asarray(sample, jnp.float32)
  measured = float(tern_jax.predicted_sparsity(theta, alpha))
  assert measured == pytest.approx(closed, abs=0.004)
  if 0.01 < closed < 0.99:
    back = tern_jax.alpha_for_sparsity(sigma, closed)
    assert float(back) == pytest.approx(alpha, rel=2e-4)
    empirical = tern_jax.alpha_for_sparsity(theta, measured)
    assert float(empirical) == pytest.approx(alpha, rel=0.01)


def test_the_force_of_sharp_wdr_does_not_vanish_at_the_barrier():
  alpha = 0.5  # the barrier lies at |W| = 0.5
  beside = jnp.arctanh(0.5 + jnp.array([-1e-3, 1e-3]))
  smooth = wdr_grad(beside, alpha)
  np.testing.assert_allclose(smooth, 0, atol=2e-3)
  sharp = wdr_grad(beside, alpha, sharp=True)
  np.testing.assert_allclose(sharp, [0.375, -0.375], atol=2e-3)


@functools.partial(jax.jit, static_argnames="sharp")
def flow(theta, alpha, sharp):
  """Codes at the end of the flow of WDR alone."""
  # Total strength 200: far beyond the 50 that the slowest alpha needs.
  wdr = tern_jax.wdr_transform(alpha, 1.0, sharp=sharp)
  tx = optax.chain(wdr, optax.sgd(0.2))

  def step(carry, _):
    theta, state = carry
    updates, state = tx.update(jnp.zeros_like(theta), state, theta)
    return (optax.apply_updates(theta, updates), state), None

  (end, _), _ = jax.lax.scan(step, (theta, tx.init(theta)), length=1000)
  return jnp.round(jnp.tanh(end))


@pytest.mark.sample(3)
@pytest.mark.parametrize("sharp", [False, True])
@pytest.mark.parametrize("alpha", [0.05, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("sigma", [0.3, 0.6])
def test_wdr_flow_ends_at_the_predicted_sparsity(sigma, alpha, sharp):
  sample = np.random.default_rng(2).normal(0, sigma, (100, 100))
  theta = jnp.asarray(sample, jnp.float32)
  codes = flow(theta, alpha, sharp)
  predicted = reference.predicted_sparsity(sigma, alpha)
  measured = float(jnp.mean(codes == 0))
  assert abs(measured - predicted) <= 0.02
  # The flow changes no basin: the prediction from the latents is exact but
  # for latents so near the barrier that they have not left it yet.
  at_start = float(tern_jax.predicted_sparsity(theta, alpha))
  assert abs(measured - at_start) <= 0.002


@pytest.mark.long
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_coupled_before_adam_is_the_loss_term(standard_promotion, dtype):
  params, grads = tree(dtype)
  lam, alpha = 0.3, 0.2
  tx = optax.chain(tern_jax.wdr_transform(alpha, lam), optax.adam(1e-2))
  updates, _ = jax.jit(tx.update)(grads, tx.init(params), params)

  with_term = jax.tree.map(
    lambda g, p: (
      g.astype(jnp.float32)
      + lam * jax.grad(tern_jax.wdr)(p.astype(jnp.float32), alpha)
    ).astype(dtype),
    grads,
    params,
  )
  adam = optax.adam(1e-2)
  expected, _ = jax.jit(adam.update)(with_term, adam.init(params), params)
  assert jax.tree.map(lambda u: u.dtype, updates) == jax.tree.map(
    lambda p: p.dtype, params
  )
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(
      a.astype(jnp.float32), b.astype(jnp.float32), rtol=1e-2
    ),
    updates,
    expected,
  )


def test_decoupled_after_adam_adds_undisturbed(standard_promotion):
  params, grads = tree()
  chain = optax.chain(
    optax.scale_by_adam(), tern_jax.wdr_transform(0.2, 0.3), optax.scale(-1e-2)
  )
  updates, _ = jax.jit(chain.update)(grads, chain.init(params), params)
  adam = optax.scale_by_adam()
  plain, _ = jax.jit(adam.update)(grads, adam.init(params), params)
  jax.tree.map(
    lambda u, a, p: np.testing.assert_allclose(
      u, -1e-2 * (a + 0.3 * reference.wdr_grad(p, 0.2)), rtol=1e-5, atol=1e-8
    ),
    updates,
    plain,
    params,
  )


def test_schedules_of_alpha_and_strength():
  params, grads = tree()
  tx = tern_jax.wdr_transform(
    alpha=optax.linear_schedule(0.1, 0.5, 4),
    strength=optax.linear_schedule(0.0, 1.0, 10),
  )
  assert float(jnp.abs(added(tx, grads, params)["a"]["kernel"]).max()) == 0
  got = added(tx, grads, params, steps=4)["a"]["kernel"]  # count is 3
  expected = 0.3 * reference.wdr_grad(params["a"]["kernel"], 0.4)
  np.testing.assert_allclose(got, expected, atol=1e-7)


def test_alpha_of_a_wrong_type():
  for alpha in ({"a": 0.1}, [0.1], "0.1"):
    with pytest.raises(TypeError, match="alpha must be a number, an array"):
      tern_jax.wdr_transform(alpha, strength=1.0)


def test_relative_strength_scales_wdr_to_each_gradient():
  params, grads = tree()
  grads = {"a": grads["a"], "b": {"kernel": 100 * grads["b"]["kernel"]}}
  kappa = optax.linear_schedule(0.0, 2.0, 2)
  tx = tern_jax.wdr_transform(0.3, tern_jax.relative(kappa))
  got = added(tx, grads, params, steps=2)  # kappa is 1
  for layer in ("a", "b"):
    g, extra = grads[layer]["kernel"], got[layer]["kernel"]
    r = reference.wdr_grad(params[layer]["kernel"], 0.3)
    scale = np.linalg.norm(g) / np.linalg.norm(r)
    np.testing.assert_allclose(extra, scale * r, rtol=1e-4, atol=1e-6)
    assert np.linalg.norm(extra) == pytest.approx(np.linalg.norm(g), rel=1e-5)


@pytest.mark.parametrize("gain", [1.0, 10.0])
def test_relative_strength_takes_sharp_wdr_as_it_is(gain):
  theta, gradient = np.random.default_rng(5).normal(0, 0.3, (2, 30, 20))
  tx = tern_jax.wdr_transform(
    tern_jax.at_sparsity(0.8, gain=gain), tern_jax.relative(3.0), sharp=True
  )
  got = added(tx, jnp.float32(gradient), jnp.float32(theta / gain))
  edge = np.tanh(np.sort(np.abs(theta).ravel())[479:481].mean())
  r = reference.wdr_grad(theta, 2 * edge**2, sharp=True)
  rms = np.sqrt(np.mean(gradient**2))
  np.testing.assert_allclose(got, 3 * rms * r, rtol=1e-4, atol=1e-5)


def test_a_late_strength_leaves_gradients_alone_before():
  kappa = tern_jax.late_kappa(20, onset=0.65, churn=None)
  tx = tern_jax.wdr_transform(
    tern_jax.at_sparsity(0.6, every=10), tern_jax.relative(kappa)
  )
  theta, gradient = np.random.default_rng(0).normal(0, 0.2, (2, 32, 16))
  theta, grads = jnp.float32(theta), {"w": jnp.float32(gradient)}
  state = tx.init({"w": theta})
  start = state.threshold["w"]
  update = jax.jit(tx.update)
  for count in range(16):
    params = {"w": theta * (1 + 0.1 * count)}
    updates, state = update(grads, state, params)
    same = bool((updates["w"] == grads["w"]).all())
    assert same == (count < 13)
    # Nobody looks at the quantile before, then at once, then every 10 steps.
    seen = 1.0 if count < 13 else 2.3
    assert float(state.threshold["w"] / start) == pytest.approx(seen, rel=0.01)


@pytest.mark.sample(2)
@pytest.mark.parametrize("gain", [1.0, 10.0])
@pytest.mark.parametrize(("pairs", "share"), [(0, 0), (3, 0.5), (5, 5 / 6)])
def test_a_late_strength_is_for_codes_that_change(gain, pairs, share):
  kappa = tern_jax.late_kappa(400, onset=0.5, first=2.0, last=2.0, churn=0.4)
  tx = tern_jax.wdr_transform(
    tern_jax.at_sparsity(0.5, gain=gain),
    tern_jax.relative(kappa),
    stacked=("stack",),
    sharp=True,
  )
  # Ten weights of two layers and ten of another, five zero of each.
  r = np.random.default_rng(0)
  theta = 0.1 * r.permutation(np.arange(1.0, 11.0))
  start = {"stack": np.stack([theta, 2 * theta]), "w": theta[:, None]}
  gradient = {name: r.normal(size=x.shape) for name, x in start.items()}
  order = np.argsort(theta)
  moved = {name: x.copy() for name, x in start.items()}
  low, high = order[:pairs], order[9 : 9 - pairs : -1]
  # In one layer, some nonzeros change places with zeros.
  moved["stack"][1, low] = start["stack"][1, high]
  moved["stack"][1, high] = start["stack"][1, low]
  start, grads, moved = (
    jax.tree.map(lambda x, s=s: jnp.float32(x / s), tree)
    for tree, s in ((start, gain), (gradient, 1), (moved, gain))
  )

  update = jax.jit(tx.update)
  state = tx.init(start)
  # What is as before 1 % of the steps before the onset does not count.
  for count, params in ((195, moved), (196, start), (199, moved)):
    state = state._replace(count=jnp.int32(count))
    updates, state = update(grads, state, params)
    assert (updates["stack"] == grads["stack"]).all()
  for count in (200, 300):
    state = state._replace(count=jnp.int32(count))
    updates, state = update(grads, state, moved)
    assert float(state.shares[1]) == pytest.approx(share)
    for scale, got, g, latent in (
      (1, updates["stack"][0], gradient["stack"][0], moved["stack"][0]),
      (2, updates["stack"][1], gradient["stack"][1], moved["stack"][1]),
      (1, updates["w"], gradient["w"], moved["w"]),
    ):
      alpha = 2 * np.tanh(0.55 * scale) ** 2
      rms = np.sqrt(np.mean(g**2))
      r_wdr = reference.wdr_grad(
        gain * np.asarray(latent, np.float64), alpha, sharp=True
      )
      expected = share * 2 * rms * r_wdr
      np.testing.assert_allclose(got - g, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("pairs", "share"), [(0, 0), (3, 0.4), long(4, 1)])
def test_a_late_strength_is_early_where_codes_change_at_random(pairs, share):
  # Of 15 nonzeros, so many are new; .2 is .5 of the churn, (.5 - .4) / .25.
  kappa = tern_jax.late_kappa(400, onset=0.5, early=0.25, churn=0.4)
  tx = tern_jax.wdr_transform(
    tern_jax.at_sparsity(0.5, gain=1.0), tern_jax.relative(kappa), sharp=True
  )
  start = {"w": jnp.arange(1.0, 31.0) / 100}
  order = np.arange(30)
  order[:pairs], order[30 - pairs :] = order[30 - pairs :], order[:pairs].copy()
  moved = {"w": start["w"][order]}
  grads = {"w": jnp.ones(30)}
  update = jax.jit(tx.update)
  state = tx.init(start)
  for count, params in ((96, start), (99, moved)):
    state = state._replace(count=jnp.int32(count))
    updates, state = update(grads, state, params)
    assert (updates["w"] == 1).all()
  for count in (100, 180, 200, 240):
    state = state._replace(count=jnp.int32(count))
    updates, state = update(grads, state, moved)
    # Nothing has changed from early on, so the onset adds nothing.
    shares = [share, 1 if count < 200 else 0]
    np.testing.assert_allclose(state.shares, shares, atol=1e-6)
    risen = share * 0.1 * 300 ** ((count / 400 - 0.25) / 0.7)
    alpha = 2 * np.tanh(0.155) ** 2
    r = reference.wdr_grad(
      np.asarray(moved["w"], np.float64), alpha, sharp=True
    )
    np.testing.assert_allclose(
      updates["w"] - 1, risen * r, rtol=2e-2, atol=1e-5
    )


@pytest.mark.parametrize(
  ("onset", "churn"), [(0.5, None), (0.0, 0.15), (0.01, 0.15)]
)
def test_a_late_strength_that_nothing_is_seen_before(onset, churn):
  kappa = tern_jax.late_kappa(100, onset=onset, churn=churn)
  tx = tern_jax.wdr_transform(0.1, tern_jax.relative(kappa), sharp=True)
  params = {"w": jnp.linspace(-1.0, 1.0, 30)}
  grads = {"w": jnp.ones(30)}
  state = tx.init(params)
  assert state.nonzero == ()
  update = jax.jit(tx.update)
  for _ in range(round(100 * onset) + 1):
    updates, state = update(grads, state, params)
  added = updates["w"] - grads["w"]
  expected = 0.1 * reference.wdr_grad(np.linspace(-1, 1, 30), 0.1, sharp=True)
  np.testing.assert_allclose(added, expected, rtol=1e-4, atol=1e-6)


def test_relative_strength_is_finite_at_zero_gradients_and_stationary_points():
  tx = tern_jax.wdr_transform(0.3, tern_jax.relative(1.0))
  ones, zeros = jnp.ones((3, 3)), jnp.zeros((3, 3))
  assert added(tx, zeros, ones).tolist() == zeros.tolist()
  assert added(tx, ones, zeros).tolist() == zeros.tolist()


@pytest.mark.parametrize("gain", [1.0, 10.0])
def test_a_gain_between_parameters_and_latents(gain):
  w = np.random.default_rng(3).normal(0, 0.02, (40, 25)).astype(np.float32)
  tx = tern_jax.wdr_transform(tern_jax.at_sparsity(0.6, gain=gain), 0.5)
  got = added(tx, jnp.zeros((40, 25)), jnp.asarray(w))
  low, high = np.sort(np.abs(w).ravel())[[599, 600]]
  for edge in (low, high):
    # The barrier may be anywhere between two magnitudes.
    alpha = 2 * np.tanh(gain * float(edge)) ** 2
    expected = 0.5 * gain * reference.wdr_grad(gain * w.astype(float), alpha)
    np.testing.assert_allclose(got, expected, rtol=0.02, atol=1e-4)


@pytest.mark.sample(2)
@pytest.mark.parametrize("every", [1, 10])
def test_at_sparsity_keeps_the_barrier_of_sca(standard_promotion, every):
  target = tern_jax.ramp(0.8, steps=60)
  method = tern_jax.SCA(sparsity=target, every=every)
  tx = optax.chain(
    tern_jax.wdr_transform(
      tern_jax.at_sparsity(target, every), tern_jax.relative(0.5)
    ),
    optax.adam(0.01),
  )
  r = np.random.default_rng(0)
  w = method.latent(jnp.asarray(r.normal(size=(30, 20)), jnp.float32))
  scales, state = method.init(w)
  opt_state = tx.init(w)

  @jax.jit
  def step(w, scales, state, opt_state, grads):
    updates, opt_state = tx.update(grads, opt_state, w)
    w = optax.apply_updates(w, updates)
    return w, *method.after_step(w, scales, state), opt_state

  for _ in range(45):
    grads = jnp.asarray(r.normal(size=w.shape), jnp.float32)
    in_force, before = state["threshold"], jnp.abs(w)
    w, scales, state, opt_state = step(w, scales, state, opt_state, grads)
    barrier = opt_state[0].threshold
    # To the last bit but for how a program rounds: no weight lies between them.
    np.testing.assert_allclose(barrier, in_force, rtol=3e-6)
    np.testing.assert_array_equal(before > barrier, before > in_force)


def test_at_sparsity_adds_the_gradient_at_the_quantile():
  params, grads = tree()
  tx = tern_jax.wdr_transform(tern_jax.at_sparsity(0.5), strength=1.0)
  got = added(tx, grads, params)["a"]["kernel"]
  theta = np.asarray(params["a"]["kernel"])
  inner = np.sort(np.abs(np.tanh(theta)).ravel())
  toward_zero = np.sign(got) == np.sign(theta)  # descent subtracts it
  assert toward_zero.sum() == theta.size // 2
  assert np.abs(np.tanh(theta))[toward_zero].max() == pytest.approx(
    inner[theta.size // 2 - 1]
  )


def test_masks_partition_and_none_updates():
  params, grads = tree()
  where = tern_jax.kernels(exclude="b")
  got = added(tern_jax.wdr_transform(0.2, 1.0, mask=where), grads, params)
  assert float(jnp.abs(got["a"]["kernel"]).max()) > 0
  assert float(jnp.abs(got["a"]["bias"]).max()) == 0
  assert float(jnp.abs(got["b"]["kernel"]).max()) == 0

  split = optax.partition(
    {"t": tern_jax.wdr_transform(0.2, 1.0), "f": optax.identity()},
    {"a": {"kernel": "t", "bias": "f"}, "b": {"kernel": "f"}},
  )
  jax.tree.map(np.testing.assert_array_equal, added(split, grads, params), got)

  tx = tern_jax.wdr_transform(0.2, 1.0)
  holes = {"a": {"kernel": grads["a"]["kernel"], "bias": None}, "b": None}
  updates, _ = tx.update(
    {"a": holes["a"], "b": {"kernel": None}}, tx.init(params), params
  )
  assert updates["a"]["bias"] is None
  assert updates["b"]["kernel"] is None
  np.testing.assert_allclose(
    updates["a"]["kernel"] - grads["a"]["kernel"],
    reference.wdr_grad(params["a"]["kernel"], 0.2),
    atol=1e-6,
  )


def test_inject_hyperparams_and_multi_steps(standard_promotion):
  params, grads = tree()
  where = tern_jax.kernels()
  tx = optax.inject_hyperparams(tern_jax.wdr_transform, static_args="mask")(
    alpha=0.2, strength=0.5, mask=where
  )
  state = tx.init(params)
  state.hyperparams["alpha"] = jnp.asarray(0.7)
  updates, state = jax.jit(tx.update)(grads, state, params)
  np.testing.assert_allclose(
    updates["a"]["kernel"] - grads["a"]["kernel"],
    0.5 * reference.wdr_grad(params["a"]["kernel"], 0.7),
    atol=1e-6,
  )

  every_two = optax.MultiSteps(tern_jax.wdr_transform(0.2, 0.5), 2)
  state = every_two.init(params)
  first, state = every_two.update(grads, state, params)
  second, state = every_two.update(grads, state, params)
  assert float(jnp.abs(first["a"]["kernel"]).max()) == 0
  np.testing.assert_allclose(
    second["a"]["kernel"] - grads["a"]["kernel"],
    0.5 * reference.wdr_grad(params["a"]["kernel"], 0.2),
    atol=1e-6,
  )


def test_one_compiled_sweep_over_alpha():
  params, grads = tree()
  traces = []

  @jax.jit
  def sweep(alphas):
    traces.append(1)
    return jax.vmap(
      lambda a: added(tern_jax.wdr_transform(a, 1.0), grads, params)
    )(alphas)

  alphas = jnp.array([0.1, 0.5, 1.0])
  got = sweep(alphas)["b"]["kernel"]
  sweep(alphas / 2)
  assert len(traces) == 1
  for row, alpha in zip(got, (0.1, 0.5, 1.0), strict=True):
    expected = reference.wdr_grad(params["b"]["kernel"], alpha)
    np.testing.assert_allclose(row, expected, atol=1e-6)


def test_pmap_gives_each_device_the_same():
  params, grads = tree()
  tx = tern_jax.wdr_transform(tern_jax.at_sparsity(0.5), tern_jax.relative(1.0))
  expected = added(tx, grads, params)
  n = jax.device_count()
  shared = jax.tree.map(lambda g: jnp.stack([g] * n), grads)
  got = jax.pmap(lambda g: added(tx, g, params), axis_name="data")(shared)
  for i in range(n):
    jax.tree.map(
      lambda e, g: np.testing.assert_allclose(g[i], e, atol=1e-6),  # noqa: B023
      expected,
      got,
    )
  assert split_batch(np.zeros((n * 2, 3)), n).shape == (n, 2, 3)


def test_stacked_layers_are_looked_at_one_by_one():
  r = np.random.default_rng(0)
  stack = r.normal(0, 1, (3, 20, 10)) * np.array([0.1, 1, 3])[:, None, None]
  params = {"blocks": {"kernel": jnp.asarray(stack, jnp.float32)}}
  grads = jax.tree.map(lambda p: 0.1 * jnp.ones_like(p), params)
  args = (tern_jax.at_sparsity(0.6), tern_jax.relative(0.5))
  tx = tern_jax.wdr_transform(*args, stacked=("blocks",))
  got = added(tx, grads, params, steps=2)["blocks"]["kernel"]
  alone = tern_jax.wdr_transform(*args)
  for i in range(3):
    one = {"kernel": params["blocks"]["kernel"][i]}
    g = {"kernel": grads["blocks"]["kernel"][i]}
    expected = added(alone, g, one, steps=2)["kernel"]
    np.testing.assert_allclose(got[i], expected, atol=1e-6)


class _Net(nn.Module):
  @nn.compact
  def __call__(self, x):
    return nn.Dense(4)(nn.relu(nn.Dense(8)(x)))


def _nnx_params():
  return nnx.split(nnx.Linear(8, 6, rngs=nnx.Rngs(0)), nnx.Param, ...)[1]


@pytest.mark.parametrize(
  "params",
  [
    _Net().init(jax.random.key(0), jnp.ones((1, 6)))["params"],
    _nnx_params(),
    eqx.filter(
      eqx.nn.MLP(4, 2, 8, 2, key=jax.random.key(0)), eqx.is_inexact_array
    ),
    hk.transform(lambda x: hk.nets.MLP([8, 4])(x)).init(
      jax.random.key(0), jnp.ones((1, 6))
    ),
  ],
  ids=["linen", "nnx", "equinox", "haiku"],
)
def test_any_tree_in_an_existing_chain(params):
  where = tern_jax.kernels()
  tx = optax.chain(
    optax.clip(1.0), tern_jax.wdr_transform(0.1, 1e-3, mask=where), optax.sgd(1)
  )
  zeros = jax.tree.map(jnp.zeros_like, params)
  updates, _ = jax.jit(tx.update)(zeros, tx.init(params), params)
  assert jax.tree.structure(updates) == jax.tree.structure(params)

  def check(selected, u, p):
    expected = -1e-3 * reference.wdr_grad(p, 0.1) if selected else 0 * p
    np.testing.assert_allclose(u, expected, atol=1e-8)

  jax.tree.map(check, where(params), updates, params)


def test_bad_input():
  params, grads = tree()
  for alpha in (2.0, -0.1, float("nan")):
    with pytest.raises(ValueError, match=r"alpha must lie in \[0, 2\)"):
      tern_jax.wdr_transform(alpha, 1.0)
  with pytest.raises(ValueError, match="strength must lie in"):
    tern_jax.wdr_transform(0.1, -1.0)
  with pytest.raises(ValueError, match="kappa must lie in"):
    tern_jax.relative(-1.0)
  with pytest.raises(ValueError, match="sparsity must lie in"):
    tern_jax.at_sparsity(1.5)
  with pytest.raises(ValueError, match="every must lie in"):
    tern_jax.at_sparsity(0.5, every=0)
  with pytest.raises(ValueError, match="steps must lie in"):
    tern_jax.late_kappa(0)
  with pytest.raises(ValueError, match="onset must lie in"):
    tern_jax.late_kappa(100, onset=0.95)
  with pytest.raises(ValueError, match="sigma must lie in"):
    tern_jax.predicted_sparsity(-1.0, 0.1)
  tx = tern_jax.wdr_transform(0.1, 1.0)
  state = tx.init(params)
  with pytest.raises(
    ValueError, match=r"tx.update\(grads, opt_state, params\)"
  ):
    tx.update(grads, state)
  ints = {"w": jnp.ones((2, 2), jnp.int32)}
  with pytest.raises(TypeError, match="w is int32"):
    tx.update(ints, state, ints)
  with pytest.raises(TypeError, match="theta is int32"):
    tern_jax.wdr(jnp.ones(3, jnp.int32), 0.1)
  with pytest.raises(ValueError, match="'head' matches no leaf"):
    tern_jax.wdr_transform(0.1, 1.0, stacked=("head",)).init(params)


def off_codes(w, barrier, axes=None):
  """How far weights are from s * c, in float64, and the scale s."""
  w = np.asarray(w, np.float64)
  beyond = np.abs(w) > barrier
  total = np.sum(np.abs(w) * beyond, axis=axes, keepdims=True)
  s = total / np.maximum(beyond.sum(axis=axes, keepdims=True), 1)
  return w - s * np.sign(w) * beyond, s


def on_weights(alpha, strength, **options):
  return tern_jax.wdr_transform(alpha, strength, space="weights", **options)


def test_weights_are_drawn_to_their_codes():
  params, grads = tree()
  w, g = params["a"]["kernel"], np.asarray(grads["a"]["kernel"], np.float64)
  edge = np.sort(np.abs(np.ravel(w)))[23:25].mean()  # half of 48 weights
  off, _ = off_codes(w, edge)
  half = tern_jax.at_sparsity(0.5, gain=3.0)
  got = added(on_weights(half, 0.25), grads, params)["a"]["kernel"]
  np.testing.assert_allclose(got, 0.25 * off, rtol=1e-5, atol=1e-7)

  # R's own gradient, with the scale of each w: it is as if s were a constant.
  def half_square(w):
    return np.sum(np.square(off_codes(w, edge)[0])) / 2

  h = 1e-6 * np.eye(48).reshape(48, 8, 6)
  wide = np.asarray(w, np.float64)
  slopes = [(half_square(wide + e) - half_square(wide - e)) / 2e-6 for e in h]
  np.testing.assert_allclose(np.reshape(slopes, (8, 6)), off, atol=1e-8)

  kappa = on_weights(half, tern_jax.relative(3.0), sharp=True)
  got = added(kappa, grads, params)["a"]["kernel"]
  rms = np.sqrt(np.mean(g**2) / np.mean(off**2))
  np.testing.assert_allclose(got, 3 * rms * off, rtol=1e-4, atol=1e-6)


@pytest.mark.long
@hypothesis.given(
  w=hypothesis.extra.numpy.arrays(
    np.float32, 40, elements=st.floats(-8, 8, width=16)
  ),
  alpha=st.sampled_from([0.0, 0.1, 0.5, 1.0, 1.9]),
)
@hypothesis.settings(deadline=None, max_examples=50)
def test_an_alpha_finds_the_scale_of_weights_and_their_barrier(w, alpha):
  got = float(barrier_of_weights(jnp.asarray(w), jnp.float32(alpha)))
  # Sorted, the scale is the mean of the first k for the largest k that fits.
  magnitudes = np.sort(np.abs(w.astype(np.float64)))[::-1]
  means = np.cumsum(magnitudes) / np.arange(1, 41)
  fits = np.flatnonzero(magnitudes > means * np.sqrt(alpha / 2))
  s = means[fits[-1]] if fits.size else 0.0
  assert got == pytest.approx(s * np.sqrt(alpha / 2), rel=1e-5)


def test_a_barrier_of_weights_is_in_the_middle_of_its_gap():
  search = tern_jax.at_sparsity(0.5).of_weights().search
  for magnitudes, middle in (
    ([0.1, -0.2, 0.3, -0.4], 0.25),
    ([0, 0, 1, -1], 0.5),
    # Of equal ones, all or none: none if they are all that is not zero.
    ([0, 1, -1, 1], 0.5),
    ([2, -2, 2, 2], 1),
    ([0, 0, 0, 3], 1.5),
    ([0, 0, 0, 0], 0),
  ):
    got = search(jnp.float32(jnp.array(magnitudes)), jnp.int32(2), None, 0)
    assert float(got) == pytest.approx(middle)
  several = [jnp.array([0.0, 1.0]), jnp.array([[0.5, -3.0]])]
  assert float(search(several, jnp.int32(2), None, 0)) == 0.75


@pytest.mark.long
@pytest.mark.parametrize("alpha", [long(0.3), tern_jax.at_sparsity(0.7)])
def test_scales_of_channels_and_of_stacked_layers(alpha):
  r = np.random.default_rng(0)
  stack = r.normal(size=(3, 8, 5)) * np.array([0.1, 1, 3])[:, None, None]
  params = {"stack": {"kernel": jnp.asarray(stack, jnp.float32)}}
  grads = jax.tree.map(jnp.zeros_like, params)
  tx = on_weights(alpha, 1.0, stacked=("stack",), channel_axis=-1)
  got = added(tx, grads, params)["stack"]["kernel"]
  for i in range(3):
    if alpha == 0.3:
      edge = np.concatenate(
        [
          jnp.ravel(barrier_of_weights(params["stack"]["kernel"][i, :, j], 0.3))
          for j in range(5)
        ]
      )
    else:
      edge = np.sort(np.abs(stack[i].ravel()))[27:29].mean()
    off, s = off_codes(stack[i], edge, axes=0)
    assert s.shape == (1, 5)
    np.testing.assert_allclose(got[i], off, rtol=1e-4, atol=1e-5)


@pytest.mark.sample(2)
@pytest.mark.parametrize("space", ["latents", "weights"])
def test_after_an_optimizer_it_descends(space):
  params, grads = tree()
  w, g = params["a"]["kernel"], grads["a"]["kernel"]
  if space == "weights":
    alpha = tern_jax.at_sparsity(0.5)
    r, _ = off_codes(w, np.sort(np.abs(np.ravel(w)))[23:25].mean())
  else:
    alpha = 0.3
    r = reference.wdr_grad(w, alpha)

  def moved(strength):
    wdr = tern_jax.wdr_transform(
      alpha, strength, space=space, after_optimizer=True
    )
    tx = optax.chain(optax.sgd(0.1), wdr)
    updates, _ = jax.jit(tx.update)(grads, tx.init(params), params)
    return updates["a"]["kernel"]

  step = -0.1 * np.asarray(g, np.float64)
  np.testing.assert_allclose(moved(0.3), step - 0.3 * r, rtol=1e-3, atol=1e-6)
  kappa = 0.5 * np.sqrt(np.mean(step**2) / np.mean(r**2))
  np.testing.assert_allclose(
    moved(tern_jax.relative(0.5)), step - kappa * r, rtol=1e-3, atol=1e-6
  )
  # However strong, it takes weights to their codes and no further.
  if space == "weights":
    for strength in (5.0, tern_jax.relative(1e3)):
      np.testing.assert_allclose(moved(strength), step - r, atol=1e-6)


def _fit(tx, steps, dtype=jnp.float32, view=lambda params: params):
  """Fits a small float net to a teacher; returns what it ends with."""
  r = np.random.default_rng(0)
  x, teacher, start, out = (
    jnp.asarray(r.normal(size=shape) / np.sqrt(shape[0]), dtype)
    for shape in ((64, 16), (16, 4), (16, 32), (32, 4))
  )
  params = {"a": {"kernel": start}, "b": {"kernel": out, "bias": out[0]}}

  def loss(params):
    params = view(params)
    hidden = jnp.tanh(x @ params["a"]["kernel"])
    y = hidden @ params["b"]["kernel"] + params["b"]["bias"][None]
    return jnp.mean(jnp.square(y - x @ teacher))

  def step(carry, _):
    params, state = carry
    updates, state = tx.update(jax.grad(loss)(params), state, params)
    return (optax.apply_updates(params, updates), state), None

  run = jax.jit(lambda start: jax.lax.scan(step, start, length=steps)[0])
  return run((params, tx.init(params)))[0]


rate = functools.partial(optax.cosine_decay_schedule, alpha=0.05)
LATE = optax.linear_schedule(0.0, 1.0, 240, 80)
#: (optimizer, strength of WDR, whether it comes after)
CHAINS = {
  "adam": (optax.adam(rate(1e-2, 400)), LATE, True),
  "before adam": (
    optax.adam(rate(1e-2, 1000)),
    tern_jax.relative(tern_jax.late_kappa(1000, onset=0.3)),
    False,
  ),
  "a small rate": (optax.adamw(1e-5), LATE, True),
  "lion": (optax.lion(rate(1e-3, 400)), LATE, True),
  "muon": (optax.contrib.muon(rate(1e-2, 400)), LATE, True),
  "no gradient": (optax.set_to_zero(), LATE, True),
}


@pytest.mark.parametrize(
  ("chain", "steps", "dtype"),
  [
    long("before adam", 1000, jnp.float32),
    long("lion", 400, jnp.float32),
    long("no gradient", 400, jnp.float32),
    long("adam", 400, jnp.float32),
    long("adam", 400, jnp.bfloat16),
    long("a small rate", 400, jnp.float32),
    long("muon", 400, jnp.float32),
  ],
)
def test_a_float_script_ends_with_ternary_weights(
  standard_promotion, chain, steps, dtype
):
  optimizer, strength, after = CHAINS[chain]
  where, asked = tern_jax.kernels(), tern_jax.at_sparsity(0.75)
  wdr = on_weights(asked, strength, where=where, after_optimizer=after)
  tx = optax.chain(optimizer, wdr) if after else optax.chain(wdr, optimizer)
  params = _fit(tx, steps, dtype)
  tern = tern_jax.ParamTransform(tern_jax.TWN(sparsity=0.75), where)
  ternary = tern.finalize(*tern.init(params))
  for layer in ("a", "b"):
    kernel, codes = params[layer]["kernel"], ternary[layer]["kernel"]
    off = jnp.abs(kernel - codes.dequantize()).astype(jnp.float32)
    assert float(off.max()) <= 0.02 * float(codes.w_p)
    assert int((codes.codes == 0).sum()) == 0.75 * kernel.size


def test_all_of_a_late_kappa_is_used_for_weights():
  kappa = tern_jax.late_kappa(100, onset=0.5, first=2.0, last=2.0)
  tx = on_weights(tern_jax.at_sparsity(0.5), tern_jax.relative(kappa))
  params, grads = {"w": jnp.linspace(-1.0, 2.0, 30)}, {"w": jnp.ones(30)}
  state, update = tx.init(params), jax.jit(tx.update)
  assert state.nonzero == ()
  for count, factor in ((49, 0.0), (50, 2.0)):
    updates, state = update(
      grads, state._replace(count=jnp.int32(count)), params
    )
    edge = np.sort(np.abs(params["w"]))[14:16].mean()
    off, _ = off_codes(params["w"], edge)
    expected = factor * off / np.sqrt(np.mean(off**2))
    np.testing.assert_allclose(updates["w"] - 1, expected, atol=1e-5)


@pytest.mark.parametrize("space", ["latents", "weights"])
@pytest.mark.parametrize("size", [0.0, 1e-25])
def test_relative_strength_is_finite_where_wdr_vanishes(space, size):
  tx = tern_jax.wdr_transform(0.3, tern_jax.relative(30.0), space=space)
  shape = (3, 3)
  got = added(tx, 1e6 * jnp.ones(shape), size * jnp.eye(*shape))
  assert float(jnp.abs(got).max()) <= 1e3
  assert added(tx, jnp.ones((0, 3)), jnp.ones((0, 3))).shape == (0, 3)


MASKS = {
  "kernels": tern_jax.kernels(exclude="b"),
  "path and leaf": lambda path, leaf: path == "a/kernel" and leaf.ndim == 2,
  "tree": lambda tree: {
    "a": {"kernel": True, "bias": False},
    "b": {"kernel": np.bool_(tree["b"]["kernel"].ndim == 3)},
  },
  "bools": {"a": {"kernel": True, "bias": False}, "b": {"kernel": False}},
  "part of the levels": {"a": {"kernel": True, "bias": False}, "b": False},
}


@pytest.mark.sample(3)
@pytest.mark.parametrize("name", ["where", "mask"])
@pytest.mark.parametrize("kind", MASKS)
def test_whatever_selects_leaves(name, kind):
  params, grads = tree()
  args = tern_jax.at_sparsity(0.5), tern_jax.relative(1.0)
  tx = tern_jax.wdr_transform(*args, **{name: MASKS[kind]})
  alone = tern_jax.wdr_transform(*args)
  expected = added(alone, grads["a"]["kernel"], params["a"]["kernel"])
  got = added(tx, grads, params)
  np.testing.assert_allclose(got["a"]["kernel"], expected, atol=1e-7)
  for zeros in (got["a"]["bias"], got["b"]["kernel"]):
    assert not np.any(zeros)
  # The state is the one that optax.masked would have: saved runs go on.
  if not kind.startswith("path"):
    masked = optax.masked(alone, MASKS[kind])
    assert_same(tx.init(params), masked.init(params))


def test_selections_of_latents_beside_scales():
  params, grads = tree()
  scales = {"a/kernel": {"scale": jnp.ones(())}}
  params, grads = (tern_jax.TernParams(x, scales) for x in (params, grads))
  for kind in ("kernels", "path and leaf", "bools", "part of the levels"):
    tx = tern_jax.wdr_transform(0.3, 1.0, MASKS[kind])
    got = added(tx, grads, params)
    expected = reference.wdr_grad(params.latent["a"]["kernel"], 0.3)
    np.testing.assert_allclose(got.latent["a"]["kernel"], expected, atol=1e-6)
    assert not np.any(got.latent["b"]["kernel"])
    assert float(got.scales["a/kernel"]["scale"]) == 0


@pytest.mark.sample(2)
@pytest.mark.parametrize("where", [tern_jax.kernels(), None])
def test_a_whole_equinox_model(where):
  model = eqx.nn.MLP(4, 2, 8, 1, key=jax.random.key(0))  # it has functions
  arrays = eqx.filter(model, eqx.is_inexact_array)
  kappa = tern_jax.relative(tern_jax.late_kappa(100, onset=0.3))
  tx = tern_jax.wdr_transform(tern_jax.at_sparsity(0.5), kappa, where)
  state = tx.init(arrays)
  assert_same(tx.init(model), state)
  inner = state if where is None else state.inner_state
  late = inner._replace(count=jnp.int32(50))
  state = late if where is None else state._replace(inner_state=late)
  grads = jax.tree.map(jnp.ones_like, arrays)
  update = eqx.filter_jit(tx.update)
  updates, after = update(grads, state, model)
  assert_same((updates, after), update(grads, state, arrays))
  changed = updates.layers[0].weight - grads.layers[0].weight
  assert float(jnp.abs(changed).max()) > 0
  assert updates.activation is None
  eqx.apply_updates(model, updates)


def test_hidden_parts_of_a_tree():
  params, grads = tree()
  where = tern_jax.kernels(exclude="b")
  wdr = tern_jax.wdr_transform(tern_jax.at_sparsity(0.5), 1.0, where)
  expected = added(wdr, grads, params)
  labels = {"a": {"kernel": "t", "bias": "f"}, "b": {"kernel": "t"}}
  for outer in (
    optax.masked(wdr, tern_jax.kernels()),
    optax.multi_transform({"t": wdr, "f": optax.identity()}, labels),
    optax.chain(optax.apply_if_finite(wdr, 3)),
  ):
    jax.tree.map(
      np.testing.assert_array_equal, added(outer, grads, params), expected
    )
  # Nothing of what is selected lies in this part.
  hidden = optax.multi_transform(
    {"t": wdr, "f": optax.identity()},
    {"a": {"kernel": "f", "bias": "f"}, "b": {"kernel": "t"}},
  )
  assert not np.any(added(hidden, grads, params)["b"]["kernel"])
  state = wdr.init(params)
  zeros = optax.tree_map_params(wdr, lambda x: x * 0, state)
  assert float(zeros.inner_state.threshold["a"]["kernel"]) == 0


def _boxed(x):
  return nn.Partitioned(x, names=(None, "data"))


def test_boxes_of_partitioned_parameters():
  params, grads = tree()
  tx = tern_jax.wdr_transform(
    tern_jax.at_sparsity(0.5),
    tern_jax.relative(tern_jax.late_kappa(100)),
    tern_jax.kernels(),
  )

  def in_boxes(tree):
    kernel = _boxed(tree["a"]["kernel"])
    return {**tree, "a": {**tree["a"], "kernel": kernel}}

  # A box would give a 0-d threshold the sharding of its kernel.
  state = tx.init(in_boxes(params))
  assert_same(state, tx.init(params))
  inner = state.inner_state._replace(count=jnp.int32(80))
  state = state._replace(inner_state=inner)
  update = jax.jit(tx.update)
  got = update(in_boxes(grads), state, in_boxes(params))
  updates, after = update(grads, state, params)
  assert float(jnp.abs(updates["a"]["kernel"] - grads["a"]["kernel"]).max()) > 0
  assert_same(got, (in_boxes(updates), after))


@pytest.mark.parametrize("sharding", [None, (None, "data")])
def test_variables_of_nnx(sharding):
  r = np.random.default_rng(0)
  value = jnp.asarray(r.normal(size=(4, 4)), jnp.float32)
  metadata = {"out_sharding": sharding, "eager_sharding": False}
  params = nnx.State({"kernel": nnx.Param(value, **metadata)})
  tx = tern_jax.wdr_transform(
    tern_jax.at_sparsity(0.5), 1.0, mask=tern_jax.kernels()
  )
  threshold = tx.init(params).inner_state.threshold["kernel"]
  # Without a sharding it stays a variable, as in states that were saved.
  assert isinstance(threshold, nnx.Param) == (sharding is None)
  got = added(tx, jax.tree.map(jnp.zeros_like, params), params)
  expected = added(tx, {"kernel": jnp.zeros((4, 4))}, {"kernel": value})
  assert jax.tree.structure(got) == jax.tree.structure(params)
  np.testing.assert_array_equal(
    jax.tree.leaves(got)[0], expected["kernel"], strict=True
  )


@pytest.mark.parametrize("name", ["where", "mask"])
def test_inject_hyperparams_takes_no_mask_for_a_schedule(
  standard_promotion, name
):
  params, grads = tree()
  make = optax.inject_hyperparams(tern_jax.wdr_transform)
  schedule = optax.linear_schedule(0.5, 0.0, 2)
  for where in (MASKS["kernels"], MASKS["path and leaf"], MASKS["tree"]):
    tx = make(alpha=0.2, strength=schedule, **{name: where})
    state = tx.init(params)
    assert set(state.hyperparams) == {"alpha", "strength"}
    state.hyperparams["alpha"] = jnp.asarray(0.7)
    updates, state = jax.jit(tx.update)(grads, state, params)
    np.testing.assert_allclose(
      updates["a"]["kernel"] - grads["a"]["kernel"],
      0.5 * reference.wdr_grad(params["a"]["kernel"], 0.7),
      atol=1e-6,
    )
    assert not np.any(updates["b"]["kernel"] - grads["b"]["kernel"])
  relative = make(tern_jax.at_sparsity(0.5), tern_jax.relative(1.0), where)
  plain = tern_jax.wdr_transform(
    tern_jax.at_sparsity(0.5), tern_jax.relative(1.0), where
  )
  jax.tree.map(
    np.testing.assert_array_equal,
    added(relative, grads, params),
    added(plain, grads, params),
  )


@pytest.mark.parametrize(
  ("options", "error", "says"),
  [
    ({"mask": tern_jax.kernels}, TypeError, r"mask=tern_jax.kernels\(\)"),
    ({"where": tern_jax.kernels}, TypeError, r"where=tern_jax.kernels\(\)"),
    ({"mask": "a"}, TypeError, r"mask=tern_jax.kernels\(include='a'\)"),
    ({"where": "a"}, TypeError, r"where=tern_jax.kernels\(include='a'\)"),
    ({"mask": 0.5}, TypeError, "mask holds 0.5, which is no bool"),
    ({"mask": {"a": "t", "b": "f"}}, TypeError, "mask holds 't', which is no"),
    ({"where": lambda tree: "t"}, TypeError, "returns holds 't', which is no"),
    ({"where": lambda path, x: False}, ValueError, "selects no leaf"),
    ({"mask": {"a": False, "b": False}}, ValueError, "a/bias, a/kernel, b/ker"),
    ({"alpha": "0.1"}, TypeError, r"got '0.1': try tern_jax.at_sparsity\(0.8"),
    ({"alpha": True}, TypeError, "alpha must be a number, an array"),
    ({"alpha": jnp.array(True)}, TypeError, "alpha must be a number, an array"),
    ({"alpha": None}, TypeError, "alpha must be a number, an array"),
    ({"alpha": tern_jax.relative(1.0)}, TypeError, "alpha must be a number"),
    ({"alpha": tern_jax.at_sparsity}, TypeError, "alpha must be a number"),
    (
      {"alpha": tern_jax.ramp(0.8, 100)},
      TypeError,
      r"give tern_jax.at_sparsity\(ramp\(sparsity=0.8, steps=100\)\)",
    ),
    ({"strength": "1e-3"}, TypeError, r"got '1e-3': try optax.lin"),
    ({"strength": None}, TypeError, "strength must be a number, an array"),
    ({"strength": tern_jax.at_sparsity(0.5)}, TypeError, "strength must be a"),
    (
      {"strength": tern_jax.late_kappa(100)},
      TypeError,
      r"give tern_jax.relative\(late_kappa\(steps=100\)\)",
    ),
    ({"strength": -1.0}, ValueError, r"try optax.linear_sch"),
    (
      {"space": "weight"},
      ValueError,
      "space must be \"latents\".*got 'weight'",
    ),
    (
      {"channel_axis": -1},
      ValueError,
      'only space="weights" has: leave it out',
    ),
    (
      {"space": "weights", "channel_axis": 2},
      ValueError,
      "channel_axis=2 is no axis",
    ),
  ],
)
def test_arguments_that_mean_nothing(options, error, says):
  params, grads = tree()
  given = {"alpha": 0.1, "strength": 1.0, **options}

  def update():
    tx = tern_jax.wdr_transform(**given)
    return tx.update(grads, tx.init(params), params)

  with pytest.raises(error, match=says):
    jax.eval_shape(update)


def test_the_strength_that_errors_name_works(standard_promotion):
  with pytest.raises(ValueError, match="strength must lie in") as error:
    tern_jax.wdr_transform(0.1, strength=-1.0)
  named = re.search(r"try (optax\..*)\.$", str(error.value)).group(1)
  strength = eval(named, {"optax": optax, "steps": 1000})
  wdr = tern_jax.wdr_transform(0.2, strength, tern_jax.kernels())
  tx = optax.chain(wdr, optax.adam(rate(1e-2, 1000)))

  def squashed(params):
    return jax.tree.map(
      lambda k, x: jnp.tanh(x) if k else x, tern_jax.kernels()(params), params
    )

  params = squashed(_fit(tx, 1000, view=squashed))
  off = [np.ravel(x - np.round(x)) for x in map(kernel_of, params.values())]
  assert np.mean(np.abs(np.concatenate(off)) <= 0.05) >= 0.99


def kernel_of(layer):
  return np.asarray(layer["kernel"])


def test_strengths_print_as_their_calls():
  assert repr(tern_jax.relative(tern_jax.late_kappa(100))) == (
    "relative(kappa=late_kappa(steps=100))"
  )
  assert repr(tern_jax.at_sparsity(tern_jax.ramp(0.9, 100), every=5)) == (
    "at_sparsity(sparsity=ramp(sparsity=0.9, steps=100), every=5)"
  )


@pytest.mark.parametrize(
  "tree", [(jnp.ones((2, 3)),), {"a": {"w": jnp.ones((2, 3))}}], ids=str
)
@pytest.mark.parametrize("alpha", [0.3, tern_jax.at_sparsity(0.5)], ids=repr)
def test_latents_beside_scales_are_a_tree_by_themselves(tree, alpha):
  where = tern_jax.kernels(include="0" if isinstance(tree, tuple) else ())
  tern = tern_jax.ParamTransform(tern_jax.SCA(sparsity=0.5), where)
  params, _ = tern.init(tree)
  tx = tern_jax.wdr_transform(alpha, 0.1, where)
  updates, state = tx.update(params, tx.init(params), params)
  alone, _ = tx.update(params.latent, tx.init(params.latent), params.latent)
  assert_same(updates, params.replace(latent=alone))
  assert jax.tree.structure(state) == jax.tree.structure(tx.init(params))
