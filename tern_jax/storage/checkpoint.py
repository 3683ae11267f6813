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

The spec of a step of a run has four facts that others have not: "step", its
number; "run", 16 hexadecimal digits that are drawn at the first save of a run
and taken over by all that go on with it; "metric", a number or null; and
"describe", {name: text} of what the run is made of. Steps that older versions
wrote have none of them. A step is a folder whose name is its number, and is
written in `<number>.orbax-checkpoint-tmp`.

What is written is on the disk, and found readable, before it appears at its
path and what it replaces goes: a power cut leaves the old or the new.

A path may be a directory or, with `pip install '.[bucket]'`, a place in a
bucket, such as gs://bucket/net.
"""

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from tern_jax.core.types import PyTree
from tern_jax.storage import codecs, leaves, staging, tensors
from tern_jax.storage.codecs import Codec
from tern_jax.storage.leaves import (
  CheckpointError,
  Json,
  Leaf,
  MisfitError,
  Path,
  PathLike,
)
from tern_jax.storage.packed import PackedTernary, check_is_ternary, validate
from tern_jax.storage.parts import (
  check_readable,
  compressible,
  contents_of,
  parts_of,
)
from tern_jax.storage.places import Place, absolute, again, explained
from tern_jax.storage.steps import opened
from tern_jax.storage.tensors import Entries


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
  stays until the new one has been found readable and is on the disk: if the
  process is killed, or the power fails, loads find the one or the other.
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
    ValueError: unknown codec, kernels of which none is packed, an invalid
      packed leaf, or a tree deeper than 64.
    TypeError: latents are given, or a leaf is neither packed nor an array.
    ImportError: codec="entropy" without constriction.
    CheckpointError: the path is taken, or another process is saving there, or
      it cannot be written, or has a name that orbax could not read.

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
  path = absolute(path)
  parts = parts_of({"packed": tree}, stored_by, method)
  saving = tensors.context()
  saving.array.saving.use_compression = compressible(parts, stored_by)
  check = functools.partial(check_readable, contents=contents_of(parts))
  staged = staging.staged(path, overwrite, check)
  with explained("save", path), staged as fresh, saving:
    tensors.ocp.save_checkpointables(fresh, tensors.lent(parts))


def load_packed(
  path: PathLike, like: PyTree = None, *, partial: bool = False
) -> PyTree:
  """Loads and verifies what `save_packed` or a `Checkpointer` saved.

  If another process replaces it meanwhile, it is loaded again.

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
      format, or of other paths, shapes or dtypes than `like`; or the latest
      step of a run was renamed, or is of another run.
    ImportError: its codec is "entropy", and constriction is missing.
  """

  def attempt() -> PyTree:
    folder, spec = opened(path)
    return load(folder, "packed", spec, like, partial)

  return again(absolute(path), attempt)


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

  def attempt() -> dict[Path, Leaf | CheckpointError]:
    folder, spec = opened(path)
    return dict(_examined(folder, part, spec))

  def is_damaged(found: dict[Path, Leaf | CheckpointError]) -> bool:
    return any(isinstance(x, CheckpointError) for x in found.values())

  return again(absolute(path), attempt, is_damaged)


def verify(path: Place, spec: Json, part: str) -> None:
  """Raises the first CheckpointError of a part, all of which is read."""
  for _, x in _examined(path, part, spec):
    if isinstance(x, CheckpointError):
      raise x


def _examined(
  path: Place, part: str, spec: Json
) -> Iterator[tuple[Path, Leaf | CheckpointError]]:
  with explained("read", path):
    entries = _entries_of(path, part, spec)
  return _read(path, part, spec, entries)


def read_spec(path: PathLike) -> Json:
  """Returns the verified spec of a checkpoint, without loading its arrays.

  It has "format", "versions", "codec", "method", "selected" (the paths of the
  packed leaves), "extra", and "leaves", a list for each part; for a step of a
  run also "step", "run", "metric" and "describe".

  Args:
    path: a checkpoint, a step of a training run, or a run: its latest step.

  Raises:
    CheckpointError: nothing there, damaged, or from a newer version.
  """
  return again(absolute(path), lambda: opened(path)[1])


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
    raise MisfitError(f"{path} has packed weights only, no {part}.")
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
    raise MisfitError(f"{path} does not fit the tree: {'; '.join(wrong)}.")


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
