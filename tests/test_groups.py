"""One scale a group: consecutive inputs of one output channel."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
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


@pytest.mark.sample(5)
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


@LAYOUT
def test_a_sparsity_is_that_of_the_whole_leaf(layout):
  spread = jnp.broadcast_to(jnp.linspace(0.1, 3.0, layout[0][-1]), layout[0])
  w = weights(layout[0]) * spread
  for method_class in (SCA, TWN, TTQ, TGA):
    method = method_class(sparsity=0.5)
    codes = discretized(method, layout, w).codes
    expected = reference.codes_at_sparsity(w, 0.5)
    np.testing.assert_array_equal(codes, expected)


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


def test_an_equinox_model_runs_with_a_scale_a_group():
  model = eqx.nn.MLP(4, 4, 8, 1, key=jax.random.key(0))
  tern = grouped(TWN(), ((), 0, 4))
  params, state = tern.init(model)
  assert tern(params, state)(jnp.ones(4)).shape == (4,)
  ternary = tern.discretize(params, state)
  assert [x.weight.w_p.shape for x in ternary.layers] == [(8, 1), (4, 2)]


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
