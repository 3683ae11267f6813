"""Bits in and out of the range coder of constriction; bytes in and out."""

import concurrent.futures
import dataclasses
import functools
import importlib
import os
import struct
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np

#: Probabilities are integers, in units of 1 / ONE.
ONE = 1 << 16
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
    raise ImportError(
      "codec='entropy' needs constriction: pip install 'tern_jax[codec]'."
    ) from e


# Bits of one probability.


def put(coder: Any, bits: np.ndarray, p: int) -> None:
  """Codes flat bits that are set with a probability of p / ONE."""
  data, (n, rest) = pack_bits(bits), divmod(bits.size, 8)
  for i in range(0, n, _BLOCK):
    coder.encode(data[i : min(i + _BLOCK, n)].astype(np.int32), _byte(p, 8))
  if rest:
    coder.encode(data[n:].astype(np.int32), _byte(p, rest))


def get(coder: Any, size: int, p: int) -> np.ndarray:
  """Decodes what `put` coded."""
  n, rest = divmod(size, 8)
  data = np.empty(n + (rest > 0), np.uint8)
  data[:n] = symbols(coder, _byte(p, 8), n)
  if rest:
    data[n:] = symbols(coder, _byte(p, rest), 1)
  return unpack_bits(data, size)


def symbols(coder: Any, model: Any, n: int) -> np.ndarray:
  """Decodes n symbols of a model."""
  try:
    return coder.decode(model, n)
  except AssertionError as e:
    raise ValueError(f"the coded words are damaged: {e}") from e


@functools.lru_cache(1024)
def _byte(p: int, n: int) -> Any:
  """Returns the model of n <= 8 bits as one symbol, the first bit lowest."""
  by_count = [p**k * (ONE - p) ** (n - k) for k in range(n + 1)]
  return categorical(tuple(by_count[i.bit_count()] for i in range(1 << n)))


def categorical(weights: tuple[int, ...]) -> Any:
  """Returns a model of probabilities in proportion to integers.

  The library scales what it is given to _TOTAL less the number of symbols,
  takes the integer parts and adds 1 to each. Integers that have that sum are
  scaled by exactly 1, and are exact in float32.
  """
  total = _TOTAL - len(weights)
  chances = [w * total // sum(weights) for w in weights]
  chances[weights.index(max(weights))] += total - sum(chances)
  model = stream().model.Categorical
  return model(np.array(chances, np.float32), lazy=False, perfect=False)


# Masks.


def take(x: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
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


def give(x: np.ndarray, mask: np.ndarray | None, found: np.ndarray) -> None:
  """Sets x[mask] of flat arrays to `found`, the inverse of `take`."""
  if mask is None:
    x[:] = found
    return
  n = 0
  for i in range(0, x.size, _BLOCK):
    (at,) = mask[i : i + _BLOCK].nonzero()
    x[i : i + _BLOCK][at] = found[n : n + at.size]
    n += at.size


# Bytes.


def pack_bits(bits: np.ndarray) -> np.ndarray:
  """Returns bits as bytes, in C order, the first bit lowest."""
  return np.packbits(bits, bitorder="little")


def unpack_bits(data: np.ndarray, n: int) -> np.ndarray:
  """Returns the first n bits of bytes as bools."""
  return np.unpackbits(data, count=n, bitorder="little").view(bool)


def crc_of(nonzero: np.ndarray, sign: np.ndarray) -> int:
  """Returns the crc32 of the bits of a chunk."""
  return zlib.crc32(pack_bits(sign).data, zlib.crc32(pack_bits(nonzero).data))


@dataclasses.dataclass
class Reader:
  """Reads bytes from the front."""

  data: memoryview

  def take(self, n: int) -> memoryview:
    """Returns the next n bytes."""
    if n > (left := len(self.data)):
      raise ValueError(f"{n} bytes are expected where {left} are left.")
    taken, self.data = self.data[:n], self.data[n:]
    return taken

  def numbers(self, layout: str) -> tuple[int, ...]:
    """Returns the next numbers, in a layout of `struct`."""
    return struct.unpack(layout, self.take(struct.calcsize(layout)))


# Threads.


def threads(f: Callable[[int], Any], n: int) -> list[Any]:
  """Returns [f(0), ..., f(n - 1)], computed by a few threads."""
  if n < 2:
    return list(map(f, range(n)))
  return list(_pool().map(f, range(n)))


@functools.cache
def _pool() -> concurrent.futures.Executor:
  """Returns the threads, always the same: each keeps some memory for itself."""
  # They share the work of NumPy; the coder itself runs in one thread at a time.
  # A thread keeps some 4 MB, four times its chunk: a save must not take more
  # memory where there are more cores.
  return concurrent.futures.ThreadPoolExecutor(min(2, os.cpu_count() or 1))


if hasattr(os, "register_at_fork"):  # a child has no threads but its own
  os.register_at_fork(after_in_child=_pool.cache_clear)
