"""What a run would do, told before it does it."""

import itertools
import time
from typing import Any

import jax

from experiments.common import cli, evaluate, log, run
from tern_jax.core.paths import path_str

#: Steps whose time is taken, after one that compiles.
TIMED_STEPS = 10


def rehearse(config: cli.Config) -> str:
  """Tells shapes, sizes, memory and speed of a run; nothing is written.

  Args:
    config: of the run.

  Returns:
    Lines for people. Memory is that of one device, for the state and a batch;
    activations and gradients come on top. The time is that of steps alone,
    without compilation, validation and the evaluation at the end.

  Raises:
    UsageError: the options do not fit.
    DataNotPreparedError: the data set is not there.
  """
  dataset = evaluate.load_dataset(config)
  devices = cli.device_count(config)
  params, model_state = run.initial_variables(config, dataset)
  run.given_float(config, params, model_state)
  steps = cli.count_steps(config, len(dataset.train["label"]))
  config = cli.fit(config, params, model_state)
  phase = run.ternary_phase(config, steps[1], params, model_state)
  stage = phase.stages[0]
  assert stage.tern is not None

  rows: log.Rows = [("leaf", "shape", "weights", "as")]
  chosen = {"ternary": 0, "float": 0}
  for keys, leaf in jax.tree_util.tree_leaves_with_path(params):
    path = path_str(keys)
    kind = "ternary" if stage.tern.where.selects(path, leaf) else "float"
    chosen[kind] += leaf.size
    shape = "x".join(map(str, leaf.shape)) or "-"
    rows.append((path, shape, f"{leaf.size:,}", kind))
  rows.append(("ternary in all", "", f"{chosen['ternary']:,}", "ternary"))
  rows.append(("float in all", "", f"{chosen['float']:,}", "float"))

  batches = evaluate.training_batches(config, dataset)
  state_bytes = _bytes(phase.state)
  step = run.make_step(config, stage, dataset.num_classes)
  batch = next(batches)
  state, _ = step(phase.state, batch)
  jax.block_until_ready(state)
  began = time.perf_counter()
  for following in itertools.islice(batches, TIMED_STEPS):
    state, _ = step(state, following)
  jax.block_until_ready(state)
  rate = TIMED_STEPS / (time.perf_counter() - began)
  hours = sum(steps) / rate / 3600
  facts: log.Rows = [
    ("run", ""),
    ("directory", str(config.directory)),
    ("devices", f"{devices} x {jax.devices()[0].device_kind}"),
    ("steps, float and ternary", f"{steps[0]:,} + {steps[1]:,}"),
    ("state", f"{state_bytes / 2**20:,.1f} MiB a device"),
    ("a batch", f"{_bytes(batch) / devices / 2**20:,.1f} MiB a device"),
    ("steps a second", f"{rate:,.2f}"),
    ("time of all steps", f"{hours:,.2f} hours"),
  ]
  return "\n\n".join(map(log.aligned, (rows, facts)))


def _bytes(tree: Any) -> int:
  return sum(x.nbytes for x in jax.tree.leaves(tree))
