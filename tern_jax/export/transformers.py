"""A folder that Hugging Face's transformers loads: its layout of BitNet."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tern_jax.core.types import PyTree
from tern_jax.export import decoder, files, hub
from tern_jax.export.decoder import Decoder
from tern_jax.export.tensors import Plan, TernaryRows
from tern_jax.storage.leaves import PathLike

#: Rows that a byte of packed codes has.
ROWS = 4
#: What the folder holds.
CONFIG, MODEL = "config.json", "model.safetensors"


def to_transformers(
  folder: PathLike,
  tree: PyTree,
  config: Decoder,
  *,
  names: Mapping[str, str] | None = None,
  stacked: str | Sequence[str] = "layers",
  channel_axis: int = -1,
  overwrite: bool = False,
) -> None:
  """Saves a decoder as a folder that transformers loads and generates with.

    AutoModelForCausalLM.from_pretrained(folder)

  The folder has a config.json, whose quantization is "bitnet" with
  "autobitlinear", and a model.safetensors. Of a ternary matrix [out, in] that
  has NAME.weight, uint8 [out / 4, in], and NAME.weight_scale, float32 [1]:

    bits 2 j and 2 j + 1 of byte (r, i) are 1 + the code of row r + j out / 4,
    w = scale · code.

  Every weight is exact. The layout has one scale a matrix, and other leaves are
  refused; matrices that are dense in the tree stay so. transformers multiplies
  a bias by the scale, too, and so it is stored divided by it. It rounds what
  comes into a ternary matrix to int8, token by token, whatever the training
  did.

  Args:
    folder: to write; it appears whole or not at all.
    tree: any pytree of arrays and `PackedTernary`.
    config: facts of the decoder; heads are turned into halves if need be.
    names: where its leaves are, as `llama` takes it.
    stacked: patterns of stacks of layers, as `to_gguf` takes them.
    channel_axis: axis of the output channels of every weight matrix: -1 for
      Flax and Haiku, 0 for Equinox.
    overwrite: replace the folder, once the new one is written; it may have no
      other files in it.

  Raises:
    ValueError: leaves do not fit; names each, says why, and what the error
      would be if they were forced to. Or none is ternary, a tensor is missing,
      superfluous or of another shape, or transformers has no such decoder.
    TypeError: a leaf is neither packed nor an array of floats.
    FileExistsError: the path is taken.
  """
  api = files.require("safetensors.numpy", "to_transformers")
  safetensors = files.require("safetensors", "to_transformers")
  facts = hub.config_of(config)
  names = decoder.names_of(config) if names is None else names
  order, shapes = config.order("halves"), config.shapes()
  plan = Plan(channel_axis, names, stacked, order, shapes)
  modules = {
    x.name: x.module.rpartition(".")[0] for x in decoder.tensors(config)
  }
  tensors, dense = _packed(plan, tree, modules)
  facts["quantization_config"] = {
    "quant_method": "bitnet",
    "linear_class": "autobitlinear",
    "quantization_mode": "offline",
    "modules_to_not_convert": ["lm_head", *dense],
  }
  with files.fresh_folder(folder, overwrite, (CONFIG, MODEL)) as fresh:
    (fresh / CONFIG).write_text(json.dumps(facts, indent=2) + "\n")
    api.save_file(tensors, fresh / MODEL, {"format": "pt"})
    with safetensors.safe_open(fresh / MODEL, "numpy") as file:
      for name, x in tensors.items():
        if not np.array_equal(file.get_tensor(name), x):
          raise OSError(f"{name} was not written as it is")


def _command(
  path: PathLike,
  tree: PyTree,
  config: PathLike | None = None,
  rope: str = "halves",
  names: PathLike | None = None,
  stacked: str = "layers",
  **options: Any,
) -> None:
  """Writes what the command was asked for."""
  if config is None:
    raise ValueError("--to transformers needs --config CONFIG.JSON.")
  facts = hub.read_config(config, rope)
  given = None if names is None else hub.read_names(names)
  to_transformers(path, tree, facts, names=given, stacked=stacked, **options)


TRANSFORMERS = files.Writer(
  _command,
  {
    **hub.OPTIONS,
    "channel_axis": {"type": int, "choices": (-1, 0), "default": -1},
  },
  folder=(CONFIG, MODEL),
)


def _packed(
  plan: Plan, tree: PyTree, modules: Mapping[str, str]
) -> tuple[dict[str, np.ndarray], list[str]]:
  """Returns the tensors, and the modules whose matrix is dense."""
  tensors, scales, dense, faults = {}, {}, [], []
  for rows in plan.rows(plan.sources(tree)):
    module, kind = modules[rows.name], rows.name.rpartition(".")[-1]
    if not isinstance(rows, TernaryRows):
      if rows.x.dtype.kind in "iub":
        raise TypeError(f"{rows.name} is of {rows.x.dtype}, not of floats.")
      tensors[f"{module}.{kind}"] = np.ascontiguousarray(rows.x, np.float32)
      if rows.x.ndim == 2 and "layers" in module:
        dense.append(module)
      continue
    scales[module], wrong = _scale(rows)
    if "layers" not in module:
      wrong = ["the layout keeps it dense: unpack it"]
    if wrong:
      faults.append(f"{rows.name}: {'; '.join(wrong)}")
      continue
    # The package writes the bytes of an array, whatever its strides.
    tensors[f"{module}.weight"] = np.ascontiguousarray(pack_rows(rows.codes))
    tensors[f"{module}.weight_scale"] = np.array([scales[module]], np.float32)
  if faults:
    raise ValueError(
      "transformers has one scale for each matrix of BitNet, and these leaves"
      f" do not fit. {'. '.join(faults)}. Unpack weights to store them dense."
    )
  if not scales:
    raise ValueError(
      "the tree has no ternary weights: to_transformers writes packed ones."
    )
  for module, scale in scales.items():
    bias = f"{module}.bias"
    if bias in tensors:
      tensors[bias] = tensors[bias] / np.float32(scale)
  return tensors, dense


def _scale(rows: TernaryRows) -> tuple[float, list[str]]:
  """Returns the scale of a matrix, the mean one if there are several."""
  live = rows.codes != 0
  found = np.abs(rows.x[live]) * np.sign(rows.x[live] * rows.codes[live])
  if not found.size:
    return 1.0, []
  faults, scale = [], float(found[0])
  if len(rows.x) % ROWS:
    faults.append(f"{len(rows.x)} rows, no multiple of {ROWS}")
  if not np.all((found > 0) & np.isfinite(found)):
    faults.append("magnitudes that are not positive and finite")
  elif np.any(found != scale):
    scale = float(np.mean(found, dtype=np.float64))
    off = np.sum(np.square(found - scale), dtype=np.float64)
    error = np.sqrt(off / np.sum(np.square(found), dtype=np.float64))
    what = "w_p and w_n differ" if rows.magnitudes_differ else "several scales"
    forced = "forced to their mean, its relative RMS error would be"
    faults.append(f"{what}; {forced} {error:.1e}")
  return scale, faults


def pack_rows(codes: np.ndarray) -> np.ndarray:
  """Packs codes [out, in] to uint8 [out / 4, in]: rows lie out / 4 apart.

  >>> pack_rows(np.array([[-1], [0], [1], [1]])).tolist()
  [[164]]
  """
  parts = (codes + 1).astype(np.uint8).reshape(ROWS, -1, codes.shape[-1])
  shifts = np.arange(0, 2 * ROWS, 2, dtype=np.uint8).reshape(-1, 1, 1)
  return np.bitwise_or.reduce(parts << shifts, 0)


def unpack_rows(packed: np.ndarray) -> np.ndarray:
  """Returns the int8 codes of `pack_rows`.

  Raises:
    ValueError: a code is not -1, 0 or 1, or it is no uint8 matrix.

  >>> unpack_rows(np.array([[164]], np.uint8)).ravel().tolist()
  [-1, 0, 1, 1]
  """
  if packed.dtype != np.uint8 or packed.ndim != 2:
    raise ValueError(f"codes are uint8 of two axes, not {packed.dtype}")
  shifts = np.arange(0, 2 * ROWS, 2, dtype=np.uint8).reshape(-1, 1, 1)
  codes = (packed >> shifts & 3).reshape(-1, packed.shape[-1])
  if np.any(codes > 2):
    raise ValueError("it has a code that is not -1, 0 or 1")
  return codes.astype(np.int8) - np.int8(1)
