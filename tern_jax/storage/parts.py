"""What a save writes: the arrays of each part by number, and the spec."""

from typing import Any

import jax

from tern_jax.core.types import PyTree
from tern_jax.storage import codecs, leaves, limits, tensors
from tern_jax.storage.codecs import Codec
from tern_jax.storage.leaves import CheckpointError, Json, Path
from tern_jax.storage.packed import validate
from tern_jax.storage.places import Place
from tern_jax.storage.spec import FORMAT, read, seal
from tern_jax.version import version_of

#: The spec of a checkpoint, and the arrays of its parts, described.
Contents = tuple[Json, dict[str, Json]]


def parts_of(
  trees: dict[str, PyTree], codec: Codec, method: object, **facts: Any
) -> dict[str, Json]:
  """Returns {part: arrays by number}, of trees, and the sealed spec.

  Args:
    trees: by the names of their parts.
    codec: of the packed weights.
    method: what made the weights.
    **facts: what the spec says besides.
  """
  parts: dict[str, Json] = {}
  entries: dict[str, list[Json]] = {}
  for part, tree in trees.items():
    entries[part], stored, boxes = [], {}, leaves.boxes(tree)
    for i, (path, x) in enumerate(leaves.flatten(tree)[0].items()):
      entry, arrays = _encode(path, x, codec)
      entries[part].append(entry | boxes.get(path, {}))
      # Orbax cannot store what has no elements; the spec knows all about it.
      if arrays := {k: a for k, a in arrays.items() if a.size}:
        stored[f"{i:04d}"] = arrays
    if stored:
      parts[part] = stored
  packages = ("tern_jax", "jax", "orbax-checkpoint")
  ternary = (e["path"] for e in entries["packed"] if e["kind"] == "ternary")
  sealed = seal(
    {
      "format": FORMAT,
      "versions": {name: version_of(name) for name in packages},
      "codec": codec.name,
      "method": method if isinstance(method, str | None) else repr(method),
      "selected": ["/".join(path) or "the leaf" for path in ternary],
      "extra": None,
      "leaves": entries,
    }
    | facts
  )
  return parts | {"spec": sealed}


def _encode(path: Path, x: PyTree, codec: Codec) -> tuple[Json, codecs.Arrays]:
  """Returns a leaf's entry in the spec, and its arrays on the host."""
  name, extra = leaves.name_of(path), {}
  kind = leaves.kind_of(name, x, keys=True)
  if kind == "ternary":
    x = leaves.host_packed(x)
    validate({name: x})
    x, extra = codecs.stored(x)
    checked = {k: getattr(x, k) for k in leaves.FIELDS}
    arrays = codecs.encode(codec, x)
  else:
    if kind == "key":
      extra = {"impl": str(jax.random.key_impl(x))}
    data = jax.random.key_data(x) if kind == "key" else x
    checked = arrays = {"value": leaves.host(data)}
  entry = {"path": path, "kind": kind, "shape": x.shape, "dtype": x.dtype.name}
  entry |= {"crc32": leaves.crc_of(checked), "arrays": leaves.describe(arrays)}
  return entry | extra, arrays


def claims(parts: dict[str, Json], codec: Codec) -> tuple[int, int]:
  """Returns the bytes of all arrays, and those with the codec's planes."""
  entries = parts["spec"]["spec"]["leaves"]
  stored = sum(
    tensors.stored_bytes(e) for part in entries.values() for e in part
  )
  planes = sum(
    codecs.decoded_bytes(codec, tuple(e["shape"]))
    for e in entries["packed"]
    if e["kind"] == "ternary"
  )
  return stored, stored + planes


def compressible(parts: dict[str, Json], codec: Codec) -> bool:
  """Whether at least half of the bytes can be compressed, and should be."""
  packed = parts.get("packed", {}).values()
  sizes = [(name, x.nbytes) for leaf in packed for name, x in leaf.items()]
  coded = sum(size for name, size in sizes if name in codec.arrays)
  if codec.incompressible and 2 * coded > sum(n for _, n in sizes):
    return False
  stored = {k: leaf for k, leaf in parts.items() if k != "spec"}
  arrays = jax.tree.leaves(stored)
  return limits.worth_compressing(arrays, claims(parts, codec)[1])


def contents_of(parts: dict[str, Json]) -> Contents:
  """Returns what there is to be found again of the parts of a checkpoint."""
  arrays = {k: v for k, v in parts.items() if k != "spec"}
  return parts["spec"]["spec"], {k: _described(v) for k, v in arrays.items()}


def check_readable(path: Place, contents: Contents) -> None:
  """Raises unless a spec and its arrays can be found again.

  The arrays themselves are not read.
  """
  fault = f"{path}: what was saved cannot be found again"
  spec, parts = contents
  if read(path) != spec:
    raise CheckpointError(f"{fault}: its spec is another.")
  for part, arrays in parts.items():
    if tensors.index_of(path, part) != arrays:
      raise CheckpointError(f"{fault}: the index of {part} is not complete.")


def _described(arrays: Json) -> Json:
  return {number: leaves.describe(x) for number, x in arrays.items()}
