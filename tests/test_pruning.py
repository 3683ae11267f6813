"""Pruned float weights, beside ternary ones at the same sparsity."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tern_jax
from experiments.benchmarks import equal_sparsity
from experiments.common import sweep
from experiments.common.pruning import Pruned
from tests.helpers import f64, weights

pytestmark = pytest.mark.usefixtures("standard_promotion_throughout")


def pruned(w, sparsity):
  """The weights without those of least magnitude."""
  zeros = np.argsort(np.abs(w), axis=None)[: round(sparsity * w.size)]
  kept = w.copy()
  kept.flat[zeros] = 0
  return kept


@pytest.mark.parametrize("dense", [False, True])
def test_pruned_weights_are_those_of_largest_magnitude(dense):
  method = Pruned(0.8, dense=dense)

  @jax.jit
  def all_of(w):
    scales, state = method.init(w)
    out, pull = jax.vjp(lambda w: method(w, scales, state), w)
    (slope,) = pull(jnp.full_like(w, 3))
    ternary = method.discretize(w, scales, state)
    return out, slope, ternary.dequantize(), ternary.codes

  w = weights()
  out, slope, rounded, codes = all_of(w)
  expected = pruned(f64(w), 0.8)
  np.testing.assert_array_equal(f64(out), expected)
  np.testing.assert_array_equal(f64(rounded), expected)
  np.testing.assert_array_equal(codes, np.sign(expected))
  alive = dense | (expected != 0)
  np.testing.assert_array_equal(slope, np.where(alive, 3, 0))


def test_layers_are_pruned_by_one_threshold():
  tree = {"a": {"kernel": weights()}, "b": {"kernel": 2 * weights(seed=1)}}
  tern = tern_jax.ParamTransform(Pruned(tern_jax.across_layers(0.9)))
  dense = jax.jit(lambda x: sweep.dense(tern.finalize(*tern.init(x))))(tree)
  whole, found = (
    np.stack([f64(x[k]["kernel"]) for k in "ab"]) for x in (tree, dense)
  )
  np.testing.assert_array_equal(found, pruned(whole, 0.9))


@pytest.mark.long
def test_pruned_float_beside_the_methods_of_equal_sparsity(tmp_path, capsys):
  equal_sparsity.main(
    equal_sparsity.EqualOptions(
      racers=("pruned float", "pruned float, dense"),
      rates=(1e-2,),
      data="digits",
      data_dir=str(tmp_path / "tfds"),
      hidden=(16,),
      sparsities=(0.5, 0.9),
      epochs=10,
      seeds=2,
      root=tmp_path / "runs",
    )
  )
  assert "| pruned float | " in capsys.readouterr().out
  record = json.loads(
    (tmp_path / "runs" / "digits-16" / "table.json").read_text()
  )
  for row in record.values():
    for sparsity, cell in row.items():
      np.testing.assert_allclose(cell["zeros"], float(sparsity), atol=1e-3)
      assert min(cell["test"]) > 0.5
