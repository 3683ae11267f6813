"""Runs of several processes, on loopback."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from experiments.common import errors, guard, log
from experiments.common.processes import on_loopback
from tern_jax import load_packed, unpack

ROOT = Path(__file__).parents[1]
DIGITS = ["-m", "experiments.digits"]
#: The same, but the last process gets SIGTERM at the third line of metrics.
PREEMPTED = """
import runpy, signal, jax
from experiments.common import log

def preempted(self, step, metrics, write=log.Log.write):
  write(self, step, metrics)
  if self.phase == "ternary" and step == 3 and jax.process_index() == 1:
    signal.raise_signal(signal.SIGTERM)

log.Log.write = preempted
runpy.run_module("experiments.digits", run_name="__main__")
"""


def start(processes, devices, tmp_path, *options, program=DIGITS):
  """Starts the processes of one run; the first leads."""
  command = [sys.executable, *program, "--hidden", "8"]
  command += ["--epochs", "2", "--log-every", "1", "--batch-size", "64"]
  command += ["--data-dir", str(tmp_path / "tfds"), *options]
  command += ["--distributed"] if processes > 1 else []
  command += ["--float-optimizer", "sgd", "--float-learning-rate", "0.01"]
  # A soft forward: rounding can move no weight over a threshold.
  command += ["method:sca", "--method.alpha", "0.1"]
  return [
    subprocess.Popen(
      command,
      cwd=ROOT,
      env=environment,
      stdout=subprocess.DEVNULL,
      stderr=subprocess.PIPE,
      text=True,
    )
    for environment in on_loopback(processes, devices)
  ]


def end(running, status=0):
  """Waits for processes that shall end with this status."""
  try:
    for process in running:
      _, error = process.communicate(timeout=300)
      assert process.returncode == status, error
  finally:
    for process in running:
      process.kill()


def losses(workdir, phase):
  directories = {"ternary": [workdir], "float": workdir.parent.glob("float/*/")}
  (directory,) = directories[phase]
  return [line["loss"] for line in log.read_metrics(directory)]


@pytest.mark.long
def test_two_processes_train_as_one_though_interrupted(tmp_path):
  one, two = tmp_path / "one" / "run", tmp_path / "two" / "run"
  end(start(1, 4, tmp_path, "--workdir", str(one)))
  # A machine is preempted alone, but all save the same step.
  program = ["-c", PREEMPTED]
  running = start(2, 2, tmp_path, "--workdir", str(two), program=program)
  end(running, errors.INTERRUPTED)
  assert len(log.read_metrics(two)) == guard.COMPARED_EVERY
  end(start(2, 2, tmp_path, "--workdir", str(two)))
  # Adam divides gradients that are zero but for rounding by themselves.
  for phase, off in (("float", 1e-5), ("ternary", 1e-3)):
    alone, shared = losses(one, phase), losses(two, phase)
    assert len(alone) == 2 * 19
    np.testing.assert_allclose(shared, alone, rtol=0, atol=off)
  assert (two / "result.json").exists()
  assert unpack(load_packed(two / "packed"))
