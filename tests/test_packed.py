import dataclasses

import hypothesis
import hypothesis.extra.numpy as hnp
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from tern_jax.core.containers import Ternary
from tern_jax.storage.packed import (
  PackedTernary,
  pack,
  to_ternary,
  unpack,
  validate,
)

SHAPES = [
  (), (0,), (1,), (7,), (8,), (9,), (64,), (0, 8), (8, 0), (3, 5), (5, 16),
  (16, 5), (64, 64), (784, 10), (2, 3, 4), (3, 3, 16, 8), (2, 1, 3, 1, 24),
]  # fmt: skip
SETTINGS = hypothesis.settings(
  max_examples=15, deadline=None, derandomize=True, database=None
)


def codes_of(shape, seed=0):
  rng = np.random.default_rng(seed)
  return rng.integers(-1, 2, shape).astype(np.int8)


def ternary(codes, w_p=0.5, w_n=0.25, dtype=jnp.float32):
  return Ternary(
    jnp.asarray(codes), jnp.asarray(w_p, dtype), jnp.asarray(w_n, dtype)
  )


def reference_planes(codes):
  """The planes by NumPy alone."""
  sizes = [i for i, n in enumerate(codes.shape) if n and n % 8 == 0]
  axis = sizes[0] if sizes else None
  return [
    np.packbits(bits, axis=axis, bitorder="little")
    for bits in (codes != 0, codes < 0)
  ]


def bits_of(x):
  return np.asarray(x).tobytes()


@pytest.mark.sample(3)
@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_planes_are_those_of_numpy_and_come_back(shape, jit):
  wrap = jax.jit if jit else lambda f: f
  codes = codes_of(shape)
  t = ternary(codes)
  packed = wrap(pack)(t)
  validate(packed)
  for plane, wanted in zip(
    (packed.nonzero, packed.sign), reference_planes(codes), strict=True
  ):
    np.testing.assert_array_equal(plane, wanted)
    assert plane.dtype == np.uint8
  back = wrap(to_ternary)(packed).codes
  np.testing.assert_array_equal(back, codes)
  assert (back.dtype, back.shape) == (np.int8, shape)
  dense = wrap(unpack)(packed)
  assert bits_of(dense) == bits_of(t.dequantize())
  assert (dense.shape, dense.dtype) == (packed.shape, packed.dtype)


@pytest.mark.long
@SETTINGS
@hypothesis.given(
  codes=hnp.arrays(
    np.int8,
    hnp.array_shapes(min_dims=0, max_dims=5, min_side=0, max_side=17),
    elements=st.integers(-1, 1),
  ),
  dtype=st.sampled_from(["float32", "bfloat16", "float16"]),
)
def test_any_codes_come_back_exactly(codes, dtype):
  t = ternary(codes, 1.3, 0.7, dtype)
  packed = pack(t)
  validate(packed)
  np.testing.assert_array_equal(to_ternary(packed).codes, codes)
  assert bits_of(packed.dequantize()) == bits_of(t.dequantize())
  assert packed.size == codes.size
  assert packed.nbytes <= codes.size / 4 + 64


@pytest.mark.parametrize("shape", [(512, 512), (1024, 136), (333, 77)], ids=str)
def test_compiled_decoding_equals_numpy_inside_a_fusion(shape):
  codes = codes_of(shape, seed=1)
  packed = pack(ternary(codes, 1.0, 1.0))
  total, dense = jax.jit(lambda p: (p.dequantize().sum(), p.dequantize()))(
    packed
  )
  np.testing.assert_array_equal(dense, codes.astype(np.float32))
  assert float(total) == codes.sum(dtype=np.int64)


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["", "jit"])
@pytest.mark.parametrize(
  "scale_shape",
  [(), (1, 24), (16, 1), (24,), (16, 24), (4, 24), (16, 3), (2, 12), (8,)],
  ids=str,
)
def test_scales_of_any_granularity(scale_shape, wrap):
  rng = np.random.default_rng(2)
  w_p, w_n = rng.uniform(0.1, 2.0, (2, *scale_shape)).astype(np.float32)
  codes = codes_of((16, 24))
  dense = wrap(lambda t: unpack(pack(t)))(ternary(codes, w_p, w_n))
  full = (1,) * (2 - len(scale_shape)) + scale_shape
  blocks = np.ones((16 // full[0], 24 // full[1]), np.float32)
  w_p, w_n = (np.kron(x.reshape(full), blocks) for x in (w_p, w_n))
  zero = np.float32(0)
  wanted = np.where(codes > 0, w_p, np.where(codes < 0, -w_n, zero))
  assert bits_of(dense) == bits_of(wanted)


def test_only_the_weights_of_a_tree_change():
  kernel = ternary(codes_of((16, 4)))
  tree = {"a": [kernel, jnp.arange(3)], "b": (None, 2.0)}
  packed = pack(tree)
  assert isinstance(packed["a"][0], PackedTernary)
  np.testing.assert_array_equal(packed["a"][1], np.arange(3))
  assert packed["b"] == (None, 2.0)
  again = pack(packed)["a"][0]
  assert bits_of(again.nonzero) == bits_of(packed["a"][0].nonzero)
  dense = unpack(packed)
  assert bits_of(dense["a"][0]) == bits_of(kernel.dequantize())
  assert dense["b"] == (None, 2.0)


def test_shapes_can_be_inferred_without_weights():
  packed = jax.eval_shape(pack, ternary(codes_of((3, 3, 16, 32))))
  assert packed.nonzero.shape == (3, 3, 2, 32)
  assert (packed.shape, packed.axis) == ((3, 3, 16, 32), 2)


@pytest.mark.parametrize(
  ("spec", "wanted"),
  [
    (PartitionSpec(None, "d"), (8, 2)),
    (PartitionSpec("d", None), (1, 16)),
    (PartitionSpec("d", "e"), (2, 8)),
  ],
)
def test_planes_are_sharded_as_the_codes_are(spec, wanted):
  shape, names = ((4, 2), ("d", "e")) if "e" in spec else ((8,), ("d",))
  mesh = jax.make_mesh(shape, names, (AxisType.Auto,) * len(names))
  codes = codes_of((64, 16))
  put = jax.device_put(codes, NamedSharding(mesh, spec))
  for wrap in (lambda f: f, jax.jit):
    packed = wrap(pack)(ternary(put))
    for plane in (packed.nonzero, packed.sign):
      assert plane.sharding.shard_shape(plane.shape) == wanted
    np.testing.assert_array_equal(wrap(to_ternary)(packed).codes, codes)


@pytest.mark.parametrize(
  ("leaf", "error", "match"),
  [
    (
      Ternary(jnp.ones(8), jnp.ones(()), jnp.ones(())),
      TypeError,
      "^a/0: codes must be int8, got float32",
    ),
    (ternary(np.full(8, 2, np.int8)), ValueError, "from 2 to 2"),
    (ternary(np.full(8, -128, np.int8)), ValueError, "from -128 to -128"),
    (ternary(codes_of(8), [1.0] * 3), ValueError, r"\(3,\) does not divide"),
    (ternary(codes_of(8), [1.0] * 16), ValueError, "does not divide"),
    (ternary(codes_of(8), np.ones(0)), ValueError, "does not divide"),
    (ternary(codes_of(8), [[1.0]]), ValueError, "does not divide"),
    (ternary(codes_of(8), dtype=jnp.int32), ValueError, "must be floating"),
    (
      Ternary(jnp.ones(8, jnp.int8), jnp.ones(()), jnp.ones((), jnp.bfloat16)),
      ValueError,
      "w_p is float32, but w_n is bfloat16",
    ),
  ],
)
def test_bad_ternary_weights_are_named(leaf, error, match):
  with pytest.raises(error, match=match):
    pack({"a": [leaf]})


GOOD = pack(ternary(codes_of((3, 5))))


@pytest.mark.parametrize(
  ("changes", "match"),
  [
    (
      {
        "sign": jnp.full(2, 7, jnp.uint8),
        "nonzero": jnp.zeros(2, jnp.uint8),
      },
      "6 sign bits are set where the weight is zero",
    ),
    (
      {
        "nonzero": jnp.full(2, 255, jnp.uint8),
        "sign": jnp.zeros(2, jnp.uint8),
      },
      "bits are set beyond the last weight",
    ),
    ({"axis": 0}, "axis must be None for shape"),
    ({"shape": (8, 2)}, r"axis must be 0 .*must be uint8\[1, 2\]"),
    ({"sign": jnp.zeros(2, jnp.int8)}, r"sign must be uint8\[2\], got int8"),
    ({"nonzero": jnp.zeros(3, jnp.uint8)}, r"nonzero .* got uint8\[3\]"),
    ({"w_p": jnp.ones((2,))}, r"w_p of shape \(2,\) does not divide"),
    ({"w_n": jnp.ones((), jnp.int32)}, "w_n must be floating, got int32"),
  ],
)
def test_validate_names_the_leaf_and_the_fault(changes, match):
  validate({"blocks": [{"kernel": GOOD}]})
  bad = dataclasses.replace(GOOD, **changes)
  with pytest.raises(ValueError, match=rf"^blocks/0/kernel: .*{match}"):
    validate({"blocks": [{"kernel": bad}]})
