"""Errors that a user can do something about."""

import contextlib
import logging
import os
import shlex
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator

from experiments.common import terminal
from tern_jax.checkpoint import CheckpointError

#: Seconds after which Ctrl-C gets an answer, whatever the process does.
PATIENCE = 2.0

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
      _leave()
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
    with watched(_leave if _is_command() else lambda: None):
      yield
  finally:
    signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def watched(late: Callable[[], None]) -> Iterator[None]:
  """Answers Ctrl-C also while the main thread compiles or waits for a device.

  A handler in Python has to wait until that is done. A second Ctrl-C ends the
  process at once.

  Args:
    late: called if the first one is still not answered after `PATIENCE`.
  """
  reader, writer = socket.socketpair()
  writer.setblocking(False)
  before = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
  thread = threading.Thread(target=_watch, args=(reader, late), daemon=True)
  thread.start()
  try:
    yield
  finally:
    signal.set_wakeup_fd(before)
    writer.close()
    thread.join()
    reader.close()


def _watch(reader: socket.socket, late: Callable[[], None]) -> None:
  """Reads the numbers of signals until the other end is closed."""
  begun = False
  while True:
    try:
      received = reader.recv(1)
    except TimeoutError:
      reader.settimeout(None)
      if sys.stderr.isatty():
        terminal.say("", sys.stderr)  # It may be in the middle of a line.
      late()
      continue
    if not received:
      return
    if received[0] != signal.SIGINT:
      continue
    if begun:
      text = f"SIGINT: ended at once; to go on: {command_line()}"
      terminal.say(text, sys.stderr)
      os._exit(128 + signal.SIGINT)
    begun = True
    reader.settimeout(PATIENCE)


def _leave() -> None:
  """Ends what was interrupted where there is nothing to be saved."""
  text = f"SIGINT: ended before it was done; to go on: {command_line()}"
  if _is_command():
    # Programs that still run on a device would crash a proper exit.
    terminal.say(text, sys.stderr)
    os._exit(128 + signal.SIGINT)
  _end(text, 128 + signal.SIGINT)


def _is_command() -> bool:
  spec = getattr(sys.modules["__main__"], "__spec__", None)
  return spec is not None and spec.name.partition(".")[0] == "experiments"


def _end(text: str, status: int) -> None:
  terminal.say(text, sys.stderr)
  sys.exit(status)
