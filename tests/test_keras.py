"""Keras 3 trains ternary networks with its own `fit`."""

import jax
import keras
import numpy as np
import pytest

import tern_jax

# Keras's own variables, where Keras hands them to NumPy.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation")


@pytest.fixture(autouse=True)
def as_keras_has_it():
  """Keras promotes dtypes and ranks."""
  with (
    jax.numpy_dtype_promotion("standard"),
    jax.numpy_rank_promotion("allow"),
  ):
    yield


X = np.asarray(jax.random.normal(jax.random.key(0), (64, 8)))
Y = np.argmax(X[:, :4], 1).astype(np.int32)


def model():
  """A network of two dense layers and a norm."""
  keras.utils.set_random_seed(0)
  return keras.Sequential(
    [
      keras.Input((8,)),
      keras.layers.Dense(16, activation="relu"),
      keras.layers.BatchNormalization(),
      keras.layers.Dense(4),
    ]
  )


def fitted(net, tx, epochs=4):
  """Compiles and trains, 4 steps an epoch."""
  loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
  net.compile(tern_jax.keras.Optimizer(tx), loss=loss, metrics=["accuracy"])
  net.fit(X, Y, batch_size=16, epochs=epochs, verbose=0)
  return net


@pytest.mark.long
def test_fit_trains_ternary_weights(tmp_path):
  tx = tern_jax.recipe(0.75, steps=16).optimizer(3e-3)
  net = fitted(model(), tx)
  assert int(net.optimizer.iterations) == 16
  packed = tern_jax.pack(tx.tern.finalize(net.optimizer.state))
  tern_jax.save_packed(tmp_path / "net", packed)
  dense = tern_jax.unpack(tern_jax.load_packed(tmp_path / "net", like=packed))
  live = {v.path: np.asarray(v.value) for v in net.trainable_variables}
  assert dense.keys() == live.keys()
  for path, w in live.items():
    np.testing.assert_array_equal(dense[path], w)
    if path.endswith("kernel"):
      assert np.sum(w == 0) == 0.75 * w.size
  fresh = model()
  fresh.set_weights(net.get_weights())
  # The paths of its variables are others, their order is the same.
  own = [v.path for v in net.trainable_variables]
  for v, path in zip(fresh.trainable_variables, own, strict=True):
    v.assign(dense[path])
  np.testing.assert_array_equal(
    fresh.predict(X, verbose=0), net.predict(X, verbose=0)
  )


@pytest.mark.long
def test_a_run_is_saved_and_goes_on(tmp_path):
  recipe = tern_jax.recipe(0.5, steps=16)
  net = fitted(model(), recipe.optimizer(), epochs=2)
  net.save_weights(tmp_path / "run.weights.h5")
  net.fit(X, Y, batch_size=16, epochs=2, verbose=0, shuffle=False)
  again = fitted(model(), recipe.optimizer(), epochs=1)
  again.load_weights(tmp_path / "run.weights.h5")
  again.fit(X, Y, batch_size=16, epochs=2, verbose=0, shuffle=False)
  for v, w in zip(again.variables, net.variables, strict=True):
    if "seed" not in v.path:
      np.testing.assert_array_equal(v.value, w.value)


def test_what_keras_cannot_do_says_so(tmp_path):
  tx = tern_jax.recipe(0.5, steps=4).optimizer()
  optimizer = tern_jax.keras.Optimizer(tx)
  with pytest.raises(ValueError, match=r"no state before model\.fit"):
    _ = optimizer.state
  with pytest.raises(NotImplementedError, match="give that a schedule"):
    optimizer.learning_rate = 0.1
  with pytest.raises(NotImplementedError, match=r"model\.save_weights"):
    optimizer.get_config()
