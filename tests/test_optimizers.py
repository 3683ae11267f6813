"""Optimizers and schedules of the experiments."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments.common import cli, optimizers

pytestmark = pytest.mark.usefixtures("standard_promotion_throughout")


def test_the_average_of_parameters():
  tx = optimizers.averaged(optax.sgd(1.0), 0.5)
  params = {"w": jnp.array(0.0), "n": jnp.array(2.0)}
  state, w, average = tx.init(params), 0.0, 0.0
  for n in range(6):
    updates, state = tx.update({"w": jnp.array(-1.0), "n": 0.0}, state, params)
    params = optax.apply_updates(params, updates)
    weight = min(0.5, (1 + n) / (10 + n))
    w += 1
    average = weight * average + (1 - weight) * w
    assert float(params["w"]) == w
    assert float(state.average["w"]) == pytest.approx(average, rel=1e-6)
  assert float(state.average["n"]) == 2
  assert int(state.count) == 6


@pytest.mark.parametrize(
  ("schedule", "last", "expected"),
  [
    ("cosine", 0.05, [2, 2 * (0.05 + 0.95 / 2), 0.1]),
    ("cosine", 0.0, [2, 1, 0]),
    ("step", 0.05, [2, 0.2, 0.02]),
    # From 30 on a cosine of 70 steps, which ends at 1e-4 of the start.
    (
      "one_cycle",
      0.05,
      [0.08, 8e-6 + (1 - 4e-6) * (1 + np.cos(np.pi * 20 / 70)), 8e-6],
    ),
  ],
)
def test_schedules_of_a_rate(schedule, last, expected):
  config = dataclasses.replace(cli.Config(), schedule=schedule)
  rate = optimizers.decayed(config, 2.0, 100, last=last)
  found = [float(rate(n)) for n in (0, 50, 100)]
  np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-7)
  later = optimizers.decayed(config, 2.0, 100, first=40, last=last)
  assert float(later(10)) == pytest.approx(expected[1], rel=1e-6)


def test_one_cycle_is_at_its_height_after_three_tenths():
  config = dataclasses.replace(cli.Config(), schedule="one_cycle")
  rate = optimizers.decayed(config, 2.0, 100)
  assert max(range(101), key=lambda n: float(rate(n))) == 30
  assert float(rate(30)) == 2


@pytest.mark.parametrize("name", ["adam", "sgd"])
def test_the_optimizer_of_scales(name):
  config = dataclasses.replace(
    cli.Config(),
    scale_optimizer=name,
    scale_learning_rate=0.5,
    rest_learning_rate=0.25,
    learning_rate=0.125,
  )
  labels = {"w": "latent", "s": "scale", "b": "float"}
  tx = optimizers.of_ternary_net(config, optax.identity(), labels, 10**6, 0)
  params = {k: jnp.array(1.0) for k in labels}
  state = tx.init(params)
  for n in range(2):
    grads = {k: jnp.array(1e-3) for k in labels}
    found, state = tx.update(grads, state, params)
    # Nesterov's momentum: 1 + .9, then 1 + .9 (1 + .9). Adam's steps are 1.
    size = 0.5 * 1e-3 * (1.9, 2.71)[n] if name == "sgd" else 0.5
    expected = {"w": -0.125, "s": -size, "b": -0.25}
    for k, v in expected.items():
      assert float(found[k]) == pytest.approx(v, rel=1e-4)
