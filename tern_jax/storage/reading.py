"""A part of a checkpoint, read and verified leaf by leaf."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from tern_jax.core.types import PyTree
from tern_jax.storage import codecs, digest, leaves, limits, places, tensors
from tern_jax.storage.codecs import Codec
from tern_jax.storage.leaves import (
  CheckpointError,
  Json,
  Leaf,
  MisfitError,
  Path,
)
from tern_jax.storage.packed import PackedTernary, validate
from tern_jax.storage.places import Place, explained
from tern_jax.storage.tensors import Entries


def load(
  path: Place,
  part: str,
  spec: Json,
  like: PyTree,
  partial: bool,
  max_bytes: int | None = None,
  sha256: str | None = None,
) -> PyTree:
  """Returns a part of a checkpoint, verified, in the structure of `like`."""
  with explained("read", path):
    entries = entries_of(path, part, spec)
    wanted, structure = ({}, None) if like is None else leaves.flatten(like)
    if structure is not None:
      if partial:
        entries = {k: e for k, e in entries.items() if k in wanted}
      _check_fit(path, entries, wanted)
    found, content = {}, digest.Digest(entries)
    for keys, x in read(path, part, spec, entries, max_bytes, placed=True):
      if isinstance(x, CheckpointError):
        raise x
      entry, own = entries[keys], wanted.get(keys)
      if sha256 is not None:
        content.add(keys, x)
      if isinstance(x, PackedTernary):
        x = codecs.restored(x, entry, own)
      found[keys] = leaves.place(x, own, "the checkpoint")
    content.check(path, sha256)
    if structure is None:
      return leaves.nest(found, entries)
    return jax.tree.unflatten(structure, (wanted | found).values())


def entries_of(path: Place, part: str, spec: Json) -> Entries:
  """Returns the entries of a part, with the numbers of their arrays."""
  if part not in spec["leaves"]:
    raise MisfitError(f"{path} has packed weights only, no {part}.")
  entries, depth = spec["leaves"][part], leaves.DEPTH
  for e in entries:
    if not leaves.is_path(e["path"]):
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
      what = f"stored as {leaves.printable(has)}, but in the tree it is {wants}"
      wrong.append(f"{named[k]} is {what}")
  if wrong:
    raise MisfitError(f"{path} does not fit the tree: {'; '.join(wrong)}.")


def read(
  path: Place,
  part: str,
  spec: Json,
  entries: Entries,
  max_bytes: int | None,
  placed: bool = False,
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

  def claims(index: Json) -> dict[Path, int]:
    pairs = entries.items()
    return {k: tensors.claimed_bytes(e, index, codec) for k, e in pairs}

  index = attempt(tensors.index_of, path, part)
  failed = isinstance(index, CheckpointError)
  sizes = index if failed else attempt(claims, index)
  if isinstance(sizes, CheckpointError):
    yield from dict.fromkeys(entries, sizes).items()
    return
  groups = list(tensors.groups(entries, sizes))
  # What goes to an accelerator leaves the memory of the host.
  leaves_host = placed and jax.default_backend() != "cpu"
  largest = max((sum(map(sizes.get, group)) for group in groups), default=0)
  limits.check(
    path,
    sum(sizes.values()),
    lambda: places.disk_bytes(path),
    max_bytes,
    held=largest if leaves_host else None,
  )
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
      reason = leaves.printable(e)
      raise CheckpointError(f"{path}: {name} is damaged: {reason}") from e
    arrays = {k: getattr(x, k) for k in leaves.FIELDS}
  if leaves.crc_of(arrays) != entry["crc32"]:
    raise CheckpointError(f"{path}: {name} is damaged: its crc32 differs.")
  validate({name: x})
  if entry["kind"] == "key":
    return jax.random.wrap_key_data(arrays["value"], impl=entry["impl"])
  return arrays["value"] if x is None else x
