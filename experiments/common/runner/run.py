"""One run, from its options to its record.

Both nets get the same epochs. Each phase goes on at its last checkpoint where
a run was stopped, bit for bit, and a finished run only prints its table.
"""

import contextlib
import json
import platform
import time
from typing import Any

import jax

from experiments.common import (
  build,
  cli,
  files,
  lock,
  log,
  places,
  processes,
  terminal,
)
from experiments.common.plots import run as pictures
from experiments.common.runner import checks, float_net, loop, record, stages


def run(config: cli.Config) -> dict[str, Any]:
  """Trains, packs, evaluates in a fresh process, and writes the record.

  Returns:
    What result.json holds.

  Raises:
    UsageError: the options do not fit, or the directory is another run's, or
      is just written to.
    DataNotPreparedError: the data set is not there.
  """
  workdir, options = config.directory, places.run_record(config)
  with contextlib.ExitStack() as stack:
    with processes.leader_first():
      if log.check(workdir, options) and (
        result := log.read_object(workdir / "result.json")
      ):
        return result
      # Before data are loaded and programs compiled, which takes minutes.
      if processes.leads():
        stack.enter_context(lock.held(workdir))
    return _train(config)


def _train(config: cli.Config) -> dict[str, Any]:
  """Does what `run` does, in a directory that is locked."""
  began, workdir = time.monotonic(), config.directory
  dataset = build.load_dataset(config)
  devices = checks.device_count(config)
  params, model_state = build.initial_variables(config, dataset)
  images = len(dataset.train["label"])
  float_steps, steps = checks.count_steps(config, images)
  checks.fit(config, params, model_state)
  checks.is_resident(config, dataset)
  floats = float_net.given(config, params, model_state)
  # Nothing is written before all options are known to fit.
  with processes.leader_first():
    log.claim(workdir, places.run_record(config))
  kind = f"{devices} x {jax.devices()[0].device_kind}"
  _say(
    f"{type(config.method).__name__} on {config.data}, {config.model}:"
    f" {float_steps} float and {steps} ternary steps on {kind}, in {workdir}"
  )
  if floats is None:
    floats = float_net.train(config, dataset)
  if (config.init or config.method.start) == "float":
    params, model_state = floats["params"], dict(floats)
    del model_state["params"]
  config = checks.fit(config, params, model_state)
  phase = stages.ternary_phase(config, steps, params, model_state)
  state = loop.train(config, dataset, phase)

  _say("packing, and evaluating on validation and test data")
  result = record.judge(
    config,
    dataset,
    floats=floats,
    unrounded=phase.final.variables(state),
    ternary=phase.final.ternary(state),
    latents=log.load_latents(workdir, phase.snapshots[1]),
    method=phase.final.tern,
  )
  result |= {
    "steps": steps,
    "seconds": round(time.monotonic() - began, 1),
    **log.provenance(),
    "versions": {"python": platform.python_version(), "jax": jax.__version__},
    "devices": kind,
  }
  if processes.leads():
    _say("drawing")
    pictures.draw(config, result, phase.snapshots)
    log.write_pictures(workdir, steps)
    text = json.dumps(result, indent=2) + "\n"
    files.write(workdir / "result.json", text)
  processes.wait_for_all("the result")
  return result


def _say(text: str) -> None:
  if processes.leads():
    terminal.say(text)
