"""Targets met to the weight, whatever magnitudes tie."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import tern_jax
from tern_jax import EC2T, SCA, TGA, TTQ, TWN, ParamTransform, across_layers
from tern_jax.targets.quantile import NO_CUT, beyond, codes_beyond, split
from tern_jax.targets.schedules import zeros_at
from tern_jax.training import data_mesh
from tests import helpers

METHODS = [SCA, TWN, TTQ, TGA, functools.partial(TGA, mean=True), EC2T]
IDS = ["SCA", "TWN", "TTQ", "TGA", "TGA mean", "EC2T"]
RNG = np.random.default_rng(0)
SHAPE = (24, 15)
NORMAL = RNG.normal(0, 0.1, SHAPE)
#: Latents of which many tie at any threshold.
TIED = {
  "constant": np.full(SHAPE, 0.3),
  "signs": np.sign(NORMAL) * 0.1,
  "zeros": np.zeros(SHAPE),
  "half zeros": np.where(RNG.random(SHAPE) < 0.6, 0, NORMAL),
  "coarse": np.round(NORMAL * 20) / 20,
  "one side": np.where(NORMAL > 0, NORMAL, -0.01),
  "subnormal": 1e-38 * NORMAL,
}


def codes_of(x, zeros):
  """The first of the smallest are zero; the others have their sign bit."""
  magnitude = np.abs(np.asarray(x, np.float32)).ravel()
  codes = np.where(np.signbit(np.asarray(x, np.float64)).ravel(), -1, 1)
  codes[np.argsort(magnitude, kind="stable")[:zeros]] = 0
  return codes.reshape(np.shape(x))


split_at = jax.jit(split)
coded = jax.jit(lambda x, found: codes_beyond(x, **found))


@settings(deadline=None, max_examples=60, derandomize=True, database=None)
@given(
  hnp.arrays(
    np.float32,
    st.sampled_from([(1,), (7,), (3, 5), (2, 3, 4), (17, 19)]),
    elements=st.integers(-4, 4).map(lambda i: i / 8),
  ),
  st.floats(0, 1),
)
def test_split_is_a_stable_sort(x, share):
  zeros = round(share * x.size)
  found = split_at(x, zeros)
  np.testing.assert_array_equal(coded(x, found), codes_of(x, zeros))


@pytest.mark.sample(2)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
def test_every_number_of_zeros_in_every_dtype(dtype):
  with jax.enable_x64(dtype == "float64"):
    counts = jnp.arange(0, 361, 24)

    @jax.jit
    @jax.vmap
    def counted(zeros, x):
      codes = codes_beyond(x, **split(x, zeros))
      return codes, jnp.sum(codes == 0)

    for name, x in TIED.items():
      w = jnp.asarray(x).astype(dtype)
      codes, zeros = counted(counts, jnp.broadcast_to(w, (16, *SHAPE)))
      np.testing.assert_array_equal(zeros, counts)
      # Some devices take what is subnormal in float32 for 0.
      if (name, dtype) != ("subnormal", "float64"):
        np.testing.assert_array_equal(codes[7], codes_of(w, 168))


def test_without_ties_nothing_is_cut():
  found = split_at(NORMAL.astype(np.float32), 100)
  assert int(found["cut"]) == NO_CUT
  # Within the tolerance neither.
  loose = split(jnp.asarray([1.0, 2.0, 2.0, 3.0]), 2, tolerance=0.25)
  assert int(loose["cut"]) == NO_CUT
  assert int(split(jnp.zeros(()), 0)["cut"]) == 0
  assert int(split(jnp.zeros((0, 3)), 0)["cut"]) == NO_CUT


def test_the_sign_of_a_zero_is_that_of_its_bit():
  w = jnp.array([0.0, -0.0, 0.0, -1.0])
  assert codes_beyond(w, **split(w, 1)).tolist() == [0, -1, 1, -1]
  assert beyond(w, jnp.array(0.0)).tolist() == [False, False, False, True]


def test_a_number_is_rounded_in_all_digits():
  n = 100_000_001
  for share in (0.8, 0.3, 0.999):
    assert int(zeros_at(share, 0, n)) == round(share * n)
    risen = tern_jax.ramp(share, 100)
    assert int(zeros_at(risen, 50, n)) == round(share * n)
    assert int(zeros_at(risen, 49, n)) < round(share * n)
  with pytest.raises(ValueError, match="3,000,000,000 weights at once"):
    jax.eval_shape(
      lambda *x: tern_jax.targets.quantile.search(x, 0),
      *3 * [jax.ShapeDtypeStruct((10**9,), jnp.bfloat16)],
    )


@pytest.mark.sample(9)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("axis", [None, -1])
@pytest.mark.parametrize("method_class", METHODS, ids=IDS)
def test_methods_meet_it_whatever_ties(method_class, axis, dtype):
  """At the start, after a look, after `refresh`; gradients stay finite."""

  def method_of(share):
    return method_class(sparsity=share, every=1, channel_axis=axis)

  @jax.jit
  @functools.partial(jax.vmap, in_axes=(0, None))
  @functools.partial(jax.vmap, in_axes=(None, 0))
  def start(share, w):
    method = method_of(share)
    return method.latent(w), *method.init(w)

  def each(fn):
    return jax.jit(jax.vmap(jax.vmap(fn, (None, 0, 0, 0)), (0, None, 0, 0)))

  @each
  def look(share, w, scales, state):
    return method_of(share).after_step(w, scales, state)

  @each
  def fresh(share, w, scales, state):
    return method_of(share).refresh(w, scales, state)

  @each
  def seen(share, w, scales, state):
    method = method_of(share)

    def total(w, scales):
      return jnp.sum(method(w, scales, state).astype(jnp.float32))

    grads = jax.grad(total, (0, 1))(w, scales)
    rest = jax.tree.leaves((grads, scales, state))
    finite = jnp.all(jnp.stack([jnp.all(jnp.isfinite(x)) for x in rest]))
    return jnp.sum(method.discretize(w, scales, state).codes == 0), finite

  shares = jnp.array([0.0, 0.1, 0.5, 0.8, 0.999])
  w = jnp.stack([jnp.asarray(x).astype(dtype) for x in TIED.values()])
  latents, *moment = start(shares, w)
  latents = latents[0]
  wanted = np.round(np.asarray(shares) * w[0].size)[:, None]
  for change, factor in ((None, 1), (look, -1), (fresh, 0.75)):
    moved = jnp.asarray(np.asarray(latents) * np.asarray(factor, w.dtype))
    if change is not None:
      moment = change(shares, moved, *moment)
    zeros, finite = seen(shares, moved, *moment)
    np.testing.assert_array_equal(zeros, np.broadcast_to(wanted, zeros.shape))
    assert np.all(finite)


@pytest.mark.long
@pytest.mark.parametrize(
  "method_class", [TWN, functools.partial(TGA, mean=True), helpers.long(EC2T)]
)
def test_the_dtype_of_the_state_stays_in_float64(method_class):
  with jax.enable_x64(True):
    method = method_class(sparsity=0.5, every=1)
    w = jnp.asarray(TIED["coarse"])
    moment = helpers.init(method, w)
    w = method.latent(w)
    for change in (helpers.after_step, helpers.refresh):
      then, moment = moment, change(method, w, *moment)
      assert jax.tree.map(jnp.result_type, then) == jax.tree.map(
        jnp.result_type, moment
      )
      codes = helpers.discretize(method, w, *moment).codes
      assert int(jnp.sum(codes == 0)) == w.size / 2


@pytest.mark.long
@pytest.mark.parametrize("method_class", [SCA, EC2T])
def test_groups_stacks_and_layers(method_class):
  tree = {
    "a": {"kernel": jnp.full((8, 6), 0.5)},
    "s": {"kernel": jnp.ones((3, 8, 6))},
  }

  def zeros(target, **kwargs):
    method = method_class(sparsity=target, channel_axis=-1)
    tern = ParamTransform(method, stacked=("s",), **kwargs)
    params, state = helpers.init(tern, tree)
    params = params.replace(latent=jax.tree.map(jnp.abs, tree))
    got = tern.discretize(*helpers.refresh(tern, params, state))
    codes = got["a"]["kernel"].codes[None], got["s"]["kernel"].codes
    return [int(n) for c in codes for n in jnp.sum(c == 0, (1, 2))]

  assert zeros(0.8, group_size=4) == 4 * [38]
  assert zeros(tern_jax.per_layer({"a": 0.25, "*": 0.5})) == [12, 24, 24, 24]
  # In the order of the tree: 120 of 192, the smaller ones first.
  assert zeros(across_layers(0.625)) == [48, 48, 24, 0]


def test_across_layers_counts_ties_of_all():
  tree = {k: {"kernel": jnp.ones((5, 7))} for k in ("b", "a", "c")}
  tree["z"] = {"kernel": jnp.zeros((2, 3))}
  tern = ParamTransform(TTQ(sparsity=across_layers(0.6)))
  got = tern.discretize(*helpers.init(tern, tree))
  zeros = {k: int(jnp.sum(v["kernel"].codes == 0)) for k, v in got.items()}
  assert zeros == {"a": 35, "b": 26, "c": 0, "z": 6}


@pytest.mark.sample(2)
@pytest.mark.parametrize(
  ("method_class", "kind"),
  [
    (TWN, "auto"),
    (functools.partial(TGA, mean=True), "explicit"),
    helpers.long(TWN, "explicit"),
    helpers.long(EC2T, "explicit"),
    helpers.long(EC2T, "auto"),
  ],
)
def test_ties_of_sharded_weights(method_class, kind):
  axis = {"auto": AxisType.Auto, "explicit": AxisType.Explicit}[kind]
  mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(axis, axis))
  # What JAX computes TGA's scales of takes no explicitly sharded ones.
  channels = None if isinstance(method_class, functools.partial) else -1
  method = method_class(sparsity=0.7, every=1, channel_axis=channels)
  w = jnp.asarray(np.round(np.resize(NORMAL, (16, 8)) * 20) / 20, jnp.float32)

  @jax.jit
  def run(w):
    moment = method.after_step(w, *method.init(w))
    return method.discretize(w, *moment).codes, method(w, *moment)

  want, _ = run(w)
  assert int(jnp.sum(want == 0)) == round(0.7 * w.size)
  with jax.set_mesh(mesh):
    spread = jax.device_put(w, NamedSharding(mesh, P("x", "y")))
    codes, dense = run(spread)
  assert codes.sharding.spec == dense.sharding.spec == P("x", "y")
  np.testing.assert_array_equal(codes, want)


@pytest.mark.long
def test_a_step_in_pmap_s_place():
  method = SCA(sparsity=0.5, every=1)
  w = jnp.ones((6, 5))
  scales, state = method.init(w)
  mesh = data_mesh()

  @jax.jit
  @functools.partial(
    jax.shard_map, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False
  )
  def step(w, scales, state):
    return method.discretize(w, *method.after_step(w, scales, state)).codes

  np.testing.assert_array_equal(step(w, scales, state), codes_of(w, 15))


@pytest.mark.long
@pytest.mark.parametrize("method_class", [TGA, helpers.long(EC2T)])
def test_a_state_from_before_there_were_cuts(method_class):
  method = method_class(sparsity=0.5, every=1)
  w = jnp.asarray(TIED["constant"], jnp.float32)
  scales, state = method.init(w)
  before = {k: x for k, x in state.items() if not k.startswith("cut")}
  # The ties are one again, as they were.
  assert not method.discretize(w, scales, before).codes.any()
  scales, after = helpers.after_step(method, w, scales, before)
  assert after.keys() == before.keys()
  _, fresh = helpers.refresh(method, w, scales, after)
  assert fresh.keys() == state.keys()
  codes = method.discretize(w, scales, fresh).codes
  assert int(jnp.sum(codes == 0)) == w.size / 2
