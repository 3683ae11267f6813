import dataclasses
import functools
import itertools
import math

import hypothesis
import hypothesis.extra.numpy as hnp
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import tern_jax
from tern_jax import SCA, TTQ, TWN, ParamTransform
from tern_jax.core.containers import Ternary
from tern_jax.storage.layout import packed_axis, plane_shape, relaid_plane
from tern_jax.storage.packed import (
  PackedTernary,
  pack,
  to_ternary,
  unpack,
  validate,
)
from tests.helpers import assert_same, discretize, init, long

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


@pytest.mark.sample(3)
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


# Stacks of layers.


def stack_of(layers, shape, method=None):
  """Stacked layers, each made ternary by itself."""
  kernel = np.random.default_rng(0).normal(size=(layers, *shape))
  tern = ParamTransform(method or TWN(), stacked=("blocks",))
  user = {"blocks": {"kernel": jnp.asarray(kernel, jnp.float32)}}
  return discretize(tern, *init(tern, user))["blocks"]["kernel"]


def stacked(layers):
  return jax.tree.map(lambda *x: np.stack(x), *layers)


@pytest.mark.parametrize(
  ("layers", "shape", "method"),
  [
    (4, (16, 16), TWN()),
    (8, (5, 24), TWN(channel_axis=-1)),
    (8, (3, 5), TWN()),
    long(8, (16, 16), TTQ()),
    long(4, (3, 5), TTQ(channel_axis=-1)),
    long(1, (3, 5), TWN()),
    long(32, (24, 40), TWN()),
    long(16, (2, 3, 8, 16), TWN()),
    long(8, (2, 7), SCA(sparsity=0.5)),
    long(2, (7, 16), SCA(sparsity=0.5)),
  ],
  ids=str,
)
def test_layers_of_a_stack_come_and_go(layers, shape, method):
  t = stack_of(layers, shape, method)
  packed, dense = jax.jit(lambda t: (pack(t), t.dequantize()))(t)
  lead, axis = packed.lead, packed.axis
  assert (packed.shape, lead >= 1, axis != 0) == (t.shape, True, True)

  def body(carry, layer):
    assert layer.shape == shape
    return carry, (unpack(layer), layer)

  @jax.jit
  def run(packed):
    mapped, out = jax.vmap(lambda x: (unpack(x), x))(packed)
    scanned, same = jax.lax.scan(body, 0, packed)[1]
    return (mapped, scanned, unpack(packed)), (out, same)

  # Indexing and stacking by NumPy, which compiles nothing.
  on_host = jax.tree.map(np.asarray, packed)
  parts = [jax.tree.map(lambda x, i=i: x[i], on_host) for i in range(layers)]
  shown, again = run(packed)
  for got in shown:
    np.testing.assert_array_equal(got, dense)
  for got in (*again, stacked(parts)):
    validate(got)
    assert_same(got, packed)
    assert (got.shape, got.axis, got.lead) == (packed.shape, axis, lead)
  # The planes of a layer are those of NumPy.
  of_layer = axis if axis is None else axis - 1
  for part, codes in zip(parts, np.asarray(t.codes), strict=True):
    validate(part)
    assert (part.shape, part.axis) == (shape, of_layer)
    wanted = reference_planes(codes)
    np.testing.assert_array_equal((part.nonzero, part.sign), wanted)


@pytest.mark.parametrize(
  "shape",
  [
    (8, 16, 24), (16, 8), (8, 3, 16), (8, 24, 5, 16), (3, 16, 2, 8), (8, 3, 5),
    (4, 3, 5), (0, 8, 16), (8, 0, 16), (16, 3),
  ],
  ids=str,
)  # fmt: skip
def test_planes_change_the_axis_that_they_pack(shape):
  bits = np.abs(codes_of(shape))

  def plane(lead):
    axis, flat = packed_axis(shape, lead), bits
    if axis is None:
      axis, flat = lead, bits.reshape(*shape[:lead], math.prod(shape[lead:]))
    return np.packbits(flat, axis, "little")

  for before, after in itertools.permutations(range(len(shape)), 2):
    axis = packed_axis(shape, before)
    got = relaid_plane(plane(before), shape, axis, after)
    np.testing.assert_array_equal(got, plane(after))
    assert (got.shape, got.dtype) == (plane_shape(shape, after), np.uint8)


def test_layers_packed_one_by_one_become_a_stack():
  layers = [ternary(codes_of((16, 24), i), 1.0 + i, 5.0 + i) for i in range(4)]
  dense = np.stack([x.dequantize() for x in layers])
  by_vmap = jax.jit(jax.vmap(pack))(stacked(layers))
  assert by_vmap.w_p.shape == (4,)
  for got in (
    stacked(layers).dequantize(),
    unpack(pack(stacked(layers))),
    unpack(stacked(map(pack, layers))),
    unpack(by_vmap),
    jax.vmap(unpack)(by_vmap),
    unpack(jax.lax.scan(lambda _, x: (0, pack(x)), 0, stacked(layers))[1]),
  ):
    np.testing.assert_array_equal(got, dense)
  validate(by_vmap)
  assert pack(stacked(layers)).w_p.shape == (4, 1, 1)


def test_one_scale_fits_the_first_and_the_last_axis():
  one = ternary(codes_of((1, 3, 1)), np.ones(1), np.ones(1))
  np.testing.assert_array_equal(unpack(pack(one)), one.codes.astype(float))


def test_scales_that_fit_the_first_and_the_last_axes_are_refused():
  t = ternary(codes_of((16, 5, 16)), np.ones(16), np.ones(16))
  for call in (t.dequantize, lambda: pack({"w": t})):
    with pytest.raises(ValueError, match=r"\(16, 1, 1\) or to \(1, 1, 16\)"):
      call()
  packed = stacked([pack(ternary(codes_of((5, 16))))] * 16)
  with pytest.raises(ValueError, match=r"w: w_p: scales .* fit both"):
    validate({"w": packed})


@pytest.mark.parametrize(
  "change",
  [
    lambda x: x.T,
    lambda x: x[:, 0] if x.ndim == 3 else x,
    lambda x: x[..., :5] if x.ndim == 3 else x,
    lambda x: x.reshape(4, -1) if x.ndim == 3 else x,
  ],
)
def test_other_axes_cannot_be_changed(change):
  packed = pack(stack_of(4, (16, 24)))
  with pytest.raises(ValueError, match="only leading axes can be added or"):
    unpack(jax.tree.map(change, packed))


def test_a_shard_is_unpacked_by_its_own_shape():
  packed = pack(ternary(codes_of((64, 24))))
  mesh = jax.make_mesh((8,), ("d",), (AxisType.Auto,))
  rows, whole = PartitionSpec("d"), PartitionSpec()

  def of_shard(x, shape):
    return unpack(dataclasses.replace(x, shape=shape))

  def call(shape):
    specs = jax.tree.map(lambda x: rows if x.ndim else whole, packed)
    return jax.shard_map(
      lambda x: of_shard(x, shape), mesh=mesh, in_specs=(specs,), out_specs=rows
    )(packed)

  np.testing.assert_array_equal(
    jax.jit(call, static_argnums=0)((8, 24)), unpack(packed)
  )
  with pytest.raises(ValueError, match=r"dataclasses.replace\(packed, shape="):
    call((64, 24))


@pytest.mark.sample(5)
@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("stack", [(), ("kernel",)])
@pytest.mark.parametrize("method", [TWN(), TTQ(), SCA(sparsity=0.5)], ids=repr)
def test_weights_are_donated(method, stack, jit):
  tern = ParamTransform(method, stacked=stack)
  kernel = np.random.default_rng(0).normal(size=(2, 8, 8)).astype(np.float32)
  params, state = tern.init({"kernel": jnp.asarray(kernel)})
  wrap = jax.jit if jit else lambda f: f
  made = wrap(lambda p, s: (t := tern.discretize(p, s), pack(t)))(params, state)
  wanted = np.asarray(unpack(made[1])["kernel"])
  serve = jax.jit(lambda x: x, donate_argnums=0)
  for weights in made:
    kept = serve(weights)
    assert all(x.is_deleted() for x in jax.tree.leaves(weights))
    np.testing.assert_array_equal(unpack(pack(kept))["kernel"], wanted)
  # What is trained is still there.
  assert not any(x.is_deleted() for x in jax.tree.leaves((params, state)))


def test_scales_of_one_array_are_donated():
  one = jnp.ones(())
  packed = pack(Ternary(jnp.ones(8, jnp.int8), one, one))
  jax.jit(lambda x: x, donate_argnums=0)(packed)
  assert packed.w_p.is_deleted()
  assert not one.is_deleted()


def test_latents_are_refused(tmp_path):
  tern = tern_jax.ParamTransform(tern_jax.TWN())
  params, state = tern.init({"kernel": jnp.eye(8), "bias": jnp.ones(8)})
  save = functools.partial(tern_jax.save_packed, tmp_path / "net")
  for name, fn in ("pack", tern_jax.pack), ("save_packed", save):
    with pytest.raises(TypeError, match=rf"{name} got TernParams, .*finalize"):
      fn(params)
    for dense in params.latent, tern(params, state):
      with pytest.raises(ValueError, match=rf"{name} got no .* kernel for"):
        fn(dense)
  assert not (tmp_path / "net").exists()
