"""Packed weights go back into training, with every method."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import tern_jax
from tern_jax import (
  EC2T,
  SCA,
  TGA,
  TTQ,
  TWN,
  AbsMean,
  ParamTransform,
  Ternary,
  from_packed,
  kernels,
  training,
)
from tern_jax.storage.packed import to_ternary
from tern_jax.targets.quantile import magnitude_threshold
from tests import helpers, reference
from tests.helpers import METHODS, Halves, weights

STEPS = 12
#: Whose magnitudes are kept, bit for bit, and not derived from latents.
STORED = (SCA, TWN, TTQ, EC2T)
GRANULARITIES = {
  "channel": {},
  "stacked": {"stacked": ("w",)},
  "stacked groups": {"stacked": ("w",), "group_size": 8},
}


def rounding(dtype):
  return 1e-6 if dtype == jnp.float32 else 2.0**-7


def trained(tern, dtype=jnp.float32, shape=(48, 32), bias=0.0):
  """Latents after some steps of a regression, and all that made them."""
  rng = np.random.default_rng(1)
  x = jnp.asarray(rng.normal(size=(64, *shape[:-1])), dtype)
  y = jnp.asarray(rng.normal(size=(64, shape[-1])), dtype)
  axes = "bi,io->bo" if len(shape) == 2 else "bli,lio->bo"

  def loss(tree, model_state, batch, key):
    del key
    x, y = batch
    error = jnp.einsum(axes, x, tree["w"]) + tree["bias"][None] - y
    return jnp.mean(jnp.square(error)), (model_state, {})

  tree = {"w": weights(shape, dtype), "bias": jnp.full(shape[-1], bias, dtype)}
  tx = optax.sgd(1e-3, momentum=0.5)
  state = training.init_state(tree, tx, tern)
  step = jax.jit(training.make_step(loss, tx, tern))
  for _ in range(STEPS):
    state, _ = step(state, (x, y))
  params, kept = tern.refresh(state.params, state.tern_state)
  state = dataclasses.replace(state, params=params, tern_state=kept)
  return state, step, (x, y)


def check_kept(tern, packed, params, state, dtype=jnp.float32):
  """The codes and magnitudes are those of the file, now and later."""
  file = to_ternary(packed["w"])
  dense = np.asarray(file.dequantize(), np.float64)
  got = tern.discretize(params, state)["w"]
  np.testing.assert_array_equal(got.codes, file.codes)
  assert got.w_p.shape == file.w_p.shape
  if isinstance(tern.method, STORED):
    np.testing.assert_array_equal(got.w_p, file.w_p)
    np.testing.assert_array_equal(got.w_n, file.w_n)
  later = state
  if not callable(getattr(tern.method, "sparsity", None)):
    # Beyond two looks at the latents.
    _, later = jax.lax.fori_loop(
      0, 23, lambda _, x: tern.after_step(*x), (params, state)
    )
  for moment in ((params, state), (params, later), tern.refresh(params, later)):
    kept = np.asarray(tern.discretize(*moment)["w"].dequantize(), np.float64)
    np.testing.assert_allclose(kept, dense, rtol=rounding(dtype), atol=0)


#: Those that another one is but for a number or a gradient.
TWINS = (
  SCA(sparsity=0.7),
  TWN(),
  TTQ(),
  EC2T(),
  TGA(),
  TGA(surrogate=0.5),
)


@pytest.mark.sample(3)
@pytest.mark.parametrize(
  "method", [m for m in METHODS if m not in TWINS], ids=repr
)
def test_training_goes_on_where_the_file_ended(method):
  tern = ParamTransform(method)
  trained_state, step, batch = trained(tern, bias=0.5)
  before = trained_state.params, trained_state.tern_state
  packed = tern_jax.pack(tern.discretize(*before))
  params, state = from_packed(packed, tern, step=STEPS)
  assert jax.tree.structure((params, state)) == jax.tree.structure(before)
  for ours, theirs in zip(
    jax.tree.leaves((params, state)), jax.tree.leaves(before), strict=True
  ):
    assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
  np.testing.assert_array_equal(params.latent["bias"], packed["bias"])
  check_kept(tern, packed, params, state)

  x, y = batch
  dense = tern_jax.unpack(packed)
  loss = jnp.mean(jnp.square(x @ dense["w"] + dense["bias"][None] - y))
  resumed = dataclasses.replace(trained_state, params=params, tern_state=state)
  after, metrics = step(resumed, batch)
  rel = 0.05 if method.soft else 1e-5
  assert float(metrics["loss"]) == pytest.approx(float(loss), rel=rel)
  assert all(
    bool(jnp.isfinite(x).all())
    for x in jax.tree.leaves((after.params, after.tern_state))
  )
  assert jnp.any(after.params.latent["w"] != params.latent["w"])


METHODS_OF_FILES = [
  SCA(alpha=1.5),
  SCA(sparsity=0.4),
  TWN(sparsity=0.6),
  TWN(),
  TTQ(threshold=0.3),
  TTQ(sparsity=0.6),
  EC2T(sparsity=0.6),
  EC2T(gamma=0.3),
  TGA(),
  TGA(sparsity=0.6),
  AbsMean(),
]


@pytest.mark.long
@pytest.mark.sample(3)
@pytest.mark.parametrize(
  ("method", "layout"),
  [
    *((method, "channel") for method in METHODS_OF_FILES[1::2]),
    *((method, "stacked groups") for method in METHODS_OF_FILES[::3]),
    *(helpers.long(method, "channel") for method in METHODS_OF_FILES[::2]),
    *(helpers.long(method, "stacked") for method in METHODS_OF_FILES[1::4]),
    *(
      helpers.long(method, "stacked groups")
      for i, method in enumerate(METHODS_OF_FILES)
      if i % 3
    ),
  ],
)
def test_every_granularity(method, layout):
  layout = GRANULARITIES[layout]
  # Halves of the cases, so that each method meets both dtypes.
  dtype = jnp.bfloat16 if layout.get("group_size") else jnp.float32
  # Of shapes that other tests have, operations are compiled already.
  shape = (2, 16, 24) if "stacked" in layout else (48, 32)
  if "group_size" in layout or "stacked" not in layout:
    method = dataclasses.replace(method, channel_axis=-1)
  tern = ParamTransform(method, **layout)
  before = tern.refresh(*tern.init({"w": weights(shape, dtype) + 0.05}))
  packed = tern_jax.pack(tern.discretize(*before))
  params, state = from_packed(packed, tern)
  assert params.latent["w"].dtype == dtype
  assert jax.tree.map(jnp.shape, (params, state)) == jax.tree.map(
    jnp.shape, before
  )
  check_kept(tern, packed, params, state, dtype)


def pack_codes(codes, w_p, w_n=None):
  w_p = jnp.asarray(w_p, jnp.float32)
  w_n = w_p if w_n is None else jnp.asarray(w_n, jnp.float32)
  return tern_jax.pack({"w": Ternary(jnp.asarray(codes, jnp.int8), w_p, w_n)})


@pytest.mark.long
@pytest.mark.parametrize(("magnitude", "zeros"), [(3e-3, 0.02), (700.0, 0.99)])
def test_weights_of_any_origin(magnitude, zeros):
  rng = np.random.default_rng(0)
  codes = rng.choice([0, 1, -1], (32, 16), p=[zeros, 1 - zeros, 0])
  codes *= rng.choice([1, -1], codes.shape)
  codes[:3, 0] = 0, 1, -1
  share = float(np.mean(codes == 0))
  packed = pack_codes(codes, magnitude)
  for method in (
    SCA(alpha=0.1),
    SCA(sparsity=share),
    TWN(),
    TWN(sparsity=share),
    TTQ(),
    TTQ(sparsity=share),
    AbsMean(),
    EC2T(),
    EC2T(sparsity=share),
    TGA(),
    TGA(sparsity=share),
  ):
    tern = ParamTransform(method)
    params, state = from_packed(packed, tern)
    after = tern.refresh(*tern.after_step(params, state))
    for moment in ((params, state), after):
      got = tern.discretize(*moment)["w"]
      np.testing.assert_array_equal(got.codes, codes)
      assert float(got.w_p) == pytest.approx(magnitude, rel=1e-6)
      assert float(got.w_n) == pytest.approx(magnitude, rel=1e-6)


@pytest.mark.long
@pytest.mark.parametrize("method", [TTQ(), EC2T()], ids=repr)
def test_two_magnitudes(method):
  codes = np.array([[1, 0, -1, 1], [0, 0, -1, -1]])
  for w_p, w_n in ((0.1, 0.15), ([[0.1, 0.2, 0.3, 0.4]], [[0.2] * 4])):
    axis = None if isinstance(w_p, float) else -1
    tern = ParamTransform(dataclasses.replace(method, channel_axis=axis))
    packed = pack_codes(codes, w_p, w_n)
    check_kept(tern, packed, *from_packed(packed, tern))


@pytest.mark.long
def test_where_latents_lie():
  codes = np.zeros((8, 8), np.int8)
  codes[0], codes[1] = 1, -1
  packed = pack_codes(codes, 0.5)

  def latents(method):
    params, state = from_packed(packed, method)
    return params.latent["w"], params.scales["w"], state["w"]

  w, scales, _ = latents(SCA(alpha=0.1))
  np.testing.assert_allclose(np.tanh(w), 0.99 * codes, rtol=1e-6)
  assert float(scales["a"]) == 0.5
  w, *_ = latents(SCA(alpha=1.999))
  # The barrier is at .99975.
  np.testing.assert_allclose(np.tanh(w), 0.999875 * codes, rtol=1e-6)
  w, _, state = latents(SCA(sparsity=0.75, sigma=0.1))
  # A quarter of Theta has its root mean square.
  np.testing.assert_allclose(10 * w, 0.2 * codes, rtol=1e-6)
  assert float(state["threshold"]) == pytest.approx(0.01)
  w, _, state = latents(SCA(sparsity=0.75, sigma=None, gain=3.0))
  np.testing.assert_allclose(np.tanh(3 * w), 0.99 * codes, rtol=1e-6)
  w, _, state = latents(TWN(threshold=0.8))
  np.testing.assert_array_equal(w, 0.5 * codes)
  assert float(state["threshold"]) == pytest.approx(0.8 * 0.25 * 0.5)
  w, _, state = latents(TWN(sparsity=0.75))
  np.testing.assert_array_equal(w, 0.5 * codes)
  assert float(state["threshold"]) == 0.25
  w, _, state = latents(TTQ(threshold=0.3))
  np.testing.assert_array_equal(w, 0.5 * codes)
  assert float(state["threshold"]) == pytest.approx(0.15)
  w, _, state = latents(TTQ(sparsity=0.75))
  np.testing.assert_array_equal(w, 0.5 * codes)
  assert float(state["threshold"]) == 0.25
  w, *_ = latents(AbsMean())
  np.testing.assert_array_equal(w, 2.0 * codes)
  w, _, state = latents(EC2T(sparsity=0.75))
  np.testing.assert_array_equal(w, 0.5 * codes)
  assert float(state["t_p"]) == float(state["t_n"]) == 0.25
  w, scales, _ = latents(EC2T(gamma=0.0))
  np.testing.assert_array_equal(w, 0.5 * codes)
  w, scales, _ = latents(TGA())
  # With |w| = 2 sigma and Delta = sigma, S = sigma lambda(1); w is rounded to
  # seven digits, and Delta makes up for it.
  sigma = 0.5 / reference.inverse_mills(1.0)
  np.testing.assert_allclose(w, 2 * sigma * codes, rtol=2.0**-7)
  assert float(w[0, 0]) * 2**6 % 1 == 0
  assert float(scales["delta"]) == pytest.approx(sigma, rel=2.0**-6)
  assert reference.tga(w, scales["delta"])[1] == pytest.approx(0.5, rel=2e-7)


def test_tga_around_a_mean_cannot_continue():
  # Ternary weights do not tell the mean of the latents they came from.
  packed = pack_codes([[1, 0], [0, -1]], 0.5)
  with pytest.raises(ValueError, match=r"w: TGA\(mean=True\) cannot continue"):
    from_packed(packed, TGA(mean=True))


@pytest.mark.long
def test_unequal_centroids_of_ec2t_bring_latents_closer():
  codes = np.array([[1] * 2 + [-1] * 6 + [0] * 2] * 2)
  packed = pack_codes(codes, 0.1, 0.35)
  method = EC2T()
  params, state = from_packed(packed, method)
  share = float(params.latent["w"][0, 0]) / 0.1
  assert 0.6 < share < 1
  # Where the floor of the centroids is just below the smaller one.
  assert float(state["w"]["floor"]) == pytest.approx(0.099, rel=1e-5)
  check_kept(ParamTransform(method), packed, params, state)
  with pytest.raises(ValueError, match=r"w: EC2T\(\) keeps .* too unequal"):
    from_packed(pack_codes(codes, 0.1, 0.9), method)


@pytest.mark.long
@pytest.mark.sample(3)
@pytest.mark.parametrize(
  "method", [SCA(alpha=0.1), TWN(), TTQ(), EC2T(), TGA(), AbsMean()], ids=repr
)
def test_a_channel_of_zeros_without_a_magnitude(method):
  codes = np.array([[1, 0, 0], [-1, 0, 1]] * 4)
  packed = pack_codes(codes, [[0.5, 0.0, 2.0]])
  tern = ParamTransform(dataclasses.replace(method, channel_axis=-1))
  params, state = from_packed(packed, tern)

  @jax.jit
  def slopes(params):
    def loss(params):
      return jnp.sum(jnp.sin(tern(params, state)["w"] + jnp.arange(3.0)[None]))

    return tern.discretize(params, state)["w"], jax.grad(loss)(params)

  got, grads = slopes(params)
  np.testing.assert_allclose(
    got.dequantize(), tern_jax.unpack(packed)["w"], rtol=1e-6
  )
  assert all(bool(jnp.isfinite(g).all()) for g in jax.tree.leaves(grads))


@pytest.mark.long
def test_scales_may_be_finer_than_the_file_s():
  codes = np.asarray(np.sign(weights((16, 4)))) * np.tri(16, 4)
  packed = pack_codes(codes, 0.3)
  for method in (TWN(channel_axis=-1), TTQ(channel_axis=-1)):
    for g, shape in ((None, (1, 4)), (4, (4, 4))):
      tern = ParamTransform(method, group_size=g)
      params, state = from_packed(packed, tern)
      got = tern.discretize(params, state)["w"]
      assert got.w_p.shape == shape
      np.testing.assert_array_equal(
        got.dequantize(), tern_jax.unpack(packed)["w"]
      )
  fine = pack_codes(codes, [[0.3, 0.4, 0.5, 0.6]])
  with pytest.raises(
    ValueError, match=r"w: scales of shape \(1, 4\) do not fit .* shape \(\)"
  ):
    from_packed(fine, TWN())


def test_from_a_saved_file_of_a_model_in_parts(tmp_path):
  where = kernels(exclude="head")
  tern = ParamTransform(SCA(sparsity=tern_jax.ramp(0.75, 100)), where)
  tree = {
    "body": {"kernel": weights(), "bias": jnp.ones(32)},
    "head": {"kernel": weights((32, 4))},
  }
  params, state = tern.init(tree)
  count = {"count": jnp.array(100, jnp.int32)}
  state = {"body/kernel": {**state["body/kernel"], **count}}
  packed = tern_jax.pack(tern.discretize(*tern.refresh(params, state)))
  tern_jax.save_packed(tmp_path / "net", packed, method=tern)
  loaded = tern_jax.load_packed(tmp_path / "net")
  params, state = from_packed(loaded, tern, step=100)
  assert state["body/kernel"]["count"] == 100
  again = tern_jax.pack(tern.discretize(params, state))
  jax.tree.map(np.testing.assert_array_equal, again, packed)
  assert jax.tree.structure(again) == jax.tree.structure(packed)


@pytest.mark.long
def test_a_file_can_be_pruned_further(standard_promotion):
  tern = ParamTransform(SCA(sparsity=0.5))
  packed = tern_jax.pack(tern.discretize(*tern.init({"w": weights()})))
  target = optax.linear_schedule(0.5, 0.8, 100, transition_begin=50)
  tern = ParamTransform(SCA(sparsity=target))
  params, state = from_packed(packed, tern)
  tx = optax.adam(1e-2)
  true = weights(seed=2)

  @jax.jit
  def step(carry, key):
    params, state, opt_state = carry
    x = jax.random.normal(key, (16, 48))

    def loss(params):
      return jnp.mean(jnp.square(x @ (tern(params, state)["w"] - true)))

    updates, opt_state = tx.update(jax.grad(loss)(params), opt_state, params)
    params = optax.apply_updates(params, updates)
    params, state = tern.after_step(params, state)
    zeros = jnp.mean(tern.discretize(params, state)["w"].codes == 0)
    return (params, state, opt_state), zeros

  start = params, state, tx.init(params)
  keys = jax.random.split(jax.random.key(0), 150)
  (params, state, _), zeros = jax.lax.scan(step, start, keys)
  # Latents start at two magnitudes only, and no target may fall on all of one.
  # It is met at each look, every tenth step; in between they move on.
  looks = np.arange(10, 151, 10)
  wanted = [float(target(int(i))) for i in looks]
  np.testing.assert_allclose(zeros[looks - 1], wanted, atol=0.002)


def test_equal_latents_keep_their_threshold():
  w = jnp.asarray([0.0] * 6 + [0.5, -0.5])
  for guess in (None, jnp.array(0.25)):
    found = float(magnitude_threshold(w, 0.75, guess))
    assert 0.1 < found < 0.4
  assert float(magnitude_threshold(w, 0.5)) == 0.0


@pytest.mark.long
def test_the_file_must_be_what_the_method_can_make():
  codes = np.array([[1, -1, 0, 1], [0, 1, -1, 1]])
  packed = pack_codes(codes, 0.5)
  two = pack_codes(codes, 0.5, 0.25)
  for method in (SCA(alpha=0.1), TWN(), AbsMean(), TGA()):
    with pytest.raises(
      ValueError, match=r"^w: .* one magnitude .* 0.5 and 0.2"
    ):
      from_packed(two, method)
  with pytest.raises(ValueError, match=r"magnitude 1, but .* 0.5"):
    from_packed(packed, SCA(alpha=0.1, scaled=False))
  for method_class in (SCA, TWN, TTQ, EC2T, TGA):
    with pytest.raises(ValueError, match=r"w: 2 of 8 .* give sparsity=0.25"):
      from_packed(packed, method_class(sparsity=0.5))
  ramp = SCA(sparsity=tern_jax.ramp(0.25, 100))
  with pytest.raises(ValueError, match=r"but 0 are asked .* at step 0:"):
    from_packed(packed, ramp)
  from_packed(packed, ramp, step=100)
  with pytest.raises(ValueError, match=r"w: TWN\(threshold=1.5\) has no"):
    from_packed(packed, TWN(threshold=1.5))
  with pytest.raises(ValueError, match=r"w: Halves\(\) .* no `invert`"):
    from_packed(packed, Halves())
  with pytest.raises(ValueError, match=r"w: magnitudes must be .* -0.5"):
    from_packed(pack_codes(codes, -0.5), TTQ())
  nan = jnp.array(np.nan, jnp.float32)
  broken = dataclasses.replace(packed["w"], w_p=nan, w_n=nan)
  with pytest.raises(ValueError, match="w holds 6 NaN"):
    from_packed({"w": broken}, TTQ())
  tern = ParamTransform(TWN(channel_axis=-1), group_size=3)
  with pytest.raises(ValueError, match="w: group_size=3 does not divide the 2"):
    from_packed(packed, tern)


def test_the_packed_leaves_must_be_the_selected_ones():
  packed = pack_codes([[1, 0], [0, 1]], 0.5)
  tree = {"a": packed, "b": {"w": jnp.ones((2, 2))}}
  with pytest.raises(ValueError, match=r"b/w is dense, but ternary by kernels"):
    from_packed(tree, TTQ())
  tern = ParamTransform(TTQ(), kernels(include="b"))
  with pytest.raises(ValueError, match=r"a/w is ternary, but dense by"):
    from_packed(tree, tern)
  with pytest.raises(ValueError, match="pattern 'c' matches no leaf"):
    from_packed(tree, ParamTransform(TTQ(), kernels(exclude="c")))
  with pytest.raises(ValueError, match="selects no leaf"):
    from_packed({}, TTQ())
  params, _ = from_packed(tree, ParamTransform(TTQ(), kernels(exclude="b")))
  np.testing.assert_array_equal(params.latent["b"]["w"], 1)
