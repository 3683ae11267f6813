"""Training on data that lie on the device: steps a second over streamed ones.

    python -m experiments.benchmarks.resident_speed
    python -m experiments.benchmarks.resident_speed --data mnist --model lenet5

Both ways train SCA in turns in one process, `--resident on` and `--resident
off` of the experiments; the figure is the median of the ratios of turns that
follow one another. A turn starts when both have compiled, and its steps are
those between two lines of metrics.

Measured on 2 CPU cores of a shared machine, jax 0.10.2, ratios: medians, least
and largest. All with `--batch-size 64`, then `--steps 300`; `--steps 40 --data
mnist --model lenet5`, `pmap` and `--parallel jit`; `--steps 5 --data cifar10
--model resnet8 --augment flip_crop`:

  digits, mlp              5.89  (5.43 to 6.23)
  mnist, lenet5            1.04  (0.96 to 1.24)
  mnist, lenet5, jit       1.01  (1.00 to 1.04)
  cifar10, resnet8         1.00  (0.96 to 1.03)

With other work on the machine two more runs of LeNet-5 came to 0.85 and 1.13.
"""

import dataclasses
import statistics
import time
from typing import Any

import jax
import tyro

from experiments.common import build, cli, data, errors
from experiments.common.runner import stages
from experiments.common.runner.advance import Feed
from experiments.common.tables import Table


@dataclasses.dataclass(frozen=True)
class SpeedOptions:
  """Command line of the benchmark."""

  data: str = "digits"
  """Data set."""
  model: cli.Model = "mlp"
  """Network."""
  augment: cli.Augmentation = "none"
  """What is done to training images."""
  parallel: cli.Parallel = "pmap"
  """How a step is spread."""
  batch_size: int = 128
  """Images a step."""
  steps: int = 100
  """Steps of a turn."""
  rounds: int = 5
  """Turns of each way."""
  data_dir: str | None = None
  """Directory of prepared data sets; None for the usual one."""


class Run:
  """A training on its way.

  Args:
    config: its options.
    dataset: its data.
    steps: of the training.
  """

  def __init__(self, config: cli.Config, dataset: data.Dataset, steps: int):
    params, model_state = build.initial_variables(config, dataset)
    phase = stages.ternary_phase(config, steps, params, model_state)
    self._advance = Feed(config, dataset).make_advance(phase.final)
    self._state = phase.state

  def turn(self, steps: int) -> float:
    """Takes some steps; returns how many a second."""
    began, done = time.perf_counter(), 0
    while done < steps:
      self._state, measured = self._advance(self._state, steps - done)
      done += len(measured)
    jax.block_until_ready(self._state)
    return steps / (time.perf_counter() - began)


def main(options: SpeedOptions) -> float:
  """Prints the table; returns the ratio."""
  config = cli.Config(
    data=options.data,
    data_dir=options.data_dir,
    model=options.model,
    augment=options.augment,
    parallel=options.parallel,
    batch_size=options.batch_size,
    log_every=options.steps,
    workdir="runs",  # nothing is written
  )
  dataset = build.load_dataset(config)
  ways: tuple[Any, ...] = ("off", "on")
  runs = [
    Run(
      dataclasses.replace(config, resident=way),
      dataset,
      options.steps * (options.rounds + 1),
    )
    for way in ways
  ]
  for run in runs:
    run.turn(options.steps)  # compiles, and finds its pace
  pairs = [
    [run.turn(options.steps) for run in runs] for _ in range(options.rounds)
  ]
  ratios = [on / off for off, on in pairs]
  table = Table(("steps a second", "median", "least", "largest"))
  columns = (*zip(*pairs, strict=True), ratios)
  for name, found in zip(
    ("streamed", "resident", "ratio"), columns, strict=True
  ):
    figures = (statistics.median(found), min(found), max(found))
    table.rows.append((name, *(f"{x:,.2f}" for x in figures)))
  print(f"{options.model} on {options.data}, batch {options.batch_size}")
  print(table.text())
  return statistics.median(ratios)


if __name__ == "__main__":
  with errors.explained():
    main(tyro.cli(SpeedOptions, description=__doc__))
