"""ResNet-20 on CIFAR-10 at the papers' scale, with what they publish beside.

  python -m experiments.benchmarks.paper_table cpu
  python -m experiments.benchmarks.paper_table gpu --minutes 9
  python -m experiments.benchmarks.paper_table cpu --rows float "SCA, .5"

The float row is a float net, by SGD; every other row continues that of its
seed for as many epochs, by Adam. The first convolution and the last layer stay
float. The test split is read once a run, at its end; what is chosen, such as
the best codes of EC2T, is chosen on 5,000 of the training images.

  gpu: 200 epochs, rates decay by a cosine, 3 seeds, bfloat16 in training.
  cpu: 30 epochs of one cycle, 1 seed, float32.

Rows come in order of importance, the seeds of each one after the other. The
command can be stopped and given again: it goes on within a row, at its last
checkpoint, and `table.md` under --root holds what is done so far. --minutes
lets it start no run that would last longer than is left, by the longest one of
the call; the first one is always started, and what then still trains ends with
a checkpoint. A call's programs are not compiled again by the next one with
JAX_COMPILATION_CACHE_DIR set to a directory.

Published figures are of the same network, trained otherwise: EC2T for 35 epochs
from a float net, the best checkpoint picked on the test split in its authors'
code; TTQ by SGD for some 200 epochs. TGA's, which EC2T's paper cites, does not
tell which layers are ternary. "TGA as published" is its method, start and
optimizer of thresholds; its weights are trained by Adam here, and together with
the thresholds.

Time of cpu: a step takes .8 seconds of a CPU core, and so a row 2.4 hours of
one, all twelve 29; two cores that are idle halve that at best. Estimated from
20 steps of SCA at .5. Of gpu: not measured.
"""

import contextlib
import dataclasses
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import tyro

from experiments.common import (
  bench,
  cli,
  configs,
  errors,
  files,
  lock,
  methods,
  terminal,
  trials,
)
from experiments.common.configs import SLOW_SCA
from experiments.common.trials import Record


class Row(NamedTuple):
  """A row of the table."""

  method: methods.Method | None
  """None for the float net."""
  changes: dict[str, Any]
  """Options that differ from the preset's."""
  published: str | None
  """What `bench.PUBLISHED` calls it; None where no figure is known."""


#: In order of importance.
ROWS = {
  "float": Row(None, {}, "float"),
  "SCA, .5": Row(methods.Sca(sparsity=0.5), SLOW_SCA, None),
  "SCA, .65": Row(methods.Sca(sparsity=0.65), SLOW_SCA, None),
  "SCA, .75": Row(methods.Sca(sparsity=0.75), SLOW_SCA, None),
  "SCA, .9": Row(methods.Sca(sparsity=0.9), SLOW_SCA, None),
  "EC2T, .45": Row(methods.Ec2t(sparsity=0.45), {}, "EC2T-1"),
  "EC2T, .64": Row(methods.Ec2t(sparsity=0.64), {}, "EC2T-2"),
  "EC2T, .73": Row(methods.Ec2t(sparsity=0.73), {}, "EC2T-3"),
  "TWN": Row(methods.Twn(), {}, None),
  "TTQ": Row(methods.Ttq(), {}, "TTQ"),
  "TGA as published": Row(trials.PUBLISHED_TGA, trials.by_sgd(1e-3), "TGA"),
  "TGA()": Row(trials.PLAIN_TGA, trials.by_sgd(1e-3), None),
}

_BOTH = dataclasses.replace(
  configs.CIFAR10,
  model="resnet20",
  float_optimizer="sgd",
  float_learning_rate=0.1,
  float_weight_decay=5e-4,
  rest_learning_rate=1e-3,
)


class Preset(NamedTuple):
  """What a machine has time for."""

  config: cli.Config
  seeds: tuple[int, ...]


PRESETS = {
  "gpu": Preset(
    dataclasses.replace(
      _BOTH,
      epochs=200,
      float_epochs=200,
      compute="bfloat16",
      log_every=5 * 351,
      checkpoint_every=10 * 351,
    ),
    seeds=(0, 1, 2),
  ),
  "cpu": Preset(
    dataclasses.replace(
      _BOTH,
      epochs=30,
      float_epochs=30,
      schedule="one_cycle",
      log_every=351,
      checkpoint_every=351,
    ),
    seeds=(0,),
  ),
}


@dataclasses.dataclass(frozen=True)
class PaperOptions:
  """Command line of the benchmark."""

  preset: tyro.conf.Positional[Literal["gpu", "cpu"]]
  """How long, on how many seeds, and in which type."""
  rows: tuple[str, ...] = ()
  """The only rows to train and to show; all where none is given."""
  seeds: tuple[int, ...] = ()
  """Seeds of each row, the preset's where none is given."""
  data: Literal["cifar10", "cifar100"] = "cifar10"
  """Data set; figures are published for the first."""
  minutes: float | None = None
  """Time of this call; None for as long as it takes."""
  data_dir: str | None = None
  """Directory of prepared data sets; None for the usual one."""
  root: Path = Path("runs/paper")
  """Where the runs lie."""


class Deadline:
  """The end of a call, and whether another run fits before it.

  Args:
    minutes: until then; None for no end.
  """

  def __init__(self, minutes: float | None):
    self._seconds = None if minutes is None else 60 * minutes
    self._began = time.monotonic()
    self._longest = 0.0

  @property
  def left(self) -> float:
    """Seconds until then."""
    if self._seconds is None:
      return float("inf")
    return self._began + self._seconds - time.monotonic()

  @property
  def fits(self) -> bool:
    """Whether there is time for a run as long as the longest so far."""
    return self.left > self._longest

  @contextlib.contextmanager
  def timed(self) -> Iterator[None]:
    """Takes the time of a run; ends its training when time is up."""
    began, done = time.monotonic(), threading.Event()
    waiting = threading.Thread(target=self._end, args=(done,), daemon=True)
    if self._seconds is not None:
      waiting.start()
    try:
      yield
    finally:
      done.set()
      if self._seconds is not None:
        waiting.join()
    self._longest = max(self._longest, time.monotonic() - began)

  def _end(self, done: threading.Event) -> None:
    if done.wait(max(self.left, 0)):
      return
    # Only a training has a handler: what packs and evaluates goes on.
    while signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
      if done.wait(0.1):
        return
    os.kill(os.getpid(), signal.SIGTERM)


def main(options: PaperOptions) -> None:
  """Trains what is not trained yet and fits, and prints the table.

  Raises:
    UsageError: options are out of range, or unknown, or want an accelerator.
  """
  check(options)
  config, seeds = PRESETS[options.preset]
  config = dataclasses.replace(
    config, data=options.data, data_dir=options.data_dir
  )
  labels = trials.chosen(options.rows, tuple(ROWS))
  place = options.root / f"{config.data}-{config.model}-{options.preset}"
  runs = [(label, n) for label in labels for n in options.seeds or seeds]
  table: dict[str, list[Record]] = {}
  deadline = Deadline(options.minutes)
  with lock.held(place):
    for label, seed in runs:
      if not deadline.fits:
        break
      seeded = dataclasses.replace(config, seed=seed)
      try:
        with deadline.timed():
          record = trained(ROWS[label], seeded, place)
      except errors.InterruptedRunError:
        if deadline.left > 0:
          raise
        break
      table.setdefault(label, []).append(record)
      files.write_table(place, bench.paper(table).markdown(), table)
  if table:
    print(bench.paper(table).markdown())
  done = sum(map(len, table.values()))
  if done < len(runs):
    terminal.say(
      f"{done} of {len(runs)} runs are done, and time is up; to go on:"
      f" {errors.command_line()}"
    )


def check(options: PaperOptions) -> None:
  """Checks what else would go wrong in silence."""
  if options.minutes is not None and options.minutes <= 0:
    raise errors.UsageError(
      f"minutes={options.minutes:g}, but it must be above 0."
    )
  if options.preset == "gpu" and jax.default_backend() == "cpu":
    raise errors.UsageError(
      "The preset gpu wants an accelerator, and JAX finds none: install its"
      ' plugin, such as "jax[cuda13]", or give the preset cpu.'
    )


def trained(row: Row, config: cli.Config, place: Path) -> Record:
  """Trains the net of a row, if that is not done yet; returns its record."""
  if row.method is None:
    record = trials.float_only(config, place)
  else:
    result = trials.ternary(config, place, row.method, row.changes)
    told = {key: result[key] for key in ("seed", "devices")}
    record = bench.ternary_record(result) | told
  epochs = {"float_epochs": config.float_epochs}
  if row.method is not None:
    epochs["epochs"] = config.epochs
  published = bench.published(config.data, row.published)
  return record | epochs | {"published": published}


if __name__ == "__main__":
  with errors.explained():
    main(tyro.cli(PaperOptions, description=__doc__))
