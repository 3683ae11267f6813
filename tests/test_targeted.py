"""Targets of methods that the package does not know, and one fact kept once."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import tern_jax
from tern_jax import (
  SCA,
  ParamTransform,
  Targeted,
  Ternarizer,
  Ternary,
  across_layers,
  ramp,
  straight_through,
)
from tern_jax.targets.quantile import magnitude_threshold
from tern_jax.targets.schedules import at


@dataclasses.dataclass(frozen=True, repr=False)
class Thin(Targeted):
  """Codes beyond a quantile, of magnitude 1: a target and nothing else."""

  sparsity: tern_jax.targets.schedules.Target

  def init(self, w):
    return {}, self.state_at(w, {})

  def __call__(self, w, scales, state):
    return straight_through(w, self.discretize(w, scales, state).dequantize())

  def discretize(self, w, scales, state):
    codes = jnp.sign(w) * (jnp.abs(w) > state["threshold"]).astype(w.dtype)
    one = jnp.ones((), w.dtype)
    return Ternary(codes.astype(jnp.int8), one, one)

  def measure(self, w, scales, look, held=None):
    return {"threshold": self.quantile(w, look, held)}


@dataclasses.dataclass(frozen=True, repr=False)
class Alone(Ternarizer):
  """The same on the bare contract, with a target but no choice of `every`."""

  sparsity: float = 0.5

  def init(self, w):
    return {}, {"threshold": self._threshold(w)}

  __call__ = Thin.__call__
  discretize = Thin.discretize

  def after_step(self, w, scales, state):
    return scales, {"threshold": self._threshold(w)}

  def refresh(self, w, scales, state):
    return self.after_step(w, scales, state)

  def _threshold(self, w):
    return magnitude_threshold(w, at(self.sparsity, 0))


def tree():
  rng = np.random.default_rng(0)

  def normal(*shape):
    return jnp.asarray(rng.normal(size=shape), jnp.float32)

  return {
    "small": {"kernel": 0.1 * normal(10, 10)},
    "stack": {"kernel": normal(3, 10, 10)},
  }


def zeros(ternary):
  return {
    name: int(jnp.sum(layer["kernel"].codes == 0))
    for name, layer in ternary.items()
  }


@pytest.mark.sample(2)
@pytest.mark.parametrize("method_class", [Thin, Alone])
def test_a_stranger_s_target(method_class):
  def trained(sparsity):
    tern = ParamTransform(method_class(sparsity=sparsity), stacked=("stack",))

    @jax.jit
    def run(user):
      params, state = tern.init(user)
      params = params.replace(latent=jax.tree.map(lambda x: -x, params.latent))
      params, state = tern.after_step(params, state)
      return tern.discretize(*tern.refresh(params, state))

    return run(tree())

  assert zeros(trained(0.6)) == {"small": 60, "stack": 180}
  per_layer = tern_jax.per_layer({"small": 0.2, "*": 0.9})
  assert zeros(trained(per_layer)) == {"small": 20, "stack": 270}
  across = zeros(trained(across_layers(0.5)))
  assert sum(across.values()) == 200
  assert across["small"] > 90
  layers = jnp.sum(trained(0.6)["stack"]["kernel"].codes == 0, (1, 2))
  assert layers.tolist() == [60, 60, 60]


@pytest.mark.long
def test_a_stranger_s_ramp_is_met_at_each_of_its_last_steps():
  tern = ParamTransform(Thin(sparsity=across_layers(ramp(0.5, 40, 0.5))))
  params, state = tern.init(tree())
  step = jax.jit(tern.after_step)
  for count in range(1, 41):
    moved = jax.tree.map(lambda x: x + 0.01, params.latent)
    params, state = step(params.replace(latent=moved), state)
    total = sum(zeros(tern.discretize(params, state)).values())
    # One whole look in ten; from 38 on, 95 % of the run, each step looks.
    if count >= 38:
      assert total == 200
  assert int(state["small/kernel"]["count"]) == 40


def test_a_method_without_a_target_in_groups_and_stacks():
  tern = ParamTransform(
    tern_jax.AbsMean(channel_axis=-1), stacked=("stack",), group_size=5
  )
  params, state = tern.init(tree())
  params, state = tern.after_step(params, state)
  ternary = tern.discretize(*tern.refresh(params, state))
  assert ternary["stack"]["kernel"].w_p.shape == (3, 2, 10)
  assert ternary["small"]["kernel"].w_p.shape == (2, 10)


@pytest.mark.long
@pytest.mark.sample(3)
@pytest.mark.parametrize(
  "target",
  [
    ramp(0.7, 40, 0.25),
    ramp(tern_jax.per_layer({"small": 0.5, "*": 0.8}), 40, 0.25),
    ramp(across_layers(0.7), 40, 0.25),
  ],
  ids=repr,
)
def test_wdr_and_sca_have_one_barrier_to_the_end_of_a_run(target):
  tern = ParamTransform(SCA(sparsity=target), stacked=("stack",))
  wdr = tern_jax.wdr_transform(
    tern_jax.at_sparsity(target),
    tern_jax.relative(tern_jax.late_kappa(40)),
    tern.where,
    stacked=("stack",),
    sharp=True,
  )
  params, state = tern.init(tree())
  tx = optax.chain(wdr, optax.sgd(1e-3))
  opt_state = tx.init(params)

  @jax.jit
  def step(params, state, opt_state, key):
    noise = jax.tree.map(
      lambda x: jax.random.normal(key, x.shape), params.latent
    )
    grads = params.replace(
      latent=noise, scales=jax.tree.map(jnp.zeros_like, params.scales)
    )
    updates, opt_state = tx.update(grads, opt_state, params)
    # WDR saw these latents, and this is the state that SCA has for them.
    seen = params.latent, state, opt_state[0].inner_state.threshold.latent
    params = optax.apply_updates(params, updates)
    return *tern.after_step(params, state), opt_state, seen

  for i in range(40):
    key = jax.random.key(i)
    params, state, opt_state, seen = step(params, state, opt_state, key)
    if i < 38:
      continue
    latents, at_sca, at_wdr = seen
    for name in ("small", "stack"):
      w = jnp.abs(latents[name]["kernel"])
      mine, other = (
        t.reshape(t.shape + (1,) * (w.ndim - t.ndim))
        for t in (at_sca[f"{name}/kernel"]["threshold"], at_wdr[name]["kernel"])
      )
      np.testing.assert_array_equal(w > mine, w > other)


def test_the_state_of_wdr_is_compiled_once_for_leaves_of_a_shape(caplog):
  alpha = tern_jax.at_sparsity(ramp(0.8, 100))
  wdr = tern_jax.wdr_transform(alpha, strength=1e-3)
  wdr.init({"a": jnp.ones((16, 8))})
  with jax.log_compiles(), caplog.at_level("WARNING"):
    wdr.init({name: jnp.ones((16, 8)) for name in "abc"})
  assert "Compiling" not in caplog.text


@dataclasses.dataclass(frozen=True, repr=False)
class Exact(Thin):
  """The same to the weight: ties are split."""

  def discretize(self, w, scales, state):
    one = jnp.ones((), w.dtype)
    return Ternary(self.codes(w, state).astype(jnp.int8), one, one)

  def measure(self, w, scales, look, held=None):
    return self.split(w, look, held)


@pytest.mark.long
def test_a_stranger_s_target_whatever_ties():
  equal = jax.tree.map(jnp.ones_like, tree())
  for target, wanted in ((0.6, (60, 180)), (across_layers(0.5), (100, 100))):
    tern = ParamTransform(Exact(sparsity=target), stacked=("stack",))
    params, state = tern.init(equal)
    moment = tern.refresh(*tern.after_step(params, state))
    got = zeros(tern.discretize(*moment))
    assert (got["small"], got["stack"]) == wanted
    used = tern.method.replace(sparsity=0.5).beyond(
      params.latent["small"]["kernel"], moment[1]["small/kernel"]
    )
    assert int(jnp.sum(~used)) == wanted[0]
