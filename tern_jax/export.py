"""One file for deployment: safetensors, StableHLO or GGUF, weights packed.

  to_safetensors  planes and scales, checksummed, read by NumPy or by
                  `from_safetensors`; nothing is lost;
  to_stablehlo    the whole computation, run by JAX without the model's code;
  to_gguf         ggml's ternary types, for the tools of llama.cpp's family.

Each writes beside the path, then moves the whole file there; a file that
exists is replaced only if asked. The packages that they need are those of
`pip install 'tern_jax[export]'`.
"""

import contextlib
import importlib
import importlib.metadata
import json
import os
import secrets
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.export as jax_export
import jax.numpy as jnp
import numpy as np

from tern_jax import codec as entropy_codec
from tern_jax.core.containers import Ternary
from tern_jax.core.paths import key_str, path_str
from tern_jax.core.select import KERNEL_NAMES
from tern_jax.storage.packed import PackedTernary, to_ternary, validate

#: Version of the layout that `to_safetensors` writes, the newest that is read.
FORMAT = 1
#: How planes can be stored by `to_safetensors`.
CODECS = ("planes", "entropy")
#: ggml's ternary types: 1.6875 and 2.0625 bits a weight.
GGUF_TYPES = ("TQ1_0", "TQ2_0")

# Tensors of a leaf of each kind.
_PARTS = {
  "dense": ("",),
  "ternary": ("nonzero", "sign", "w_p", "w_n"),
  "coded": ("coded", "w_p", "w_n"),
}
# A deeper tree could overflow the stack of whoever walks it.
_DEPTH = 64
# What safetensors writes from NumPy and reads to it.
_DTYPES = (
  *("bool", "float16", "bfloat16", "float32", "float64", "complex64"),
  *(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)),
)
# Weights that share a scale in ggml's ternary types.
_BLOCK = 256
_HALF_MAX = 65504


def to_safetensors(
  path: str | os.PathLike[str],
  tree: Any,
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
    "kind"     "dense", "ternary" or "coded";
    "tensors"  {tensor: {"dtype": as NumPy calls it, "shape": [...]}}: NAME of
               a dense leaf; NAME.nonzero, NAME.sign, NAME.w_p and NAME.w_n of
               a ternary one; NAME.coded, NAME.w_p and NAME.w_n of a coded one;
               in this order;
    "crc32"    of the tensors' bytes, one after the other, sorted by their name;
    "shape"    of ternary and coded weights;
    "axis"     of ternary and coded weights that the planes pack, or null.

  NAME.nonzero and NAME.sign are uint8. Bit j, least significant first, of byte
  k along the axis belongs to weight 8 k + j along it; if the axis is null, to
  weight 8 k + j of all in C order, and bits beyond the last are zero. A plane
  is thus what `np.packbits(bits, axis, bitorder="little")` returns. A weight
  is 0 if its nonzero bit is 0; else -w_n if its sign bit is 1; else w_p. An
  axis of w_p and w_n is as long as that of the weights, is 1 for one scale
  along the axis, or is n / g for one for each g consecutive weights. NAME.coded
  is the bytes that `tern_jax.codec` makes of both planes.

  Args:
    path: file to write; its folder is made.
    tree: any pytree of arrays and `PackedTernary`; bfloat16 is welcome.
    codec: "planes", two bits a weight, read by NumPy alone; or "entropy", their
      entropy, for which constriction is needed, to load them too.
    overwrite: replace the file at `path`, once the new one is written.

  Raises:
    ValueError: an unknown codec, an invalid packed leaf, two leaves of one
      name, or a tree deeper than 64.
    TypeError: a leaf is neither packed nor an array, or of a dtype that
      safetensors does not have in NumPy.
    ImportError: safetensors, or constriction for the codec, is missing.
    FileExistsError: the path is taken.

  >>> import tempfile
  >>> from tern_jax.storage.packed import pack
  >>> t = Ternary(jnp.eye(8, dtype=jnp.int8), jnp.array(2.0), jnp.array(2.0))
  >>> with tempfile.TemporaryDirectory() as folder:
  ...   to_safetensors(folder + "/net.safetensors", {"kernel": pack(t)})
  ...   net = from_safetensors(folder + "/net.safetensors")
  >>> net["kernel"].dequantize()[0].tolist()
  [2.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]
  """
  numpy_api = _require("safetensors.numpy", "to_safetensors")
  if codec not in CODECS:
    raise ValueError(f"codec must be one of {CODECS}, got {codec!r}.")
  leaves, tensors = [], {}
  for keys, x in _flatten(tree):
    name = _name(keys)
    kind = _kind(x, codec)
    arrays = _arrays(name, kind, x)
    leaf = {
      "path": [key_str(key) for key in keys],
      "name": name,
      "kind": kind,
      "tensors": {k: _describe(a) for k, a in arrays.items()},
      "crc32": _crc(arrays),
    }
    if isinstance(x, PackedTernary):
      leaf |= {"shape": x.shape, "axis": x.axis}
    leaves.append(leaf)
    tensors |= arrays
  facts = {"format": FORMAT, "version": _version(), "leaves": leaves}
  text = json.dumps(facts)
  _check_facts(json.loads(text))
  metadata = {"tern_jax": text, "crc32": str(zlib.crc32(text.encode()))}
  with _fresh(path, overwrite) as fresh:
    numpy_api.save_file(tensors, fresh, metadata)


def from_safetensors(path: str | os.PathLike[str]) -> Any:
  """Loads and verifies what `to_safetensors` saved.

  Nothing in the file is trusted: memory is bounded by its size, names are
  keys and never paths of files.

  Args:
    path: of the file.

  Returns:
    Nested dicts by the components of the paths, with `PackedTernary` leaves
    where the tree was packed; a leaf without a path is the whole tree.

  Raises:
    ValueError: damaged, not written by `to_safetensors`, from a newer version
      of the format, or of 64-bit dtypes while JAX is restricted to 32 bits.
    OSError: the file cannot be read.
    ImportError: safetensors is missing, or constriction for coded weights.
  """
  safetensors = _require("safetensors", "from_safetensors")
  try:
    with safetensors.safe_open(path, "numpy") as file:
      leaves = _read_facts(file.metadata() or {})
      described = {k: t for leaf in leaves for k, t in leaf["tensors"].items()}
      shapes = {k: file.get_slice(k).get_shape() for k in file.offset_keys()}
      if shapes != {k: t["shape"] for k, t in described.items()}:
        raise ValueError("its tensors are not those of its metadata")
      return _nest(leaves, lambda leaf: _read_leaf(file, leaf))
  except (OSError, ImportError):
    raise
  # The package raises errors of its own, and of NumPy on shapes of size 0.
  except Exception as e:
    raise ValueError(f"cannot load {os.fspath(path)}: {e}.") from e


def to_stablehlo(
  path: str | os.PathLike[str] | None,
  apply_fn: Callable[..., Any],
  packed: Any,
  *inputs: Any,
  platforms: tuple[str, ...] = ("cpu", "cuda", "tpu"),
  overwrite: bool = False,
) -> bytes:
  """Saves a network and its weights as one computation, for any batch size.

  The artefact has the weights packed, at 2 bits each, and unpacks them when it
  runs. Neither the model's code nor this package is needed to run it, only
  `jax` and `flatbuffers`:

    with open(path, "rb") as file:
      net = jax.export.deserialize(bytearray(file.read()))
    outputs = net.call(*inputs)

  JAX reads it for at least six months; an older JAX may not read it.

  Args:
    path: file to write; its folder is made. None to only return the bytes.
    apply_fn: pure function of a tree with dense weights, and of the inputs.
    packed: any pytree of arrays with `PackedTernary` leaves, for example
      `{"params": ..., "batch_stats": ...}` of Linen.
    *inputs: examples, pytrees of arrays. The first axis of an array is the
      batch, of any one size; a `jax.ShapeDtypeStruct` is taken as it is.
    platforms: that can run the artefact.
    overwrite: replace the file at `path`, once the new one is written.

  Returns:
    The bytes of the file.

  Raises:
    TypeError: the tree has unpacked ternary weights.
    FileExistsError: the path is taken.

  >>> from tern_jax.storage.packed import pack
  >>> t = Ternary(jnp.eye(8, dtype=jnp.int8), jnp.array(2.0), jnp.array(2.0))
  >>> net = to_stablehlo(None, lambda w, x: x @ w, pack(t), jnp.ones((1, 8)))
  >>> jax.export.deserialize(bytearray(net)).call(jnp.ones((3, 8))).shape
  (3, 8)
  """
  _require("flatbuffers", "to_stablehlo")

  def dense_weights(x: Any) -> Any:
    if isinstance(x, Ternary):
      raise TypeError("the tree has a Ternary: call tern_jax.pack first.")
    if not isinstance(x, PackedTernary):
      return x
    # Otherwise the compiler would unpack constants itself, slowly, and could
    # fuse the unpacking into the model, which then rounds in another order.
    planes = jax.lax.optimization_barrier(x)
    return jax.lax.optimization_barrier(planes.dequantize())

  def call(*inputs: Any) -> Any:
    weights = jax.tree.map(dense_weights, packed, is_leaf=_whole)
    return apply_fn(weights, *inputs)

  (batch,) = jax_export.symbolic_shape("batch")

  def shape_of(x: Any) -> jax.ShapeDtypeStruct:
    if isinstance(x, jax.ShapeDtypeStruct):
      return x
    x = jnp.asarray(x)
    shape = (batch, *x.shape[1:]) if x.ndim else ()
    return jax.ShapeDtypeStruct(shape, x.dtype)

  exported = jax_export.export(jax.jit(call), platforms=platforms)
  data = bytes(exported(*jax.tree.map(shape_of, inputs)).serialize())
  if path is not None:
    with _fresh(path, overwrite) as fresh:
      fresh.write_bytes(data)
  return data


def to_gguf(
  path: str | os.PathLike[str],
  tree: Any,
  type: str = "TQ2_0",
  *,
  channel_axis: int = -1,
  overwrite: bool = False,
) -> dict[str, float]:
  """Saves ternary weights as tensors of ggml's ternary types.

  Every code is exact; the file is read back and compared, by the dequantizer
  of the package `gguf`, before it appears. ggml has one scale d for each 256
  consecutive weights of a row, in half precision:

    w = d code,  with a relative error of d of at most 2^-11 = 4.9e-4.

  That rounding is part of the type (2.5e-4 is typical, none if the scales are
  bfloat16). Nothing else may change a weight, so leaves are refused whose rows
  are no multiple of 256, and those whose w_p and w_n, or whose scales within
  256 weights, do not round to one d from 2^-14 to 65504.

  The rows of ggml lie along the inputs: `ne[0]` is their number. Weights
  [..., in, out] become [..., out, in] in NumPy's order of axes, those with
  `channel_axis=0`, [out, in, ...], become [..., out, in] as well. Dense
  weights called kernel, weight or w likewise; other leaves stay as they lie.

  Tensors are named by their path joined by dots. Floating leaves of at most 32
  bits are stored as F32, float64 and signed integers as they are. The
  architecture is "tern_jax"; `tern_jax.ternary` lists the ternary tensors.

  Args:
    path: file to write; its folder is made.
    tree: any pytree of arrays and `PackedTernary`.
    type: "TQ1_0", 1.6875 bits a weight, or "TQ2_0", 2.0625 bits, faster.
    channel_axis: axis of the output channels of every weight matrix: -1 for
      Flax and Haiku, 0 for Equinox.
    overwrite: replace the file at `path`, once the new one is written.

  Returns:
    {tensor: rms(stored - w) / rms(w)} of the ternary leaves.

  Raises:
    ValueError: leaves do not fit; names each, says why, and what the error
      would be if they were forced to. Or an unknown type, two leaves of one
      name, an invalid packed leaf.
    TypeError: a leaf is neither packed nor an array, or of a dtype that ggml
      does not have.
    FileExistsError: the path is taken.

  >>> import tempfile
  >>> from tern_jax.storage.packed import pack
  >>> codes = jnp.ones((256, 3), jnp.int8)
  >>> tree = {"kernel": pack(Ternary(codes, jnp.array(0.5), jnp.array(0.5)))}
  >>> with tempfile.TemporaryDirectory() as folder:
  ...   to_gguf(folder + "/net.gguf", tree)
  {'kernel': 0.0}
  """
  gguf = _require("gguf", "to_gguf")
  if type not in GGUF_TYPES:
    raise ValueError(f"type must be one of {GGUF_TYPES}, got {type!r}.")
  if channel_axis not in (-1, 0):
    raise ValueError(
      f"channel_axis must be -1 (Flax, Haiku) or 0 (Equinox), got"
      f" {channel_axis}."
    )
  ggml_type = gguf.GGMLQuantizationType[type]
  leaves, tensors, errors, faults = _named(tree), {}, {}, []
  for name, x in leaves.items():
    wrong = _ggml_faults(name, x)
    fit = _fit(x, channel_axis) if isinstance(x, PackedTernary) else None
    if fit and fit.faults:
      wrong += fit.faults
      wrong.append(f"forced, its relative RMS error would be {fit.error:.1e}")
    if wrong:
      faults.append(f"{name}: {'; '.join(wrong)}")
    elif fit:
      errors[name] = fit.error
      tensors[name] = gguf.quantize(fit.rows, ggml_type), ggml_type
    else:
      tensors[name] = _ggml_dense(name, x, channel_axis), None
  if faults:
    raise ValueError(
      f"{type} has one half-precision scale for each {_BLOCK} weights of a"
      f" row, and these leaves do not fit. {'. '.join(faults)}. Unpack"
      " weights to store them as F32."
    )
  with _fresh(path, overwrite) as fresh:
    writer = gguf.GGUFWriter(fresh, "tern_jax")
    try:
      writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{type}"])
      writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
      writer.add_uint32("tern_jax.format", FORMAT)
      writer.add_string("tern_jax.version", _version())
      writer.add_array("tern_jax.ternary", list(errors))
      for name, (data, raw_dtype) in tensors.items():
        writer.add_tensor(name, data, raw_dtype=raw_dtype)
      writer.write_header_to_file()
      writer.write_kv_data_to_file()
      writer.write_tensors_to_file()
    finally:
      writer.close()
    written = {t.name: t for t in gguf.GGUFReader(fresh).tensors}
    for name, x in leaves.items():
      stored, wanted = written[name].data, tensors[name][0]
      if isinstance(x, PackedTernary):
        stored = gguf.dequantize(stored, ggml_type)
        wanted = _fit(x, channel_axis).rows
      if stored.tobytes() != wanted.tobytes():
        raise OSError(f"{path}: {name} was not written as it is.")
  return errors


# Files.


def _require(package: str, task: str) -> Any:
  try:
    return importlib.import_module(package)
  except ImportError as e:
    name = package.partition(".")[0]
    raise ImportError(
      f"{task} needs the package {name}: pip install 'tern_jax[export]'."
    ) from e


@contextlib.contextmanager
def _fresh(path: str | os.PathLike[str], overwrite: bool) -> Iterator[Path]:
  """Yields a path to write to, which becomes the real one if all went well."""
  path = Path(path).absolute()
  taken = f"{path} already exists: pass overwrite=True."
  if os.path.lexists(path) and not overwrite:
    raise FileExistsError(taken)
  path.parent.mkdir(parents=True, exist_ok=True)
  fresh = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
  try:
    fresh.touch()
    mode = fresh.stat().st_mode
    yield fresh
    # Some writers replace the file by one that only its owner may read.
    fresh.chmod(mode)
    with fresh.open("rb") as file:
      os.fsync(file.fileno())
    if overwrite:
      fresh.replace(path)
      return
    try:
      # Unlike a rename, a link never replaces what another writer put there.
      path.hardlink_to(fresh)
    except FileExistsError:
      raise FileExistsError(taken) from None
    except OSError:  # the file system has no links
      if os.path.lexists(path):
        raise FileExistsError(taken) from None
      fresh.rename(path)
  finally:
    fresh.unlink(missing_ok=True)


# Trees.


def _whole(x: Any) -> bool:
  return isinstance(x, Ternary | PackedTernary)


def _flatten(tree: Any) -> list[tuple[Any, Any]]:
  """Returns the leaves of a tree with their key paths, weights whole."""
  leaves = []
  for keys, x in jax.tree_util.tree_leaves_with_path(tree, is_leaf=_whole):
    # A plain number is the array that JAX takes it for.
    x = jnp.asarray(x) if isinstance(x, bool | int | float) else x
    name = path_str(keys) or "the leaf"
    if isinstance(x, Ternary):
      raise TypeError(f"{name} is a Ternary: call tern_jax.pack first.")
    if isinstance(x, PackedTernary):
      validate({name: x})
    elif not isinstance(x, jax.Array | np.ndarray | np.generic):
      raise TypeError(
        f"{name}: leaves must be arrays or PackedTernary, got"
        f" {type(x).__name__}: leave it out of the tree."
      )
    elif not (x.dtype == bool or jnp.issubdtype(x.dtype, jnp.number)):
      raise TypeError(f"{name}: cannot save an array of dtype {x.dtype}.")
    leaves.append((keys, x))
  return leaves


def _name(keys: Any) -> str:
  return path_str(keys).replace("/", ".") or "leaf"


def _named(tree: Any) -> dict[str, Any]:
  """Returns the leaves of a tree by the names of their tensors."""
  leaves = _flatten(tree)
  _check_unique(_name(keys) for keys, _ in leaves)
  return {_name(keys): x for keys, x in leaves}


def _check_unique(names: Iterable[str]) -> None:
  if twice := sorted(name for name, n in Counter(names).items() if n > 1):
    raise ValueError(f"two leaves have the name {', '.join(twice)}")


def _version() -> str:
  try:
    return importlib.metadata.version("tern_jax")
  except importlib.metadata.PackageNotFoundError:
    return "not installed"


# Safetensors.


def _kind(x: Any, codec: str) -> str:
  if not isinstance(x, PackedTernary):
    return "dense"
  return "coded" if codec == "entropy" else "ternary"


def _names(name: str, kind: str) -> dict[str, str]:
  """Returns the names of a leaf's tensors, by the parts of the leaf."""
  return {k: f"{name}.{k}" if k else name for k in _PARTS[kind]}


def _arrays(name: str, kind: str, x: Any) -> dict[str, np.ndarray]:
  """Returns a leaf's arrays on the host, by the names of their tensors."""
  arrays = {}
  for part, tensor in _names(name, kind).items():
    if part == "coded":
      a = np.frombuffer(entropy_codec.encode(x), np.uint8)
    else:
      a = np.asarray(getattr(x, part) if part else x, order="C")
    if a.dtype.name not in _DTYPES:
      raise TypeError(f"{name}: safetensors has no arrays of {a.dtype}.")
    native = a.dtype.newbyteorder("=")
    arrays[tensor] = a if a.dtype.isnative else a.astype(native)
  return arrays


def _describe(x: np.ndarray) -> dict[str, Any]:
  return {"dtype": x.dtype.name, "shape": list(x.shape)}


def _crc(arrays: dict[str, np.ndarray]) -> int:
  crc = 0
  for name in sorted(arrays):
    crc = zlib.crc32(arrays[name].tobytes(), crc)
  return crc


def _read_facts(metadata: dict[str, str]) -> list[dict[str, Any]]:
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


def _check_facts(facts: Any) -> list[dict[str, Any]]:
  """Returns the leaves of metadata, of which nothing is taken on trust."""
  match facts:
    case {"format": int(version)} if version > FORMAT:
      raise ValueError(
        f"it has format {version}, but this tern_jax reads up to {FORMAT}:"
        " upgrade tern_jax"
      )
    case {"format": 1, "leaves": list(leaves)}:
      pass
    case _:
      raise ValueError("its metadata has no format or no leaves")
  for leaf in leaves:
    _check_leaf(leaf)
  _check_unique(name for leaf in leaves for name in leaf["tensors"])
  paths = {tuple(leaf["path"]) for leaf in leaves}
  above = {path[:i] for path in paths for i in range(len(path))}
  if len(paths) < len(leaves) or paths & above:
    raise ValueError("two leaves have one path")
  return leaves


def _check_leaf(leaf: Any) -> None:
  match leaf:
    case {
      "kind": "dense" | "ternary" | "coded" as kind,
      "path": list(path),
      "name": str(name),
      "tensors": dict(tensors),
      "crc32": int(),
    }:
      pass
    case _:
      raise ValueError("its metadata has a leaf that lacks a field")
  if len(path) > _DEPTH or not all(isinstance(key, str) for key in path):
    raise ValueError(f"{name}: a path is up to {_DEPTH} strings, got {path}")
  names = list(_names(name, kind).values())
  if set(tensors) != set(names):
    raise ValueError(f"{name}: the tensors must be {names}")
  for tensor in tensors.values():
    match tensor:
      case {"dtype": str(), "shape": found} if _is_shape(found):
        pass
      case _:
        raise ValueError(f"{name}: a tensor lacks its dtype or shape")
  if kind == "dense":
    return
  match leaf:
    case {"shape": shape, "axis": None | int()} if _is_shape(shape):
      pass
    case _:
      raise ValueError(f"{name}: the weights lack their shape or axis")


def _is_shape(x: Any) -> bool:
  """Says whether a JSON value is a shape that NumPy could have."""
  sizes = isinstance(x, list) and all(type(n) is int for n in x)
  return sizes and len(x) <= 32 and all(0 <= n < 2**63 for n in x)


def _read_leaf(file: Any, leaf: dict[str, Any]) -> Any:
  """Returns a verified leaf."""
  name = leaf["name"]
  arrays = {k: file.get_tensor(k) for k in leaf["tensors"]}
  if {k: _describe(a) for k, a in arrays.items()} != leaf["tensors"]:
    raise ValueError(f"{name}: its dtypes are not those of the metadata")
  if _crc(arrays) != leaf["crc32"]:
    raise ValueError(f"{name} is damaged: its crc32 differs")
  parts = {k: arrays[v] for k, v in _names(name, leaf["kind"]).items()}
  if leaf["kind"] == "dense":
    return _place(parts[""])
  shape = tuple(leaf["shape"])
  if leaf["kind"] == "coded":
    planes = entropy_codec.decode(parts.pop("coded"), shape)
    parts |= dict(zip(("nonzero", "sign"), planes, strict=True))
  x = PackedTernary(**parts, shape=shape, axis=leaf["axis"])
  validate({name: x})
  return jax.tree.map(_place, x)


def _place(x: np.ndarray) -> jax.Array:
  placed = jnp.asarray(x)
  if placed.dtype != x.dtype:
    raise ValueError(f"it has {x.dtype} arrays: set jax_enable_x64")
  return placed


def _nest(leaves: list[dict[str, Any]], read: Callable[[Any], Any]) -> Any:
  """Returns nested dicts of leaves; a leaf without a path is the whole tree."""
  tree: dict[str, Any] = {}
  for leaf in leaves:
    if not leaf["path"]:
      return read(leaf)
    *parents, last = leaf["path"]
    node = tree
    for key in parents:
      node = node.setdefault(key, {})
    node[last] = read(leaf)
  return tree


# GGUF.


class _Fit(NamedTuple):
  """Ternary weights with one half-precision scale a block."""

  #: float32 [..., inputs], the weights as they are stored.
  rows: np.ndarray
  #: Their relative root mean square error.
  error: float
  #: Why they are not stored so.
  faults: list[str]


def _fit(x: PackedTernary, channel_axis: int) -> _Fit:
  """Fits one scale to each block: the common one, or the mean magnitude."""
  codes, w = (_rows(np.asarray(a), channel_axis) for a in _decode(x))
  codes = codes.astype(np.float32)
  w = w.astype(np.promote_types(w.dtype, np.float32))
  n, faults = codes.shape[-1], []
  if pad := -n % _BLOCK:
    faults.append(
      f"rows of {n} weights, no multiple of {_BLOCK} (forced: zeros up to"
      f" {n + pad})"
    )
  widths = [(0, 0)] * (codes.ndim - 1) + [(0, pad)]
  padded = np.pad(codes, widths)
  c = padded.reshape(-1, _BLOCK)
  with np.errstate(over="ignore", invalid="ignore"):
    w = np.pad(w, widths).reshape(c.shape)
    magnitude = c * w
    live = c != 0
    halves = magnitude.astype(np.float16)
    most, least = halves.max(-1), np.where(live, halves, np.inf).min(-1)
    mean = magnitude.sum(-1) / np.maximum(np.count_nonzero(live, -1), 1)
    d = np.clip(np.where(least < most, mean, most), -_HALF_MAX, _HALF_MAX)
    stored = c * d.astype(np.float16).astype(np.float32)[:, None]
    power = np.sum(np.square(w), dtype=np.float64)
    error = np.sum(np.square(stored - w), dtype=np.float64)
    relative = float(np.sqrt(error / power)) if power else 0.0
  if np.any(live & ~((magnitude >= 2.0**-14) & (magnitude <= _HALF_MAX))):
    faults.append("magnitudes outside [2^-14, 65504] (forced: the nearest)")
  if np.any(least < most):
    differ = not np.array_equal(x.w_p, x.w_n)
    what = "w_p and w_n differ" if differ else "its scale changes"
    faults.append(f"{what} within {_BLOCK} weights (forced: their mean)")
  return _Fit(stored.reshape(padded.shape)[..., :n], relative, faults)


@jax.jit
def _decode(x: PackedTernary) -> tuple[jax.Array, jax.Array]:
  """Returns the codes and the weights."""
  return to_ternary(x).codes, x.dequantize()


def _rows(x: np.ndarray, channel_axis: int) -> np.ndarray:
  """Moves the inputs of [..., in, out] or [out, in, ...] to the last axis."""
  if x.ndim < 2:
    return np.atleast_1d(x)
  outputs_inputs = (-1, -2) if channel_axis == -1 else (0, 1)
  return np.moveaxis(x, outputs_inputs, (-2, -1))


def _ggml_faults(name: str, x: Any) -> list[str]:
  """Says what ggml's readers would not accept of a leaf."""
  faults = []
  if len(name.encode()) > 63:
    faults.append("the name is longer than 63 bytes")
  if len(x.shape) > 4:
    faults.append(f"{len(x.shape)} axes are more than 4")
  if not x.size:
    faults.append("it is empty")
  return faults


def _ggml_dense(name: str, x: Any, channel_axis: int) -> np.ndarray:
  """Returns a dense leaf as it is stored."""
  x = np.asarray(x)
  if jnp.issubdtype(x.dtype, jnp.floating) and x.dtype.itemsize <= 4:
    x = x.astype(np.float32)
  elif x.dtype not in (np.float64, np.int8, np.int16, np.int32, np.int64):
    raise TypeError(f"{name}: ggml has no tensors of dtype {x.dtype}.")
  if name.rpartition(".")[-1] in KERNEL_NAMES:
    x = _rows(x, channel_axis)
  return np.ascontiguousarray(x)
