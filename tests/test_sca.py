"""SCA's scale does not vanish where no gradient holds it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tern_jax import SCA, ParamTransform
from tests.helpers import weights


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
