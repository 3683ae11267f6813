"""One scale a channel or a group: consecutive inputs of one channel."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import tern_jax
from tern_jax import EC2T, SCA, TGA, TTQ, TWN, AbsMean, ParamTransform, metrics
from tests import helpers, reference
from tests.helpers import weights

METHODS = [
  SCA(alpha=0.1),
  SCA(sparsity=0.4),
  SCA(sparsity=0.7, scaled=False),
  TWN(),
  TTQ(threshold=0.3),
  AbsMean(),
  EC2T(gamma=0.3, largest=10_000),
  TGA(delta=0.05, of_max=True, mean=True),
  TGA(sparsity=0.6, mean=True),
  EC2T(sparsity=0.6),
]
# Shape, channel axis, group size.
LAYOUTS = {
  "dense": ((48, 10), -1, 16),
  "conv": ((3, 3, 16, 6), -1, 8),
  "equinox": ((6, 16, 3, 3), 0, 8),
}
LAYOUT = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)


def by_group(x, layout):
  """An array of a leaf's shape as NumPy [group_size, groups]."""
  shape, channel, g = layout
  axis = len(shape) - 2 if channel == -1 else 1
  x = np.asarray(x).reshape(*shape[:axis], -1, g, *shape[axis + 1 :])
  return np.moveaxis(x, axis + 1, 0).reshape(g, -1)


def scale_shape(layout):
  shape, channel, g = layout
  axis = len(shape) - 2 if channel == -1 else 1
  return tuple(n // g if i == axis else n for i, n in enumerate(shape))


def grouped(method, layout, **kwargs):
  method = dataclasses.replace(method, channel_axis=layout[1])
  return ParamTransform(method, group_size=layout[2], **kwargs)


def discretized(method, layout, w):
  tern = grouped(method, layout)
  params, state = tern.init({"w": w})
  return tern.discretize(params, state)["w"]


@pytest.mark.sample(20)
@pytest.mark.parametrize(
  ("method", "layout"),
  [
    *((method, LAYOUTS["dense"]) for method in METHODS),
    *((method, LAYOUTS["equinox"]) for method in METHODS[1:8:3]),
    *(helpers.long(method, LAYOUTS["equinox"]) for method in METHODS[3::2]),
  ],
)
def test_groups_are_the_columns_of_a_matrix(method, layout):
  """The definition: a group is a channel of [group_size, groups]."""
  w = weights(layout[0])
  got = discretized(method, layout, w)
  columns = jnp.asarray(by_group(w, layout))
  method = dataclasses.replace(method, channel_axis=-1)
  scales, state = method.init(columns)
  expected = method.discretize(method.latent(columns), scales, state)
  assert got.shape == layout[0]
  np.testing.assert_array_equal(by_group(got.codes, layout), expected.codes)
  for ours, theirs in ((got.w_p, expected.w_p), (got.w_n, expected.w_n)):
    if theirs.ndim:
      assert ours.shape == scale_shape(layout)
      theirs = theirs.reshape(ours.shape)
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)


@LAYOUT
def test_each_group_alone_is_ternarized_as_in_the_papers(layout):
  w = weights(layout[0])
  columns = by_group(w, layout).T
  for method, alone in ((TWN(), reference.twn), (AbsMean(), reference.absmean)):
    got = discretized(method, layout, w)
    codes = by_group(got.codes, layout).T
    for i, column in enumerate(columns):
      expected, scale = alone(column)
      np.testing.assert_array_equal(codes[i], expected)
      assert got.w_p.ravel()[i] == pytest.approx(scale, rel=1e-5)
    np.testing.assert_array_equal(got.w_p, got.w_n)


@LAYOUT
def test_magnitudes_of_ttq_are_the_means_of_each_group_s_clusters(layout):
  w = weights(layout[0])
  got = discretized(TTQ(threshold=0.3), layout, w)
  codes = reference.ttq_codes(w, 0.3)
  np.testing.assert_array_equal(got.codes, codes)
  magnitude, codes = (by_group(x, layout) for x in (jnp.abs(w), codes))
  for scale, sign in ((got.w_p, 1), (got.w_n, -1)):
    cluster = codes == sign
    full = cluster.any(0)
    mean = np.sum(magnitude * cluster, 0)[full] / cluster.sum(0)[full]
    np.testing.assert_allclose(np.ravel(scale)[full], mean, rtol=1e-5)
    np.testing.assert_allclose(np.ravel(scale)[~full], magnitude.max())


@pytest.mark.long
@LAYOUT
def test_a_sparsity_is_that_of_the_whole_leaf(layout):
  spread = jnp.broadcast_to(jnp.linspace(0.1, 3.0, layout[0][-1]), layout[0])
  w = weights(layout[0]) * spread
  for method_class in (SCA, TWN, TTQ, TGA):
    method = method_class(sparsity=0.5)
    codes = discretized(method, layout, w).codes
    expected = reference.codes_at_sparsity(w, 0.5)
    np.testing.assert_array_equal(codes, expected)


@pytest.mark.long
@pytest.mark.sample(3)
@pytest.mark.parametrize(
  ("method", "layout", "dtype"),
  [
    *((method, LAYOUTS["equinox"], jnp.float32) for method in METHODS[1::2]),
    *((method, LAYOUTS["conv"], jnp.bfloat16) for method in METHODS[::2]),
    *(
      helpers.long(method, LAYOUTS["equinox"], jnp.float32)
      for method in METHODS[::2]
    ),
    *(
      helpers.long(method, LAYOUTS["conv"], jnp.bfloat16)
      for method in METHODS[1::2]
    ),
  ],
)
def test_forward_is_the_discretization_bit_for_bit(method, layout, dtype):
  tern = grouped(method, layout)
  params, state = tern.init({"w": weights(layout[0], dtype=dtype)})
  after = tern.after_step(params, state)
  shapes = [jax.tree.map(jnp.shape, x) for x in (after, (params, state))]
  assert shapes[0] == shapes[1]
  ternary = tern.discretize(*after)["w"]
  assert ternary.w_p.dtype == ternary.w_n.dtype == dtype
  effective, dense = tern(*after)["w"], ternary.dequantize()
  assert effective.shape == dense.shape == layout[0]
  if not method.soft:
    assert np.asarray(effective).tobytes() == np.asarray(dense).tobytes()


@pytest.mark.long
@pytest.mark.sample(3)
@LAYOUT
def test_packed_saved_and_loaded_bit_for_bit(layout, tmp_path):
  tern = grouped(EC2T(gamma=0.3), layout)
  params, state = tern.init({"w": weights(layout[0])})
  ternary = tern.discretize(params, state)
  dense = np.asarray(ternary["w"].dequantize())
  packed = tern_jax.pack(ternary)
  tern_jax.validate(packed)
  tern_jax.save_packed(tmp_path / "net", packed, method=tern)
  loaded = tern_jax.load_packed(tmp_path / "net", like=params.latent)
  assert loaded["w"].w_p.shape == scale_shape(layout)
  assert np.asarray(tern_jax.unpack(loaded)["w"]).tobytes() == dense.tobytes()
  assert float(metrics.sparsity(loaded)) == pytest.approx(np.mean(dense == 0))
  assert float(metrics.flip_rate(loaded, ternary)) == 0


@pytest.mark.long
def test_a_group_may_be_a_whole_channel_or_one_weight():
  w = weights((48, 10))
  method = TTQ(threshold=0.3, channel_axis=-1)
  scales, state = method.init(w)
  channels = method.discretize(w, scales, state)
  got = discretized(method, ((48, 10), -1, 48), w)
  jax.tree.map(np.testing.assert_array_equal, got, channels)
  got = discretized(AbsMean(), ((48, 10), -1, 1), w)
  np.testing.assert_array_equal(got.dequantize(), w)


def test_bits_per_weight_count_every_scale():
  ternary = discretized(TWN(), LAYOUTS["dense"], weights((48, 10)))
  packed = tern_jax.pack({"w": ternary})
  # Two planes of 60 bytes, and 3 x 10 scales of each sign in float32.
  assert packed["w"].nbytes == 2 * 60 + 2 * 30 * 4
  assert metrics.bits_per_weight(packed) == 8 * 360 / 480


@LAYOUT
def test_gradients_of_ttq_in_closed_form(layout):
  w, g = weights(layout[0]), weights(layout[0], seed=1)
  tern = grouped(TTQ(threshold=0.3), layout)
  params, state = tern.init({"w": w})
  ternary = tern.discretize(params, state)["w"]
  slopes = jax.jit(jax.grad(lambda p: jnp.sum(tern(p, state)["w"] * g)))
  grads = slopes(params)
  codes, by = by_group(ternary.codes, layout), by_group(g, layout)
  for name, sign in (("w_p", 1), ("w_n", -1)):
    total = sign * np.sum(by * (codes == sign), 0)
    np.testing.assert_allclose(
      np.ravel(grads.scales["w"][name]), total, rtol=1e-5, atol=1e-6
    )
  w_p, w_n = np.ravel(ternary.w_p), np.ravel(ternary.w_n)
  slope = np.where(codes > 0, w_p, np.where(codes < 0, w_n, 1))
  np.testing.assert_allclose(
    by_group(grads.latent["w"], layout), slope * by, rtol=1e-5
  )


@pytest.mark.long
@pytest.mark.sample(3)
@pytest.mark.parametrize(
  ("method", "layout"),
  list(
    zip(METHODS[1:5], 2 * [LAYOUTS["dense"], LAYOUTS["equinox"]], strict=True)
  ),
)
def test_stacked_layers_are_divided_one_by_one(method, layout):
  shape = layout[0]
  stack = jnp.stack([weights(shape, seed=i) * 10.0**-i for i in range(2)])
  tern = grouped(method, layout, stacked=("blocks",))
  tree = {"blocks": {"w": stack}, "out": {"w": stack[0]}}
  start = jax.jit(lambda tree: tern.after_step(*tern.init(tree)))
  params, state = start(tree)
  got = helpers.discretize(tern, params, state)
  effective = helpers.forward(tern, params, state)
  dense = got["blocks"]["w"].dequantize()
  if not method.soft:
    np.testing.assert_array_equal(dense, effective["blocks"]["w"])
  for i in range(2):
    alone = discretized(method, layout, stack[i])
    np.testing.assert_array_equal(got["blocks"]["w"].codes[i], alone.codes)
    np.testing.assert_allclose(dense[i], alone.dequantize(), rtol=1e-5)
  if getattr(method, "scaled", True):
    assert got["blocks"]["w"].w_p.shape == (2, *scale_shape(layout))
    assert got["out"]["w"].w_p.shape == scale_shape(layout)


@pytest.mark.usefixtures("standard_promotion")
def test_every_group_fits_its_own_scale():
  rng = np.random.default_rng(0)
  true = np.kron([[1.0, 2.0], [3.0, 0.5]], np.ones((8, 4)))
  true *= rng.integers(-1, 2, true.shape)
  x = jnp.asarray(rng.normal(size=(256, 16)), jnp.float32)
  y = x @ jnp.asarray(true, jnp.float32)
  tern = ParamTransform(TTQ(channel_axis=-1), group_size=8)
  params, state = tern.init({"w": jnp.asarray(true + 1e-3, jnp.float32)})
  tx = optax.partition(
    {"latent": optax.set_to_zero(), "scales": optax.adam(0.1)}, tern_jax.LABELS
  )
  opt_state = tx.init(params)
  params = params.replace(scales=jax.tree.map(jnp.ones_like, params.scales))

  @jax.jit
  def step(params, state, opt_state):
    def loss(params):
      return jnp.mean((x @ tern(params, state)["w"] - y) ** 2)

    updates, opt_state = tx.update(jax.grad(loss)(params), opt_state, params)
    params = optax.apply_updates(params, updates)
    return *tern.after_step(params, state), opt_state

  for _ in range(300):
    params, state, opt_state = step(params, state, opt_state)
  np.testing.assert_allclose(
    tern.discretize(params, state)["w"].dequantize(), true, atol=2e-3
  )


@pytest.mark.long
def test_an_equinox_model_runs_with_a_scale_a_group():
  model = eqx.nn.MLP(4, 4, 8, 1, key=jax.random.key(0))
  tern = grouped(TWN(), ((), 0, 4))
  params, state = tern.init(model)
  assert tern(params, state)(jnp.ones(4)).shape == (4,)
  ternary = tern.discretize(params, state)
  assert [x.weight.w_p.shape for x in ternary.layers] == [(8, 1), (4, 2)]


@pytest.mark.sample(2)
@pytest.mark.parametrize("spec", [P("d"), P(None, "d")], ids=str)
def test_groups_stay_on_their_devices(spec):
  mesh = jax.make_mesh((8,), ("d",), (AxisType.Auto,))
  w = jax.device_put(weights((64, 16)), NamedSharding(mesh, spec))
  tern = grouped(AbsMean(), ((64, 16), -1, 8))
  params, state = tern.init({"w": w})
  pack = jax.jit(lambda p: tern_jax.pack(tern.discretize(p, state)))
  compiled = pack.lower(params).compile()
  assert "all-" not in compiled.as_text()
  packed = compiled(params)["w"]
  assert packed.w_p.shape == (8, 16)
  assert packed.w_p.addressable_shards[0].data.shape in [(1, 16), (8, 2)]
  dense = jax.jit(tern_jax.unpack).lower(packed).compile()
  assert "all-" not in dense.as_text()
  np.testing.assert_array_equal(dense(packed), tern(params, state)["w"])


def test_no_weights_have_no_groups():
  ternary = discretized(TWN(), ((0, 4), -1, 8), jnp.zeros((0, 4)))
  assert ternary.dequantize().shape == ternary.w_p.shape == (0, 4)
  tern_jax.validate(tern_jax.pack(ternary))


def test_repr_and_bad_input():
  tern = ParamTransform(TWN(channel_axis=-1), group_size=64)
  assert repr(tern) == (
    "ParamTransform(method=TWN(channel_axis=-1), where=kernels(),"
    " group_size=64)"
  )
  with pytest.raises(ValueError, match="group_size must lie in"):
    ParamTransform(TWN(channel_axis=-1), group_size=0)
  with pytest.raises(
    ValueError,
    match=r"a/w: group_size=64 does not divide the 48 inputs, axis 0",
  ):
    tern.init({"a": {"w": jnp.ones((48, 64))}})
  with pytest.raises(ValueError, match=r"the 3 inputs, axis 1 of shape \(8, 3"):
    grouped(TWN(), ((), 0, 2)).init({"w": jnp.ones((8, 3, 2, 2))})
  for axis in (None, -2):
    method = TWN(channel_axis=axis)
    with pytest.raises(ValueError, match=r"w: group_size=2 .* got .*TWN\("):
      ParamTransform(method, group_size=2).init({"w": jnp.ones((4, 4))})
  stacked = grouped(TWN(), ((), -1, 2), stacked=("w",))
  with pytest.raises(ValueError, match=r"two or more axes .* got shape \(4,\)"):
    stacked.init({"w": jnp.ones((4, 4))})


# Attention: [in, heads, head_dim] and [heads, head_dim, out].

IN, HEADS, DIM = 16, 4, 8
ATTENTION = {
  **{k: (IN, HEADS, DIM) for k in ("query", "key", "value")},
  "out": (HEADS, DIM, 12),
}
#: The same kernels as matrices [in, out].
MATRIX = {**dict.fromkeys(ATTENTION, (IN, HEADS * DIM)), "out": (32, 12)}
OTHERS = {"up": (12, 20), "Conv_0": (3, 12, 6), "Conv_1": (3, 3, 4, 6)}


def kernels_of(shapes, stack=()):
  return {
    k: {"kernel": weights((*stack, *shape), seed=i)}
    for i, (k, shape) in enumerate(shapes.items())
  }


def as_matrices(tree):
  return {
    k: {"kernel": v["kernel"].reshape(MATRIX.get(k, v["kernel"].shape))}
    for k, v in tree.items()
  }


def ternary_of(method, tree, **kwargs):
  tern = ParamTransform(method, **kwargs)
  made = jax.jit(lambda tree: tern.discretize(*tern.init(tree)))(tree)
  return {k: v["kernel"] for k, v in made.items()}


def test_channels_of_a_whole_transformer_are_its_outputs():
  tree = {"attn": kernels_of(ATTENTION), **kernels_of(OTHERS)}
  tern = ParamTransform(TWN(channel_axis=-1))
  got = helpers.discretize(tern, *helpers.init(tern, tree))
  for name, shape in {**ATTENTION, **OTHERS}.items():
    leaf, w = (x.get("attn", {}) | x for x in (got, tree))
    leaf, w = leaf[name]["kernel"], w[name]["kernel"]
    to_heads = name in ("query", "key", "value")
    outputs = shape[-2:] if to_heads else shape[-1:]
    matrix = np.asarray(w).reshape(-1, np.prod(outputs))
    columns = [reference.twn(column) for column in matrix.T]
    codes = np.stack([c for c, _ in columns], -1)
    np.testing.assert_array_equal(leaf.codes, codes.reshape(shape))
    assert leaf.w_p.shape == (1,) * (len(shape) - len(outputs)) + outputs
    expected = [scale for _, scale in columns]
    np.testing.assert_allclose(np.ravel(leaf.w_p), expected, rtol=1e-5)


@pytest.mark.long
@pytest.mark.sample(3)
@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_attention_is_a_matrix_of_inputs_and_outputs(method):
  method = dataclasses.replace(method, channel_axis=-1)
  tree = kernels_of(ATTENTION)
  got = ternary_of(method, tree)
  expected = ternary_of(method, as_matrices(tree))
  for name, leaf in got.items():
    for ours, theirs in zip(
      *(jax.tree.leaves(x) for x in (leaf, expected[name])), strict=True
    ):
      np.testing.assert_allclose(
        np.ravel(ours), np.ravel(theirs), rtol=1e-5, atol=1e-7
      )


@pytest.mark.sample(2)
@pytest.mark.parametrize("group_size", [1, 4, 8, 16])
def test_groups_of_attention_are_those_of_the_matrix(group_size):
  tree, method = kernels_of(ATTENTION), TWN(channel_axis=-1)
  got = ternary_of(method, tree, group_size=group_size)
  expected = ternary_of(method, as_matrices(tree), group_size=group_size)
  for name, leaf in got.items():
    matrix = expected[name]
    np.testing.assert_array_equal(
      leaf.codes.reshape(matrix.shape), matrix.codes
    )
    dense = leaf.dequantize().reshape(matrix.shape)
    np.testing.assert_allclose(dense, matrix.dequantize(), rtol=1e-6)
  assert got["query"].w_p.shape == (IN // group_size, HEADS, DIM)
  heads = max(group_size // DIM, 1)
  per_head = max(DIM // group_size, 1)
  assert got["out"].w_p.shape == (HEADS // heads, per_head, 12)


@pytest.mark.long
@pytest.mark.parametrize("group_size", [16, None, 4])
def test_attention_is_trained_on_from_what_was_packed(group_size):
  method = TTQ(channel_axis=-1)
  tern = ParamTransform(method, stacked="blocks", group_size=group_size)
  tree = {"blocks": kernels_of(ATTENTION, (2,)), **kernels_of(OTHERS)}
  if group_size:
    del tree["Conv_0"], tree["Conv_1"], tree["up"]
  packed = tern_jax.pack(helpers.discretize(tern, *helpers.init(tern, tree)))
  moment = tern_jax.from_packed(packed, tern)
  again = tern_jax.pack(helpers.discretize(tern, *moment))
  jax.tree.map(np.testing.assert_array_equal, again, packed)
  for i in range(2):
    alone = jax.tree.map(lambda x: x[i], tree["blocks"])  # noqa: B023
    for name, leaf in ternary_of(method, alone, group_size=group_size).items():
      stacked = tern_jax.unpack(packed)["blocks"][name]["kernel"][i]
      np.testing.assert_allclose(stacked, leaf.dequantize(), rtol=1e-5)


@pytest.mark.long
def test_linen_attention_packed_and_grouped():
  model = nn.MultiHeadDotProductAttention(4, qkv_features=32)
  x = weights((2, 5, 16))
  params = jax.jit(model.init)(jax.random.key(0), x)["params"]
  with jax.numpy_rank_promotion("allow"):
    check_attention(params, lambda p: model.apply({"params": p}, x))


def test_nnx_attention_packed_and_grouped():
  model = nnx.MultiHeadAttention(
    4, 16, qkv_features=32, rngs=nnx.Rngs(0), decode=False
  )
  graph, params, rest = nnx.split(model, nnx.Param, ...)
  x = weights((2, 5, 16))
  with jax.numpy_rank_promotion("allow"):
    check_attention(params, lambda p: nnx.merge(graph, p, rest, copy=True)(x))


def check_attention(params, apply):
  tern = ParamTransform(TWN(channel_axis=-1), group_size=8)
  moment = tern.init(params)
  live = jax.jit(lambda *moment: apply(tern(*moment)))(*moment)
  packed = tern_jax.pack(tern.discretize(*moment))
  np.testing.assert_array_equal(
    jax.jit(lambda p: apply(tern_jax.unpack(p)))(packed), live
  )
  scales = {
    path.split("/")[-2]: ternary.w_p.shape
    for path, ternary in metrics.ternary_leaves(packed).items()
  }
  assert scales == {
    **dict.fromkeys(("query", "key", "value"), (2, 4, 8)),
    "out": (4, 1, 16),
  }


def test_groups_that_do_not_fit_attention():
  tree = kernels_of(ATTENTION)
  tern = ParamTransform(TWN(channel_axis=-1), group_size=3)
  with pytest.raises(ValueError, match=r"not divide the 16 inputs, axis 0 of"):
    tern.init(tree)
  # 6 divides the 24 inputs, but neither are they whole heads of 4 nor parts.
  tree = {"out": {"kernel": weights((6, 4, 5))}}
  with pytest.raises(ValueError, match=r"24 inputs, axes 0, 1 .* whole heads"):
    ParamTransform(TWN(channel_axis=-1), group_size=6).init(tree)
  pairs = ParamTransform(TWN(channel_axis=(-2, -1)), group_size=4)
  query = {"query": kernels_of(ATTENTION)["query"]}
  params, state = pairs.init(query)
  leaf = pairs.discretize(params, state)["query"]["kernel"]
  assert leaf.w_p.shape == (4, HEADS, DIM)
  with pytest.raises(ValueError, match="or a tuple of all axes but one; got"):
    pairs.init({"Conv_0": {"kernel": weights((3, 3, 4, 6))}})


def test_channels_that_make_no_sense():
  layers = {k: (6, 8, 8) for k in ("query", "key", "value", "out")}
  tern = ParamTransform(TWN(channel_axis=-1))
  with pytest.raises(ValueError, match=r"key/kernel of .* name it in stacked="):
    tern.init({"blocks": kernels_of(layers)})
  stacked = ParamTransform(TWN(channel_axis=-1), stacked="blocks")
  params, state = stacked.init({"blocks": kernels_of(layers)})
  leaf = stacked.discretize(params, state)["blocks"]["query"]["kernel"]
  assert leaf.w_p.shape == (6, 1, 8)
  literal = ParamTransform(TWN(channel_axis=(-1,)))
  params, state = literal.init({"blocks": kernels_of(layers)})
  leaf = literal.discretize(params, state)["blocks"]["query"]["kernel"]
  assert leaf.w_p.shape == (1, 1, 8)
  for axis in ((-2, -1), 0, (0, 2)):
    with pytest.raises(ValueError, match=r"out/kernel .* one of its inputs"):
      ParamTransform(
        TWN(channel_axis=axis), tern_jax.kernels(include="out")
      ).init(kernels_of(ATTENTION))
  with pytest.raises(
    ValueError, match=r"up/kernel: .* names all axes of shape"
  ):
    ParamTransform(TWN(channel_axis=(-2, -1))).init(kernels_of(OTHERS))
  for axis in ([-1], "out"):
    with pytest.raises(TypeError, match="is no axis: give an int, a tuple"):
      TWN(channel_axis=axis).init(weights((4, 4)))


def test_keys_may_have_fewer_heads():
  tree = kernels_of(ATTENTION | dict.fromkeys(("key", "value"), (IN, 2, DIM)))
  got = ternary_of(TWN(channel_axis=-1), {"attn": tree["query"]} | tree)
  assert got["key"].w_p.shape == (1, 2, DIM)
  assert got["query"].w_p.shape == (1, HEADS, DIM)


def test_convolutions_stay_as_they_are():
  shapes = {"query": (1, 16, 8), "Conv_1": (3, 16, 8), "out": (1, 8, 16)}
  tree = {k: {"kernel": weights(shape)} for k, shape in shapes.items()}
  got = ternary_of(TWN(channel_axis=-1), tree)
  assert {k: x.w_p.shape for k, x in got.items()} == {
    k: (1, 1, shape[-1]) for k, shape in shapes.items()
  }
