"""What a run says on its way, to a terminal or to a log."""

import errno
import os
import sys
import time
from collections.abc import Callable, Mapping
from typing import TextIO

#: Seconds from one word on the progress to the next, and to the first one.
ON_TERMINAL, IN_LOG = (1.0, 1.0), (60.0, 5.0)

#: What a narrow terminal does without, first to last.
DISPENSABLE = ("percent", "rate", "loss", "left", "zeros", "accuracy")


def say(text: str, stream: TextIO | None = None) -> None:
  """Prints a line at once; a reader who has gone away ends no run.

  Args:
    text: the line.
    stream: where to; None for the standard output.
  """
  _write(f"{text}\n", stream or sys.stdout)


def _write(text: str, stream: TextIO) -> None:
  try:
    stream.write(text)
    stream.flush()
  except OSError as error:
    if error.errno in (errno.EPIPE, errno.EIO):
      # What is left in the buffer would fail again when Python ends.
      nowhere = os.open(os.devnull, os.O_WRONLY)
      os.dup2(nowhere, stream.fileno())
      os.close(nowhere)


class Pace:
  """Steps a second, from one call to the next.

  Args:
    clock: seconds; not the time of day, which may jump.
  """

  def __init__(self, clock: Callable[[], float] = time.monotonic):
    self._clock = clock
    self._last: tuple[int, float] | None = None

  @property
  def seconds(self) -> float | None:
    """Since the last call; None before the first."""
    return None if self._last is None else self._clock() - self._last[1]

  def __call__(self, step: int) -> float | None:
    """Returns the rate since the last call, None for the first one."""
    last, now = self._last, self._clock()
    self._last = step, now
    if last is None or now <= last[1]:
      return None
    return (step - last[0]) / (now - last[1])


class Progress:
  """How far a phase is.

  On a terminal it is a line that is rewritten each second, elsewhere a line
  each minute, and the first one soon after the first step was compiled.

  Args:
    phase: its name.
    steps: last step.
    clock: seconds.
  """

  def __init__(
    self, phase: str, steps: int, clock: Callable[[], float] = time.monotonic
  ):
    self._phase, self._steps = phase, steps
    dumb = os.environ.get("TERM", "dumb") == "dumb"
    self._live = sys.stderr.isatty() and not dumb
    self._every, self._first = ON_TERMINAL if self._live else IN_LOG
    self._pace = Pace(clock)
    self._rate: float | None = None
    self._shown = False

  def is_due(self, step: int) -> bool:
    """Whether it is time for a word after this step."""
    seconds = self._pace.seconds
    if seconds is None:
      # The first step took as long as its compilation: the clock starts here.
      self._pace(step)
      return step == self._steps
    pause = self._every if self._shown else self._first
    return step == self._steps or seconds >= pause

  def restart(self, step: int) -> None:
    """Forgets the time that has passed, in which something was compiled."""
    self._pace(step)

  def show(self, step: int, figures: Mapping[str, float]) -> None:
    """Says how far it is.

    Args:
      step: that was done last.
      figures: some of "loss", "validation_accuracy" and "sparsity".
    """
    rate = self._pace(step)
    if rate is not None:
      # Validations come in bursts.
      before = rate if self._rate is None else self._rate
      self._rate = 0.7 * before + 0.3 * rate
    self._shown = True
    if self._live:
      width = os.get_terminal_size(sys.stderr.fileno()).columns or 80
      line = self.short(step, figures, width - 1)
      _write(f"\r{line}\x1b[K", sys.stderr)
    else:
      say(self.long(step, figures))

  def close(self) -> None:
    """Ends the line of a terminal."""
    if self._live and self._shown:
      _write("\n", sys.stderr)

  def short(self, step: int, figures: Mapping[str, float], width: int) -> str:
    """Returns what fits on a line of so many columns."""
    parts = {"step": f"{self._phase} {step}/{self._steps}"}
    parts["percent"] = f"{100 * step // self._steps}%"
    if self._rate:
      parts["rate"] = f"{_figure(self._rate)}/s"
    if self._rate and step < self._steps:
      parts["left"] = f"{self._left(step)} left"
    for name, key, form in (
      ("loss", "loss", ".4f"),
      ("accuracy", "validation_accuracy", ".1%"),
      ("zeros", "sparsity", ".1%"),
    ):
      if key in figures:
        label = name.removesuffix("uracy")
        parts[name] = f"{label} {figures[key]:{form}}"
    for name in DISPENSABLE:
      if len("  ".join(parts.values())) > width:
        parts.pop(name, None)
    return "  ".join(parts.values())[: max(width, 0)]

  def long(self, step: int, figures: Mapping[str, float]) -> str:
    """Returns a line for a log."""
    share = 100 * step // self._steps
    parts = [f"{self._phase} {step}/{self._steps} ({share}%)"]
    if self._rate:
      parts.append(f"{_figure(self._rate)} steps/s")
    if self._rate and step < self._steps:
      parts.append(f"{self._left(step)} left")
    for name, key, form in (
      ("loss", "loss", ".4f"),
      ("validation accuracy", "validation_accuracy", ".2%"),
      ("zeros", "sparsity", ".2%"),
    ):
      if key in figures:
        parts.append(f"{name} {figures[key]:{form}}")
    return ", ".join(parts)

  def _left(self, step: int) -> str:
    return duration((self._steps - step) / (self._rate or 1))


def _figure(x: float) -> str:
  """Returns three digits, or all before the point.

  >>> _figure(1234.5), _figure(12.345), _figure(0.01234)
  ('1234', '12.3', '0.0123')
  """
  return f"{x:.0f}" if x >= 100 else f"{x:.3g}"


def duration(seconds: float) -> str:
  """Returns a time in its two largest units.

  >>> duration(7), duration(190), duration(3720), duration(200_000)
  ('7s', '3m10s', '1h02m', '2d07h')
  """
  whole = round(seconds)
  minutes, hours, days = whole // 60, whole // 3600, whole // 86400
  if days:
    return f"{days}d{hours % 24:02d}h"
  if hours:
    return f"{hours}h{minutes % 60:02d}m"
  if minutes:
    return f"{minutes}m{whole % 60:02d}s"
  return f"{whole}s"
