import itertools
import json
import shutil
import zlib
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from tern_jax import checkpoint
from tern_jax.base import Ternary, TernParams
from tern_jax.checkpoint import (
  Checkpointer,
  CheckpointError,
  load_packed,
  read_spec,
  save_packed,
)
from tern_jax.packed import pack


def ternary(shape, dtype=jnp.float32, scale_shape=(), seed=0):
  rng = np.random.default_rng(seed)
  codes = jnp.asarray(rng.integers(-1, 2, shape).astype(np.int8))
  w_p, w_n = jnp.asarray(rng.uniform(0.1, 1, (2, *scale_shape)), dtype)
  return Ternary(codes, w_p, w_n)


def net(sizes=(64, 64, 64, 10)):
  """A packed MLP."""
  return {
    f"Dense_{i}": {
      "kernel": pack(ternary((a, b), seed=i)),
      "bias": jnp.linspace(0, 1, b),
    }
    for i, (a, b) in enumerate(itertools.pairwise(sizes))
  }


def raw(x):
  if jnp.issubdtype(getattr(x, "dtype", int), jax.dtypes.prng_key):
    x = jax.random.key_data(x)
  return np.asarray(x).dtype.name, np.shape(x), np.asarray(x).tobytes()


def assert_same(a, b):
  """Same structure, static fields included, and the same bits."""
  assert jax.tree.structure(a) == jax.tree.structure(b)
  assert [raw(x) for x in jax.tree.leaves(a)] == [
    raw(x) for x in jax.tree.leaves(b)
  ]


# Packed weights alone.


def test_weights_come_back_without_model_code(tmp_path):
  tree = net()
  save_packed(tmp_path / "net", tree, method="TWN()")
  assert_same(load_packed(tmp_path / "net"), tree)
  spec = read_spec(str(tmp_path / "net"))
  assert spec["selected"] == [f"Dense_{i}/kernel" for i in range(3)]
  assert (spec["format"], spec["method"]) == (1, "TWN()")
  assert spec["versions"]["jax"] == jax.__version__
  bias, kernel = spec["leaves"]["packed"][:2]
  assert (bias["path"], bias["kind"]) == (["Dense_0", "bias"], "dense")
  assert bias["crc32"] == zlib.crc32(np.asarray(tree["Dense_0"]["bias"]))
  planes = tree["Dense_0"]["kernel"]
  fields = (planes.nonzero, planes.sign, planes.w_n, planes.w_p)
  assert kernel["crc32"] == zlib.crc32(
    b"".join(np.asarray(x).tobytes() for x in fields)
  )
  assert (kernel["shape"], kernel["dtype"]) == ([64, 64], "float32")
  assert kernel["arrays"]["w_p"] == {"shape": [], "dtype": "float32"}


def test_a_small_net_costs_little_more_than_its_bits(tmp_path):
  tree = net()
  save_packed(tmp_path / "net", tree)
  assert sum(x.nbytes for x in jax.tree.leaves(tree)) < 3000
  # The spec is this package's own part of the file. How often orbax repeats
  # its indexes beside it differs between two saves of the same tree.
  assert (tmp_path / "net" / "spec" / "data.json").stat().st_size < 3000


@pytest.mark.parametrize("shape", [(), (0,), (7,), (0, 8), (3, 5), (2, 3, 16)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_shapes_and_scale_dtypes(tmp_path, shape, dtype):
  tree = [pack(ternary(shape, dtype, scale_shape=(1,) * len(shape)))]
  save_packed(tmp_path / "net", tree)
  assert_same(load_packed(tmp_path / "net", like=tree), tree)


def test_dense_leaves_of_any_dtype(tmp_path):
  names = [
    "bool",
    "int8",
    "uint8",
    "int16",
    "int32",
    "uint32",
    "float16",
    "bfloat16",
    "float32",
    "complex64",
    "float8_e4m3fn",
    "int4",
  ]
  tree = {n: jnp.arange(6).reshape(2, 3).astype(n) for n in names}
  tree |= {"big_endian": np.arange(3, dtype=">f4"), "0-d": jnp.float32(2)}
  tree |= {"empty": jnp.zeros((0, 3)), "number": 3, "inf": jnp.array(-jnp.inf)}
  save_packed(tmp_path / "net", tree)
  tree["big_endian"] = jnp.arange(3.0)
  tree["number"] = jnp.array(3)
  assert_same(load_packed(tmp_path / "net"), tree)


@pytest.mark.parametrize("tree", [{}, jnp.arange(3.0), pack(ternary((8, 2)))])
def test_a_tree_may_be_one_leaf_or_none(tmp_path, tree):
  save_packed(tmp_path / "net", tree)
  assert_same(load_packed(tmp_path / "net"), tree)
  assert_same(load_packed(tmp_path / "net", like=tree), tree)


def test_keys_with_slashes_and_numbers_survive(tmp_path):
  kernel = pack(ternary((16, 4)))
  tree = {"mlp/~/linear_0": {"w": kernel}, "mlp": {"~/linear_0": jnp.ones(3)}}
  tree |= {"a.b": [jnp.zeros(1), {7: jnp.ones(1), 11: jnp.ones(2)}], "ö ": 1.0}
  save_packed(tmp_path / "net", tree)
  loaded = load_packed(tmp_path / "net")
  assert_same(loaded["mlp/~/linear_0"]["w"], kernel)
  np.testing.assert_array_equal(loaded["mlp"]["~/linear_0"], np.ones(3))
  np.testing.assert_array_equal(loaded["a.b"]["1"]["11"], np.ones(2))
  like = load_packed(tmp_path / "net", like=tree)
  assert_same(like, jax.tree.map(jnp.asarray, tree))


class Model(eqx.Module):
  layers: list
  activation: object
  name: str = eqx.field(static=True)


def test_the_structure_of_like_is_kept(tmp_path):
  weights = ternary((16, 4))
  model = Model([weights, jnp.ones(4)], None, "m")
  packed = pack(model)
  save_packed(tmp_path / "net", packed)
  shapes = jax.eval_shape(pack, model)
  dense = Model([jnp.zeros((16, 4)), jnp.zeros(4)], None, "m")
  for like in (packed, model, shapes, dense):
    assert_same(load_packed(tmp_path / "net", like=like), packed)
  # Functions among the leaves are no business of a checkpoint.
  whole = load_packed(tmp_path / "net", Model(dense.layers, jnp.tanh, "m"))
  assert whole.activation is jnp.tanh


def test_a_misfit_lists_every_leaf(tmp_path):
  save_packed(tmp_path / "net", net((16, 8)))
  like = {
    "Dense_0": {"bias": ternary((8,)), "kernel": jnp.zeros((16, 9))},
    "head": jnp.zeros(1),
  }
  with pytest.raises(CheckpointError) as e:
    load_packed(tmp_path / "net", like=like)
  message = str(e.value)
  assert "head is not stored" in message
  assert (
    "Dense_0/kernel is stored as ternary float32[16, 8], "
    "but in the tree it is ternary float32[16, 9]"
  ) in message
  assert "Dense_0/bias is stored as dense" in message
  with pytest.raises(CheckpointError, match="Dense_0/bias is stored, but not"):
    load_packed(
      tmp_path / "net", like={"Dense_0": {"kernel": ternary((16, 8))}}
    )


def test_loading_goes_to_the_devices_of_like(tmp_path):
  mesh = jax.make_mesh((8,), ("d",), (AxisType.Auto,))
  split = NamedSharding(mesh, PartitionSpec(None, "d"))
  tree = {
    "k": pack(jax.device_put(ternary((64, 16), scale_shape=(1, 16)), split))
  }
  save_packed(tmp_path / "net", tree)
  loaded = load_packed(tmp_path / "net", like=tree)["k"]
  assert loaded.sign.sharding.is_equivalent_to(split, 2)
  assert_same(loaded, tree["k"])
  assert_same(load_packed(tmp_path / "net"), tree)


def test_wide_dtypes_are_not_narrowed_silently(tmp_path):
  save_packed(tmp_path / "net", {"w": np.arange(3, dtype=np.float64)})
  with pytest.raises(CheckpointError, match="set jax_enable_x64"):
    load_packed(tmp_path / "net")
  with jax.enable_x64(True):
    assert load_packed(tmp_path / "net")["w"].dtype == np.float64


def test_a_spec_is_a_function_of_the_tree(tmp_path):
  for name in "ab":
    save_packed(tmp_path / name, net((16, 8)))
  assert read_spec(tmp_path / "a") == read_spec(tmp_path / "b")


# What cannot be written.


def test_bad_arguments(tmp_path):
  with pytest.raises(
    ValueError, match=r"one of \('planes', 'entropy'\), got 'zip'"
  ):
    save_packed(tmp_path / "net", {}, codec="zip")
  with pytest.raises(TypeError, match=r"a/0 is a Ternary: call tern_jax\.pack"):
    save_packed(tmp_path / "net", {"a": [ternary((8,))]})
  with pytest.raises(TypeError, match=r"f: leaves must be arrays .* function"):
    save_packed(tmp_path / "net", {"f": lambda x: x})
  with pytest.raises(TypeError, match="s: cannot save an array of dtype <U1"):
    save_packed(tmp_path / "net", {"s": np.array(["x"])})
  bad = pack(ternary((8,)))
  object.__setattr__(bad, "sign", jnp.full(1, 255, jnp.uint8))
  with pytest.raises(ValueError, match=r"k: .* sign bits are set"):
    save_packed(tmp_path / "net", {"k": bad})
  with pytest.raises(ValueError, match="save_interval must be at least 1"):
    Checkpointer(tmp_path / "run", save_interval=0)
  assert not list(tmp_path.iterdir())


def test_nothing_is_overwritten_unasked(tmp_path):
  old, new = net((16, 8)), net((8, 8))
  save_packed(tmp_path / "net", old)
  with pytest.raises(CheckpointError, match="already exists: pass overwrite"):
    save_packed(tmp_path / "net", new)
  assert_same(load_packed(tmp_path / "net"), old)
  save_packed(tmp_path / "net", new, overwrite=True)
  assert_same(load_packed(tmp_path / "net"), new)
  save_packed(tmp_path / "other", old, overwrite=True)
  assert sorted(p.name for p in tmp_path.iterdir()) == ["net", "other"]


def test_only_checkpoints_are_overwritten(tmp_path):
  precious = tmp_path / "precious"
  precious.mkdir()
  (precious / "thesis").write_text("x")
  for path in (precious, precious / "thesis"):
    with pytest.raises(CheckpointError, match="is not a checkpoint"):
      save_packed(path, net((8, 8)), overwrite=True)
  assert (precious / "thesis").read_text() == "x"


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_failed_save_leaves_nothing_and_loses_nothing(
  tmp_path, monkeypatch, overwrite
):
  path = tmp_path / "net"
  if overwrite:
    save_packed(path, net((16, 8)))

  def fail(*args, **kwargs):
    (tmp_path / "net.orbax-checkpoint-tmp").mkdir()
    raise OSError("No space left on device")

  if not overwrite:
    monkeypatch.setattr(checkpoint.ocp, "save_checkpointables", fail)
  else:
    monkeypatch.setattr(checkpoint, "_swap", lambda *_: fail())
  with pytest.raises(CheckpointError, match=r"cannot save .*No space left"):
    save_packed(path, net((8, 8)), overwrite=overwrite)
  if overwrite:
    assert_same(load_packed(path), net((16, 8)))
    monkeypatch.undo()
    save_packed(path, net((8, 8)), overwrite=True)
    assert_same(load_packed(path), net((8, 8)))
  else:
    assert not list(tmp_path.iterdir())


def test_paths_that_cannot_be(tmp_path):
  (tmp_path / "file").write_text("x")
  with pytest.raises(CheckpointError, match="cannot save"):
    save_packed(tmp_path / "file" / "net", net((8, 8)))
  with pytest.raises(CheckpointError, match="cannot open"):
    Checkpointer(tmp_path / "file" / "run")
  with pytest.raises(CheckpointError, match="does not exist"):
    load_packed(tmp_path / "nothing")
  with pytest.raises(CheckpointError, match="is a file"):
    load_packed(tmp_path / "file")
  with pytest.raises(CheckpointError, match="its spec is missing"):
    load_packed(tmp_path)


# Damage.


def reseal(path, change):
  """Changes a spec and makes its crc32 right again."""
  file = path / "spec" / "data.json"
  spec = json.loads(file.read_text())["spec"]
  change(spec)
  crc = zlib.crc32(json.dumps(spec, sort_keys=True).encode())
  file.write_text(json.dumps({"crc32": crc, "spec": spec}))


def leaf(spec):
  return spec["leaves"]["packed"][1]


@pytest.mark.parametrize(
  ("change", "match"),
  [
    (lambda s: s.update(format=2), "has format 2, .* upgrade"),
    (lambda s: s.update(format="x"), "cannot read the spec"),
    (lambda s: s.update(codec="zip"), "has codec 'zip', .* upgrade"),
    (lambda s: s.pop("leaves"), "KeyError"),
    (
      lambda s: leaf(s)["arrays"]["sign"].update(shape=[10**9, 10**9]),
      "Dense_0/kernel is damaged: its arrays are not",
    ),
    (lambda s: leaf(s).update(shape=[10**9, 8]), "Dense_0/kernel: .*nonzero"),
    (lambda s: leaf(s).update(crc32=0), "Dense_0/kernel is damaged: its crc32"),
    (lambda s: leaf(s).update(axis=1), "Dense_0/kernel: axis must be 0"),
    (lambda s: leaf(s).update(kind="other"), "cannot read .* 'value'"),
    (
      lambda s: s["leaves"]["packed"].append(
        {**leaf(s), "path": ["Dense_0", "more"]}
      ),
      "Dense_0/more is damaged",
    ),
  ],
)
def test_a_false_spec_is_not_believed(tmp_path, change, match):
  save_packed(tmp_path / "net", net((16, 8)))
  reseal(tmp_path / "net", change)
  with pytest.raises(CheckpointError, match=match):
    load_packed(tmp_path / "net")


def test_a_future_format_and_bad_json_are_explained(tmp_path):
  save_packed(tmp_path / "net", net((8, 8)))
  file = tmp_path / "net" / "spec" / "data.json"
  text = file.read_text()
  file.write_text(text.replace('"format": 1', '"format": 0'))
  with pytest.raises(CheckpointError, match="the spec is damaged"):
    load_packed(tmp_path / "net")
  file.write_text(text[:-9])
  with pytest.raises(CheckpointError, match="JSONDecodeError") as e:
    load_packed(tmp_path / "net")
  assert isinstance(e.value.__cause__, json.JSONDecodeError)


def damages(data, rng):
  """Yields damaged versions of a file, None where it is deleted."""
  yield None
  if data:
    yield b""
    yield data[: len(data) // 2]
    yield data[:-1]
    for at in rng.choice(len(data), min(len(data), 5), replace=False):
      flipped = bytearray(data)
      flipped[at] ^= 1 << int(rng.integers(8))
      yield bytes(flipped)


# Orbax abandons coroutines where it finds damage.
@pytest.mark.filterwarnings(
  "ignore::pytest.PytestUnraisableExceptionWarning",
  "ignore:coroutine .* was never awaited:RuntimeWarning",
)
def test_damage_is_noticed_or_harmless(tmp_path):
  """Every file, flipped, cut and deleted: an error or the right bits."""
  rng = np.random.default_rng(0)
  state = {"w": jnp.arange(300.0), "n": jnp.arange(3)}
  packed = {"k": pack(ternary((64, 8), scale_shape=(1, 8)))}
  with Checkpointer(tmp_path / "run") as run:
    run.save(3, state, packed, extra={"epoch": 1})
  noticed = tried = 0
  for file in sorted(p for p in (tmp_path / "run").rglob("*") if p.is_file()):
    data = file.read_bytes()
    for damaged in damages(data, rng):
      file.unlink(missing_ok=True)
      if damaged is not None:
        file.write_bytes(damaged)
      for load, wanted in (
        (lambda: load_packed(tmp_path / "run"), packed),
        (lambda: run.restore(state)[:2], (state, {"epoch": 1})),
      ):
        tried += 1
        try:
          loaded = load()
        except CheckpointError:
          noticed += 1
        else:
          assert_same(loaded, wanted)
    file.write_bytes(data)
  assert tried > 150
  assert noticed > 40


# Training runs.


class Loop(NamedTuple):
  step: jax.Array
  params: TernParams
  opt: optax.OptState
  key: jax.Array


TX = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-2))


def start():
  key = jax.random.key(0)
  latent = {"w": jax.random.normal(key, (16, 8)), "b": jnp.zeros(8)}
  params = TernParams(latent, {"w": {"w_p": jnp.ones(())}})
  return Loop(jnp.array(0), params, TX.init(params), key)


@jax.jit
def train(s):
  def loss_fn(p):
    x = jax.random.normal(jax.random.fold_in(s.key, s.step), (32, 16))
    w = p.latent["w"] * p.scales["w"]["w_p"]
    return jnp.mean((x @ w + p.latent["b"] - x[:, :8]) ** 2)

  loss, grads = jax.value_and_grad(loss_fn)(s.params)
  updates, opt = TX.update(grads, s.opt)
  params = optax.apply_updates(s.params, updates)
  return Loop(s.step + 1, params, opt, s.key), loss


def packed_of(s):
  codes = jnp.sign(jnp.round(s.params.latent["w"])).astype(jnp.int8)
  w_p = s.params.scales["w"]["w_p"]
  return {"w": pack(Ternary(codes, w_p, w_p)), "b": s.params.latent["b"]}


@pytest.fixture(scope="module")
def uninterrupted():
  """State and loss after each of 12 steps."""
  with jax.numpy_dtype_promotion("standard"):
    states = [(start(), None)]
    for _ in range(12):
      states.append(train(states[-1][0]))
    return states


@pytest.mark.parametrize("like", ["concrete", "shapes"])
@pytest.mark.usefixtures("standard_promotion")
def test_a_resumed_run_is_the_same_bit_for_bit(tmp_path, uninterrupted, like):
  with Checkpointer(tmp_path / "run", save_interval=3, keep=2) as run:
    assert run.latest_step() is None
    for i, (state, _) in enumerate(uninterrupted[:8]):
      saved = run.save(
        i, state, packed_of(state), extra={"epoch": i}, method="TWN()"
      )
      assert saved == (i % 3 == 0)
  like = start() if like == "concrete" else jax.eval_shape(start)
  with Checkpointer(tmp_path / "run", save_interval=3) as run:
    assert run.latest_step() == 6
    state, extra, step = run.restore(like)
    assert (extra, step) == ({"epoch": 6}, 6)
    assert_same(state, uninterrupted[6][0])
    for wanted in uninterrupted[7:]:
      state, loss = train(state)
      assert_same((state, loss), wanted)
    older, _, step = run.restore(like, step=3)
    assert step == 3
    assert_same(older, uninterrupted[3][0])


def test_any_step_can_be_deployed(tmp_path, uninterrupted):
  wanted = {i: packed_of(uninterrupted[i][0]) for i in (2, 4)}
  with Checkpointer(tmp_path / "run") as run:
    for i, packed in wanted.items():
      run.save(i, uninterrupted[i][0], packed, method="TWN()")
  # What a killed process leaves behind.
  shutil.copytree(tmp_path / "run/4", tmp_path / "run/5.orbax-checkpoint-tmp")
  assert_same(load_packed(tmp_path / "run"), wanted[4])
  assert_same(load_packed(tmp_path / "run" / "2"), wanted[2])
  assert read_spec(tmp_path / "run")["method"] == "TWN()"
  with Checkpointer(tmp_path / "run") as run:
    assert run.latest_step() == 4
    assert run.save(5, uninterrupted[5][0], wanted[2])
    assert_same(run.restore(start())[0], uninterrupted[5][0])
  assert_same(load_packed(tmp_path / "run"), wanted[2])
  save_packed(tmp_path / "alone", wanted[4], method="TWN()")
  alone, step = read_spec(tmp_path / "alone"), read_spec(tmp_path / "run" / "4")
  assert alone["leaves"]["packed"] == step["leaves"]["packed"]


def test_steps_only_grow(tmp_path):
  state = {"w": jnp.zeros(3)}
  with Checkpointer(tmp_path, save_interval=5) as run:
    assert run.save(5, state, {})
    assert not run.save(5, {"w": jnp.ones(3)}, {}, force=True)
    assert not run.save(7, state, {})
    assert run.save(7, state, {}, force=True)
    with pytest.raises(CheckpointError, match="step 7 is saved already"):
      run.save(6, state, {})
    with pytest.raises(TypeError, match="extra must be a JSON value"):
      run.save(10, state, {}, extra={"position": np.zeros(3)})
    assert run.latest_step() == 7
    np.testing.assert_array_equal(run.restore(state, 5)[0]["w"], np.zeros(3))


def test_a_state_of_another_shape_is_refused(tmp_path):
  state = {"w": jnp.zeros((4, 3)), "n": jnp.array(1)}
  with Checkpointer(tmp_path / "run") as run:
    run.save(0, state, {})
    for wrong, match in (
      ({"w": jnp.zeros((3, 4))}, r"w is stored as .*\[4, 3\], but .*\[3, 4\]"),
      ({"w": jnp.zeros((4, 3), jnp.bfloat16)}, "but .* bfloat16"),
      ({"v": jnp.zeros(1)}, "v is not stored"),
    ):
      with pytest.raises(CheckpointError, match=match):
        run.restore(state | wrong)
    with pytest.raises(CheckpointError, match="does not exist"):
      run.restore(state, step=9)
  save_packed(tmp_path / "net", {})
  (tmp_path / "net").rename(tmp_path / "run" / "1")
  with pytest.raises(
    CheckpointError, match="has packed weights only, no state"
  ):
    Checkpointer(tmp_path / "run").restore(state)


def test_an_empty_run_says_so(tmp_path):
  with (
    Checkpointer(tmp_path) as run,
    pytest.raises(CheckpointError, match="holds no checkpoint"),
  ):
    run.restore({})


@pytest.mark.parametrize(("before", "after"), [(8, 1), (1, 8), (8, 4)])
def test_a_run_moves_to_other_devices(tmp_path, uninterrupted, before, after):
  def sharded(n):
    mesh = jax.make_mesh(
      (n,), ("d",), (AxisType.Auto,), devices=jax.devices()[:n]
    )

    def put(x):
      rows = x.ndim == 2 and x.shape[0] % n == 0
      spec = PartitionSpec("d") if rows else PartitionSpec()
      return jax.device_put(x, NamedSharding(mesh, spec))

    return jax.tree.map(put, uninterrupted[5][0])

  state, like = sharded(before), sharded(after)
  with Checkpointer(tmp_path) as run:
    run.save(5, state, packed_of(state))
    restored = run.restore(like)[0]
  assert_same(restored, state)
  for x, y in zip(*map(jax.tree.leaves, (restored, like)), strict=True):
    assert x.sharding.is_equivalent_to(y.sharding, x.ndim)


@pytest.mark.usefixtures("standard_promotion")
def test_host_local_pmap_arrays_can_be_saved(tmp_path):
  n = jax.local_device_count()
  state = jax.pmap(lambda x: {"w": x * 2})(jnp.arange(2.0 * n).reshape(n, 2))
  with Checkpointer(tmp_path) as run:
    run.save(0, state, {})
    assert_same(run.restore(state)[0], state)


def test_what_was_free_to_move_stays_free(tmp_path):
  state = {"w": jnp.zeros(8)}
  with Checkpointer(tmp_path) as run:
    run.save(0, state, {})
    restored = run.restore(state)[0]["w"]
  mesh = jax.make_mesh((8,), ("d",), (AxisType.Auto,))
  x = jax.device_put(jnp.ones(8), NamedSharding(mesh, PartitionSpec("d")))
  np.testing.assert_array_equal(jax.jit(jnp.add)(x, restored), np.ones(8))


def test_kinds_of_prng_keys(tmp_path):
  state = {
    "one": jax.random.key(1),
    "many": jax.random.split(jax.random.key(2, impl="rbg"), 4),
    "raw": jax.random.PRNGKey(3),
  }
  with Checkpointer(tmp_path) as run:
    run.save(0, state, {})
    restored = run.restore(state)[0]
  assert_same(restored, state)
  assert restored["many"].dtype == state["many"].dtype
