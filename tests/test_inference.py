"""Products of packed weights against NumPy's, for every layout."""

import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from tern_jax import Ternary, pack
from tern_jax.inference import cpu, dot, prepare, words
from tern_jax.inference.layout import Layout
from tern_jax.inference.layouts import LAYOUTS
from tern_jax.inference.matrix import size_of
from tern_jax.inference.preparation import lay_out
from tern_jax.inference.prepared import prepared_of
from tests.helpers import assert_same, f64, long

try:
  cpu.load()
  HERE = [
    isa for i, isa in enumerate(cpu.ISAS) if cpu._opened().tern_jax_has_isa(i)
  ]
except cpu.UnavailableError:
  HERE = []

NATIVE = ("tiles", "lists")
#: Each layout, and each instruction set that the machine has for native ones.
FORMS = [
  ("fields", None), ("words", None), ("tiles", None), ("lists", None),
  *((layout, isa) for layout in ("tiles", "lists") for isa in HERE),
]  # fmt: skip
IDS = [f"{layout}-{isa or 'xla'}" for layout, isa in FORMS]
SETTINGS = hypothesis.settings(
  max_examples=8, deadline=None, derandomize=True, database=None
)
#: Scales of a matrix [in, out]; group sizes divide the inputs of SHAPES.
GRANULARITIES = ["tensor", "outputs", "groups", "group rows", "inputs"]


def weights(shape, granularity="tensor", equal=True, seed=0, zeros=1 / 3):
  """Ternary weights [in, out] with random codes and scales."""
  rng = np.random.default_rng(seed)
  p = (1 - zeros) / 2
  codes = rng.choice(3, shape, p=[p, zeros, p]) - 1
  n, out = shape
  group = next(g for g in (32, 16, 7, 5, 3, 2, 1) if n % g == 0)
  scales = {
    "tensor": (),
    "outputs": (1, out),
    "groups": (n // group, out),
    "group rows": (n // group, 1),
    "inputs": (n, 1),
  }[granularity]
  w_p, w_n = rng.uniform(0.5, 2, (2, *scales))
  w_n = w_p if equal else w_n
  return Ternary(
    jnp.asarray(codes, jnp.int8),
    jnp.asarray(w_p, jnp.float32),
    jnp.asarray(w_n, jnp.float32),
  )


def rows_of(batch, n, seed=1):
  x = np.random.default_rng(seed).normal(size=(batch, n))
  return jnp.asarray(x, jnp.float32)


def repeated(w, shape):
  w = np.asarray(w).reshape((1,) * (len(shape) - np.ndim(w)) + np.shape(w))
  for axis, n in enumerate(shape):
    w = np.repeat(w, n // w.shape[axis], axis)
  return w


def dense(t):
  """The weights in float64, of NumPy alone."""
  codes = np.asarray(t.codes).astype(np.int64)
  w_p, w_n = (repeated(f64(w), codes.shape) for w in (t.w_p, t.w_n))
  return np.where(codes > 0, w_p, np.where(codes < 0, -w_n, 0.0))


def groups_of(t):
  shapes = [(1,) * (2 - w.ndim) + w.shape for w in (t.w_p, t.w_n)]
  return size_of(t.shape, (0,), *shapes).groups


def int8_oracle(x, t):
  """What products of rounded activations are, to the last bit."""
  x = np.asarray(x)
  codes = np.asarray(t.codes).astype(np.int64)
  n, groups = len(codes), groups_of(t)
  most = np.abs(x).max(1, keepdims=True)
  ratio = x / np.where(most == 0, np.float32(1), most)
  q = np.rint(ratio * np.float32(127)).astype(np.int64)
  y = None
  for rows in np.split(np.arange(n), groups):
    w_p, w_n = (repeated(w, t.shape)[rows[0]] for w in (t.w_p, t.w_n))
    positive = (q[:, rows] @ (codes[rows] > 0)).astype(np.float32)
    negative = (q[:, rows] @ (codes[rows] < 0)).astype(np.float32)
    both = (q[:, rows] @ codes[rows]).astype(np.float32)
    part = np.where(w_p == w_n, w_p * both, w_p * positive - w_n * negative)
    y = part if y is None else y + part
  return y * (most * np.float32(1 / 127))


def product(form, x, t, activations="float32"):
  """A product by one layout and one instruction set."""
  layout, isa = form
  return multiplied(x, prepared_of(t, (0,), layout, activations), isa)


@functools.partial(jax.jit, static_argnums=2)
def multiplied(x, w, isa):
  layout, size, int8 = LAYOUTS[w.layout], w.matrix, w.activations == "int8"
  if isa:
    return layout.call(size, int8, isa)(x, *w.scales(), *w.arrays)
  # Native layouts multiply by codes where there is no native code.
  product = Layout.product if w.layout in NATIVE else type(layout).product
  return product(layout, x, w.arrays, *w.scales(), size, int8)


def assert_float_product(y, x, w):
  """Within 1e-6 of what the magnitudes sum to, as float32 sums are."""
  x = f64(x)
  assert y.shape == (len(x), w.shape[1])
  assert np.all(np.abs(f64(y) - x @ w) <= 1e-6 * (np.abs(x) @ np.abs(w)))


#: Shape, rows, granularity of the scales, and whether both magnitudes are one.
CASES = [
  ((1, 1), 1, "tensor", True), ((1, 40), 2, "outputs", False),
  ((16, 16), 3, "inputs", True), ((64, 48), 1, "groups", False),
  ((64, 48), 17, "groups", True), ((15, 17), 5, "group rows", True),
  ((33, 1), 8, "tensor", False), ((160, 70), 13, "groups", False),
  ((160, 70), 1, "outputs", True), ((320, 81), 40, "outputs", False),
  ((320, 97), 9, "tensor", True), ((70, 33), 4, "inputs", False),
]  # fmt: skip


def cases_of(form, every=False):
  # XLA compiles a program for each case: a quarter of them is enough for it.
  step = 1 if form[1] or every else 4
  chosen = list(enumerate(CASES))[FORMS.index(form) % step :: step]
  for i, (shape, batch, granularity, equal) in chosen:
    t = weights(shape, granularity, equal, seed=i)
    if form[0] != "lists" or groups_of(t) == 1:
      yield rows_of(batch, shape[0], seed=i), t


@pytest.mark.sample(3)
@pytest.mark.parametrize("every", [False, long(True)])
@pytest.mark.parametrize("form", FORMS, ids=IDS)
def test_float_activations(form, every):
  for x, t in cases_of(form, every):
    assert_float_product(product(form, x, t), x, dense(t))


INT8_FORMS = [form for form in FORMS if form[0] != "lists"]
INT8_IDS = [name for name in IDS if not name.startswith("lists")]


@pytest.mark.sample(3)
@pytest.mark.parametrize("every", [False, long(True)])
@pytest.mark.parametrize("form", INT8_FORMS, ids=INT8_IDS)
def test_int8_activations_equal_their_oracle(form, every):
  for x, t in cases_of(form, every):
    x = x.at[0].set(0) if len(x) > 1 else x
    y = np.asarray(product(form, x, t, "int8"))
    np.testing.assert_array_equal(y, int8_oracle(x, t))


def check_any_shape(data, largest):
  n, out = (data.draw(st.integers(1, largest)) for _ in range(2))
  batch = data.draw(st.integers(1, 40))
  granularity = data.draw(st.sampled_from(GRANULARITIES))
  zeros = data.draw(st.sampled_from([0.0, 1 / 3, 0.9, 1.0]))
  seed, equal = data.draw(st.integers(0, 99)), data.draw(st.booleans())
  t = weights((n, out), granularity, equal, seed, zeros)
  x = rows_of(batch, n, seed)
  for form in FORMS:
    if not form[1] or (form[0] == "lists" and groups_of(t) > 1):
      continue
    assert_float_product(product(form, x, t), x, dense(t))
    if form[0] == "tiles":
      y = np.asarray(product(form, x, t, "int8"))
      np.testing.assert_array_equal(y, int8_oracle(x, t))


@SETTINGS
@hypothesis.given(data=st.data())
def test_any_shape(data):
  check_any_shape(data, 60)


@pytest.mark.long
@hypothesis.settings(SETTINGS, max_examples=400)
@hypothesis.given(data=st.data())
def test_any_shape_up_to_300(data):
  check_any_shape(data, 300)


@pytest.mark.sample(3)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(1, 1), (37, 21), (64, 16)])
def test_layouts_keep_the_codes(layout, shape):
  t = weights(shape, "outputs", equal=False, zeros=0.5)
  w = prepared_of(t, (0,), layout, "float32")
  assert_same(w.ternary().codes, t.codes)
  np.testing.assert_array_equal(w.dequantize(), t.dequantize())
  assert w.shape == shape
  assert w.dtype == jnp.float32


@pytest.mark.parametrize(("w_p", "w_n"), [(-1.5, 0.25), (0.0, 0.0)])
def test_scales_of_any_sign(w_p, w_n):
  t = weights((40, 20))
  t = Ternary(t.codes, jnp.asarray(w_p), jnp.asarray(w_n))
  x = rows_of(3, 40)
  for form in FORMS:
    assert_float_product(product(form, x, t), x, dense(t))


@pytest.mark.parametrize("value", [np.nan, long(np.inf), long(-np.inf)])
def test_what_is_not_finite_spreads_over_its_row(value):
  # As in a dense product, where zeros meet every input.
  t = weights((40, 20), zeros=0.6)
  x = rows_of(3, 40).at[1, 5].set(value)
  for form in FORMS:
    for activations in ("float32", "int8"):
      if form[0] == "lists" and activations == "int8":
        continue
      y = np.asarray(product(form, x, t, activations))
      assert not np.isfinite(y[1]).any(), form
      assert np.isfinite(y[[0, 2]]).all()
      zero = np.asarray(t.codes)[5] == 0
      assert np.isnan(y[1, zero]).all()


def test_tiny_rows_count_as_zero_in_int8():
  t = weights((40, 20))
  x = jnp.full((2, 40), 1e-39, jnp.float32).at[1].set(1e-30)
  for form in INT8_FORMS:
    y = np.asarray(product(form, x, t, "int8"))
    np.testing.assert_array_equal(y[0], 0)
    np.testing.assert_array_equal(y[1:], int8_oracle(x[1:], t))


def test_rounding_is_to_even():
  # 127 x / 127 is x: halves between two steps.
  x = jnp.asarray([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 63.5]])
  t = Ternary(jnp.eye(8, dtype=jnp.int8), jnp.asarray(1.0), jnp.asarray(1.0))
  for form in INT8_FORMS:
    y = np.asarray(product(form, x, t, "int8"))[0]
    np.testing.assert_allclose(y, [127, 0, 2, 2, 0, -2, -2, 64], rtol=1e-6)


# What dot makes of these.


def prepared(t, activations="float32"):
  return prepare(pack(t), activations)


def both(t):
  return pack(t), prepared(t)


@pytest.mark.parametrize("shape", [(64, 10), long((7, 9)), long((24, 24))])
def test_operators_are_those_of_dense_weights(shape):
  t = weights(shape, "outputs", equal=False)
  x, y = rows_of(3, shape[0]), rows_of(shape[1], 5)
  for w in both(t):
    assert_float_product(x @ w, x, dense(t))
    assert_float_product(np.asarray(x) @ w, x, dense(t))
    assert_float_product((x[0] @ w)[None], x[:1], dense(t))
    assert_float_product((w @ y).T, y.T, dense(t).T)
    assert_float_product((w @ np.asarray(y)).T, y.T, dense(t).T)
    assert_float_product((w @ y[:, 0])[None], y[:, :1].T, dense(t).T)
    assert (w @ jnp.stack([y, y])).shape == (2, shape[0], 5)


@pytest.mark.sample(3)
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("shape", [(64, 10), (48, 3), (7, 16), (320, 8)])
def test_packed_weights_multiply_as_they_are(shape, granularity):
  t = weights(shape, granularity, equal=False)
  x = rows_of(2, shape[0])
  assert_float_product(dot(x, pack(t)), x, dense(t))


@pytest.mark.long
def test_several_axes_of_inputs_and_outputs():
  rng = np.random.default_rng(0)
  codes = jnp.asarray(rng.integers(-1, 2, (4, 6, 10)), jnp.int8)
  w_p = jnp.asarray(rng.uniform(1, 2, (1, 3, 10)), jnp.float32)
  t = Ternary(codes, w_p, 2 * w_p[:, :1, :1])
  w = f64(t.dequantize())
  for inputs, spec in (
    ((0,), "ba,acd->bcd"), ((0, 1), "bac,acd->bd"), ((2,), "bd,acd->bac"),
    ((1,), "bc,acd->bad"), ((1, 2), "bcd,acd->ba"),
  ):  # fmt: skip
    x = rows_of(2, int(np.prod([codes.shape[i] for i in inputs])))
    x = x.reshape(2, *(codes.shape[i] for i in inputs))
    y = dot(x, lay_out(t, inputs, "float32"))
    np.testing.assert_allclose(y, np.einsum(spec, f64(x), w), rtol=1e-5)
    quick = dot(x, lay_out(t, inputs, "int8"))
    np.testing.assert_allclose(quick, y, atol=0.05 * float(jnp.abs(y).max()))
  # Packed weights sum over their first axis.
  y = dot(rows_of(2, 4), pack(t))
  want = np.einsum("ba,acd->bcd", f64(rows_of(2, 4)), w)
  np.testing.assert_allclose(y, want, rtol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, long(jnp.float16)])
def test_half_precision(dtype):
  t = weights((64, 20), "outputs", equal=False)
  t = jax.tree.map(lambda a: a if a.dtype == jnp.int8 else a.astype(dtype), t)
  x = rows_of(3, 64).astype(dtype)
  want = f64(x) @ f64(t.dequantize())
  for w in (*both(t), prepared(t, "int8")):
    y = x @ w
    assert y.dtype == dtype == (x @ t.dequantize()).dtype
    np.testing.assert_allclose(f64(y), want, atol=0.02 * np.abs(want).max())


def test_dtypes_are_those_of_dense_products():
  t = weights((16, 8))
  x = rows_of(2, 16).astype(jnp.bfloat16)
  for w in both(t):
    with pytest.raises(Exception, match="implicit dtype promotion"):
      dot(x, w)
    with jax.numpy_dtype_promotion("standard"):
      assert (x @ w).dtype == jnp.float32
      whole = jnp.arange(32).reshape(2, 16)
      assert_float_product(whole @ w, whole, dense(t))
      y = (1j * x.astype(jnp.complex64)) @ w
      assert_float_product(y.imag, x, dense(t))


def test_double_precision_stays_so():
  with jax.enable_x64(True):
    t = weights((40, 8), "outputs")
    t = Ternary(t.codes, *(w.astype(jnp.float64) for w in (t.w_p, t.w_n)))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 40)))
    for w in both(t):
      y = x @ w
      assert y.dtype == jnp.float64
      np.testing.assert_allclose(y, f64(x) @ dense(t), rtol=1e-14)


@pytest.mark.parametrize("activations", ["float32", "int8"])
def test_empty_products(activations):
  for n, out in ((0, 3), (8, 0), (8, 3)):
    t = Ternary(jnp.zeros((n, out), jnp.int8), jnp.ones(()), jnp.ones(()))
    for batch in ((), (0,), (2, 0)):
      x = jnp.ones((*batch, n))
      y = x @ prepared(t, activations)
      np.testing.assert_array_equal(y, np.zeros((*batch, out)))
  t = weights((8, 3))
  assert (jnp.ones((2, 3, 0, 8)) @ prepared(t, activations)).shape == (
    2,
    3,
    0,
    3,
  )


@pytest.mark.sample(2)
@pytest.mark.parametrize("activations", ["float32", "int8"])
def test_derivatives_are_those_of_dense_products(activations):
  t = weights((40, 12), "outputs", equal=False)
  x, y = rows_of(3, 40), rows_of(3, 12)
  w = prepared(t, activations)
  pull = jax.jit(jax.vjp(dot, x, w)[1])
  dx, dw = pull(y)
  dense_pull = jax.vjp(
    lambda x, w_p, w_n: x @ Ternary(t.codes, w_p, w_n).dequantize(),
    x, t.w_p, t.w_n,
  )[1]  # fmt: skip
  for got, want in zip((dx, dw.w_p, dw.w_n), dense_pull(y), strict=True):
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
  _, pushed = jax.jvp(lambda x: dot(x, w), (x,), (x,))
  np.testing.assert_allclose(pushed, f64(x) @ dense(t), rtol=1e-4, atol=1e-5)
  grads = jax.vmap(jax.grad(lambda x: jnp.sum(dot(x, w))))(x)
  np.testing.assert_allclose(grads[0], dense(t).sum(1), rtol=1e-4, atol=1e-5)


def test_gradients_keep_packed_weights_only():
  w = prepared(weights((256, 256)))
  _, pull = jax.vjp(lambda x: dot(x, w), rows_of(1, 256))
  kept = sum(x.nbytes for x in jax.tree.leaves(pull) if hasattr(x, "nbytes"))
  assert kept < 256 * 256 / 2


@pytest.mark.sample(2)
@pytest.mark.parametrize("activations", ["float32", "int8"])
def test_vmap_scan_and_stacks(activations):
  layers = [weights((24, 24), "outputs", False, seed=i) for i in range(6)]
  stack = jax.tree.map(lambda *a: jnp.stack(a), *layers)
  w = prepare(pack(stack), activations)
  assert w.shape == (6, 24, 24)
  assert w.lead == 1
  one = [prepare(pack(t), activations) for t in layers]
  assert_same(jax.tree.map(lambda a: a[2], w), one[2])
  x = rows_of(5, 24)
  want = [np.asarray(dot(x, y)) for y in one]
  each = jax.jit(jax.vmap(dot, (None, 0)))(x, w)
  np.testing.assert_array_equal(each, want)
  rows = jax.vmap(lambda x: x @ one[0])(x)
  np.testing.assert_allclose(rows, want[0], rtol=1e-5, atol=1e-5)
  pairs = jax.vmap(jax.vmap(dot, (0, None)), (None, 0))(x, w)
  np.testing.assert_allclose(pairs, want, rtol=1e-5, atol=1e-5)
  pairs = jax.vmap(jax.vmap(dot, (None, 0)), (0, None))(x, w)
  np.testing.assert_allclose(
    pairs, np.swapaxes(want, 0, 1), rtol=1e-5, atol=1e-5
  )
  zipped = jax.vmap(dot)(jnp.stack([x] * 6), w)
  np.testing.assert_array_equal(zipped, want)

  def step(x, w):
    return jnp.tanh(x @ w), None

  last, _ = jax.jit(lambda x, w: jax.lax.scan(step, x, w))(x, w)
  for y in one:
    x = jnp.tanh(x @ y)
  np.testing.assert_allclose(last, x, rtol=1e-5, atol=1e-6)


def test_shards_of_outputs():
  mesh = jax.make_mesh((8,), ("out",), axis_types=(AxisType.Auto,))
  t = weights((64, 128), "outputs", equal=False)
  x = rows_of(4, 64)
  sharding = NamedSharding(mesh, PartitionSpec(None, "out"))
  for layout in LAYOUTS:
    w = prepared_of(t, (0,), layout, "float32")
    if layout in ("fields", "words"):
      w = jax.tree.map(lambda a: jax.device_put(a, sharding), w)
    y = jax.jit(dot, out_shardings=sharding)(x, w)
    assert y.sharding == sharding
    assert_float_product(y, x, dense(t))


@pytest.mark.sample(3)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("activations", ["float32", "int8"])
def test_shardings_in_types(monkeypatch, layout, activations):
  if (layout, activations) == ("lists", "int8"):
    pytest.skip("lists are for float activations")
  monkeypatch.setattr(words, "_BLOCK", 16 * 32 * 2)
  mesh = jax.make_mesh((2, 4), ("row", "out"))
  t = weights((64, 32), "outputs", equal=False)
  x = rows_of(4, 64)
  w = prepared_of(t, (0,), layout, activations)
  for rows, out in ((None, "out"), ("row", None), ("row", "out")):
    out = None if layout in NATIVE else out
    spec = PartitionSpec(None, out) if out else PartitionSpec()
    shard = functools.partial(jax.device_put, device=NamedSharding(mesh, spec))
    with jax.set_mesh(mesh):
      y = dot(jax.device_put(x, PartitionSpec(rows)), jax.tree.map(shard, w))
    assert jax.typeof(y).sharding.spec == PartitionSpec(rows, out)
    if activations == "int8":
      np.testing.assert_array_equal(y, int8_oracle(x, t))
    else:
      assert_float_product(y, x, dense(t))


@pytest.mark.parametrize("granularity", ["tensor", long("outputs"), "groups"])
@pytest.mark.parametrize("most", [1, long(16 * 21 * 2), 16 * 21 * 3])
def test_blocks_of_fields(monkeypatch, granularity, most):
  monkeypatch.setattr(words, "_BLOCK", most)
  t = weights((7 * 32, 21), granularity, equal=False, seed=most)
  x = rows_of(3, 7 * 32)
  w = prepared_of(t, (0,), "fields", "float32")
  y = LAYOUTS["fields"].product(x, w.arrays, *w.scales(), w.matrix, int8=False)
  assert_float_product(y, x, dense(t))
