"""Safetensors: planes and scales, checksummed; nothing is lost."""

import contextlib
import json
import os
import zlib
from collections.abc import Iterator
from typing import Any

import jax

from tern_jax.core.types import PyTree
from tern_jax.export import files
from tern_jax.storage import codecs, digest, leaves, limits
from tern_jax.storage.leaves import Json, PathLike
from tern_jax.storage.packed import PackedTernary, validate
from tern_jax.version import __version__

#: Names of the codecs that come with the package.
CODECS = tuple(codecs.CODECS)

# What safetensors writes from NumPy and reads to it.
_DTYPES = (
  *("bool", "float16", "bfloat16", "float32", "float64", "complex64"),
  *(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)),
)


def to_safetensors(
  path: PathLike,
  tree: PyTree,
  *,
  codec: str = "planes",
  overwrite: bool = False,
) -> None:
  """Saves packed weights, and the dense leaves beside them, to one file.

  A standard safetensors file: 8 bytes N, little-endian; N bytes of JSON,
  `{tensor: {"dtype", "shape", "data_offsets"}}`; then the tensors, in C order
  and little-endian. Its `__metadata__` has two strings, "tern_jax", which is
  JSON itself, and "crc32", that of the former's UTF-8 bytes in decimals:

    {"format": 1, "version": that of tern_jax, "leaves": [LEAF, ...]}

  with, for each leaf of the tree,

    "path"     list of strings: the keys that lead to the leaf;
    "name"     what its tensors are called: the path joined by dots;
    "kind"     "dense", "ternary" or "coded", or that of another codec;
    "tensors"  {tensor: {"dtype": as NumPy calls it, "shape": [...]}}: NAME of
               a dense leaf; NAME.nonzero, NAME.sign, NAME.w_p and NAME.w_n of
               a ternary one; NAME.coded, NAME.w_p and NAME.w_n of a coded one;
               in this order;
    "crc32"    of the tensors' bytes, one after the other, sorted by their name;
    "shape"    of ternary and coded weights;
    "axis"     of ternary and coded weights that the planes pack, or null;
    "lead"     only where `pack` would do otherwise: how many leading axes were
               not packed in memory; in the file the planes are of the whole;
    "boxed"    only where the path ends in "value": whether that is no key, but
               the field of a box, a variable of NNX for instance.

  NAME.nonzero and NAME.sign are uint8. Bit j, least significant first, of byte
  k along the axis belongs to weight 8 k + j along it; if the axis is null, to
  weight 8 k + j of all in C order, and bits beyond the last are zero. A plane
  is thus what `np.packbits(bits, axis, bitorder="little")` returns. A weight
  is 0 if its nonzero bit is 0; else -w_n if its sign bit is 1; else w_p. An
  axis of w_p and w_n is as long as that of the weights, is 1 for one scale
  along the axis, or is n / g for one for each g consecutive weights. NAME.coded
  is the bytes that `tern_jax.codec` makes of both planes.

  The crc32s find damage, not forgery: whoever changes the file can change them,
  too. `sha256_of` returns a digest to publish.

  Args:
    path: file to write; its folder is made.
    tree: any pytree of arrays and `PackedTernary`; bfloat16 is welcome.
    codec: "planes", two bits a weight, read by NumPy alone; "entropy", their
      entropy, for which constriction is needed, to load them too; or a codec
      of your own, by its name in `tern_jax.storage.codecs.CODECS`. What a codec
      makes too small to be loaded by default, such as a billion zeros and
      nothing else, is stored as planes.
    overwrite: replace the file at `path`, once the new one is written.

  Raises:
    ValueError: an unknown codec, an invalid packed leaf, two leaves of one
      name, or a tree deeper than 64.
    TypeError: a leaf is neither packed nor an array, or of a dtype that
      safetensors does not have in NumPy.
    ImportError: safetensors, or constriction for the codec, is missing.
    FileExistsError: the path is taken.

  >>> import tempfile, jax.numpy as jnp
  >>> from tern_jax import Ternary, pack
  >>> t = Ternary(jnp.eye(8, dtype=jnp.int8), jnp.array(2.0), jnp.array(2.0))
  >>> with tempfile.TemporaryDirectory() as folder:
  ...   to_safetensors(folder + "/net.safetensors", {"kernel": pack(t)})
  ...   net = from_safetensors(folder + "/net.safetensors")
  >>> net["kernel"].dequantize()[0].tolist()
  [2.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]
  """
  numpy_api = files.require("safetensors.numpy", "to_safetensors")
  stored_by = codecs.named(codec)
  entries, tensors = _encode_all(tree, stored_by)
  stored, claims = _claims(entries)
  if not limits.within(sum(claims), stored):
    entries, tensors = _encode_all(tree, codecs.PLANES)
  facts = {"format": files.FORMAT, "version": __version__, "leaves": entries}
  text = json.dumps(facts)
  limits.check_saved("the header", text)
  _check_facts(json.loads(text))
  metadata = {"tern_jax": text, "crc32": str(zlib.crc32(text.encode()))}
  with files.fresh_file(path, overwrite) as fresh:
    numpy_api.save_file(tensors, fresh, metadata)


def from_safetensors(
  path: PathLike, *, max_bytes: int | None = None, sha256: str | None = None
) -> PyTree:
  """Loads and verifies what `to_safetensors` saved.

  Nothing in the file is trusted: memory is bounded by its size, names are
  keys and never paths of files.

  Args:
    path: a file, or a link to one.
    max_bytes: most bytes of arrays to load. None: what fits into the free
      memory, and 1,024 times the bytes on disk or 64 MB, whichever is more.
    sha256: what `sha256_of` returned when the weights were published, for this
      file or for a checkpoint of the same tree.

  Returns:
    Nested dicts by the components of the paths, with `PackedTernary` leaves
    where the tree was packed; a leaf without a path is the whole tree.

  Raises:
    ValueError: damaged, not written by `to_safetensors`, from a newer version
      of the format, of 64-bit dtypes while JAX is restricted to 32 bits, larger
      than it may be, or of another digest; or `sha256` is no digest.
    OSError: the file cannot be read.
    ImportError: safetensors is missing, or constriction for coded weights.
  """
  digest.checked(sha256)
  with _opened(path, "from_safetensors", max_bytes) as (file, entries):
    found, content = {}, digest.Digest(entries)
    for keys, entry in entries.items():
      x = _decode(file, entry)
      if sha256 is not None:
        content.add(keys, x)
      if isinstance(x, PackedTernary):
        x = codecs.restored(x, entry)
      found[keys] = leaves.place(x)
    content.check("it", sha256)
    return leaves.nest(found, entries)


def sha256_of(path: PathLike, *, max_bytes: int | None = None) -> str:
  """Returns a digest over what a file holds, one leaf at a time in memory.

  It is that of `tern_jax.checkpoint.sha256_of` for a checkpoint of the same
  tree, in any codec; see `tern_jax.storage.digest` for the bytes.

  Args:
    path: a file, or a link to one.
    max_bytes: as in `from_safetensors`.

  Raises:
    ValueError: as in `from_safetensors`.
    OSError: the file cannot be read.
    ImportError: safetensors is missing, or constriction for coded weights.
  """
  with _opened(path, "sha256_of", max_bytes) as (file, entries):
    content = digest.Digest(entries)
    for keys, entry in entries.items():
      content.add(keys, _decode(file, entry))
    return content.hexdigest()


def examine(
  path: PathLike,
) -> list[tuple[Json, leaves.Leaf | leaves.CheckpointError]]:
  """Loads and verifies each leaf alone, whatever is wrong with the others.

  Returns:
    What the file says of each leaf, and the leaf, on the host, or the
    CheckpointError of what is wrong.

  Raises:
    ValueError: as in `from_safetensors`, if no leaf can be told.
    OSError: the file cannot be read.
    ImportError: safetensors is missing, or constriction for coded weights.
  """
  with _opened(path, "examine", None) as (file, entries):
    return [(e, _examined(path, file, e)) for e in entries.values()]


def _examined(
  path: PathLike, file: Any, entry: Json
) -> leaves.Leaf | leaves.CheckpointError:
  try:
    return _decode(file, entry)
  except (OSError, ImportError):
    raise
  except Exception as e:  # also of the package, and of NumPy
    reason = leaves.printable(e, 2000).removesuffix(".")
    return leaves.CheckpointError(f"{os.fspath(path)}: {reason}.")


@contextlib.contextmanager
def _opened(
  path: PathLike, task: str, max_bytes: int | None
) -> Iterator[tuple[Any, dict[leaves.Path, Json]]]:
  """Yields an open file and its leaves by path; says what fails of which."""
  safetensors = files.require("safetensors", task)
  path = files.local_file(path)
  try:
    size = limits.size_of_file(path)
    with open(path, "rb") as start:
      header = int.from_bytes(start.read(8), "little")
    if header <= size:  # else the package says so
      limits.check_json(path, "the header.json", header)
    with safetensors.safe_open(path, "numpy") as file:
      entries = _read_facts(file.metadata() or {})
      described = {k: t for e in entries for k, t in e["tensors"].items()}
      shapes = {k: file.get_slice(k).get_shape() for k in file.offset_keys()}
      if shapes != {k: t["shape"] for k, t in described.items()}:
        raise ValueError("its tensors are not those of its metadata")
      _, claims = _claims(entries)
      # What goes to an accelerator leaves the memory of the host.
      on_host = jax.default_backend() == "cpu"
      held = None if on_host else max(claims, default=0)
      limits.check("it", sum(claims), lambda: size, max_bytes, held)
      yield file, {tuple(e["path"]): e for e in entries}
  except (OSError, ImportError):
    raise
  # The package raises errors of its own, and of NumPy on shapes of size 0.
  except Exception as e:
    reason = leaves.printable(e, 2000).removesuffix(".")
    raise ValueError(f"cannot load {os.fspath(path)}: {reason}.") from e


def _claims(entries: list[Json]) -> tuple[int, list[int]]:
  """Returns the bytes of all tensors, and those of each leaf and its planes."""
  sizes, claims = [], []
  for e in entries:
    sizes.append(sum(map(leaves.size_of, e["tensors"].values())))
    claims.append(sizes[-1])
    if codec := codecs.by_kind().get(e["kind"]):
      claims[-1] += codecs.decoded_bytes(codec, tuple(e["shape"]))
  return sum(sizes), claims


SAFETENSORS = files.Writer(
  to_safetensors, {"codec": {"choices": codecs.CODECS, "default": "planes"}}
)


def _encode_all(
  tree: PyTree, codec: codecs.Codec
) -> tuple[list[Json], codecs.Arrays]:
  """Returns what the metadata says of all leaves, and their tensors."""
  entries, tensors, boxes = [], {}, leaves.boxes(tree)
  for keys, x in files.checked_leaves(tree).items():
    entry, arrays = _encode(keys, x, codec)
    entries.append(entry | boxes.get(keys, {}))
    tensors |= arrays
  return entries, tensors


def _encode(
  path: leaves.Path, x: leaves.Leaf, codec: codecs.Codec
) -> tuple[Json, codecs.Arrays]:
  """Returns what the metadata says of a leaf, and its tensors."""
  name = files.tensor_name(path)
  if isinstance(x, PackedTernary):
    x, layout = codecs.stored(leaves.host_packed(x))
    kind, extra = codec.kind or codec.name, {"shape": x.shape} | layout
    arrays = codecs.encode(codec, x)
  else:
    kind, extra, arrays = "dense", {}, {"": leaves.host(x)}
  for a in arrays.values():
    if a.dtype.name not in _DTYPES:
      raise TypeError(f"{name}: safetensors has no arrays of {a.dtype}.")
  names = _names(name, kind)
  tensors = {names[part]: a for part, a in arrays.items()}
  entry: Json = {"path": list(path), "name": name, "kind": kind}
  entry["tensors"] = leaves.describe(tensors)
  entry["crc32"] = leaves.crc_of(tensors)
  return entry | extra, tensors


def _names(name: str, kind: str) -> dict[str, str]:
  """Returns the names of a leaf's tensors, by the parts of the leaf."""
  if kind == "dense":
    return {"": name}
  parts = (*codecs.by_kind()[kind].arrays, "w_p", "w_n")
  return {part: f"{name}.{part}" for part in parts}


def _read_facts(metadata: dict[str, str]) -> list[Json]:
  """Returns the leaves that a file's metadata describes."""
  text = metadata.get("tern_jax")
  if text is None:
    raise ValueError("it was not written by tern_jax.export.to_safetensors")
  if metadata.get("crc32") != str(zlib.crc32(text.encode())):
    raise ValueError("its metadata is damaged: crc32 differs")
  try:
    facts = json.loads(text)
  except (ValueError, RecursionError) as e:
    raise ValueError("its metadata is no JSON") from e
  return _check_facts(facts)


def _check_facts(facts: Json) -> list[Json]:
  """Returns the leaves of metadata, of which nothing is taken on trust."""
  match facts:
    case {"format": int(version)} if version > files.FORMAT:
      reads = f"but this tern_jax reads up to {files.FORMAT}: upgrade tern_jax"
      raise ValueError(f"it has format {version}, {reads}")
    case {"format": 1, "leaves": list(entries)}:
      pass
    case _:
      raise ValueError("its metadata has no format or no leaves")
  for entry in entries:
    _check_leaf(entry)
  files.check_unique(name for e in entries for name in e["tensors"])
  if leaves.clash([tuple(e["path"]) for e in entries]):
    raise ValueError("two leaves have one path")
  return entries


def _check_leaf(leaf: Json) -> None:
  match leaf:
    case {
      "kind": str(kind),
      "path": list(path),
      "name": str(name),
      "tensors": dict(tensors),
      "crc32": int(),
    } if kind in {"dense", *codecs.by_kind()}:
      pass
    case _:
      raise ValueError("its metadata has a leaf that lacks a field")
  depth = leaves.DEPTH
  if not leaves.is_path(path):
    raise ValueError(f"{name}: a path is up to {depth} strings, got {path}")
  names = list(_names(name, kind).values())
  if set(tensors) != set(names):
    raise ValueError(f"{name}: the tensors must be {names}")
  for tensor in tensors.values():
    match tensor:
      case {"dtype": str(), "shape": found} if leaves.is_shape(found):
        pass
      case _:
        raise ValueError(f"{name}: a tensor lacks its dtype or shape")
  match leaf:
    case {"kind": "dense"}:
      pass
    case {"shape": shape, "axis": None | int()} if leaves.is_shape(shape):
      codecs.check_lead(leaf)
    case _:
      raise ValueError(f"{name}: the weights lack their shape or axis")


def _decode(file: Any, leaf: Json) -> leaves.Leaf:
  """Returns a verified leaf on the host, its planes those of the whole."""
  name, kind = leaf["name"], leaf["kind"]
  tensors = {k: file.get_tensor(k) for k in leaf["tensors"]}
  if leaves.describe(tensors) != leaf["tensors"]:
    raise ValueError(f"{name}: its dtypes are not those of the metadata")
  if leaves.crc_of(tensors) != leaf["crc32"]:
    raise ValueError(f"{name} is damaged: its crc32 differs")
  if kind == "dense":
    return tensors[name]
  arrays = {part: tensors[k] for part, k in _names(name, kind).items()}
  x = codecs.decode(codecs.by_kind()[kind], arrays, leaf)
  validate({name: x})
  return x
