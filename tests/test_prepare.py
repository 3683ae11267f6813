"""Which layouts weights get, and what happens without the native code."""

import json
import logging
import re
import shutil
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tern_jax
from experiments.benchmarks import inference as benchmark
from tern_jax import PackedTernary, ParamTransform, Ternary, __main__, pack
from tern_jax.inference import Prepared, cpu, doctor, dot, preparation, prepare
from tern_jax.inference.sources import digest
from tests.helpers import assert_same


def weights(*shape, zeros=1 / 3, scales=(), seed=0):
  rng = np.random.default_rng(seed)
  p = (1 - zeros) / 2
  codes = jnp.asarray(rng.choice(3, shape, p=[p, zeros, p]) - 1, jnp.int8)
  w_p = jnp.asarray(rng.uniform(0.5, 2, scales), jnp.float32)
  return Ternary(codes, w_p, 2 * w_p)


@pytest.fixture
def native(monkeypatch):
  """As if there was native code, which is not called."""
  monkeypatch.setattr(cpu, "isa", lambda: "avx2")


@pytest.fixture
def no_native(monkeypatch):
  monkeypatch.setattr(cpu, "isa", lambda: None)


@pytest.mark.usefixtures("native")
def test_layouts_by_zeros_and_activations():
  def layout(t, activations="float32", batch=None):
    return prepare(pack(t), activations, batch=batch).layout

  assert layout(weights(64, 64)) == "tiles"
  assert layout(weights(64, 64), "int8") == "tiles"
  sparse = weights(64, 64, zeros=0.93)
  assert layout(sparse) == "lists"
  assert layout(sparse, batch=1) == "tiles"
  assert layout(weights(64, 64, zeros=0.97), batch=1) == "lists"
  assert layout(weights(64, 64, zeros=0.885), batch=64) == "lists"
  assert layout(weights(64, 64, zeros=0.885)) == "tiles"
  assert layout(sparse, "int8") == "tiles"
  assert layout(weights(64, 64, zeros=0.93, scales=(4, 1))) == "tiles"
  traced = jax.jit(lambda t: prepare(pack(t)))(sparse)
  assert traced.layout == "tiles"


@pytest.mark.usefixtures("no_native")
def test_layouts_without_native_code():
  t = weights(64, 64, zeros=0.97)
  assert prepare(pack(t)).layout == "fields"
  assert prepare(pack(t), "int8").layout == "words"


def test_a_tree_keeps_its_structure_and_is_prepared_once():
  rest = {"bias": jnp.ones(3), "step": 3, "none": None}
  tree = {
    "Dense_0": {"kernel": weights(8, 3), **rest},
    "list": [weights(16, 8)],
  }
  packed = pack(tree)
  made = prepare(packed)
  is_node = {"is_leaf": lambda x: isinstance(x, Prepared | PackedTernary)}
  assert jax.tree.structure(made, **is_node) == jax.tree.structure(
    packed, **is_node
  )
  assert made["Dense_0"]["step"] == 3
  kernel = made["Dense_0"]["kernel"]
  assert kernel.shape == (8, 3)
  np.testing.assert_array_equal(
    kernel.dequantize(), tree["Dense_0"]["kernel"].dequantize()
  )
  again = prepare(made)
  assert again["Dense_0"]["kernel"] is kernel
  assert_same(prepare(tree), made)


def test_other_activations_lay_out_anew():
  packed = pack(weights(40, 24, scales=(1, 24)))
  made = prepare(prepare(packed, "int8"))
  assert_same(made, prepare(packed))
  assert_same(prepare(made, "int8"), prepare(packed, "int8"))


def test_attention_and_convolutions():
  tree = {
    "query": {"kernel": weights(64, 4, 16, scales=(1, 4, 16))},
    "key": {"kernel": weights(64, 4, 16)},
    "out": {"kernel": weights(4, 16, 64, scales=(1, 1, 64))},
    "conv": {"kernel": weights(3, 3, 8, 16)},
    "scale": weights(16),
  }
  made = prepare(pack(tree))
  assert made["query"]["kernel"].inputs == (0,)
  assert made["out"]["kernel"].inputs == (0, 1)
  assert isinstance(made["conv"]["kernel"], PackedTernary)
  assert isinstance(made["scale"], PackedTernary)
  x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 64)), jnp.float32)
  heads = dot(x, made["query"]["kernel"])
  assert heads.shape == (2, 4, 16)
  want = jnp.einsum("bi,ihd->bhd", x, tree["query"]["kernel"].dequantize())
  np.testing.assert_allclose(heads, want, rtol=1e-4, atol=1e-4)
  y = dot(heads, made["out"]["kernel"])
  want = jnp.einsum("bhd,hdo->bo", heads, tree["out"]["kernel"].dequantize())
  np.testing.assert_allclose(y, want, rtol=1e-4, atol=1e-3)


@pytest.mark.long
def test_stacks_of_attention():
  shapes = {"query": (3, 64, 4, 16), "out": (3, 4, 16, 64)}
  tree = {
    name: {"kernel": weights(*shape, scales=(3, 1, 1, 1))}
    for name, shape in shapes.items()
  }
  made = prepare(pack(tree))
  query, out = (made[name]["kernel"] for name in ("query", "out"))
  assert (query.lead, query.inputs) == (1, (0,))
  assert (out.lead, out.inputs) == (1, (0, 1))
  x = jnp.ones((2, 64))

  def step(x, layer):
    return dot(dot(x, layer[0]), layer[1]) / 64, None

  y, _ = jax.lax.scan(step, x, (query, out))
  for i in range(3):
    w_q, w_o = (tree[n]["kernel"].dequantize()[i] for n in ("query", "out"))
    x = jnp.einsum("bhd,hdo->bo", jnp.einsum("bi,ihd->bhd", x, w_q), w_o) / 64
  np.testing.assert_allclose(y, x, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("zeros", [1 / 3, 0.95])
def test_stacks_of_unequal_lists(zeros):
  layers = [weights(64, 16, zeros=zeros, seed=i) for i in range(4)]
  stack = prepare(pack(jax.tree.map(lambda *a: jnp.stack(a), *layers)))
  x = jnp.ones((3, 64))
  y = jax.vmap(dot, (None, 0))(x, stack)
  want = [x @ t.dequantize() for t in layers]
  np.testing.assert_allclose(y, want, rtol=1e-5, atol=1e-5)


@pytest.mark.long
def test_weights_take_some_two_bits():
  tree = [weights(784, 300), weights(300, 100), weights(100, 10)]
  for activations in ("float32", "int8"):
    made = prepare(pack(tree), activations)
    assert 8 * sum(w.nbytes for w in made) <= 2.1 * sum(w.size for w in made)


@pytest.mark.long
def test_methods_end_here():
  tern = ParamTransform(tern_jax.SCA(sparsity=0.5))
  kernel = jnp.asarray(np.random.default_rng(0).normal(size=(64, 32)))
  params, state = tern.init({"kernel": kernel.astype(jnp.float32)})
  packed = pack(tern.finalize(params, state))
  w = prepare(packed)["kernel"]
  x = jnp.ones((2, 64))
  want = x @ packed["kernel"].dequantize()
  np.testing.assert_allclose(x @ w, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
  ("call", "error", "says"),
  [
    (lambda: prepare({"kernel": jnp.ones((8, 8))}), ValueError, "no ternary"),
    (lambda: prepare(pack(weights(8, 8)), "int4"), ValueError, "got 'int4'"),
    (lambda: dot(jnp.ones(8), jnp.ones((8, 8))), TypeError, "use x @ w"),
    (
      lambda: dot(jnp.ones((2, 7)), pack(weights(8, 8))),
      ValueError,
      r"\(2, 7\) must end in the inputs of w, \(8,\)",
    ),
    (
      lambda: dot(jnp.ones((2, 7)), prepare(pack(weights(8, 8)))),
      ValueError,
      r"\(2, 7\) must end in the inputs of w, \(8,\)",
    ),
    (lambda: dot(jnp.ones(()), pack(weights(8, 8))), ValueError, "must end in"),
    (
      lambda: dot(
        jnp.ones(8, jnp.complex64), prepare(pack(weights(8, 8)), "int8")
      ),
      TypeError,
      "int8 activations are real",
    ),
    (lambda: jnp.ones(8) @ pack(weights(8)), ValueError, "multiplies by matri"),
    (
      lambda: dot(jnp.ones(8), pack(weights(2, 8, 8, scales=(2, 1, 1)))),
      ValueError,
      "stack one by one",
    ),
    (
      lambda: dot(
        jnp.ones(8), prepare(pack(weights(2, 8, 8, scales=(2, 1, 1))))
      ),
      ValueError,
      "stack one by one",
    ),
    (
      lambda: pack(weights(8, 2, 4)) @ jnp.ones(4),
      ValueError,
      "use tern_jax.inference.dot",
    ),
  ],
)
def test_errors_say_what_to_do(call, error, says):
  with pytest.raises(error, match=says):
    call()


def test_sums_that_overflow_are_refused():
  codes = jnp.zeros((2**23 + 8, 1), jnp.int8)
  t = Ternary(codes, jnp.ones(()), jnp.ones(()))
  with pytest.raises(ValueError, match="8388616 inputs do not fit int32"):
    preparation.lay_out(t, (0,), "int8")


def test_programs_with_weights_can_be_exported():
  w = prepare(pack(weights(64, 32)), "int8")
  checks = [jax.export.DisabledSafetyCheck.custom_call("tern_jax_tiles")]
  x = jnp.ones((2, 64))
  exported = jax.export.export(jax.jit(dot), disabled_checks=checks)(x, w)
  again = jax.export.deserialize(exported.serialize())
  np.testing.assert_array_equal(again.call(x, w), dot(x, w))


def test_latents_are_refused():
  params, _ = ParamTransform(tern_jax.TWN()).init({"kernel": jnp.ones((8, 8))})
  with pytest.raises(TypeError, match="prepare got TernParams"):
    prepare(params)


def test_prints_what_it_is():
  w = prepare(pack(weights(8, 3)), "int8")
  assert re.fullmatch(
    r"Prepared\(float32\[8, 3\], \w+, int8 activations\)", repr(w)
  )


# The native code, or none.


def test_what_is_not_there_is_said_once(monkeypatch, caplog):
  monkeypatch.delenv(cpu.VARIABLE, raising=False)
  monkeypatch.setattr(cpu, "_LIBRARY", cpu._LIBRARY.with_name("none.so"))
  monkeypatch.setattr(cpu, "load", cpu.load.__wrapped__)
  with caplog.at_level(logging.WARNING, "tern_jax"):
    assert cpu.isa.__wrapped__() is None
  (record,) = caplog.records
  assert "was not compiled when tern_jax was installed" in record.getMessage()
  assert "\n" not in record.getMessage()


@pytest.mark.parametrize("runs", [(0, 2), (1, 0)])
def test_a_newer_interface_is_not_registered(monkeypatch, runs):
  if not cpu._LIBRARY.exists():
    pytest.skip("there is no native code here")
  monkeypatch.delenv(cpu.VARIABLE, raising=False)
  monkeypatch.setattr(cpu, "_api_version", lambda: runs)
  with pytest.raises(cpu.UnavailableError, match=f"jaxlib has {runs[0]}"):
    cpu.load.__wrapped__()


def test_a_library_of_other_sources_is_not_used(monkeypatch, tmp_path, caplog):
  if not cpu._LIBRARY.exists():
    pytest.skip("there is no native code here")
  monkeypatch.delenv(cpu.VARIABLE, raising=False)
  monkeypatch.setattr(cpu, "load", cpu.load.__wrapped__)
  library = tmp_path / "_kernels.so"
  library.symlink_to(cpu._LIBRARY)  # A copy could not be registered, too.
  sources = tmp_path / "csrc"
  shutil.copytree(cpu._LIBRARY.with_name("csrc"), sources)
  monkeypatch.setattr(cpu, "_LIBRARY", library)
  assert cpu.load() in cpu.ISAS
  with (sources / "lists.inc").open("a") as file:
    file.write("// Changed.\n")
  with caplog.at_level(logging.WARNING, "tern_jax"):
    assert cpu.isa.__wrapped__() is None
  (record,) = caplog.records
  assert f"not compiled from the sources in {sources}" in record.getMessage()
  # Wheels have no sources.
  shutil.rmtree(sources)
  assert cpu.load() in cpu.ISAS


def test_a_digest_is_that_of_names_and_contents(tmp_path):
  def found(**files):
    folder = tmp_path / str(len(list(tmp_path.iterdir())))
    folder.mkdir()
    for name, text in files.items():
      (folder / name.replace("_", ".")).write_text(text)
    return digest(folder)

  same = found(a_cc="x", b_h="y")
  assert same == found(b_h="y", a_cc="x", c_txt="z")
  others = [
    found(a_cc="x", b_h="z"), found(a_cc="x", c_h="y"), found(a_cc="x"),
    found(a_cc="y", b_h="x"), found(a_cc="x", b_h="y", c_inc=""), found(),
  ]  # fmt: skip
  assert len({same, *others}) == 7


def test_jaxlib_says_its_interface():
  assert (0, 3) <= cpu._api_version() < (1, 0)


def test_the_variable(monkeypatch, caplog):
  monkeypatch.setattr(cpu, "load", cpu.load.__wrapped__)
  monkeypatch.setenv(cpu.VARIABLE, "off")
  assert cpu.isa.__wrapped__() is None
  assert not caplog.records
  monkeypatch.setenv(cpu.VARIABLE, "sse9")
  with pytest.raises(ValueError, match="avx512, avx2, neon, off, got 'sse9'"):
    cpu.isa.__wrapped__()


def test_a_library_that_is_none(monkeypatch, tmp_path):
  (tmp_path / "_kernels.so").write_bytes(b"no library")
  monkeypatch.delenv(cpu.VARIABLE, raising=False)
  monkeypatch.setattr(cpu, "_LIBRARY", tmp_path / "_kernels.so")
  with pytest.raises(cpu.UnavailableError, match="cannot be loaded"):
    cpu.load.__wrapped__()


@pytest.mark.long
@pytest.mark.usefixtures("no_native")
def test_native_layouts_work_without_native_code():
  t = weights(40, 24, scales=(1, 24))
  x = jnp.ones((2, 40))
  want = x @ t.dequantize()
  for layout in ("tiles", "lists"):
    w = preparation.prepared_of(t, (0,), layout, "float32")
    # Not jitted: what was compiled with native code may be cached.
    with jax.disable_jit():
      np.testing.assert_allclose(dot(x, w), want, rtol=1e-5, atol=1e-5)


def test_other_platforms_get_no_custom_call():
  w = jax.eval_shape(lambda t: prepare(pack(t)), weights(64, 64))
  x = jax.ShapeDtypeStruct((2, 64), jnp.float32)
  exported = jax.export.export(jax.jit(dot), platforms=("tpu",))(x, w)
  assert "@tern_jax_tiles" not in exported.mlir_module()


def test_the_doctor_says_what_is_used():
  found = doctor.examine(64, (1, 2))
  assert json.loads(json.dumps(found)) == found
  text = "\n".join(doctor.lines(found))
  assert re.search(r"^platform: cpu", text)
  assert re.search(r"^native code: (used|not used), ", text, re.MULTILINE)
  assert text.count("times as fast as float weights") == 4
  assert text.count("2.02 bits a weight") == 4
  assert text.count("\nint8 activations, [2, 64] @ [64, 64]: ") == 1


def test_the_command(capsys):
  assert __main__.main(["doctor", "--json"]) == 0
  found = json.loads(capsys.readouterr().out)
  assert found["platform"] == jax.default_backend()
  assert [x["activations"] for x in found["products"]] == [
    *("float32", "float32", "int8", "int8")
  ]


def test_the_benchmark_has_a_figure_for_each_form():
  options = benchmark.InferenceOptions(rounds=1, turn=0, two=True)
  found = benchmark.ratios(options, 64, 2, time.perf_counter)
  assert {"", "xla float32", "xla int8"} <= {*found}
  assert ("lists 98 %" in found) == (cpu.isa() is not None)
  assert all(x > 0 for x in found.values())
