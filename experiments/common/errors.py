"""Errors that a user can do something about."""

import contextlib
import logging
import os
import shlex
import signal
import sys
import threading
from collections.abc import Iterator

from experiments.common import terminal
from tern_jax.checkpoint import CheckpointError

#: Exit status of a run that was asked to end by SIGTERM.
INTERRUPTED = 128 + signal.SIGTERM


class UsageError(Exception):
  """What was asked for cannot be done; the message says what to do."""


class DataNotPreparedError(FileNotFoundError):
  """A data set is not in the data directory in a readable form."""


class InterruptedRunError(RuntimeError):
  """A run was asked to end, and can be resumed where it stopped.

  Args:
    message: where it stopped.
    number: of the signal that asked.
  """

  def __init__(self, message: str, number: int = signal.SIGTERM):
    super().__init__(message)
    self.status = 128 + number


class DivergedError(RuntimeError):
  """A run came to numbers that are not finite."""


def command_line() -> str:
  """Returns the command that runs, as a shell takes it."""
  return shlex.join(["python", *sys.orig_argv[1:]])


@contextlib.contextmanager
def explained() -> Iterator[None]:
  """Ends the process with a message, not a traceback, where a user can help."""
  # Orbax logs a traceback of what it then raises.
  logging.getLogger("absl").addFilter(_is_no_echo)
  with _interruptible():
    try:
      yield
    except (
      UsageError,
      DataNotPreparedError,
      CheckpointError,
      DivergedError,
    ) as error:
      _end(f"error: {error}", 2)
    except InterruptedRunError as interruption:
      _end(str(interruption), interruption.status)
    except KeyboardInterrupt:
      text = "SIGINT: ended before it was done; to go on: "
      _end(text + command_line(), 128 + signal.SIGINT)
    except BrokenPipeError:
      # Whoever read the output has seen enough.
      terminal.say("")
      sys.exit(1)
    except OSError as error:
      # Disks that are full, read-only or gone.
      what = error.strerror or error
      where = f"{error.filename}: " if error.filename else ""
      text = f"error: {where}{what}. Once that is mended, to go on: "
      _end(text + command_line(), 2)


def _is_no_echo(record: logging.LogRecord) -> bool:
  of_orbax = f"{os.sep}orbax{os.sep}" in record.pathname
  return not (of_orbax and record.levelno >= logging.ERROR)


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
  """Lets Ctrl-C raise a KeyboardInterrupt, where it is not ignored."""
  before = signal.getsignal(signal.SIGINT)
  if (
    before in (signal.SIG_IGN, None)
    or threading.current_thread() is not threading.main_thread()
  ):
    yield
    return
  signal.signal(signal.SIGINT, signal.default_int_handler)
  try:
    yield
  finally:
    signal.signal(signal.SIGINT, before)


def _end(text: str, status: int) -> None:
  terminal.say(text, sys.stderr)
  sys.exit(status)
