"""Decoders in plain NumPy: of a tree, and as llama.cpp computes one of a file.

Tests that need a runtime itself compare it with these, too.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np

from tern_jax.export import Decoder
from tern_jax.storage.layout import packed_axis
from tern_jax.storage.packed import PackedTernary

TINY = Decoder(
  "llama", vocab=257, layers=2, width=256, heads=4, kv_heads=2, hidden=512,
  context=64, rope_base=5000.0,
)  # fmt: skip
#: Tokens of a text.
TEXT = np.array([1, 200, 3, 3, 40, 256, 6, 77])


def variant(architecture="llama", **changes):
  """A tiny decoder of an architecture."""
  changes.setdefault("biases", architecture == "qwen2")
  changes.setdefault("tied", architecture == "bitnet")
  return dataclasses.replace(TINY, architecture=architecture, **changes)


def packed(codes, scale):
  """A packed leaf by NumPy alone."""
  lead = scale.ndim - 2 if scale.ndim > 1 and len(scale) > 1 else 0
  axis = packed_axis(codes.shape, lead)
  planes = (
    jnp.asarray(np.packbits(bits, axis, "little"))
    for bits in (codes != 0, codes < 0)
  )
  scale = jnp.asarray(scale)
  return PackedTernary(*planes, scale, scale, codes.shape, axis)


def tree_of(config, ternary=True, stacked=True, group=None, seed=0):
  """A tree of random leaves, called as import_llama calls them.

  Returns the tree to save and the same one in float64.
  """
  rng = np.random.default_rng(seed)
  c, queries = config, config.heads * config.head_size
  keys = c.kv_heads * c.head_size
  n = (c.layers,)

  def norm(*shape):
    x = rng.uniform(0.5, 1.5, shape).astype(np.float32)
    return {"scale": x}, {"scale": x.astype(np.float64)}

  def dense(*shape):
    x = rng.normal(0, shape[-2] ** -0.5, shape).astype(np.float32)
    return x, x.astype(np.float64)

  def linear(rows, out, bias=False):
    shape = (*n, rows, out)
    if ternary:
      codes = rng.integers(-1, 2, shape).astype(np.int8)
      parts = 1 if group is None else rows // group
      scale = rng.uniform(0.5, 1.5, (*n, parts, out if group else 1))
      # Such that half precision holds it.
      scale = (scale * rows**-0.5).astype(np.float16).astype(np.float32)
      x = packed(codes, scale), codes * np.repeat(scale, rows // parts, 1)
    else:
      x = dense(*shape)
    pair = [{"kernel": x[0]}, {"kernel": np.float64(x[1])}]
    if bias:
      b = rng.normal(0, 0.3, (*n, out)).astype(np.float32)
      pair = [pair[0] | {"bias": b}, pair[1] | {"bias": np.float64(b)}]
    return pair

  def together(**parts):
    return [{k: x[i] for k, x in parts.items()} for i in (0, 1)]

  attention = {
    "q_proj": linear(c.width, queries, c.biases),
    "k_proj": linear(c.width, keys, c.biases),
    "v_proj": linear(c.width, keys, c.biases),
    "o_proj": linear(queries, c.width),
  }
  mlp = {
    "gate_proj": linear(c.width, c.hidden),
    "up_proj": linear(c.width, c.hidden),
    "down_proj": linear(c.hidden, c.width),
  }
  if c.architecture == "qwen3":
    attention |= {x: norm(*n, c.head_size) for x in ("q_norm", "k_norm")}
  if c.architecture == "bitnet":
    attention["attn_sub_norm"] = norm(*n, queries)
    mlp["ffn_sub_norm"] = norm(*n, c.hidden)
  layers = together(
    input_layernorm=norm(*n, c.width),
    self_attn=together(**attention),
    post_attention_layernorm=norm(*n, c.width),
    mlp=together(**mlp),
  )
  if not stacked:
    layers = [{str(i): layer(x, i) for i in range(c.layers)} for x in layers]
  table = dense(c.vocab, c.width)
  parts = {
    "embed_tokens": ({"embedding": table[0]}, {"embedding": table[1]}),
    "layers": layers,
    "norm": norm(c.width),
  }
  if not c.tied:
    head = dense(c.width, c.vocab)
    parts["lm_head"] = {"kernel": head[0]}, {"kernel": head[1]}
  return together(**parts)


def layer(tree, i):
  """One layer of a stack of them."""
  if isinstance(tree, dict):
    return {k: layer(x, i) for k, x in tree.items()}
  if isinstance(tree, PackedTernary):
    arrays = (np.asarray(x)[i] for x in (tree.nonzero, tree.sign))
    w = jnp.asarray(np.asarray(tree.w_p)[i])
    w = w.reshape(()) if w.size == 1 else w
    axis = None if tree.axis is None else tree.axis - 1
    planes = map(jnp.asarray, arrays)
    return PackedTernary(*planes, w, w, tree.shape[1:], axis)
  return tree[i]


def unpacked(tree):
  """A tree whose packed leaves are dense, by NumPy alone."""
  if isinstance(tree, dict):
    return {k: unpacked(x) for k, x in tree.items()}
  if not isinstance(tree, PackedTernary):
    return np.asarray(tree)
  nonzero, sign = (
    np.unpackbits(np.asarray(x), tree.axis, bitorder="little")
    for x in (tree.nonzero, tree.sign)
  )
  codes = nonzero.astype(np.float32) * (1 - 2 * sign.astype(np.float32))
  scales = []
  for w in map(np.asarray, (tree.w_p, tree.w_n)):
    for i in range(-w.ndim, 0):
      w = w.repeat(codes.shape[i] // w.shape[i], i)
    scales.append(w)
  return np.where(codes > 0, scales[0], scales[1]) * codes


def exact(x):
  return x


def q8_k(x):
  """As ggml rounds what it multiplies TQ1_0 and TQ2_0 with, 256 at a time."""
  blocks = x.reshape(-1, 256)
  largest = np.take_along_axis(blocks, np.abs(blocks).argmax(-1)[:, None], -1)
  d = largest / -127
  q = np.rint(np.divide(blocks, d, where=d != 0, out=np.zeros_like(blocks)))
  return (np.minimum(q, 127) * d).reshape(x.shape)


def q8_0(x):
  """As ggml rounds what it multiplies Q2_0 with, 32 at a time."""
  blocks = x.reshape(-1, 32)
  d = np.abs(blocks).max(-1, keepdims=True) / 127
  q = np.divide(blocks, d, where=d != 0, out=np.zeros_like(blocks))
  q = np.trunc(q + np.copysign(0.5, q))
  return (q * d.astype(np.float16).astype(x.dtype)).reshape(x.shape)


def by_token(x):
  """As transformers rounds what it multiplies ternary weights with."""
  d = np.abs(x).max(-1, keepdims=True) / 127
  return np.rint(x / d) * d


def rotated(x, base, halves):
  """Rotary embeddings of [tokens, heads, head size]."""
  tokens, _, size = x.shape
  turns = base ** (-np.arange(size // 2) * 2.0 / size)
  angle = np.arange(tokens)[:, None, None] * turns
  if halves:
    a, b = np.split(x, 2, -1)
  else:
    a, b = x[..., ::2], x[..., 1::2]
  sin, cos = np.sin(angle).astype(x.dtype), np.cos(angle).astype(x.dtype)
  a, b = a * cos - b * sin, a * sin + b * cos
  if halves:
    return np.concatenate([a, b], -1)
  return np.stack([a, b], -1).reshape(x.shape)


def softmax(x):
  x = np.exp(x - x.max(-1, keepdims=True))
  return x / x.sum(-1, keepdims=True)


def forward(c, net, halves, rounded=exact, text=TEXT):
  """Logits [tokens, vocab] of a decoder.

  Args:
    c: its facts.
    net: `FromTree` or `FromFile`.
    halves: how its heads are rotated.
    rounded: applied to what is multiplied with the matrices of blocks.
    text: tokens.
  """

  def norm(x, scale):
    return x / np.sqrt(np.mean(x * x, -1, keepdims=True) + c.eps) * scale

  x = net.table()[text]
  for i in range(c.layers):
    y = rounded(norm(x, net.vector(i, "attn_norm")))
    q, k, v = (net.product(i, f"attn_{part}", y) for part in "qkv")
    if c.biases:
      q, k, v = (
        z + net.bias(i, f"attn_{part}")
        for part, z in zip("qkv", (q, k, v), strict=True)
      )
    q, k, v = (z.reshape(len(text), -1, c.head_size) for z in (q, k, v))
    if c.architecture == "qwen3":
      q = norm(q, net.vector(i, "attn_q_norm"))
      k = norm(k, net.vector(i, "attn_k_norm"))
    q, k = (rotated(z, c.rope_base, halves) for z in (q, k))
    k, v = (np.repeat(z, c.heads // c.kv_heads, 1) for z in (k, v))
    scores = np.einsum("qhd,khd->hqk", q, k) / np.sqrt(c.head_size)
    scores = np.where(np.tri(len(text), dtype=bool), scores, -np.inf)
    y = np.einsum("hqk,khd->qhd", softmax(scores), v).reshape(len(text), -1)
    if c.architecture == "bitnet":
      y = norm(y, net.vector(i, "attn_sub_norm"))
    x = x + net.product(i, "attn_output", rounded(y))
    y = rounded(norm(x, net.vector(i, "ffn_norm")))
    gate = net.product(i, "ffn_gate", y)
    y = gate / (1 + np.exp(-gate)) * net.product(i, "ffn_up", y)
    if c.architecture == "bitnet":
      y = norm(y, net.vector(i, "ffn_sub_norm"))
    x = x + net.product(i, "ffn_down", rounded(y))
  return net.head(norm(x, net.vector(None, "output_norm")))


PATHS = {
  "attn_norm": ("input_layernorm",),
  "attn_q": ("self_attn", "q_proj"),
  "attn_k": ("self_attn", "k_proj"),
  "attn_v": ("self_attn", "v_proj"),
  "attn_q_norm": ("self_attn", "q_norm"),
  "attn_k_norm": ("self_attn", "k_norm"),
  "attn_sub_norm": ("self_attn", "attn_sub_norm"),
  "attn_output": ("self_attn", "o_proj"),
  "ffn_norm": ("post_attention_layernorm",),
  "ffn_gate": ("mlp", "gate_proj"),
  "ffn_up": ("mlp", "up_proj"),
  "ffn_sub_norm": ("mlp", "ffn_sub_norm"),
  "ffn_down": ("mlp", "down_proj"),
  "output_norm": ("norm",),
}


class FromTree:
  """A dense, stacked tree, whose kernels are [in, out]."""

  def __init__(self, tree):
    self.tree = tree

  def _module(self, i, part):
    node = self.tree if i is None else layer(self.tree["layers"], i)
    for key in PATHS[part]:
      node = node[key]
    return node

  def table(self):
    return self.tree["embed_tokens"]["embedding"]

  def vector(self, i, part):
    return self._module(i, part)["scale"]

  def bias(self, i, part):
    return self._module(i, part)["bias"]

  def product(self, i, part, x):
    return x @ self._module(i, part)["kernel"]

  def head(self, x):
    if "lm_head" in self.tree:
      return x @ self.tree["lm_head"]["kernel"]
    return x @ self.table().T


class FromFile:
  """Tensors of a file by name, whose matrices are [out, in]."""

  def __init__(self, tensors, dtype=np.float64):
    self.tensors = {k: x.astype(dtype) for k, x in tensors.items()}

  def table(self):
    return self.tensors["token_embd.weight"]

  def _name(self, i, part, kind="weight"):
    return f"{part}.{kind}" if i is None else f"blk.{i}.{part}.{kind}"

  def vector(self, i, part):
    return self.tensors[self._name(i, part)]

  def bias(self, i, part):
    return self.tensors[self._name(i, part, "bias")]

  def product(self, i, part, x):
    return x @ self.vector(i, part).T

  def head(self, x):
    return x @ self.tensors.get("output.weight", self.table()).T


def rms(a, b):
  """Relative RMS of a difference."""
  a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
  return float(np.sqrt(np.sum((a - b) ** 2) / np.sum(b**2)))
