"""EC2T's supernet from its experiment's options, on tiny images."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments import cifar10_micronet, cifar100_micronet
from experiments.common import (
  build,
  cli,
  data,
  errors,
  log,
  optimizers,
  places,
)
from experiments.common.data import augment
from experiments.common.runner import checks, rehearsal, stages


@pytest.fixture(autouse=True)
def standard(standard_promotion):
  """The schedules of optax divide an int32 count by a float."""


def test_the_recipe_of_the_float_net():
  config = cifar10_micronet.DEFAULT
  tx = optimizers.of_float_net(config, steps=100)
  params = {"w": jnp.array([2.0, 0.0])}
  state, grads = tx.init(params), {"w": jnp.array([0.3, 0.3])}
  # Weight decay is part of the gradient; Nesterov's first step takes 1.9 of it.
  updates, state = tx.update(grads, state, params)
  expected = -0.1 * 1.9 * (0.3 + 5e-4 * np.array([2.0, 0.0]))
  np.testing.assert_allclose(updates["w"], expected, rtol=1e-6)
  for _ in range(100):
    updates, state = tx.update(grads, state, params)
  np.testing.assert_array_equal(updates["w"], 0)


def test_adam_without_decay_keeps_its_state():
  # Checkpoints of float nets from before there was a choice are still read.
  tx = optimizers.of_float_net(cli.Config(), steps=100)
  params = {"w": jnp.ones(3)}
  structure = jax.tree.structure(tx.init(params))
  assert structure == jax.tree.structure(optax.adam(lambda n: n).init(params))


def test_what_stays_float_has_a_rate_of_its_own():
  params = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}
  for rate, expected in ((None, 0.1), (1e-4, 1e-4)):
    config = dataclasses.replace(
      cifar10_micronet.DEFAULT,
      model="mlp",
      exclude=(),
      rest_learning_rate=rate,
    )
    phase = stages.ternary_phase(config, 35, params, {})
    tx, state = phase.stages[0].tx, phase.state
    grads = jax.tree.map(jnp.ones_like, state.params)
    updates, _ = tx.update(grads, state.opt_state, state.params)
    # Adam's first step is its rate.
    rates = {
      "bias": updates.latent["bias"],
      "kernel": updates.latent["kernel"],
      "centroid": updates.scales["kernel"]["w_p"],
    }
    for name, rate in (
      ("bias", expected),
      ("kernel", 1e-4),
      ("centroid", 1e-5),
    ):
      np.testing.assert_allclose(rates[name], -rate, rtol=1e-3)


def test_what_is_done_to_images():
  images = np.random.default_rng(0).integers(0, 256, (64, 32, 32, 3), np.uint8)
  empty = {"input": images[:0], "label": np.zeros(0, np.int32)}
  mean = np.array([125.3, 123.0, 113.9], np.float32)
  dataset = data.Dataset("", (32, 32, 3), 10, mean, mean, empty, empty, empty)

  def changed(name):
    config = cli.Config(augment=name)
    change = build.augmentation(config, dataset)
    return (
      images if change is None else change(images, np.random.default_rng(1))
    )

  assert changed("none") is images
  cropped = augment.flip_and_crop(images, np.random.default_rng(1))
  np.testing.assert_array_equal(changed("flip_crop"), cropped)
  result = changed("flip_crop_jitter_cutout")
  covered = (result == [125, 123, 114]).all(-1)
  assert covered.sum((1, 2)).min() >= 8 * 8
  assert covered.sum((1, 2)).max() == 16 * 16
  # The rest is jittered: hardly a pixel stays as it was.
  assert (result == cropped)[~covered].mean() < 0.1


def test_old_float_nets_are_still_found():
  config = cli.Config(model="resnet8")
  assert "scaling" not in places.float_record(config)
  supernet = dataclasses.replace(config, model="micronet")
  smaller = dataclasses.replace(supernet, scaling=(1.4, 1.2, 1.0))
  assert places.float_record(smaller)["scaling"] == [1.4, 1.2, 1.0]
  sgd = dataclasses.replace(supernet, float_optimizer="sgd")
  decayed = dataclasses.replace(supernet, float_weight_decay=5e-4)
  nets = (config, supernet, smaller, sgd, decayed)
  assert len({net.float_directory for net in nets}) == len(nets)


def test_a_run_from_before_there_was_an_option_is_the_same(tmp_path):
  config = cli.Config(workdir=str(tmp_path / "run"))
  log.claim(config.directory, places.run_record(config))
  record = places.run_record(config)
  del record["scaling"], record["float_optimizer"]
  (config.directory / "config.json").write_text(json.dumps(record))
  log.claim(config.directory, places.run_record(config))
  assert log.read_config(config.directory) == config
  sgd = dataclasses.replace(config, float_optimizer="sgd")
  with pytest.raises(
    errors.UsageError, match="float_optimizer=adam there, sgd"
  ):
    log.claim(config.directory, places.run_record(sgd))


def test_a_scaling_that_is_none():
  with pytest.raises(errors.UsageError, match="scaling: got d=0"):
    cli.Config(scaling=(0, 1, 1))


def test_the_options_give_the_published_supernet():
  model = build.make_model(cifar10_micronet.DEFAULT, 10)
  image = jnp.zeros((1, 32, 32, 3))
  shapes = jax.eval_shape(
    lambda: model.init(jax.random.key(0), image, train=False)
  )
  sizes = [leaf.size for leaf in jax.tree.leaves(shapes["params"])]
  assert sum(sizes) == 8_044_234
  steps = checks.count_steps(cifar10_micronet.DEFAULT, 45_000)
  assert steps == (200 * 351, 35 * 351)
  plan = cifar10_micronet.DEFAULT.method.plan(steps[1], 9 * 120 * 120)
  ends = [stage.last for stage in plan.stages]
  assert ends == [10 * 351, 20 * 351, 35 * 351]


def test_the_recipe_for_cifar100():
  config = cifar100_micronet.DEFAULT
  assert config.data == "cifar100"
  assert (config.method.gamma, config.method.s) == (0.15, 0.45)
  steps = checks.count_steps(config, 45_000)
  assert steps == (250 * 351, 40 * 351)
  plan = config.method.plan(steps[1], 9 * 120 * 120)
  ends = [stage.last for stage in plan.stages]
  assert ends == [10 * 351, 20 * 351, 40 * 351]
  changed = {"method", "data", "epochs", "float_epochs"}
  old, new = (
    places.run_record(x.DEFAULT) for x in (cifar10_micronet, cifar100_micronet)
  )
  assert {key for key in old if old[key] != new[key]} == changed


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
  return dataclasses.replace(
    cifar10_micronet.DEFAULT,
    data="digits",
    augment="flip_crop",
    scaling=(0.1, 0.5, 1.0),
    batch_size=64,
    parallel="jit",
    data_dir=str(tmp_path_factory.mktemp("tfds")),
  )


def drawn(config, dataset):
  """Variables by NumPy, because Flax's initializers take long to compile."""
  model = build.make_model(config, dataset.num_classes)
  shapes = jax.eval_shape(
    functools.partial(model.init, train=False),
    jax.random.key(0),
    dataset.blank,
  )
  rng = np.random.default_rng(0)
  variables = jax.tree.map(
    lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), shapes
  )
  return variables.pop("params"), variables


@pytest.mark.long
def test_steps_of_a_tiny_supernet_are_timed(tiny):
  lines = [line.split() for line in rehearsal.rehearse(tiny).splitlines()]
  (rate,) = (line[-1] for line in lines if line[:3] == ["steps", "a", "second"])
  assert float(rate.replace(",", "")) > 0


@pytest.mark.long
def test_a_tiny_supernet_is_rehearsed(tiny, monkeypatch):
  # Its step takes long to compile.
  monkeypatch.setattr(build, "initial_variables", drawn)
  monkeypatch.setattr(rehearsal, "_steps_a_second", lambda *_: 1.0)
  config = tiny
  lines = rehearsal.rehearse(config).splitlines()
  rows = [line.split() for line in lines if line.endswith("  ternary")]
  assert {path: int(n.replace(",", "")) for path, *_, n, _ in rows[:-1]} == {
    "stage0/blocks/conv1/kernel": 9 * 8 * 8,
    "stage0/blocks/conv2/kernel": 9 * 8 * 8,
    "stage1/first/conv1/kernel": 9 * 8 * 16,
    "stage1/first/conv2/kernel": 9 * 16 * 16,
    "stage2/first/conv1/kernel": 9 * 16 * 32,
    "stage2/first/conv2/kernel": 9 * 32 * 32,
  }
  epoch = 1257 // 64
  steps = f"{config.float_epochs * epoch:,} + {config.epochs * epoch:,}"
  assert any(line.endswith(steps) for line in lines)
  params, model_state = build.initial_variables(
    config, build.load_dataset(config)
  )
  frozen = repr(
    stages.ternary_phase(config, 35, params, model_state).final.tern
  )
  assert "largest=9216, frozen=True" in frozen
  assert frozen.endswith("stacked=('blocks',))")
