"""Bit-planes at the entropy of the weights, by the range coder of constriction.

`encode` turns packed weights into bytes, `decode` turns those into planes. What
is coded are bits: one of `nonzero` for each weight and one of `sign` for each
weight that is not zero. All bits of a plane have one probability; or one for
each index of an axis (row, column, channel), from a grid of levels; or one for
each sum of the neighbors that are known already along short axes, such as those
of a convolution: whichever takes the fewest bits, its own header included.
Eight bits of one probability are one symbol of a range coder.

How few bytes: let H be the entropy, in bits, by the shares of -1, 0 and +1 in
the tensor; or by the share of non-zeros in each row (column, channel) of n
weights and the share of signs in the tensor, and

  log2 C(n),  C(n) = Σ_k binom(n, k) (k/n)^k (1 - k/n)^(n-k) ≈ √(½πn)

more for each row. If rows have 100 weights or more, a leaf takes at most 1.005
times the lesser of both, and 64 bytes. In rows of 20 weights of very different
densities it has been .8 % instead of .5 %. The entropy by rows alone cannot be
met: whatever the code, some weights of a row take at least log2 C(n) bits more
(Shtarkov 1987), since a reader does not know their share. This is more than
.5 % of the entropy itself in rows of less than 2,000 weights if 90 % are zeros,
of less than 16,000 if 99 % are.

Weights are cut into chunks of about a million that are coded on their own, so
that threads share a leaf. The bytes are

  u8           version, 1
  two models   of `nonzero` and of `sign`, each of one of two kinds:
    u8 m       neighbors along m axes, 0 if none are looked at;
    u8 first   only if m is not 0: the first of those axes,
    u16s       p: p / 65536 is the probability of a bit, for each sum of the
               neighbors: of bits, 0 ... m, for `nonzero`; of codes, -m ... m,
               for `sign`. Those beyond the edge of the chunk count as 0.
    u8 128 + i one level for each index of axis i,
    u8 L       from a grid of L levels,
    u8 low     of which low ... low + n - 1 are in use,
    u8 n       level low + j with a weight of 2^(e_j - 1), or 0 if e_j is 0:
    n nibbles  the e_j, the low half of a byte first
  u32, words   if an axis has levels: how many words, and the coded levels
  u32, u32     for each chunk: how many words, and the crc32 of its weights
  words        of all chunks

without gaps, little-endian, in words of 32 bits. All decisions and all
probabilities are made in integers: the bytes are a function of the weights. The
crc32 is over what a chunk decodes to, bits of `nonzero` and then of `sign` in C
order, so that no damage to any of the bytes passes for weights.

Needs constriction: pip install 'tern_jax[codec]'.
"""

import struct
from typing import Any

import numpy as np

from tern_jax.storage.entropy import coding
from tern_jax.storage.entropy.fitting import fit
from tern_jax.storage.entropy.layout import Layout
from tern_jax.storage.entropy.models import Levels, get_bits, put_bits, read
from tern_jax.storage.packed import PackedTernary, stored, validate

#: Version of the bytes that this module writes, and the only one it reads.
VERSION = 1


def encode(packed: PackedTernary) -> bytes:
  """Codes the planes of packed weights, without their scales.

  The same planes give the same bytes, wherever they are coded. If k_i of n_i
  bits are set at index i, or beside neighbors of sum i, the cost is

    sum_i -k_i log2 p_i - (n_i - k_i) log2(1 - p_i)

  bits and those of the model. A probability takes 2 bytes, a level some
  ½ log2 n_i bits: it stands for p = x²(3 - 2x), x = (l + ½) / L, a spacing that
  follows the error of a measured k_i / n_i, and L is the best of a few. Headers
  and ends take some 20 bytes a leaf.

  Args:
    packed: weights of any shape, on the host or a device.

  Raises:
    ValueError: the weights break an invariant of `PackedTernary`.
    ImportError: constriction is not installed.

  >>> import jax.numpy as jnp
  >>> from tern_jax import Ternary, pack
  >>> codes = jnp.eye(64, dtype=jnp.int8)
  >>> packed = pack(Ternary(codes, jnp.ones(()), jnp.ones(())))
  >>> data = encode(packed)
  >>> packed.nonzero.size + packed.sign.size, len(data)
  (1024, 75)
  >>> nonzero, sign = decode(data, (64, 64))
  >>> bool((nonzero == packed.nonzero).all() & (sign == packed.sign).all())
  True

  Source: the range coder and its models are those of Bamler, arXiv 2201.01741;
  ½ log2 n bits for a parameter, Rissanen, doi 10.1109/TIT.1984.1056936; C(n),
  Shtarkov, "Universal sequential coding of single messages", 1987.
  """
  validate(packed)
  packed = stored(packed)
  coding.stream()  # Without constriction, nothing is fitted.
  layout = Layout.of(packed.shape)
  planes = [layout.spread(x) for x in (packed.nonzero, packed.sign)]
  tallies = [layout.tallies(x) for x in planes]
  of_nonzero = fit(layout, planes[0], None, tallies[0], None)
  models = of_nonzero, fit(layout, planes[1], planes[0], *tallies[::-1])
  parts = [bytes([VERSION]), *(m.header() for m in models)]
  if leveled := [m for m in models if isinstance(m, Levels)]:
    coder = coding.Encoder()
    for m in leveled:
      m.put_index(coder)
    words = coder.words()
    parts += struct.pack("<I", len(words) // 4), words

  def chunk(i: int) -> tuple[bytes, bytes]:
    grid = layout.box(i)
    box = layout.weights(grid)
    nonzero, sign = (layout.unpack(x[grid]) for x in planes)
    coder = coding.Encoder()
    put_bits(coder, models[0], box, nonzero, None)
    put_bits(coder, models[1], box, sign, nonzero)
    words, crc = coder.words(), coding.crc_of(nonzero, sign)
    return struct.pack("<II", len(words) // 4, crc), words

  chunks = coding.threads(chunk, layout.chunks)
  parts += (entry for entry, _ in chunks)
  parts += (words for _, words in chunks)
  return b"".join(parts)


def decode(data: Any, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
  """Decodes the planes of packed weights.

  Nothing in the bytes is trusted: what is allocated, and for how long it is
  decoded, follows from `shape` and from the number of bytes. A shape that is
  far too large for the bytes is refused before anything is allocated.

  Args:
    data: what `encode` returned: bytes, or a buffer or array of bytes.
    shape: shape of the weights.

  Returns:
    (nonzero, sign), uint8, the planes of weights of this shape.

  Raises:
    ValueError: the bytes are damaged, or are not those of such a shape.
    ImportError: constriction is not installed.
  """
  coding.stream()
  layout = Layout.of(shape)
  reader = coding.Reader(memoryview(data).cast("B"))
  (version,) = reader.numbers("<B")
  if version != VERSION:
    raise ValueError(f"the version must be {VERSION}, got {version}.")
  models = [read(reader, layout, signed) for signed in (False, True)]
  indices = memoryview(b"")
  if leveled := [m for m in models if isinstance(m, Levels)]:
    indices = reader.take(4 * reader.numbers("<I")[0])
  table = np.frombuffer(reader.take(8 * layout.chunks), "<u4").reshape(-1, 2)
  ends = [0, *np.cumsum(table[:, 0], dtype=np.int64).tolist()]
  chunks = reader.take(4 * ends[-1])
  if left := len(reader.data):
    raise ValueError(f"{left} bytes are left over.")

  coder = coding.Decoder(indices)
  for m in leveled:
    m.get_index(coder, layout.shape[m.axis])
  planes = [np.zeros(layout.grid, np.uint8) for _ in range(2)]

  def chunk(i: int) -> None:
    grid = layout.box(i)
    box = layout.weights(grid)
    coder = coding.Decoder(chunks[4 * ends[i] : 4 * ends[i + 1]])
    nonzero = get_bits(coder, models[0], box, None)
    sign = get_bits(coder, models[1], box, nonzero)
    if coding.crc_of(nonzero, sign) != table[i, 1]:
      raise ValueError(f"the crc32 of chunk {i} of {layout.chunks} differs.")
    planes[0][grid], planes[1][grid] = layout.pack(nonzero), layout.pack(sign)

  coding.threads(chunk, layout.chunks)
  return layout.gather(planes[0]), layout.gather(planes[1])
