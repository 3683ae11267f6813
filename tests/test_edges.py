"""Weights at the edges: none, all zero, equal, or huge; and forward mode."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

import tern_jax
from tern_jax import EC2T, SCA, TGA, TTQ, TWN, AbsMean, ParamTransform
from tern_jax.core.estimators import clamp_gradient
from tern_jax.training import data_mesh
from tests import helpers

METHODS = [
  SCA(alpha=0.1),
  SCA(sparsity=0.5),
  TWN(),
  TWN(sparsity=tern_jax.ramp(0.5, 4)),
  TTQ(),
  TTQ(sparsity=0.5),
  EC2T(),
  EC2T(sparsity=0.5),
  TGA(),
  TGA(of_max=True, mean=True, surrogate=0.5, detach=False),
  TGA(sparsity=0.5, mean=True),
  AbsMean(),
]


def all_finite(tree):
  return all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(tree))


@pytest.mark.sample(8)
@pytest.mark.parametrize("axis", [None, -1])
@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_empty_kernels_go_the_whole_way(method, axis):
  tree = {
    "channels": {"kernel": jnp.zeros((0, 8))},
    "inputs": {"kernel": jnp.zeros((8, 0))},
    "one": {"kernel": helpers.weights((6, 4))},
  }
  tern = ParamTransform(dataclasses.replace(method, channel_axis=axis))
  moment = helpers.init(tern, tree)
  moment = helpers.refresh(tern, *helpers.after_step(tern, *moment))
  assert all_finite(moment)
  packed = tern_jax.pack(tern.discretize(*moment))
  assert all_finite([x["kernel"].w_p for x in packed.values()])
  assert tern_jax.unpack(packed)["inputs"]["kernel"].shape == (8, 0)
  # As deep in as by itself.
  alone = ParamTransform(tern.method).discretize(
    *helpers.init(tern, {"one": tree["one"]})
  )
  assert packed["one"]["kernel"].shape == alone["one"]["kernel"].shape


def test_a_budget_of_empty_kernels():
  tree = {"a": {"kernel": jnp.zeros((0, 8))}, "b": {"kernel": jnp.ones((9, 8))}}
  targets = tern_jax.fit_budget(tree, bytes=40)
  assert float(targets.of("a/kernel")) == 0
  tern = ParamTransform(TWN(sparsity=targets))
  assert all_finite(tern.init(tree))


@pytest.mark.sample(6)
@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_kernels_that_start_equal_are_trained(method, optimizer):
  tern = ParamTransform(method)
  tx = {"adam": optax.adam(1e-2), "sgd": optax.sgd(0.1)}[optimizer]
  if isinstance(method, SCA):
    alpha = 0.1 if method.soft else tern_jax.at_sparsity(0.5)
    wdr = tern_jax.wdr_transform(alpha, tern_jax.relative(1.0), tern.where)
    tx = optax.chain(wdr, tx)
  x, y = helpers.weights((16, 8)), helpers.weights((16, 4), seed=1)

  @jax.jit
  @jax.vmap
  def run(kernel):
    params, state = tern.init({"kernel": kernel})
    opt_state = tx.init(params)

    def loss(params, state):
      return jnp.mean((x @ tern(params, state)["kernel"] - y) ** 2)

    for _ in range(4):
      grads = jax.grad(loss)(params, state)
      updates, opt_state = tx.update(grads, opt_state, params)
      params = optax.apply_updates(params, updates)
      params, state = tern.after_step(params, state)
    moment = tern.refresh(params, state)
    return tern.discretize(*moment)["kernel"].codes, (*moment, opt_state)

  alternating = jnp.where(jnp.arange(32).reshape(8, 4) % 2 == 0, 0.1, -0.1)
  starts = jnp.stack([jnp.zeros((8, 4)), jnp.full((8, 4), 0.3), alternating])
  codes, rest = run(starts)
  assert all_finite(rest)
  if method.sparsity is not None:
    assert jnp.sum(codes == 0, (1, 2)).tolist() == [16, 16, 16]


@pytest.mark.sample(2)
@pytest.mark.parametrize(
  ("method", "size", "dtype", "names"),
  [
    (TWN(), 1e38, "float32", "threshold"),
    (TTQ(), 1e38, "float32", "w_n, w_p"),
    (SCA(alpha=0.1), 1e30, "float32", "latents"),
    (SCA(sparsity=0.5, scaled=False), 1e30, "bfloat16", "latents, threshold"),
    (SCA(sparsity=0.5), 65_000, "float16", "a, floor, w_n, w_p"),
    (TGA(), 65_000, "float16", "w_n, w_p"),
    (TGA(sparsity=0.5), 1e30, "float32", "w_n, w_p"),
    (EC2T(), 1e30, "float32", "floor, w_n, w_p"),
    (AbsMean(), 1e38, "bfloat16", "w_n, w_p"),
  ],
  ids=repr,
)
def test_scales_that_overflow_are_refused(method, size, dtype, names):
  w = (size * jnp.sign(helpers.weights((8, 8)))).astype(dtype)
  tree = {"deep": {"kernel": w}, "fine": {"kernel": jnp.ones((2, 2))}}
  says = rf"^deep/kernel: .* makes {names} infinite or NaN: .* up to"
  with pytest.raises(ValueError, match=says):
    ParamTransform(method).init(tree)


def test_forward_mode_of_tga():
  x, w = helpers.weights((5, 4)), helpers.weights((4, 3), seed=1)
  y = 10 * helpers.weights((5, 3), seed=2)
  free = ParamTransform(TGA(clamp=None))
  params, state = free.init({"kernel": w})

  def loss(tern):
    return lambda p: jnp.sum((x @ tern(p, state)["kernel"] - y) ** 2)

  # Forward mode knows no clamp, and reverse mode keeps it.
  clamped = ParamTransform(TGA(clamp=1e-3))
  slope = jax.grad(loss(free))(params)
  assert abs(float(slope.scales["kernel"]["delta"])) > 1e-2
  along = jax.tree.map(jnp.ones_like, params)
  for tern in (free, clamped):
    _, got = jax.jit(lambda p, t=tern: jax.jvp(loss(t), (p,), (along,)))(params)
    want = sum(jnp.sum(g) for g in jax.tree.leaves(slope))
    np.testing.assert_allclose(got, want, rtol=1e-5)
  held = jax.grad(loss(clamped))(params).scales["kernel"]["delta"]
  assert abs(float(held)) == pytest.approx(1e-3)
  # Where the slope is held, it does not change.
  bent = jax.jit(jax.hessian(loss(clamped)))(params)
  assert float(bent.scales["kernel"]["delta"].scales["kernel"]["delta"]) == 0
  bent = jax.jit(jax.hessian(loss(free)))(params)
  assert float(bent.scales["kernel"]["delta"].scales["kernel"]["delta"]) > 0


@pytest.mark.long
def test_a_clamp_in_every_transformation():
  def cubes(x, limit):
    return 5 * jnp.sum(clamp_gradient(x, limit) ** 3)

  x, limit = jnp.array([0.1, 2.0]), jnp.array(1.0)
  want = [0.15, 1.0]
  np.testing.assert_allclose(jax.grad(cubes)(x, limit), want, rtol=1e-6)
  np.testing.assert_allclose(
    jax.grad(jax.checkpoint(cubes))(x, limit), want, rtol=1e-6
  )
  mapped = jax.vmap(jax.grad(cubes))(x[:, None], jnp.array([0.1, 3.0]))
  np.testing.assert_allclose(mapped, [[0.1], [3.0]])
  # Of the clamped slope 15 x^2, that is 30 x below the limit.
  got = jax.jit(jax.hessian(cubes))(x, limit)
  np.testing.assert_allclose(got, [[3.0, 0.0], [0.0, 0.0]], rtol=1e-6)
  got = jax.jacfwd(jax.jacfwd(cubes))(x, limit)
  np.testing.assert_allclose(got, [[3.0, 0.0], [0.0, 60.0]], rtol=1e-6)
  tiled, limits = jnp.tile(x, 8), jnp.ones(16)
  for check in (False, True):
    spread = functools.partial(
      jax.shard_map, mesh=data_mesh(), in_specs=P("data"), out_specs=P("data")
    )(jax.grad(cubes), check_vma=check)
    got = jax.jit(spread)(tiled, limits)
    np.testing.assert_allclose(got, 8 * want, rtol=1e-6)
