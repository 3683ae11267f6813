"""Whether a bucket of Cloud Storage can be reached, told within seconds.

Its clients would try again for minutes.
"""

import importlib.util
import os
import threading
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any

from tern_jax.storage.leaves import CheckpointError

# Seconds for one answer, and for all of it: the system alone decides how long
# the address of a host is looked for.
_ANSWER = 4
_TOGETHER = 7
_SCOPE = "https://www.googleapis.com/auth/devstorage.read_write"
_LOGIN = (
  "run `gcloud auth application-default login`, or set"
  " GOOGLE_APPLICATION_CREDENTIALS"
)
# Buckets that have answered: from then on clients may be as patient as they
# are.
_reached: set[str] = set()


def reach(place: str) -> None:
  """Returns if a bucket answers, and at once if it has done so before.

  Args:
    place: gs://bucket/path.

  Raises:
    CheckpointError: it does not answer, does not exist, or needs credentials.
    ImportError: gcsfs is missing.
  """
  bucket = place.removeprefix("gs://").partition("/")[0]
  if bucket in _reached:
    return
  if importlib.util.find_spec("gcsfs") is None:
    hint = "gcsfs: pip install 'tern_jax[bucket]'"
    raise ImportError(f"{place} needs the package {hint}.")
  host = os.environ.get("STORAGE_EMULATOR_HOST") or "default"
  if host == "default":
    host = "https://storage.googleapis.com"
  elif "://" not in host:
    host = f"http://{host}"
  try:
    status = _limited(lambda: _status(f"{host}/storage/v1/b/{bucket}/o"))
  except Exception as e:  # of the system, of HTTP, or that it is no address
    # What urllib has caught tells more than its own name.
    reason = getattr(e, "reason", e)
    reason = getattr(reason, "strerror", None) or reason
    raise CheckpointError(
      f"cannot reach {place} at {host}: {reason}: check the network, proxies"
      " and STORAGE_EMULATOR_HOST."
    ) from e
  if status == 404:
    raise CheckpointError(f"{place}: {host} has no bucket of this name.")
  if status in (401, 403):  # It is not public.
    _sign_in(place)
  _reached.add(bucket)


def _limited(task: Callable[[], int]) -> int:
  """Returns what a task returns, or raises TimeoutError if that takes long."""
  done: list[int | Exception] = []

  def run() -> None:
    try:
      done.append(task())
    except Exception as e:
      done.append(e)

  thread = threading.Thread(target=run, daemon=True)
  thread.start()
  thread.join(_TOGETHER)
  found = done[0] if done else TimeoutError(f"no answer in {_TOGETHER} s")
  if isinstance(found, Exception):
    raise found
  return found


def _status(url: str) -> int:
  """Returns the status of an answer to somebody without a name."""
  try:
    with urllib.request.urlopen(f"{url}?maxResults=1", timeout=_ANSWER) as got:
      return got.status
  except urllib.error.HTTPError as e:
    with e:
      return e.code


def _sign_in(place: str) -> None:
  """Raises unless there are credentials, and they are valid."""
  import google.auth
  from google.auth import exceptions
  from google.auth.transport import requests

  ask = requests.Request()

  def once(*args: Any, **options: Any) -> Any:
    # Whether this is a machine of the cloud is asked three times otherwise.
    try:
      return ask(*args, **options | {"timeout": _ANSWER / 2})
    except exceptions.TransportError as e:
      raise exceptions.DefaultCredentialsError(e) from e

  try:
    found, _ = google.auth.default(scopes=[_SCOPE], request=once)
  except exceptions.GoogleAuthError as e:
    raise CheckpointError(f"{place} needs credentials: {_LOGIN}.") from e
  try:
    found.refresh(once)
  except exceptions.GoogleAuthError as e:
    fault = f"{place}: credentials are not accepted: {e.args[0]}"
    raise CheckpointError(f"{fault}: {_LOGIN}.") from e
