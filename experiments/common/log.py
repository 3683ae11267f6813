"""What a run writes down: config, metrics, events, latents, progress.

Only process 0 writes.
"""

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import image
from tensorboardX import SummaryWriter
from tqdm import tqdm

from experiments.common import cli, methods, places, processes
from experiments.common.errors import UsageError
from tern_jax.checkpoint import Place


def read_config(workdir: Place) -> cli.Config:
  """Reads the config of a run.

  Raises:
    UsageError: the directory holds no run.
  """
  path = workdir / "config.json"
  if not path.exists():
    raise UsageError(f"{workdir} holds no config.json: give a run's directory.")
  record: dict[str, Any] = json.loads(path.read_text())
  method = record.pop("method")
  for name, value in record.items():
    record[name] = tuple(value) if isinstance(value, list) else value
  method = methods.METHODS[method.pop("name")](**method)
  return cli.Config(method=method, workdir=str(workdir), **record)


def claim(directory: Place, record: dict[str, Any]) -> None:
  """Makes a directory, or finds the same run there to be resumed.

  Args:
    directory: to write to.
    record: the options of the run, as JSON holds them.

  Raises:
    UsageError: the directory holds something else, which is left as it is.
  """
  path = directory / "config.json"
  if path.exists():
    # A record from before there was an option had what is its default now.
    defaults = places.run_record(cli.Config())
    old, new = defaults | json.loads(path.read_text()), defaults | record
    changed = [
      f"{name}={old.get(name)} there, {new.get(name)} now"
      for name in sorted(old.keys() | new.keys())
      if old.get(name) != new.get(name)
    ]
    if changed:
      raise UsageError(
        f"{directory} holds a run with other options: {'; '.join(changed)}."
        " Choose another directory, or give the same options to resume it."
      )
  elif directory.exists() and any(directory.iterdir()):
    raise UsageError(
      f"{directory} is not empty and holds no run: choose another directory."
    )
  else:
    directory.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=2) + "\n")


def read_metrics(workdir: Place) -> list[dict[str, Any]]:
  """Returns the lines of metrics.jsonl, without one that a kill cut short."""
  path = workdir / "metrics.jsonl"
  lines = path.read_text().splitlines(keepends=True) if path.exists() else []
  return [json.loads(line) for line in lines if line.endswith("\n")]


def save_latents(workdir: Place, step: int, latents: dict[str, Any]) -> None:
  """Keeps {path: latents} of a step."""
  if processes.leads():
    (workdir / "latents").mkdir(exist_ok=True)
    with (workdir / "latents" / f"{step}.npz").open("wb") as file:
      np.savez(file, **latents)


def load_latents(workdir: Place, step: int) -> dict[str, np.ndarray]:
  """Returns {path: latents} of a step that was kept."""
  content = (workdir / "latents" / f"{step}.npz").read_bytes()
  with np.load(io.BytesIO(content)) as kept:
    return dict(kept)


class Log:
  """The metrics of one phase of a run; a context manager.

  A run that resumes at a checkpoint repeats the steps after it: what they
  had written is dropped first.

  Args:
    workdir: directory of the run.
    phase: "float" or "ternary".
    start: step at which the phase resumes, 0 at its start.
    steps: last step.
  """

  def __init__(self, workdir: Place, phase: str, start: int, steps: int):
    self.phase, self._steps = phase, steps
    self._writes = processes.leads()
    self._printed = start
    if not self._writes:
      return
    kept = [
      record
      for record in read_metrics(workdir)
      if record["phase"] != phase or record["step"] <= start
    ]
    self._path, self._lines = workdir / "metrics.jsonl", []
    # Nothing is appended in a bucket: there, each line writes them all.
    self._file = None
    if isinstance(self._path, Path):
      self._file = self._path.open("w", buffering=1)
    self._write_lines(kept)
    self._events = SummaryWriter(
      str(workdir / "tensorboard" / phase), purge_step=start + 1
    )
    self._bar = tqdm(
      desc=f"{phase:7}",
      total=steps,
      initial=start,
      unit="step",
      disable=not sys.stderr.isatty(),
    )

  def __enter__(self) -> "Log":
    return self

  def __exit__(self, *error: object) -> None:
    if self._writes:
      if self._file:
        self._file.close()
      self._events.close()
      self._bar.close()

  def write(self, step: int, metrics: dict[str, float]) -> None:
    """Writes the metrics of a step; those by layer have a slash."""
    if not self._writes:
      return
    self._write_lines([{"phase": self.phase, "step": step, **metrics}])
    for name, value in metrics.items():
      self._events.add_scalar(name, value, step)
    shown = {name: value for name, value in metrics.items() if "/" not in name}
    text = ", ".join(f"{name} {value:.4f}" for name, value in shown.items())
    self._bar.update(step - self._bar.n)
    self._bar.set_postfix_str(text)
    # A file or pipe gets a line for each quarter of the phase instead.
    quarter = 4 * step // self._steps > 4 * self._printed // self._steps
    if self._bar.disable and quarter:
      self._printed = step
      print(f"{self.phase:7} {step:6d}/{self._steps}  {text}", flush=True)

  def write_histograms(self, step: int, weights: dict[str, np.ndarray]) -> None:
    """Shows TensorBoard how the weights of each layer are distributed."""
    if self._writes:
      for path, values in weights.items():
        self._events.add_histogram(f"weights/{path}", values, step)

  def _write_lines(self, records: list[dict[str, Any]]) -> None:
    lines = [json.dumps(record) + "\n" for record in records]
    if self._file:
      self._file.writelines(lines)
    else:
      self._lines += lines
      self._path.write_text("".join(self._lines))


def write_pictures(workdir: Place, step: int) -> None:
  """Shows the pictures of a run in TensorBoard, too."""
  with SummaryWriter(str(workdir / "tensorboard" / "pictures")) as events:
    for path in sorted(workdir.glob("*.png")):
      picture = image.imread(io.BytesIO(path.read_bytes()))
      events.add_image(path.stem, picture, step, dataformats="HWC")


def provenance() -> dict[str, str | None]:
  """Returns the command line that runs, and the commit of its code."""
  return {
    "command": " ".join(["python", *sys.orig_argv[1:]]),
    "commit": commit(),
  }


def commit() -> str | None:
  """Returns the git commit of this code, with a + if files were changed since.

  None where it is not a clone.
  """
  command = ["git", "describe", "--always", "--abbrev=40", "--dirty=+"]
  try:
    done = subprocess.run(
      [*command, "--exclude=*"],
      cwd=Path(__file__).parent,
      capture_output=True,
      text=True,
      check=True,
    )
  except (OSError, subprocess.CalledProcessError):
    return None
  return done.stdout.strip()
