"""Folders of Hugging Face's transformers, out and in; GGUF files, in."""

import dataclasses
import json
import os

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

import tern_jax
from tern_jax.checkpoint import save_packed
from tern_jax.export import files, import_llama, llama, to_gguf, to_transformers
from tests import decoders
from tests.decoders import FromTree, forward, rms, unpacked
from tests.helpers import assert_same, long

FLOAT = {"ternary": False}
SMALL = {"width": 64, "heads": 2, "kv_heads": 1, "head_size": 32, "hidden": 64}


@pytest.fixture
def folder(tmp_path):
  return tmp_path / "runs" / "net"


def small(architecture="llama", **changes):
  return decoders.variant(architecture, **SMALL | changes)


def named(config, tree):
  """Tensors of a stacked float tree as transformers names them."""
  found = {
    "model.embed_tokens.weight": tree["embed_tokens"]["embedding"],
    "model.norm.weight": tree["norm"]["scale"],
  }
  if "lm_head" in tree:
    found["lm_head.weight"] = tree["lm_head"]["kernel"].T
  for i in range(config.layers):
    for name, part in tree["layers"].items():
      inner = {"": part} if "scale" in part else part
      for key, leaves in inner.items():
        module = ".".join(filter(None, (f"model.layers.{i}", name, key)))
        for kind, x in leaves.items():
          kind = "bias" if kind == "bias" else "weight"
          found[f"{module}.{kind}"] = x[i].T
  return {k: np.ascontiguousarray(x) for k, x in found.items()}


def config_of(config, **changes):
  """The config.json of a decoder, as transformers 4 writes it."""
  c = config
  return {
    "model_type": c.architecture,
    "vocab_size": c.vocab,
    "hidden_size": c.width,
    "num_hidden_layers": c.layers,
    "num_attention_heads": c.heads,
    "num_key_value_heads": c.kv_heads,
    "head_dim": c.head_size,
    "intermediate_size": c.hidden,
    "max_position_embeddings": c.context,
    "rms_norm_eps": c.eps,
    "rope_theta": c.rope_base,
    "rope_scaling": None,
    "tie_word_embeddings": c.tied,
    "hidden_act": c.activation,
  } | changes


def save(folder, facts, tensors, shards=1):
  """Writes a folder as transformers does."""
  folder.mkdir(parents=True, exist_ok=True)
  (folder / "config.json").write_text(json.dumps(facts))
  if shards == 1:
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    return
  placed = {}
  for i in range(shards):
    name = f"model-{i + 1:05}-of-{shards:05}.safetensors"
    part = dict(list(tensors.items())[i::shards])
    safetensors.numpy.save_file(part, folder / name)
    placed |= dict.fromkeys(part, name)
  index = {"metadata": {}, "weight_map": placed}
  text = json.dumps(index)
  (folder / "model.safetensors.index.json").write_text(text)


# Float checkpoints in.


@pytest.mark.parametrize(
  ("architecture", "changes", "shards"),
  [
    ("llama", {}, 1),
    ("llama", {"tied": True}, 3),
    ("qwen2", {"tied": True}, 1),
    ("qwen3", {"rope": "pairs"}, 2),
    ("bitnet", {"activation": "relu2", "tied": False}, 1),
  ],
)
def test_a_float_checkpoint_comes_in(folder, architecture, changes, shards):
  config = small(architecture, **changes)
  halves = dataclasses.replace(config, rope="halves")
  tree, dense = decoders.tree_of(config, **FLOAT)
  save(folder, config_of(config), named(config, tree), shards)
  found, facts = import_llama(folder, rope=config.rope)
  assert facts == config
  assert jax.tree.structure(found) == jax.tree.structure(tree)
  if config.rope == "halves":
    assert_same(found, jax.tree.map(jnp.asarray, tree))
  # What it computes is the same, however it rotates the heads.
  wide = jax.tree.map(lambda x: np.asarray(x, np.float64), found)
  got = forward(config, FromTree(wide), config.rope == "halves")
  assert rms(got, forward(halves, FromTree(dense), halves=True)) < 1e-9


def test_layers_apart_and_other_floats(folder):
  config = small(tied=True)
  tree, _ = decoders.tree_of(config, **FLOAT)
  tensors = named(config, tree)
  half = {k: x.astype(ml_dtypes.bfloat16) for k, x in tensors.items()}
  half["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(2, np.float32)
  half["lm_head.weight"] = half["model.embed_tokens.weight"]
  save(folder, config_of(config, num_key_value_heads=1), half)
  found, _ = import_llama(folder, stacked=False, dtype=jnp.bfloat16)
  kernel = found["layers"]["1"]["mlp"]["up_proj"]["kernel"]
  assert kernel.dtype == jnp.bfloat16
  wanted = tree["layers"]["mlp"]["up_proj"]["kernel"][1]
  np.testing.assert_array_equal(kernel, wanted.astype(ml_dtypes.bfloat16))
  wide, _ = import_llama(folder)
  assert {x.dtype for x in jax.tree.leaves(wide)} == {np.dtype("float32")}


@pytest.mark.long
def test_a_ternary_training_starts_from_it(folder, tmp_path):
  config = small()
  tree, _ = decoders.tree_of(config, **FLOAT)
  save(folder, config_of(config), named(config, tree))
  params, facts = import_llama(folder)
  where = tern_jax.kernels(exclude="lm_head")
  tern = tern_jax.ParamTransform(
    tern_jax.TWN(channel_axis=-1),
    where=where,
    stacked="layers",
    group_size=64,
  )
  start = jax.jit(lambda p: tern.discretize(*tern.init(p)))(params)
  packed = tern_jax.pack(start)
  errors = to_gguf(tmp_path / "net.gguf", packed, "Q2_0", **llama(facts))
  assert len(errors) == 14
  assert max(errors.values()) < 2.0**-11


# Packed weights out and in.


@pytest.mark.parametrize(
  ("architecture", "changes"),
  [
    ("llama", {"rope": "pairs"}),
    ("qwen2", {}),
    ("bitnet", {}),
    long("qwen3", {"tied": True}),
    long("llama", {"tied": True}),
    long("qwen2", {"rope": "pairs", "tied": True}),
    long("bitnet", {"tied": False, "activation": "relu2"}),
  ],
)
def test_packed_weights_go_out_and_come_back(folder, architecture, changes):
  config = small(architecture, **changes)
  tree, _ = decoders.tree_of(config)
  before = jax.tree.map(np.copy, tree)
  to_transformers(folder, tree, config)
  assert_same(tree, before)
  assert {x.name for x in folder.iterdir()} == {
    "config.json",
    "model.safetensors",
  }
  found, facts = import_llama(folder, rope=config.rope)
  assert facts == config
  assert jax.tree.structure(found) == jax.tree.structure(tree)
  for a, b in zip(
    jax.tree.leaves(unpacked(found)),
    jax.tree.leaves(unpacked(tree)),
    strict=True,
  ):
    # A bias is divided by the scale, and multiplied again.
    np.testing.assert_allclose(a, b, rtol=1e-6)


def test_the_layout_is_the_documented_one(folder):
  config = small("qwen2", layers=1)
  tree, dense = decoders.tree_of(config)
  to_transformers(folder, tree, config)
  facts = json.loads((folder / "config.json").read_text())
  assert facts == {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "vocab_size": 257,
    "hidden_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 5000.0,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "dtype": "float32",
    "bos_token_id": None,
    "eos_token_id": None,
    "quantization_config": {
      "quant_method": "bitnet",
      "linear_class": "autobitlinear",
      "quantization_mode": "offline",
      "modules_to_not_convert": ["lm_head"],
    },
  }
  found = safetensors.numpy.load_file(folder / "model.safetensors")
  assert len(found) == 3 + 2 + 7 * 2 + 3
  layer = decoders.layer(dense["layers"], 0)
  module = "model.layers.0.self_attn.q_proj"
  data, (scale,) = found[f"{module}.weight"], found[f"{module}.weight_scale"]
  assert (data.dtype, data.shape) == (np.uint8, (16, 64))
  kernel = layer["self_attn"]["q_proj"]["kernel"]
  for row in range(64):
    part, r = divmod(row, 16)
    codes = (data[r] >> 2 * part & 3).astype(np.float64) - 1
    np.testing.assert_array_equal(codes * scale, kernel[:, row])
  # transformers multiplies it by the scale once more.
  bias = layer["self_attn"]["q_proj"]["bias"]
  np.testing.assert_allclose(found[f"{module}.bias"] * scale, bias, rtol=1e-6)
  np.testing.assert_array_equal(
    found["lm_head.weight"], dense["lm_head"]["kernel"].T
  )


def test_dense_matrices_stay_so(folder):
  config = small(tied=True)
  tree, _ = decoders.tree_of(config)
  down = tree["layers"]["mlp"]["down_proj"]["kernel"]
  tree["layers"]["mlp"]["down_proj"]["kernel"] = unpacked(down)
  to_transformers(folder, tree, config)
  facts = json.loads((folder / "config.json").read_text())
  assert facts["quantization_config"]["modules_to_not_convert"] == [
    "lm_head",
    "model.layers.0.mlp.down_proj",
    "model.layers.1.mlp.down_proj",
  ]
  found, _ = import_llama(folder)
  kernel = found["layers"]["mlp"]["down_proj"]["kernel"]
  np.testing.assert_array_equal(kernel, unpacked(down))


def test_what_bitlinear_divides_by(folder):
  config = small()
  tree, _ = decoders.tree_of(config)
  to_transformers(folder, tree, config)
  file = folder / "model.safetensors"
  tensors = safetensors.numpy.load_file(file)
  for name in tensors:
    if name.endswith("_scale"):
      tensors[name] = 1 / tensors[name]
  facts = json.loads((folder / "config.json").read_text())
  del facts["quantization_config"]["linear_class"]
  save(folder, facts, tensors)
  found, _ = import_llama(folder)
  for a, b in zip(
    jax.tree.leaves(unpacked(found)),
    jax.tree.leaves(unpacked(tree)),
    strict=True,
  ):
    np.testing.assert_allclose(a, b, rtol=1e-6)


@pytest.mark.parametrize(
  ("architecture", "rope", "type"),
  [
    ("llama", "halves", "TQ2_0"),
    ("qwen2", "pairs", "Q2_0"),
    ("bitnet", "halves", "TQ1_0"),
    long("llama", "pairs", "Q2_0"),
    long("qwen3", "pairs", "TQ1_0"),
  ],
)
def test_a_gguf_file_comes_back(tmp_path, architecture, rope, type):
  config = decoders.variant(architecture, rope=rope)
  group = 64 if type == "Q2_0" else None
  tree, _ = decoders.tree_of(config, group=group)
  path = tmp_path / "net.gguf"
  to_gguf(path, tree, type, tokenizer="bytes", **llama(config))
  found, facts = import_llama(path, rope=rope)
  assert facts == dataclasses.replace(config, eps=float(np.float32(1e-5)))
  assert_same(found, jax.tree.map(jnp.asarray, tree))


def test_scales_are_as_coarse_as_the_file_allows(tmp_path):
  config = small(**{"width": 128, "hidden": 128, "layers": 1})
  tree, _ = decoders.tree_of(config)
  codes = np.random.default_rng(0).integers(-1, 2, (1, 128, 128)).astype("i1")
  codes[:, :64, 3] = codes[:, :, 5] = 0
  scale = np.linspace(0.5, 1, 128).astype(np.float16).astype(np.float32)
  channels = dataclasses.replace(
    decoders.packed(codes, np.ones((1, 1, 1), np.float32)),
    **dict.fromkeys(("w_p", "w_n"), jnp.asarray(scale.reshape(1, 1, 128))),
  )
  tree["layers"]["mlp"]["up_proj"]["kernel"] = channels
  path = tmp_path / "net.gguf"
  to_gguf(path, tree, "Q2_0", **llama(config))
  found, _ = import_llama(path)
  back = found["layers"]["mlp"]["up_proj"]["kernel"]
  assert back.w_p.shape == (1, 1, 128)
  np.testing.assert_array_equal(unpacked(back), unpacked(channels))
  assert back.w_p[0, 0, 5] == 1.0  # of weights that do not tell it
  gate = found["layers"]["mlp"]["gate_proj"]["kernel"]
  assert gate.w_p.shape == (1, 1, 1)
  apart, _ = import_llama(path, stacked=False)
  assert apart["layers"]["0"]["mlp"]["gate_proj"]["kernel"].w_p.shape == ()


def test_a_ternary_embedding_comes_back(tmp_path):
  config = small(vocab=256, width=128, hidden=128, layers=1)
  tree, _ = decoders.tree_of(config)
  codes = np.random.default_rng(0).integers(-1, 2, (256, 128)).astype("i1")
  scale = np.repeat(np.float32([[0.5], [0.25]]), 128, 0)
  table = decoders.packed(codes, np.ones((), np.float32))
  table = dataclasses.replace(table, w_p=scale, w_n=scale)
  tree["embed_tokens"]["embedding"] = table
  path = tmp_path / "net.gguf"
  to_gguf(path, tree, "Q2_0", **llama(config))
  back = import_llama(path)[0]["embed_tokens"]["embedding"]
  assert back.w_p.shape == (256, 1)
  np.testing.assert_array_equal(unpacked(back), codes * scale)


@pytest.mark.long
def test_packed_weights_go_back_into_training(folder):
  config = small(tied=True)
  tree, _ = decoders.tree_of(config)
  to_transformers(folder, tree, config)
  found, _ = import_llama(folder)
  tern = tern_jax.ParamTransform(tern_jax.TWN(), stacked="layers")
  params, state = tern_jax.from_packed(found, tern)
  again = tern_jax.pack(tern.discretize(params, state))
  assert_same(again, jax.tree.map(jnp.asarray, tree))


# What is refused.


def change(tree, kernel):
  mlp = tree["layers"]["mlp"] | {"up_proj": {"kernel": kernel}}
  return tree | {"layers": tree["layers"] | {"mlp": mlp}}


def leaf_of(shape, scale, codes=1):
  codes = np.broadcast_to(np.int8(codes), shape)
  return decoders.packed(np.ascontiguousarray(codes), np.float32(scale))


@pytest.mark.parametrize(
  ("kernel", "match"),
  [
    (
      # Magnitudes 1 and 3 become 2: sqrt(1 / 5).
      leaf_of(
        (2, 64, 64), np.repeat([[[1.0, 3.0]]], 32, 2) + np.zeros((2, 1, 1))
      ),
      r"blk.0.ffn_up.weight: several scales; .* RMS error would be 4\.5e-01\.",
    ),
    (leaf_of((2, 64, 64), -1.0), "magnitudes that are not positive and finite"),
    (leaf_of((2, 64, 64), np.nan), "magnitudes that are not positive"),
  ],
)
def test_leaves_that_do_not_fit_the_layout(folder, kernel, match):
  config = small()
  tree, _ = decoders.tree_of(config)
  with pytest.raises(
    ValueError, match=rf"^transformers has one scale .*{match}"
  ):
    to_transformers(folder, change(tree, kernel), config)
  assert not folder.parent.exists()


def test_two_magnitudes_are_refused_with_the_error(folder):
  config = small()
  tree, _ = decoders.tree_of(config)
  kernel = leaf_of((2, 64, 64), 1.0, np.where(np.arange(64) % 2, 1, -1))
  kernel = dataclasses.replace(kernel, w_n=kernel.w_n * 3)
  with pytest.raises(ValueError, match=r"w_p and w_n differ; .* 4\.5e-01"):
    to_transformers(folder, change(tree, kernel), config)
  # A matrix of zeros tells no scale.
  zero = leaf_of((2, 64, 64), 1.0, 0)
  to_transformers(folder, change(tree, zero), config)
  found, _ = import_llama(folder)
  assert not np.any(unpacked(found["layers"]["mlp"]["up_proj"]["kernel"]))


@pytest.mark.parametrize(
  ("config", "edit", "match"),
  [
    (small(), lambda x: x | {"a": {"b": jnp.ones(1)}}, "which tensor is a/b"),
    (
      small(tied=True),
      lambda x: x | {"lm_head": {"kernel": jnp.ones((64, 257))}},
      "which tensor is lm_head/kernel",
    ),
    (
      small(),
      lambda x: {k: v for k, v in x.items() if k != "norm"},
      "missing are output_norm.weight",
    ),
    (
      small(),
      lambda x: unpacked(x),
      "no ternary weights",
    ),
    (
      small(),
      lambda x: x | {"lm_head": {"kernel": leaf_of((64, 257), 1.0)}},
      "output.weight: .*the layout keeps it dense: unpack it",
    ),
    (small(biases=True), lambda x: x, "llama has no biases"),
    (small("qwen2", biases=False), lambda x: x, "qwen2 has biases"),
    (
      small(hidden=66, layers=1),
      lambda x: x,
      "blk.0.ffn_gate.weight: 66 rows, no multiple of 4",
    ),
  ],
  ids=[
    *("extra", "head", "missing", "dense", "ternary head", "bias", "no bias"),
    "rows",
  ],
)
def test_trees_that_do_not_fit(folder, config, edit, match):
  tree, _ = decoders.tree_of(config)
  with pytest.raises(ValueError, match=match):
    to_transformers(folder, edit(tree), config)
  assert not folder.parent.exists()


def test_a_folder_appears_whole_or_not_at_all(folder, monkeypatch):
  config = small(layers=1)
  tree, _ = decoders.tree_of(config)
  real = safetensors.numpy.save_file

  def full(*_):
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(safetensors.numpy, "save_file", full)
  with pytest.raises(OSError, match=r"cannot write .*net: .*No space left"):
    to_transformers(folder, tree, config)
  assert not list(folder.parent.iterdir())
  monkeypatch.setattr(safetensors.numpy, "save_file", real)
  to_transformers(folder, tree, config)
  first = (folder / "model.safetensors").read_bytes()
  with pytest.raises(FileExistsError, match="pass overwrite=True"):
    to_transformers(folder, tree, config)
  monkeypatch.setattr(safetensors.numpy, "save_file", full)
  with pytest.raises(OSError, match="No space left"):
    to_transformers(folder, tree, config, overwrite=True)
  assert (folder / "model.safetensors").read_bytes() == first
  monkeypatch.setattr(safetensors.numpy, "save_file", real)
  other, _ = decoders.tree_of(config, seed=1)
  to_transformers(folder, other, config, overwrite=True)
  assert (folder / "model.safetensors").read_bytes() != first
  assert [x.name for x in folder.parent.iterdir()] == ["net"]
  (folder / "notes.txt").write_text("mine")
  with pytest.raises(FileExistsError, match=r"holds notes.txt, which would be"):
    to_transformers(folder, other, config, overwrite=True)
  with pytest.raises(NotADirectoryError, match="is no folder"):
    to_transformers(folder / "notes.txt", other, config, overwrite=True)
  assert files.unfinished == set()


def test_a_folder_that_cannot_take_its_place_leaves_the_old(
  folder, monkeypatch
):
  config = small(layers=1)
  tree, _ = decoders.tree_of(config)
  to_transformers(folder, tree, config)
  real = os.rename

  def rename(source, target, **options):
    if ".tmp" in os.fspath(source):
      raise PermissionError(13, "no")
    real(source, target, **options)

  monkeypatch.setattr(os, "rename", rename)
  with pytest.raises(OSError, match="cannot write"):
    to_transformers(folder, tree, config, overwrite=True)
  assert [x.name for x in folder.parent.iterdir()] == ["net"]
  assert (folder / "model.safetensors").exists()


def test_a_wrong_writer_is_noticed(folder, monkeypatch):
  config = small(layers=1)
  tree, _ = decoders.tree_of(config)
  real = safetensors.numpy.save_file

  def save_file(tensors, path, metadata):
    real({k: x * 0 for k, x in tensors.items()}, path, metadata)

  monkeypatch.setattr(safetensors.numpy, "save_file", save_file)
  with pytest.raises(OSError, match="was not written as it is"):
    to_transformers(folder, tree, config)
  assert not list(folder.parent.iterdir())


CONFIG = config_of(small(layers=1))


@pytest.mark.parametrize(
  ("facts", "match"),
  [
    ({"model_type": "gpt2"}, "the architecture 'gpt2', but .* llama, qwen2"),
    (CONFIG | {"model_type": None}, "of the architecture None"),
    ([], "is no JSON object"),
    (CONFIG | {"rope_scaling": {"rope_type": "llama3"}}, "rope_type='llama3'"),
    (CONFIG | {"rope_scaling": {"type": "linear"}}, "rope_type='linear'"),
    (CONFIG | {"attention_bias": True}, "a bias of all of its attention"),
    (CONFIG | {"mlp_bias": True}, "biases of its feed-forward"),
    (CONFIG | {"use_sliding_window": True}, "attention within a window"),
    (CONFIG | {"hidden_act": "gelu"}, "activation must be one of"),
    (CONFIG | {"hidden_size": None}, "lacks hidden_size"),
    (CONFIG | {"hidden_size": "64"}, "width must be an integer, got '64'"),
    (CONFIG | {"head_dim": 33}, "head_size=33 is odd"),
    (CONFIG | {"quantization_config": {"quant_method": "awq"}}, "by 'awq'"),
    (
      CONFIG
      | {
        "quantization_config": {"quant_method": "bitnet", "use_rms_norm": True}
      },
      "without use_rms_norm",
    ),
  ],
)
def test_configurations_that_are_refused(folder, facts, match):
  tree, _ = decoders.tree_of(small(layers=1), **FLOAT)
  save(folder, facts, named(small(layers=1), tree))
  with pytest.raises(ValueError, match=rf"net.*{match}"):
    import_llama(folder)


def test_defaults_of_transformers(folder):
  config = small(layers=1, kv_heads=2, eps=1e-6, rope_base=10_000.0)
  facts = config_of(config)
  for key in ("num_key_value_heads", "rms_norm_eps", "rope_theta", "head_dim"):
    del facts[key]
  facts["rope_parameters"] = {"rope_type": "default", "rope_theta": 10_000.0}
  tree, _ = decoders.tree_of(config, **FLOAT)
  save(folder, facts, named(config, tree))
  assert import_llama(folder)[1] == config


def dropped(x, name):
  return {k: v for k, v in x.items() if k != name}


@pytest.mark.parametrize(
  ("edit", "match"),
  [
    (
      lambda x: dropped(x, "model.layers.0.mlp.up_proj.weight"),
      "missing are blk.0.ffn_up.weight",
    ),
    (lambda x: x | {"x.weight": np.ones(2)}, "superfluous are x.weight"),
    (
      lambda x: x | {"model.norm.weight": np.ones(3)},
      r"output_norm.weight is \[3\], not \[64\]",
    ),
    (
      lambda x: x | {"model.layers.1.mlp.up_proj.weight": np.ones((64, 64))},
      "superfluous are model.layers.1.mlp.up_proj.weight",
    ),
    (
      lambda x: x | {"model.layers.0.self_attn.q_proj.bias": np.ones(64)},
      "superfluous are model.layers.0.self_attn.q_proj.bias",
    ),
  ],
)
def test_tensors_that_are_not_those_of_the_configuration(folder, edit, match):
  config = small(layers=1)
  tree, _ = decoders.tree_of(config, **FLOAT)
  save(folder, config_of(config), edit(named(config, tree)))
  with pytest.raises(ValueError, match=rf"net: the tensors are not .*{match}"):
    import_llama(folder)


UP = "model.layers.0.mlp.up_proj.weight"


@pytest.mark.parametrize(
  ("edit", "match"),
  [
    (lambda x: x | {UP: x[UP] | 0xFF}, "up_proj.weight is damaged: .* a code"),
    (
      lambda x: x | {UP: x[UP].astype(np.float32)},
      "up_proj.weight is damaged: codes are uint8 .* not float32",
    ),
    (
      lambda x: x | {f"{UP}_scale": np.ones(2, np.float32)},
      "up_proj.weight_scale is not one positive number",
    ),
    (
      lambda x: x | {f"{UP}_scale": np.float32([np.nan])},
      "up_proj.weight_scale is not one positive number",
    ),
    (lambda x: x | {"a_scale": np.ones(1)}, "superfluous are a_scale"),
    (
      lambda x: dropped(x, f"{UP}_scale"),
      r"blk.0.ffn_up.weight is \[16, 64\], not \[64, 64\]",
    ),
  ],
)
def test_packed_weights_that_are_not_whole(folder, edit, match):
  config = small(layers=1)
  tree, _ = decoders.tree_of(config)
  to_transformers(folder, tree, config)
  file = folder / "model.safetensors"
  tensors = safetensors.numpy.load_file(file)
  safetensors.numpy.save_file(edit(tensors), file)
  with pytest.raises(ValueError, match=match):
    import_llama(folder)


def test_a_file_that_ends_too_early(folder):
  config = small(layers=1)
  tree, _ = decoders.tree_of(config)
  to_transformers(folder, tree, config)
  file = folder / "model.safetensors"
  file.write_bytes(file.read_bytes()[:-1])
  with pytest.raises(ValueError, match=r"cannot load .*model.safetensors"):
    import_llama(folder)


def test_a_head_that_is_not_the_embedding_it_is_tied_to(folder):
  config = small(layers=1)
  tree, _ = decoders.tree_of(config, **FLOAT)
  facts = config_of(config, tie_word_embeddings=True)
  save(folder, facts, named(config, tree))
  with pytest.raises(ValueError, match=r"but lm_head.weight is another matrix"):
    import_llama(folder)


INDEX = "model.safetensors.index.json"


@pytest.mark.parametrize(
  ("edit", "error", "match"),
  [
    (lambda f: (f / "config.json").unlink(), ValueError, "has no config.json"),
    (
      lambda f: (f / INDEX).unlink(),
      ValueError,
      "has neither model.safetensors",
    ),
    (lambda f: (f / INDEX).write_text("{}"), ValueError, "has no weight_map"),
    (lambda f: (f / INDEX).write_text("["), ValueError, "is no JSON"),
    (
      lambda f: (f / INDEX).write_text(
        json.dumps({"weight_map": {"a": "../x.safetensors"}})
      ),
      ValueError,
      r"names a file elsewhere: '../x.safetensors'",
    ),
    (
      lambda f: (f / INDEX).write_text(
        (f / INDEX).read_text().replace("model.norm", "model.nrm")
      ),
      ValueError,
      "the files do not have model.nrm.weight",
    ),
    (
      lambda f: next(f.glob("*-00001-*")).unlink(),
      FileNotFoundError,
      "00001",
    ),
  ],
  ids=["config", "index", "map", "json", "elsewhere", "name", "shard"],
)
def test_folders_that_are_not_whole(folder, edit, error, match):
  config = small(layers=1)
  tree, _ = decoders.tree_of(config, **FLOAT)
  save(folder, config_of(config), named(config, tree), shards=2)
  edit(folder)
  with pytest.raises(error, match=match):
    import_llama(folder)


def test_gguf_files_that_are_refused(tmp_path):
  path, config = tmp_path / "net.gguf", small(layers=1)
  tree, _ = decoders.tree_of(config, **FLOAT)
  to_gguf(path, {"w": jnp.ones(2)})
  with pytest.raises(ValueError, match="of the architecture 'tern_jax'"):
    import_llama(path)
  facts = llama(config)
  more = {"llama.rope.scaling.type": "yarn"}
  to_gguf(
    path, tree, overwrite=True, **facts | {"metadata": facts["metadata"] | more}
  )
  with pytest.raises(ValueError, match="rotary embeddings are scaled: yarn"):
    import_llama(path)
  lacking = dropped(facts["metadata"], "llama.block_count")
  to_gguf(path, tree, overwrite=True, **facts | {"metadata": lacking})
  with pytest.raises(ValueError, match=r"its metadata lacks llama.block_count"):
    import_llama(path)
  to_gguf(path, tree, overwrite=True, **facts)
  good = path.read_bytes()
  name = b"output_norm.weight"
  at = good.index(name) + len(name) + 4 + 8  # the rank, and one size
  assert good[at : at + 4] == bytes(4)
  path.write_bytes(good[:at] + b"\x0e" + good[at + 1 :])
  with pytest.raises(ValueError, match=r"output_norm.weight is of a type that"):
    import_llama(path)
  path.write_bytes(good.replace(name, b"output_norm.wxight"))
  with pytest.raises(ValueError, match=r"missing are output_norm.weight; sup"):
    import_llama(path)
  path.write_bytes(good[: len(good) // 2])
  with pytest.raises(ValueError, match="the file ends before it does"):
    import_llama(path)
  path.write_bytes(b"GGUF")
  with pytest.raises(ValueError, match="it ends within its header"):
    import_llama(path)


def test_layers_of_two_kinds_cannot_be_stacked(folder):
  config = small()
  tree, _ = decoders.tree_of(config, stacked=False)
  up = tree["layers"]["1"]["mlp"]["up_proj"]
  up["kernel"] = unpacked(up["kernel"])
  to_transformers(folder, tree, config)
  with pytest.raises(ValueError, match="dense in others: stacked=False"):
    import_llama(folder)
  found, _ = import_llama(folder, stacked=False)
  assert_same(found, jax.tree.map(jnp.asarray, tree))


def test_the_command_writes_a_folder(call, folder, tmp_path):
  config = small(rope="pairs")
  tree, _ = decoders.tree_of(config)
  save_packed(tmp_path / "net", tree)
  file = tmp_path / "config.json"
  file.write_text(json.dumps(config_of(config)))
  base = ("export", tmp_path / "net", folder, "--to", "transformers")
  status, _, err = call(*base)
  assert (status, "needs --config CONFIG.JSON" in err) == (2, True)
  status, _, err = call(*base, "--config", file, "--rope", "pairs")
  assert (status, err) == (0, "")
  found, _ = import_llama(folder, rope="pairs")
  assert_same(found, jax.tree.map(jnp.asarray, tree))
  status, _, err = call(*base, "--config", file)
  assert (status, "already exists: pass --overwrite." in err) == (2, True)
  status, *_ = call(*base, "--config", file, "--overwrite")
  assert status == 0
