"""SCA against the paper in NumPy, its gradients, and a scale that lives on."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tern_jax import SCA, ParamTransform
from tests import reference
from tests.helpers import weights


def test_latents_and_scale_of_the_user_s_weights():
  for spread in (1e-3, 0.1, 5.0):
    w = weights() * spread
    method = SCA(alpha=0.1)
    theta = method.latent(w)
    scales, state = method.init(w)
    assert float(jnp.sqrt(jnp.mean(theta**2))) == pytest.approx(0.2, rel=1e-5)
    size = jnp.sqrt(jnp.mean(method(theta, scales, state) ** 2))
    assert float(size) == pytest.approx(
      float(jnp.sqrt(jnp.mean(w**2))), rel=1e-5
    )


def test_published_form_starts_at_the_user_s_weights():
  w = weights()
  method = SCA(alpha=0.1, sigma=None, scaled=False)
  effective = method(method.latent(w), *method.init(w))
  np.testing.assert_allclose(effective, w, rtol=1e-5, atol=1e-7)


def test_codes_at_alpha_and_at_sparsity_are_the_reference_s():
  w = weights((64, 64))
  for alpha in (0.0, 0.05, 0.5, 1.5):
    method = SCA(alpha=alpha)
    theta = method.latent(w)
    codes = method.discretize(theta, *method.init(w)).codes
    np.testing.assert_array_equal(codes, reference.sca_alpha(theta, alpha))
  for sparsity in (0.0, 0.3, 0.9, 0.999):
    method = SCA(sparsity=sparsity)
    theta = method.latent(w)
    codes = method.discretize(theta, *method.init(w)).codes
    np.testing.assert_array_equal(
      codes, reference.codes_at_sparsity(theta, sparsity)
    )


@pytest.mark.parametrize("channel_axis", [None, -1, 0])
def test_gradients_in_closed_form(channel_axis):
  w, g = weights(), weights(seed=1)
  method = SCA(sparsity=0.4, channel_axis=channel_axis)
  theta, (scales, state) = method.latent(w), method.init(w)
  codes = method.discretize(theta, scales, state).codes.astype(jnp.float32)

  def loss(theta, scales):
    return jnp.sum(method(theta, scales, state) * g)

  d_theta, d_scales = jax.grad(loss, (0, 1))(theta, scales)
  slope = 10 * (1 - jnp.tanh(10 * theta) ** 2)
  np.testing.assert_allclose(d_theta, scales["a"] * g * slope, rtol=1e-5)
  axes = {None: None, -1: 0, 0: 1}[channel_axis]
  expected = jnp.sum(g * codes, axes, keepdims=axes is not None)
  np.testing.assert_allclose(d_scales["a"], expected, rtol=1e-4, atol=1e-6)


def test_zero_weights_can_learn():
  method = SCA(sparsity=0.5)
  scales, _ = method.init(jnp.zeros((16, 4)))
  assert float(scales["a"]) == 0.25
  rows = SCA(sparsity=0.5, channel_axis=0).init(jnp.zeros((16, 4)))[0]["a"]
  assert rows.tolist() == [[0.5]] * 16


def test_a_channel_without_a_code_starts_at_the_ratio_of_all():
  w = weights((16, 4)) * jnp.array([[1.0, 1.0, 1.0, 1e-6]])
  a = SCA(sparsity=0.5, channel_axis=-1).init(w)[0]["a"]
  whole = SCA(sparsity=0.5).init(w)[0]["a"]
  assert float(a[0, 3]) == pytest.approx(float(whole))
  assert float(a[0, 0]) != pytest.approx(float(whole), rel=1e-3)


def test_bad_input():
  for kwargs in ({}, {"alpha": 0.1, "sparsity": 0.5}):
    with pytest.raises(ValueError, match="give exactly one"):
      SCA(**kwargs)
  with pytest.raises(ValueError, match=r"alpha must lie in \[0, 2\), got 2"):
    SCA(alpha=2)
  with pytest.raises(ValueError, match="sparsity must lie in"):
    SCA(sparsity=-0.1)
  with pytest.raises(ValueError, match="give no gain"):
    SCA(alpha=0.1, gain=10.0)
  with pytest.raises(ValueError, match="gain must lie in"):
    SCA(sparsity=0.5, gain=0.0)
  with pytest.raises(ValueError, match="sigma must lie in"):
    SCA(alpha=0.1, sigma=0.0)
  with pytest.raises(ValueError, match="channel_axis=2 is no axis"):
    SCA(alpha=0.1, channel_axis=2).init(weights())


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(
  "method",
  [
    SCA(alpha=0.1),
    SCA(sparsity=0.5),
    SCA(sparsity=0.5, channel_axis=-1),
  ],
  ids=repr,
)
def test_the_scale_keeps_a_tenth_of_its_start(method, dtype):
  w = weights(dtype=dtype)
  scales, state = method.init(w)
  gone = jax.tree.map(lambda s: -s, scales)
  kept, _ = method.after_step(method.latent(w), gone, state)
  for name, start in scales.items():
    np.testing.assert_allclose(
      np.asarray(kept[name], np.float64),
      np.asarray(start, np.float64) / 10,
      rtol=2 * float(jnp.finfo(dtype).eps),
    )
  same, _ = method.after_step(method.latent(w), scales, state)
  jax.tree.map(np.testing.assert_array_equal, same, scales)


@pytest.mark.long
def test_a_layer_behind_a_norm_survives_fast_scales(standard_promotion):
  # Adam turns the rounding noise of a gradient that is 0 into full steps.
  rng = np.random.default_rng(0)
  x = jnp.asarray(rng.normal(size=(64, 16)), jnp.float32)
  y = x[:, :4] * 2
  tern = ParamTransform(SCA(sparsity=0.5))
  params, state = tern.init({"kernel": weights((16, 4))})
  tx = optax.adam(3e-2)

  def loss(params):
    out = x @ tern(params, state)["kernel"]
    out -= jnp.mean(out, 0, keepdims=True)
    out /= jnp.sqrt(jnp.var(out, 0, keepdims=True) + 1e-5)
    return jnp.mean(jnp.square(2 * out - y))

  @jax.jit
  def step(params, state, opt_state):
    updates, opt_state = tx.update(jax.grad(loss)(params), opt_state, params)
    params = optax.apply_updates(params, updates)
    return *tern.after_step(params, state), opt_state

  opt_state, start = tx.init(params), params.scales["kernel"]["a"]
  for _ in range(300):
    params, state, opt_state = step(params, state, opt_state)
    assert params.scales["kernel"]["a"] >= 0.099 * start
  # Far above the root of the norm's epsilon.
  assert jnp.std(x @ tern(params, state)["kernel"]) > 5 * 1e-5**0.5
