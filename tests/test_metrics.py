import jax.numpy as jnp
import numpy as np
import pytest

import tern_jax
from tern_jax import metrics


def tree(sizes=(1000, 24), sparsities=(0.9, 0.5)):
  rng = np.random.default_rng(0)
  one = jnp.ones(())
  leaves = {}
  for i, (size, s) in enumerate(zip(sizes, sparsities, strict=True)):
    codes = rng.choice([-1, 0, 1], size, p=[(1 - s) / 2, s, (1 - s) / 2])
    leaves[f"layer_{i}"] = tern_jax.Ternary(
      jnp.asarray(codes, jnp.int8), one, one
    )
  return leaves | {"bias": jnp.zeros(3)}


def entropy_of(codes):
  _, counts = np.unique(codes, return_counts=True)
  p = counts / counts.sum()
  return -np.sum(p * np.log2(p))


def test_sparsity_and_shares_count_every_weight_once():
  t = tree()
  codes = np.concatenate([t["layer_0"].codes, t["layer_1"].codes])
  assert float(metrics.sparsity(t)) == pytest.approx(np.mean(codes == 0))
  np.testing.assert_allclose(
    metrics.code_shares(t), [np.mean(codes == c) for c in (-1, 0, 1)], rtol=1e-6
  )
  packed = tern_jax.pack(t)
  assert float(metrics.sparsity(packed)) == float(metrics.sparsity(t))
  assert list(metrics.ternary_leaves(packed)) == ["layer_0", "layer_1"]


def test_entropy_is_the_mean_over_layers():
  t = tree()
  expected = (
    1000 * entropy_of(t["layer_0"].codes) + 24 * entropy_of(t["layer_1"].codes)
  ) / 1024
  assert float(metrics.entropy(t)) == pytest.approx(expected, rel=1e-5)
  one = jnp.ones(())
  same = tern_jax.Ternary(jnp.zeros(9, jnp.int8), one, one)
  assert float(metrics.entropy(same)) == 0.0


def test_bits_per_weight_of_packed_leaves():
  packed = tern_jax.pack(tree())
  # Two planes of 125 and 3 bytes, and two float32 scales each.
  assert metrics.bits_per_weight(packed) == 8 * (2 * 128 + 4 * 4) / 1024


def test_flip_rate():
  a, b = tree(), tree()
  assert float(metrics.flip_rate(a, b)) == 0.0
  flipped = a["layer_1"].codes.at[:6].set(-a["layer_1"].codes[:6] + 0)
  changed = int(jnp.sum(flipped != a["layer_1"].codes))
  one = jnp.ones(())
  b["layer_1"] = tern_jax.Ternary(flipped, one, one)
  assert changed > 0
  assert float(metrics.flip_rate(a, b)) == pytest.approx(changed / 1024)


def test_distance_to_ternary():
  theta = jnp.arctanh(jnp.array([0.0, 0.5, -0.9, 0.1]))
  expected = np.sqrt(np.mean(np.square([0.0, 0.5, 0.1, 0.1])))
  assert float(metrics.distance_to_ternary(theta)) == pytest.approx(expected)


def test_bad_input():
  with pytest.raises(ValueError, match="holds no ternary leaf"):
    metrics.sparsity({"w": jnp.ones(3)})
  with pytest.raises(ValueError, match="holds no packed leaf"):
    metrics.bits_per_weight(tree())
  other = tree()
  del other["layer_1"]
  with pytest.raises(ValueError, match="layer_1 are in one only"):
    metrics.flip_rate(tree(), other)
