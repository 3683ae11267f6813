"""How the command prints: as text or as JSON, to whatever is there."""

import contextlib
import json
import os
import sys
from collections.abc import Iterable, Iterator

from tern_jax.storage.leaves import Json, printable


class OutputError(Exception):
  """What the command found cannot be printed; its cause says why."""


def show(report: Json, lines: Iterable[str], as_json: bool) -> None:
  """Prints the report as JSON, or the lines that say it as text.

  Raises:
    OutputError: standard output is closed, full, or a pipe that nobody reads.
  """
  # What a file says can not make a line of its own.
  safe = (printable(line, sys.maxsize) for line in lines)
  write(json.dumps(report, indent=2) if as_json else "\n".join(safe))


def write(text: str) -> None:
  """Prints a text, of which nothing is left in a buffer.

  Raises:
    OutputError: see `show`.
  """
  with _explained():
    print(text)
    sys.stdout.flush()


def flush() -> None:
  """Prints what is left in a buffer; raises as `write`."""
  with _explained():
    sys.stdout.flush()


def settle() -> None:
  """Drops what cannot be printed: the end of the process would try again."""
  for stream in (sys.stdout, sys.stderr):
    if stream is not None:
      try:
        stream.flush()
      except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


@contextlib.contextmanager
def _explained() -> Iterator[None]:
  try:
    if sys.stdout is None:
      raise OSError("standard output is closed")
    yield
  except OSError as e:
    raise OutputError from e


def table(*rows: tuple[str, ...]) -> Iterator[str]:
  """Yields columns as wide as they need; all but the first to the right."""
  rows = tuple((printable(first), *rest) for first, *rest in rows)
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  for first, *rest in rows:
    cells = map(str.rjust, rest, widths[1:])
    yield "  ".join([first.ljust(widths[0]), *cells]).rstrip()


def by(shape: Iterable[int], scalar: str = "") -> str:
  """Returns a shape as 8x2, or what stands for one without axes."""
  return "x".join(map(str, shape)) or scalar
