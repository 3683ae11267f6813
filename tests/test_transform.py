import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import tern_jax
import tern_jax.linen
import tern_jax.nnx
from tern_jax import SCA, TWN, ParamTransform, TernParams
from tests.helpers import NnxNet


def user_tree(seed=0):
  r = np.random.default_rng(seed)
  return {
    "body": {
      "kernel": jnp.asarray(r.normal(size=(8, 6)), jnp.float32),
      "bias": jnp.zeros(6),
    },
    "head": {"kernel": jnp.asarray(r.normal(size=(6, 4)), jnp.float32)},
  }


def test_latent_keeps_the_user_s_tree_and_scales_are_named_by_path():
  tern = ParamTransform(SCA(sparsity=0.5), tern_jax.kernels(exclude="head"))
  tree = user_tree()
  params, state = tern.init(tree)
  assert jax.tree.structure(params.latent) == jax.tree.structure(tree)
  assert list(params.scales) == ["body/kernel"]
  assert sorted(state["body/kernel"]) == ["count", "cut", "floor", "threshold"]
  np.testing.assert_array_equal(
    params.latent["head"]["kernel"], tree["head"]["kernel"]
  )
  effective = tern(params, state)
  assert len(np.unique(effective["body"]["kernel"])) == 3
  np.testing.assert_array_equal(
    effective["head"]["kernel"], tree["head"]["kernel"]
  )
  ternary = tern.discretize(params, state)
  assert isinstance(ternary["body"]["kernel"], tern_jax.Ternary)
  assert float(jnp.mean(ternary["body"]["kernel"].codes == 0)) == 0.5


def test_partition_trains_latents_and_scales_at_their_own_rates(
  standard_promotion,
):
  tern = ParamTransform(SCA(sparsity=0.5))
  params, _ = tern.init(user_tree())
  assert not callable(tern_jax.LABELS)
  tx = optax.partition(
    {"latent": optax.sgd(0.5), "scales": optax.sgd(0.125)}, tern_jax.LABELS
  )
  grads = jax.tree.map(jnp.ones_like, params)
  updates, _ = jax.jit(tx.update)(grads, tx.init(params), params)
  assert isinstance(updates, TernParams)
  assert {float(u.max()) for u in jax.tree.leaves(updates.latent)} == {-0.5}
  assert {float(u.max()) for u in jax.tree.leaves(updates.scales)} == {-0.125}


def test_the_whole_readme_chain_compiles(standard_promotion):
  where = tern_jax.kernels(exclude="head")
  tern = ParamTransform(SCA(alpha=0.1), where)
  params, state = tern.init(user_tree())
  tx = optax.partition(
    {
      "latent": optax.chain(
        optax.clip_by_global_norm(1.0),
        tern_jax.wdr_transform(
          alpha=0.1,
          strength=optax.linear_schedule(0.0, 0.1, 1000),
          mask=where,
        ),
        optax.adam(1e-2),
      ),
      "scales": optax.adam(1e-5),
    },
    tern_jax.LABELS,
  )

  @jax.jit
  def step(params, state, opt_state, x):
    def loss(params):
      w = tern(params, state)
      h = jnp.tanh(x @ w["body"]["kernel"] + w["body"]["bias"][None])
      return jnp.mean((h @ w["head"]["kernel"]) ** 2)

    value, grads = jax.value_and_grad(loss)(params)
    updates, opt_state = tx.update(grads, opt_state, params)
    params = optax.apply_updates(params, updates)
    return *tern.after_step(params, state), opt_state, value

  x = jnp.asarray(np.random.default_rng(0).normal(size=(5, 8)), jnp.float32)
  opt_state, losses = tx.init(params), []
  for _ in range(20):
    params, state, opt_state, value = step(params, state, opt_state, x)
    losses.append(float(value))
  assert losses[-1] < 0.9 * losses[0]


@pytest.mark.sample(2)
@pytest.mark.parametrize("method", [SCA(sparsity=0.5), SCA(alpha=0.1), TWN()])
def test_stacked_layers_are_ternarized_one_by_one(method):
  r = np.random.default_rng(0)
  spread = np.array([0.1, 1.0, 3.0])[:, None, None]
  stack = jnp.asarray(r.normal(size=(3, 10, 8)) * spread, jnp.float32)
  tern = ParamTransform(method, stacked=("blocks",))
  tree = {"blocks": {"kernel": stack}, "out": {"kernel": stack[0]}}
  params, state = tern.init(tree)
  got = tern.discretize(params, state)
  params, state = tern.after_step(params, state)
  for i in range(3):
    w = stack[i]
    scales, one = method.init(w)
    expected = method.discretize(method.latent(w), scales, one)
    layer = jax.tree.map(lambda x: x[i], got["blocks"]["kernel"])  # noqa: B023
    np.testing.assert_array_equal(layer.codes, expected.codes)
    np.testing.assert_allclose(layer.w_p, expected.w_p, rtol=1e-6)
  with pytest.raises(ValueError, match="'layers' matches no leaf"):
    ParamTransform(method, stacked=("layers",)).init(tree)


def test_stacked_ternary_leaves_dequantize_to_the_forward():
  stack = jnp.asarray(
    np.random.default_rng(0).normal(size=(3, 10, 8)), jnp.float32
  )
  tern = ParamTransform(SCA(sparsity=0.5), stacked=("blocks",))
  params, state = tern.init({"blocks": {"kernel": stack}})
  dense = tern.discretize(params, state)["blocks"]["kernel"].dequantize()
  np.testing.assert_array_equal(dense, tern(params, state)["blocks"]["kernel"])


def test_equinox_and_haiku_models_run_with_ternary_weights():
  model = eqx.nn.MLP(4, 2, 8, 2, key=jax.random.key(0))
  tern = ParamTransform(TWN(sparsity=0.5, channel_axis=0))
  params, state = tern.init(model)
  ternary = tern(params, state)
  assert ternary(jnp.ones(4)).shape == (2,)
  assert float(jnp.mean(ternary.layers[1].weight == 0)) == 0.5

  net = hk.without_apply_rng(hk.transform(lambda x: hk.nets.MLP([8, 2])(x)))
  tree = jax.jit(net.init)(jax.random.key(0), jnp.ones((1, 4)))
  params, state = tern.init(tree)
  assert net.apply(tern(params, state), jnp.ones((1, 4))).shape == (1, 2)


class _Net(nn.Module):
  @nn.compact
  def __call__(self, x, train):
    x = nn.Dense(8)(x)
    x = nn.BatchNorm(use_running_average=not train)(x)
    return nn.Dense(2)(x)


def test_linen_apply_fn_replaces_the_model_s():
  model, x = _Net(), jnp.ones((3, 4))
  variables = jax.jit(lambda key: model.init(key, x, train=False))(
    jax.random.key(0)
  )
  tern = ParamTransform(SCA(sparsity=0.5))
  ternary = tern_jax.linen.init(tern, variables)
  apply = tern_jax.linen.apply_fn(model, tern)
  y, new = apply(ternary, x, train=True, mutable=["batch_stats"])
  weights = tern(ternary["params"], ternary["tern"])
  expected, stats = model.apply(
    {**variables, "params": weights}, x, train=True, mutable=["batch_stats"]
  )
  np.testing.assert_array_equal(y, expected)
  jax.tree.map(np.testing.assert_array_equal, new, stats)


def test_nnx_split_and_merge_inside_grad(standard_promotion):
  model = NnxNet(nnx.Rngs(0))
  tern = ParamTransform(SCA(sparsity=0.5))
  graphdef, params, state, rest = tern_jax.nnx.split(tern, model)
  assert list(params.scales) == ["layers/0/kernel", "layers/1/kernel"]
  r = np.random.default_rng(0)
  x = jnp.asarray(r.normal(size=(16, 4)), jnp.float32)

  def loss(params):
    net = tern_jax.nnx.merge(tern, graphdef, params, state, rest)
    value = jnp.mean((net(x) - 1.0) ** 2)
    return value, nnx.state(net, nnx.BatchStat)

  (_, stats), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
  assert (
    float(jnp.abs(grads.latent["layers"][0]["kernel"].get_value()).max()) > 0
  )
  assert float(jnp.abs(stats["norm"]["mean"].get_value()).max()) > 0


def test_repr_equality_and_hash():
  tern = ParamTransform(SCA(alpha=0.1), tern_jax.kernels(exclude="head"))
  assert repr(tern) == (
    "ParamTransform(method=SCA(alpha=0.1), where=kernels(exclude=('head',)))"
  )
  assert hash(tern) == hash(
    ParamTransform(SCA(alpha=0.1), tern_jax.kernels(exclude="head"))
  )


def test_bad_input():
  tern = ParamTransform(SCA(sparsity=0.5))
  with pytest.raises(ValueError, match="selects no leaf"):
    tern.init({"bias": jnp.ones(3)})
  with pytest.raises(TypeError, match="a/kernel is int32"):
    tern.init({"a": {"kernel": jnp.ones((2, 2), jnp.int32)}})
  with pytest.raises(ValueError, match="a/kernel holds 1 NaN"):
    tern.init({"a": {"kernel": jnp.array([[1.0, jnp.nan]])}})
  w = jnp.ones((2, 2))
  with pytest.raises(ValueError, match="same path"):
    tern.init({"a/b": {"kernel": w}, "a": {"b": {"kernel": w}}})
  with pytest.raises(TypeError, match="TernParams that init returned"):
    tern(user_tree(), {})
