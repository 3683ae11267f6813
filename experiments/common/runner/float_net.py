"""The float net of a run: given, or trained once for all runs."""

import contextlib
import fcntl
from pathlib import Path
from typing import Any

import jax

from experiments.common import (
  build,
  cli,
  data,
  log,
  optimizers,
  places,
  processes,
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
  stage = Stage(None, tx, steps)
  phase = Phase("float", directory, state, (stage,))
  with contextlib.ExitStack() as stack:
    if processes.leads() and isinstance(directory, Path):
      # Runs that start together share one training: the first one does it.
      directory.parent.mkdir(parents=True, exist_ok=True)
      lock = directory.with_suffix(".lock").open("w")
      fcntl.flock(stack.enter_context(lock), fcntl.LOCK_EX)
    with processes.leader_first("claim of the float net"):
      log.claim(directory, places.float_record(config))
    state = loop.train(config, dataset, phase)
  return jax.device_get(stage.variables(state))
