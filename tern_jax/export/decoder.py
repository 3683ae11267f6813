"""What a decoder is: the facts, names and shapes that its files agree on."""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

#: Architectures of decoders that files can be written of, and read.
ARCHITECTURES = ("llama", "qwen2", "qwen3", "bitnet")
#: How rotary embeddings pair the components of a head of size d: i with i +
#: d / 2, or 2 i with 2 i + 1.
ROTATIONS = ("halves", "pairs")
#: What the gate of a feed-forward block goes through.
ACTIVATIONS = ("silu", "relu2")
# Of the rows of what GGUF files call so, heads are made: queries or keys.
_HEADS = re.compile(r"(blk\.\d+\.)attn_([qk])(_norm)?\.(weight|bias)")

Order = Mapping[str, tuple[str, int]]


@dataclasses.dataclass(frozen=True)
class Decoder:
  """The facts of a language model of the Llama family.

  Every block adds to its input x, in this order,

    attention(norm(x)),  down(act(gate(norm(x))) up(norm(x))),

  with RMSNorm, rotary embeddings, grouped queries, and no bias but those of
  queries, keys and values. "qwen3" has norms of the queries and keys of a head,
  "bitnet" a norm before the output of the attention and one before `down`.

  Args:
    architecture: "llama", "qwen2", "qwen3" or "bitnet".
    vocab: rows of the embedding.
    layers: blocks.
    width: of the embedding.
    heads: of queries.
    hidden: width of the feed-forward blocks.
    context: most tokens of a text.
    kv_heads: heads of keys and values, `heads` by default.
    head_size: of one head, width / heads by default.
    rope_base: base of the wavelengths of the rotary embeddings.
    rope: how the model rotates a head: "halves", i and i + head_size / 2, as
      Hugging Face and most code in JAX, or "pairs", 2 i and 2 i + 1.
    eps: added to the mean square by the norms.
    tied: whether the embedding is the head, too.
    biases: whether queries, keys and values have a bias.
    activation: "silu", or "relu2", the square of the positive part.

  Raises:
    TypeError: a fact is of the wrong type.
    ValueError: an unknown name, sizes that do not divide, or an odd head.

  >>> config = Decoder("llama", vocab=256, layers=2, width=64, heads=4,
  ...                  kv_heads=2, hidden=128, context=512)
  >>> config.head_size, config.shapes()["blk.1.attn_k.weight"]
  (16, (32, 64))
  """

  architecture: str
  vocab: int
  layers: int
  width: int
  heads: int
  hidden: int
  context: int
  kv_heads: int = 0
  head_size: int = 0
  rope_base: float = 10_000.0
  rope: str = "halves"
  eps: float = 1e-5
  tied: bool = False
  biases: bool = False
  activation: str = "silu"

  def __post_init__(self) -> None:
    """Fills in what follows from the rest, and checks all."""
    self._check_types()
    if not self.kv_heads:
      object.__setattr__(self, "kv_heads", self.heads)
    if not self.head_size:
      if self.width % self.heads:
        raise ValueError(
          f"width={self.width} is no multiple of heads={self.heads}: give"
          " head_size."
        )
      object.__setattr__(self, "head_size", self.width // self.heads)
    if self.heads % self.kv_heads:
      raise ValueError(
        f"heads={self.heads} is no multiple of kv_heads={self.kv_heads}: each"
        " head of keys serves as many heads of queries."
      )
    if self.head_size % 2:
      raise ValueError(
        f"head_size={self.head_size} is odd, but rotary embeddings turn its"
        " components two by two: give an even one."
      )

  def _check_types(self) -> None:
    known = {
      "architecture": ARCHITECTURES,
      "rope": ROTATIONS,
      "activation": ACTIVATIONS,
    }
    for field in dataclasses.fields(self):
      name, x = field.name, getattr(self, field.name)
      if name in known:
        if x not in known[name]:
          raise ValueError(f"{name} must be one of {known[name]}, got {x!r}.")
      elif field.type is bool:
        if not isinstance(x, bool):
          raise TypeError(f"{name} must be True or False, got {x!r}.")
      elif isinstance(x, bool) or not isinstance(
        x, int | float if field.type is float else int
      ):
        kind = "a number" if field.type is float else "an integer"
        raise TypeError(f"{name} must be {kind}, got {x!r}.")
      # Those that follow from others are 0 where they are not given.
      elif not 0 < x < math.inf and (x or field.default != 0):
        raise ValueError(f"{name} must be positive and finite, got {x}.")

  def shapes(self) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of all tensors, [out, in], by their names in GGUF."""
    return {x.name: x.shape for x in tensors(self)}

  def order(self, rope: str) -> dict[str, tuple[str, int]]:
    """Returns which tensors' rows move where heads are to be rotated so."""
    if rope == self.rope:
      return {}
    heads = {"q": self.heads, "k": self.kv_heads}
    found = map(_HEADS.fullmatch, self.shapes())
    return {
      m[0]: (rope, 1 if m[3] else heads[m[2]]) for m in found if m is not None
    }


class Named(NamedTuple):
  """A tensor of a decoder, by its names in files and in trees."""

  #: In GGUF files.
  name: str
  #: In those of Hugging Face's transformers.
  module: str
  #: Its path in the tree of `import_llama`.
  path: str
  shape: tuple[int, ...]


# By names of GGUF, those of transformers.
_TOP = {
  "token_embd": "model.embed_tokens",
  "output_norm": "model.norm",
  "output": "lm_head",
}
_BLOCK = {
  "attn_norm": "input_layernorm",
  "attn_q": "self_attn.q_proj",
  "attn_k": "self_attn.k_proj",
  "attn_v": "self_attn.v_proj",
  "attn_q_norm": "self_attn.q_norm",
  "attn_k_norm": "self_attn.k_norm",
  "attn_sub_norm": "self_attn.attn_sub_norm",
  "attn_output": "self_attn.o_proj",
  "ffn_norm": "post_attention_layernorm",
  "ffn_gate": "mlp.gate_proj",
  "ffn_up": "mlp.up_proj",
  "ffn_sub_norm": "mlp.ffn_sub_norm",
  "ffn_down": "mlp.down_proj",
}


def tensors(c: Decoder) -> Iterator[Named]:
  """Yields all tensors of a decoder."""
  queries, keys = c.heads * c.head_size, c.kv_heads * c.head_size
  shapes = {"token_embd": (c.vocab, c.width), "output_norm": (c.width,)}
  if not c.tied:
    shapes["output"] = c.vocab, c.width
  for part, shape in shapes.items():
    yield _named(f"{part}.weight", _TOP[part], shape)
  block = {
    "attn_norm": (c.width,),
    "attn_q": (queries, c.width),
    "attn_k": (keys, c.width),
    "attn_v": (keys, c.width),
    "attn_output": (c.width, queries),
    "ffn_norm": (c.width,),
    "ffn_gate": (c.hidden, c.width),
    "ffn_up": (c.hidden, c.width),
    "ffn_down": (c.width, c.hidden),
  }
  if c.architecture == "qwen3":
    block |= {"attn_q_norm": (c.head_size,), "attn_k_norm": (c.head_size,)}
  if c.architecture == "bitnet":
    block |= {"attn_sub_norm": (queries,), "ffn_sub_norm": (c.hidden,)}
  for i in range(c.layers):
    for part, shape in block.items():
      module = f"model.layers.{i}.{_BLOCK[part]}"
      yield _named(f"blk.{i}.{part}.weight", module, shape)
      if c.biases and part in ("attn_q", "attn_k", "attn_v"):
        yield _named(f"blk.{i}.{part}.bias", module, shape[:1])


def _named(name: str, module: str, shape: tuple[int, ...]) -> Named:
  part, _, kind = name.rpartition(".")
  leaf = "scale" if part.endswith("norm") else "kernel"
  leaf = {"token_embd": "embedding"}.get(part, leaf)
  path = module.removeprefix("model.").replace(".", "/")
  leaf = "bias" if kind == "bias" else leaf
  return Named(name, f"{module}.{kind}", f"{path}/{leaf}", shape)


def names_of(c: Decoder) -> dict[str, str]:
  """Returns {pattern of a path: name in GGUF} of the tree of `import_llama`."""
  one = dataclasses.replace(c, layers=1)
  return {
    x.path.replace("layers/0/", "layers/*/"): x.name.replace("blk.0", "blk.*")
    for x in tensors(one)
  }


def llama(
  config: Decoder,
  *,
  names: Mapping[str, str] | None = None,
  stacked: str | Sequence[str] = "layers",
) -> dict[str, Any]:
  """Returns what `to_gguf` needs to know of a decoder, as keywords.

    to_gguf("net.gguf", packed, tokenizer="bytes", **llama(config))

  They are the architecture, the metadata that llama.cpp asks for, the names of
  the tensors, the stacks of layers, the order of rows and the shapes. llama.cpp
  rotates pairs in "llama" and halves in the others; the rows of queries and
  keys are put into its order, which changes no weight.

  Args:
    config: facts of the decoder.
    names: where its leaves are, {pattern: tensor}, as `to_gguf` takes it, with
      tensors token_embd, output_norm and output, and in each block attn_norm,
      attn_q, attn_k, attn_v, attn_output, ffn_norm, ffn_gate, ffn_up and
      ffn_down, as "blk.*.attn_q.weight"; attn_q_norm and attn_k_norm of
      "qwen3", attn_sub_norm and ffn_sub_norm of "bitnet"; "blk.*.attn_q.bias"
      of biases. By default the names of Hugging Face, as in the tree that
      `import_llama` returns: embed_tokens/embedding,
      layers/*/self_attn/q_proj/kernel, layers/*/input_layernorm/scale.
    stacked: patterns of stacks of layers, as `to_gguf` takes them.

  Raises:
    ValueError: llama.cpp does not compute such a decoder.

  >>> config = Decoder("llama", vocab=256, layers=1, width=256, heads=4,
  ...                  hidden=256, context=64)
  >>> facts = llama(config)
  >>> facts["names"]["layers/*/mlp/up_proj/kernel"]
  'blk.*.ffn_up.weight'
  >>> facts["order"]["blk.0.attn_q.weight"]
  ('pairs', 4)
  """
  c, name = config, config.architecture
  faults = {
    f"activation={c.activation!r}: it computes 'silu'": c.activation != "silu",
    "tied=False: its head is the embedding": name == "bitnet" and not c.tied,
    f"head_size={c.head_size}: it is width / heads": (
      name in ("qwen2", "bitnet") and c.head_size * c.heads != c.width
    ),
  }
  if wrong := [what for what, applies in faults.items() if applies]:
    raise ValueError(f"llama.cpp has no {name} of {'; '.join(wrong)}.")
  facts = {
    "context_length": c.context,
    "embedding_length": c.width,
    "block_count": c.layers,
    "feed_forward_length": c.hidden,
    "vocab_size": c.vocab,
    "attention.head_count": c.heads,
    "attention.head_count_kv": c.kv_heads,
    "attention.key_length": c.head_size,
    "attention.value_length": c.head_size,
    "attention.layer_norm_rms_epsilon": float(c.eps),
    "rope.dimension_count": c.head_size,
    "rope.freq_base": float(c.rope_base),
  }
  return {
    "architecture": name,
    "metadata": {f"{name}.{key}": x for key, x in facts.items()},
    "names": names_of(c) if names is None else names,
    "stacked": stacked,
    "order": c.order(rotation(name)),
    "shapes": c.shapes(),
  }


def rotation(architecture: str) -> str:
  """Returns how llama.cpp rotates the heads of an architecture."""
  return "pairs" if architecture == "llama" else "halves"
