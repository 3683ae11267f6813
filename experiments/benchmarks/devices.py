"""One batch over more devices and processes: same losses, time of a step.

  python -m experiments.benchmarks.devices
  python -m experiments.benchmarks.devices --model resnet8 --data cifar10

Trains SCA for some steps on 1, 2, 4 and 8 devices that XLA makes of this
machine's CPU, and on 2 processes with 2 and 4 of them, each with the same
global batch. Prints how far losses are from those of one device, and draws the
median time of a step. Devices that share the cores of one machine cannot be
faster than one; what the picture shows is what spreading the batch costs.

Sums in another order are rounded otherwise. So that no more than that is seen,
the forward is the soft one of `SCA(alpha=...)`, where rounding moves no weight
over a threshold, and the optimizer is SGD, because Adam divides gradients that
are zero but for rounding by themselves.
"""

import dataclasses
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import jax
import optax
import tyro

from experiments.common import build, cli, data, errors, methods
from experiments.common import processes as joint
from experiments.common.plots import compare
from experiments.common.runner import stages
from experiments.common.runner.step import make_step
from experiments.common.tables import Table

#: (processes, devices of each)
LAYOUTS = (1, 1), (1, 2), (1, 4), (1, 8), (2, 2), (2, 4)


@dataclasses.dataclass(frozen=True)
class DevicesOptions:
  """Command line of the benchmark."""

  data: str = "mnist"
  """Data set."""
  model: cli.Model = "lenet5"
  """Network."""
  parallel: cli.Parallel = "pmap"
  """How a step is spread."""
  batch_size: int = 128
  """Images a step, over all devices."""
  steps: int = 20
  """Training steps."""
  data_dir: str | None = None
  """Directory of prepared data sets; None for the usual one."""
  picture: Path | None = None
  """PNG to draw."""


def main(options: DevicesOptions) -> None:
  """Prints the table."""
  table = Table(("processes x devices", "loss off by", "ms a step"))
  times, alone = {}, None
  for layout in LAYOUTS:
    losses, seconds = measure(options, *layout)
    alone = losses if alone is None else alone
    off = max(abs(a - b) for a, b in zip(alone, losses, strict=True))
    name = "{} x {}".format(*layout)
    times[name] = 1000 * seconds
    table.rows.append((name, f"{off:.1e}", f"{times[name]:.1f}"))
    print(f"{name}: done", flush=True)
  print(table.text())
  if options.picture is not None:
    compare.step_times(times, options.picture)


def measure(
  options: DevicesOptions, processes: int, devices: int
) -> tuple[list[float], float]:
  """Trains in processes of their own.

  Args:
    options: what is trained.
    processes: on how many.
    devices: of each process.

  Returns:
    (loss of each step, median seconds of a step)
  """
  options = dataclasses.replace(options, picture=None)
  record = json.dumps(dataclasses.asdict(options))
  program = (
    "import sys; from experiments.benchmarks import devices;"
    " devices.answer(sys.argv[1])"
  )
  running = [
    subprocess.Popen(
      [sys.executable, "-c", program, record],
      env=environment,
      stdout=subprocess.PIPE,
      text=True,
    )
    for environment in joint.on_loopback(processes, devices)
  ]
  answers = [process.communicate()[0] for process in running]
  if any(process.returncode for process in running):
    raise SystemExit(1)  # They have said why.
  return json.loads(answers[0].splitlines()[-1])


def answer(record: str) -> None:
  """Trains as one of the processes, and prints the outcome as JSON.

  Args:
    record: the options, as JSON.
  """
  print(json.dumps(train(DevicesOptions(**json.loads(record)))))


def train(options: DevicesOptions) -> tuple[list[float], float]:
  """Returns what `measure` does, as one of its processes."""
  with joint.joined(os.environ["JAX_NUM_PROCESSES"] != "1"):
    config = cli.Config(
      method=methods.Sca(alpha=0.1),
      data=options.data,
      data_dir=options.data_dir,
      model=options.model,
      batch_size=options.batch_size,
      parallel=options.parallel,
      workdir="runs",  # nothing is written
    )
    dataset = data.load_dataset(config.data, config.data_dir)
    params, model_state = build.initial_variables(config, dataset)
    phase = stages.ternary_phase(config, options.steps, params, model_state)
    stage = dataclasses.replace(phase.final, tx=optax.sgd(0.05))
    step = make_step(config, stage, dataset.num_classes)
    batches = build.training_batches(config, dataset)
    opt_state = stage.tx.init(phase.state.params)
    state = dataclasses.replace(phase.state, opt_state=opt_state)
    losses, seconds = [], []
    for _ in range(options.steps):
      batch = next(batches)
      began = time.perf_counter()
      state, measured = step(state, batch)
      losses.append(float(jax.device_get(measured["loss"])))
      seconds.append(time.perf_counter() - began)
    return losses, statistics.median(seconds)


if __name__ == "__main__":
  with errors.explained():
    main(tyro.cli(DevicesOptions, description=__doc__))
