import json
import math
import struct
import sys
import zlib

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tern_jax import codec
from tern_jax.checkpoint import (
  CheckpointError,
  load_packed,
  read_spec,
  save_packed,
)
from tern_jax.core.containers import Ternary
from tern_jax.storage.entropy import coding, layout
from tern_jax.storage.packed import PackedTernary, pack, packed_axis

SETTINGS = hypothesis.settings(
  max_examples=60, deadline=None, derandomize=True, database=None
)


def packed_of(codes):
  """Packs by NumPy alone."""
  codes = np.asarray(codes, np.int8)
  axis, one = packed_axis(codes.shape), np.float32(1)
  nonzero, sign = (
    np.packbits(bits, axis=axis, bitorder="little")
    for bits in (codes != 0, codes < 0)
  )
  return PackedTernary(nonzero, sign, one, one, codes.shape, axis)


def draw(shape, density, seed=0, negative=0.5):
  """Codes of a density, and of a share of negative ones, of any broadcast."""
  rng = np.random.default_rng(seed)
  nonzero, sign = rng.random((2, *shape), dtype=np.float32)
  return (nonzero < density) * np.where(sign < negative, -1, 1).astype(np.int8)


def entropy(codes, axis=None):
  """Entropy in bits of all codes, by shares of the tensor or of an axis."""
  rows = codes.reshape(1, -1)
  if axis is not None:
    rows = np.moveaxis(codes, axis, 0).reshape(codes.shape[axis], -1)
  counts = np.stack([(rows == c).sum(1) for c in (-1, 0, 1)], 1)
  shares = counts / rows.shape[1]
  return float(-(counts * np.log2(np.where(counts, shares, 1))).sum())


def parameters(shape, axis):
  """Bits that one probability an index must cost: ½ log2 of its weights."""
  return 0.5 * math.log2(math.prod(shape) / shape[axis]) * shape[axis]


def filters(shape, spread, seed=0):
  """Codes of smooth kernels [kh, kw, ...]: their own mean, and noise."""
  rng = np.random.default_rng(seed)
  mean = spread * rng.normal(size=(1, 1, *shape[2:]))
  w = mean + rng.normal(size=shape)
  return np.where(np.abs(w) < 1, 0, np.sign(w)).astype(np.int8)


def entropy_by_neighbors(codes):
  """Entropy of kernels [kh, kw, ...], by sums of the left and the upper tap."""
  coins = {}
  for i, j in np.ndindex(codes.shape[:2]):
    zero = np.zeros(codes.shape[2:], np.int8)
    left = codes[i, j - 1] if j else zero
    up = codes[i - 1, j] if i else zero
    here, many = codes[i, j], np.abs(left) + np.abs(up)
    for total in range(3):
      coins.setdefault(("nonzero", total), []).append(here[many == total] != 0)
    for total in range(-2, 3):
      at = (here != 0) & (left + up == total)
      coins.setdefault(("sign", total), []).append(here[at] < 0)
  return sum(entropy(np.concatenate(c).astype(np.int8)) for c in coins.values())


def assert_comes_back(codes):
  packed = packed_of(codes)
  data = codec.encode(packed)
  for plane, wanted in zip(
    codec.decode(data, packed.shape),
    (packed.nonzero, packed.sign),
    strict=True,
  ):
    np.testing.assert_array_equal(plane, wanted)
    assert plane.dtype == np.uint8
    assert plane.shape == wanted.shape
  return data


# What goes in comes out.


@SETTINGS
@hypothesis.given(
  hnp.arrays(
    np.int8,
    hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=17),
    elements=st.integers(-1, 1),
    fill=st.integers(-1, 1),
  )
)
def test_any_codes_come_back(codes):
  assert_comes_back(codes)


@SETTINGS
@hypothesis.given(
  st.lists(st.integers(1, 24), min_size=2, max_size=3).map(tuple),
  st.integers(0, 2),
  st.integers(0, 2**32 - 1),
)
def test_any_densities_come_back_from_small_chunks(shape, axis, seed):
  rng = np.random.default_rng(seed)
  along = [n if i == axis else 1 for i, n in enumerate(shape)]
  codes = draw(shape, rng.random(along), seed, rng.random(along))
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(layout, "_CHUNK", 1 << 10)
    assert_comes_back(codes)


@SETTINGS
@hypothesis.given(
  st.lists(st.integers(1, 9), min_size=3, max_size=4).map(tuple),
  st.integers(0, 2),
  st.integers(0, 2**32 - 1),
)
def test_any_smooth_kernels_come_back(shape, at, seed):
  codes = filters((*shape[:2], 4, *shape[2:]), 3, seed)
  assert_comes_back(np.moveaxis(codes, [0, 1], [at, at + 1]))


@pytest.mark.parametrize(
  ("shape", "size"),
  [((), 19), ((0,), 7), ((0, 8), 7), ((7,), 19), ((64, 64), 19)],
  ids=str,
)
@pytest.mark.parametrize("value", [-1, 0, 1])
def test_constant_weights_take_a_header(shape, size, value):
  data = assert_comes_back(np.full(shape, value, np.int8))
  assert len(data) <= size


@pytest.mark.parametrize(
  ("shape", "limit", "chunks"),
  [
    ((1 << 20,), 1 << 20, 1),
    ((1 << 20 | 8,), 1 << 20, 2),
    ((64, 80), 1 << 10, 5),
    ((40, 33), 1 << 10, 2),
    ((3, 3, 16, 24), 1 << 10, 4),
    ((2, 3, 5, 7), 1 << 4, 21),
    ((5, 7, 9), 1 << 6, 9),
    ((2, 16, 3), 1 << 3, 12),
  ],
  ids=str,
)
def test_leaves_are_cut_into_even_chunks(monkeypatch, shape, limit, chunks):
  monkeypatch.setattr(layout, "_CHUNK", limit)
  cut = layout.Layout.of(shape)
  assert cut.chunks == chunks
  seen = np.zeros(cut.grid, int)
  for i in range(chunks):
    box = cut.box(i)
    seen[box] += 1
    assert seen[box].size * (1 if cut.axis is None else 8) <= limit
  assert (seen == 1).all()
  assert_comes_back(draw(shape, 0.3))


def test_damage_is_that_of_a_chunk(monkeypatch):
  monkeypatch.setattr(layout, "_CHUNK", 1 << 10)
  packed = packed_of(draw((64, 80), 0.3))
  data = bytearray(codec.encode(packed))
  data[-9] ^= 255
  with pytest.raises(ValueError, match="crc32 of chunk 4 of 5 differs"):
    codec.decode(data, packed.shape)


# How many bytes.


def price(n):
  """log2 Σ binom(n, k) (k/n)^k (1 - k/n)^(n - k), by Ramanujan's Q(n) + 1."""
  return math.log2(1 + np.cumprod(1 - np.arange(n) / n).sum())


def test_the_price_of_a_share():
  assert price(1) == 1  # of one weight: to say which it is
  assert price(2) == math.log2(1 + 1 / 2 + 1)
  assert price(1000) == pytest.approx(math.log2(500 * math.pi) / 2, abs=0.03)


@pytest.mark.parametrize("spread", [0, 2])
@pytest.mark.parametrize(
  "shape", [(100, 100), (1000, 100), (250, 4000), (1000, 1000)], ids=str
)
def test_rows_take_the_best_entropy_and_the_price_of_shares(shape, spread):
  spreads = np.exp(spread * np.random.default_rng(1).normal(size=(shape[0], 1)))
  for zeros in (0.3, 0.7, 0.9, 0.99):
    odds = (1 - zeros) / zeros * spreads
    codes = draw(shape, odds / (1 + odds))
    nonzero = (codes != 0).astype(np.int8)
    by_row = entropy(nonzero, 0) + shape[0] * price(shape[1])
    bound = min(entropy(codes), by_row + entropy(codes[codes != 0]))
    assert 8 * len(assert_comes_back(codes)) <= 1.005 * bound + 8 * 64


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_rows_of_varying_density(axis, seed):
  """MPEG's NNCodec 2.1.3 takes 1.164 bits for rows of such entropies."""
  rng = np.random.default_rng(seed)
  densities = 0.6985 * rng.permutation((np.arange(512) + 0.5) / 512) ** 1.035
  codes = draw((512, 1024), densities[:, None], seed)
  tensor, rows = (entropy(codes, a) / codes.size for a in (None, 0))
  assert tensor == pytest.approx(1.271, abs=0.003)
  assert rows == pytest.approx(1.124, abs=0.003)
  if axis:
    codes = np.ascontiguousarray(codes.T)
  size = 8 * len(assert_comes_back(codes)) / codes.size
  assert size <= 1.005 * rows + 8 * 64 / codes.size
  assert size < 1.164


@pytest.mark.parametrize("shape", [(1000, 500), (9, 64, 500)])
@pytest.mark.parametrize("zeros", [0.5, 0.9])
def test_any_axis_may_have_levels(shape, zeros):
  rng = np.random.default_rng(2)
  odds = (1 - zeros) / zeros * np.exp(rng.normal(size=shape[-1]))
  for axis in range(len(shape)):
    codes = np.moveaxis(draw(shape, odds / (1 + odds)), -1, axis)
    bound = entropy(codes, axis) + parameters(codes.shape, axis)
    assert 8 * len(assert_comes_back(codes)) <= 1.005 * bound + 8 * 64
    assert bound < 0.95 * entropy(codes)


def test_signs_may_have_levels_of_their_own():
  shape = (400, 256)
  densities = np.linspace(0.05, 0.95, 400)[:, None]
  codes = draw(shape, densities, 0, np.linspace(0, 1, 256))
  nonzero = codes != 0
  rows = entropy(nonzero.astype(np.int8), 0)
  negative = (codes < 0).sum(0) / nonzero.sum(0)
  columns = nonzero.sum(0) @ [
    -sum(p * math.log2(p) for p in (x, 1 - x) if p) for x in negative
  ]
  bound = rows + columns + parameters(shape, 0) + parameters(shape, 1)
  assert bound < 0.9 * entropy(codes)
  assert 8 * len(assert_comes_back(codes)) <= 1.005 * bound + 8 * 64


@pytest.mark.parametrize("at", [(0, 1), (1, 2), (2, 3)])
def test_kernels_are_coded_by_their_neighbors(at):
  codes = filters((3, 3, 96, 64), 2)
  bound = entropy_by_neighbors(codes)
  assert bound < 0.8 * entropy(codes)
  data = assert_comes_back(np.moveaxis(codes, [0, 1], at))
  assert data[1:3] == bytes([2, at[0]])
  assert 8 * len(data) <= 1.005 * bound + 8 * 64


def test_dead_rows_are_almost_free():
  codes = draw((512, 256), 0.5)
  codes[64:] = 0
  size = len(assert_comes_back(codes))
  assert size <= 1.005 * entropy(codes[:64]) / 8 + 64 + 512 / 8


# The same bytes, everywhere.


def golden():
  """Weights that no generator of random numbers made, but x² mod p."""
  x = np.arange(24 * 40 * 25, dtype=np.int64)
  x = (x * x % 65521).reshape(24, 40, 25) % 1000
  rows = np.arange(24)[:, None, None] * 40
  columns = np.arange(25) * 40
  return np.where(x < rows, np.where(x % 100 * 10 < columns, -1, 1), 0)


def test_the_bytes_are_a_function_of_the_weights():
  data = assert_comes_back(golden())
  assert data[:5] == bytes([1, 128, 16, 0, 14])  # rows of `nonzero`,
  assert data[12:16] == bytes([130, 12, 0, 11])  # columns of `sign`
  assert (len(data), zlib.crc32(data)) == (3322, 3352936494)


def test_probabilities_are_those_that_the_library_takes():
  """A symbol costs log2(total / weight), and its weight is what was asked."""
  stream = coding.stream()
  weights = (1, 1000, 2**23, 77)
  model = coding.categorical(weights)
  for symbol, weight in enumerate(weights):
    encoder = stream.queue.RangeEncoder()
    encoder.encode(np.full(50_000, symbol, np.int32), model)
    share = weight * (2**24 - 4) // sum(weights) + 1
    bits = -50_000 * math.log2(share / 2**24)
    assert encoder.num_bits() == pytest.approx(bits, rel=1e-3, abs=64)


# Nothing in the bytes is believed.


CASES = [
  draw((24, 40), 0.3),
  draw((64, 128), np.linspace(0, 1, 128), negative=0.2),
  draw((15, 33), 0.1),
  filters((3, 3, 16, 24), 2),
  draw((128, 3, 16), np.linspace(0, 1, 128)[:, None, None]),
]


def attempt(data, packed):
  """Says whether bytes are refused; the weights must be right if they are not.

  Headers may hold what is never used, such as the probability of signs where
  there is none.
  """
  try:
    planes = codec.decode(bytes(data), packed.shape)
  except ValueError:
    return True
  np.testing.assert_array_equal(planes[0], packed.nonzero)
  np.testing.assert_array_equal(planes[1], packed.sign)
  return False


@pytest.mark.parametrize("codes", CASES, ids=lambda x: str(x.shape))
def test_damage_is_noticed_or_harmless(codes):
  packed, rng = packed_of(codes), np.random.default_rng(0)
  data = codec.encode(packed)
  assert all(attempt(data[:n], packed) for n in range(0, len(data), 3))
  assert attempt(data + b"\0", packed)
  noticed, places = 0, rng.permutation(len(data))[:200]
  for at in places:
    damaged = bytearray(data)
    damaged[at] ^= 1 << int(rng.integers(8))
    noticed += attempt(damaged, packed)
  # The last word of a range code has bits to spare.
  assert noticed >= 0.9 * len(places)
  for _ in range(100):
    damaged = bytearray(data)
    for at in rng.choice(len(data), 8):
      damaged[at] = rng.integers(256)
    attempt(damaged, packed)


@SETTINGS
@hypothesis.given(
  st.binary(max_size=80), st.sampled_from([(24, 40), (0, 8), (), (15, 33)])
)
def test_any_bytes_are_refused(data, shape):
  # Random bytes cannot have the right crc32, but for no weights at all.
  if math.prod(shape):
    with pytest.raises(ValueError, match=r"."):
      codec.decode(b"\1" + data, shape)
  else:
    attempt(b"\1" + data, packed_of(np.zeros(shape)))


TENSOR = bytes([1, 0, 0, 128, 0, 0, 128])


@pytest.mark.parametrize(
  ("data", "shape", "match"),
  [
    (b"", (8,), "1 bytes are expected where 0 are left"),
    (b"\2" + TENSOR[1:], (8,), "version must be 1, got 2"),
    (TENSOR[:5], (8,), "2 bytes are expected where 0 are left"),
    (bytes([1, 0, 0, 0]), (8,), "a probability must not be 0"),
    (TENSOR, (8,), "8 bytes are expected where 0 are left"),
    (TENSOR + bytes(9), (8,), "1 bytes are left over"),
    (TENSOR + bytes(8), (8,), "crc32 of chunk 0 of 1 differs"),
    (
      TENSOR + struct.pack("<II", 2**32 - 1, 0),
      (8,),
      "17179869180 bytes are expected where 0 are left",
    ),
    (TENSOR, (10**9, 10**9), "bytes are expected where 0 are left"),
    (TENSOR, (10**30,), "bytes are expected where 0 are left"),
    (bytes([1, 129, 8, 0, 8]), (0, 10**12), "axis 1 of .* has no levels"),
    (bytes([1, 130, 8, 0, 8]), (64, 64), "axis 2 of .* has no levels"),
    (bytes([1, 128, 8, 0, 8]), (64, 8), "axis 0 of .* has no levels"),
    (bytes([1, 128, 8, 1, 8]) + bytes([17] * 4), (64, 64), "8 levels from 1"),
    (bytes([1, 128, 8, 0, 4]) + bytes(2), (64, 64), "4 levels from 0"),
    (bytes([1, 128, 0, 0, 0]), (64, 64), "0 levels from 0"),
    (bytes([1, 2, 0]) + bytes(9), (3, 3, 8), "a probability must not be 0"),
    (bytes([1, 3, 0]) + bytes(9), (3, 3, 8), "no neighbors along 3 axes from"),
    (bytes([1, 1, 2]) + bytes(9), (3, 3, 8), "no neighbors along 1 axes from"),
    (bytes([1, 1, 0]) + bytes(9), (17, 8), "no neighbors along 1 axes from"),
    (bytes([1, 2, 1]) + bytes(9), (8, 3), "no neighbors along 2 axes from"),
  ],
)
def test_false_headers_are_explained(data, shape, match):
  with pytest.raises(ValueError, match=match):
    codec.decode(data, shape)


def test_weights_are_validated():
  bad = packed_of(np.zeros((8, 2)))
  bad.sign[:] = 1
  with pytest.raises(ValueError, match="2 sign bits are set where"):
    codec.encode(bad)


def test_constriction_is_optional(monkeypatch):
  monkeypatch.setitem(sys.modules, "constriction", None)
  coding.stream.cache_clear()
  for run in (
    lambda: codec.encode(packed_of(np.zeros(8))),
    lambda: codec.decode(TENSOR, (8,)),
  ):
    with pytest.raises(ImportError, match=r"pip install 'tern_jax\[codec\]'"):
      run()


# In a checkpoint.


def net():
  one = jnp.ones(())
  scales = jnp.asarray(
    np.random.default_rng(0).uniform(0.1, 1, (2, 1, 48)), jnp.bfloat16
  )
  return {
    "layer": {
      "kernel": pack(Ternary(jnp.asarray(draw((96, 48), 0.1)), *scales)),
      "bias": jnp.arange(48.0),
    },
    "head": pack(Ternary(jnp.asarray(draw((7, 5), 0.5)), one, one)),
    "empty": pack(Ternary(jnp.zeros((0, 8), jnp.int8), one, one)),
  }


def test_a_checkpoint_at_the_entropy(tmp_path):
  tree = net()
  for name in ("planes", "entropy"):
    save_packed(tmp_path / name, tree, codec=name)
  for like in (None, tree):
    loaded = load_packed(tmp_path / "entropy", like)
    assert jax.tree.structure(loaded) == jax.tree.structure(tree)
    for x, y in zip(*map(jax.tree.leaves, (loaded, tree)), strict=True):
      assert (x.dtype, x.shape) == (y.dtype, y.shape)
      assert x.tobytes() == y.tobytes()
  planes, coded = (read_spec(tmp_path / k) for k in ("planes", "entropy"))
  assert (planes["codec"], coded["codec"]) == ("planes", "entropy")
  leaves = (spec["leaves"]["packed"] for spec in (planes, coded))
  for a, b in zip(*leaves, strict=True):
    assert (a["path"], a["crc32"]) == (b["path"], b["crc32"])
  kernel = coded["leaves"]["packed"][3]["arrays"]
  assert sorted(kernel) == ["coded", "w_n", "w_p"]
  assert kernel["coded"] == {
    "shape": [len(codec.encode(tree["layer"]["kernel"]))],
    "dtype": "uint8",
  }


@pytest.mark.parametrize(
  ("change", "match"),
  [
    ({"shape": [5, 70]}, "head is damaged: the crc32 of chunk 0"),
    ({"shape": [10**9, 10**9]}, "claims 250,000,000,000,000,031 bytes"),
    ({"shape": [10**4, 10**4]}, "head is damaged: .* bytes are expected"),
    ({"crc32": 0}, "head is damaged: its crc32 differs"),
    ({"kind": "dense"}, "head is damaged: its crc32 differs"),
  ],
)
def test_a_false_spec_is_not_believed(tmp_path, change, match):
  save_packed(tmp_path / "net", {"head": net()["head"]}, codec="entropy")
  file = tmp_path / "net" / "spec" / "data.json"
  spec = json.loads(file.read_text())["spec"]
  spec["leaves"]["packed"][0].update(change)
  crc = zlib.crc32(json.dumps(spec, sort_keys=True).encode())
  file.write_text(json.dumps({"crc32": crc, "spec": spec}))
  with pytest.raises(CheckpointError, match=match):
    load_packed(tmp_path / "net")
