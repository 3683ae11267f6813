"""Decoders that others have trained, as trees to go on with."""

import contextlib
import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from tern_jax.core.containers import Ternary
from tern_jax.core.types import PyTree
from tern_jax.export import decoder, files, gguf_file, hub
from tern_jax.export.decoder import Decoder
from tern_jax.export.tensors import check_tensors, reordered, some
from tern_jax.export.transformers import CONFIG, MODEL, ROWS, unpack_rows
from tern_jax.storage.leaves import Json, PathLike
from tern_jax.storage.packed import pack

_INDEX = f"{MODEL}.index.json"
# Buffers that old files have, and that follow from the configuration.
_BUFFERS = ("rotary_emb.inv_freq",)


class Part(NamedTuple):
  """A tensor of one layer, its rows those of the file.

  Args:
    x: values, or int8 codes.
    scales: of codes, one for each of equal parts of a row; else None.
  """

  x: np.ndarray
  scales: np.ndarray | None = None


def import_llama(
  path: PathLike,
  *,
  rope: str = "halves",
  stacked: bool = True,
  dtype: Any = jnp.float32,
) -> tuple[dict[str, PyTree], Decoder]:
  """Reads a decoder of the Llama family: the start of a ternary fine-tuning.

  A folder of Hugging Face's transformers, one file or several with an index,
  of the architectures llama, qwen2, qwen3 and bitnet, float or of packed BitNet
  weights; or a GGUF file of these, float or with TQ1_0, TQ2_0 or Q2_0. Packed
  weights come back as `PackedTernary`, which `from_packed` takes back into
  training.

  The tree has Hugging Face's names, kernels [in, out], and what they are called
  in Flax:

    embed_tokens/embedding             [vocab, width]
    layers/input_layernorm/scale       [layers, width]
    layers/self_attn/q_proj/kernel     [layers, width, heads head_size]
    layers/self_attn/q_proj/bias       [layers, heads head_size], of qwen2
    layers/mlp/down_proj/kernel        [layers, hidden, width]
    norm/scale                         [width]
    lm_head/kernel                     [width, vocab], unless tied

  likewise k_proj, v_proj and o_proj, gate_proj and up_proj,
  post_attention_layernorm; q_norm and k_norm of qwen3; attn_sub_norm and
  ffn_sub_norm of bitnet. `to_gguf(path, packed, **llama(config))` writes it.

  Args:
    path: of the folder or the GGUF file.
    rope: how the model that goes on rotates heads, "halves" or "pairs"; rows of
      queries and keys are put into that order.
    stacked: whether each leaf has all layers, as `nn.scan` has them; else they
      lie at layers/0, layers/1 and so on.
    dtype: of the floats.

  Returns:
    (tree, facts of the decoder).

  Raises:
    ValueError: another architecture, or one that computes what `Decoder` does
      not say; a tensor is missing, superfluous or of another shape; or a file
      is damaged.
    OSError: a file cannot be read.
    ImportError: safetensors is missing.
  """
  where = files.local_file(path)
  with contextlib.ExitStack() as stack:
    if where.is_dir():
      config, found, read = _folder(where, stack)
    else:
      config, found, read = _gguf(where)
    try:
      check_tensors(found, config.shapes())
    except ValueError as e:
      raise ValueError(f"{where}: {e}") from e
    facts, order = dataclasses.replace(config, rope=rope), config.order(rope)
    layers: dict[str, list[Part]] = {}
    for x in decoder.tensors(config):
      part = _ordered(read(x), order.get(x.name))
      layers.setdefault(_key(x.path, stacked), []).append(part)
  tree: dict[str, PyTree] = {}
  for key, parts in layers.items():
    *names, last = key.split("/")
    node = tree
    for name in names:
      node = node.setdefault(name, {})
    node[last] = _leaf(key, parts, dtype, stacked and names[0] == "layers")
  return tree, facts


def _key(path: str, stacked: bool) -> str:
  """Returns the path of a leaf, which has all layers if they are stacked."""
  first, _, rest = path.partition("/")
  if stacked and first == "layers":
    return f"{first}/{rest.partition('/')[2]}"
  return path


def _ordered(part: Part, order: tuple[str, int] | None) -> Part:
  if order is None:
    return part
  x, scales = reordered(part.x, *order), part.scales
  if scales is not None and len(scales) > 1:
    scales = reordered(scales, *order)
  return Part(x, scales)


def _leaf(key: str, parts: list[Part], dtype: Any, stacked: bool) -> PyTree:
  """Returns a leaf of one layer, or of a stack of them."""
  is_kernel = key.endswith("/kernel")
  x = np.stack([x.x for x in parts])
  if is_kernel:
    x = x.swapaxes(1, 2)
  scales = [x.scales for x in parts if x.scales is not None]
  if len(scales) not in (0, len(parts)):
    raise ValueError(
      f"{key} is ternary in some layers and dense in others: stacked=False"
      " keeps them apart."
    )
  if not scales:
    return jnp.asarray(x if stacked else x[0], dtype)
  if x.ndim != 3:
    raise ValueError(f"{key} is ternary, but no matrix.")
  scale = _coarsest(np.stack([x.x for x in parts]), np.stack(scales))
  if is_kernel:
    scale = scale.swapaxes(1, 2)
  if not stacked:
    x, scale = x[0], scale[0]
    scale = scale.reshape(()) if scale.size == 1 else scale
  scale = jnp.asarray(scale, dtype)
  return pack(Ternary(jnp.asarray(x), scale, scale))


def _coarsest(codes: np.ndarray, scale: np.ndarray) -> np.ndarray:
  """Returns one scale a matrix, or a row, where the file has no more.

  Args:
    codes: [layers, rows, columns].
    scale: [layers, rows or 1, parts of a row], of which those do not count that
      no weight has.
  """
  n, rows, parts = scale.shape
  live = np.any(codes.reshape(n, codes.shape[1], parts, -1) != 0, -1)
  live = live if rows > 1 else np.any(live, 1, keepdims=True)
  for axes in ((1, 2), (2,)):
    low = np.min(scale, axes, initial=np.inf, where=live, keepdims=True)
    high = np.max(scale, axes, initial=-np.inf, where=live, keepdims=True)
    if np.all((low == high) | (low > high)):
      return np.where(low > high, np.ones_like(low), high)
  return np.where(live, scale, np.ones_like(scale))


def _folder(
  where: Path, stack: contextlib.ExitStack
) -> tuple[Decoder, dict[str, tuple[int, ...]], Any]:
  """Returns the facts, shapes and a reader of a folder of transformers."""
  if not (where / CONFIG).exists():
    raise ValueError(
      f"{where} has no {CONFIG}: give a folder of transformers or a GGUF file."
    )
  config = hub.read_config(where / CONFIG)
  inverse = _quantization(where)
  opened = _opened(where, stack)
  names = {x.name: x.module for x in decoder.tensors(config)}
  found, of_name = {}, {module: name for name, module in names.items()}
  for module, file in opened.items():
    is_scale = module.removesuffix("_scale") in opened.keys() - {module}
    if is_scale or module.endswith(_BUFFERS):
      continue
    shape = tuple(file.get_slice(module).get_shape())
    if f"{module}_scale" in opened:
      shape = (ROWS * shape[0], *shape[1:])
    found[of_name.get(module, module)] = shape
  if config.tied and found.pop("lm_head.weight", None) is not None:
    tied = (x for x in ("lm_head.weight", names["token_embd.weight"]))
    if not np.array_equal(*(opened[x].get_tensor(x) for x in tied)):
      raise ValueError(
        f"{where}: {CONFIG} ties the head to the embedding, but lm_head.weight"
        " is another matrix."
      )

  def read(name: str) -> Part:
    module = names[name]
    x = opened[module].get_tensor(module)
    scale = f"{module}_scale"
    if scale not in opened:
      by = module.replace(".bias", ".weight_scale")
      if by != module and by in opened and not inverse:
        x = x * np.asarray(opened[by].get_tensor(by), x.dtype)
      return Part(x)
    try:
      codes = unpack_rows(x)
    except ValueError as e:
      raise ValueError(f"{where}: {module} is damaged: {e}.") from e
    value = np.asarray(opened[scale].get_tensor(scale), np.float32)
    if value.size != 1 or not np.all(np.isfinite(value) & (value > 0)):
      raise ValueError(f"{where}: {scale} is not one positive number.")
    value = value.reshape(1, 1)
    return Part(codes, 1 / value if inverse else value)

  return config, found, lambda x: read(x.name)


def _quantization(where: Path) -> bool:
  """Returns whether packed weights are divided by their scale.

  Raises:
    ValueError: the weights are quantized in another way.
  """
  found = hub.read_json(where / CONFIG).get("quantization_config")
  if found is None:
    return False
  if found.get("quant_method") != "bitnet" or found.get("use_rms_norm"):
    raise ValueError(
      f"{where}: weights quantized by {found.get('quant_method')!r} are not"
      " read, but floats, and those of 'bitnet' without use_rms_norm."
    )
  return found.get("linear_class", "bitlinear") == "bitlinear"


def _opened(where: Path, stack: contextlib.ExitStack) -> dict[str, Any]:
  """Returns the open file of each tensor, by its name."""
  safetensors = files.require("safetensors", "import_llama")
  if (where / MODEL).exists():
    shards, placed = [MODEL], None
  elif (where / _INDEX).exists():
    placed = hub.read_json(where / _INDEX).get("weight_map")
    if not isinstance(placed, dict):
      raise ValueError(f"{where / _INDEX} has no weight_map.")
    shards = sorted(set(placed.values()))
    if bad := [x for x in shards if os.path.basename(x) != x]:
      raise ValueError(f"{where / _INDEX} names a file elsewhere: {bad[0]!r}.")
  else:
    raise ValueError(f"{where} has neither {MODEL} nor {_INDEX}.")
  opened = {}
  for shard in shards:
    try:
      file = safetensors.safe_open(where / shard, "numpy")
    except OSError:
      raise
    except Exception as e:  # also of the package
      raise ValueError(f"cannot load {where / shard}: {e}.") from e
    stack.enter_context(file)
    names = set(file.keys())
    if placed is not None:
      names &= {name for name, of in placed.items() if of == shard}
    opened |= dict.fromkeys(sorted(names), file)
  if lost := sorted(set(placed or ()) - set(opened)):
    raise ValueError(
      f"{where}: the files do not have {some(lost)}, which {_INDEX} places"
      " there."
    )
  return opened


def _gguf(where: Path) -> tuple[Decoder, dict[str, tuple[int, ...]], Any]:
  """Returns the facts, shapes and a reader of a GGUF file."""
  metadata, tensors = gguf_file.read_header(where)
  found = {x.name: x for x in tensors}
  if strange := sorted(x.name for x in tensors if not x.is_known):
    raise ValueError(
      f"{where}: {some(strange)} is of a type that is not read. Floats, TQ1_0,"
      " TQ2_0 and Q2_0 are: have the rest converted to F16."
    )
  try:
    config = _facts(metadata, found)
  except (TypeError, ValueError) as e:
    raise ValueError(f"{where}: {e}") from e

  def read(x: decoder.Named) -> Part:
    return Part(*gguf_file.parts(where, found[x.name]))

  return config, {k: x.shape for k, x in found.items()}, read


def _facts(metadata: Json, found: Mapping[str, gguf_file.Tensor]) -> Decoder:
  """Returns the facts of a decoder that a GGUF file states."""
  name = metadata.get("general.architecture")
  if name not in decoder.ARCHITECTURES:
    known = ", ".join(decoder.ARCHITECTURES)
    raise ValueError(
      f"it is of the architecture {name!r}, but those that are known are"
      f" {known}."
    )

  def fact(key: str, default: Any = None) -> Any:
    value = metadata.get(f"{name}.{key}", default)
    if value is None:
      raise ValueError(f"its metadata lacks {name}.{key}.")
    return value

  if (kind := fact("rope.scaling.type", "none")) != "none":
    raise ValueError(f"its rotary embeddings are scaled: {kind}.")
  table = found.get("token_embd.weight")
  heads = fact("attention.head_count")
  return Decoder(
    architecture=name,
    vocab=fact("vocab_size", table.shape[0] if table and table.shape else None),
    layers=fact("block_count"),
    width=fact("embedding_length"),
    heads=heads,
    hidden=fact("feed_forward_length"),
    context=fact("context_length"),
    kv_heads=fact("attention.head_count_kv", heads),
    head_size=fact("attention.key_length", fact("rope.dimension_count", 0)),
    rope_base=fact("rope.freq_base", 10_000.0),
    rope=decoder.rotation(name),
    eps=fact("attention.layer_norm_rms_epsilon"),
    tied="output.weight" not in found,
    biases="blk.0.attn_q.bias" in found,
  )
