"""Checkpoints that notice damage: packed weights, or a whole training run.

A checkpoint is an orbax checkpoint of up to three parts:

  spec    `{"crc32": ..., "spec": {...}}`: JSON that describes every leaf;
  packed  the packed weights and the dense leaves beside them;
  state   what a training run resumes from; absent from `save_packed`.

The arrays of leaf 7 of a part are stored as `{"0007": {name: array}}`, so that
a path may hold any key. Orbax does not checksum data, hence the spec has the
crc32 of every leaf: over the bytes of its arrays, sorted by name, each in C
order and little-endian. The crc32 of the spec itself is over its JSON text with
sorted keys, ", " and ": " as separators. A crc32 finds damage, not forgery:
whoever changes a file can change that, too. `sha256_of` returns a digest to
publish, and `load_packed(path, sha256=...)` compares it.

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

import jax

from tern_jax.core.types import PyTree
from tern_jax.storage import (
  codecs,
  digest,
  leaves,
  limits,
  places,
  reading,
  tensors,
)
from tern_jax.storage.codecs import Codec
from tern_jax.storage.leaves import CheckpointError, Json, Leaf, Path, PathLike
from tern_jax.storage.packed import check_is_ternary, validate
from tern_jax.storage.places import explained, locate
from tern_jax.storage.reading import load
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
      codec of your own, by its name in `tern_jax.storage.codecs.CODECS`. What
      a codec makes too small to be loaded by default, such as a billion zeros
      and nothing else, is stored as planes.
    method: what made the weights; its repr is kept in the spec.
    overwrite: replace the checkpoint at `path`, once the new one is written.

  Raises:
    ValueError: unknown codec, kernels of which none is packed, an invalid
      packed leaf, or a tree deeper than 64.
    TypeError: latents are given, or a leaf is neither packed nor an array.
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
  check_is_ternary("save_packed", tree)
  stored_by = codecs.named(codec)
  path = places.absolute(path)
  parts = parts_of({"packed": tree}, stored_by, method)
  stored, claimed = _claims(parts, stored_by)
  if not limits.within(claimed, stored):
    stored_by = codecs.PLANES
    parts = parts_of({"packed": tree}, stored_by, method)
  saving = tensors.saving(compressible(parts, stored_by))
  with explained("save", path), places.staged(path, overwrite) as fresh, saving:
    tensors.ocp.save_checkpointables(fresh, tensors.lent(parts))


def load_packed(
  path: PathLike,
  like: PyTree = None,
  *,
  partial: bool = False,
  max_bytes: int | None = None,
  sha256: str | None = None,
) -> PyTree:
  """Loads and verifies what `save_packed` or a `Checkpointer` saved.

  Nothing in the files is trusted; see `tern_jax.storage.limits`.

  Args:
    path: a checkpoint, a step of a training run, or a run: its latest step.
    like: tree of arrays, or of their shapes, with the paths of the saved tree;
      its shardings are used too. None: nested dicts, no model code needed. Then
      `value`, in which NNX's variables and Linen's boxes hold an array, is no
      key: what is returned goes back by `nnx.replace_by_pure_dict`, or into
      `apply` of Linen.
    partial: `like` has only some of the leaves, and no others are read.
    max_bytes: most bytes of arrays to load. None: what fits into the free
      memory, and 1,024 times the bytes on disk or 64 MB, whichever is more.
    sha256: what `sha256_of` returned when the weights were published.

  Returns:
    The saved tree, of the structure of `like`, with `PackedTernary` leaves
    where it was packed. Leaves of `like` that are not arrays stay as they are.

  Raises:
    ValueError: `sha256` is no digest, or is given with `partial`.
    CheckpointError: nothing there, damaged, from a newer version of the
      format, of other paths, shapes or dtypes than `like`, larger than it may
      be, or of another digest.
    ImportError: its codec is "entropy", and constriction is missing.
  """
  if digest.checked(sha256) and partial:
    raise ValueError("sha256 is that of all leaves: it needs partial=False.")
  path = locate(path)
  spec = read_spec(path)
  return load(path, "packed", spec, like, partial, max_bytes, sha256)


def sha256_of(path: PathLike, *, max_bytes: int | None = None) -> str:
  """Returns a digest over the packed weights and the dense leaves beside them.

  It is the same for equal content in any codec, and in a safetensors file; see
  `tern_jax.storage.digest` for the bytes. A few leaves at a time are in memory.

  Args:
    path: a checkpoint, a step of a training run, or a run: its latest step.
    max_bytes: as in `load_packed`.

  Raises:
    CheckpointError: as in `load_packed`.
    ImportError: its codec is "entropy", and constriction is missing.

  >>> import tempfile, jax.numpy as jnp
  >>> with tempfile.TemporaryDirectory() as directory:
  ...   save_packed(directory + "/net", {"bias": jnp.zeros(3)})
  ...   sha256_of(directory + "/net")[:16]
  'c6a2e14d28f52afb'
  """
  path = locate(path)
  spec = read_spec(path)
  with explained("read", path):
    entries = reading.entries_of(path, "packed", spec)
    found = digest.Digest(entries)
    for keys, x in reading.read(path, "packed", spec, entries, max_bytes):
      if isinstance(x, CheckpointError):
        raise x
      found.add(keys, x)
    return found.hexdigest()


def examine(
  path: PathLike, part: str = "packed", *, max_bytes: int | None = None
) -> dict[Path, Leaf | CheckpointError]:
  """Loads and verifies each leaf alone, whatever is wrong with the others.

  Damage to the arrays of a leaf is reported for this leaf. All leaves of a part
  share an index, which says where their arrays are: orbax's `_METADATA`,
  OCDBT's manifests and the nodes of its tree. If it cannot be read, no leaf can
  be: any of them may be damaged, or none, and this is reported for each.

  Args:
    path: a checkpoint, a step of a training run, or a run: its latest step.
    part: "packed" or, of a training run, "state".
    max_bytes: as in `load_packed`.

  Returns:
    {keys: the leaf, on the host, or the CheckpointError of what is wrong}.

  Raises:
    CheckpointError: nothing there, or its spec is damaged, or from a newer
      version, or there is no such part, or it is larger than it may be.
    ImportError: its codec is "entropy", and constriction is missing.
  """
  path = locate(path)
  spec = read_spec(path)
  with explained("read", path):
    entries = reading.entries_of(path, part, spec)
    return dict(reading.read(path, part, spec, entries, max_bytes))


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
      raise CheckpointError(f"{path} has format {spec['format']}, but {reads}.")
    if spec["codec"] not in codecs.CODECS:
      reads = f"this tern_jax reads {tuple(codecs.CODECS)}: upgrade tern_jax"
      codec = _shown(spec["codec"])
      raise CheckpointError(f"{path} has codec {codec}, but {reads}.")
    return spec


def _shown(value: object) -> str:
  """Returns a value of a spec as messages print it."""
  return leaves.printable(repr(value))


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
    "selected": ["/".join(path) or "the leaf" for path in ternary],
    "extra": extra,
    "leaves": entries,
  }
  try:
    spec = json.loads(_text(spec))  # what a reader will see
  except TypeError as e:
    raise TypeError(f"extra must be a JSON value: {e}.") from e
  text = _text(spec)
  limits.check_saved("the spec", text)
  sealed = {"crc32": zlib.crc32(text.encode()), "spec": spec}
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


def _claims(parts: dict[str, Json], codec: Codec) -> tuple[int, int]:
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
  return limits.worth_compressing(arrays, _claims(parts, codec)[1])
