"""Layouts of words, whose products are XLA's own operations, on any platform.

Each product reads its weights as they are packed, a part at a time: whatever
lets XLA fuse the unpacking of all weights into the product is many times
slower.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from tern_jax.core.types import Array
from tern_jax.inference.forms import (
  cut,
  is_sharded,
  padded,
  quantize,
  scaled,
  steps,
)
from tern_jax.inference.layout import Layout
from tern_jax.inference.matrix import Size

_EXACT = jax.lax.Precision.HIGHEST
#: Weights that CPUs unpack at a time: 2 MB of floats, which a cache holds.
_BLOCK = 2**19
#: The same elsewhere, where each step costs time and only memory is a limit.
_LARGE_BLOCK = 2**24


class Fields(Layout):
  """Two bits a weight, the code plus one, sixteen inputs in a word.

  Bits 2 f and 2 f + 1 of word r belong to input 16 r + f. A product sums over
  blocks of inputs: each step unpacks one, and multiplies by it.
  """

  ranks = (2,)

  def build(self, codes: Array, size: Size) -> tuple[Array, ...]:
    """Returns uint32 [ceil(group / 16) · groups, outputs]."""
    c = padded(codes.astype(jnp.int32) + 1, 0, size, 16, 1)
    c = c.reshape(-1, 16, size.outputs).astype(jnp.uint32)
    fields = c << steps(16, 2, 1, 3)
    return (jnp.sum(fields, 1, dtype=jnp.uint32),)

  @staticmethod
  def of_planes(nonzero: Array, sign: Array) -> tuple[Array, ...]:
    """Returns the words of bit-planes, uint8 [inputs / 8, outputs]."""
    odd = nonzero.shape[0] % 2
    planes = [jnp.pad(x, ((0, odd), (0, 0))) for x in (nonzero, sign)]
    low, high = ~planes[0], planes[0] & ~planes[1]
    bits = _spread(low) | (_spread(high) << 1)
    pairs = bits.reshape(-1, 2, bits.shape[1])
    return (pairs[:, 0] | (pairs[:, 1] << 16),)

  def codes(self, arrays: tuple[Array, ...], size: Size) -> Array:
    """Returns codes, int8 [inputs, outputs]."""
    c = (arrays[0][:, None] >> steps(16, 2, 1, 3)) & 3
    c = c.reshape(-1, size.outputs).astype(jnp.int32) - 1
    return cut(c, size).astype(jnp.int8)

  def product(
    self,
    x: Array,
    arrays: tuple[Array, ...],
    w_p: Array,
    w_n: Array,
    size: Size,
    int8: bool,
  ) -> Array:
    """Returns float32 [rows, outputs]."""
    if int8:
      return super().product(x, arrays, w_p, w_n, size, int8)
    (words,) = arrays
    x = padded(x, 1, size, 16)

    def total(most: int) -> Array:
      return _in_blocks(x, words, (w_p, w_n), size, most)

    if 16 * words.size <= _BLOCK:
      return total(_BLOCK)
    return jax.lax.platform_dependent(
      cpu=lambda: total(_BLOCK), default=lambda: total(_LARGE_BLOCK)
    )


def _in_blocks(
  x: Array, words: Array, magnitudes: Sequence[Array], size: Size, most: int
) -> Array:
  """Unpacks `Fields` block by block, and sums products with the blocks.

  Args:
    x: float32 [rows, 16 · words].
    words: uint32 [words, outputs].
    magnitudes: of the positive and of the negative weights, each
      [groups or 1, outputs or 1].
    size: of the matrix.
    most: weights of a block, unless one row of words has more.

  Returns:
    float32 [rows, outputs].
  """
  count = words.shape[0]
  step = max(1, most // (16 * size.outputs))
  first = (count - 1) % step + 1
  magnitudes = [
    w if w.shape[0] == 1 else jnp.repeat(w, count // size.groups, 0)
    for w in magnitudes
  ]

  def part(start: Array | int, n: int) -> Array:
    def cut(a: Array, axis: int = 0, inputs: int = 1) -> Array:
      begin, length = start * inputs, n * inputs
      return jax.lax.dynamic_slice_in_dim(a, begin, length, axis)

    c = (cut(words)[:, None] >> steps(16, 2, 1, 3)) & 3
    c = c.astype(jnp.int32) - 1
    plus, minus = (
      (w if w.shape[0] == 1 else cut(w))[:, None] for w in magnitudes
    )
    w = jnp.where(c < 0, minus, plus)
    w = (c.astype(jnp.float32) * w).reshape(-1, size.outputs)
    w = jax.lax.optimization_barrier(w)
    return jnp.matmul(cut(x, 1, 16), w, precision=_EXACT)

  # The first block tells how the sum is sharded, where that is in the types.
  y = part(0, first)
  if first == count:
    return y

  def add(i: Array, y: Array) -> Array:
    return y + part(first + i * step, step)

  return jax.lax.fori_loop(0, (count - first) // step, add, y)


def _spread(x: Array) -> Array:
  """Returns bits 0, 1, ... of bytes at 0, 2, ... of words.

  Source: Warren, "Hacker's Delight", 2nd edition, section 7-2.
  """
  x = x.astype(jnp.uint32)
  x = (x | (x << 4)) & 0x0F0F
  x = (x | (x << 2)) & 0x3333
  return (x | (x << 1)) & 0x5555


class Words(Layout):
  """Two bit-planes, "is positive" and "is negative", 32 inputs in a word.

  Bit b of word r belongs to input 32 r + b. Activations are rounded to int8 and
  split into their eight bits; the bits that meet a weight are counted.
  """

  ranks = (2, 2)

  def build(self, codes: Array, size: Size) -> tuple[Array, ...]:
    """Returns two of uint32 [ceil(group / 32) · groups, outputs]."""
    c = padded(codes.astype(jnp.int32), 0, size, 32)
    c = c.reshape(-1, 32, size.outputs)
    return _word(c > 0), _word(c < 0)

  def codes(self, arrays: tuple[Array, ...], size: Size) -> Array:
    """Returns codes, int8 [inputs, outputs]."""
    shifts = steps(32, 1, 1, 3)
    bits = [((x[:, None] >> shifts) & 1).astype(jnp.int32) for x in arrays]
    c = (bits[0] - bits[1]).reshape(-1, size.outputs)
    return cut(c, size).astype(jnp.int8)

  def product(
    self,
    x: Array,
    arrays: tuple[Array, ...],
    w_p: Array,
    w_n: Array,
    size: Size,
    int8: bool,
  ) -> Array:
    """Returns float32 [rows, outputs]."""
    if not int8 or is_sharded(x, w_p, w_n, *arrays):
      return super().product(x, arrays, w_p, w_n, size, int8)
    q, step = quantize(x)
    q = padded(q, 1, size, 32).reshape(x.shape[0], -1, 32, 1)
    # Two's complement: bit 7 counts -128.
    bits = (q.astype(jnp.uint32) >> steps(8, 1, 3, 4)) & 1
    slices = _word(bits, 2)
    rows = arrays[0].shape[0] // size.groups
    planes = [w.reshape(size.groups, rows, -1) for w in arrays]

    def count(
      sums: tuple[Array, ...], word: tuple[Array, ...]
    ) -> tuple[tuple[Array, ...], None]:
      bits, *planes = word

      def add(total: Array, plane: Array) -> Array:
        for b in range(8):
          met = jax.lax.population_count(bits[b] & plane).astype(jnp.int32)
          total = total + (met << b if b < 7 else -(met << 7))
        return total

      return tuple(map(add, sums, planes)), None

    def of_row(row: Array) -> tuple[Array, ...]:
      row = row.reshape(size.groups, rows, 8)

      def of_group(group: tuple[Array, ...]) -> tuple[Array, ...]:
        zero = jnp.zeros(size.outputs, jnp.int32)
        return jax.lax.scan(count, (zero, zero), group)[0]

      return jax.lax.map(of_group, (row, *planes))

    p, n = jax.lax.map(of_row, slices)
    p, n = jnp.swapaxes(p, 0, 1), jnp.swapaxes(n, 0, 1)
    return scaled(p, n, w_p, w_n, step)


def _word(bits: Array, axis: int = 1) -> Array:
  """Returns uint32, bit b where element b along an axis of 32 is set."""
  words = bits.astype(jnp.uint32) << steps(32, 1, axis, bits.ndim)
  return jnp.sum(words, axis, dtype=jnp.uint32)
