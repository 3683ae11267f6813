"""A language model of bytes."""

import functools

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array


class TransformerBlock(nn.Module):
  """Causal self-attention and a perceptron, each on a norm, added to its input.

  Six kernels without biases: `query`, `key`, `value` and `out`, `up` to four
  times the width and `down` again. A head has 32 channels.
  """

  @nn.compact
  def __call__(self, x: Array) -> Array:
    """Maps [B, T, width] to the same, each position by those up to it."""
    width = x.shape[-1]
    dense = functools.partial(nn.Dense, use_bias=False)
    y = nn.RMSNorm(name="norm1")(x)
    query, key, value = (
      dense(width, name=name)(y).reshape((*y.shape[:-1], -1, 32))
      for name in ("query", "key", "value")
    )
    y = jax.nn.dot_product_attention(query, key, value, is_causal=True)
    x = x + dense(width, name="out")(y.reshape(x.shape))
    y = nn.gelu(dense(4 * width, name="up")(nn.RMSNorm(name="norm2")(x)))
    return x + dense(width, name="down")(y)


class Transformer(nn.Module):
  """Language model: a transformer that guesses the token after each position.

  Embeddings of tokens and of positions, `blocks` in one scan over stacked
  parameters, a norm, and a linear `head`. No dropout.

  Args:
    layers: blocks.
    width: channels, a multiple of 32.
    context: positions at most.
    classes: tokens there are.
    axis_name: not used, there are no batch statistics.
  """

  layers: int
  width: int
  context: int
  classes: int
  axis_name: str | None = None

  @nn.compact
  def __call__(self, x: Array, train: bool) -> Array:
    """Maps tokens, int [B, T], to logits [B, T, classes]."""
    del train
    positions = jnp.arange(x.shape[1])
    x = nn.Embed(self.classes, self.width, name="tokens")(x)
    x += nn.Embed(self.context, self.width, name="positions")(positions[None])
    blocks = nn.scan(
      lambda block, x, _: (block(x), None),
      variable_axes={"params": 0},
      split_rngs={"params": True},
      length=self.layers,
    )
    x, _ = blocks(TransformerBlock(name="blocks"), x, None)
    return nn.Dense(self.classes, name="head")(nn.RMSNorm(name="norm")(x))
