"""Errors that a user can do something about."""

import contextlib
import signal
import sys
from collections.abc import Iterator

from tern_jax.checkpoint import CheckpointError

#: Exit status of a run that was asked to end.
INTERRUPTED = 128 + signal.SIGTERM


class UsageError(Exception):
  """What was asked for cannot be done; the message says what to do."""


class DataNotPreparedError(FileNotFoundError):
  """A data set is not in the data directory in a readable form."""


class InterruptedRunError(RuntimeError):
  """A run was asked to end, and can be resumed where it stopped."""


class DivergedError(RuntimeError):
  """A run came to numbers that are not finite."""


@contextlib.contextmanager
def explained() -> Iterator[None]:
  """Ends the process with a message, not a traceback, where a user can help."""
  try:
    yield
  except (
    UsageError,
    DataNotPreparedError,
    CheckpointError,
    DivergedError,
  ) as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)
  except InterruptedRunError as interruption:
    print(interruption, file=sys.stderr)
    sys.exit(INTERRUPTED)
