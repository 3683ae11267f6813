"""Layouts of the native code for CPUs: tiles of codes, lists of nonzeros."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tern_jax.core.types import Array
from tern_jax.inference import cpu
from tern_jax.inference.forms import cut, is_sharded, padded, steps
from tern_jax.inference.layout import Layout
from tern_jax.inference.matrix import Size

_SIDE = 16


class Native(Layout):
  """Multiplies by native code on CPUs, and by unpacked codes elsewhere."""

  def call(
    self, size: Size, int8: bool, isa: str | None = None
  ) -> Callable[..., Array]:
    """Returns a function of x, w_p, w_n and the arrays, for CPUs.

    Its instruction set is that which `cpu.load` chooses where it runs, unless
    one is given.
    """
    raise NotImplementedError

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

    def unpacked(x: Array, w_p: Array, w_n: Array, *arrays: Array) -> Array:
      return super(Native, self).product(x, arrays, w_p, w_n, size, int8)

    operands = x, w_p, w_n, *arrays
    if cpu.isa() is None or is_sharded(*operands):
      return unpacked(*operands)
    native = self.call(size, int8)
    return jax.lax.platform_dependent(*operands, cpu=native, default=unpacked)


class Tiles(Native):
  """Two bits a weight, in tiles of 16 inputs and 16 outputs, 64 bytes each.

  Byte 4 c + k of a tile has in its bits 2 f and 2 f + 1 the code plus one of
  input 4 f + k and output c. Tiles of the last outputs are as narrow as these,
  of 4 bytes each. One layout serves float and int8 activations, and all
  instruction sets: `csrc/product.h`.
  """

  ranks = (1,)

  def build(self, codes: Array, size: Size) -> tuple[Array, ...]:
    """Returns uint8 [4 · blocks of inputs · outputs], block by block."""
    c = (codes.astype(jnp.int32) + 1).astype(jnp.uint32)
    c = padded(c, 0, size, _SIDE, 1)
    # [blocks of inputs, f, k, outputs]
    c = c.reshape(-1, 4, 4, size.outputs)
    byte = jnp.sum(c << steps(4, 2, 1, 4), 1).swapaxes(1, 2).astype(jnp.uint8)
    whole = size.outputs // _SIDE * _SIDE
    blocks = byte[:, :whole].reshape(len(byte), -1, 4 * _SIDE).swapaxes(0, 1)
    return (jnp.concatenate([blocks.ravel(), byte[:, whole:].ravel()]),)

  def codes(self, arrays: tuple[Array, ...], size: Size) -> Array:
    """Returns codes, int8 [inputs, outputs]."""
    tiles = arrays[0].size // (4 * size.outputs)
    whole = size.outputs // _SIDE * _SIDE
    blocks, last = jnp.split(arrays[0], [4 * tiles * whole])
    blocks = blocks.reshape(-1, tiles, 4 * _SIDE).swapaxes(0, 1)
    parts = blocks.reshape(tiles, whole, 4), last.reshape(tiles, -1, 4)
    byte = jnp.concatenate(parts, 1).astype(jnp.uint32).swapaxes(1, 2)
    c = (byte[:, None] >> steps(4, 2, 1, 4)) & 3
    c = c.reshape(tiles * _SIDE, size.outputs).astype(jnp.int32)
    return cut(c - 1, size).astype(jnp.int8)

  def call(
    self, size: Size, int8: bool, isa: str | None = None
  ) -> Callable[..., Array]:
    """Returns a function of x, w_p, w_n and the tiles."""
    attributes = {"int8": int8, "groups": np.int64(size.groups)}
    call = _target("tern_jax_tiles", size, isa, attributes)
    return lambda x, w_p, w_n, tiles: call(x, tiles, w_p, w_n)


class Lists(Native):
  """The nonzero weights of each output, for matrices of some 90 % zeros.

  The inputs of its positive weights come first, then those of the negative
  ones. List l, 2 for each output, is [begin[l], begin[l + 1]). In a stack all
  matrices have as many entries as the fullest of them.
  """

  ranks = (1, 1)

  def build(self, codes: Array, size: Size) -> tuple[Array, ...]:
    """Returns inputs, uint16 or uint32, and begin, int32 [2 outputs + 1]."""
    c = np.asarray(codes).T
    signs = np.stack([c > 0, c < 0], 1).reshape(-1, size.inputs)
    begin = np.zeros(len(signs) + 1, np.int32)
    np.cumsum(np.count_nonzero(signs, 1), out=begin[1:])
    dtype = np.uint16 if size.inputs <= 1 << 16 else np.uint32
    inputs = np.nonzero(signs)[1].astype(dtype)
    return jnp.asarray(inputs), jnp.asarray(begin)

  def codes(self, arrays: tuple[Array, ...], size: Size) -> Array:
    """Returns codes, int8 [inputs, outputs]."""
    inputs, begin = arrays
    places = jnp.arange(inputs.shape[0], dtype=jnp.int32)
    lists = jnp.searchsorted(begin, places, side="right") - 1
    c = jnp.zeros((size.inputs, size.outputs), jnp.int8)
    # What fills up a stack belongs to no output, and is dropped.
    at = inputs.astype(jnp.int32), lists // 2
    return c.at[at].set((1 - 2 * (lists % 2)).astype(jnp.int8), mode="drop")

  def call(
    self, size: Size, int8: bool, isa: str | None = None
  ) -> Callable[..., Array]:
    """Returns a function of x, w_p, w_n and the lists; int8 must be false."""
    call = _target("tern_jax_lists", size, isa, {})
    return lambda x, w_p, w_n, *lists: call(x, *lists, w_p, w_n)


def _target(
  name: str, size: Size, isa: str | None, attributes: dict[str, Any]
) -> Callable[..., Array]:
  def call(x: Array, *operands: Array) -> Array:
    y = jax.ShapeDtypeStruct((x.shape[0], size.outputs), jnp.float32)
    target = jax.ffi.ffi_call(name, y, vmap_method="expand_dims")
    number = np.int32(cpu.ISAS.index(isa) if isa else -1)
    return target(x, *operands, isa=number, **attributes)

  return call
