"""Training on data that lie on the device: the same numbers as streamed."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments.common import build, cli, data, errors, log, methods
from experiments.common.data import augment, resident
from experiments.common.runner import (
  advance,
  checks,
  loop,
  run,
  seeds,
  stages,
)
from tests.helpers import assert_same, long

pytestmark = pytest.mark.usefixtures("standard_promotion_throughout")

MEAN, STD = np.float32([100, 90, 80]), np.float32([7, 50, 60])
CHANGES = {
  None: resident.UNCHANGED,
  augment.flip_and_crop: resident.FLIP_AND_CROP,
}


def colors(count=50):
  rng = np.random.default_rng(0)
  return {
    "input": rng.integers(0, 256, (count, 6, 5, 3)).astype(np.uint8),
    "label": np.arange(count, dtype=np.int32),
  }


class TestBatches:
  """What the device makes of a plan is what the host makes."""

  @pytest.mark.parametrize("change", CHANGES)
  def test_batches_are_those_of_the_host(self, change):
    split, one = colors(), np.ones(3, np.float32)
    # Without a division pixels are compared bit for bit.
    hosts = data.batches(split, 8, seed=3, mean=MEAN, std=one, augment=change)
    draw, apply = CHANGES[change]
    plans = resident.Plans(50, 8, seed=3, draw=draw)
    held = jax.device_put(resident.hold(split, MEAN, one))
    make = jax.jit(functools.partial(resident.make_batch, apply=apply))
    for n in range(14):  # Over the ends of epochs of 6 steps.
      plans.prepare(n % 4)
      assert_same(make(held, next(plans)), next(hosts))
      assert plans.get_state() == hosts.get_state()
    hosts.set_state({"next_index": 4})
    plans.set_state(hosts.get_state())
    assert_same(make(held, next(plans)), next(hosts))

  def test_standardized_pixels_may_differ_in_the_last_bit(self):
    images = colors()["input"]
    found = jax.jit(resident.standardize)(images, MEAN, STD)
    expected = data.standardize(images, MEAN, STD)
    np.testing.assert_array_max_ulp(np.asarray(found), expected, 1)

  def test_text_is_taken_as_it_is(self):
    tokens = np.arange(60, dtype=np.int32).reshape(20, 3)
    split, none = {"input": tokens, "label": tokens + 1}, np.zeros(0, "f4")
    hosts = data.batches(split, 4, seed=0, mean=none, std=none)
    plan = next(resident.Plans(20, 4, seed=0))
    held = resident.hold(split, none, none)
    assert_same(resident.make_batch(held, plan), next(hosts))

  def test_plans_as_arrays(self):
    plans = [{"rows": np.array([n, n + 1])} for n in range(2)]
    found = resident.stack(plans, 4)["rows"]
    np.testing.assert_array_equal(found, [[0, 1], [1, 2], [1, 2], [1, 2]])

  def test_a_batch_larger_than_the_split(self):
    with pytest.raises(ValueError, match="batch_size is 9, but the split"):
      resident.Plans(8, 9, seed=0)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
  directory = tmp_path_factory.mktemp("resident")
  return cli.Config(
    # A soft forward: rounding can move no weight over a threshold.
    method=methods.Sca(alpha=0.1),
    epochs=1,
    batch_size=64,
    hidden=(8,),
    norm=False,
    parallel="jit",
    log_every=5,
    checkpoint_every=7,
    resident="on",
    data_dir=str(directory / "tfds"),
    workdir=str(directory / "whole"),
  )


@pytest.fixture(scope="module")
def dataset(config):
  return build.load_dataset(config)


def sgd_stage(config, dataset, seed=0):
  """A stage by SGD, because Adam divides rounding by itself; and its state."""
  config = dataclasses.replace(config, seed=seed)
  params, model_state = build.initial_variables(config, dataset)
  phase = stages.ternary_phase(config, 19, params, model_state)
  stage = dataclasses.replace(phase.final, tx=optax.sgd(0.05))
  opt_state = stage.tx.init(phase.state.params)
  return stage, dataclasses.replace(phase.state, opt_state=opt_state)


def trained(config, dataset, cuts, stage=None):
  """Trains in calls of at most so many steps; returns losses and state."""
  own, state = sgd_stage(config, dataset)
  feed = advance.Feed(config, dataset)
  go, losses = feed.make_advance(stage or own), []
  for most in cuts:
    done = 0
    while done < most:
      state, measured = go(state, most - done)
      done += len(measured)
      losses += [float(found["loss"]) for found in measured]
  return losses, jax.device_get(state), feed


class TestSteps:
  """Steps in one program are those on streamed batches."""

  @pytest.mark.parametrize(
    ("parallel", "devices"),
    [
      ("jit", None),
      long("pmap", 1),
      ("pmap", 2),
      long("shard_map", 4),
    ],
  )
  def test_losses_are_those_of_streamed_batches(
    self, config, dataset, parallel, devices
  ):
    own = dataclasses.replace(config, parallel=parallel, devices=devices)
    streamed = dataclasses.replace(own, resident="off")
    losses, state, feed = trained(own, dataset, [5, 7])
    expected, after, other = trained(streamed, dataset, [12])
    np.testing.assert_allclose(losses, expected, rtol=2e-6)
    assert int(state.step) == 12
    close = functools.partial(np.testing.assert_allclose, atol=2e-6)
    jax.tree.map(close, state.params, after.params)
    # So a run may go on either way.
    assert feed.batches.get_state() == other.batches.get_state()

  def test_cuts_change_no_bit(self, config, dataset):
    whole = trained(config, dataset, [5, 5, 5])
    cut = trained(config, dataset, [1, 2, 1, 5, 3, 3])
    assert whole[0] == cut[0]
    assert_same(whole[1], cut[1])

  def test_calls_get_longer_where_steps_are_fast(
    self, config, dataset, monkeypatch
  ):
    monkeypatch.setattr(advance, "CALL_SECONDS", 1e9)
    own = dataclasses.replace(config, log_every=9, checkpoint_every=9)
    stage, state = sgd_stage(own, dataset)
    go = advance.Feed(own, dataset).make_advance(stage)
    counts = []
    for _ in range(5):
      state, measured = go(state, 9)
      counts.append(len(measured))
    assert counts == [1, 2, 4, 8, 9]
    monkeypatch.setattr(advance, "CALL_SECONDS", 0)
    state, measured = go(state, 9)
    assert len(go(state, 9)[1]) == 4

  def test_convolutions_stay_out_of_loops_on_a_cpu(self, config):
    own = dataclasses.replace(config, model="convnet")
    assert checks.loops_well(config)
    assert not checks.loops_well(own)

  @pytest.mark.long
  @pytest.mark.parametrize("looped", [False, True])
  def test_convolutions_of_flipped_images(
    self, config, dataset, monkeypatch, looped
  ):
    monkeypatch.setattr(checks, "loops_well", lambda _: looped)
    own = dataclasses.replace(
      config, model="convnet", hidden=(2,), augment="flip_crop"
    )
    streamed = dataclasses.replace(own, resident="off")
    losses, _, _ = trained(own, dataset, [4])
    expected, _, _ = trained(streamed, dataset, [4])
    np.testing.assert_allclose(losses, expected, rtol=1e-5)


class TestSeeds:
  """Several seeds as one program."""

  def test_each_seed_is_a_run_of_its_own(self, config, dataset):
    together = seeds.train(config, dataset, (3, 5))
    for seed, state in zip((3, 5), together.states, strict=True):
      own = dataclasses.replace(config, seed=seed)
      params, model_state = build.initial_variables(own, dataset)
      phase = stages.ternary_phase(own, 19, params, model_state)
      go, alone = advance.Feed(own, dataset).make_advance(phase.final), 0
      after = phase.state
      while alone < 19:
        after, measured = go(after, 19 - alone)
        alone += len(measured)
      close = functools.partial(np.testing.assert_allclose, atol=1e-4)
      jax.tree.map(close, state.params, after.params)
      assert int(state.step) == 19

  def test_they_start_where_they_are_told(self, config, dataset):
    params, _ = build.initial_variables(config, dataset)
    zeros = jax.tree.map(jnp.zeros_like, params)
    frozen = dataclasses.replace(
      config, learning_rate=0.0, float_learning_rate=0.0
    )
    starts = [{"params": params}, {"params": zeros}]
    first, second = seeds.train(frozen, dataset, (0, 1), starts).states
    bias = first.params.latent["Dense_0"]["bias"]
    np.testing.assert_array_equal(bias, params["Dense_0"]["bias"])
    assert not np.any(second.params.latent["Dense_0"]["kernel"])

  def test_a_method_that_keeps_its_best_state(self, config, dataset):
    own = dataclasses.replace(config, method=methods.Ec2t())
    with pytest.raises(errors.UsageError, match="keeps the best state of"):
      seeds.train(own, dataset, (0, 1))


class TestWhere:
  """Where training data lie."""

  def test_auto_is_for_what_is_small(self, config, dataset, monkeypatch):
    auto = dataclasses.replace(config, resident="auto")
    size = sum(x.nbytes for x in dataset.train.values())
    for memory, small, fits in (
      (10 * size, True, True),
      (10 * size - 1, False, True),
      (size - 1, False, False),
    ):
      monkeypatch.setattr(checks, "_device_memory", lambda m=memory: m)
      assert checks.is_resident(auto, dataset) == small
      if fits:
        assert checks.is_resident(config, dataset)
      else:
        with pytest.raises(errors.UsageError, match=r"training data of 0 MiB"):
          checks.is_resident(config, dataset)
    off = dataclasses.replace(config, resident="off")
    assert not checks.is_resident(off, dataset)

  def test_auto_is_for_what_is_faster(self, config, dataset, monkeypatch):
    own = dataclasses.replace(config, model="convnet")
    auto = dataclasses.replace(own, resident="auto")
    assert checks.is_resident(own, dataset)
    assert not checks.is_resident(auto, dataset)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert checks.is_resident(auto, dataset)

  def test_what_the_host_alone_can_do(self, config, dataset, monkeypatch):
    jitter = dataclasses.replace(config, augment="flip_crop_jitter_cutout")
    with pytest.raises(errors.UsageError, match="augment=flip_crop_jitter"):
      checks.is_resident(jitter, dataset)
    auto = dataclasses.replace(jitter, resident="auto")
    assert not checks.is_resident(auto, dataset)
    images: dict = {"input": data.Images(None, 8), "label": np.zeros(4)}
    large = dataclasses.replace(dataset, train=images)
    with pytest.raises(errors.UsageError, match="digits differ in size"):
      checks.is_resident(config, large)
    monkeypatch.setattr(checks.processes, "count", lambda: 2)
    with pytest.raises(errors.UsageError, match="2 processes share each"):
      checks.is_resident(config, dataset)

  def test_the_memory_of_a_cpu_is_that_of_the_machine(self):
    assert checks._device_memory() > 2**28


class TestRuns:
  """Runs from their options to their end."""

  @pytest.fixture(autouse=True)
  def bare(self, monkeypatch):
    monkeypatch.setattr(run.pictures, "draw", lambda *_: None)

  def phase(self, config, dataset, place):
    params, model_state = build.initial_variables(config, dataset)
    own = dataclasses.replace(config, workdir=str(place))
    log.claim(own.directory, {})
    return own, stages.ternary_phase(own, 19, params, model_state)

  @pytest.mark.long
  def test_a_run_that_was_stopped_resumes_bit_for_bit(
    self, config, dataset, tmp_path, monkeypatch
  ):
    own, phase = self.phase(config, dataset, tmp_path / "whole")
    whole = jax.device_get(loop.train(own, dataset, phase))
    lines = log.read_metrics(own.directory)
    assert [line["step"] for line in lines] == [5, 10, 15, 19]

    own, phase = self.phase(config, dataset, tmp_path / "stopped")
    stops = [3, 12]

    class Asked:
      def __enter__(self):
        return lambda step: 15 if stops and step >= stops[0] else 0

      def __exit__(self, *_):
        pass

    monkeypatch.setattr(loop.guard, "termination", Asked)
    while stops:
      with pytest.raises(errors.InterruptedRunError, match="after step"):
        loop.train(own, dataset, phase)
      stops.pop(0)
      own, phase = self.phase(config, dataset, tmp_path / "stopped")
    resumed = jax.device_get(loop.train(own, dataset, phase))
    assert_same(resumed, whole)
    assert log.read_metrics(own.directory) == lines

  def test_the_first_step_that_is_not_finite_is_told(
    self, config, dataset, tmp_path
  ):
    own, phase = self.phase(config, dataset, tmp_path / "wild")

    def blow_up(updates, state, params=None):
      del params
      bad = jnp.where(state == 7, jnp.nan, 0.0)
      return jax.tree.map(lambda x: x * 0 + bad, updates), state + 1

    tx = optax.GradientTransformation(lambda _: jnp.int32(0), blow_up)
    stage = dataclasses.replace(phase.final, tx=tx)
    state = dataclasses.replace(phase.state, opt_state=jnp.int32(0))
    wild = dataclasses.replace(phase, stages=(stage,), state=state)
    told = r"Step 8 is the first that is not finite: its loss is \d"
    with pytest.raises(errors.DivergedError, match=told):
      loop.train(own, dataset, wild)
