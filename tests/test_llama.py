"""GGUF files of decoders, as llama.cpp would compute them."""

import dataclasses
import json

import gguf
import hypothesis
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from tern_jax.checkpoint import save_packed
from tern_jax.export import (
  Decoder,
  gguf_file,
  llama,
  to_gguf,
  to_safetensors,
)
from tern_jax.export.tensors import reordered
from tests import decoders
from tests.decoders import FromFile, FromTree, forward, rms, rotated
from tests.helpers import long

#: How llama.cpp rounds what it multiplies with matrices of a type.
ROUNDED = {
  None: decoders.exact,
  "TQ1_0": decoders.q8_k,
  "TQ2_0": decoders.q8_k,
  "Q2_0": decoders.q8_0,
}


@pytest.fixture
def path(tmp_path):
  return tmp_path / "net.gguf"


def values_of(path):
  """Every tensor of a file, by its name."""
  _, tensors = gguf_file.read_header(path)
  return {x.name: gguf_file.values(path, x) for x in tensors}


def logits_of(path, config, rounded):
  """What llama.cpp computes, which rotates pairs in "llama" alone."""
  halves = config.architecture != "llama"
  return forward(config, FromFile(values_of(path)), halves, rounded)


@pytest.mark.parametrize(
  ("architecture", "rope", "tied", "type"),
  [
    ("llama", "halves", False, None),
    ("llama", "halves", True, "TQ2_0"),
    ("llama", "pairs", False, "Q2_0"),
    ("qwen2", "halves", False, "TQ2_0"),
    ("qwen3", "pairs", True, "TQ1_0"),
    ("bitnet", "halves", True, "Q2_0"),
    long("llama", "pairs", True, None),
    long("llama", "pairs", False, "TQ2_0"),
    long("llama", "halves", False, "Q2_0"),
    long("qwen2", "pairs", True, "Q2_0"),
    long("qwen2", "pairs", False, None),
    long("qwen3", "halves", False, "TQ2_0"),
    long("qwen3", "pairs", True, "Q2_0"),
    long("qwen3", "halves", False, None),
    long("bitnet", "pairs", True, "TQ2_0"),
    long("bitnet", "halves", True, None),
  ],
)
def test_logits_are_those_of_the_tree(path, architecture, rope, tied, type):
  config = decoders.variant(architecture, rope=rope, tied=tied)
  group = 64 if type == "Q2_0" else None
  tree, dense = decoders.tree_of(config, type is not None, group=group)
  errors = to_gguf(path, tree, type or "TQ2_0", **llama(config))
  assert set(errors.values()) <= {0.0}
  rounded = ROUNDED[type]
  wanted = forward(config, FromTree(dense), rope == "halves", rounded)
  assert rms(logits_of(path, config, rounded), wanted) < 1e-9
  # The other rotation is far off, so that the order of rows matters.
  wrong = forward(config, FromTree(dense), rope != "halves", rounded)
  assert rms(wrong, wanted) > 0.1


def test_scales_of_float32_cost_no_more_than_their_rounding(path):
  config = decoders.variant()
  tree, dense = decoders.tree_of(config)
  scale = np.float32(1 + 2.0**-12)  # between two halves

  def scaled(x):
    if isinstance(x, dict):
      return {k: scaled(v) for k, v in x.items()}
    if hasattr(x, "w_p"):
      return dataclasses.replace(x, w_p=x.w_p * scale, w_n=x.w_n * scale)
    return x

  def kernels_scaled(x, name=""):
    if isinstance(x, dict):
      return {k: kernels_scaled(v, k) for k, v in x.items()}
    return x * scale if name == "kernel" else x

  dense["layers"] = kernels_scaled(dense["layers"])
  errors = to_gguf(path, scaled(tree), **llama(config))
  assert all(0 < x < 2.0**-11 for x in errors.values())
  wanted = forward(config, FromTree(dense), halves=True)
  error = rms(logits_of(path, config, decoders.exact), wanted)
  assert 0 < error < 1e-3


def test_metadata_is_what_llama_cpp_asks_for(path):
  config = decoders.variant("qwen3", head_size=32, eps=1e-6)
  tree, _ = decoders.tree_of(config)
  more = {"general.name": "tiny", "x.list": [1, 2], "x.on": True, "x.neg": -1}
  facts = llama(config)
  facts["metadata"] |= more
  to_gguf(path, tree, "Q2_0", **facts)
  metadata, tensors = gguf_file.read_header(path)
  ternary = metadata.pop("tern_jax.ternary")
  assert len(ternary) == 14
  assert metadata.pop("tern_jax.version")
  assert metadata == {
    "general.architecture": "qwen3",
    "general.file_type": 41,
    "general.quantization_version": 2,
    "general.name": "tiny",
    "tern_jax.format": 1,
    "qwen3.context_length": 64,
    "qwen3.embedding_length": 256,
    "qwen3.block_count": 2,
    "qwen3.feed_forward_length": 512,
    "qwen3.vocab_size": 257,
    "qwen3.attention.head_count": 4,
    "qwen3.attention.head_count_kv": 2,
    "qwen3.attention.key_length": 32,
    "qwen3.attention.value_length": 32,
    "qwen3.attention.layer_norm_rms_epsilon": float(np.float32(1e-6)),
    "qwen3.rope.dimension_count": 32,
    "qwen3.rope.freq_base": 5000.0,
    "tokenizer.ggml.model": "none",
    "x.on": True,
    "x.neg": -1,
  }
  found = {x.name: (x.type_name, x.shape) for x in tensors}
  assert found["blk.1.attn_k.weight"] == ("Q2_0", (64, 256))
  assert found["blk.0.attn_q_norm.weight"] == ("F32", (32,))
  assert found["token_embd.weight"] == ("F32", (257, 256))
  assert found["output.weight"] == ("F32", (257, 256))
  assert len(found) == 3 + 2 * 11


def test_the_package_reads_the_metadata(path):
  config = decoders.variant(layers=1)
  to_gguf(path, decoders.tree_of(config)[0], **llama(config))
  reader = gguf.GGUFReader(path)
  fields = {k: x.contents() for k, x in reader.fields.items()}
  assert fields["llama.rope.freq_base"] == 5000.0
  assert fields["general.file_type"] == 37
  kinds = {x.name: x.tensor_type.name for x in reader.tensors}
  assert kinds["blk.0.ffn_down.weight"] == "TQ2_0"
  assert kinds["blk.0.ffn_norm.weight"] == "F32"


def test_a_float_file_says_that_it_is_one(path):
  config = decoders.variant(layers=1)
  to_gguf(path, decoders.tree_of(config, ternary=False)[0], **llama(config))
  metadata, _ = gguf_file.read_header(path)
  assert metadata["general.file_type"] == 0
  assert all(isinstance(x, np.ndarray) for _, x in gguf_file.examine(path))


# Names, stacks and the order of rows.


def test_layers_may_lie_apart(path, tmp_path):
  config = decoders.variant()
  to_gguf(path, decoders.tree_of(config)[0], **llama(config))
  other = tmp_path / "other.gguf"
  to_gguf(other, decoders.tree_of(config, stacked=False)[0], **llama(config))
  first, second = values_of(path), values_of(other)
  assert first.keys() == second.keys()
  for name, x in first.items():
    np.testing.assert_array_equal(x, second[name])


NAMES = {
  "embed/embedding": "token_embd.weight",
  "final_norm/scale": "output_norm.weight",
  "head/kernel": "output.weight",
  "blocks_*/pre/scale": "blk.*.attn_norm.weight",
  "blocks_*/attn/query/kernel": "blk.*.attn_q.weight",
  "blocks_*/attn/key/kernel": "blk.*.attn_k.weight",
  "blocks_*/attn/value/kernel": "blk.*.attn_v.weight",
  "blocks_*/attn/out/kernel": "blk.*.attn_output.weight",
  "blocks_*/post/scale": "blk.*.ffn_norm.weight",
  "blocks_*/ffn/gate/kernel": "blk.*.ffn_gate.weight",
  "blocks_*/ffn/up/kernel": "blk.*.ffn_up.weight",
  "blocks_*/ffn/down/kernel": "blk.*.ffn_down.weight",
}
STACKED = {k.replace("blocks_*", "blocks/*"): x for k, x in NAMES.items()}


def renamed(tree, config, stack):
  """The tree under names of one's own, kernels of attention with heads."""
  c = config

  def block(x):
    a, n = x["self_attn"], () if stack is None else (c.layers,)
    heads = {"q": c.heads, "k": c.kv_heads, "v": c.kv_heads}
    attn = {
      name: {
        "kernel": a[f"{name[0]}_proj"]["kernel"].reshape(
          *n, c.width, heads[name[0]], c.head_size
        )
      }
      for name in ("query", "key", "value")
    }
    out = a["o_proj"]["kernel"].reshape(*n, c.heads, c.head_size, c.width)
    ffn = {k.removesuffix("_proj"): v for k, v in x["mlp"].items()}
    return {
      "pre": x["input_layernorm"],
      "attn": attn | {"out": {"kernel": out}},
      "post": x["post_attention_layernorm"],
      "ffn": ffn,
    }

  if stack is None:
    blocks = {f"blocks_{i}": block(x) for i, x in tree["layers"].items()}
    # A number of two digits is one, too.
    blocks["blocks_01"] = blocks.pop("blocks_1")
  else:
    blocks = {"blocks": block(tree["layers"])}
  rest = {
    "embed": tree["embed_tokens"],
    "final_norm": tree["norm"],
    "head": tree["lm_head"],
  }
  return {"params": blocks | rest}


@pytest.mark.parametrize("stack", [None, "blocks"])
def test_names_of_ones_own(path, tmp_path, stack):
  config = decoders.variant()
  tree, _ = decoders.tree_of(config, ternary=False, stacked=stack is not None)
  to_gguf(path, tree, **llama(config))
  names = NAMES if stack is None else STACKED
  other = tmp_path / "other.gguf"
  facts = llama(config, names=names, stacked=stack or ())
  to_gguf(other, renamed(tree, config, stack), **facts)
  first, second = values_of(path), values_of(other)
  assert first.keys() == second.keys()
  for name, x in first.items():
    np.testing.assert_array_equal(x, second[name])


def test_equinox_stacks_kernels_out_by_in(path):
  x = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
  names = {"net/layers/*/w": "blk.*.ffn_up.weight"}
  options = {"names": names, "stacked": "layers", "channel_axis": 0}
  to_gguf(path, {"net": {"layers": {"w": x}}}, **options)
  found = values_of(path)
  for i in (0, 1):
    np.testing.assert_array_equal(found[f"blk.{i}.ffn_up.weight"], x[i])


def test_a_stack_without_names(path):
  x = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
  tree = {"layers": {"0": {"b": x[0]}, "w": x}, "w": x[0]}
  to_gguf(path, tree, stacked="layers")
  found = values_of(path)
  assert sorted(found) == ["layers.0.b", "layers.0.w", "layers.1.w", "w"]
  np.testing.assert_array_equal(found["layers.1.w"], x[1].T)
  to_gguf(path, {"a": {"layers": x}}, stacked="/a/layers", overwrite=True)
  assert sorted(values_of(path)) == ["a.layers.0", "a.layers.1"]


SIZES = st.tuples(st.integers(1, 4), st.integers(1, 5), st.integers(1, 3))


@hypothesis.settings(max_examples=30, deadline=None, derandomize=True)
@hypothesis.given(sizes=SIZES)
def test_the_order_of_rows_is_that_of_the_rotation(sizes):
  heads, half, width = sizes
  rng = np.random.default_rng(0)
  w = rng.normal(size=(heads * 2 * half, width))
  x = rng.normal(size=(3, width))

  def turned(w, halves):
    return rotated((x @ w.T).reshape(3, heads, 2 * half), 100.0, halves)

  a = turned(w, True)
  b = turned(reordered(w, "pairs", heads), False)
  # What matters: products of queries and keys within a head.
  products = [np.einsum("qhd,khd->hqk", y, y) for y in (a, b)]
  np.testing.assert_allclose(*products, atol=1e-12)
  back = reordered(reordered(w, "pairs", heads), "halves", heads)
  np.testing.assert_array_equal(back, w)


# Q2_0.


def test_q2_0_is_the_documented_layout(path):
  codes = np.random.default_rng(0).integers(-1, 2, (128, 3)).astype(np.int8)
  scale = np.array([[0.5, 1.0, 2.0], [3.0, 0.25, 5.0]], np.float32)
  leaf = decoders.packed(codes, scale.reshape(1, 2, 3)[0])
  assert to_gguf(path, {"kernel": leaf}, "Q2_0") == {"kernel": 0.0}
  _, (tensor,) = gguf_file.read_header(path)
  assert (tensor.type, tensor.shape, tensor.nbytes) == (42, (3, 128), 6 * 18)
  data = path.read_bytes()[tensor.offset :][: tensor.nbytes]
  for n in range(6):
    out, part = divmod(n, 2)
    block = data[18 * n : 18 * (n + 1)]
    assert np.frombuffer(block[:2], np.float16) == scale[part, out]
    for i in range(64):
      code = codes[64 * part + i, out]
      assert block[2 + i // 4] >> 2 * (i % 4) & 3 == code + 1
  ((_, back),) = gguf_file.examine(path)
  np.testing.assert_array_equal(np.asarray(back.w_p), scale.T)
  wanted = (codes * np.repeat(scale, 64, 0)).T
  np.testing.assert_array_equal(gguf_file.values(path, tensor), wanted)
  np.testing.assert_array_equal(np.asarray(back.dequantize()), wanted)


@pytest.mark.parametrize(
  ("rows", "type", "match"),
  [
    (192, "TQ2_0", r"rows of 192 weights, no multiple of 256 .* 0\.0e\+00"),
    (96, "Q2_0", r"^Q2_0 has .* each 64 .* rows of 96 weights, no multiple"),
  ],
)
def test_rows_that_do_not_divide(path, rows, type, match):
  codes = np.ones((rows, 2), np.int8)
  tree = {"kernel": decoders.packed(codes, np.ones((), np.float32))}
  with pytest.raises(ValueError, match=match):
    to_gguf(path, tree, type)
  assert not path.exists()


def test_groups_of_64_do_not_fit_blocks_of_256(path):
  codes = np.ones((256, 1), np.int8)
  scale = np.float32([[1.0], [3.0], [1.0], [3.0]])
  tree = {"kernel": decoders.packed(codes, scale)}
  assert to_gguf(path, tree, "Q2_0") == {"kernel": 0.0}
  # Magnitudes 1 and 3 become 2: sqrt(1 / 5).
  with pytest.raises(ValueError, match=r"its scale changes .* 4\.5e-01\."):
    to_gguf(path, tree, overwrite=True)


def test_damage_to_q2_0_is_told(path, tmp_path):
  codes = np.ones((64, 1), np.int8)
  to_gguf(path, {"w": decoders.packed(codes, np.ones((), np.float32))}, "Q2_0")
  _, (tensor,) = gguf_file.read_header(path)
  good = path.read_bytes()
  bad = bytearray(good)
  bad[tensor.offset + 2] = 0xFF
  path.write_bytes(bad)
  with pytest.raises(ValueError, match="w is damaged: it has a code that is"):
    gguf_file.values(path, tensor)
  path.write_bytes(good[: tensor.offset + 3])
  with pytest.raises(ValueError, match="the file ends before it does"):
    gguf_file.values(path, tensor)


# Tokenizers.


def gpt2_bytes():
  """The characters of bytes, as the table of GPT-2 is described."""
  shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
  others = iter(range(256, 512))
  return [chr(i if i in shown else next(others)) for i in range(256)]


def strings_of(path, key):
  field = gguf.GGUFReader(path).fields[key]
  return field.contents()


SMALL = {"layers": 1, "width": 64, "heads": 1, "kv_heads": 1, "hidden": 64}


@pytest.mark.parametrize(
  ("vocab", "end", "pad"),
  [(257, 256, False), (256, 0, False), (260, 256, True)],
)
def test_the_tokenizer_of_bytes(path, vocab, end, pad):
  config = decoders.variant(vocab=vocab, **SMALL)
  tree, _ = decoders.tree_of(config, ternary=False)
  to_gguf(path, tree, tokenizer="bytes", pad_tokens=pad, **llama(config))
  fields = {k: x.contents() for k, x in gguf.GGUFReader(path).fields.items()}
  tokens = [*gpt2_bytes(), "<|endoftext|>"]
  tokens += [f"[PAD{i}]" for i in range(257, vocab)]
  types = [1] * 256 + [3, 5, 5, 5]
  assert {k: x for k, x in fields.items() if k.startswith("tok")} == {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "gpt-2",
    "tokenizer.ggml.tokens": tokens[:vocab],
    "tokenizer.ggml.token_type": types[:vocab],
    "tokenizer.ggml.merges": ["▁ ▁"],
    "tokenizer.ggml.eos_token_id": end,
    "tokenizer.ggml.add_bos_token": False,
  }


def bpe(tokens=("ab", "<|endoftext|>", "<b>"), **changes):
  """A tokenizer.json of 256 bytes, one merge and two special tokens."""
  vocab = {x: i for i, x in enumerate(gpt2_bytes())} | {tokens[0]: 256}
  added = [
    {"id": 257 + i, "content": x, "special": x != "<b>"}
    for i, x in enumerate(tokens[1:])
  ]
  spec = {
    "model": {"type": "BPE", "vocab": vocab, "merges": [["a", "b"]]},
    "added_tokens": added,
    "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False},
    "normalizer": None,
    "post_processor": None,
  }
  return spec | changes


def split(pattern):
  return {
    "type": "Sequence",
    "pretokenizers": [
      {
        "type": "Split",
        "pattern": {"Regex": pattern},
        "behavior": "Isolated",
        "invert": False,
      },
      {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
    ],
  }


QWEN = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|"
  r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA_3 = QWEN.replace(r"|\p{N}|", r"|\p{N}{1,3}|")


@pytest.mark.parametrize(
  ("spec", "wanted"),
  [
    (bpe(), {"pre": "gpt-2"}),
    (
      bpe(
        pre_tokenizer=split(LLAMA_3),
        post_processor={
          "type": "Sequence",
          "processors": [
            {"type": "ByteLevel"},
            {
              "type": "TemplateProcessing",
              "single": [
                {"SpecialToken": {"id": "<b>", "type_id": 0}},
                {"Sequence": {"id": "A", "type_id": 0}},
              ],
            },
          ],
        },
      ),
      {"pre": "llama-bpe", "add_bos_token": True, "bos_token_id": 258},
    ),
    (bpe(pre_tokenizer=split(QWEN)), {"pre": "qwen2"}),
  ],
  ids=["gpt-2", "llama-bpe", "qwen2"],
)
def test_a_tokenizer_of_hugging_face(path, tmp_path, spec, wanted):
  (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
  config = decoders.variant(vocab=259, **SMALL)
  tree, _ = decoders.tree_of(config, ternary=False)
  to_gguf(path, tree, tokenizer=tmp_path / "tokenizer.json", **llama(config))
  fields = {k: x.contents() for k, x in gguf.GGUFReader(path).fields.items()}
  assert {
    k.removeprefix("tokenizer.ggml."): x
    for k, x in fields.items()
    if k.startswith("tok")
  } == {
    "model": "gpt2",
    "tokens": [*gpt2_bytes(), "ab", "<|endoftext|>", "<b>"],
    "token_type": [1] * 257 + [3, 4],
    "merges": ["a b"],
    "eos_token_id": 257,
    "add_bos_token": False,
  } | wanted


def write(folder, spec):
  file = folder / "tokenizer.json"
  file.write_text(spec if isinstance(spec, str) else json.dumps(spec))
  return file


BPE = bpe()["model"]


@pytest.mark.parametrize(
  ("spec", "match"),
  [
    ("{", "it is no JSON"),
    ("[]", "it is no JSON object"),
    ({}, "it has no BPE model"),
    (bpe(model={"type": "Unigram", "vocab": [["a", 0.0]]}), "no BPE model"),
    (bpe(model=BPE | {"type": "WordPiece"}), "its model is not BPE"),
    (
      bpe(tokens=("ab", "<|endoftext|>")),
      "has 258 tokens, but the .* 259: .*pad",
    ),
    (bpe(tokens=("ab", "<|endoftext|>", "<b>", "<c>")), "has 260 tokens, but"),
    (bpe(model=BPE | {"vocab": {"a": 0, "b": 5}}), "are not numbered 0, 1"),
    (bpe(pre_tokenizer=None), "does not end with ByteLevel"),
    (bpe(pre_tokenizer={"type": "Metaspace"}), "does not end with ByteLevel"),
    (
      bpe(pre_tokenizer=split("a+")),
      "splits as no tokenizer .*ggml.pre': NAME",
    ),
    (
      bpe(pre_tokenizer={"type": "ByteLevel", "add_prefix_space": True}),
      "it puts a space in front",
    ),
    (bpe(normalizer={"type": "Lowercase"}), "normalizes a text by Lowercase"),
    (bpe(model=BPE | {"ignore_merges": True}), "leaves out merges"),
    (bpe(model=BPE | {"end_of_word_suffix": "</w>"}), "prefixes or suffixes"),
    (
      bpe(tokens=("ab", "<e>", "<b>")),
      r"no token ends a text.*<\|endoftext\|>",
    ),
  ],
)
def test_tokenizers_that_do_not_fit(path, tmp_path, spec, match):
  config = decoders.variant(vocab=259, **SMALL)
  tree, _ = decoders.tree_of(config, ternary=False)
  file = write(tmp_path, spec)
  with pytest.raises(ValueError, match=rf"^tokenizer .*{match}"):
    to_gguf(path, tree, tokenizer=file, **llama(config))
  assert not path.exists()


def test_what_cannot_be_told_of_a_tokenizer_can_be_given(path, tmp_path):
  config = decoders.variant(vocab=259, **SMALL)
  tree, _ = decoders.tree_of(config, ternary=False)
  spec = bpe(tokens=("ab", "<e>", "<b>"), pre_tokenizer=split("a+"))
  file, facts = write(tmp_path, spec), llama(config)
  given = {"tokenizer.ggml.pre": "mine", "tokenizer.ggml.eos_token_id": 257}
  facts["metadata"] |= given
  to_gguf(path, tree, tokenizer=file, **facts)
  metadata, _ = gguf_file.read_header(path)
  assert given.items() <= metadata.items()
  # The file beside it tells the end, too.
  end = {"eos_token": {"content": "<b>"}}
  (tmp_path / "tokenizer_config.json").write_text(json.dumps(end))
  del facts["metadata"]["tokenizer.ggml.eos_token_id"]
  to_gguf(path, tree, tokenizer=file, overwrite=True, **facts)
  metadata, _ = gguf_file.read_header(path)
  assert metadata["tokenizer.ggml.eos_token_id"] == 258


def test_a_tokenizer_needs_the_size_of_the_vocabulary(path, tmp_path):
  with pytest.raises(ValueError, match=r"needs metadata\['tern_jax.vocab_size"):
    to_gguf(path, {"w": jnp.ones(1)}, tokenizer="bytes")
  config = decoders.variant(**SMALL)
  tree, _ = decoders.tree_of(config, ternary=False)
  with pytest.raises(FileNotFoundError):
    to_gguf(path, tree, tokenizer=tmp_path / "nothing", **llama(config))
  config = decoders.variant(**SMALL | {"vocab": 255})
  tree, _ = decoders.tree_of(config, ternary=False)
  with pytest.raises(
    ValueError, match="has 256 tokens, but the vocabulary 255"
  ):
    to_gguf(path, tree, tokenizer="bytes", **llama(config))


# What is refused.


@pytest.mark.parametrize(
  ("changes", "error", "match"),
  [
    ({"architecture": "gpt2"}, ValueError, "architecture must be one of"),
    ({"head_size": 5}, ValueError, "head_size=5 is odd"),
    ({"heads": 3, "head_size": 0}, ValueError, "no multiple of heads=3"),
    ({"kv_heads": 3}, ValueError, "heads=4 is no multiple of kv_heads=3"),
    ({"layers": 2.0}, TypeError, "layers must be an integer, got 2.0"),
    ({"layers": True}, TypeError, "layers must be an integer, got True"),
    ({"layers": 0}, ValueError, "layers must be positive"),
    ({"kv_heads": -1}, ValueError, "kv_heads must be positive"),
    ({"eps": float("nan")}, ValueError, "eps must be positive and finite"),
    ({"rope_base": "1e4"}, TypeError, "rope_base must be a number"),
    ({"tied": 1}, TypeError, "tied must be True or False"),
    ({"rope": "half"}, ValueError, "rope must be one of .*'pairs'"),
    ({"activation": "gelu"}, ValueError, "activation must be one of"),
  ],
)
def test_facts_that_make_no_decoder(changes, error, match):
  with pytest.raises(error, match=match):
    dataclasses.replace(decoders.TINY, **changes)


@pytest.mark.parametrize(
  ("changes", "match"),
  [
    ({"activation": "relu2"}, "no llama of activation='relu2'"),
    ({"architecture": "bitnet"}, "no bitnet of tied=False"),
    ({"architecture": "qwen2", "head_size": 32}, "no qwen2 of head_size=32"),
  ],
)
def test_decoders_that_llama_cpp_does_not_compute(changes, match):
  with pytest.raises(ValueError, match=match):
    llama(dataclasses.replace(decoders.TINY, **changes))


def without(tree, *keys):
  """The tree without a leaf."""
  first, *rest = keys
  tree = dict(tree)
  if not rest:
    del tree[first]
  else:
    tree[first] = without(tree[first], *rest)
  return tree


@pytest.mark.parametrize(
  ("change", "match"),
  [
    (
      lambda x: without(x, "layers", "mlp", "up_proj"),
      "missing are blk.0.ffn_up.weight, blk.1.ffn_up.weight",
    ),
    (
      lambda x: x | {"head": {"kernel": jnp.ones(2)}},
      "no pattern of names= tells which tensor is head/kernel",
    ),
    (
      lambda x: x | {"norm": {"scale": jnp.ones(3)}},
      r"output_norm.weight is \[3\], not \[64\]",
    ),
    (
      lambda x: x | {"layers": x["layers"] | {"input_layernorm": {"scale":
        jnp.ones((3, 64))}}},
      "superfluous are blk.2.attn_norm.weight",
    ),
    (
      lambda x: {"a": x, "b": x},
      "two leaves have the name blk.0.attn_k.weight",
    ),
    (
      lambda x: x | {"norm": {"scale": "text"}},
      "norm/scale: leaves must be arrays",
    ),
    (
      lambda x: x | {"layers": x["layers"] | {"input_layernorm": {"scale":
        jnp.float32(1.0)}}},
      "layers/input_layernorm/scale is a number",
    ),
  ],
)  # fmt: skip
def test_trees_that_are_no_such_decoder(path, change, match):
  config = decoders.variant(**SMALL | {"layers": 2})
  tree, _ = decoders.tree_of(config, ternary=False)
  with pytest.raises((ValueError, TypeError), match=match):
    to_gguf(path, change(tree), **llama(config))
  assert not path.exists()


def test_a_head_beside_a_tied_embedding(path):
  config = decoders.variant(**SMALL)
  tree, _ = decoders.tree_of(config, ternary=False)
  facts = llama(dataclasses.replace(config, tied=True))
  with pytest.raises(ValueError, match=r"which tensor is lm_head/kernel: add"):
    to_gguf(path, tree, **facts)


W = {"a": {"w": jnp.ones((2, 2))}}


@pytest.mark.parametrize(
  ("options", "error", "match"),
  [
    ({"names": {"b/w": "x"}}, ValueError, "which tensor is a/w"),
    (
      {"names": {"a/w": "x", "b/w": "y"}},
      ValueError,
      "names has b/w, which matches no leaf: they are a/w",
    ),
    ({"names": {"a/w": "x", "w": "y"}}, ValueError, "a/w has several names"),
    ({"names": {"a_*/w": "x"}}, ValueError, r"one \* at most"),
    ({"names": {"a/*/*": "x.*.*"}}, ValueError, r"one \* at most"),
    ({"stacked": "b"}, ValueError, "pattern 'b' matches no leaf"),
    ({"stacked": 3}, TypeError, "stacked=3: give a pattern"),
    (
      {"metadata": {"general.file_type": 1}},
      ValueError,
      "metadata has general.file_type, which to_gguf writes itself",
    ),
    ({"metadata": {"x": None}}, TypeError, "metadata has x: None, but a value"),
    ({"metadata": {"x": []}}, TypeError, "that is not empty"),
    ({"metadata": {"x": [1, "a"]}}, TypeError, "a sequence of one of them"),
    ({"type": "Q4_0"}, ValueError, "type must be one of .*Q2_0"),
    ({"shapes": {"a.w": (2, 3)}}, ValueError, r"a.w is \[2, 2\], not \[2, 3\]"),
  ],
)
def test_arguments_that_make_no_file(path, options, error, match):
  with pytest.raises(error, match=match):
    to_gguf(path, W, **options)
  assert not path.exists()


# The command.


CONFIG = {
  "model_type": "llama",
  "vocab_size": 257,
  "hidden_size": 256,
  "num_hidden_layers": 1,
  "num_attention_heads": 4,
  "num_key_value_heads": 2,
  "intermediate_size": 256,
  "max_position_embeddings": 64,
  "rms_norm_eps": 1e-5,
  "rope_theta": 5000.0,
}


def test_the_command_exports_a_decoder(call, path, tmp_path):
  config = decoders.variant(layers=1, hidden=256, rope="pairs")
  tree, _ = decoders.tree_of(config)
  save_packed(tmp_path / "net", tree)
  file = tmp_path / "config.json"
  file.write_text(json.dumps(CONFIG))
  status, out, err = call(
    *("export", tmp_path / "net", path, "--to", "gguf", "--type", "Q2_0"),
    *("--config", file, "--rope", "pairs", "--tokenizer", "bytes"),
  )
  assert (status, err) == (0, "")
  assert "blk.0.attn_q.weight: relative RMS error 0.0e+00" in out
  wanted = tmp_path / "wanted.gguf"
  to_gguf(wanted, tree, "Q2_0", tokenizer="bytes", **llama(config))
  assert path.read_bytes() == wanted.read_bytes()
  status, out, _ = call("inspect", path)
  assert (status, out.splitlines()[0].split(": ", 1)[1]) == (0, "GGUF, Q2_0")
  status, *_ = call("verify", path)
  assert status == 0
  status, _, err = call(
    *("export", tmp_path / "net", tmp_path / "x", "--to", "gguf"),
    *("--rope", "pairs"),
  )
  assert (status, "--rope pairs needs --config" in err) == (2, True)


def test_the_command_takes_names(call, path, tmp_path):
  config = decoders.variant(layers=2)
  tree, _ = decoders.tree_of(config, ternary=False)
  own = renamed(tree, config, "blocks")
  source = tmp_path / "net.safetensors"
  to_safetensors(source, own)
  names, file = tmp_path / "names.json", tmp_path / "config.json"
  names.write_text(json.dumps(STACKED))
  more = {"num_hidden_layers": 2, "intermediate_size": 512}
  file.write_text(json.dumps(CONFIG | more))
  base = ("export", source, path, "--to", "gguf")
  options = ("--names", names, "--stacked", "blocks")
  status, _, err = call(*base, "--config", file, *options)
  assert (status, err) == (0, "")
  wanted = tmp_path / "wanted.gguf"
  to_gguf(wanted, tree, **llama(config))
  first, second = values_of(path), values_of(wanted)
  assert first.keys() == second.keys()
  for name, x in first.items():
    np.testing.assert_array_equal(x, second[name])
  status, *_ = call(*base, "--overwrite", *options)
  assert (status, set(values_of(path))) == (0, set(second))
  names.write_text(json.dumps({"a": 1}))
  status, _, err = call(*base, "--overwrite", *options)
  assert (status, "the name for 'a' is no string" in err) == (2, True)


def test_the_facts_of_a_decoder():
  config = Decoder("llama", 256, 2, width=64, heads=4, hidden=128, context=9)
  assert (config.kv_heads, config.head_size) == (4, 16)
  assert set(config.shapes()) == set(
    dataclasses.replace(config, rope="pairs").shapes()
  )
  assert config.order("halves") == {}
  assert config.order("pairs") == {
    f"blk.{i}.attn_{part}.weight": ("pairs", 4) for i in (0, 1) for part in "qk"
  }
