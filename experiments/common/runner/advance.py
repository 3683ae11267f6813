"""How a training takes its steps: one by one, or many in one program.

Data that lie on the devices need no host between two steps. The program is then
a loop over plans of batches (`data.resident`), and its number of turns is an
argument: however a training is cut into calls, where it is logged, stopped and
resumed, each step is the same code, and its numbers are the same bits.
"""

import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from experiments.common import build, cli, data
from experiments.common.runner import checks
from experiments.common.runner.stages import Stage
from experiments.common.runner.step import data_mesh, make_step, pure_step

#: Seconds of a call at most, roughly: signals are looked at between two.
CALL_SECONDS = 1.0
#: Steps of a call at most.
LONGEST_CALL = 1000


#: program(state, held, plans, count) -> (state, {name: [length]}).
Program = Callable[[Any, Any, Any, Any], tuple[Any, dict[str, Array]]]


class Feed:
  """The training data of a run, where they lie.

  Args:
    config: the options, which say where.
    dataset: the data.

  Attributes:
    batches: iterator over batches, or over plans of them, with `get_state` and
      `set_state`.

  Raises:
    UsageError: see `checks.is_resident`.
  """

  batches: Any

  def __init__(self, config: cli.Config, dataset: data.Dataset):
    self._config, self._dataset = config, dataset
    self._held: Any = None
    if not checks.is_resident(config, dataset):
      self.batches = build.training_batches(config, dataset)
      return
    held = data.resident.hold(dataset.train, dataset.mean, dataset.std)
    # Whole on each device.
    self._held = jax.device_put(held, _place(config))
    self.batches = build.training_plans(config, dataset)

  def make_advance(self, stage: Stage) -> "Streamed | Resident":
    """Returns what takes the steps of a stage."""
    config, classes = self._config, self._dataset.num_classes
    if self._held is None:
      return Streamed(make_step(config, stage, classes), self.batches)
    return Resident(config, stage, classes, self._held, self.batches)


class Streamed:
  """Takes steps one by one, on batches that the host makes.

  Args:
    step: of a stage.
    batches: to train on.
  """

  def __init__(
    self, step: Callable[[Any, Any], Any], batches: Iterator[data.Arrays]
  ):
    self.step, self._batches = step, batches

  def __call__(self, state: Any, most: int) -> tuple[Any, list[dict[str, Any]]]:
    """Takes a step; returns the state, and what each step measured."""
    del most
    state, measured = self.step(state, next(self._batches))
    return state, [measured]


class Resident:
  """Takes steps on data that lie on the devices, many in one call.

  Args:
    config: the options.
    stage: whose steps they are.
    classes: outputs of the network.
    held: what `data.resident.hold` returns, on the devices.
    plans: of the batches.
  """

  def __init__(
    self,
    config: cli.Config,
    stage: Stage,
    classes: int,
    held: Any,
    plans: data.resident.Plans,
  ):
    self._held, self._plans, self._place = held, plans, _place(config)
    self._looped = checks.loops_well(config)
    due = min(config.log_every, config.checkpoint_every, stage.last)
    self._length = min(due, LONGEST_CALL) if self._looped else 1
    step = pure_step(config, stage, classes)
    self._program = _compiled(config, make_program(config, step, self._looped))
    # The first call compiles, and how fast steps are is not known.
    self._pace = 1

  def __call__(self, state: Any, most: int) -> tuple[Any, list[dict[str, Any]]]:
    """Takes up to `most` steps; returns the state, and what each measured."""
    count, began = min(most, self._pace), time.perf_counter()
    plans = [next(self._plans) for _ in range(count)]
    state, measured = self._run(state, plans)
    if not self._looped:
      return state, [measured]
    self._plans.prepare(self._length)
    measured = jax.device_get(measured)
    seconds = time.perf_counter() - began
    if seconds > CALL_SECONDS:
      self._pace = max(1, count // 2)
    elif count == self._pace and seconds < CALL_SECONDS / 2:
      self._pace = min(2 * count, self._length)
    return state, [
      {name: x[i] for name, x in measured.items()} for i in range(count)
    ]

  def step(self, state: Any, plan: data.Arrays) -> tuple[Any, dict[str, Any]]:
    """Takes the step of a plan; returns the state, and what it measured."""
    state, measured = self._run(state, [plan])
    if self._looped:
      measured = {name: x[0] for name, x in measured.items()}
    return state, measured

  def _run(self, state: Any, plans: list[data.Arrays]) -> Any:
    place = getattr(state.step, "sharding", None)
    if self._place is not None and place != self._place:
      # For one that lies elsewhere it would be compiled twice.
      state = jax.device_put(state, self._place)
    stacked = data.resident.stack(plans, self._length)
    return self._program(state, self._held, stacked, np.int32(len(plans)))


def make_program(
  config: cli.Config, step: Callable[[Any, Any], Any], looped: bool = True
) -> Program:
  """Makes the program of many steps: pure, to be mapped over runs and compiled.

  Args:
    config: names what is done to images.
    step: made by `pure_step`.
    looped: make no loop, but the first step alone, if False.

  Returns:
    `program(state, held, plans, count)`: takes the first steps of plans, count
    of them; returns the state, and what each step measured, [length], of which
    what is behind the count is 0; without a loop 0-d.
  """
  change = build.AUGMENTATIONS[config.augment].change
  assert change is not None

  def take(state: Any, held: Any, plans: Any, i: Any) -> Any:
    plan = jax.tree.map(lambda x: x[i], plans)
    batch = data.resident.make_batch(held, plan, change.apply)
    return step(state, batch)

  def program(state: Any, held: Any, plans: Any, count: Any) -> Any:
    if not looped:
      return take(state, held, plans, 0)

    def body(i: Any, carry: Any) -> Any:
      state, measured = carry
      state, found = take(state, held, plans, i)
      measured = {k: x.at[i].set(found[k]) for k, x in measured.items()}
      return state, measured

    zeros = jnp.zeros(len(plans["rows"]))
    start = state, {"loss": zeros, "gradient_norm": zeros}
    return jax.lax.fori_loop(0, count, body, start)

  return program


def _place(config: cli.Config) -> NamedSharding | None:
  """Returns where the data and the state lie; None for the first device."""
  if config.parallel == "jit":
    return None
  return NamedSharding(data_mesh(config), P())


def _compiled(config: cli.Config, program: Program) -> Program:
  """Compiles a program, and spreads it over devices; the state is donated."""
  if config.parallel != "jit":
    # Both ways to spread are one here: pmap adds an axis, and gains nothing.
    program = jax.shard_map(
      program,
      mesh=data_mesh(config),
      in_specs=(P(), P(), P(None, "data"), P()),
      out_specs=(P(), P()),
      # As in `training.shard_map_step`.
      check_vma=False,
    )
  return jax.jit(program, donate_argnums=0)
