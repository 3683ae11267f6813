"""TGA against scipy, closed forms and finite differences."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.special
import scipy.stats

from tern_jax import LABELS, TGA, ParamTransform, kernels, training
from tern_jax.methods.tga_math import inverse_mills, truncated_gaussian_scale
from tests import reference
from tests.helpers import weights

PAPER = TGA(delta=0.05, of_max=True, mean=True, detach=False)
METHODS = [
  TGA(),
  TGA(delta=1.0, clamp=None),
  TGA(surrogate=0.5),
  TGA(detach=False),
  TGA(mean=True),
  PAPER,
]
AXES = {None: None, -1: 0, 0: 1}


def pull_back(method, w, scales, g):
  """Gradients of w and Delta, given those of the effective weights."""
  _, pull = jax.vjp(lambda *args: method(*args, {}), w, scales)
  dw, dscales = pull(g)
  return dw, dscales["delta"]


compiled = jax.jit(pull_back, static_argnums=0)


def grads(method, w, g, scales=None):
  scales = jax.jit(method.init)(w)[0] if scales is None else scales
  return compiled(method, w, scales, g)


class TestInverseMills:
  t = jnp.concatenate(
    [
      jnp.linspace(0, 200, 400_001),
      jnp.linspace(7.99, 8.01, 2001),
      jnp.array([1e3, 1e6, 1e18]),
    ]
  )

  def test_value_is_scipy_s(self):
    got = jax.jit(inverse_mills)(self.t)
    np.testing.assert_allclose(
      got, reference.inverse_mills(self.t), rtol=1.2e-6
    )

  def test_derivative_is_scipy_s(self):
    got = jax.jit(jax.vmap(jax.grad(inverse_mills)))(self.t)
    np.testing.assert_allclose(
      got, reference.inverse_mills_grad(self.t), rtol=3e-5
    )
    assert float(jax.grad(inverse_mills)(0.0)) == pytest.approx(2 / np.pi)

  def test_second_derivative_is_finite(self):
    curve = jax.jit(jax.vmap(jax.grad(jax.grad(inverse_mills))))
    got = curve(jnp.linspace(0, 50, 501))
    assert bool(jnp.isfinite(got).all())

  def test_float64(self):
    with jax.enable_x64(True):
      t = jnp.linspace(0, 12, 25)
      slope = jax.jit(jax.vmap(jax.grad(inverse_mills)))
      assert inverse_mills(t).dtype == jnp.float64
      np.testing.assert_allclose(
        inverse_mills(t), reference.inverse_mills(t), rtol=2e-7
      )
      np.testing.assert_allclose(
        slope(t),
        (reference.inverse_mills(t + 1e-5) - reference.inverse_mills(t - 1e-5))
        / 2e-5,
        rtol=2e-6,
      )

  @pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
  def test_half_precision_is_the_rounded_value(self, dtype):
    t = jnp.linspace(0, 200, 2001).astype(dtype)
    eps = float(jnp.finfo(dtype).eps)
    both = jax.jit(jax.vmap(jax.value_and_grad(inverse_mills)))
    value, slope = both(t)
    assert value.dtype == slope.dtype == dtype
    for got, want in (
      (value, reference.inverse_mills(t)),
      (slope, reference.inverse_mills_grad(t)),
    ):
      np.testing.assert_allclose(got.astype(jnp.float32), want, rtol=eps)


class TestTruncatedGaussianScale:
  @pytest.mark.parametrize(
    ("delta", "mu"), [(0.0, 0.0), (0.6, 0.0), (1.5, 0.2), (3.0, -0.4)]
  )
  def test_is_the_mean_of_gaussian_samples_beyond(self, delta, mu):
    w = np.random.default_rng(0).normal(mu, 0.5, 4_000_000)
    got = truncated_gaussian_scale(0.5 * delta, 0.5, mu)
    beyond = w[w > mu + 0.5 * delta]
    assert float(got) == pytest.approx(beyond.mean(), abs=2e-3)

  def test_gaussian_constants(self):
    # The best ternary of N(0, 1): error 1 - S^2 P(|w| > t), at t = S / 2.
    t = np.linspace(0.2, 1.2, 10_001)
    s = np.asarray(truncated_gaussian_scale(jnp.asarray(t, jnp.float32), 1.0))
    error = 1 - s**2 * scipy.special.erfc(t / np.sqrt(2))
    best = np.argmin(error)
    assert t[best] == pytest.approx(0.612, abs=5e-3)
    assert s[best] == pytest.approx(1.224, abs=2e-3)
    assert error[best] == pytest.approx(0.1902, abs=1e-4)

  def test_no_spread_is_the_limit(self):
    for delta, sigma in ((0.3, 0.0), (0.3, 1e-38), (0.0, 0.0), (1e30, 1e-9)):
      delta = jnp.float32(delta)
      got, slopes = jax.value_and_grad(truncated_gaussian_scale, (0, 1, 2))(
        delta, jnp.float32(sigma), jnp.float32(0.25)
      )
      assert float(got) == pytest.approx(float(delta + jnp.float32(0.25)))
      assert all(bool(jnp.isfinite(x)) for x in slopes)
      assert float(slopes[0]) == 1

  def test_finite_differences_in_float64(self):
    @jax.jit
    def scale(x):
      return truncated_gaussian_scale(*x)

    with jax.enable_x64(True):
      x = jnp.array([0.3, 0.4, 0.1])
      got = jax.grad(scale)(x)
      for i in range(3):
        e = jnp.zeros(3).at[i].set(1e-6)
        want = (scale(x + e) - scale(x - e)) / 2e-6
        assert float(got[i]) == pytest.approx(float(want), rel=1e-7)

  def test_half_precision_comes_back(self):
    got = truncated_gaussian_scale(jnp.bfloat16(0.3), jnp.float32(0.1))
    assert got.dtype == jnp.bfloat16
    assert float(got) == pytest.approx(
      0.1 * reference.inverse_mills(3.0), rel=0.01
    )


class TestForward:
  # Those whose forwards differ.
  @pytest.mark.sample(3)
  @pytest.mark.parametrize("channel_axis", [None, -1, 0])
  @pytest.mark.parametrize(
    "method", [TGA(delta=1.0), TGA(mean=True), PAPER], ids=repr
  )
  def test_codes_and_scale_are_the_reference_s(self, method, channel_axis):
    w = weights((64, 40), mu=0.02)
    method = dataclasses.replace(method, channel_axis=channel_axis)
    scales, state = jax.jit(method.init)(w)
    assert state == {}
    got = jax.jit(method.discretize)(w, scales, state)
    codes, scale, _ = reference.tga(
      w, scales["delta"], method.mean, channel_axis
    )
    np.testing.assert_array_equal(got.codes, codes)
    np.testing.assert_allclose(got.w_p, scale, rtol=3e-6)
    np.testing.assert_array_equal(got.w_p, got.w_n)
    assert got.w_p.shape == scale.shape == scales["delta"].shape

  @pytest.mark.sample(2)
  @pytest.mark.parametrize(
    ("method", "dtype"),
    [
      *((method, jnp.float32) for method in METHODS),
      (TGA(surrogate=0.5), jnp.bfloat16),
      (PAPER, jnp.bfloat16),
    ],
  )
  def test_forward_is_the_discretization_bit_for_bit(self, method, dtype):
    w = weights(dtype=dtype)
    scales, state = method.init(w)
    effective = jax.jit(method)(w, scales, state)
    dense = jax.jit(method.discretize)(w, scales, state).dequantize()
    assert effective.dtype == dense.dtype == dtype
    bits = jnp.uint32 if dtype == jnp.float32 else jnp.uint16
    np.testing.assert_array_equal(
      np.asarray(effective).view(bits), np.asarray(dense).view(bits)
    )

  def test_gaussian_weights_give_the_numbers_of_theory(self):
    w = 10 * weights((1000, 1000))
    method = TGA(delta=0.612)
    got = method.discretize(w, *method.init(w))
    error = jnp.mean((got.dequantize() - w) ** 2)
    assert float(jnp.mean(got.codes == 0)) == pytest.approx(0.459, abs=2e-3)
    assert float(got.w_p) == pytest.approx(1.224, abs=5e-3)
    assert float(error) == pytest.approx(0.1902, abs=1e-3)

  def test_start_at_a_share_of_the_maximum(self):
    w = weights()
    scales, _ = PAPER.init(w)
    assert float(scales["delta"]) == pytest.approx(0.05 * np.abs(w).max())
    scales, _ = TGA(delta=9.0).init(w)
    sigma = np.sqrt(np.mean(np.square(w)))
    assert float(scales["delta"]) == pytest.approx(3 * sigma)

  @pytest.mark.parametrize("delta", [-1.0, 0.0, 1e3])
  def test_bounds_of_the_threshold(self, delta):
    w = weights()
    sigma = float(jnp.sqrt(jnp.mean(w**2)))
    scales = {"delta": jnp.float32(delta)}
    want = min(max(delta, 0), 3 * sigma)
    s = TGA().discretize(w, scales, {}).w_p
    assert float(s) == pytest.approx(
      sigma * reference.inverse_mills(want / sigma), rel=1e-5
    )
    after = TGA().after_step(w, scales, {})[0]["delta"]
    assert after > 0
    assert float(after) == pytest.approx(want, rel=1e-6, abs=1e-30)


class TestGradients:
  @pytest.mark.sample(2)
  @pytest.mark.parametrize("channel_axis", [None, -1, 0])
  @pytest.mark.parametrize("mean", [False, True])
  def test_in_closed_form(self, mean, channel_axis):
    w, g = weights((64, 40), mu=0.02), weights((64, 40), seed=1)
    method = TGA(clamp=None, mean=mean, channel_axis=channel_axis)
    dw, ddelta = grads(method, w, g)
    codes, _, slope = reference.tga(
      w, method.init(w)[0]["delta"], mean, channel_axis
    )
    np.testing.assert_array_equal(dw, g)
    total = np.sum(
      np.asarray(g, np.float64) * codes,
      AXES[channel_axis],
      keepdims=channel_axis is not None,
    )
    np.testing.assert_allclose(ddelta, total * slope, rtol=2e-5, atol=2e-6)

  @pytest.mark.parametrize("clamp", [1e-3, 0.2])
  def test_clamp(self, clamp):
    w, g = weights(), weights(seed=1)
    for size in (1e2, 1e-5):
      free = float(grads(TGA(clamp=None), w, size * g)[1])
      got = float(grads(TGA(clamp=clamp), w, size * g)[1])
      assert got == pytest.approx(np.clip(free, -clamp, clamp))
      assert float(grads(TGA(clamp=clamp), w, -size * g)[1]) == -got

  def test_delta_in_finite_differences(self):
    with jax.enable_x64(True):
      w = jnp.asarray(weights(), jnp.float64)
      g = jnp.asarray(weights(seed=1), jnp.float64)
      method = TGA(clamp=None)

      @jax.jit
      def loss(delta):
        return jnp.sum(method(w, {"delta": delta}, {}) * g)

      # No weight lies between, so the codes do not change.
      delta = method.init(w)[0]["delta"]
      want = (loss(delta + 1e-6) - loss(delta - 1e-6)) / 2e-6
      assert delta.dtype == jnp.float64
      assert float(jax.grad(loss)(delta)) == pytest.approx(
        float(want), rel=1e-6
      )

  def test_mu_and_sigma_in_finite_differences(self):
    with jax.enable_x64(True):
      w = jnp.asarray(weights((6, 5)), jnp.float64)
      g = jnp.asarray(weights((6, 5), seed=1), jnp.float64)
      method = TGA(mean=True, detach=False, clamp=None)
      scales, _ = method.init(w)

      @jax.jit
      def loss(w):
        return jnp.sum(method(w, scales, {}) * g)

      want = np.array(g)
      for i in np.ndindex(*w.shape):
        e = jnp.zeros_like(w).at[i].set(1e-7)
        want[i] += (loss(w + e) - loss(w - e)) / 2e-7
      np.testing.assert_allclose(jax.grad(loss)(w), want, rtol=1e-5, atol=1e-7)

  @pytest.mark.parametrize("channel_axis", [None, -1])
  def test_surrogate_in_closed_form(self, channel_axis):
    w, g = np.asarray(weights()), np.asarray(weights(seed=1))
    method = TGA(clamp=None, surrogate=0.5, channel_axis=channel_axis)
    plain = dataclasses.replace(method, surrogate=None)
    delta = np.asarray(method.init(jnp.asarray(w))[0]["delta"])
    _, s, _ = reference.tga(w, delta, channel_axis=channel_axis)
    axes, keep = AXES[channel_axis], channel_axis is not None
    h = 0.5 * np.sqrt(np.mean(np.square(w), axes, keepdims=keep))
    inside = np.abs(np.abs(w) - delta) < h / 2
    term = -np.sum(g * s * np.sign(w) * inside / h, axes, keepdims=keep)
    w, g = jnp.asarray(w), jnp.asarray(g)
    (dw, got), (_, base) = grads(method, w, g), grads(plain, w, g)
    np.testing.assert_array_equal(dw, g)
    np.testing.assert_allclose(got - base, term, rtol=2e-4, atol=2e-5)

  @pytest.mark.long
  def test_surrogate_estimates_the_slope_of_the_expected_loss(self):
    # On many Gaussian weights the loss is a smooth function of Delta.
    w = 10 * weights((1000, 1000))
    method = TGA(clamp=None, surrogate=0.05)

    @jax.jit
    def loss(delta):
      return jnp.mean(jnp.square(method(w, {"delta": delta}, {}) - w))

    # S^2 P(|w| > t) is what the best scale S saves of the error.
    for t in (0.3, 1.0):
      want = (
        2
        * scipy.stats.norm.pdf(t)
        * (2 * t - reference.inverse_mills(t))
        * reference.inverse_mills(t)
      )
      got = jax.grad(loss)(jnp.float32(t))
      assert float(got) == pytest.approx(float(want), rel=0.08)

  def test_threshold_comes_back_from_its_bounds(self):
    w = weights()
    for delta in (-1.0, 1e3):
      scales = {"delta": jnp.float32(delta)}
      assert float(grads(TGA(), w, -w, scales)[1]) < 0

  @pytest.mark.sample(2)
  @pytest.mark.parametrize(
    ("channel_axis", "dtype"),
    [(None, jnp.float32), (-1, jnp.bfloat16)],
    ids=["tensor f32", "channel bf16"],
  )
  @pytest.mark.parametrize("method", METHODS, ids=repr)
  def test_finite_and_of_the_latents_dtype(self, method, channel_axis, dtype):
    method = dataclasses.replace(method, channel_axis=channel_axis)
    g = weights(dtype=dtype, seed=1)
    for w in (weights(dtype=dtype), *(jnp.full_like(g, v) for v in (0, 0.25))):
      start = jax.jit(method.init)(w)[0]["delta"]
      for delta in (start, 0 * start, 5 * start, start + 1):
        for x in grads(method, w, g, {"delta": delta}):
          assert x.dtype == dtype
          assert bool(jnp.isfinite(x).all())

  @pytest.mark.sample(2)
  @pytest.mark.parametrize("width", [0.0, 1.0])
  def test_batch_norm_nullifies_the_gradient_through_the_scale(self, width):
    x = np.random.default_rng(2).normal(size=(64, 48))
    w = weights()

    def slope(norm, surrogate):
      method = TGA(clamp=None, surrogate=surrogate)

      @jax.jit
      def loss(scales):
        y = jnp.asarray(x, jnp.float32) @ method(w, scales, {})
        if norm:
          y = (y - y.mean(0, keepdims=True)) / y.std(0, keepdims=True)
        return jnp.mean(jnp.square(jax.nn.relu(y) - width))

      return abs(float(jax.grad(loss)(method.init(w)[0])["delta"]))

    assert slope(norm=False, surrogate=None) > 1e-1
    assert slope(norm=True, surrogate=None) < 1e-5
    assert slope(norm=True, surrogate=0.5) > 1e-3


class TestContract:
  @pytest.mark.parametrize("method", METHODS, ids=repr)
  def test_zero_and_constant_weights(self, method):
    for value in (0.0, 0.25):
      w = jnp.full((8, 4), value)
      effective = jax.jit(lambda w: method(w, *method.init(w)))(w)
      assert bool(jnp.isfinite(effective).all())
      # Around their mean, or at one sigma, constant weights are all zero.
      within = method.mean or method.delta >= 1
      assert bool(effective.any()) == (value > 0 and not within)

  def test_hyper_parameters_may_be_traced(self):
    w, g = weights(), weights(seed=1)

    def both(delta, clamp, width):
      method = TGA(delta=delta, clamp=clamp, surrogate=width)
      codes = method.discretize(w, *method.init(w)).codes
      return jnp.mean(codes == 0), pull_back(method, w, method.init(w)[0], g)[1]

    deltas, clamps = jnp.array([0.3, 0.6, 1.2]), jnp.array([1e-3, 1e-4, 1e-9])
    zeros, slopes = jax.jit(jax.vmap(both))(deltas, clamps, deltas)
    want = scipy.special.erf(np.asarray(deltas) / np.sqrt(2))
    np.testing.assert_allclose(zeros, want, atol=0.03)
    np.testing.assert_allclose(jnp.abs(slopes), clamps, rtol=1e-6)

  def test_bad_input(self):
    with pytest.raises(ValueError, match="delta must lie in"):
      TGA(delta=-0.1)
    with pytest.raises(ValueError, match="clamp must lie in"):
      TGA(clamp=-1.0)
    with pytest.raises(ValueError, match="surrogate must lie in"):
      TGA(surrogate=0.0)
    with pytest.raises(ValueError, match="channel_axis=2 is no axis"):
      TGA(channel_axis=2).init(weights())


def test_learns_weights_and_threshold(standard_promotion):
  r = np.random.default_rng(0)
  x = jnp.asarray(r.normal(size=(512, 16)), jnp.float32)
  true = np.zeros((16, 8), np.float32)
  true[:4] = r.choice([-0.5, 0.5], (4, 8))
  batch = (x, x @ true)

  def loss_fn(weights, model_state, batch, key):
    del key
    error = jnp.mean((batch[0] @ weights["w"] - batch[1]) ** 2)
    return error, (model_state, {})

  tern = ParamTransform(TGA(), kernels())
  tx = optax.partition(
    {"latent": optax.adam(1e-2), "scales": optax.sgd(1e-1)}, LABELS
  )
  state = training.init_state({"w": 0.5 * weights((16, 8))}, tx, tern)
  step = jax.jit(training.make_step(loss_fn, tx, tern))
  start = float(state.params.scales["w"]["delta"])
  for _ in range(300):
    state, metrics = step(state, batch)
  codes = tern.discretize(state.params, state.tern_state)["w"].codes
  np.testing.assert_array_equal(codes, np.sign(true))
  assert float(metrics["loss"]) < 0.02
  assert float(state.params.scales["w"]["delta"]) != start
