"""What artefacts with packed weights compute, and what they call."""

import functools
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tern_jax import Ternary, pack
from tern_jax.export import to_stablehlo
from tern_jax.inference import apply_fn, cpu, prepare
from tests.helpers import f64, long

ROOT = pathlib.Path(__file__).parents[1]
needs_native = pytest.mark.skipif(
  cpu.isa() is None, reason="there is no native code here"
)


def weights(*shape, scales=(), seed=0, zeros=1 / 3):
  rng = np.random.default_rng(seed)
  p = (1 - zeros) / 2
  codes = jnp.asarray(rng.choice(3, shape, p=[p, zeros, p]) - 1, jnp.int8)
  w_p, w_n = rng.uniform(0.5, 2, (2, *scales))
  return Ternary(
    codes, jnp.asarray(w_p, jnp.float32), jnp.asarray(w_n, jnp.float32)
  )


def floats(*shape, seed=0):
  x = np.random.default_rng(seed).normal(size=shape)
  return jnp.asarray(x, jnp.float32)


def read(data):
  return jax.export.deserialize(bytearray(data))


def product(params, x):
  return x @ params["w"]


def looked_up(params, x):
  return params["table"][x] @ params["table"].T


def convolved(params, x):
  y = jax.lax.conv_general_dilated(
    x,
    params["conv"],
    (1, 1),
    "SAME",
    dimension_numbers=("NHWC", "HWIO", "NHWC"),
  )
  return y.reshape(x.shape[0], -1) @ params["w"]


def scanned(params, x):
  def step(x, w):
    return jax.nn.relu(x @ w) / 8, None

  return jax.lax.scan(step, x, params["layers"])[0]


#: A function, its ternary weights, and an example of its input.
MODELS = {
  "product": (product, {"w": weights(40, 24)}, floats(2, 40)),
  "groups": (
    lambda p, x: x @ p["w"] + p["b"],
    {"w": weights(64, 24, scales=(4, 24)), "b": jnp.ones((1, 24))},
    floats(2, 64),
  ),
  "[out, in]": (
    lambda p, x: x @ p["w"].T,
    {"w": weights(24, 40, scales=(24, 1))},
    floats(2, 40),
  ),
  "a set and a text": (
    lambda p, x: x @ p["w"] if p["on"] in p["all"] else x,
    {"w": weights(40, 24), "on": "yes", "all": {"yes"}},
    floats(2, 40),
  ),
  "used otherwise": (
    lambda p, x: x @ jnp.tanh(p["w"]),
    {"w": weights(40, 24)},
    floats(2, 40),
  ),
  "tied": (looked_up, {"table": weights(32, 16)}, jnp.arange(6).reshape(2, 3)),
  "convolution": (
    convolved,
    {"conv": weights(3, 3, 2, 8), "w": weights(128, 4)},
    floats(2, 4, 4, 2),
  ),
  "stack": (
    scanned,
    {"layers": weights(3, 16, 16, scales=(3, 1, 1))},
    floats(2, 16),
  ),
}


def dense_of(tree):
  def is_ternary(x):
    return isinstance(x, Ternary)

  return jax.tree.map(
    lambda x: x.dequantize() if is_ternary(x) else x, tree, is_leaf=is_ternary
  )


@pytest.mark.sample(6)
@pytest.mark.parametrize(
  "native", [False, pytest.param(True, marks=needs_native)]
)
@pytest.mark.parametrize("name", MODELS)
def test_outputs_are_those_of_dense_weights(name, native):
  model, tree, x = MODELS[name]
  net = read(to_stablehlo(None, model, pack(tree), x, native=native))
  assert net.in_avals[0].shape[0] != len(x)
  want = f64(model(dense_of(tree), x))
  np.testing.assert_allclose(
    net.call(x), want, rtol=1e-6, atol=1e-6 * np.abs(want).max()
  )


@pytest.mark.parametrize("most", [2**19, long(16 * 24)])
def test_batches_of_all_sizes(most, monkeypatch):
  monkeypatch.setattr("tern_jax.inference.words._BLOCK", most)
  t = weights(88, 24, scales=(1, 24))
  net = read(to_stablehlo(None, lambda w, x: x @ w, pack(t), floats(1, 88)))
  for batch in (1, 3, 200):
    x = floats(batch, 88, seed=batch)
    error = np.abs(f64(net.call(x)) - f64(x) @ f64(t.dequantize()))
    most = np.abs(f64(x)) @ np.abs(f64(t.dequantize()))
    assert np.all(error <= 1e-6 * most)


def test_a_float_model_stays_one():
  params = {"w": floats(8, 3), "name": "net"}

  def model(p, x):
    return x @ p["w"] if p["name"] == "net" else x

  x = floats(2, 8)
  net = read(to_stablehlo(None, model, params, x))
  np.testing.assert_array_equal(
    net.call(x), jax.jit(lambda x: x @ params["w"])(x)
  )


def test_int8_activations_stay_so():
  t = weights(64, 24, scales=(1, 24))
  x = floats(2, 64)
  ready = prepare({"w": pack(t)}, "int8")
  want = apply_fn(product)(ready, x)
  forms = [False] if cpu.isa() is None else [False, True]
  for native in forms:
    net = read(to_stablehlo(None, product, ready, x, native=native))
    np.testing.assert_array_equal(net.call(x), want)
    assert ("@tern_jax_tiles" in net.mlir_module()) == native


@pytest.mark.parametrize("zeros", [long(1 / 3), 0.95])
def test_no_other_library_is_called(zeros):
  tree = {"w": weights(64, 24, zeros=zeros), "v": weights(24, 8)}

  def model(p, x):
    return x @ p["w"] @ p["v"]

  shape, x = jax.ShapeDtypeStruct((2, 64), jnp.float32), floats(2, 64)
  net = read(to_stablehlo(None, model, pack(tree), shape))
  assert "custom_call" not in net.mlir_module()
  ready = apply_fn(model).prepare(pack(tree), x)
  again = read(to_stablehlo(None, model, ready, shape))
  assert "custom_call" not in again.mlir_module()
  np.testing.assert_array_equal(again.call(x), net.call(x))


READER = """
import sys
import jax, numpy as np
{first}
with open(sys.argv[1], "rb") as file:
  net = jax.export.deserialize(bytearray(file.read()))
with np.load(sys.argv[2]) as given:
  np.testing.assert_array_equal(net.call(given["x"]), given["y"])
"""


def reads(tmp_path, data, x, y, first="", variable=""):
  """Runs an artefact in another process; returns what that says."""
  (tmp_path / "net").write_bytes(data)
  np.savez(tmp_path / "given.npz", x=x, y=y)
  program = READER.format(first=first)
  arguments = tmp_path / "net", tmp_path / "given.npz"
  done = subprocess.run(
    [sys.executable, "-c", program, *map(str, arguments)],
    capture_output=True,
    text=True,
    timeout=120,
    env=os.environ | {"PYTHONPATH": str(ROOT), cpu.VARIABLE: variable},
    check=False,
  )
  return done.stderr


@pytest.mark.long
@needs_native
def test_native_code_is_there_once_tern_jax_is_imported(tmp_path):
  x, tree = floats(2, 64), prepare({"w": pack(weights(64, 24))}, "int8")
  data = to_stablehlo(None, product, tree, x, native=True)
  run = functools.partial(reads, tmp_path, data, x, x @ tree["w"])
  assert "tern_jax_tiles" in run()
  assert not run("import tern_jax")
  if cpu.isa() == "avx512":
    # Not the instruction set of the machine that wrote it.
    assert not run("import tern_jax", "avx2")
  # What it was told is wrong is said by products of its own only.
  assert "tern_jax_tiles" in run("import tern_jax", "off")


def test_what_has_no_native_code_is_refused(monkeypatch):
  call = functools.partial(
    to_stablehlo, None, lambda w, x: x @ w, pack(weights(8, 3)), floats(2, 8)
  )
  with pytest.raises(ValueError, match=r"for CPUs, got platforms=\('tpu',\)"):
    call(platforms=("tpu",), native=True)
  monkeypatch.setattr(cpu, "load", cpu.load.__wrapped__)
  monkeypatch.setenv(cpu.VARIABLE, "off")
  with pytest.raises(ValueError, match="native code of tern_jax: TERN_JAX_CPU"):
    call(native=True)
