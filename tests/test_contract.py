"""Every method keeps the contract. A new one is a row in helpers.METHODS."""

import dataclasses
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tern_jax
from tern_jax import EC2T, SCA, TGA, TTQ, TWN
from tern_jax.targets.schedules import zeros_at
from tests import reference
from tests.helpers import DTYPES, METHODS, weights

NAMESPACE = vars(tern_jax)


def granular(method, channel_axis):
  return dataclasses.replace(method, channel_axis=channel_axis)


@pytest.fixture(params=METHODS, ids=repr)
def method(request):
  return request.param


@pytest.fixture(params=[None, -1], ids=["tensor", "channel"])
def lifted(method, request):
  return granular(method, request.param)


def shape_of(method, dtype=jnp.float32):
  """Any two of granularity, dtype and shape meet, at half of all cases."""
  dense = (method.channel_axis is None) == (dtype == jnp.float32)
  return (48, 32) if dense else (3, 3, 8, 16)


@pytest.mark.sample(3)
@pytest.mark.parametrize("dtype", DTYPES, ids=["f32", "bf16"])
def test_forward_is_the_discretization_bit_for_bit(lifted, dtype):
  shape = shape_of(lifted, dtype)
  w = weights(shape, dtype)
  scales, state = lifted.init(w)
  theta = lifted.latent(w)
  assert theta.dtype == dtype
  assert theta.shape == shape
  ternary = lifted.discretize(theta, scales, state)
  assert ternary.codes.dtype == jnp.int8
  assert set(np.unique(ternary.codes)) <= {-1, 0, 1}
  assert ternary.w_p.dtype == ternary.w_n.dtype == dtype
  effective = lifted(theta, scales, state)
  assert effective.dtype == dtype
  if lifted.soft:
    assert len(np.unique(np.asarray(effective, np.float32))) > 3
    return
  bits = jnp.uint32 if dtype == jnp.float32 else jnp.uint16
  np.testing.assert_array_equal(
    np.asarray(effective).view(bits),
    np.asarray(ternary.dequantize()).view(bits),
  )


@pytest.mark.sample(2)
@pytest.mark.parametrize(
  ("channel_axis", "dtype"),
  [(None, jnp.float32), (-1, jnp.bfloat16)],
  ids=["tensor f32", "channel bf16"],
)
def test_gradients_are_finite_and_of_the_latents_dtype(
  method, channel_axis, dtype
):
  lifted = granular(method, channel_axis)
  w = weights(dtype=dtype)
  scales, state = lifted.init(w)
  g = weights(dtype=dtype, seed=1)

  def loss(theta, scales):
    return jnp.sum(lifted(theta, scales, state) * g)

  grads = jax.grad(loss, (0, 1))(lifted.latent(w), scales)
  for x in jax.tree.leaves(grads):
    assert x.dtype == dtype
    assert bool(jnp.isfinite(x).all())
  assert float(jnp.abs(grads[0]).max()) > 0


def test_odd_symmetry(lifted):
  w = weights(shape_of(lifted))
  scales, state = lifted.init(w)
  theta = lifted.latent(w)
  # Mirrored weights have mirrored scales and thresholds, if they have two.
  mirror = {"w_p": "w_n", "w_n": "w_p", "t_p": "t_n", "t_n": "t_p"}
  mirrored = [
    {mirror.get(name, name): x for name, x in arrays.items()}
    for arrays in (scales, state)
  ]
  np.testing.assert_array_equal(
    lifted(-theta, *mirrored), -lifted(theta, scales, state)
  )
  np.testing.assert_array_equal(
    lifted.discretize(-theta, *mirrored).codes,
    -lifted.discretize(theta, scales, state).codes,
  )


@pytest.mark.sample(4)
@pytest.mark.parametrize("value", [0.0, 0.25])
def test_constant_weights_are_finite(lifted, value):
  w = jnp.full((48, 32), value)
  scales, state = lifted.init(w)
  theta = lifted.latent(w)
  effective = lifted(theta, scales, state)
  assert bool(jnp.isfinite(effective).all())
  codes = np.asarray(lifted.discretize(theta, scales, state).codes)
  if lifted.sparsity is not None:
    # Ties are split: the first are zero, also of weights that all are.
    zeros = int(zeros_at(lifted.sparsity, 0, w.size))
    np.testing.assert_array_equal(codes.ravel() == 0, np.arange(w.size) < zeros)
    assert np.all(codes >= 0)
  elif value == 0:
    assert not effective.any()
    assert not codes.any()


@pytest.mark.sample(2)
def test_vmap_equals_loop(method):
  stack = jnp.stack([weights(seed=i) * 10.0**-i for i in range(3)])
  scales, state = jax.vmap(method.init)(stack)
  theta = jax.vmap(method.latent)(stack)
  got = jax.vmap(method)(theta, scales, state)
  for i in range(3):
    one = jax.tree.map(lambda x: x[i], (theta, scales, state))  # noqa: B023
    np.testing.assert_allclose(got[i], method(*one), rtol=2e-6)
    scales_i, state_i = method.init(stack[i])
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-6),
      one[1:],
      (scales_i, state_i),
    )


def test_one_trace_as_a_static_argument(method):
  traces = []

  def forward(method, theta, scales, state):
    traces.append(1)
    return method(theta, scales, state)

  compiled = jax.jit(forward, static_argnums=0)
  w = weights()
  args = (method.latent(w), *method.init(w))
  for copy in (method, dataclasses.replace(method)):
    compiled.trace(copy, *args)
  assert len(traces) == 1


def test_repr_eval_pickle_hash(method):
  assert eval(repr(method), NAMESPACE) == method
  assert pickle.loads(pickle.dumps(method)) == method
  assert hash(method) == hash(dataclasses.replace(method))


@pytest.mark.sample(2)
def test_after_step_keeps_structure_dtypes_and_positive_scales(method):
  w = weights()
  scales, state = method.init(w)
  negative = jax.tree.map(lambda x: -x, scales)
  after = jax.jit(method.after_step)(method.latent(w), negative, state)
  assert jax.tree.structure(after) == jax.tree.structure((scales, state))
  for new, old in zip(
    jax.tree.leaves(after), jax.tree.leaves((scales, state)), strict=True
  ):
    assert (new.dtype, new.shape) == (old.dtype, old.shape)
  assert all(bool((s > 0).all()) for s in jax.tree.leaves(after[0]))


@pytest.mark.parametrize("method", [SCA(sparsity=0.5), TTQ()], ids=repr)
def test_a_scale_that_ran_into_its_bound_comes_back(method):
  w = weights()
  scales, state = method.init(w)
  gone = jax.tree.map(lambda x: -x, scales)
  scales, state = method.after_step(method.latent(w), gone, state)
  sign = jnp.sign(w)

  def loss(scales):
    # Larger magnitudes would be better.
    return -1e-4 * jnp.sum(method(method.latent(w), scales, state) * sign)

  for slope in jax.tree.leaves(jax.grad(loss)(scales)):
    assert float(slope) < -1e-3


@pytest.mark.sample(2)
@pytest.mark.parametrize("method_class", [SCA, TWN, TTQ, EC2T, TGA])
def test_refresh_meets_the_sparsity_for_other_latents(method_class):
  w, method = weights((64, 64)), method_class(sparsity=0.7)
  scales, state = method.init(w)
  averaged = 0.5 * method.latent(w) + 0.1 * weights((64, 64), seed=5)

  def zeros(state):
    codes = method.discretize(averaged, scales, state).codes
    return int(jnp.sum(codes == 0))

  assert abs(zeros(state) - round(0.7 * w.size)) > 100
  _, fresh = method.refresh(averaged, scales, state)
  assert zeros(fresh) == round(0.7 * w.size)


@pytest.mark.parametrize(
  "method",
  [
    TWN(every=3),
    TWN(sparsity=0.6, every=3),
    TTQ(every=3),
    TTQ(sparsity=0.6, every=3),
    TGA(sparsity=0.6, every=3),
  ],
  ids=repr,
)
def test_statistics_are_looked_at_every_few_steps(method):
  w, moved = weights((64, 64)), 2 * weights((64, 64), seed=1)
  scales, state = method.init(w)
  then, now = method.init(w)[1], method.init(moved)[1]
  step = jax.jit(method.after_step)
  for count in range(1, 4):
    scales, state = step(moved, scales, state)
    assert state["count"] == count
    for name in state.keys() - {"count"}:
      want = now if count == 3 else then
      # A sparsity is followed to a thousandth, and met by `refresh`.
      np.testing.assert_allclose(state[name], want[name], rtol=5e-3)
  _, state = method.refresh(moved, scales, state)
  for name in state.keys() - {"count"}:
    # A quantile is anywhere between two magnitudes.
    rtol = 1e-6 if method.sparsity is None else 1e-3
    np.testing.assert_allclose(state[name], now[name], rtol=rtol)
  with pytest.raises(ValueError, match="every must lie in"):
    dataclasses.replace(method, every=0)


def test_hyper_parameters_may_be_traced():
  w = weights()

  def zeros(alpha, sparsity):
    soft, hard, twn = (
      SCA(alpha=alpha),
      SCA(sparsity=sparsity),
      TWN(sparsity=sparsity),
    )
    return [
      jnp.mean(m.discretize(m.latent(w), *m.init(w)).codes == 0)
      for m in (soft, hard, twn)
    ]

  alphas, targets = jnp.array([0.05, 0.1, 0.5]), jnp.array([0.5, 0.75, 0.875])
  soft, hard, twn = jax.jit(jax.vmap(zeros))(alphas, targets)
  assert hard.tolist() == twn.tolist() == targets.tolist()
  for got, alpha in zip(soft, (0.05, 0.1, 0.5), strict=True):
    expected = reference.predicted_sparsity(0.2, alpha)
    assert float(got) == pytest.approx(expected, abs=0.03)
