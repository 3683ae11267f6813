"""One file, one claim: what the README and the report show is trained here."""

import os
import signal
import sys
from typing import Any


def _leave(number: int, frame: Any) -> None:
  """Ends a command that is still importing what it needs."""
  del frame
  os.write(2, b"SIGINT: ended before it began.\n")
  os._exit(128 + number)


# So Python calls the first argument while it looks for the module of `-m`.
_is_command = sys.argv[:1] == ["-m"]
# In the background of a shell script Ctrl-C is ignored.
_handler = signal.getsignal(signal.SIGINT)
if _is_command and _handler is signal.default_int_handler:
  signal.signal(signal.SIGINT, _leave)
