"""Convolutions by the native code, against XLA's and NumPy's."""

import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

import tern_jax
from tern_jax import Ternary, inference, pack
from tern_jax.inference import cpu
from tern_jax.inference.matrix import merged
from tern_jax.inference.preparation import lay_out
from tests.helpers import f64

pytestmark = pytest.mark.skipif(
  cpu.isa() is None, reason="there is no native code here"
)
NHWC = ("NHWC", "HWIO", "NHWC")
SETTINGS = hypothesis.settings(
  max_examples=6, deadline=None, derandomize=True, database=None
)
SAME = {"window_strides": (1, 1), "padding": "SAME"}


def ternary(shape, scales=(), *, equal=True, zeros=1 / 3, seed=0):
  rng = np.random.default_rng(seed)
  p = (1 - zeros) / 2
  codes = rng.choice(3, shape, p=[p, zeros, p]) - 1
  w_p, w_n = rng.uniform(0.5, 2, (2, *scales))
  w_n = w_p if equal else w_n
  return Ternary(
    jnp.asarray(codes, jnp.int8),
    jnp.asarray(w_p, jnp.float32),
    jnp.asarray(w_n, jnp.float32),
  )


def images(*shape, seed=1):
  x = np.random.default_rng(seed).normal(size=shape)
  return jnp.asarray(x, jnp.float32)


def convolution(settings, numbers=NHWC):
  def fn(kernel, x):
    return jax.lax.conv_general_dilated(
      x, kernel, **settings, dimension_numbers=numbers
    )

  return fn


def exact(settings, numbers, x, kernel):
  """Convolves in float64 by NumPy, kernel and images in any order of axes."""
  numbers = jax.lax.conv_dimension_numbers(x.shape, kernel.shape, numbers)
  x = np.transpose(f64(x), (numbers.lhs_spec[0], *numbers.lhs_spec[2:],
                            numbers.lhs_spec[1]))  # fmt: skip
  of_kernel = numbers.rhs_spec
  kernel = np.transpose(
    f64(kernel), (*of_kernel[2:], of_kernel[1], of_kernel[0])
  )
  rank = x.ndim - 2
  spread = settings.get("lhs_dilation", (1,) * rank)
  dilation = settings.get("rhs_dilation", (1,) * rank)
  shape = [(n - 1) * d + 1 for n, d in zip(x.shape[1:-1], spread, strict=True)]
  wide = np.zeros((x.shape[0], *shape, x.shape[-1]))
  wide[(slice(None), *(slice(None, None, d) for d in spread))] = x
  reach = [
    (n - 1) * d + 1 for n, d in zip(kernel.shape[:rank], dilation, strict=True)
  ]
  pads = settings["padding"]
  if isinstance(pads, str):
    pads = jax.lax.padtype_to_pads(
      shape, reach, settings["window_strides"], pads
    )
  for axis, (low, high) in enumerate(pads, 1):
    edges = [(0, 0)] * wide.ndim
    edges[axis] = max(low, 0), max(high, 0)
    wide = np.pad(wide, edges)
    stop = wide.shape[axis] + min(high, 0)
    wide = np.take(wide, range(max(-low, 0), stop), axis)
  windows = np.lib.stride_tricks.sliding_window_view(
    wide, reach, tuple(range(1, rank + 1))
  )
  steps = (slice(None, None, s) for s in settings["window_strides"])
  inner = (slice(None, None, d) for d in dilation)
  windows = windows[(slice(None), *steps, slice(None), *inner)]
  # [batch, *space, channels, *window] to [batch, *space, *window, channels]
  patches = np.moveaxis(windows, rank + 1, -1)
  y = np.tensordot(patches, kernel, rank + 1)
  spec = numbers.out_spec
  order = spec[0], *spec[2:], spec[1]
  return np.transpose(y, [order.index(i) for i in range(y.ndim)])


def compare(settings, numbers, t, x, prepared):
  """Within 1e-6 of what the magnitudes sum to, as float32 sums are."""
  net = inference.apply_fn(convolution(settings, numbers))
  y = net(prepared, x)
  dense = t.dequantize()
  wanted = exact(settings, numbers, x, dense)
  size = exact(settings, numbers, np.abs(x), np.abs(dense))
  assert y.shape == wanted.shape
  assert np.all(np.abs(f64(y) - wanted) <= 1e-6 * size)
  (use,) = net.explain(prepared, x).uses
  assert use.how == "packed convolution"


def int8_oracle(x, t):
  """The product of rounded rows, by exact sums; one magnitude a sign."""
  x, codes = np.asarray(x), np.asarray(t.codes, np.int64)
  most = np.max(np.abs(x), 1, keepdims=True)
  q = np.round(x / np.where(most > 0, most, 1) * np.float32(127))
  q = q.astype(np.int64)
  w_p, w_n = np.float32(t.w_p), np.float32(t.w_n)
  positive, negative = (
    (q @ (sign * codes > 0)).astype(np.float32) for sign in (1, -1)
  )
  both = (q @ codes).astype(np.float32)
  y = w_p * both if w_p == w_n else w_p * positive - w_n * negative
  return y * (most * np.float32(1 / 127))


def check_any(data, largest):
  draw = data.draw
  rank = draw(st.sampled_from([2, 1, 3]))

  def each(low, high):
    return tuple(draw(st.integers(low, high)) for _ in range(rank))

  def axes():
    order = draw(st.permutations(range(rank + 2)))
    return tuple(order)

  numbers = jax.lax.ConvDimensionNumbers(axes(), axes(), axes())
  settings = {
    "window_strides": each(1, 3),
    "lhs_dilation": each(1, 2),
    "rhs_dilation": each(1, 2),
    "padding": [(low, low + draw(st.integers(0, 2))) for low in each(-1, 3)],
  }
  sizes, space = each(1, 3), each(4, largest if rank < 3 else 5)
  channels, out = draw(st.integers(2, 20)), draw(st.integers(1, 40))
  shape, of_kernel = [0] * (rank + 2), [0] * (rank + 2)
  given = draw(st.integers(1, 3)), channels, *space
  for axis, size in zip(numbers.lhs_spec, given, strict=True):
    shape[axis] = size
  for axis, size in zip(numbers.rhs_spec, (out, channels, *sizes), strict=True):
    of_kernel[axis] = size
  seed, equal = draw(st.integers(0, 99)), draw(st.booleans())
  scales = [1] * (rank + 2)
  if draw(st.booleans()):
    scales[numbers.rhs_spec[0]] = out
  zeros = draw(st.sampled_from([0.0, 1 / 3, 0.95]))
  t = ternary(of_kernel, scales, equal=equal, zeros=zeros, seed=seed)
  x = images(*shape, seed=seed)
  dense = jnp.zeros(of_kernel)
  fn = convolution(settings, numbers)
  if 0 in jax.eval_shape(fn, dense, x).shape:
    return
  inputs = tuple(i for i in range(rank + 2) if i != numbers.rhs_spec[0])
  for many in (False, True):
    compare(
      settings, numbers, t, x, lay_out(t, inputs, "float32", 64, patches=many)
    )


@SETTINGS
@hypothesis.given(data=st.data())
def test_any_convolution(data):
  check_any(data, 9)


@pytest.mark.long
@hypothesis.settings(SETTINGS, max_examples=300)
@hypothesis.given(data=st.data())
def test_many_convolutions(data):
  check_any(data, 20)


@pytest.mark.parametrize("equal", [True, False])
def test_int8_equals_its_oracle(equal):
  t = ternary((3, 3, 5, 21), equal=equal)
  x = images(2, 9, 8, 5).at[0, :4].set(0)
  fn = convolution(SAME)
  net = inference.apply_fn(fn)
  y = net(net.prepare(pack(t), x, activations="int8"), x)
  rows = jax.lax.conv_general_dilated_patches(
    x, (3, 3), (1, 1), "SAME", dimension_numbers=NHWC
  )
  # Their channels come first.
  rows = rows.reshape(-1, 5, 9).swapaxes(1, 2).reshape(-1, 45)
  matrix = Ternary(merged(t.codes, (0, 1, 2)), t.w_p, t.w_n)
  np.testing.assert_array_equal(
    np.asarray(y).reshape(-1, 21), int8_oracle(rows, matrix)
  )


def test_scales_of_groups_of_inputs():
  t = ternary((3, 3, 8, 20), (3, 1, 4, 20), equal=False)
  x = images(1, 7, 6, 8)
  net = inference.apply_fn(convolution(SAME))
  compare(SAME, NHWC, t, x, net.prepare(pack(t), x))


@pytest.mark.parametrize("zeros", [1 / 3, 0.95])
def test_derivatives_vmap_and_layouts(zeros):
  t = ternary((3, 3, 4, 130), zeros=zeros, equal=False)
  fn, x = convolution(SAME), images(2, 6, 5, 4)
  net = inference.apply_fn(fn)
  packed = net.prepare(pack(t), x)
  assert packed.layout == ("lists" if zeros > 0.9 else "tiles")

  def loss(fn, kernel, x):
    return jnp.sum(jnp.sin(fn(kernel, x)))

  @jax.jit
  def both(packed, dense, x):
    found = jax.grad(functools.partial(loss, net), 1)(packed, x)
    wanted = jax.grad(functools.partial(loss, fn), 1)(dense, x)
    stack = jnp.stack([x, 2 * x])
    mapped = jax.vmap(net, (None, 0))(packed, stack)
    return found, wanted, mapped, net(packed, x)

  dense = tern_jax.unpack(pack(t))
  found, wanted, mapped, y = both(packed, dense, x)
  largest = jnp.max(jnp.abs(wanted))
  assert jnp.max(jnp.abs(found - wanted)) <= 1e-5 * largest
  np.testing.assert_array_equal(mapped[0], y)
  np.testing.assert_array_equal(mapped[1], 2 * y)


def test_gradients_of_scales():
  t, x = ternary((3, 3, 4, 20), (1, 1, 1, 20), equal=False), images(2, 6, 5, 4)
  net = inference.apply_fn(convolution(SAME))
  packed = net.prepare(pack(t), x)

  def change(scale, packed):
    return jnp.sum(net(inference.Prepared(
      packed.arrays, scale * packed.w_p, packed.w_n, packed.layer,
      packed.inputs, packed.layout, packed.activations,
    ), x))  # fmt: skip

  slope = jax.jit(jax.grad(change))(1.0, packed)
  positive = Ternary(jnp.maximum(t.codes, 0), t.w_p, t.w_n).dequantize()
  wanted = np.sum(exact(SAME, NHWC, x, positive))
  np.testing.assert_allclose(slope, wanted, rtol=1e-4)


def test_numbers_that_are_not_finite_spread_as_in_a_dense_convolution():
  t = ternary((3, 3, 4, 7), zeros=0.5)
  x = images(1, 8, 8, 4).at[0, 2, 3, 1].set(jnp.nan).at[0, 6, 6, 0].set(jnp.inf)
  fn = convolution(SAME)
  net = inference.apply_fn(fn)
  y = net(net.prepare(pack(t), x), x)
  wanted = fn(tern_jax.unpack(pack(t)), x)
  np.testing.assert_allclose(y, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("isa", cpu.ISAS)
def test_instruction_sets_agree(isa, monkeypatch):
  if not cpu._opened().tern_jax_has_isa(cpu.ISAS.index(isa)):
    pytest.skip(f"this machine does not have {isa}")
  t, x = ternary((3, 3, 4, 20), equal=False), images(2, 9, 8, 4)
  net = inference.apply_fn(convolution(SAME))
  packed = net.prepare(pack(t), x)
  monkeypatch.setattr(cpu, "isa", lambda: isa)
  compare(SAME, NHWC, t, x, packed)
