"""EC2T against a literal three-way argmin in NumPy float64."""

import dataclasses
import itertools
import math
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import tern_jax
from tern_jax import training
from tern_jax.methods.ec2t import EC2T, ec2t_zero
from tern_jax.methods.ec2t_math import (
  ec2t_assign,
  ec2t_lambda_max,
  ec2t_thresholds,
)
from tests import reference
from tests.helpers import DTYPES, f64, weights

METHODS = [
  EC2T(),
  EC2T(gamma=0.6, s=0.4, largest=10_000),
  EC2T(gamma=0.0),
  EC2T(gamma=0.3, min_p_0=0.0, frozen=True),
]
# Those that tests/test_contract.py does not have.
MORE_METHODS = METHODS[2:]


@pytest.mark.parametrize("min_p_0", [0.5, 0.0])
@pytest.mark.parametrize("scale", [0.02, 0.1, 0.25])
@pytest.mark.parametrize("dtype", DTYPES, ids=["f32", "bf16"])
def test_assignment_is_the_literal_argmin(dtype, scale, min_p_0):
  w = weights((64, 64), dtype)
  w_p, w_n = jnp.asarray(scale, dtype), jnp.asarray(1.3 * scale, dtype)
  wide = (f64(w), f64(w_p), f64(w_n))
  found = set()
  for lam in (0.0, 1e-4, 1e-3, 5e-3, 1e-2, 3e-2, 0.3):
    codes = ec2t_assign(w, w_p, w_n, lam, min_p_0)
    assert codes.dtype == jnp.int8
    expected = reference.ec2t_codes(*wide, lam, min_p_0)
    np.testing.assert_array_equal(codes, expected)
    found.add(tuple(np.unique(expected).tolist()))
  assert (-1, 0, 1) in found
  # Unless P_0 is floored, few zeros make zeros dear, until none is left.
  assert ((-1, 1) in found or (1,) in found) == (min_p_0 == 0 and scale < 0.1)


@pytest.mark.parametrize("min_p_0", [0.5, 0.1])
@pytest.mark.parametrize("scale", [0.1, 0.2])
def test_lambda_max_is_the_formula_and_empties_one_cluster(scale, min_p_0):
  w = weights((64, 64))
  w_p, w_n = jnp.array(scale), jnp.array(1.1 * scale)
  lam = ec2t_lambda_max(w, w_p, w_n, min_p_0)
  expected = reference.ec2t_lambda_max(f64(w), f64(w_p), f64(w_n), min_p_0)
  assert float(lam) == pytest.approx(expected, rel=1e-5)

  def clusters(share):
    codes = np.asarray(ec2t_assign(w, w_p, w_n, share * lam, min_p_0))
    return sorted(set(codes.ravel().tolist()))

  assert clusters(0.999) == [-1, 0, 1]
  assert len(clusters(1.001)) == 2
  assert 0 in clusters(1.001)


def test_lambda_max_leaves_out_what_no_lambda_empties():
  c = jnp.array(0.5)
  # P of (+, 0, -) is (1/2, 1/3, 1/6): only - is rarer than 0.
  w = jnp.array([1.0, 1.0, 1.0, 0.1, 0.1, -1.0])
  assert float(ec2t_lambda_max(w, c, c, 0.0)) == pytest.approx(0.75, rel=1e-5)
  assert float(ec2t_lambda_max(w[:5], c, c, 0.0)) == 0


def test_thresholds_are_linear_from_half_the_centroid_to_the_largest_weight():
  w = jnp.concatenate([weights((4096,)), -weights((4096,))])
  c, top = jnp.array(0.12), float(jnp.max(w))
  lam = ec2t_lambda_max(w, c, c)
  for gamma in (0.0, 0.25, 0.75, 1.0):
    t_p, t_n = ec2t_thresholds(w, c, c, gamma * lam)
    expected = 0.06 + gamma * (top - 0.06)
    assert float(t_p) == pytest.approx(expected, rel=1e-5)
    assert float(t_n) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
  ("axis", "cases"),
  [
    # P_0 = P_p, so that no lambda empties +; an empty -; both empty.
    (None, [[1.0, 1.0, 0.1, 0.1], [1.0, 0.1, 0.1, 0.1], [0.0, -0.0, 0.0, 0.0]]),
    # Channels that are dead, with centroids of the least positive float.
    (
      -1,
      [
        [[1.0, 0.0], [-1.0, 0.0], [0.1, 0.0]],
        [[1.0, 0.3], [-1.0, 0.3], [0.1, 0.3]],
        [[900.0, 0.0], [-900.0, 0.0], [9.0, 0.0]],
      ],
    ),
  ],
  ids=["tensor", "channel"],
)
@pytest.mark.parametrize("dtype", DTYPES, ids=["f32", "bf16"])
def test_one_sided_and_empty_clusters_stay_finite(dtype, axis, cases):
  @jax.jit
  def look(w, gamma, min_p_0):
    method = EC2T(gamma=gamma, channel_axis=axis, min_p_0=min_p_0)
    seen = w.astype(dtype)
    scales, state = method.after_step(seen, *method.init(seen))
    return scales, state, method.discretize(w, scales, state).codes

  for w in map(jnp.asarray, cases):
    for gamma, min_p_0 in itertools.product((0.0, 0.5, 0.9), (0.5, 0.0)):
      scales, state, codes = look(w, gamma, min_p_0)
      leaves = jax.tree.leaves((scales, state))
      assert all(bool(jnp.isfinite(x).all()) for x in leaves)
      assert all(float(x.min()) > 0 for x in scales.values())
      assert not np.any(np.asarray(codes) * np.asarray(w) < 0)
      assert not np.any(np.asarray(codes)[np.asarray(w) == 0])


def test_a_layer_of_one_sign_keeps_its_knob():
  w = jnp.abs(weights((64, 64)))
  zeros = []
  for gamma in (0.0, 0.3, 0.6, 0.9):
    method = EC2T(gamma=gamma, s=0.7)
    codes = method.discretize(w, *method.init(w)).codes
    assert int(codes.min()) == 0
    zeros.append(float(jnp.mean(codes == 0)))
  assert zeros == sorted(set(zeros))
  assert zeros[-1] < 1


@pytest.mark.parametrize("axis", [None, -1, 0])
@pytest.mark.parametrize("dtype", DTYPES, ids=["f32", "bf16"])
def test_init_is_the_paper_s(dtype, axis):
  w = weights(dtype=dtype)
  method = EC2T(gamma=0.4, s=0.45, largest=10_000, channel_axis=axis)
  scales, state = method.init(w)
  wide, axes = f64(w), {None: None, -1: 0, 0: 1}[axis]
  keep = axes is not None
  low = 0.675 * wide.std(axes, keepdims=keep)
  rtol = 1e-5 if dtype == jnp.float32 else 1e-2
  for name, top in (
    ("w_p", wide.max(axes, keepdims=keep)),
    ("w_n", -wide.min(axes, keepdims=keep)),
  ):
    assert scales[name].dtype == dtype
    np.testing.assert_allclose(
      f64(scales[name]), np.maximum(0.45 * top, low), rtol=rtol
    )
  w_p, w_n = f64(scales["w_p"]), f64(scales["w_n"])
  delta = (w.size / 10_000 + 0.05) / 1.05
  if axis is None:
    lam = 0.4 * delta * reference.ec2t_lambda_max(wide, w_p, w_n)
  else:
    most = ec2t_lambda_max(w, scales["w_p"], scales["w_n"])
    lam = 0.4 * delta * float(most)
  codes = method.discretize(w, scales, state).codes
  np.testing.assert_array_equal(
    codes, reference.ec2t_codes(wide, w_p, w_n, lam)
  )


def test_channels_empty_together():
  w = weights((64, 16)) * jnp.linspace(0.5, 2.0, 16)[None]
  scales, _ = EC2T(channel_axis=-1).init(w)
  most = ec2t_lambda_max(w, scales["w_p"], scales["w_n"])
  for share, clusters in ((0.999, 3), (1.001, 2)):
    codes = ec2t_assign(w, scales["w_p"], scales["w_n"], share * most)
    assert len(np.unique(codes)) == clusters


def test_zeros_of_a_gaussian_are_those_of_theory():
  w = weights((1000, 1000))
  method = EC2T()
  codes = method.discretize(w, *method.init(w)).codes
  w_p, top = 0.3 * float(w.max()), float(w.max())
  # The larger side of the two reaches gamma of the way to its largest weight.
  t = 0.5 * w_p + 0.15 * (top - 0.5 * w_p)
  expected = math.erf(t / (0.1 * math.sqrt(2)))
  assert expected == pytest.approx(0.83, abs=0.02)
  assert float(jnp.mean(codes == 0)) == pytest.approx(expected, abs=0.01)


@pytest.mark.parametrize(
  ("dtype", "axis"),
  [
    (jnp.float32, None),
    (jnp.float32, -1),
    (jnp.float32, 0),
    (jnp.bfloat16, -1),
  ],
)
def test_gradients_in_closed_form(dtype, axis):
  w, g = weights(dtype=dtype), weights(dtype=dtype, seed=1)
  method = EC2T(gamma=0.1, channel_axis=axis)
  scales, state = method.init(w)
  codes = np.asarray(method.discretize(w, scales, state).codes)

  def loss(w, scales):
    return jnp.sum((method(w, scales, state) * g).astype(jnp.float32))

  d_w, d_scales = jax.grad(loss, (0, 1))(w, scales)
  axes = {None: None, -1: 0, 0: 1}[axis]
  keep = axes is not None
  rtol = 1e-5 if dtype == jnp.float32 else 1e-2
  plus = np.sum(f64(g) * (codes == 1), axes, keepdims=keep)
  minus = np.sum(f64(g) * (codes == -1), axes, keepdims=keep)
  np.testing.assert_allclose(f64(d_scales["w_p"]), plus, rtol=rtol, atol=1e-6)
  np.testing.assert_allclose(f64(d_scales["w_n"]), -minus, rtol=rtol, atol=1e-6)
  w_p, w_n = f64(scales["w_p"]), f64(scales["w_n"])
  slope = np.where(codes == 1, w_p, np.where(codes == -1, w_n, 1.0))
  np.testing.assert_allclose(f64(d_w), f64(g) * slope, rtol=rtol)
  for x in jax.tree.leaves((d_w, d_scales)):
    assert x.dtype == dtype


def test_true_gradient_of_w_n_by_finite_differences():
  w, g = weights(), weights(seed=1)
  method = EC2T()
  scales, state = method.init(w)

  def loss(w_n):
    return jnp.sum(method(w, {**scales, "w_n": w_n}, state) * g)

  w_n = scales["w_n"]
  slope = (loss(w_n + 0.1) - loss(w_n - 0.1)) / 0.2
  assert float(jax.grad(loss)(w_n)) == pytest.approx(float(slope), rel=1e-3)


@pytest.mark.parametrize(
  ("axis", "dtype"),
  [(None, jnp.float32), (-1, jnp.bfloat16)],
  ids=["tensor f32", "channel bf16"],
)
@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_forward_is_the_discretization_bit_for_bit(method, axis, dtype):
  method = dataclasses.replace(method, channel_axis=axis)
  w = weights((3, 3, 8, 16), dtype)
  scales, state = method.init(w)
  ternary = method.discretize(w, scales, state)
  assert ternary.w_p.dtype == ternary.w_n.dtype == dtype
  bits = jnp.uint32 if dtype == jnp.float32 else jnp.uint16
  effective = jax.jit(method)(w, scales, state)
  assert effective.dtype == dtype
  np.testing.assert_array_equal(
    np.asarray(effective).view(bits),
    np.asarray(ternary.dequantize()).view(bits),
  )


@pytest.mark.parametrize("axis", [None, -1], ids=["tensor", "channel"])
@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_mirrored_weights_have_the_mirrored_result(method, axis):
  method = dataclasses.replace(method, channel_axis=axis)
  w = weights()
  scales, state = method.init(w)
  mirrored = method.init(-w)
  swap = {"w_p": "w_n", "w_n": "w_p", "t_p": "t_n", "t_n": "t_p"}
  for ours, theirs in zip((scales, state), mirrored, strict=True):
    for name, value in ours.items():
      mirror = theirs[swap.get(name, name)]
      np.testing.assert_allclose(mirror, value, rtol=1e-5)
  np.testing.assert_allclose(
    method(-w, *mirrored), -method(w, scales, state), rtol=1e-6
  )


@pytest.mark.parametrize("method", MORE_METHODS, ids=repr)
def test_contract_of_values(method):
  assert eval(repr(method), {"EC2T": EC2T}) == method
  assert pickle.loads(pickle.dumps(method)) == method
  assert hash(method) == hash(dataclasses.replace(method))
  traces = []

  def forward(method, *args):
    traces.append(1)
    return method(*args)

  compiled = jax.jit(forward, static_argnums=0)
  for copy in (method, dataclasses.replace(method)):
    compiled.trace(copy, weights(), *method.init(weights()))
  assert len(traces) == 1


@pytest.mark.long
@pytest.mark.parametrize("method", MORE_METHODS, ids=repr)
def test_vmap_equals_loop(method):
  stack = jnp.stack([weights(seed=i) * 10.0**-i for i in range(3)])
  scales, state = jax.vmap(method.init)(stack)
  got = jax.vmap(method)(stack, scales, state)
  for i in range(3):
    np.testing.assert_allclose(
      got[i], method(stack[i], *method.init(stack[i])), rtol=2e-6
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=["f32", "bf16"])
@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_after_step_clamps_and_assigns_anew_unless_frozen(method, dtype):
  method = dataclasses.replace(method, every=1)
  w = weights(dtype=dtype)
  scales, state = method.init(w)
  negative = jax.tree.map(lambda x: -x, scales)
  moved = weights(dtype=dtype, seed=3) * 2
  after, now = jax.jit(method.after_step)(moved, negative, state)
  rtol = 1e-5 if dtype == jnp.float32 else 1e-2
  seen = w if method.frozen else moved
  for name in scales:
    assert after[name].dtype == dtype
    assert float(after[name]) == pytest.approx(
      0.675 * f64(seen).std(), rel=rtol
    )
  assert now["count"] == 1
  for name in ("floor", "t_n", "t_p"):
    assert now[name].dtype == state[name].dtype == jnp.float32
    same = bool(now[name] == state[name])
    assert same == method.frozen
  renewed = method.refresh(moved, after, {**state, "count": now["count"]})[1]
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, 1e-6), renewed, now
  )


def test_sparsity_grows_with_gamma_in_one_compiled_program():
  w = weights((64, 64))
  traces = []

  def zeros(gamma):
    traces.append(1)
    method = EC2T(gamma=gamma)
    scales, state = method.after_step(w, *method.init(w))
    return jnp.mean(method.discretize(w, scales, state).codes == 0)

  gammas = jnp.linspace(0.0, 0.99, 12)
  got = jax.jit(jax.vmap(zeros))(gammas)
  assert len(traces) == 1
  assert bool((jnp.diff(got) > 0).all())
  assert float(got[0]) == pytest.approx(0.4, abs=0.05)
  assert float(got[-1]) > 0.99
  one = EC2T(gamma=float(gammas[4]))
  codes = one.discretize(w, *one.init(w)).codes
  assert float(got[4]) == pytest.approx(float(jnp.mean(codes == 0)), abs=1e-3)


@pytest.mark.long
def test_the_knob_may_follow_a_schedule():
  w = weights()
  risen = EC2T(gamma=tern_jax.ramp(0.4, steps=40), every=10)
  params = risen.init(w)
  for steps in range(21):
    if steps in (0, 10, 20):
      at_once = EC2T(gamma=float(risen.gamma(steps))).init(w)[1]
      for name in ("t_n", "t_p"):
        np.testing.assert_allclose(params[1][name], at_once[name], rtol=1e-6)
    params = risen.after_step(w, *params)
  assert risen.gamma(20) == pytest.approx(0.4)


def test_larger_layers_become_sparser():
  small, large = weights((16, 16)), weights((128, 128), seed=1)
  method = EC2T(gamma=0.5, largest=large.size)
  ones = EC2T(gamma=0.5)

  def zeros(method, w):
    return float(jnp.mean(method.discretize(w, *method.init(w)).codes == 0))

  assert zeros(method, small) < zeros(ones, small) - 0.2
  assert zeros(method, large) == zeros(ones, large)


class TestFrozen:
  """A regression: y = x W, through the training step."""

  def setup_method(self):
    self.where = tern_jax.kernels()
    self.tx = optax.partition(
      {"latent": optax.adam(1e-3), "scales": optax.adam(1e-3)},
      tern_jax.LABELS,
    )
    self.batch = (weights((64, 16)), weights((64, 8), seed=1))

  @staticmethod
  def loss_fn(params, model_state, batch, key):
    del key
    x, y = batch
    out = x @ params["a"]["kernel"] + params["a"]["bias"][None]
    return jnp.mean((out - y) ** 2), (model_state, {})

  def run(self, method, state, steps=20):
    tern = tern_jax.ParamTransform(method, self.where)
    if state is None:
      tree = {"a": {"kernel": weights((16, 8)), "bias": jnp.zeros(8)}}
      state = training.init_state(tree, self.tx, tern)
    step = jax.jit(training.make_step(self.loss_fn, self.tx, tern))
    for _ in range(steps):
      state, metrics = step(state, self.batch)
    ternary = tern.discretize(state.params, state.tern_state)["a"]["kernel"]
    return state, ternary, float(metrics["loss"])

  @pytest.mark.sample(2)
  @pytest.mark.usefixtures("standard_promotion")
  def test_codes_stay_while_the_rest_trains(self):
    method = EC2T(gamma=0.2, min_scale=0.0)
    state, start, _ = self.run(method, None)
    moving, codes, _ = self.run(method, state)
    assert bool((codes.codes != start.codes).any())
    frozen = dataclasses.replace(method, frozen=True)
    fresh = dataclasses.replace(state, opt_state=self.tx.init(state.params))
    _, _, early = self.run(frozen, fresh, 1)
    after, ternary, late = self.run(frozen, fresh, 50)
    np.testing.assert_array_equal(ternary.codes, start.codes)
    latent, before = after.params.latent["a"], state.params.latent["a"]
    np.testing.assert_array_equal(latent["kernel"], before["kernel"])
    assert bool((latent["bias"] != before["bias"]).any())
    assert float(ternary.w_p) != float(start.w_p)
    assert float(ternary.w_n) != float(start.w_n)
    assert late < early
    assert jax.tree.structure(after) == jax.tree.structure(moving)

  @pytest.mark.usefixtures("standard_promotion")
  def test_momentum_from_before_still_moves_latents(self):
    # Why the docstring says to start the optimizer anew.
    method = EC2T(gamma=0.2)
    state, _, _ = self.run(method, None)
    after, _, _ = self.run(dataclasses.replace(method, frozen=True), state, 1)
    latent, before = after.params.latent["a"], state.params.latent["a"]
    assert bool((latent["kernel"] != before["kernel"]).any())

  def test_a_traced_flag_is_the_same_program(self):
    w, g = weights(), weights(seed=1)

    @jax.jit
    def grads(frozen, scales, state):
      method = EC2T(frozen=frozen)
      return jax.grad(lambda w, s: jnp.sum(method(w, s, state) * g), (0, 1))(
        w, scales
      )

    args = EC2T().init(w)
    d_w, d_scales = grads(jnp.array(True), *args)
    free_w, free_scales = grads(jnp.array(False), *args)
    assert not d_w.any()
    assert bool(free_w.all())
    assert float(free_scales["w_n"]) != 0
    jax.tree.map(np.testing.assert_array_equal, d_scales, free_scales)


@jax.jit
def zeroed(w, gamma, s):
  return ec2t_zero(w, EC2T(gamma, s, 5000))


class TestZero:
  """ECP: the same cost on weights that stay float."""

  @pytest.mark.parametrize("dtype", DTYPES, ids=["f32", "bf16"])
  @pytest.mark.parametrize("gamma", [0.0, 0.15, 0.6])
  @pytest.mark.parametrize("s", [0.1, 0.25])
  def test_zeros_are_those_of_the_literal_argmin(self, s, gamma, dtype):
    w = weights((3, 3, 8, 16), dtype)
    wide = f64(w)
    # The centroids are rounded to the dtype of the weights.
    w_p, w_n = (
      f64(jnp.asarray(max(s * top, 0.675 * wide.std()), dtype))
      for top in (wide.max(), -wide.min())
    )
    delta = (w.size / 5000 + 0.05) / 1.05
    lam = gamma * delta * reference.ec2t_lambda_max(wide, w_p, w_n)
    kept = reference.ec2t_codes(wide, w_p, w_n, lam) != 0
    got = zeroed(w, gamma, s)
    assert got.dtype == dtype
    np.testing.assert_array_equal(f64(got), np.where(kept, wide, 0))

  @pytest.mark.parametrize("axis", [-1, 0])
  def test_channels_have_centroids_of_their_own(self, axis):
    w = weights() * jnp.linspace(0.2, 3.0, 32)[None]
    method = EC2T(channel_axis=axis)
    codes = method.discretize(w, *method.init(w)).codes
    expected = np.where(np.asarray(codes) == 0, 0, w)
    np.testing.assert_array_equal(ec2t_zero(w, method), expected)

  def test_gamma_0_gives_the_zeros_nearest_to_0(self):
    w = weights()
    zeros = np.asarray(ec2t_zero(w, EC2T(gamma=0.0, s=0.5))) == 0
    x = np.asarray(w)
    expected = (x <= 0.25 * x.max()) & (x >= 0.25 * x.min())
    np.testing.assert_array_equal(zeros, expected)

  @pytest.mark.parametrize("dtype", DTYPES, ids=["f32", "bf16"])
  def test_the_gradient_passes_unchanged(self, dtype):
    w, g = weights(dtype=dtype), weights(dtype=dtype, seed=1)
    for method in (EC2T(), EC2T(frozen=True)):
      got = jax.grad(lambda w: jnp.sum(ec2t_zero(w, method) * g))(w)  # noqa: B023
      np.testing.assert_array_equal(f64(got), f64(g))

  def test_zeros_grow_with_a_traced_gamma(self):
    w, gammas = weights((64, 64)), jnp.linspace(0.0, 0.99, 12)
    got = jax.vmap(lambda gamma: ec2t_zero(w, EC2T(gamma=gamma)))(gammas)
    kept = np.asarray(got) != 0
    assert not np.any(kept[1:] & ~kept[:-1])
    assert np.all(np.diff(kept.sum((1, 2))) < 0)
    assert kept[-1].any()

  @pytest.mark.parametrize("value", [0.0, 0.25])
  def test_constant_weights_are_finite(self, value):
    got = ec2t_zero(jnp.full((8, 4), value), EC2T())
    np.testing.assert_array_equal(got, jnp.full((8, 4), value))

  @pytest.mark.long
  @pytest.mark.usefixtures("standard_promotion")
  def test_beside_ternary_layers(self, tmp_path):
    tree = {
      "project": {"kernel": weights((16, 32))},
      "head": {"kernel": weights((32, 8), seed=1), "bias": jnp.zeros(8)},
    }
    where, floats = tern_jax.kernels("project"), tern_jax.kernels("head")
    tern = tern_jax.ParamTransform(EC2T(), where)
    ecp = EC2T(gamma=0.3, s=0.25, largest=floats.largest(tree))
    chosen = floats(tree)

    def pruned(tree):
      return jax.tree.map(
        lambda chosen, w: ec2t_zero(w, ecp) if chosen else w, chosen, tree
      )

    x = weights((64, 16), seed=2) * 10
    y = jnp.tanh(x @ weights((16, 8), seed=3) * 10)
    tx = optax.adam(3e-3)

    @jax.jit
    def step(params, state, opt_state):
      def loss(params):
        w = pruned(tern(params, state))
        hidden = jnp.tanh(x @ w["project"]["kernel"])
        out = hidden @ w["head"]["kernel"] + w["head"]["bias"][None]
        return jnp.mean((out - y) ** 2)

      value, grads = jax.value_and_grad(loss)(params)
      updates, opt_state = tx.update(grads, opt_state, params)
      params = optax.apply_updates(params, updates)
      return *tern.after_step(params, state), opt_state, value

    params, state = tern.init(tree)
    start = pruned(tern(params, state))["head"]["kernel"]
    opt_state, losses = tx.init(params), []
    for _ in range(200):
      params, state, opt_state, value = step(params, state, opt_state)
      losses.append(float(value))
    assert losses[-1] < 0.3 * losses[0]
    weights_now = pruned(tern(params, state))
    head = np.asarray(weights_now["head"]["kernel"])
    assert 0.5 < np.mean(head == 0) < 1
    assert len(np.unique(head)) > 10
    # Some zeros came back.
    assert np.any((np.asarray(start) == 0) & (head != 0))
    packed = tern_jax.pack(pruned(tern.discretize(params, state)))
    tern_jax.save_packed(tmp_path / "net", packed)
    loaded = tern_jax.unpack(tern_jax.load_packed(tmp_path / "net"))
    jax.tree.map(np.testing.assert_array_equal, loaded, weights_now)


def test_bad_input():
  with pytest.raises(ValueError, match=r"gamma must lie in \[0, 1\), got 1"):
    EC2T(gamma=1.0)
  with pytest.raises(ValueError, match="s must lie in"):
    EC2T(s=0.0)
  with pytest.raises(ValueError, match="min_p_0 must lie in"):
    EC2T(min_p_0=1.0)
  with pytest.raises(ValueError, match="min_scale must lie in"):
    EC2T(min_scale=-1.0)
  with pytest.raises(ValueError, match="largest must lie in"):
    EC2T(largest=0)
  with pytest.raises(ValueError, match="largest=100 and a layer of 1536"):
    EC2T(largest=100).init(weights())
  with pytest.raises(ValueError, match="largest=100 and a layer of 1536"):
    ec2t_zero(weights(), EC2T(largest=100))
  with pytest.raises(ValueError, match="channel_axis=2 is no axis"):
    EC2T(channel_axis=2).init(weights())
