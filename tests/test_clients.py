"""llama.cpp and transformers themselves, where they are installed."""

import pytest

from tern_jax.export import llama, to_gguf, to_transformers
from tests import decoders
from tests.decoders import TEXT, FromTree, forward, rms

# What they import warns of itself.
pytestmark = pytest.mark.filterwarnings("ignore")

BYTES = "größe 权重 \U0001f600  a\n\n\tb\r\n"
#: How ggml rounds what it multiplies with matrices of a type.
ROUNDED = {
  None: decoders.exact,
  "TQ1_0": decoders.q8_k,
  "TQ2_0": decoders.q8_k,
  "Q2_0": decoders.q8_0,
}


@pytest.fixture
def opened(tmp_path):
  """Opens a GGUF file in llama.cpp, which must be closed before Python ends."""
  llama_cpp = pytest.importorskip("llama_cpp")
  models = []

  def load(path):
    # Keys and values in half precision would be off by 4e-4, and int8 inputs of
    # matrices then differ by whole steps.
    exact = {
      "type_k": llama_cpp.GGML_TYPE_F32,
      "type_v": llama_cpp.GGML_TYPE_F32,
    }
    models.append(
      llama_cpp.Llama(
        str(path), n_ctx=256, n_batch=64, n_threads=1, logits_all=True,
        flash_attn=False, verbose=False, **exact,
      )
    )  # fmt: skip
    return models[-1]

  yield load
  for model in models:
    model.close()


@pytest.mark.parametrize("type", ROUNDED)
@pytest.mark.parametrize(
  ("architecture", "rope", "tied"),
  [
    ("llama", "halves", False),
    ("llama", "pairs", True),
    ("qwen2", "halves", True),
    ("qwen3", "pairs", False),
    ("bitnet", "halves", True),
  ],
)
def test_llama_cpp_computes_the_logits_of_the_tree(
  tmp_path, opened, architecture, rope, tied, type
):
  config = decoders.variant(architecture, rope=rope, tied=tied, context=256)
  group = 64 if type == "Q2_0" else None
  tree, dense = decoders.tree_of(config, type is not None, group=group)
  path = tmp_path / "net.gguf"
  to_gguf(path, tree, type or "TQ2_0", tokenizer="bytes", **llama(config))
  model = opened(path)
  model.eval(TEXT.tolist())
  halves = rope == "halves"
  wanted = forward(config, FromTree(dense), halves, ROUNDED[type])
  assert rms(model.scores[: len(TEXT)], wanted) < 1e-5


def test_llama_cpp_takes_a_text_as_bytes(tmp_path, opened):
  config = decoders.variant(context=256)
  tree, _ = decoders.tree_of(config)
  path = tmp_path / "net.gguf"
  to_gguf(path, tree, tokenizer="bytes", **llama(config))
  model, text = opened(path), BYTES.encode()
  assert model.tokenize(text, add_bos=False) == list(text)
  assert model.tokenize(text, add_bos=True) == list(text)
  assert model.detokenize(list(text)) == text
  assert model.token_eos() == 256
  assert len(model.create_completion("a", max_tokens=3)["choices"]) == 1


def test_llama_cpp_splits_as_hugging_face_does(tmp_path, opened):
  tokenizers = pytest.importorskip("tokenizers")
  pre, trainers = tokenizers.pre_tokenizers, tokenizers.trainers
  tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
  tokenizer.pre_tokenizer = pre.ByteLevel(add_prefix_space=False)
  trainer = trainers.BpeTrainer(
    vocab_size=300,
    special_tokens=["<|endoftext|>"],
    initial_alphabet=pre.ByteLevel.alphabet(),
    show_progress=False,
  )
  texts = ["it's 12 of them, isn't it", "we'll see   them\n\nthere"]
  tokenizer.train_from_iterator(texts, trainer)
  file = tmp_path / "tokenizer.json"
  tokenizer.save(str(file))
  config = decoders.variant(vocab=tokenizer.get_vocab_size())
  tree, _ = decoders.tree_of(config)
  path = tmp_path / "net.gguf"
  to_gguf(path, tree, tokenizer=file, **llama(config))
  model = opened(path)
  for text in (*texts, BYTES):
    wanted = tokenizer.encode(text).ids
    assert model.tokenize(text.encode(), add_bos=True) == wanted


@pytest.fixture
def torch(monkeypatch):
  # It would compile with a C++ compiler, which not every machine has.
  monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
  pytest.importorskip("accelerate")
  return pytest.importorskip("torch")


@pytest.mark.parametrize(
  ("architecture", "rope", "tied"),
  [
    ("llama", "halves", False),
    ("llama", "pairs", True),
    ("qwen2", "halves", True),
    ("qwen3", "pairs", False),
    ("bitnet", "halves", True),
  ],
)
def test_transformers_computes_the_logits_of_the_tree(
  tmp_path, torch, architecture, rope, tied
):
  transformers = pytest.importorskip("transformers")
  config = decoders.variant(architecture, rope=rope, tied=tied)
  tree, dense = decoders.tree_of(config)
  # A matrix that stays dense.
  down = tree["layers"]["mlp"]["down_proj"]
  down["kernel"] = dense["layers"]["mlp"]["down_proj"]["kernel"]
  to_transformers(tmp_path / "net", tree, config)
  auto = transformers.AutoModelForCausalLM
  model = auto.from_pretrained(tmp_path / "net")
  text = torch.tensor(TEXT)[None]
  with torch.no_grad():
    logits = model(text).logits[0].numpy()
    more = model.generate(text, max_new_tokens=3, do_sample=False)
  assert more.shape == (1, len(TEXT) + 3)

  class Net(FromTree):
    """Rounds only what comes into ternary matrices."""

    def product(self, i, part, x):
      x = x if part == "ffn_down" else decoders.by_token(x)
      return super().product(i, part, x)

  wanted = forward(config, Net(dense), rope == "halves")
  assert rms(logits, wanted) < 1e-5
  assert rms(logits, forward(config, FromTree(dense), rope == "halves")) < 0.1
