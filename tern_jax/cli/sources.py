"""What a path names: a checkpoint, a safetensors or a GGUF file of tern_jax."""

import dataclasses
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from tern_jax import checkpoint, export
from tern_jax.checkpoint import CheckpointError, Place
from tern_jax.cli import foreign
from tern_jax.export import gguf_file
from tern_jax.export import safetensors as safetensors_file
from tern_jax.storage import bucket, codecs, limits
from tern_jax.storage.leaves import Json, Leaf, printable

_WANTED = (
  "give a checkpoint, a run, or a .safetensors or .gguf file of tern_jax"
)
_ENDS = (".safetensors", ".gguf")
# How deep a folder is searched, and how many folders of a level.
_DEPTH = 2
_BREADTH = 1000
# How many are listed.
_LISTED = 10


class Item(NamedTuple):
  """A leaf, or what is wrong with it, and what its file says of it."""

  keys: tuple[str, ...]
  shape: list[int]
  dtype: str
  nbytes: int
  leaf: Leaf | CheckpointError
  is_ternary: bool
  #: Of a tensor in a GGUF file.
  type: str = ""

  @property
  def name(self) -> str:
    """Its path, or the name of its tensor."""
    return "/".join(self.keys)


@dataclasses.dataclass(frozen=True)
class Source:
  """Something to look at.

  Args:
    kind: "checkpoint", "safetensors" or "gguf".
    path: of the folder or file that was found.
    title: what is said of it in a line.
    facts: what it says of itself, for JSON.
    items: its leaves.
  """

  kind: str
  path: Place
  title: str
  facts: Json
  items: list[Item]


class Found(NamedTuple):
  """What kind of thing lies at a path."""

  kind: str
  path: Place


def find(given: str) -> Found:
  """Returns what a path names, or the only such thing in a folder.

  Raises:
    ValueError: nothing there, or of another origin: says what it is.
    OSError: it cannot be read.
  """
  path = checkpoint.absolute(given)
  if not path.name:
    raise ValueError(f"{path} is the root of all folders: {_WANTED}.")
  if isinstance(path, Path):
    if path.is_file():
      return Found(_kind_of_file(path), path)
    if path.exists() and not path.is_dir():
      limits.size_of_file(path)  # says that it is a FIFO, for instance
  else:
    bucket.reach(str(path))
  try:
    return Found("checkpoint", checkpoint.locate(given))
  except CheckpointError as error:
    # It cannot be read at all, or is no folder.
    if error.__cause__ or not path.is_dir():
      raise
    missing = error
  if _holds(path.parent):
    whole = path.parent
    raise CheckpointError(f"{path} is a part of a checkpoint: give {whole}.")
  inside = _inside(path)
  if len(inside) == 1:
    return find(str(inside[0]))
  if inside:
    names = [str(x.relative_to(path)) for x in inside[:_LISTED]]
    names += ["..."] * (len(inside) > _LISTED)
    hint = f"Give one of the {len(inside)} in it: {', '.join(names)}."
  else:
    what = foreign.of_folder(path) if isinstance(path, Path) else ""
    hint = f"It is {what}." if what else ""
    hint = f"{hint} {_WANTED.capitalize()}."
  raise CheckpointError(f"{missing} {hint.strip()}")


def read(found: Found) -> Source:
  """Reads and verifies all leaves.

  Raises:
    ValueError: damaged, so that no leaf can be told.
    OSError: it cannot be read.
  """
  return _READERS[found.kind](found.path)


def parts(found: Found) -> dict[str, dict[Any, Any]]:
  """Returns the verified leaves of each part, or what is wrong with them.

  Raises:
    ValueError: damaged, so that no leaf can be told.
    OSError: it cannot be read.
  """
  if found.kind == "checkpoint":
    names = checkpoint.read_spec(found.path)["leaves"]
    return {part: checkpoint.examine(found.path, part) for part in names}
  return {"packed": {x.keys: x.leaf for x in read(found).items}}


def sha256_of(found: Found) -> str:
  """Returns the digest of the content of what is no GGUF file."""
  if found.kind == "safetensors":
    return export.sha256_of(found.path)
  return checkpoint.sha256_of(found.path)


def load(given: str) -> Any:
  """Returns the tree that a path holds, for exports."""
  found = find(given)
  if found.kind == "gguf":
    raise ValueError(
      f"{found.path} is a GGUF file: its scales are rounded to half precision"
      " and its kernels are transposed, so that it does not tell the network"
      " that it was made of. Export from the checkpoint."
    )
  if found.kind == "safetensors":
    return export.from_safetensors(found.path)
  return checkpoint.load_packed(found.path)


def _kind_of_file(path: Path) -> str:
  what = foreign.of_file(path)
  if what.startswith("a GGUF file"):
    try:
      metadata, tensors = gguf_file.read_header(path)
    except CheckpointError:
      return "gguf"  # a damaged one
    if "tern_jax.format" in metadata:
      return "gguf"
    net = metadata.get("general.architecture", "unknown")
    what += f" of {len(tensors)} tensors, architecture {net}"
    what += ", not written by to_gguf"
  if what.startswith("a safetensors file"):
    metadata = foreign.safetensors_header(path).get("__metadata__", {})
    if "tern_jax" in metadata:
      return "safetensors"
    what = f"{what}, not written by to_safetensors"
  if what == foreign.UNKNOWN and path.suffix == ".safetensors":
    return "safetensors"  # a damaged one
  raise ValueError(f"{path} is a file: {printable(what)}; {_WANTED}.")


def _inside(folder: Place) -> list[Place]:
  """Returns what commands take in a folder: of the first level with any."""
  level = [folder]
  for _ in range(_DEPTH):
    children = itertools.chain.from_iterable(map(_children, level))
    level = list(itertools.islice(children, _BREADTH))
    # An older step must not stand in for the damaged latest one of its run.
    named = (x for x in level if not x.name.isdecimal())
    if found := [x for x in named if _is_taken(x)]:
      return found
  return []


def _children(folder: Place) -> Iterator[Place]:
  try:
    yield from sorted(x for x in folder.iterdir() if not x.name.startswith("."))
  except OSError:
    return  # a file, or one that may not be read


def _is_taken(path: Place) -> bool:
  """Whether commands take it as it is."""
  if path.suffix in _ENDS and path.is_file():
    return True
  try:
    checkpoint.locate(path)
  except ValueError:
    return False
  return True


def _holds(path: Place) -> bool:
  """Whether a folder is itself a checkpoint, and not a run."""
  try:
    return checkpoint.locate(path) == path
  except ValueError:
    return False


def _checkpoint(path: Place) -> Source:
  spec, leaves = checkpoint.read_spec(path), checkpoint.examine(path)
  items = [
    Item(
      keys=tuple(entry["path"]),
      shape=entry["shape"],
      dtype=entry["dtype"],
      nbytes=checkpoint.stored_bytes(entry),
      leaf=leaves[tuple(entry["path"])],
      is_ternary=entry["kind"] == "ternary",
    )
    for entry in spec["leaves"]["packed"]
  ]
  title = f"{spec['method'] or 'no method'}, {spec['codec']}"
  facts = {k: spec[k] for k in ("format", "codec", "method", "versions")}
  return Source("checkpoint", path, title, facts, items)


def _safetensors(path: Any) -> Source:
  items, kinds = [], set()
  for entry, leaf in safetensors_file.examine(path):
    arrays = entry["tensors"]
    kinds |= {entry["kind"]} - {"dense"}
    # The one array, or the last scale.
    *_, last = arrays.values()
    item = Item(
      keys=tuple(entry["path"]),
      shape=entry.get("shape", last["shape"]),
      dtype=last["dtype"],
      nbytes=checkpoint.stored_bytes({"arrays": arrays}),
      leaf=leaf,
      is_ternary=entry["kind"] != "dense",
    )
    items.append(item)
  found = codecs.by_kind()
  codec = ", ".join(sorted(found[kind].name for kind in kinds))
  # Its checksum was compared above.
  said = json.loads(
    foreign.safetensors_header(path)["__metadata__"]["tern_jax"]
  )
  facts = {k: said.get(k) for k in ("format", "version")}
  facts["codec"] = codec or None
  title = f"safetensors, {codec or 'dense arrays'}"
  return Source("safetensors", path, title, facts, items)


def _gguf(path: Any) -> Source:
  metadata, _ = gguf_file.read_header(path)
  items = [
    Item(
      keys=(tensor.name,),
      shape=[*tensor.shape],
      dtype=str(getattr(leaf, "dtype", "unknown")),
      nbytes=tensor.nbytes,
      leaf=leaf,
      is_ternary=tensor.is_ternary,
      type=tensor.type_name,
    )
    for tensor, leaf in gguf_file.examine(path)
  ]
  kinds = sorted({x.type for x in items if x.is_ternary})
  title = f"GGUF, {', '.join(kinds) or 'dense arrays'}"
  facts = {k: metadata.get(f"tern_jax.{k}") for k in ("format", "version")}
  return Source("gguf", path, title, facts, items)


_READERS = {
  "checkpoint": _checkpoint,
  "safetensors": _safetensors,
  "gguf": _gguf,
}
