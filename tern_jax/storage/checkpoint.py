"""Checkpoints that notice damage: packed weights, or a whole training run.

A checkpoint is an orbax checkpoint of up to three parts:

  spec    `{"crc32": ..., "spec": {...}}`: JSON that describes every leaf;
  packed  the packed weights and the dense leaves beside them;
  state   what a training run resumes from; absent from `save_packed`.

The arrays of leaf 7 of a part are stored as `{"0007": {name: array}}`, so that
a path may hold any key. Orbax does not checksum data, hence the spec has the
crc32 of every leaf: over the bytes of its arrays, sorted by name, each in C
order and little-endian. The crc32 of the spec itself is over its JSON text with
sorted keys, ", " and ": " as separators.

The planes in a file are those of a whole array, also of a stack of layers,
which in memory are packed one by one.

A codec stores other arrays in place of the planes of a leaf, "entropy" for
instance one array, `coded`; the crc32 stays that of the planes.

A path may be a directory or, with `pip install '.[bucket]'`, a place in a
bucket, such as gs://bucket/net.
"""

import functools
import json
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from tern_jax.core.types import PyTree
from tern_jax.storage import codecs, leaves, places, tensors
from tern_jax.storage.codecs import Codec
from tern_jax.storage.leaves import CheckpointError, Json, Leaf, Path, PathLike
from tern_jax.storage.packed import PackedTernary, validate
from tern_jax.storage.places import Place, explained, locate
from tern_jax.storage.tensors import Entries
from tern_jax.version import version_of

#: Version of the layout that this module writes, and the newest that it reads.
FORMAT = 1
_text = functools.partial(json.dumps, sort_keys=True)


def save_packed(
  path: PathLike,
  tree: PyTree,
  *,
  codec: str = "planes",
  method: object = None,
  overwrite: bool = False,
) -> None:
  """Saves packed weights, and the dense leaves beside them, to a directory.

  The directory appears whole or not at all. An old one that is overwritten
  stays until then: if the process is killed, loads find the one or the other.
  In a bucket nothing keeps another process from saving to the same path.

  Args:
    path: directory to make, parents included, or gs://bucket/path.
    tree: any pytree of arrays and `PackedTernary`.
    codec: how the planes are stored: "planes", two bits a weight; "entropy",
      their entropy, for which constriction is needed, to load them too; or a
      codec of your own, by its name in `tern_jax.storage.codecs.CODECS`.
    method: what made the weights; its repr is kept in the spec.
    overwrite: replace the checkpoint at `path`, once the new one is written.

  Raises:
    ValueError: unknown codec, an invalid packed leaf, or a tree deeper than 64.
    TypeError: a leaf is neither packed nor an array.
    ImportError: codec="entropy" without constriction.
    CheckpointError: the path is taken, or another process is saving there, or
      it cannot be written.

  >>> import tempfile, jax.numpy as jnp
  >>> from tern_jax import Ternary, pack
  >>> t = Ternary(jnp.eye(8, dtype=jnp.int8), jnp.array(2.0), jnp.array(2.0))
  >>> with tempfile.TemporaryDirectory() as directory:
  ...   save_packed(directory + "/net", {"Dense_0": {"kernel": pack(t)}})
  ...   net = load_packed(directory + "/net")
  >>> net["Dense_0"]["kernel"].dequantize()[0].tolist()
  [2.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]
  """
  stored_by = codecs.named(codec)
  path = places.absolute(path)
  parts = parts_of({"packed": tree}, stored_by, method)
  saving = tensors.context()
  saving.array.saving.use_compression = _compressible(parts, stored_by)
  with explained("save", path), places.staged(path, overwrite) as fresh, saving:
    tensors.ocp.save_checkpointables(fresh, tensors.lent(parts))


def load_packed(
  path: PathLike, like: PyTree = None, *, partial: bool = False
) -> PyTree:
  """Loads and verifies what `save_packed` or a `Checkpointer` saved.

  Args:
    path: a checkpoint, a step of a training run, or a run: its latest step.
    like: tree of arrays, or of their shapes, with the paths of the saved tree;
      its shardings are used too. None: nested dicts, no model code needed. Then
      `value`, in which NNX's variables and Linen's boxes hold an array, is no
      key: what is returned goes back by `nnx.replace_by_pure_dict`, or into
      `apply` of Linen.
    partial: `like` has only some of the leaves, and no others are read.

  Returns:
    The saved tree, of the structure of `like`, with `PackedTernary` leaves
    where it was packed. Leaves of `like` that are not arrays stay as they are.

  Raises:
    CheckpointError: nothing there, damaged, from a newer version of the
      format, or of other paths, shapes or dtypes than `like`.
    ImportError: its codec is "entropy", and constriction is missing.
  """
  path = locate(path)
  return load(path, "packed", read_spec(path), like, partial)


def examine(
  path: PathLike, part: str = "packed"
) -> dict[Path, Leaf | CheckpointError]:
  """Loads and verifies each leaf alone, whatever is wrong with the others.

  Damage to the arrays of a leaf is reported for this leaf. All leaves of a part
  share an index, which says where their arrays are: orbax's `_METADATA`,
  OCDBT's manifests and the nodes of its tree. If it cannot be read, no leaf can
  be: any of them may be damaged, or none, and this is reported for each.

  Args:
    path: a checkpoint, a step of a training run, or a run: its latest step.
    part: "packed" or, of a training run, "state".

  Returns:
    {keys: the leaf, on the host, or the CheckpointError of what is wrong}.

  Raises:
    CheckpointError: nothing there, or its spec is damaged, or from a newer
      version, or there is no such part.
    ImportError: its codec is "entropy", and constriction is missing.
  """
  path = locate(path)
  spec = read_spec(path)
  with explained("read", path):
    entries = _entries_of(path, part, spec)
  return dict(_read(path, part, spec, entries))


def read_spec(path: PathLike) -> Json:
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
    sealed = json.loads((path / places.SPEC).read_text("utf-8"))
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
    if spec["codec"] not in codecs.CODECS:
      reads = f"this tern_jax reads {tuple(codecs.CODECS)}: upgrade tern_jax"
      raise CheckpointError(f"{path} has codec {spec['codec']!r}, but {reads}.")
    return spec


def parts_of(
  trees: dict[str, PyTree], codec: Codec, method: object, extra: object = None
) -> dict[str, Json]:
  """Returns {part: arrays by number}, of trees, and the sealed spec."""
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
  spec = {
    "format": FORMAT,
    "versions": {name: version_of(name) for name in packages},
    "codec": codec.name,
    "method": method if isinstance(method, str | None) else repr(method),
    "selected": list(map(leaves.name_of, ternary)),
    "extra": extra,
    "leaves": entries,
  }
  try:
    spec = json.loads(_text(spec))  # what a reader will see
  except TypeError as e:
    raise TypeError(f"extra must be a JSON value: {e}.") from e
  sealed = {"crc32": zlib.crc32(_text(spec).encode()), "spec": spec}
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


def _compressible(parts: dict[str, Json], codec: Codec) -> bool:
  """Whether at least half of the bytes can be compressed at all."""
  packed = parts.get("packed", {}).values()
  sizes = [(name, x.nbytes) for leaf in packed for name, x in leaf.items()]
  coded = sum(size for name, size in sizes if name in codec.arrays)
  return not codec.incompressible or 2 * coded <= sum(n for _, n in sizes)


def load(
  path: Place, part: str, spec: Json, like: PyTree, partial: bool
) -> PyTree:
  """Returns a part of a checkpoint, verified, in the structure of `like`."""
  with explained("read", path):
    entries = _entries_of(path, part, spec)
    wanted, structure = ({}, None) if like is None else leaves.flatten(like)
    if structure is not None:
      if partial:
        entries = {k: e for k, e in entries.items() if k in wanted}
      _check_fit(path, entries, wanted)
    found = {}
    for keys, x in _read(path, part, spec, entries):
      if isinstance(x, CheckpointError):
        raise x
      entry, own = entries[keys], wanted.get(keys)
      if isinstance(x, PackedTernary):
        x = codecs.restored(x, entry, own)
      found[keys] = leaves.place(x, own, "the checkpoint")
    if structure is None:
      return leaves.nest(found, entries.values())
    return jax.tree.unflatten(structure, (wanted | found).values())


def _entries_of(path: Place, part: str, spec: Json) -> Entries:
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
  numbered = (e | {"number": f"{i:04d}"} for i, e in enumerate(entries))
  return dict(zip(paths, numbered, strict=True))


def _check_fit(
  path: Place, entries: Entries, wanted: Mapping[Path, PyTree]
) -> None:
  """Raises unless the wanted leaves are the stored ones, shapes and all."""
  arrays = {k: x for k, x in wanted.items() if hasattr(x, "dtype")}
  named = {k: leaves.name_of(k) for k in (*arrays, *entries)}
  wrong = [f"{named[k]} is not stored" for k in arrays if k not in entries]
  for k, e in entries.items():
    x = arrays.get(k)
    if x is None:
      wrong.append(f"{named[k]} is stored, but not in the tree")
      continue
    # Packed weights may take the place of the dense ones that they stand for.
    kind = "ternary" if leaves.is_whole(x) else e["kind"]
    wants = f"{kind} {x.dtype.name}{list(x.shape)}"
    if (has := f"{e['kind']} {e['dtype']}{e['shape']}") != wants:
      what = f"stored as {has}, but in the tree it is {wants}"
      wrong.append(f"{named[k]} is {what}")
  if wrong:
    raise CheckpointError(f"{path} does not fit the tree: {'; '.join(wrong)}.")


def _read(
  path: Place, part: str, spec: Json, entries: Entries
) -> Iterator[tuple[Path, Leaf | CheckpointError]]:
  """Yields each leaf, verified, or the CheckpointError of what is wrong."""
  codec = codecs.named(spec["codec"])

  def attempt(task: Callable, *args: object) -> Any:
    try:
      with explained("read", path):
        return task(*args)
    except CheckpointError as e:
      return e

  def leaf(keys: Path, entry: Json, together: Json | CheckpointError) -> Leaf:
    if isinstance(together, CheckpointError):
      together = tensors.read(path, part, {keys: entry}, index)
    return _leaf(path, codec, entry, together)

  index = attempt(tensors.index_of, path, part)
  groups = attempt(lambda: list(tensors.groups(entries)))
  for failed in (index, groups):
    if isinstance(failed, CheckpointError):
      yield from dict.fromkeys(entries, failed).items()
      return
  for group in groups:
    # One damaged chunk fails the read of all: then each is read alone.
    together = attempt(tensors.read, path, part, group, index)
    for keys, entry in group.items():
      yield keys, attempt(leaf, keys, entry, together)


def _leaf(path: Place, codec: Codec, entry: Json, stored: Json) -> Leaf:
  """Returns a verified leaf, on the host; its arrays leave `stored`."""
  name, data = leaves.name_of(entry["path"]), stored.pop(entry["number"], {})
  arrays: codecs.Arrays = {
    k: data[k] if k in data else np.zeros(a["shape"], a["dtype"])
    for k, a in entry["arrays"].items()
  }
  x: Any = None
  if entry["kind"] == "ternary":
    try:
      x = codecs.decode(codec, arrays, entry)
    except ValueError as e:
      raise CheckpointError(f"{path}: {name} is damaged: {e}") from e
    arrays = {k: getattr(x, k) for k in leaves.FIELDS}
  if leaves.crc_of(arrays) != entry["crc32"]:
    raise CheckpointError(f"{path}: {name} is damaged: its crc32 differs.")
  validate({name: x})
  if entry["kind"] == "key":
    return jax.random.wrap_key_data(arrays["value"], impl=entry["impl"])
  return arrays["value"] if x is None else x
