"""What a run writes down: config, metrics, events, latents, progress.

Only process 0 writes.
"""

import contextlib
import io
import json
import os
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import image
from tensorboardX import SummaryWriter

from experiments.common import (
  cli,
  errors,
  files,
  lock,
  methods,
  places,
  processes,
  terminal,
)
from experiments.common.errors import UsageError
from tern_jax.checkpoint import Place

#: What lines of metrics tell of the clock: no two runs have it alike.
CLOCK = ("steps_per_second", "wall_time")


def read_config(workdir: Place) -> cli.Config:
  """Reads the config of a run.

  Raises:
    UsageError: the directory holds no run, or its record is damaged.
  """
  path = workdir / "config.json"
  if not path.exists():
    raise UsageError(f"{workdir} holds no config.json: give a run's directory.")
  record = _read_object(path)
  try:
    method = record.pop("method")
    for name, value in record.items():
      record[name] = tuple(value) if isinstance(value, list) else value
    method = methods.METHODS[method.pop("name")](**method)
    return cli.Config(method=method, workdir=str(workdir), **record)
  except (AttributeError, KeyError, TypeError) as error:
    raise UsageError(
      f"{path} does not hold the options of a run: give a run's directory."
    ) from error


def check(directory: Place, record: dict[str, Any]) -> bool:
  """Whether a directory holds this very run, to be resumed.

  Args:
    directory: to write to.
    record: the options of the run, as JSON holds them.

  Raises:
    UsageError: the directory holds something else, or a damaged record.
  """
  path = directory / "config.json"
  if not path.exists():
    if directory.is_dir() and not _holds_only(directory, lock.NAME):
      raise UsageError(
        f"{directory} is not empty and holds no run: choose another directory."
      )
    return False
  try:
    found = _read_object(path)
  except UsageError:
    if _holds_only(directory, lock.NAME, "config.json"):
      return False  # The run was killed before it had written anything else.
    raise
  # A record from before there was an option had what is its default now.
  defaults = places.run_record(cli.Config())
  old, new = defaults | found, defaults | record
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
  return True


def claim(directory: Place, record: dict[str, Any]) -> None:
  """Makes a directory, or finds the same run there to be resumed.

  Args:
    directory: to write to, whose lock is held.
    record: the options of the run, as JSON holds them.

  Raises:
    UsageError: the directory holds something else, which is left as it is.
  """
  if not check(directory, record):
    directory.mkdir(parents=True, exist_ok=True)
    text = json.dumps(record, indent=2) + "\n"
    files.write(directory / "config.json", text)


def read_object(path: Place) -> dict[str, Any] | None:
  """Returns the object of a JSON file; None if there is none, or a damaged one.

  It is for what can be made again.
  """
  with contextlib.suppress(FileNotFoundError, UsageError):
    return _read_object(path)
  return None


def _read_object(path: Place) -> dict[str, Any]:
  content = path.read_bytes()
  with contextlib.suppress(ValueError):
    if isinstance(found := json.loads(content), dict):
      return found
  raise UsageError(
    f"{path} is damaged: its {len(content)} bytes are not what a run writes."
    " Copy it from another run with the same options, or choose another"
    " directory."
  )


def _holds_only(directory: Place, *names: str) -> bool:
  return all(path.name in names for path in directory.iterdir())


def read_metrics(workdir: Place) -> list[dict[str, Any]]:
  """Returns the readable lines of metrics.jsonl, without those of the clock."""
  lines, _ = _read_lines(workdir)
  return [
    {name: value for name, value in line.items() if name not in CLOCK}
    for line in lines
  ]


def _read_lines(workdir: Place) -> tuple[list[dict[str, Any]], int]:
  """Returns the lines of metrics.jsonl, and how many others there are."""
  path = workdir / "metrics.jsonl"
  found, unreadable = [], 0
  # A kill or a full disk cuts a line off, and a power cut leaves zeros.
  for line in path.read_bytes().splitlines() if path.exists() else ():
    try:
      record = json.loads(line)
      record["phase"], record["step"]
    except (ValueError, TypeError, KeyError):
      unreadable += 1
    else:
      found.append(record)
  return found, unreadable


def save_latents(workdir: Place, step: int, latents: dict[str, Any]) -> None:
  """Keeps {path: latents} of a step."""
  if processes.leads():
    (workdir / "latents").mkdir(exist_ok=True)
    content = io.BytesIO()
    np.savez(content, **latents)
    files.write(workdir / "latents" / f"{step}.npz", content.getvalue())


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
    workdir: directory of the run, which holds its config.json.
    phase: "float" or "ternary".
    start: step at which the phase resumes, 0 at its start.
    steps: last step.
  """

  def __init__(self, workdir: Place, phase: str, start: int, steps: int):
    self.phase = phase
    self._writes = processes.leads()
    self._closing = contextlib.ExitStack()
    if not self._writes:
      return
    lines, unreadable = _read_lines(workdir)
    self._path = workdir / "metrics.jsonl"
    if unreadable:
      terminal.say(f"{self._path}: {unreadable} unreadable lines are left out.")
    self._lines = [
      json.dumps(line) + "\n"
      for line in lines
      if line["phase"] != phase or line["step"] <= start
    ]
    files.write(self._path, "".join(self._lines))
    # Nothing is appended in a bucket: there, each line writes them all.
    self._file = None
    if isinstance(self._path, Path):
      self._file = self._closing.enter_context(self._path.open("ab"))
    folder = str(workdir / "tensorboard" / phase)
    self._events = SummaryWriter(folder, purge_step=start + 1)
    self._closing.callback(self._events.close)
    if not start:
      text = (workdir / "config.json").read_text()
      self._events.add_text("config", f"```json\n{text}```", 0)
    self._pace, self._shown = terminal.Pace(), dict[str, float]()
    self._progress = terminal.Progress(phase, steps)
    self._closing.callback(self._progress.close)
    going = f"from step {start} of {steps}" if start else f"{steps} steps"
    if start == steps:
      going = f"all of its {steps} steps are done"
    terminal.say(f"{phase} net: {going}, in {workdir}")

  def __enter__(self) -> "Log":
    return self

  def __exit__(self, *error: object) -> None:
    self._closing.close()

  def tick(self, step: int, loss: Any) -> None:
    """Shows how far the phase is, if it is time to.

    Args:
      step: that was done last.
      loss: of the step, 0-d; it is waited for only if it is shown.
    """
    if self._writes and self._progress.is_due(step):
      self._progress.show(step, {**self._shown, "loss": float(loss)})

  def write(self, step: int, metrics: dict[str, float]) -> None:
    """Writes the metrics of a step; those by layer have a slash."""
    if not self._writes:
      return
    # The time of day: that since the start would begin anew in a resumed run.
    clock = {"wall_time": round(time.time(), 3)}
    if (rate := self._pace(step)) is None:
      # What judges the net was compiled for the first line.
      self._progress.restart(step)
    else:
      clock["steps_per_second"] = round(rate, 4)
    self._append({"phase": self.phase, "step": step, **metrics, **clock})
    # Events have times of their own.
    for name, value in (metrics | clock).items():
      if name != "wall_time":
        self._events.add_scalar(name, value, step)
    self._shown = metrics
    if self._progress.is_due(step):
      self._progress.show(step, metrics)

  def write_histograms(self, step: int, weights: dict[str, np.ndarray]) -> None:
    """Shows TensorBoard how the weights of each layer are distributed."""
    if self._writes:
      for path, values in weights.items():
        self._events.add_histogram(f"weights/{path}", values, step)

  def sync(self) -> None:
    """Returns once all lines are on disk, before a checkpoint says so."""
    if self._writes and self._file:
      os.fsync(self._file.fileno())

  def _append(self, record: dict[str, Any]) -> None:
    line = json.dumps(record) + "\n"
    if self._file:
      self._file.write(line.encode())
      self._file.flush()
    else:
      self._lines.append(line)
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
    "command": errors.command_line(),
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
