"""The spec of a checkpoint: JSON that describes it, sealed by its crc32."""

import functools
import json
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tern_jax.storage import codecs, leaves, limits, places
from tern_jax.storage.leaves import CheckpointError, Json, MisfitError
from tern_jax.storage.places import Place, explained

#: Version of the layout that is written, and the newest that is read.
FORMAT = 1
_text = functools.partial(json.dumps, sort_keys=True)


def seal(spec: Json) -> Json:
  """Returns what is written: the spec, as a reader sees it, and its crc32."""
  spec = json.loads(_text(spec))
  text = _text(spec)
  limits.check_saved("the spec", text)
  return {"crc32": zlib.crc32(text.encode()), "spec": spec}


def read(path: Place) -> Json:
  """Returns the verified spec of the checkpoint in a folder.

  Raises:
    CheckpointError: damaged, or from a newer version.
  """
  with explained("read the spec of", path):
    if not places.in_bucket(path):
      limits.size_of_folder(path)
    sealed = limits.read_json(path / places.SPEC)
    spec = sealed["spec"]
    if sealed["crc32"] != zlib.crc32(_text(spec).encode()):
      raise CheckpointError(f"{path}: the spec is damaged: crc32 differs.")
    if type(spec["format"]) is not int or spec["format"] < 1:
      raise CheckpointError(
        f"{path} has format {_shown(spec['format'])}, but formats are numbers"
        f" from 1 to {FORMAT}: it was not written by tern_jax."
      )
    if spec["format"] > FORMAT:
      reads = f"this tern_jax reads up to {FORMAT}: upgrade tern_jax"
      raise MisfitError(f"{path} has format {spec['format']}, but {reads}.")
    if spec["codec"] not in codecs.CODECS:
      reads = f"this tern_jax reads {tuple(codecs.CODECS)}: upgrade tern_jax"
      codec = _shown(spec["codec"])
      raise MisfitError(f"{path} has codec {codec}, but {reads}.")
    return spec


def _shown(value: object) -> str:
  """Returns a value of a spec as messages print it."""
  return leaves.printable(repr(value))


def json_value(x: object, name: str) -> Any:
  """Returns a value as JSON has it, scalars of NumPy and JAX included.

  Raises:
    TypeError: it is no JSON value; the error says where.
  """
  if isinstance(x, dict):
    found: Json = {}
    for key, value in x.items():
      text = _key(key, name)
      if text in found:
        raise TypeError(f"{name} has two keys {text!r}, once they are strings.")
      found[text] = json_value(value, f"{name}[{key!r}]")
    return found
  if isinstance(x, list | tuple):
    return [json_value(y, f"{name}[{i}]") for i, y in enumerate(x)]
  x = _scalar(x)
  if x is None or isinstance(x, str | int | float):
    return x
  what = f"a {type(x).__name__}"
  if isinstance(x, np.ndarray | np.generic | jax.Array):
    hint = "arrays belong into the state, or are lists by .tolist()"
    what = f"an array of {x.dtype}{list(x.shape)}: {hint}"
  raise TypeError(f"extra must be a JSON value, but {name} is {what}.")


def number(x: object, name: str) -> float:
  """Returns a number, also one in a scalar of NumPy or JAX.

  Raises:
    TypeError: it is none.
  """
  x = _scalar(x)
  if isinstance(x, bool) or not isinstance(x, int | float):
    raise TypeError(f"{name} must be a number, got {x!r}.")
  return float(x)


def _key(key: object, name: str) -> str:
  """Returns the key of an object, as JSON writes it."""
  key = _scalar(key)
  if isinstance(key, str):
    return key
  if key is None or isinstance(key, int | float):
    return _text(key)
  raise TypeError(
    f"extra must be a JSON value, but a key of {name} is {key!r}."
  )


def _scalar(x: Any) -> Any:
  """Returns the number in a scalar of NumPy or JAX; all else as it is."""
  if not isinstance(x, np.generic | np.ndarray | jax.Array) or x.ndim:
    return x
  if isinstance(x, str):
    return str(x)
  kinds = (np.bool_, jnp.integer, jnp.floating)
  return x.item() if any(jnp.issubdtype(x.dtype, k) for k in kinds) else x
