"""config.json, as Hugging Face's transformers has it."""

import json
from typing import Any

from tern_jax.export import files
from tern_jax.export.decoder import ARCHITECTURES, Decoder
from tern_jax.storage.leaves import Json, PathLike

#: What the command knows of a decoder by.
OPTIONS: files.Options = {
  "config": {
    "metavar": "CONFIG.JSON",
    "help": "facts of a language model, as transformers has them",
  },
  "rope": {
    "choices": ("halves", "pairs"),
    "default": "halves",
    "help": "how the model of --config rotates the heads",
  },
  "names": {
    "metavar": "NAMES.JSON",
    "help": "{pattern of a path: tensor}, by default those of --config",
  },
  "stacked": {
    "metavar": "PATTERN",
    "help": "leaves whose first axis is the layers, 'layers' with --config",
  },
}
# By fields of `Decoder`, those first without which there is none.
_NEEDED = 6
_KEYS = {
  "vocab": "vocab_size",
  "layers": "num_hidden_layers",
  "width": "hidden_size",
  "heads": "num_attention_heads",
  "hidden": "intermediate_size",
  "context": "max_position_embeddings",
  "kv_heads": "num_key_value_heads",
  "head_size": "head_dim",
  "eps": "rms_norm_eps",
  "tied": "tie_word_embeddings",
  "activation": "hidden_act",
}
# What transformers takes where a file is silent, and `Decoder` would not.
_DEFAULTS: dict[str, dict[str, Any]] = {
  "llama": {"eps": 1e-6},
  "qwen2": {"eps": 1e-6, "kv_heads": 32},
  "qwen3": {"eps": 1e-6, "kv_heads": 32, "head_size": 128},
  "bitnet": {"kv_heads": 5, "rope_base": 500_000.0, "activation": "relu2"},
}
_CLASSES = {
  "llama": "LlamaForCausalLM",
  "qwen2": "Qwen2ForCausalLM",
  "qwen3": "Qwen3ForCausalLM",
  "bitnet": "BitNetForCausalLM",
}


def read_json(path: PathLike) -> Json:
  """Returns the JSON object in a file.

  Raises:
    ValueError: there is none in it.
    OSError: it cannot be read.
  """
  path = files.local_file(path)
  try:
    found = json.loads(path.read_bytes())
  except (ValueError, RecursionError) as e:
    raise ValueError(f"{path} is no JSON: {e}.") from e
  if not isinstance(found, dict):
    raise ValueError(f"{path} is no JSON object.")
  return found


def read_names(path: PathLike) -> dict[str, str]:
  """Returns the names of tensors, by patterns of paths, in a file.

  Raises:
    ValueError: it has something else.
    OSError: it cannot be read.
  """
  found = read_json(path)
  if strange := [k for k, x in found.items() if not isinstance(x, str)]:
    raise ValueError(f"{path}: the name for {strange[0]!r} is no string.")
  return found


def read_config(path: PathLike, rope: str = "halves") -> Decoder:
  """Returns the facts of a decoder that a config.json states.

  Args:
    path: of the file.
    rope: how the model rotates heads; transformers rotates halves.

  Raises:
    ValueError: it is of another architecture, or its model computes what
      `Decoder` does not.
    OSError: it cannot be read.
  """
  found = read_json(path)
  name = found.get("model_type")
  if name not in ARCHITECTURES:
    known = ", ".join(ARCHITECTURES)
    raise ValueError(
      f"{path} is of the architecture {name!r}, but those that are known are"
      f" {known}."
    )
  scaling = found.get("rope_parameters") or found.get("rope_scaling") or {}
  kind = scaling.get("rope_type", scaling.get("type", "default"))
  faults = {
    f"rope_type={kind!r}": kind != "default",
    "a bias of all of its attention": found.get("attention_bias"),
    "biases of its feed-forward blocks": found.get("mlp_bias"),
    "attention within a window": found.get("use_sliding_window"),
  }
  if wrong := [what for what, applies in faults.items() if applies]:
    raise ValueError(
      f"{path}: no file can be made of a model of {'; '.join(wrong)}."
    )
  facts = {
    k: x for k, x in _DEFAULTS[name].items() if _KEYS.get(k) not in found
  }
  facts |= {
    field: found[key]
    for field, key in _KEYS.items()
    if found.get(key) is not None
  }
  base = scaling.get("rope_theta", found.get("rope_theta"))
  if base is not None:
    facts["rope_base"] = base
  if lacking := [k for k in list(_KEYS)[:_NEEDED] if k not in facts]:
    keys = ", ".join(_KEYS[k] for k in lacking)
    raise ValueError(f"{path} lacks {keys}.")
  try:
    biases = name == "qwen2"
    return Decoder(architecture=name, rope=rope, biases=biases, **facts)
  except (TypeError, ValueError) as e:
    raise ValueError(f"{path}: {e}") from e


def config_of(c: Decoder) -> Json:
  """Returns the config.json of a decoder of which heads rotate by halves.

  Raises:
    ValueError: transformers has no such decoder.
  """
  if c.biases != (c.architecture == "qwen2"):
    wanted = "has" if c.architecture == "qwen2" else "has no"
    raise ValueError(f"in transformers, {c.architecture} {wanted} biases.")
  facts = {key: getattr(c, field) for field, key in _KEYS.items()}
  return facts | {
    "architectures": [_CLASSES[c.architecture]],
    "model_type": c.architecture,
    "rope_theta": c.rope_base,
    "dtype": "float32",
    # Else numbers of other tokenizers would end a text.
    "bos_token_id": None,
    "eos_token_id": None,
  }
