"""A method that the package does not know goes the whole way."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

import tern_jax
from tern_jax import training
from tests.helpers import Halves


def test_from_training_to_a_loaded_file(tmp_path):
  tern = tern_jax.ParamTransform(Halves(start=0.25))
  assert repr(tern.method) == "Halves(start=0.25)"
  rng = np.random.default_rng(0)
  x = jnp.asarray(rng.normal(size=(64, 16)), jnp.float32)
  true = 0.25 * rng.integers(-1, 2, (16, 8))
  y = x @ jnp.asarray(true, jnp.float32)

  def loss(weights, model_state, batch, key):
    del key
    error = jnp.mean((batch[0] @ weights["w"] - batch[1]) ** 2)
    return error, (model_state, {})

  tx = optax.sgd(0.3)
  state = training.init_state({"w": jnp.zeros((16, 8))}, tx, tern)
  step = jax.jit(training.make_step(loss, tx, tern))
  for _ in range(100):
    state, _ = step(state, (x, y))
  ternary = tern.discretize(state.params, state.tern_state)
  np.testing.assert_array_equal(ternary["w"].codes, np.sign(true))
  packed = tern_jax.pack(ternary)
  tern_jax.save_packed(tmp_path / "net", packed, method=tern)
  loaded = tern_jax.unpack(tern_jax.load_packed(tmp_path / "net"))
  np.testing.assert_array_equal(
    loaded["w"], tern(state.params, state.tern_state)["w"]
  )
