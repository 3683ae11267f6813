"""Runs that differ in their seeds alone, trained as one program.

Each has its own initial weights, order of images and changes of them: those of
a run of its own. What one small net leaves idle of an accelerator is used by
the others.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.common import build, cli, data
from experiments.common.errors import UsageError
from experiments.common.runner import checks
from experiments.common.runner.advance import LONGEST_CALL, make_program
from experiments.common.runner.stages import Phase, Stage, ternary_phase
from experiments.common.runner.step import pure_step
from tern_jax import training


class Trained(NamedTuple):
  """What several seeds came to."""

  stage: Stage
  """The last one: `stage.variables(state)` are what the model is applied to."""
  states: list[training.TrainState]
  """Of each seed."""


def train(
  config: cli.Config,
  dataset: data.Dataset,
  seeds: Sequence[int],
  starts: Sequence[Any] | None = None,
) -> Trained:
  """Trains the ternary nets of several seeds at once, on one device.

  Args:
    config: the options of all; its seed is not used.
    dataset: the data.
    seeds: of the runs.
    starts: variables of the float net that each starts from; None to start at
      random.

  Raises:
    UsageError: the data cannot lie on the device, or the method keeps the best
      state of a stage, which each seed has at another step.
  """
  config = dataclasses.replace(config, parallel="jit", resident="on")
  checks.is_resident(config, dataset)
  configs = [dataclasses.replace(config, seed=seed) for seed in seeds]
  if starts is None:
    variables = [build.initial_variables(c, dataset) for c in configs]
    starts = [{"params": params, **state} for params, state in variables]
  phases = [
    _phase(own, dataset, start)
    for own, start in zip(configs, starts, strict=True)
  ]
  stages = phases[0].stages
  if any(stage.keep_best for stage in stages):
    raise UsageError(
      f"{type(config.method).__name__} keeps the best state of a stage: train"
      " its seeds one by one."
    )
  held = jax.device_put(
    data.resident.hold(dataset.train, dataset.mean, dataset.std)
  )
  plans = [build.training_plans(own, dataset) for own in configs]
  states: Any = jax.tree.map(
    lambda *x: jnp.stack(x), *(phase.state for phase in phases)
  )
  first = 0
  for stage, following in zip(stages, (*stages[1:], None), strict=True):
    step = pure_step(config, stage, dataset.num_classes)
    states = _advance(config, step, states, held, plans, stage.last - first)
    first = stage.last
    if following is not None:
      hand_over = functools.partial(stage.handed_over, following=following)
      states = jax.jit(jax.vmap(hand_over))(states)
  each = [jax.tree.map(lambda x, i=i: x[i], states) for i in range(len(seeds))]
  return Trained(stages[-1], each)


def _phase(config: cli.Config, dataset: data.Dataset, start: Any) -> Phase:
  """Returns the training of one seed, from given variables."""
  _, steps = checks.count_steps(config, len(dataset.train["label"]))
  model_state = {name: x for name, x in start.items() if name != "params"}
  return ternary_phase(config, steps, start["params"], model_state)


def _advance(
  config: cli.Config,
  step: Callable[[Any, Any], Any],
  states: Any,
  held: Any,
  plans: Sequence[data.resident.Plans],
  steps: int,
) -> Any:
  """Takes steps of all seeds; returns their states."""
  looped = checks.loops_well(config)
  length = min(LONGEST_CALL, steps) if looped else 1
  # The number of steps is that of all: a loop for each would mask them.
  program = jax.jit(
    jax.vmap(make_program(config, step, looped), in_axes=(0, None, 0, None)),
    donate_argnums=0,
  )
  for first in range(0, steps, length):
    count = min(length, steps - first)
    stacked = [
      data.resident.stack([next(own) for _ in range(count)], length)
      for own in plans
    ]
    some = jax.tree.map(lambda *x: np.stack(x), *stacked)
    states, _ = program(states, held, some, np.int32(count))
  return states
