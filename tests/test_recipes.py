"""The recipe: the parts that it is made of, and what it makes of a net."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import tern_jax
from tern_jax.recipes import rates
from tests import helpers

PARAMS = {
  "body": {"kernel": jax.random.normal(jax.random.key(0), (30, 20))},
  "head": {"kernel": jax.random.normal(jax.random.key(1), (20, 4)) / 9},
}


@pytest.mark.long
@pytest.mark.sample(2)
@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize(
  ("sparsity", "meant"),
  [
    (0.8, tern_jax.across_layers(0.8, floor=0.75)),
    (tern_jax.across_layers(0.8), tern_jax.across_layers(0.8)),
    (tern_jax.per_layer(0.8), tern_jax.per_layer({"*": 0.8})),
  ],
)
def test_it_is_the_parts_it_names(sparsity, meant, warm):
  where = tern_jax.kernels()
  target = tern_jax.ramp(meant, 20, until=0.25, start=0.4 if warm else 0.0)
  tern, wdr = tern_jax.recipe(sparsity, 20, warm=warm)
  method = tern_jax.SCA(sparsity=target)
  assert tern == tern_jax.ParamTransform(method, where)
  alpha, kappa = tern_jax.at_sparsity(target), tern_jax.late_kappa(20)
  strength = tern_jax.relative(kappa)
  parts = tern_jax.wdr_transform(alpha, strength, where, sharp=True)
  params, _ = helpers.init(tern, PARAMS)
  updates = jax.tree.map(jnp.ones_like, params)
  mine, theirs = wdr.init(params), parts.init(params)
  for step in range(20):
    # Codes change at each step, or WDR would have nothing to do.
    latent = jax.tree.map(lambda x, n=step: jnp.roll(x, n), params.latent)
    moved = dataclasses.replace(params, latent=latent)
    found, mine = jax.jit(wdr.update)(updates, mine, moved)
    expected, theirs = jax.jit(parts.update)(updates, theirs, moved)
    chex.assert_trees_all_equal(found, expected)
    changed = bool(jnp.any(found.latent["body"]["kernel"] != 1))
    assert changed == (step >= 6)


def test_rates_follow_the_number_of_steps():
  for steps, latent, rest in (
    (50, 1e-2, 1e-2),
    (400, 5e-3, 1e-2),
    (10_000, 1e-3, 1e-2),
    (40_000, 5e-4, 5e-3),
  ):
    assert rates(steps) == pytest.approx((latent, rest))
  with pytest.raises(ValueError, match="steps must lie in"):
    rates(0)


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize(
  "given", [{}, {"learning_rate": 0.02}, {"rest_rate": 0.03}]
)
def test_latents_have_one_rate_and_all_else_another(given):
  where = tern_jax.kernels(exclude="head")
  tx = tern_jax.recipe(0.8, 400, where).optimizer(**given)
  latent, rest = given.get("learning_rate", 5e-3), given.get("rest_rate", 1e-2)
  state = tx.init(PARAMS)
  grads = jax.tree.map(jnp.ones_like, PARAMS)
  updates, after = jax.jit(tx.update)(grads, state, PARAMS)
  np.testing.assert_allclose(updates["head"]["kernel"], -rest, rtol=1e-3)
  moved = jax.tree.map(lambda x, y: y - x, state.params, after.params)
  # The first update of Adam is its rate.
  size = jnp.abs(moved.latent["body"]["kernel"])
  np.testing.assert_allclose(size, latent, rtol=1e-2)
  scale = jnp.abs(moved.scales["body/kernel"]["a"])
  np.testing.assert_allclose(scale, rest, rtol=1e-2)


@pytest.mark.long
def test_options_reach_both_parts():
  stack = {"body": {"kernel": jnp.stack(2 * [PARAMS["body"]["kernel"]])}}
  where = tern_jax.kernels(include="body")
  tern, wdr = tern_jax.recipe(
    0.8, 20, where, stacked=("body",), channel_axis=-1
  )
  assert (tern.where, tern.stacked) == (where, ("body",))
  params, _ = tern.init(stack)
  assert params.scales["body/kernel"]["a"].shape == (2, 1, 20)
  thresholds = jax.tree.leaves(wdr.init(params).inner_state.threshold)
  assert [x.shape for x in thresholds] == [(2,)]


@pytest.mark.long
@pytest.mark.usefixtures("standard_promotion")
def test_a_net_learns_at_the_asked_sparsity():
  x = jax.random.normal(jax.random.key(2), (256, 30))
  labels = jnp.argmax(x[:, :4] + x[:, 4:8], -1)
  steps = 200
  tern, wdr = tern_jax.recipe(tern_jax.across_layers(0.9), steps)
  rate = optax.cosine_decay_schedule(1e-2, steps, 0.05)
  tx = optax.chain(wdr, optax.adam(rate))
  params, state = helpers.init(tern, PARAMS)

  def logits(weights):
    hidden = jax.nn.relu(x @ weights["body"]["kernel"])
    return hidden @ weights["head"]["kernel"]

  def loss(params, state):
    found = logits(tern(params, state))
    losses = optax.softmax_cross_entropy_with_integer_labels(found, labels)
    return losses.mean()

  @jax.jit
  def train(params, state):
    def step(carry, _):
      params, state, opt_state = carry
      grads = jax.grad(loss)(params, state)
      updates, opt_state = tx.update(grads, opt_state, params)
      params = optax.apply_updates(params, updates)
      return (*tern.after_step(params, state), opt_state), None

    carry = params, state, tx.init(params)
    return jax.lax.scan(step, carry, None, steps)[0]

  params, state, _ = train(params, state)
  codes = helpers.discretize(tern, *helpers.refresh(tern, params, state))
  assert int(tern_jax.metrics.sparsity(codes) * 680) == 612
  answers = jnp.argmax(logits(tern_jax.unpack(tern_jax.pack(codes))), -1)
  assert float(jnp.mean(answers == labels)) > 0.8


@pytest.mark.long
@pytest.mark.usefixtures("standard_promotion")
def test_latents_of_float64():
  with jax.enable_x64(True):
    weights = {"w": jax.random.normal(jax.random.key(0), (30, 20), jnp.float64)}
    tern, wdr = tern_jax.recipe(0.8, 20)
    tx = optax.chain(wdr, optax.adam(0.01))

    def step(carry, key):
      params, state, opt_state = carry
      noise = jax.random.normal(key, (30, 20), jnp.float64)
      grads = jax.tree.map(lambda x: jnp.full_like(x, noise[0, 0]), params)
      grads = dataclasses.replace(grads, latent={"w": noise})
      updates, opt_state = tx.update(grads, opt_state, params)
      params = optax.apply_updates(params, updates)
      return (*tern.after_step(params, state), opt_state), None

    @jax.jit
    def train(weights):
      params, state = tern.init(weights)
      carry = params, state, tx.init(params)
      keys = jax.random.split(jax.random.key(1), 20)
      params, state, _ = jax.lax.scan(step, carry, keys)[0]
      return params, tern.discretize(params, state)["w"].codes

    params, codes = train(weights)
    assert params.latent["w"].dtype == jnp.float64
    assert int((codes == 0).sum()) == 480
