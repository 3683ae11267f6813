"""What checkpoints and runs survive: accidents, and files of an enemy.

    python -m experiments.benchmarks.faults

kills: a process trains, saves each step, every other one in the background, and
replaces a packed checkpoint beside; it is killed at a random moment, and the
next one resumes. After each kill all steps on disk must be those of a run that
was never killed, bit for bit, and none may be missing that was reported saved.

power: the same with power cuts, on a file system of its own: what was not on
the disk at a random moment is lost. What was reported saved must be there.

flips: files of checkpoints are damaged: bits and runs of bytes are changed,
files are cut, extended, exchanged or deleted. Each load must raise
CheckpointError or return exactly what was saved.

fuzz: loaders are given what nobody wrote: specs with hostile values, half of
them with a right checksum; bytes for the codec; safetensors files. They may
raise the errors that they document, or return something; they may not write,
take a quarter of a gigabyte, or a second.

hostile: files that are made to do harm, each loaded by a process of its own:
claims of weights that are not there, other layouts, bombs, links, FIFOs and
devices. They must be refused within a second of CPU time, and the process may
take no more than three times the larger of the file and what is truly in it.

names: everything is saved, replaced and resumed below names such as lr[0.1].

readers: a process loads for so many seconds what another one replaces all the
time. Every load must be one of the checkpoints, whole.

starts: an experiment is started twice at once. The second one must end by one
line, in less than 5 seconds of CPU time, and the first one with the record of
an undisturbed run, bit for bit.

A line says how many cases there were and what came of them; the first case that
breaks a rule is an AssertionError. The last output is in
experiments/results/faults.txt. Orbax keeps files that no load reads, hence
damage that is harmless.
"""

import dataclasses
import tempfile
from pathlib import Path

import jax
import tyro

from experiments.common import errors
from experiments.common.faults.damages import flips
from experiments.common.faults.fuzz import fuzz
from experiments.common.faults.hostile import hostile
from experiments.common.faults.kills import kills
from experiments.common.faults.names import names
from experiments.common.faults.power import power
from experiments.common.faults.readers import readers
from experiments.common.faults.starts import starts
from experiments.common.faults.trees import hush


@dataclasses.dataclass
class Options:
  """Command line of the benchmark: how much of each kind, 0 for none."""

  kills: int = 100
  """Processes that are killed."""
  power: int = 100
  """Power cuts."""
  flips: int = 1000
  """Damages that are done."""
  fuzz: int = 10_000
  """Inputs that are made up."""
  hostile: int = 100
  """Files that are made to do harm, at most."""
  names: int = 100
  """Names of folders, at most."""
  readers: int = 30
  """Seconds of a reader beside a writer."""
  starts: int = 6
  """Second starts of a running experiment."""
  seed: int = 0
  """Of all that is random."""


def main(options: Options) -> None:
  """Runs the benchmark."""
  hush()
  print(f"seed {options.seed}")
  for task in (kills, power, flips, fuzz, hostile, names, readers, starts):
    if times := getattr(options, task.__name__):
      # A file system that is still mounted somewhere in it is left alone.
      with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        counts = task(times, options.seed, Path(folder))
      parts = (f"{n:,} {name}" for name, n in sorted(counts.items()))
      print(f"{task.__name__} {times:,}: {', '.join(parts)}", flush=True)


if __name__ == "__main__":
  jax.config.update("jax_platforms", "cpu")
  with errors.explained():
    main(tyro.cli(Options, description=__doc__))
