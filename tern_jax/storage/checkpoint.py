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
from collections.abc import Iterator

from tern_jax.core.types import PyTree
from tern_jax.storage import codecs, digest, limits, reading, staging, tensors
from tern_jax.storage.leaves import CheckpointError, Json, Leaf, Path, PathLike
from tern_jax.storage.packed import check_is_ternary
from tern_jax.storage.parts import (
  check_readable,
  claims,
  compressible,
  contents_of,
  parts_of,
)
from tern_jax.storage.places import Place, absolute, again, explained
from tern_jax.storage.reading import load
from tern_jax.storage.steps import opened


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
  stored, claimed = claims(parts, stored_by)
  if not limits.within(claimed, stored):
    stored_by = codecs.PLANES
    parts = parts_of({"packed": tree}, stored_by, method)
  saving = tensors.saving(compressible(parts, stored_by))
  check = functools.partial(check_readable, contents=contents_of(parts))
  staged = staging.staged(path, overwrite, check)
  with explained("save", path), staged as fresh, saving:
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

  Nothing in the files is trusted; see `tern_jax.storage.limits`. If another
  process replaces them meanwhile, they are loaded again.

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
      be, or of another digest; or the latest step of a run was renamed, or is
      of another run.
    ImportError: its codec is "entropy", and constriction is missing.
  """
  if digest.checked(sha256) and partial:
    raise ValueError("sha256 is that of all leaves: it needs partial=False.")

  def attempt() -> PyTree:
    folder, spec = opened(path)
    return load(folder, "packed", spec, like, partial, max_bytes, sha256)

  return again(absolute(path), attempt)


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

  def attempt() -> str:
    folder, spec = opened(path)
    with explained("read", folder):
      found = digest.Digest(reading.entries_of(folder, "packed", spec))
    for keys, x in _examined(folder, "packed", spec, max_bytes):
      if isinstance(x, CheckpointError):
        raise x
      found.add(keys, x)
    return found.hexdigest()

  return again(absolute(path), attempt)


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

  def attempt() -> dict[Path, Leaf | CheckpointError]:
    folder, spec = opened(path)
    return dict(_examined(folder, part, spec, max_bytes))

  def is_damaged(found: dict[Path, Leaf | CheckpointError]) -> bool:
    return any(isinstance(x, CheckpointError) for x in found.values())

  return again(absolute(path), attempt, is_damaged)


def verify(path: Place, spec: Json, part: str, max_bytes: int | None) -> None:
  """Raises the first CheckpointError of a part, all of which is read."""
  for _, x in _examined(path, part, spec, max_bytes):
    if isinstance(x, CheckpointError):
      raise x


def _examined(
  path: Place, part: str, spec: Json, max_bytes: int | None
) -> Iterator[tuple[Path, Leaf | CheckpointError]]:
  """Yields the leaves of a part, verified, or what is wrong with each."""
  with explained("read", path):
    entries = reading.entries_of(path, part, spec)
    yield from reading.read(path, part, spec, entries, max_bytes)


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
