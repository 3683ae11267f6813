"""The command `python -m tern_jax`: looks at checkpoints, compares, exports.

`doctor` tells what multiplies packed weights here.

Exit status: 0 if all is well; 1 if leaves are damaged (inspect, verify) or
differ (diff); 2 if the command could not do its work, with one line that says
why; 130 if it was interrupted; 141 if nobody reads what it prints.
"""

import contextlib
import io
import logging
import os
import signal
import sys
import warnings
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command of `argv`, or of the process; returns its exit status."""
  # What this loads takes a while, in which it may be interrupted.
  from tern_jax.cli import command

  return command.main(argv)


def run() -> int:
  """Runs the command for a process of its own, and returns its exit status."""
  signal.signal(signal.SIGINT, _interrupted)
  return _run()


def _interrupted(*_: object) -> None:
  """Ends the process at once.

  An exception could be taken for damage by what reads arrays, or get lost.
  """
  if files := sys.modules.get("tern_jax.export.files"):
    for path in files.unfinished:
      files.remove(path)
  with contextlib.suppress(OSError):
    os.write(2, b"tern_jax: interrupted\n")
  os._exit(130)


def _run() -> int:
  import jax

  from tern_jax.cli import command, output

  # Looking at a file must not take the accelerator of a training beside it.
  if sys.argv[1:2] != ["doctor"]:
    jax.config.update("jax_platforms", "cpu")
  # What a file holds is exported as it is.
  jax.config.update("jax_enable_x64", True)
  # The line that says what is wrong is the only one.
  logging.disable(logging.CRITICAL)
  if not sys.warnoptions:
    warnings.simplefilter("ignore")
  for stream in (sys.stdout, sys.stderr):
    if isinstance(stream, io.TextIOWrapper):
      # Names of other languages in a terminal that knows ASCII only.
      stream.reconfigure(errors="backslashreplace")
  try:
    try:
      return main()
    except SystemExit as e:  # after help, or a line about its usage
      output.flush()
      return 2 if e.code else 0
  except output.OutputError as e:
    if isinstance(e.__cause__, BrokenPipeError):
      return 141  # as a shell says of programs that SIGPIPE has ended
    command.complain("", f"cannot print: {e.__cause__}")
    return 2
  finally:
    output.settle()


if __name__ == "__main__":
  sys.exit(run())
