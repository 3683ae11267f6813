"""GGUF: ggml's ternary types, for the tools of llama.cpp's family."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np

from tern_jax.core.axes import Axes, attention
from tern_jax.core.types import PyTree
from tern_jax.export import files
from tern_jax.storage.leaves import Leaf, PathLike
from tern_jax.storage.packed import PackedTernary, to_ternary
from tern_jax.version import __version__

#: ggml's ternary types: 1.6875 and 2.0625 bits a weight.
GGUF_TYPES = ("TQ1_0", "TQ2_0")

# Dense leaves that are laid out as ternary ones are.
_KERNELS = ("kernel", "weight", "w")
# Weights that share a scale in ggml's ternary types.
_BLOCK = 256
_HALF_MAX = 65504


def to_gguf(
  path: PathLike,
  tree: PyTree,
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
  `channel_axis=0`, [out, in, ...], become [..., out, in] as well. Kernels of
  attention [in, heads, head_dim] become [heads head_dim, in], and [heads,
  head_dim, out] become [out, heads head_dim], where `channel_axis=-1` of
  `ParamTransform` sees them as such, also in a stack. Dense weights called
  kernel, weight or w likewise; other leaves stay as they lie.

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
  >>> from tern_jax import Ternary, pack
  >>> codes = jnp.ones((256, 3), jnp.int8)
  >>> tree = {"kernel": pack(Ternary(codes, jnp.array(0.5), jnp.array(0.5)))}
  >>> with tempfile.TemporaryDirectory() as folder:
  ...   to_gguf(folder + "/net.gguf", tree)
  {'kernel': 0.0}
  """
  gguf = files.require("gguf", "to_gguf")
  if type not in GGUF_TYPES:
    raise ValueError(f"type must be one of {GGUF_TYPES}, got {type!r}.")
  if channel_axis not in (-1, 0):
    wanted = "-1 (Flax, Haiku) or 0 (Equinox)"
    raise ValueError(f"channel_axis must be {wanted}, got {channel_axis}.")
  found = files.checked_leaves(tree)
  files.check_unique(map(files.tensor_name, found))
  leaves = {files.tensor_name(keys): x for keys, x in found.items()}
  shapes = {files.tensor_name(keys): x.shape for keys, x in found.items()}
  heads = attention(shapes) if channel_axis == -1 else {}
  ggml_type = gguf.GGMLQuantizationType[type]
  tensors, errors, faults = {}, {}, []
  for name, x in leaves.items():
    wrong = _faults(name, x)
    if isinstance(x, PackedTernary):
      rows, errors[name], misfits = _fit(x, channel_axis, heads.get(name))
      if misfits:
        forced = f"forced, its relative RMS error would be {errors[name]:.1e}"
        wrong += [*misfits, forced]
      if not wrong:
        tensors[name] = gguf.quantize(rows, ggml_type), ggml_type
    elif not wrong:
      tensors[name] = _dense(name, x, channel_axis, heads.get(name)), None
    if wrong:
      faults.append(f"{name}: {'; '.join(wrong)}")
  if faults:
    raise ValueError(
      f"{type} has one half-precision scale for each {_BLOCK} weights of a"
      f" row, and these leaves do not fit. {'. '.join(faults)}. Unpack"
      " weights to store them as F32."
    )
  with files.fresh_file(path, overwrite) as fresh:
    with contextlib.closing(gguf.GGUFWriter(fresh, "tern_jax")) as writer:
      writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{type}"])
      writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
      writer.add_uint32("tern_jax.format", files.FORMAT)
      writer.add_string("tern_jax.version", __version__)
      writer.add_array("tern_jax.ternary", list(errors))
      for name, (data, raw_dtype) in tensors.items():
        writer.add_tensor(name, data, raw_dtype=raw_dtype)
      writer.write_header_to_file()
      writer.write_kv_data_to_file()
      writer.write_tensors_to_file()
    written = {t.name: t for t in gguf.GGUFReader(fresh).tensors}
    for name, x in leaves.items():
      stored, wanted = written[name].data, tensors[name][0]
      if isinstance(x, PackedTernary):
        stored = gguf.dequantize(stored, ggml_type)
        wanted, *_ = _fit(x, channel_axis, heads.get(name))
      if stored.tobytes() != wanted.tobytes():
        raise OSError(f"{path}: {name} was not written as it is.")
  return errors


_OPTIONS = {
  "type": {"choices": GGUF_TYPES, "default": "TQ2_0"},
  "channel_axis": {"type": int, "choices": (-1, 0), "default": -1},
}
GGUF = files.Writer(to_gguf, _OPTIONS)
_decode = jax.jit(lambda x: (to_ternary(x).codes, x.dequantize()))


def _fit(
  x: PackedTernary, channel_axis: int, heads: Axes | None
) -> tuple[np.ndarray, float, list[str]]:
  """Fits one scale to each block: the common one, or the mean magnitude."""
  codes, w = (_rows(np.asarray(a), channel_axis, heads) for a in _decode(x))
  codes = codes.astype(np.float32)
  w = w.astype(np.promote_types(w.dtype, np.float32))
  n, faults = codes.shape[-1], []
  if pad := -n % _BLOCK:
    forced = f"(forced: zeros up to {n + pad})"
    faults.append(f"rows of {n} weights, no multiple of {_BLOCK} {forced}")
  widths = [(0, 0)] * (codes.ndim - 1) + [(0, pad)]
  padded = np.pad(codes, widths)
  c = padded.reshape(-1, _BLOCK)
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
    differ = not np.array_equal(x.w_p, x.w_n)
    what = "w_p and w_n differ" if differ else "its scale changes"
    faults.append(f"{what} within {_BLOCK} weights (forced: their mean)")
  # The weights as they would be stored, their error, and what forbids it.
  return stored.reshape(padded.shape)[..., :n], relative, faults


def _rows(x: np.ndarray, channel_axis: int, heads: Axes | None) -> np.ndarray:
  """Moves the inputs of [..., in, out] or [out, in, ...] to the last axis."""
  if x.ndim < 2:
    return np.atleast_1d(x)
  if heads is not None:
    first, _ = max(heads, key=len)
    x = x.reshape(*x.shape[:first], -1, *x.shape[first + 2 :])
  return np.moveaxis(x, (-1, -2) if channel_axis == -1 else (0, 1), (-2, -1))


def _faults(name: str, x: Leaf) -> list[str]:
  """Returns what ggml's readers would not accept of a leaf."""
  faults = {
    "the name is longer than 63 bytes": len(name.encode()) > 63,
    f"{len(x.shape)} axes are more than 4": len(x.shape) > 4,
    "it is empty": not x.size,
  }
  return [what for what, wrong in faults.items() if wrong]


def _dense(
  name: str, leaf: Leaf, channel_axis: int, heads: Axes | None
) -> np.ndarray:
  """Returns a dense leaf as it is stored."""
  x = np.asarray(leaf)
  if jnp.issubdtype(x.dtype, jnp.floating) and x.dtype.itemsize <= 4:
    x = x.astype(np.float32)
  elif x.dtype not in (np.float64, np.int8, np.int16, np.int32, np.int64):
    raise TypeError(f"{name}: ggml has no tensors of dtype {x.dtype}.")
  if name.rpartition(".")[-1] in _KERNELS:
    x = _rows(x, channel_axis, heads)
  return np.ascontiguousarray(x)
