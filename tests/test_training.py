import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

import tern_jax
from tern_jax import training
from tern_jax.training import TrainState
from tests import helpers


class _Net(nn.Module):
  axis_name: str | None = None

  @nn.compact
  def __call__(self, x, train):
    # Before a norm layer the gradient of a bias is nothing but rounding.
    x = nn.Dense(16, use_bias=False)(x)
    x = nn.BatchNorm(
      use_running_average=not train, momentum=0.8, axis_name=self.axis_name
    )(x)
    return nn.Dense(3)(nn.relu(x))


def loss_fn(model):
  def loss(weights, model_state, batch, key):
    del key
    logits, new = model.apply(
      {"params": weights, **model_state},
      batch["x"],
      train=True,
      mutable=["batch_stats"],
    )
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"])
    accuracy = jnp.mean(jnp.argmax(logits, -1) == batch["y"], dtype=jnp.float32)
    return jnp.mean(losses), (dict(new), {"accuracy": accuracy})

  return loss


def batches(steps, size=32):
  r = np.random.default_rng(0)
  for _ in range(steps):
    y = r.integers(0, 3, size).astype(np.int32)
    x = r.normal(size=(size, 5)).astype(np.float32) + y[:, None]
    yield {"x": x, "y": y}


STEPS = 30
TARGET = tern_jax.ramp(0.5, STEPS)
# SGD, to compare states to rounding, is not for the gain that suits Adam.
TERN = tern_jax.ParamTransform(tern_jax.SCA(sparsity=TARGET, every=4, gain=1.0))
TX = optax.chain(
  tern_jax.wdr_transform(
    tern_jax.at_sparsity(TARGET, every=4, gain=1.0),
    tern_jax.relative(tern_jax.late_kappa(STEPS)),
    mask=tern_jax.kernels(),
  ),
  optax.sgd(0.3, momentum=0.9),
)


def start(tern=TERN, tx=TX):
  @jax.jit
  def made():
    variables = _Net().init(jax.random.key(0), jnp.ones((2, 5)), train=False)
    stats = {"batch_stats": variables["batch_stats"]}
    return training.init_state(variables["params"], tx, tern, stats, seed=3)

  return made()


def run(step, state, split=lambda b: b, steps=STEPS):
  losses = []
  for batch in batches(steps):
    state, metrics = step(state, split(batch))
    losses.append(float(metrics["loss"]))
  return state, np.array(losses)


@pytest.fixture(scope="module")
def one_device():
  step = jax.jit(training.make_step(loss_fn(_Net()), TX, TERN))
  return run(step, start())


def close(a, b, rtol=2e-5, atol=2e-6):
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=atol), a, b
  )


def test_one_device_learns_at_the_asked_sparsity(one_device):
  state, losses = one_device
  assert losses[-1] < 0.6 * losses[0]
  assert int(state.step) == STEPS
  fresh = helpers.refresh(TERN, state.params, state.tern_state)
  ternary = helpers.discretize(TERN, *fresh)
  assert float(jnp.mean(ternary["Dense_0"]["kernel"].codes == 0)) == 0.5


@pytest.mark.sample(2)
@pytest.mark.parametrize(
  ("wrapper", "devices"),
  [
    ("pmap", 8),
    ("shard_map", 8),
    ("vmap", 4),
    helpers.long("pmap", 1),
    helpers.long("shard_map", 1),
  ],
)
def test_the_same_numbers_on_any_number_of_devices(
  one_device, wrapper, devices
):
  step = training.make_step(loss_fn(_Net("data")), TX, TERN, "data")

  def split(batch):
    return training.split_batch(batch, devices)

  if wrapper == "pmap":
    parallel = training.pmap_step(step, devices=jax.devices()[:devices])
  elif wrapper == "vmap":
    parallel = jax.jit(
      jax.vmap(step, axis_name="data", in_axes=(None, 0), out_axes=None)
    )
  else:
    mesh = training.data_mesh(devices=jax.devices()[:devices])
    parallel = training.shard_map_step(step, mesh)

    def split(batch):
      return jax.device_put(batch, jax.NamedSharding(mesh, P("data")))

  state, losses = run(parallel, start(), split)
  expected_state, expected_losses = one_device
  np.testing.assert_allclose(losses, expected_losses, rtol=2e-5)
  close(state.params, expected_state.params)
  close(state.model_state, expected_state.model_state)
  # The state carries no device axis.
  assert jax.tree.map(jnp.shape, state) == jax.tree.map(jnp.shape, start())


@pytest.mark.long
@pytest.mark.sample(2)
@pytest.mark.parametrize(
  ("wrapper", "devices"),
  [
    ("pmap", 1),
    ("shard_map", 2),
    helpers.long("pmap", 2),
    helpers.long("shard_map", 1),
  ],
)
def test_one_program_serves_all_steps(caplog, wrapper, devices):
  step = training.make_step(loss_fn(_Net("data")), TX, TERN, "data")
  these = jax.devices()[:devices]
  if wrapper == "pmap":
    parallel = training.pmap_step(step, devices=these)
  else:
    parallel = training.shard_map_step(step, training.data_mesh(devices=these))
  state = jax.device_get(start())  # as after a restore
  for n, batch in enumerate(batches(3)):
    if wrapper == "pmap":
      batch = training.split_batch(batch, devices)
    caplog.clear()
    with jax.log_compiles():
      state, _ = parallel(state, batch)
    compiled = [r for r in caplog.messages if r.startswith("Compiling")]
    assert bool(compiled) == (n == 0)


def test_float_run_equals_a_plain_loop():
  tx = optax.sgd(0.1)
  state = start(None, tx)
  step = jax.jit(training.make_step(loss_fn(_Net()), tx))
  got, _ = run(step, state, steps=3)
  params, stats = state.params, state.model_state
  slope = jax.jit(jax.grad(loss_fn(_Net()), has_aux=True))
  for batch in batches(3):
    grads, (stats, _) = slope(params, stats, batch, None)
    params = jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)
  close(got.params, params)
  close(got.model_state, stats)


def test_scales_first_equals_two_optimizers():
  r = np.random.default_rng(0)
  x, y, w = (
    jnp.asarray(r.normal(size=shape), jnp.float32)
    for shape in ((64, 8), (64, 4), (8, 4))
  )
  tern = tern_jax.ParamTransform(tern_jax.TGA(clamp=None))
  latent_tx = optax.sgd(0.1, momentum=0.9)
  scale_tx = optax.sgd(0.01, momentum=0.9, nesterov=True)
  tx = optax.partition(
    {"latent": latent_tx, "scales": scale_tx}, tern_jax.LABELS
  )

  def loss(weights, model_state, batch, key):
    del key
    error = jnp.mean((batch[0] @ weights["w"] - batch[1]) ** 2)
    return error, (model_state, {})

  state = training.init_state({"w": w}, tx, tern)
  params, tern_state = state.params, state.tern_state
  step = jax.jit(training.make_step(loss, tx, tern, scales_first=True))
  grad = jax.jit(
    jax.grad(lambda p: loss(tern(p, tern_state), {}, (x, y), None)[0])
  )
  of_latent, of_scales = (
    latent_tx.init(params.latent),
    scale_tx.init(params.scales),
  )
  for _ in range(5):
    state, _ = step(state, (x, y))
    updates, of_scales = scale_tx.update(grad(params).scales, of_scales)
    scales = optax.apply_updates(params.scales, updates)
    params = params.replace(scales=scales)
    updates, of_latent = latent_tx.update(grad(params).latent, of_latent)
    latent = optax.apply_updates(params.latent, updates)
    params, _ = tern.after_step(params.replace(latent=latent), tern_state)
  close(state.params, params)
  with pytest.raises(ValueError, match="scales_first=True needs tern"):
    training.make_step(loss, tx, scales_first=True)


def test_each_step_has_its_own_key():
  seen = []

  def loss(weights, model_state, batch, key):
    return jnp.sum(weights["w"] * batch), (
      model_state,
      {"noise": jax.random.normal(key)},
    )

  tx = optax.sgd(0.0)
  step = jax.jit(training.make_step(loss, tx))
  state = training.init_state({"w": jnp.ones(())}, tx, seed=1)
  for _ in range(2):
    state, metrics = step(state, jnp.ones(()))
    seen.append(float(metrics["noise"]))
  key = jax.random.key(1)
  expected = [jax.random.normal(jax.random.fold_in(key, i)) for i in range(2)]
  np.testing.assert_allclose(seen, expected, rtol=1e-6)


def test_micro_batches_are_one_batch_in_parts():
  def loss(weights, model_state, batch, key):
    seen = {"count": model_state["count"] + 1, "last": batch[-1, 0]}
    noise = jax.random.uniform(key)
    return jnp.mean((batch @ weights["w"] - 1) ** 2), (seen, {"noise": noise})

  tx = optax.sgd(0.1)
  model_state = {"count": jnp.zeros((), jnp.int32), "last": jnp.zeros(())}
  state = training.init_state({"w": jnp.ones(3)}, tx, model_state=model_state)
  batch = jax.random.normal(jax.random.key(0), (12, 3))
  whole, expected = training.make_step(loss, tx)(state, batch)
  step = jax.jit(training.make_step(loss, tx, micro_batches=4))
  parts, metrics = step(state, batch)
  close(parts.params, whole.params)
  assert float(metrics["loss"]) == pytest.approx(float(expected["loss"]))
  # The mean of four draws, each with a key of its own.
  key = jax.random.fold_in(jax.random.wrap_key_data(state.key), 0)
  draws = [jax.random.uniform(k) for k in jax.random.split(key, 4)]
  assert float(metrics["noise"]) == pytest.approx(np.mean(draws), rel=1e-6)
  assert int(parts.model_state["count"]) == 4
  assert float(parts.model_state["last"]) == float(batch[-1, 0])
  with pytest.raises(ValueError, match="shared evenly by 4 micro-batches"):
    step(state, batch[:10])


def test_batch_statistics_are_reestimated_for_the_rounded_weights(one_device):
  state, _ = one_device
  model = _Net()
  ternary = TERN.discretize(state.params, state.tern_state)
  rounded = jax.tree.map(
    lambda leaf: (
      3 * leaf.dequantize() if isinstance(leaf, tern_jax.Ternary) else leaf
    ),
    ternary,
    is_leaf=lambda leaf: isinstance(leaf, tern_jax.Ternary),
  )

  def update(weights, model_state, batch):
    _, new = model.apply(
      {"params": weights, **model_state},
      batch["x"],
      train=True,
      mutable=["batch_stats"],
    )
    return dict(new)

  data = list(batches(40, size=512))
  new = training.reestimate_model_state(
    update, rounded, state.model_state, data
  )
  x = np.concatenate([b["x"] for b in data])
  hidden = x @ np.asarray(rounded["Dense_0"]["kernel"])
  got = new["batch_stats"]["BatchNorm_0"]
  np.testing.assert_allclose(got["mean"], hidden.mean(0), rtol=0.1, atol=0.1)
  old = state.model_state["batch_stats"]["BatchNorm_0"]
  assert float(jnp.abs(got["mean"] - old["mean"]).max()) > 0.5


def test_split_batch_says_what_does_not_fit():
  with pytest.raises(
    ValueError, match="batch of 30 cannot be shared evenly by 8"
  ):
    training.split_batch(np.zeros((30, 2)), 8)


def test_state_is_a_plain_tree():
  state = start()
  leaves, structure = jax.tree.flatten(state)
  again = jax.tree.unflatten(structure, leaves)
  assert isinstance(again, TrainState)
  assert all(isinstance(leaf, jax.Array) for leaf in leaves)
  assert dataclasses.replace(state, step=state.step + 1).step == 1
