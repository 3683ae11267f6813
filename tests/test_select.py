import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx

import tern_jax
from tern_jax.core.checks import check_weights
from tern_jax.core.paths import matches
from tests import helpers
from tests.helpers import NnxNet

NNX_PATHS = ["layers/0/kernel", "layers/1/kernel"]


class _Block(nn.Module):
  @nn.compact
  def __call__(self, x):
    x = nn.Conv(4, (3, 3))(x)
    x = nn.BatchNorm(use_running_average=True)(x)
    return nn.Dense(3, name="head")(x.mean((1, 2)))


def linen():
  x = jnp.ones((1, 8, 8, 1))
  return jax.jit(_Block().init)(jax.random.key(0), x)["params"]


def linen_boxed():
  init = nn.with_partitioning(nn.initializers.ones, (None, "model"))
  layer = nn.Dense(3, kernel_init=init)
  return jax.jit(layer.init)(jax.random.key(0), jnp.ones((1, 2)))["params"]


def equinox():
  return eqx.nn.MLP(2, 3, 4, 1, key=jax.random.key(0))


def haiku():
  net = hk.transform(lambda x: hk.nets.MLP([4, 3])(x))
  return jax.jit(net.init)(jax.random.key(0), jnp.ones((1, 2)))


@pytest.mark.parametrize(
  ("make", "paths"),
  [
    (linen, ["Conv_0/kernel", "head/kernel"]),
    (linen_boxed, ["kernel"]),
    (lambda: nnx.state(NnxNet(nnx.Rngs(0))), NNX_PATHS),
    (equinox, ["layers/0/weight", "layers/1/weight"]),
    (haiku, ["mlp/~/linear_0/w", "mlp/~/linear_1/w"]),
  ],
)
def test_kernels_of_every_library(make, paths):
  tree = make()
  where = tern_jax.kernels()
  assert where.paths(tree) == paths
  mask = where(tree)
  assert jax.tree.structure(mask) == jax.tree.structure(tree)
  assert sum(jax.tree.leaves(mask)) == len(paths)


def test_patterns_match_whole_components_anywhere():
  assert matches("a/b", "x/a/b/c")
  assert matches("layer_*", "net/layer_12/kernel")
  assert not matches("a", "ab/kernel")
  assert not matches("a/c", "a/b/c")
  assert not matches("a/b/c/d", "a/b")


def test_include_and_exclude():
  tree = linen()
  assert tern_jax.kernels(include="Conv_*").paths(tree) == ["Conv_0/kernel"]
  assert tern_jax.kernels(exclude=["head"]).paths(tree) == ["Conv_0/kernel"]
  where = tern_jax.kernels(exclude=("head",))
  assert repr(where) == "kernels(exclude=('head',))"
  assert where == tern_jax.kernels(exclude="head")
  assert hash(where) == hash(tern_jax.kernels(exclude="head"))


def test_selecting_nothing_lists_the_leaves():
  tree = {"a": {"kernel": jnp.ones(3)}, "b": {"scale": jnp.ones((2, 2))}}
  with pytest.raises(ValueError, match=r"selects no leaf.*a/kernel, b/scale"):
    tern_jax.kernels()(tree)
  tx = tern_jax.wdr_transform(0.1, 1.0, mask=tern_jax.kernels())
  with pytest.raises(ValueError, match="selects no leaf"):
    tx.init(tree)
  with pytest.raises(ValueError, match="The leaves are: none"):
    tern_jax.kernels()({})


def test_a_pattern_without_a_match_is_an_error():
  with pytest.raises(ValueError, match=r"'Head' matches no leaf.*head/kernel"):
    tern_jax.kernels(exclude="Head")(linen())


def test_hidden_parts_of_a_tree_are_no_error():
  tree = {
    "a": {"kernel": jnp.ones((2, 2))},
    "head": {"kernel": optax.MaskedNode()},
  }
  assert tern_jax.kernels(exclude="head")(tree) == {
    "a": {"kernel": True},
    "head": {"kernel": optax.MaskedNode()},
  }


def test_scales_of_tern_params_are_never_selected():
  tern = tern_jax.ParamTransform(tern_jax.SCA(sparsity=0.5, channel_axis=-1))
  params, _ = tern.init({"a": {"kernel": jnp.ones((4, 4))}})
  mask = tern_jax.kernels()(params)
  assert mask.latent == {"a": {"kernel": True}}
  assert mask.scales == {"a/kernel": {"a": False}}


def test_size_of_the_largest_layer():
  tree = {
    "blocks": {"kernel": jnp.ones((12, 4, 8)), "bias": jnp.ones((12, 80))},
    "conv": {"kernel": jnp.ones((3, 3, 2, 5))},
    "head": {"kernel": jnp.ones((8, 7))},
  }
  where = tern_jax.kernels()
  assert where.largest(tree) == 12 * 32
  assert where.largest(tree, stacked=("blocks",)) == 90
  assert tern_jax.kernels(exclude="conv").largest(tree, ["blocks"]) == 56
  shapes = jax.eval_shape(lambda: tree)
  assert where.largest(shapes, stacked=("blocks", "conv")) == 56
  with pytest.raises(ValueError, match="'layers' matches no leaf"):
    where.largest(tree, stacked=("layers",))
  with pytest.raises(ValueError, match="selects no leaf"):
    where.largest({"bias": jnp.ones(3)})


@pytest.mark.parametrize("stacked", [(), ("blocks",)])
def test_the_largest_layer_is_the_one_ec2t_spares_nothing(stacked):
  rng = np.random.default_rng(0)
  tree = {
    "blocks": {"kernel": jnp.asarray(rng.normal(size=(3, 8, 8)), jnp.float32)},
    "head": {"kernel": jnp.asarray(rng.normal(size=(8, 4)), jnp.float32)},
  }
  where = tern_jax.kernels()

  def codes(largest):
    method = tern_jax.EC2T(gamma=0.5, largest=largest)
    tern = tern_jax.ParamTransform(method, where, stacked)
    moment = helpers.init(tern, tree)
    return helpers.discretize(tern, *moment)["blocks"]["kernel"].codes

  largest = where.largest(tree, stacked)
  np.testing.assert_array_equal(codes(largest), codes(None))
  with pytest.raises(ValueError, match=f"largest={largest - 1} and a layer of"):
    codes(largest - 1)


def test_check_weights():
  with pytest.raises(TypeError, match="a/w is int8, but only floating"):
    check_weights("a/w", jnp.ones((2, 2), jnp.int8))
  with pytest.raises(
    ValueError, match="a/w holds 2 NaN or infinite values of 4"
  ):
    check_weights("a/w", jnp.array([[1.0, jnp.nan], [jnp.inf, 0]]))
  jax.eval_shape(lambda w: check_weights("a/w", w), jnp.ones((2, 2)))
