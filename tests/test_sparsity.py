import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import tern_jax
from tern_jax.targets.quantile import magnitude_threshold
from tern_jax.training import data_mesh

threshold = jax.jit(magnitude_threshold)


@pytest.mark.parametrize("sparsity", [0.0, 0.001, 0.3, 0.5, 0.9, 0.999, 1.0])
@pytest.mark.parametrize("shape", [(7,), (64, 64), (3, 3, 16, 32), (512, 777)])
def test_threshold_leaves_exactly_the_asked_number_of_zeros(shape, sparsity):
  x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
  zeros = np.sum(np.abs(x) <= threshold(x, sparsity))
  assert zeros == round(sparsity * x.size)


@pytest.mark.parametrize(
  "distribution",
  [
    lambda rng, n: np.where(rng.random(n) < 0.6, 1e-30, 1.0) * rng.random(n),
    lambda rng, n: rng.lognormal(0, 20, n),
    lambda rng, n: np.tanh(rng.normal(0, 9, n)) + 1e-7 * rng.normal(0, 1, n),
    lambda rng, n: 1e-40 * rng.random(n),
  ],
  ids=["clustered", "log-normal", "saturated", "subnormal"],
)
def test_threshold_on_hard_distributions(distribution):
  x = distribution(np.random.default_rng(1), 10_000).astype(np.float32)
  magnitudes = np.sort(np.abs(np.asarray(jnp.abs(x))))
  for sparsity in (0.1, 0.5, 0.61, 0.95):
    k = round(sparsity * x.size)
    count = int(jnp.sum(jnp.abs(x) <= threshold(x, sparsity)))
    # Never fewer than k; more only by the elements tied with the k-th.
    assert count >= k
    assert count <= np.searchsorted(magnitudes, magnitudes[k - 1], "right") or (
      jnp.abs(x)[0].dtype == jnp.float32 and magnitudes[k - 1] < 1.2e-38
    )


@settings(deadline=None, max_examples=60, derandomize=True, database=None)
@given(
  hnp.arrays(
    np.float32,
    st.sampled_from([(1,), (7,), (3, 5), (2, 3, 4), (17, 19)]),
    elements=st.floats(-4, 4, width=32, allow_subnormal=False),
  ),
  st.floats(0, 1),
)
def test_threshold_is_an_order_statistic_or_a_gap_above_it(x, sparsity):
  t = float(threshold(x, sparsity))
  k = int(np.round(np.float32(sparsity) * np.float32(x.size)))
  magnitudes = np.sort(np.abs(x).ravel())
  below = np.sum(magnitudes <= t)
  assert below >= k
  if k:
    assert below == np.searchsorted(magnitudes, magnitudes[k - 1], "right")


def test_threshold_of_an_empty_array():
  assert float(magnitude_threshold(jnp.zeros((0, 4)), 0.5)) == 0.0


def test_threshold_maps_over_layers_and_sparsities():
  x = np.random.default_rng(0).normal(size=(3, 40, 50)).astype(np.float32)
  targets = jnp.array([0.2, 0.5, 0.9])
  got = jax.vmap(magnitude_threshold)(x, targets)
  zeros = (np.abs(x) <= np.asarray(got)[:, None, None]).sum((1, 2))
  assert zeros.tolist() == [400, 1000, 1800]


def test_threshold_is_global_over_sharded_weights():
  x = np.random.default_rng(0).normal(size=(64, 33)).astype(np.float32)
  sharded = jax.device_put(x, NamedSharding(data_mesh(), P("data")))
  assert float(threshold(sharded, 0.7)) == float(threshold(x, 0.7))


def test_a_target_is_followed_every_few_steps():
  rng = np.random.default_rng(0)
  method = tern_jax.TTQ(sparsity=tern_jax.ramp(0.8, steps=100, until=0.5))
  w = jnp.asarray(rng.normal(size=1000), jnp.float32)
  scales, state = method.init(w)
  assert int(jnp.sum(jnp.abs(w) <= state["threshold"])) == 0
  shares = []
  follow = jax.jit(lambda state: method.after_step(w, scales, state)[1])
  for _ in range(60):
    state = follow(state)
    shares.append(float(jnp.mean(jnp.abs(w) <= state["threshold"])))
  assert shares[8] == 0.0
  assert (
    shares[9] == shares[18] == pytest.approx(0.8 * (1 - 0.8**3), abs=1.6e-3)
  )
  assert shares[49] == shares[59] == pytest.approx(0.8, abs=1e-3)
  assert int(state["count"]) == 60


def test_ramp_prints_as_its_call_and_rejects_bad_input():
  r = tern_jax.ramp(0.9, 100)
  assert repr(r) == "ramp(sparsity=0.9, steps=100)"
  assert r == tern_jax.ramp(0.9, 100)
  with pytest.raises(ValueError, match=r"sparsity must lie in \[0, 1\)"):
    tern_jax.ramp(1.0, 100)
  with pytest.raises(ValueError, match="steps must lie in"):
    tern_jax.ramp(0.5, 0)
  with pytest.raises(ValueError, match="until must lie in"):
    tern_jax.ramp(0.5, 10, until=0.0)
