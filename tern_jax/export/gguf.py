"""GGUF: ggml's ternary types, for the tools of llama.cpp's family."""

import builtins
import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from tern_jax.core.types import PyTree
from tern_jax.export import decoder, files, gguf_file, hub, tokens
from tern_jax.export.decoder import Order
from tern_jax.export.tensors import Plan, Rows, TernaryRows
from tern_jax.storage.leaves import PathLike
from tern_jax.storage.packed import PackedTernary
from tern_jax.version import __version__

#: ggml's ternary types: 1.6875 and 2.0625 bits a weight.
GGUF_TYPES = ("TQ1_0", "TQ2_0")

#: A value of metadata.
Value = bool | int | float | str | Sequence[int] | Sequence[str]
# Those that are not of GGUF_TYPES: a type of two bits, which llama.cpp has had
# since June 2026.
_TYPES = (*GGUF_TYPES, "Q2_0")
_HALF_MAX = 65504
_OWN = "tern_jax"


def to_gguf(
  path: PathLike,
  tree: PyTree,
  type: str = "TQ2_0",
  *,
  channel_axis: int = -1,
  architecture: str = "tern_jax",
  metadata: Mapping[str, Value] | None = None,
  names: Mapping[str, str] | None = None,
  stacked: str | Sequence[str] = (),
  order: Order | None = None,
  shapes: Mapping[str, Sequence[int]] | None = None,
  tokenizer: PathLike | None = None,
  pad_tokens: bool = False,
  overwrite: bool = False,
) -> dict[str, float]:
  """Saves ternary weights as tensors of ggml's ternary types.

  Every code is exact; the file is read back and compared, TQ1_0 and TQ2_0 by
  the dequantizer of the package `gguf`, before it appears. ggml has one scale d
  for each 256 consecutive weights of a row, or 64 in Q2_0, in half precision:

    w = d code,  with a relative error of d of at most 2^-11 = 4.9e-4.

  That rounding is part of the type (2.5e-4 is typical, none if the scales are
  bfloat16). Nothing else may change a weight, so leaves are refused whose rows
  are no multiple of 256, or 64, and those whose w_p and w_n, or whose scales
  within as many weights, do not round to one d from 2^-14 to 65504.

  The rows of ggml lie along the inputs: `ne[0]` is their number. Weights
  [..., in, out] become [..., out, in] in NumPy's order of axes, those with
  `channel_axis=0`, [out, in, ...], become [..., out, in] as well. Kernels of
  attention [in, heads, head_dim] become [heads head_dim, in], and [heads,
  head_dim, out] become [out, heads head_dim], where `channel_axis=-1` of
  `ParamTransform` sees them as such, also in a stack. Dense weights called
  kernel, weight or w likewise; other leaves stay as they lie.

  Tensors are named by their path joined by dots, or by `names`. Floating leaves
  of at most 32 bits are stored as F32, float64 and signed integers as they are.
  `tern_jax.ternary` lists the ternary tensors.

  The architecture is "tern_jax", which no runtime knows. Of a decoder that
  llama.cpp runs, `llama` returns all that it must be told:

    to_gguf("net.gguf", packed, tokenizer="bytes", **llama(config))

  A block of TQ2_0 is 64 bytes of codes, then d. Each half of the bytes has 128
  codes: code 32 j + k, plus 1, is in bits 2 j and 2 j + 1 of its byte k. A
  block of Q2_0 is d, then 16 bytes: code 4 k + j is in those bits of byte k.
  Both are in ggml-common.h of llama.cpp, as is TQ1_0.

  Args:
    path: file to write; its folder is made.
    tree: any pytree of arrays and `PackedTernary`.
    type: "TQ1_0", 1.6875 bits a weight; "TQ2_0", 2.0625 bits, faster; or
      "Q2_0", 2.25 bits, for scales of groups of 64 and for CUDA; llama.cpp has
      read it since June 2026.
    channel_axis: axis of the output channels of every weight matrix: -1 for
      Flax and Haiku, 0 for Equinox.
    architecture: what the file says that its network is.
    metadata: {key: value} to be added, also in place of a tokenizer's. Integers
      are stored as 32 bits without a sign where they fit, numbers as F32.
    names: {pattern of a path: tensor}. A pattern is the end of a path, or all
      of it if it begins with a slash; a * in both is the number of a layer:
      {"layers/*/mlp/up_proj/kernel": "blk.*.ffn_up.weight"}. Each leaf must
      have a name. A tensor token_embd.weight stays as it lies, [vocab, width].
    stacked: patterns of leaves whose first axis enumerates layers, as made by
      `nn.scan`. Each layer becomes a tensor; its number stands in the path
      behind what the pattern matches: of "layers", layers/mlp/kernel becomes
      layers/0/mlp/kernel and so on. A leaf whose path has a number there is one
      layer already.
    order: {tensor: ("pairs", heads)} of queries and keys that the tree rotates
      by halves and the runtime by pairs; ("halves", heads) the other way round.
    shapes: {tensor: shape} of all tensors that there must be, in NumPy's order.
    tokenizer: "bytes", of which token i is byte i; the path of a tokenizer.json
      of Hugging Face with byte-level BPE; or None, and a runtime takes numbers
      of tokens alone. For what is read see `tern_jax.export.tokens`.
    pad_tokens: name rows of the embedding for which the tokenizer has no tokens
      as unused, which is an error otherwise.
    overwrite: replace the file at `path`, once the new one is written.

  Returns:
    {tensor: rms(stored - w) / rms(w)} of the ternary leaves.

  Raises:
    ValueError: leaves do not fit; names each, says why, and what the error
      would be if they were forced to. Or an unknown type, two leaves of one
      name, an invalid packed leaf; a tensor that is missing, superfluous or of
      another shape; a tokenizer that does not fit the vocabulary, or that
      llama.cpp would not follow.
    TypeError: a leaf is neither packed nor an array, or of a dtype that ggml
      does not have; or a value of metadata is of another type.
    FileExistsError: the path is taken.

  >>> import tempfile
  >>> from tern_jax import Ternary, pack
  >>> codes = jnp.ones((256, 3), jnp.int8)
  >>> tree = {"kernel": pack(Ternary(codes, jnp.array(0.5), jnp.array(0.5)))}
  >>> with tempfile.TemporaryDirectory() as folder:
  ...   to_gguf(folder + "/net.gguf", tree)
  {'kernel': 0.0}
  """
  gguf = files.require("gguf", "to_gguf")
  if type not in _TYPES:
    raise ValueError(f"type must be one of {_TYPES}, got {type!r}.")
  plan = Plan(channel_axis, names, stacked, order or {}, shapes)
  sources = plan.sources(tree)
  ternary = [x.name for x in sources if isinstance(x.leaf, PackedTernary)]
  kind = gguf_file.TERNARY[type]
  facts = {
    "general.file_type": kind.file_type if ternary else 0,
    "general.quantization_version": gguf.GGML_QUANT_VERSION,
    f"{_OWN}.format": files.FORMAT,
    f"{_OWN}.version": __version__,
    f"{_OWN}.ternary": ternary,
  }
  given = dict(metadata or {})
  facts |= _checked(given, facts)
  for key, x in tokens.of(tokenizer, architecture, given, pad_tokens).items():
    facts.setdefault(key, x)
  tensors, errors = _fitted(gguf, kind, plan.rows(sources))
  with files.fresh_file(path, overwrite) as fresh:
    with contextlib.closing(gguf.GGUFWriter(fresh, architecture)) as writer:
      for key, x in facts.items():
        _add(writer, key, x)
      # An older package does not know the type.
      gguf.GGML_QUANT_SIZES.setdefault(kind.number, (kind.block, kind.nbytes))
      for name, data in tensors.items():
        raw_dtype = kind.number if name in errors else None
        writer.add_tensor(name, data, raw_dtype=raw_dtype)
      writer.write_header_to_file()
      writer.write_kv_data_to_file()
      writer.write_tensors_to_file()
    stored = _reader(gguf, fresh, kind)
    for rows in plan.rows(sources):
      wanted = tensors[rows.name]
      if isinstance(rows, TernaryRows):
        wanted, *_ = _fit(rows, kind.block)
      if stored(rows.name).tobytes() != wanted.tobytes():
        raise OSError(f"{path}: {rows.name} was not written as it is.")
  return errors


def _command(
  path: PathLike,
  tree: PyTree,
  config: PathLike | None = None,
  rope: str = "halves",
  names: PathLike | None = None,
  stacked: str | None = None,
  **options: Any,
) -> dict[str, float]:
  """Writes what the command was asked for."""
  given = None if names is None else hub.read_names(names)
  if config is not None:
    facts = hub.read_config(config, rope)
    options |= decoder.llama(facts, names=given, stacked=stacked or "layers")
  elif rope != "halves":
    raise ValueError(f"--rope {rope} needs --config CONFIG.JSON.")
  else:
    options |= {"names": given, "stacked": stacked or ()}
  return to_gguf(path, tree, **options)


_OPTIONS = {
  "type": {"choices": _TYPES, "default": "TQ2_0"},
  "channel_axis": {"type": int, "choices": (-1, 0), "default": -1},
  **hub.OPTIONS,
  "tokenizer": {"metavar": "bytes|TOKENIZER.JSON"},
  "pad_tokens": {"action": "store_true"},
}
GGUF = files.Writer(_command, _OPTIONS)


def _checked(
  given: dict[str, Value], own: Mapping[str, Value]
) -> dict[str, Value]:
  """Returns metadata of the user's, which must be of types that GGUF has."""
  for key, x in given.items():
    if key in own or key in ("general.architecture", "general.alignment"):
      raise ValueError(f"metadata has {key}, which to_gguf writes itself.")
    values = [x] if isinstance(x, str) or not isinstance(x, Sequence) else x
    kinds = {builtins.type(v) for v in values}
    if len(kinds) != 1 or not kinds <= {bool, int, float, str}:
      raise TypeError(
        f"metadata has {key}: {x!r}, but a value is a bool, an int, a float, a"
        " str, or a sequence of one of them that is not empty."
      )
  return given


def _add(writer: Any, key: str, x: Value) -> None:
  if isinstance(x, bool):
    writer.add_bool(key, x)
  elif isinstance(x, int):
    short = writer.add_uint32 if 0 <= x < 1 << 32 else writer.add_int64
    short(key, x)
  elif isinstance(x, float):
    writer.add_float32(key, x)
  elif isinstance(x, str):
    writer.add_string(key, x)
  else:
    writer.add_array(key, list(x))


def _fitted(
  gguf: Any, kind: gguf_file.Ternary, found: Iterable[Rows]
) -> tuple[dict[str, np.ndarray], dict[str, float]]:
  """Returns tensors as they are stored, and the errors of ternary ones."""
  tensors, errors, faults = {}, {}, []
  for rows in found:
    name, wrong = rows.name, _faults(rows)
    if isinstance(rows, TernaryRows):
      stored, errors[name], misfits = _fit(rows, kind.block)
      if misfits:
        forced = f"forced, its relative RMS error would be {errors[name]:.1e}"
        wrong += [*misfits, forced]
      if not wrong:
        tensors[name] = _encoded(gguf, kind, stored)
    elif not wrong:
      tensors[name] = _dense(rows)
    if wrong:
      faults.append(f"{name}: {'; '.join(wrong)}")
  if faults:
    raise ValueError(
      f"{kind.name} has one half-precision scale for each {kind.block} weights"
      f" of a row, and these leaves do not fit. {'. '.join(faults)}. Unpack"
      " weights to store them as F32."
    )
  return tensors, errors


def _fit(rows: TernaryRows, block: int) -> tuple[np.ndarray, float, list[str]]:
  """Fits one scale to each block: the common one, or the mean magnitude."""
  codes, w = rows.codes, rows.x
  n, faults = codes.shape[-1], []
  if pad := -n % block:
    forced = f"(forced: zeros up to {n + pad})"
    faults.append(f"rows of {n} weights, no multiple of {block} {forced}")
  widths = [(0, 0)] * (codes.ndim - 1) + [(0, pad)]
  padded = np.pad(codes, widths)
  c = padded.reshape(-1, block)
  with np.errstate(over="ignore", invalid="ignore"):
    w = np.pad(w, widths).reshape(c.shape)
    magnitude, live = c * w, c != 0
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
    what = "its scale changes"
    if rows.magnitudes_differ:
      what = "w_p and w_n differ"
    faults.append(f"{what} within {block} weights (forced: their mean)")
  # The weights as they would be stored, their error, and what forbids it.
  return stored.reshape(padded.shape)[..., :n], relative, faults


def _encoded(
  gguf: Any, kind: gguf_file.Ternary, stored: np.ndarray
) -> np.ndarray:
  """Returns the blocks of weights that fit."""
  if kind.name != "Q2_0":
    return gguf.quantize(stored, gguf.GGMLQuantizationType(kind.number))
  blocks = stored.reshape(-1, kind.block)
  scales = np.abs(blocks).max(-1, keepdims=True).astype("<f2")
  codes = (np.sign(blocks) + 1).astype(np.uint8).reshape(len(blocks), -1, 4)
  codes = np.bitwise_or.reduce(codes << np.arange(0, 8, 2, dtype=np.uint8), -1)
  data = np.concatenate([scales.view(np.uint8), codes], -1)
  return data.reshape(*stored.shape[:-1], -1)


def _reader(
  gguf: Any, path: Path, kind: gguf_file.Ternary
) -> Callable[[str], np.ndarray]:
  """Returns what returns the values of a tensor in a file, by its name."""
  if kind.name == "Q2_0":  # of which the package has no dequantizer
    _, tensors = gguf_file.read_header(path)
    found = {x.name: x for x in tensors}
    return lambda name: gguf_file.values(path, found[name])
  stored = {x.name: x for x in gguf.GGUFReader(path).tensors}

  def values(name: str) -> np.ndarray:
    data, of = stored[name].data, stored[name].tensor_type
    return gguf.dequantize(data, of) if of.name == kind.name else data

  return values


def _faults(rows: Rows) -> list[str]:
  """Returns what ggml's readers would not accept of a tensor."""
  faults = {
    "the name is longer than 63 bytes": len(rows.name.encode()) > 63,
    f"{rows.x.ndim} axes are more than 4": rows.x.ndim > 4,
    "it is empty": not rows.x.size,
  }
  return [what for what, wrong in faults.items() if wrong]


def _dense(rows: Rows) -> np.ndarray:
  """Returns a dense tensor as it is stored."""
  x = rows.x
  if jnp.issubdtype(x.dtype, jnp.floating) and x.dtype.itemsize <= 4:
    x = x.astype(np.float32)
  elif x.dtype not in (np.float64, np.int8, np.int16, np.int32, np.int64):
    raise TypeError(f"{rows.name}: ggml has no tensors of dtype {x.dtype}.")
  return np.ascontiguousarray(x)
