"""The arrays of a checkpoint, written and read by orbax."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from orbax.checkpoint import v1

from tern_jax.core.types import PyTree
from tern_jax.storage import leaves
from tern_jax.storage.leaves import CheckpointError, Json, Path
from tern_jax.storage.places import Place

# Its own annotations refuse pathlib paths, and its own policies.
ocp: Any = v1

#: Entries of leaves in the spec of a checkpoint, by their paths.
Entries = dict[Path, Json]
# Bytes that are worth a read of their own, and how many reads at most.
_WORTH_A_READ = 1 << 22
_READS = 8


def context() -> Any:
  """Returns an orbax context that stores the spec as JSON."""
  made, handlers = ocp.Context(), ocp.handlers
  made.checkpointables.registry = handlers.local_registry().add(
    handlers.JsonHandler, checkpointable_name="spec"
  )
  return made


class _Lent(np.ndarray):
  """An array that nobody changes while it is saved: orbax need not copy it."""

  def __deepcopy__(self, memo: object) -> "_Lent":
    return self


def lent(parts: PyTree) -> PyTree:
  """Returns the parts of a checkpoint, for a save that is waited for."""
  return jax.tree.map(
    lambda x: x.view(_Lent) if isinstance(x, np.ndarray) else x, parts
  )


def stored_bytes(entry: Json) -> int:
  """Returns the bytes of the arrays of a leaf, by its entry in a spec."""
  facts = [(a["shape"], a["dtype"]) for a in entry["arrays"].values()]
  return sum(math.prod(n) * jnp.dtype(dtype).itemsize for n, dtype in facts)


def groups(entries: Entries) -> Iterator[Entries]:
  """Divides leaves into groups of about as many bytes.

  They are read group by group, so that there is never a second copy of all
  leaves: memory that the threads of a read have freed is for such threads, not
  for this one.
  """
  whole = sum(map(stored_bytes, entries.values()))
  enough = max(_WORTH_A_READ, whole / _READS)
  group, size = {}, 0
  for keys, e in entries.items():
    group[keys] = e
    size += stored_bytes(e)
    if size >= enough:
      yield group
      group, size = {}, 0
  if group:
    yield group


def index_of(path: Place, part: str) -> Json:
  """Returns what orbax knows of the arrays of a part, by their numbers."""
  if not (path / part).exists():
    return {}
  # Of what it cannot read, orbax warns, and returns None.
  index = ocp.metadata(path, part).metadata
  if index is None:
    fault = f"the index of {part} cannot be read"
    raise CheckpointError(f"{path}: {fault}: any of its leaves may be damaged.")
  return index


def read(
  path: Place, part: str, entries: Entries, index: Json
) -> dict[str, Mapping[str, np.ndarray]]:
  """Returns the arrays of leaves, by their numbers, on the host."""
  # The index must agree with the spec before any array is allocated.
  wanted = {}
  for e in entries.values():
    described = {k: a for k, a in e["arrays"].items() if math.prod(a["shape"])}
    if leaves.describe(index.get(e["number"], {})) != described:
      fault = f"its arrays are not those of the spec, {described}"
      name = leaves.name_of(e["path"])
      raise CheckpointError(f"{path}: {name} is damaged: {fault}.")
    if described:
      wanted[e["number"]] = index[e["number"]]
  if not wanted:
    return {}
  reading = context()
  reading.pytree.loading.partial_load = True
  # All arrays are read to the host: no other process has to wait for that.
  here = jax.process_index()
  reading.multiprocessing.active_processes = {here}
  reading.multiprocessing.primary_host = here
  with reading:
    return ocp.load(path, wanted, checkpointable_name=part)
