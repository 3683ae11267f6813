"""How gradients pass a discretization, against closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tern_jax.core import estimators
from tests.helpers import f64


def arrays(dtype=jnp.float32):
  r = np.random.default_rng(0)
  w, g = (jnp.asarray(r.normal(size=(96, 64)), dtype) for _ in range(2))
  codes = jnp.asarray(r.integers(-1, 2, (96, 64)), dtype)
  return w, g, codes


@pytest.mark.parametrize("channel", [False, True])
def test_one_trained_scale(channel):
  w, g, codes = arrays()
  a = jnp.linspace(0.5, 2.0, 64)[None] if channel else jnp.float32(0.3)

  def loss(w, codes, a, factor):
    return jnp.sum(estimators.trained_scale(jnp.tanh(w), codes, a, factor) * g)

  factor = jnp.float32(0.7)
  # As users compile it: level 0 rounds tanh too coarsely for this bound.
  options = {"xla_backend_optimization_level": 3}
  grad = jax.jit(jax.grad(loss, (0, 1, 2, 3)), compiler_options=options)
  got = grad(w, codes, a, factor)
  np.testing.assert_array_equal(
    estimators.trained_scale(w, codes, a, factor), a * codes
  )
  np.testing.assert_allclose(
    got[0], 0.7 * f64(g) * (1 - np.tanh(f64(w)) ** 2), rtol=1e-4, atol=1e-7
  )
  want = np.sum(f64(g) * f64(codes), 0 if channel else None, keepdims=channel)
  np.testing.assert_allclose(got[2], want, rtol=1e-5, atol=1e-4)
  assert not got[1].any()
  assert not got[3].any()


@pytest.mark.parametrize("ratio", [1.0, 1.3, 100.0])
@pytest.mark.parametrize("channel", [False, True])
def test_two_trained_scales(channel, ratio):
  w, g, codes = arrays()
  w_p = jnp.linspace(0.5, 2.0, 64)[None] if channel else jnp.float32(0.3)
  w_n = ratio * w_p

  def loss(w, codes, w_p, w_n):
    out = estimators.trained_scales(w, codes, w_p, w_n, jnp.float32(2))
    return jnp.sum(out * g)

  got = jax.jit(jax.grad(loss, (0, 1, 2, 3)))(w, codes, w_p, w_n)
  np.testing.assert_allclose(got[0], 2 * f64(g), rtol=1e-6)
  assert not got[1].any()
  axis = 0 if channel else None
  for sign, d in ((1, got[2]), (-1, got[3])):
    terms = sign * f64(g) * (f64(codes) == sign)
    want = np.sum(terms, axis, keepdims=channel)
    size = np.sum(np.abs(terms), axis, keepdims=channel)
    # To the rounding of a sum in float32, and of the larger magnitude's.
    assert np.all(np.abs(f64(d) - want) < 3e-7 * max(ratio, 1) * size)


def test_second_derivatives_and_forward_mode():
  w, _, codes = arrays()
  w_p, w_n = jnp.float32(0.4), jnp.float32(0.7)

  def out(w_p, w_n):
    return estimators.trained_scales(w, codes, w_p, w_n, jnp.ones(()))

  _, tangent = jax.jvp(out, (w_p, w_n), (jnp.float32(1), jnp.float32(-3)))
  want = np.where(codes > 0, 1, np.where(codes < 0, 3, 0))
  np.testing.assert_allclose(tangent, want, atol=3e-6)
