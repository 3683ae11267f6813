"""The float net of a run: given, or trained once for all runs."""

import contextlib
from typing import Any

import jax

from experiments.common import (
  build,
  cli,
  data,
  lock,
  log,
  optimizers,
  places,
  processes,
  terminal,
)
from experiments.common.runner import checks, loop, pretrained
from experiments.common.runner.stages import Phase, Stage
from tern_jax import training


def given(config: cli.Config, params: Any, model_state: dict[str, Any]) -> Any:
  """Returns the variables of a float net from elsewhere; None to train one.

  Args:
    config: the options.
    params: of the model, for their shapes.
    model_state: its other variables likewise.

  Raises:
    UsageError: there is no such net, or it is of another model.
    CheckpointError: likewise of a checkpoint.
  """
  if config.float_from is None:
    return None
  return pretrained.load(config.float_from, {"params": params, **model_state})


def train(config: cli.Config, dataset: data.Dataset) -> Any:
  """Returns the variables of the float net, trained once for all runs."""
  params, model_state = build.initial_variables(config, dataset)
  images = len(dataset.train["label"])
  steps, _ = checks.count_steps(config, images)
  tx = optimizers.of_float_net(config, steps)
  state = training.init_state(params, tx, None, model_state, config.seed)
  directory = config.float_directory
  stage = Stage(None, tx, steps, rate=optimizers.float_rate(config, steps))
  phase = Phase("float", directory, state, (stage,))

  def wait(holder: str) -> None:
    terminal.say(f"waits for the float net in {directory}, held by {holder}")

  with contextlib.ExitStack() as stack:
    with processes.leader_first():
      if processes.leads():
        # Runs that start together share one training: the first one does it.
        stack.enter_context(lock.held(directory, wait))
      log.claim(directory, places.float_record(config))
    state = loop.train(config, dataset, phase)
  return jax.device_get(stage.variables(state))
