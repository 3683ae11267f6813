"""One run, from its options to its record.

Both nets get the same epochs. Each phase goes on at its last checkpoint where
a run was stopped, bit for bit, and a finished run only prints its table.
"""

import json
import platform
import time
from typing import Any

import jax

from experiments.common import build, cli, log, places, processes
from experiments.common.plots import run as pictures
from experiments.common.runner import checks, float_net, loop, record, stages


def run(config: cli.Config) -> dict[str, Any]:
  """Trains, packs, evaluates in a fresh process, and writes the record.

  Returns:
    What result.json holds.

  Raises:
    UsageError: the options do not fit, or the directory is another run's.
    DataNotPreparedError: the data set is not there.
  """
  began = time.time()
  dataset = build.load_dataset(config)
  devices = checks.device_count(config)
  params, model_state = build.initial_variables(config, dataset)
  images = len(dataset.train["label"])
  _, steps = checks.count_steps(config, images)
  checks.fit(config, params, model_state)
  floats = float_net.given(config, params, model_state)
  # Nothing is written before all options are known to fit.
  workdir = config.directory
  with processes.leader_first("claim"):
    log.claim(workdir, places.run_record(config))
  if (workdir / "result.json").exists():
    return json.loads((workdir / "result.json").read_text())

  if floats is None:
    floats = float_net.train(config, dataset)
  if (config.init or config.method.start) == "float":
    params, model_state = floats["params"], dict(floats)
    del model_state["params"]
  config = checks.fit(config, params, model_state)
  phase = stages.ternary_phase(config, steps, params, model_state)
  state = loop.train(config, dataset, phase)

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
    "seconds": round(time.time() - began, 1),
    **log.provenance(),
    "versions": {"python": platform.python_version(), "jax": jax.__version__},
    "devices": f"{devices} x {jax.devices()[0].device_kind}",
  }
  if processes.leads():
    pictures.draw(config, result, phase.snapshots)
    log.write_pictures(workdir, steps)
    text = json.dumps(result, indent=2) + "\n"
    (workdir / "result.json").write_text(text)
  processes.wait_for_all("the result")
  return result
