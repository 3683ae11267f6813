"""The arrays of a checkpoint, written and read by orbax."""

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
import tensorstore
from orbax.checkpoint import v1

from tern_jax.core.types import PyTree
from tern_jax.storage import codecs, leaves, limits, ocdbt
from tern_jax.storage.codecs import Codec
from tern_jax.storage.leaves import CheckpointError, Json, Path, printable
from tern_jax.storage.places import Place, in_bucket

# Its own annotations refuse pathlib paths, and its own policies.
ocp: Any = v1

#: Entries of leaves in the spec of a checkpoint, by their paths.
Entries = dict[Path, Json]
# Bytes that are worth a read of their own, and how many reads at most.
_WORTH_A_READ = 1 << 22
_READS = 8
# Most bytes of what zarr says of an array, where ours has 500.
_FACTS = 1 << 16
# Bytes that are worth a chunk of their own, and how many chunks always are.
_WORTH_A_CHUNK, _CHUNKS = 1 << 16, 64


def context() -> Any:
  """Returns an orbax context that stores the spec as JSON."""
  made, handlers = ocp.Context(), ocp.handlers
  made.checkpointables.registry = handlers.local_registry().add(
    handlers.JsonHandler, checkpointable_name="spec"
  )
  return made


def saving(compress: bool) -> Any:
  """Returns an orbax context that compresses what is saved in it, or not."""
  made = context()
  made.array.saving.use_compression = compress
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
  return sum(map(leaves.size_of, entry["arrays"].values()))


def _described(entry: Json) -> Json:
  """Returns what a spec says of the arrays of a leaf that have elements."""
  return {k: a for k, a in entry["arrays"].items() if leaves.size_of(a)}


def claimed_bytes(entry: Json, index: Json, codec: Codec) -> int:
  """Returns the bytes of a leaf; 0 if the index says otherwise."""
  if _described(entry) != index.get(entry["number"], {}):
    return 0  # It will not be read.
  return stored_bytes(entry) + planes_bytes(entry, codec)


def planes_bytes(entry: Json, codec: Codec) -> int:
  """Returns the bytes of the planes that a codec makes of other arrays."""
  packed = entry["kind"] == "ternary" and leaves.is_shape(entry["shape"])
  return codecs.decoded_bytes(codec, tuple(entry["shape"])) if packed else 0


def groups(entries: Entries, sizes: dict[Path, int]) -> Iterator[Entries]:
  """Divides leaves into groups of about as many bytes.

  They are read group by group, so that there is never a second copy of all
  leaves: memory that the threads of a read have freed is for such threads, not
  for this one.
  """
  enough = max(_WORTH_A_READ, sum(sizes.values()) / _READS)
  group, size = {}, 0
  for keys, e in entries.items():
    group[keys] = e
    size += sizes[keys]
    if size >= enough:
      yield group
      group, size = {}, 0
  if group:
    yield group


def index_of(path: Place, part: str) -> Json:
  """Returns what the arrays of a part are, or why not, by their numbers.

  Nothing but the layout that orbax gives to our arrays is accepted.
  """
  if not (path / part).exists():
    return {}
  try:
    tree = limits.read_json(path / part / "_METADATA")
    if not (tree["use_ocdbt"] is tree["use_zarr3"] is True):
      raise ValueError("it has another layout than ours")
    names = []
    for entry in tree["tree_metadata"].values():
      number, name = (key["key"] for key in entry["key_metadata"])
      names.append((number, name))
      if entry["value_metadata"]["value_type"] != "np.ndarray":
        raise ValueError(f"{number}.{name} is no array")
    # How much it takes, for which TensorStore would take its word.
    sizes: Counter[str] = Counter()
    for key, size in ocdbt.sizes(path / part).items():
      array, _, rest = key.partition("/")
      if rest == "zarr.json" and size > _FACTS:
        raise ValueError(f"{key} has {size:,} bytes")
      sizes[array] += size
    store = _store(path / part)
    reads = [store.read(f"{number}.{name}/zarr.json") for number, name in names]
    index: Json = {}
    for (number, name), read in zip(names, reads, strict=True):
      stored = sizes[f"{number}.{name}"]
      facts = _facts(name, read.result().value, stored)
      index.setdefault(number, {})[name] = facts
  except Exception as e:
    fault = f"the index of {part} cannot be read"
    raise CheckpointError(
      f"{path}: {fault}: any of its leaves may be damaged."
    ) from e
  return index


def _store(folder: Place) -> Any:
  """Returns the database of a part: its arrays by names."""
  if in_bucket(folder):
    bucket, _, name = str(folder).partition("://")[2].partition("/")
    base = {"driver": "gcs", "bucket": bucket, "path": f"{name}/"}
  else:
    base = {"driver": "file", "path": f"{folder}/"}
  # Without a cache, the index would be read once for each array.
  cache = tensorstore.Context({"cache_pool": {"total_bytes_limit": 100 << 20}})
  spec = {"driver": "ocdbt", "base": base}
  return tensorstore.KvStore.open(spec, context=cache).result()


def _facts(name: str, text: bytes, stored: int) -> Json:
  """Returns what zarr says of an array, or what is wrong with its layout."""
  try:
    facts = json.loads(text)
    shape, dtype = facts["shape"], facts["data_type"]
    described = {"dtype": dtype, "shape": shape}
    size = leaves.size_of(described)
    most = max(_CHUNKS, size // _WORTH_A_CHUNK)
    if stored > size + size // _CHUNKS + _FACTS:
      raise ValueError(f"it has {stored:,} bytes on disk for {size:,}")
    grid, (shard,) = facts["chunk_grid"], facts["codecs"]
    inner = shard["configuration"]
    kinds = facts["zarr_format"], grid["name"], shard["name"]
    if kinds != (3, "regular", "sharding_indexed"):
      raise ValueError(f"it has the layout {kinds}")
    used = {codec["name"] for codec in inner["codecs"] + inner["index_codecs"]}
    used |= {x["name"] for x in facts.get("storage_transformers", ())}
    if other := used - {"bytes", "zstd", "crc32c"}:
      raise ValueError(f"it has the codecs {other}")
    for chunks in (grid["configuration"], inner):
      _check_chunks(shape, chunks["chunk_shape"], most)
  except Exception as e:
    return {"fault": f"{name} is no array of ours: {type(e).__name__}: {e}"}
  return described


def _check_chunks(shape: list[int], chunk: list[int], most: int) -> None:
  """Raises a ValueError if chunks are larger than an array, or too many."""
  if leaves.is_shape(chunk) and len(chunk) == len(shape):
    pairs = list(zip(shape, chunk, strict=True))
    counts = [-(-size // n) if 0 < n <= size else most + 1 for size, n in pairs]
    if math.prod(counts) <= most:
      return
  raise ValueError(f"it has chunks of shape {chunk} for {shape}")


def read(
  path: Place, part: str, entries: Entries, index: Json
) -> dict[str, Mapping[str, np.ndarray]]:
  """Returns the arrays of leaves, by their numbers, on the host."""
  # The index must agree with the spec before any array is allocated.
  wanted = {}
  for e in entries.values():
    described, found = _described(e), index.get(e["number"], {})
    if found != described:
      fault = f"its arrays are not those of the spec, {described}"
      for facts in found.values():
        fault = facts.get("fault", fault)
      name = leaves.name_of(e["path"])
      fault = printable(fault, 1000)
      raise CheckpointError(f"{path}: {name} is damaged: {fault}.")
    if described:
      wanted[e["number"]] = dict.fromkeys(described, np.ndarray)
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
