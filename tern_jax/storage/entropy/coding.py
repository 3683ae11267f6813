"""Bits in and out of the range coder of constriction; bytes in and out."""

import concurrent.futures
import functools
import importlib
import os
import struct
import zlib
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np

T = TypeVar("T")
#: Where bits are coded; None for everywhere.
Mask = np.ndarray | None
#: Probabilities are integers, in units of 1 / ONE.
ONE = 1 << 16
#: Packs bits to bytes, in C order, the first bit lowest.
pack_bits = functools.partial(np.packbits, bitorder="little")
# What the fixed-point probabilities of constriction add up to.
_TOTAL = 1 << 24
# Weights, or symbols, that are handled in one go: indices take 8 bytes each,
# which for a whole chunk are more than all the rest of it.
_BLOCK = 1 << 16


@functools.cache
def stream() -> Any:
  """Returns the module of constriction's stream codes."""
  try:
    return importlib.import_module("constriction").stream
  except ImportError as e:
    hint = "pip install 'tern_jax[codec]'"
    raise ImportError(f"codec='entropy' needs constriction: {hint}.") from e


class Encoder:
  """Codes symbols, and bits, to words."""

  def __init__(self):
    self._coder = stream().queue.RangeEncoder()

  def symbols(self, data: np.ndarray, model: object) -> None:
    """Codes symbols of a model."""
    self._coder.encode(data.astype(np.int32), model)

  def bits(self, bits: np.ndarray, p: int) -> None:
    """Codes flat bits that are set with a probability of p / ONE."""
    data, (n, rest) = pack_bits(bits), divmod(bits.size, 8)
    for i in range(0, n, _BLOCK):
      self.symbols(data[i : min(i + _BLOCK, n)], _byte(p, 8))
    if rest:
      self.symbols(data[n:], _byte(p, rest))

  def words(self) -> bytes:
    """Returns what was coded."""
    return self._coder.get_compressed().astype("<u4").tobytes()


class Decoder:
  """Decodes what an `Encoder` coded."""

  def __init__(self, words: memoryview):
    numbers = np.frombuffer(words, "<u4").astype(np.uint32)
    self._coder = stream().queue.RangeDecoder(numbers)

  def symbols(self, n: int, model: object) -> np.ndarray:
    """Decodes n symbols of a model."""
    try:
      return self._coder.decode(model, n)
    except AssertionError as e:
      raise ValueError(f"the coded words are damaged: {e}") from e

  def bits(self, size: int, p: int) -> np.ndarray:
    """Decodes flat bits that are set with a probability of p / ONE."""
    n, rest = divmod(size, 8)
    data = np.empty(n + (rest > 0), np.uint8)
    data[:n] = self.symbols(n, _byte(p, 8))
    if rest:
      data[n:] = self.symbols(1, _byte(p, rest))
    return np.unpackbits(data, count=size, bitorder="little").view(bool)


@functools.lru_cache(1024)
def _byte(p: int, n: int) -> object:
  """Returns the model of n <= 8 bits as one symbol, the first bit lowest."""
  by_count = [p**k * (ONE - p) ** (n - k) for k in range(n + 1)]
  return categorical(tuple(by_count[i.bit_count()] for i in range(1 << n)))


def categorical(weights: tuple[int, ...]) -> object:
  """Returns a model of probabilities in proportion to integers."""
  # The library scales what it is given to _TOTAL less the number of symbols,
  # takes the integer parts and adds 1 to each. Integers that have that sum are
  # scaled by exactly 1, and are exact in float32.
  total = _TOTAL - len(weights)
  chances = [w * total // sum(weights) for w in weights]
  chances[weights.index(max(weights))] += total - sum(chances)
  model = stream().model.Categorical
  return model(np.array(chances, np.float32), lazy=False, perfect=False)


def take(x: np.ndarray, mask: Mask) -> np.ndarray:
  """Returns x[mask] of flat arrays, in less time and memory; all for None."""
  if mask is None:
    return x
  found, n = np.empty_like(x), 0
  for i in range(0, x.size, _BLOCK):
    (at,) = mask[i : i + _BLOCK].nonzero()
    # Nothing is out of bounds, but in another mode NumPy would make a copy.
    x[i : i + _BLOCK].take(at, out=found[n : n + at.size], mode="clip")
    n += at.size
  return found[:n]


def give(x: np.ndarray, mask: Mask, found: np.ndarray) -> None:
  """Sets x[mask] of flat arrays to `found`, the inverse of `take`."""
  if mask is None:
    x[:] = found
    return
  n = 0
  for i in range(0, x.size, _BLOCK):
    (at,) = mask[i : i + _BLOCK].nonzero()
    x[i : i + _BLOCK][at] = found[n : n + at.size]
    n += at.size


def crc_of(nonzero: np.ndarray, sign: np.ndarray) -> int:
  """Returns the crc32 of the bits of a chunk."""
  return zlib.crc32(pack_bits(sign).data, zlib.crc32(pack_bits(nonzero).data))


class Reader:
  """Reads bytes from the front."""

  def __init__(self, data: memoryview):
    self.data = data

  def take(self, n: int) -> memoryview:
    """Returns the next n bytes."""
    if n > (left := len(self.data)):
      raise ValueError(f"{n} bytes are expected where {left} are left.")
    taken, self.data = self.data[:n], self.data[n:]
    return taken

  def numbers(self, layout: str) -> tuple[int, ...]:
    """Returns the next numbers, in a layout of `struct`."""
    return struct.unpack(layout, self.take(struct.calcsize(layout)))


def threads(f: Callable[[int], T], n: int) -> list[T]:
  """Returns [f(0), ..., f(n - 1)], computed by a few threads."""
  return list((map if n < 2 else _pool().map)(f, range(n)))


@functools.cache
def _pool() -> concurrent.futures.Executor:
  """Returns the threads, always the same: each keeps some memory for itself."""
  # They share the work of NumPy; the coder itself runs in one thread at a time.
  # A thread keeps some 4 MB, four times its chunk: a save must not take more
  # memory where there are more cores.
  return concurrent.futures.ThreadPoolExecutor(min(2, os.cpu_count() or 1))


if hasattr(os, "register_at_fork"):  # a child has no threads but its own
  os.register_at_fork(after_in_child=_pool.cache_clear)
