"""The spec of a checkpoint: JSON that describes its leaves, sealed by a crc32.

It is stored as `{"crc32": ..., "spec": {...}}`; the crc32 is over the JSON text
of the spec with sorted keys, ", " and ": " as separators.
"""

import functools
import json
import math
import zlib
from collections.abc import Mapping

import jax.numpy as jnp

from tern_jax.core.types import PyTree
from tern_jax.storage import leaves
from tern_jax.storage.codecs import CODECS
from tern_jax.storage.leaves import CheckpointError, Json, Path, name_of
from tern_jax.storage.places import SPEC, Place, explained, locate
from tern_jax.version import version_of

#: Version of the layout that this module writes, and the newest that it reads.
FORMAT = 1

_text = functools.partial(json.dumps, sort_keys=True)

#: The spec's entries of leaves, by their paths.
Entries = dict[Path, Json]


def seal(
  entries: dict[str, list[Json]], codec: str, method: object, extra: object
) -> Json:
  """Returns the sealed spec of the entries of each part of a checkpoint."""
  packages = ("tern_jax", "jax", "orbax-checkpoint")
  ternary = (e["path"] for e in entries["packed"] if e["kind"] == "ternary")
  spec = {
    "format": FORMAT,
    "versions": {name: version_of(name) for name in packages},
    "codec": codec,
    "method": method if isinstance(method, str | None) else repr(method),
    "selected": list(map(name_of, ternary)),
    "extra": extra,
    "leaves": entries,
  }
  try:
    spec = json.loads(_text(spec))  # what a reader will see
  except TypeError as e:
    raise TypeError(f"extra must be a JSON value: {e}.") from e
  return {"crc32": zlib.crc32(_text(spec).encode()), "spec": spec}


def read_spec(path: leaves.PathLike) -> Json:
  """Returns the verified spec of a checkpoint, without loading its arrays.

  It has "format", "versions", "codec", "method", "selected" (the paths of the
  packed leaves), "extra", and "leaves", a list for each part.

  Args:
    path: a checkpoint, a step of a training run, or a run: its latest step.

  Raises:
    CheckpointError: nothing there, damaged, or from a newer version.
  """
  path = locate(path)
  with explained("read the spec of", path):
    sealed = json.loads((path / SPEC).read_text("utf-8"))
    spec = sealed["spec"]
    if sealed["crc32"] != zlib.crc32(_text(spec).encode()):
      raise CheckpointError(f"{path}: the spec is damaged: crc32 differs.")
    if type(spec["format"]) is not int or spec["format"] < 1:
      raise CheckpointError(
        f"{path} has format {spec['format']!r}, but formats are numbers from "
        f"1 to {FORMAT}: it was not written by tern_jax."
      )
    if spec["format"] > FORMAT:
      reads = f"this tern_jax reads up to {FORMAT}: upgrade tern_jax"
      raise CheckpointError(f"{path} has format {spec['format']}, but {reads}.")
    if spec["codec"] not in CODECS:
      reads = f"this tern_jax reads {tuple(CODECS)}: upgrade tern_jax"
      raise CheckpointError(f"{path} has codec {spec['codec']!r}, but {reads}.")
    return spec


def entries_of(path: Place, part: str, spec: Json) -> Entries:
  """Returns the entries of a part, with the numbers of their arrays."""
  if part not in spec["leaves"]:
    raise CheckpointError(f"{path} has packed weights only, no {part}.")
  entries, depth = spec["leaves"][part], leaves.DEPTH
  for e in entries:
    if not isinstance(e["path"], list) or len(e["path"]) > depth:
      raise CheckpointError(f"{path}: a path is a list of up to {depth} keys.")
  paths = [tuple(e["path"]) for e in entries]
  if leaves.clash(paths):
    raise CheckpointError(f"{path}: two leaves have one path.")
  numbered = (e | {"number": number(i)} for i, e in enumerate(entries))
  return dict(zip(paths, numbered, strict=True))


def number(i: int) -> str:
  """Returns what the arrays of leaf i of a part are stored under."""
  return f"{i:04d}"


def stored_bytes(entry: Json) -> int:
  """Returns the bytes of the arrays of a leaf, by its entry in a spec."""
  facts = [(a["shape"], a["dtype"]) for a in entry["arrays"].values()]
  return sum(math.prod(n) * jnp.dtype(dtype).itemsize for n, dtype in facts)


def check_fit(
  path: Place, entries: Entries, wanted: Mapping[Path, PyTree]
) -> None:
  """Raises unless the wanted leaves are the stored ones, shapes and all."""
  arrays = {k: x for k, x in wanted.items() if hasattr(x, "dtype")}
  wrong = [f"{name_of(k)} is not stored" for k in arrays if k not in entries]
  for k, e in entries.items():
    x = arrays.get(k)
    if x is None:
      wrong.append(f"{name_of(k)} is stored, but not in the tree")
      continue
    # Packed weights may take the place of the dense ones that they stand for.
    kind = "ternary" if leaves.is_whole(x) else e["kind"]
    wants = f"{kind} {x.dtype.name}{list(x.shape)}"
    if (has := f"{e['kind']} {e['dtype']}{e['shape']}") != wants:
      what = f"stored as {has}, but in the tree it is {wants}"
      wrong.append(f"{name_of(k)} is {what}")
  if wrong:
    raise CheckpointError(f"{path} does not fit the tree: {'; '.join(wrong)}.")
