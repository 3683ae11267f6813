"""What a run would do, told before it does it."""

import dataclasses
import tempfile
import time
from typing import Any

import jax

import tern_jax
from experiments.common import build, cli, data
from experiments.common.runner import checks, float_net, stages
from experiments.common.runner.advance import Feed
from experiments.common.tables import Table
from tern_jax.core.paths import path_str

#: Steps whose time is taken, after one that compiles.
TIMED_STEPS = 10


def rehearse(config: cli.Config) -> str:
  """Tells shapes, sizes, memory and speed of a run; nothing is written.

  Args:
    config: of the run.

  Returns:
    Lines of text. Memory is that of one device, for the state and a batch;
    activations and gradients come on top. The time is that of steps alone,
    without compilation, validation and the evaluation at the end.

  Raises:
    UsageError: the options do not fit.
    DataNotPreparedError: the data set is not there.
  """
  dataset = _load_dataset(config)
  devices = checks.device_count(config)
  params, model_state = build.initial_variables(config, dataset)
  float_net.given(config, params, model_state)
  steps = checks.count_steps(config, len(dataset.train["label"]))
  config = checks.fit(config, params, model_state)
  phase = stages.ternary_phase(config, steps[1], params, model_state)
  tern = phase.final.tern
  assert tern is not None
  leaves = _leaves(params, tern)
  # Before a step takes over the arrays.
  state_size = _bytes(phase.state)
  rate = _steps_a_second(config, dataset, phase)
  hours = sum(steps) / rate / 3600
  batch = next(build.training_batches(config, dataset))
  size = _bytes(batch) / devices
  place = "streamed from the host"
  if checks.is_resident(config, dataset):
    place = f"{_bytes(dataset.train) / 2**20:,.1f} MiB a device"
  facts = Table(
    ("run", ""),
    [
      ("directory", str(config.directory)),
      ("devices", f"{devices} x {jax.devices()[0].device_kind}"),
      ("steps, float and ternary", f"{steps[0]:,} + {steps[1]:,}"),
      ("state", f"{state_size / 2**20:,.1f} MiB a device"),
      ("a batch", f"{size / 2**20:,.1f} MiB a device"),
      ("training data", place),
      ("steps a second", f"{rate:,.2f}"),
      ("time of all steps", f"{hours:,.2f} hours"),
    ],
  )
  matrices = tern.where.describe(params)
  return f"{leaves.text()}\n\n{matrices}\n\n{facts.text()}"


def _load_dataset(config: cli.Config) -> data.Dataset:
  """Returns the data of a run; what it would prepare, it prepares elsewhere."""
  if config.data != "digits" or data.is_prepared("digits", config.data_dir):
    return build.load_dataset(config)
  with tempfile.TemporaryDirectory() as place:
    return build.load_dataset(dataclasses.replace(config, data_dir=place))


def _leaves(params: Any, tern: tern_jax.ParamTransform) -> Table:
  """Returns what becomes of each parameter."""
  table = Table(("leaf", "shape", "weights", "as"))
  chosen = tern.where.paths(params)
  sizes = {"ternary": 0, "float": 0}
  for keys, leaf in jax.tree_util.tree_leaves_with_path(params):
    path = path_str(keys)
    kind = "ternary" if path in chosen else "float"
    sizes[kind] += leaf.size
    shape = "x".join(map(str, leaf.shape)) or "-"
    table.rows.append((path, shape, f"{leaf.size:,}", kind))
  for kind, size in sizes.items():
    table.rows.append((f"{kind} in all", "", f"{size:,}", kind))
  return table


def _steps_a_second(
  config: cli.Config, dataset: data.Dataset, phase: stages.Phase
) -> float:
  """Measures the speed of a phase's first stage, once it is compiled."""
  advance = Feed(config, dataset).make_advance(phase.stages[0])
  state, _ = advance(phase.state, 1)
  jax.block_until_ready(state)
  began, done = time.perf_counter(), 0
  while done < TIMED_STEPS:
    state, measured = advance(state, TIMED_STEPS - done)
    done += len(measured)
  jax.block_until_ready(state)
  return TIMED_STEPS / (time.perf_counter() - began)


def _bytes(tree: Any) -> int:
  return sum(x.nbytes for x in jax.tree.leaves(tree))
