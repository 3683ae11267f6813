"""What a GGUF file says of a tokenizer.

"bytes": token i is byte i. With one more row of the embedding than bytes, the
last token ends a text; without, byte 0 does, which no text has.

A tokenizer.json of Hugging Face: byte-level BPE, its merges and added tokens.
llama.cpp splits a text before it merges, in the way that the file names; that
is told by the `pre_tokenizer`:

  ByteLevel with its own expression        gpt-2
  Split as in Qwen2, then ByteLevel        qwen2
  Split as in Llama 3, then ByteLevel      llama-bpe

A token that the `post_processor` puts in front of each text is its beginning;
the token that ends one is the `eos_token` of a tokenizer_config.json beside the
file, or the added token <|endoftext|>, <|end_of_text|>, </s> or <eos>. Unicode
is not normalized: llama.cpp has none of it.
"""

import json
import os
from collections.abc import Iterator, Mapping
from typing import Any

from tern_jax.export import files
from tern_jax.storage.leaves import Json, PathLike

_KEY = "tokenizer.ggml."
_NORMAL, _CONTROL, _USER, _UNUSED = 1, 3, 4, 5
_ENDS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>")
_NUMBERS = {"qwen2": r"\p{N}", "llama-bpe": r"\p{N}{1,3}"}
# The expressions differ in how many digits they take at a time.
_SPLITS = {
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
  + numbers
  + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+": name
  for name, numbers in _NUMBERS.items()
}


def of(
  tokenizer: PathLike | None,
  architecture: str,
  given: Mapping[str, Any],
  pad: bool,
) -> Json:
  """Returns the metadata of a tokenizer.

  Args:
    tokenizer: "bytes", a path, or None, for which a file of a known
      architecture says that it has none.
    architecture: of the network.
    given: metadata of the user's, which tells the size of the vocabulary, and
      settles what cannot be told.
    pad: name rows of the embedding without a token as unused.

  Raises:
    ValueError: the file is no tokenizer that llama.cpp would follow, or the
      sizes differ.
    OSError: it cannot be read.
  """
  if tokenizer is None:
    none = architecture != "tern_jax" and f"{_KEY}model" not in given
    return {f"{_KEY}model": "none"} if none else {}
  key = f"{architecture}.vocab_size"
  vocab = given.get(key)
  if not isinstance(vocab, int):
    raise ValueError(
      f"tokenizer={os.fspath(tokenizer)!r} needs metadata[{key!r}], the size of"
      " the vocabulary."
    )
  name = os.fspath(tokenizer)
  try:
    if name == "bytes":
      facts = _bytes(vocab)
    else:
      spec = _json(name)
      facts = _bpe(spec, _end_of(name), given)
  except ValueError as e:
    raise ValueError(f"tokenizer {name}: {e}.") from e
  tokens, types = facts[f"{_KEY}tokens"], facts[f"{_KEY}token_type"]
  n = len(tokens)
  if n > vocab or (n < vocab and not pad):
    hint = "give the tokenizer that the model was trained with"
    if n < vocab:
      hint += ", or pad_tokens=True if no text has the others"
    raise ValueError(
      f"tokenizer {name} has {n} tokens, but the vocabulary {vocab}: {hint}."
    )
  tokens += [f"[PAD{i}]" for i in range(n, vocab)]
  types += [_UNUSED] * (vocab - n)
  return facts


def _bytes(vocab: int) -> Json:
  tokens, types = list(_characters()), [_NORMAL] * 256
  if vocab > 256:
    tokens.append(_ENDS[0])
    types.append(_CONTROL)
  # An empty list is not written, and a merge of real tokens would lose bytes.
  return _facts("gpt-2", tokens, types, ["▁ ▁"]) | {
    f"{_KEY}eos_token_id": 256 if vocab > 256 else 0,
    f"{_KEY}add_bos_token": False,
  }


def _characters() -> Iterator[str]:
  """Yields the characters by which GPT-2 writes bytes: of each, one is seen."""
  unseen = 256
  for i in range(256):
    seen = 33 <= i < 127 or (161 <= i < 256 and i != 173)
    yield chr(i if seen else unseen)
    unseen += not seen


def _facts(
  pre: str, tokens: list[str], types: list[int], merges: list[str]
) -> Json:
  return {
    f"{_KEY}model": "gpt2",
    f"{_KEY}pre": pre,
    f"{_KEY}tokens": tokens,
    f"{_KEY}token_type": types,
    f"{_KEY}merges": merges,
  }


def _json(path: str) -> Json:
  with files.local_file(path).open("rb") as file:
    try:
      found = json.load(file)
    except (ValueError, RecursionError) as e:
      raise ValueError("it is no JSON") from e
  if not isinstance(found, dict):
    raise ValueError("it is no JSON object")
  return found


def _end_of(path: str) -> str | None:
  """Returns the end of a text that the file beside a tokenizer names."""
  beside = os.path.join(os.path.dirname(path), "tokenizer_config.json")
  if not os.path.exists(beside):
    return None
  end = _json(beside).get("eos_token")
  return end.get("content") if isinstance(end, dict) else end


def _bpe(spec: Json, end: str | None, given: Mapping[str, Any]) -> Json:
  try:
    model, vocab = spec["model"], dict(spec["model"]["vocab"])
    added = spec.get("added_tokens") or []
    merges = [x if isinstance(x, str) else " ".join(x) for x in model["merges"]]
    types = dict.fromkeys(vocab.values(), _NORMAL)
    for x in added:
      vocab[x["content"]] = x["id"]
      types[x["id"]] = _CONTROL if x["special"] else _USER
  except (KeyError, TypeError, ValueError) as e:
    raise ValueError("it has no BPE model of a vocabulary and merges") from e
  pre = given.get(f"{_KEY}pre") or _pre(spec, model)
  tokens = {i: token for token, i in vocab.items()}
  if sorted(tokens) != [*range(len(vocab))]:
    raise ValueError("its tokens are not numbered 0, 1, 2, ...")
  facts = _facts(
    pre,
    [tokens[i] for i in range(len(tokens))],
    [types[i] for i in range(len(tokens))],
    merges or ["▁ ▁"],
  )
  ends = [x for x in ([end] if end else _ENDS) if x in vocab]
  if ends:
    facts[f"{_KEY}eos_token_id"] = vocab[ends[0]]
  elif f"{_KEY}eos_token_id" not in given:
    raise ValueError(
      "no token ends a text, and llama.cpp would take one of its own choice:"
      f" add {_ENDS[0]}, or give metadata={{'{_KEY}eos_token_id': NUMBER}}"
    )
  begin = _begin_of(spec)
  facts[f"{_KEY}add_bos_token"] = begin in vocab
  if begin in vocab:
    facts[f"{_KEY}bos_token_id"] = vocab[begin]
  return facts


def _pre(spec: Json, model: Json) -> str:
  """Returns llama.cpp's name of how a text is split."""
  steps = spec.get("pre_tokenizer") or {}
  steps = steps.get("pretokenizers", [steps])
  last = steps[-1] if steps else {}
  name = None
  if len(steps) == 1 and last.get("use_regex", True):
    name = "gpt-2"
  elif len(steps) == 2 and not last.get("use_regex", True):
    first = steps[0]
    alone = first.get("behavior") == "Isolated" and not first.get("invert")
    pattern = first.get("pattern")
    pattern = pattern.get("Regex") if isinstance(pattern, dict) else None
    name = _SPLITS.get(str(pattern)) if alone else None
  normalizer = (spec.get("normalizer") or {}).get("type", "NFC")
  faults = {
    "its model is not BPE": model.get("type", "BPE") != "BPE",
    "its pre_tokenizer does not end with ByteLevel": (
      last.get("type") != "ByteLevel"
    ),
    "it puts a space in front of a text (add_prefix_space)": (
      last.get("add_prefix_space")
    ),
    "its pre_tokenizer splits as no tokenizer that is known here": not name,
    f"it normalizes a text by {normalizer}": normalizer != "NFC",
    "it leaves out merges (ignore_merges)": (
      model.get("ignore_merges") and name != "llama-bpe"
    ),
    "it has prefixes or suffixes of words": (
      model.get("continuing_subword_prefix") or model.get("end_of_word_suffix")
    ),
  }
  if wrong := [what for what, applies in faults.items() if applies]:
    raise ValueError(
      f"{'; '.join(wrong)}: llama.cpp would make other tokens of a text. If it"
      f" knows the tokenizer, give its name, metadata={{'{_KEY}pre': NAME}}"
    )
  return name or ""


def _begin_of(spec: Json) -> str | None:
  """Returns the token that is put in front of each text."""
  steps = spec.get("post_processor") or {}
  for step in steps.get("processors", [steps]):
    first = (step.get("single") or [{}])[0]
    if token := first.get("SpecialToken"):
      return token.get("id")
  return None
