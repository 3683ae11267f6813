import contextlib
import itertools
import json
import os
import resource
import shutil
import socket
import subprocess
import sys
import threading
import zlib
from pathlib import Path
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import tern_jax
from experiments.common.faults.crafted import reseal
from tern_jax import TWN, ParamTransform
from tern_jax.checkpoint import (
  Checkpointer,
  CheckpointError,
  load_packed,
  read_spec,
  save_packed,
)
from tern_jax.core.containers import Ternary, TernParams
from tern_jax.storage import tensors
from tern_jax.storage.leaves import is_whole
from tern_jax.storage.packed import PackedTernary, pack, unpack
from tests.helpers import NnxNet, assert_same, long


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


def test_a_large_tree_is_read_in_parts(tmp_path, monkeypatch):
  tree = net((64, 64, 64, 64, 64, 64, 64, 64, 10))
  save_packed(tmp_path / "net", tree)
  reads, load = [], tensors.ocp.load

  def counted(path, wanted, **kwargs):
    reads.append(len(wanted))
    return load(path, wanted, **kwargs)

  monkeypatch.setattr(tensors.ocp, "load", counted)
  assert_same(load_packed(tmp_path / "net"), tree)
  assert reads == [16]
  reads.clear()
  # Seven layers of 1,288 bytes, and one of 208.
  monkeypatch.setattr(tensors, "_WORTH_A_READ", 2000)
  assert_same(load_packed(tmp_path / "net"), tree)
  assert sum(reads) == 16
  assert len(reads) == 4


def test_a_small_net_costs_little_more_than_its_bits(tmp_path):
  tree = net()
  save_packed(tmp_path / "net", tree)
  assert sum(x.nbytes for x in jax.tree.leaves(tree)) < 3000
  # The spec is this package's own part of the file. How often orbax repeats
  # its indexes beside it differs between two saves of the same tree.
  assert (tmp_path / "net" / "spec" / "data.json").stat().st_size < 3000


@pytest.mark.sample(4)
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


def whole_planes(codes):
  """Planes of a whole array, as files have them, by NumPy alone."""
  axis = next((i for i, n in enumerate(codes.shape) if n % 8 == 0), None)
  return [np.packbits(x, axis, "little") for x in (codes != 0, codes < 0)], axis


STACKS = {
  "eight": ternary((8, 16, 4), scale_shape=(8, 1, 1)),
  "four": ternary((4, 16, 4), scale_shape=(4, 1, 4)),
  "flat": ternary((4, 3, 5), scale_shape=(4, 1, 1)),
  "flat8": ternary((8, 3, 5), scale_shape=(8, 1, 1)),
  "vmapped": ternary((8, 3, 16), scale_shape=(8,)),
}


@pytest.mark.long
@pytest.mark.parametrize("codec", ["planes", long("entropy")])
def test_stacks_are_whole_in_files_and_by_layers_in_memory(tmp_path, codec):
  tree = pack(STACKS)
  assert [x.lead > 0 for x in tree.values()] == [True] * 5
  save_packed(tmp_path / "net", tree, codec=codec)
  for entry in read_spec(tmp_path / "net")["leaves"]["packed"]:
    t = STACKS[entry["path"][0]]
    planes, axis = whole_planes(np.asarray(t.codes))
    scales = (np.asarray(x) for x in (t.w_n, t.w_p))
    crc = zlib.crc32(b"".join(x.tobytes() for x in (*planes, *scales)))
    assert (entry["axis"], entry["crc32"]) == (axis, crc)
    assert not entry.keys() & {"lead", "boxed"}
  dense = jax.tree.map(lambda x: jnp.zeros(x.shape), tree, is_leaf=is_whole)
  for like in (None, tree, jax.eval_shape(lambda: tree), STACKS, dense):
    assert_same(load_packed(tmp_path / "net", like), tree)


@pytest.mark.long
def test_any_other_layout_comes_back_too(tmp_path):
  rows = ternary((16, 8), scale_shape=(16, 1))
  scales = rows.w_p, rows.w_n
  planes, axis = whole_planes(np.asarray(rows.codes))
  whole = PackedTernary(*map(jnp.asarray, planes), *scales, (16, 8), axis)
  # Four layers of one scale each, packed one by one and stacked.
  one_by_one = jax.vmap(pack)(ternary((8, 3, 16), scale_shape=(8,)))
  save_packed(tmp_path / "net", {"a": whole, "b": one_by_one})
  loaded = load_packed(tmp_path / "net")
  assert_same(loaded["a"], whole)
  assert (loaded["a"].axis, pack(rows).axis) == (0, 1)
  assert (loaded["b"].axis, loaded["b"].w_p.shape) == (2, (8, 1, 1))
  np.testing.assert_array_equal(unpack(loaded["b"]), unpack(one_by_one))
  like = {"a": pack(rows), "b": one_by_one}
  wanted = {"a": pack(rows), "b": loaded["b"]}
  assert_same(load_packed(tmp_path / "net", like), wanted)


@pytest.mark.parametrize("lead", [-1, 3, True, "1", None])
def test_a_false_layout_is_not_believed(tmp_path, lead):
  save_packed(tmp_path / "net", net((16, 8)))
  reseal(tmp_path / "net", lambda s: leaf(s).update(lead=lead))
  with pytest.raises(CheckpointError, match="lead must be from 0 to 2"):
    load_packed(tmp_path / "net")


def test_planes_of_rows_are_those_of_the_whole(tmp_path):
  save_packed(tmp_path / "net", net((16, 8)))
  reseal(tmp_path / "net", lambda s: leaf(s).update(lead=1))
  kernel = load_packed(tmp_path / "net")["Dense_0"]["kernel"]
  assert (kernel.axis, kernel.nonzero.shape) == (1, (16, 1))
  wanted = unpack(net((16, 8))["Dense_0"]["kernel"])
  np.testing.assert_array_equal(unpack(kernel), wanted)


def forget_boxes(spec):
  for entry in spec["leaves"]["packed"]:
    entry.pop("boxed", None)


def nnx_net():
  """A trained NNX net, its ternary weights packed, and its predictions."""
  tern, x = ParamTransform(TWN()), jnp.ones((3, 4))
  graphdef, params, state, rest = tern_jax.nnx.split(tern, NnxNet(nnx.Rngs(0)))
  wanted = tern_jax.nnx.merge(tern, graphdef, params, state, rest)(x)
  return pack(tern.discretize(params, state)), x, wanted


def assert_goes_back(tree, x, wanted):
  """Into a fresh NNX model, by Flax's own functions."""
  layer = {"kernel": 0, "bias": 0}
  norm = {"scale": 0, "bias": 0}
  names = {"layers": {"0": layer, "1": layer}, "norm": norm}
  assert jax.tree.structure(tree) == jax.tree.structure(names)
  model = NnxNet(nnx.Rngs(1))
  state = nnx.state(model, nnx.Param)
  nnx.replace_by_pure_dict(state, tree)
  nnx.update(model, state)
  np.testing.assert_array_equal(model(x), wanted)


@pytest.mark.sample(2)
@pytest.mark.parametrize("old", [False, long(True)])
def test_nnx_models_go_back_by_flax(tmp_path, old):
  packed, x, wanted = nnx_net()
  save_packed(tmp_path / "net", packed)
  paths = [e["path"] for e in read_spec(tmp_path / "net")["leaves"]["packed"]]
  assert all(path[-1] == "value" for path in paths)
  if old:  # Files used not to say that it is a box.
    reseal(tmp_path / "net", forget_boxes)
  assert_goes_back(unpack(load_packed(tmp_path / "net")), x, wanted)
  again = load_packed(tmp_path / "net", like=packed)
  assert_same(again, packed)


@pytest.mark.parametrize("old", [False, True])
def test_boxed_linen_parameters_go_back_by_flax(tmp_path, old):
  init = nn.with_partitioning(nn.initializers.lecun_normal(), ("in", "out"))
  model, x = nn.Dense(4, kernel_init=init), jnp.ones((1, 8))
  boxed = model.init(jax.random.key(0), x)["params"]
  tern = ParamTransform(TWN())
  params, state = tern.init(boxed)
  wanted = model.apply({"params": tern(params, state)}, x)
  save_packed(tmp_path / "net", pack(tern.discretize(params, state)))
  if old:
    reseal(tmp_path / "net", forget_boxes)
  plain = unpack(load_packed(tmp_path / "net"))
  assert jax.tree.map(jnp.shape, plain) == {"bias": (4,), "kernel": (8, 4)}
  assert_same(plain, nn.unbox(tern(params, state)))
  again = nn.meta.replace_boxed(boxed, plain)
  for tree in (plain, again):
    np.testing.assert_array_equal(model.apply({"params": tree}, x), wanted)
  assert again["kernel"].names == ("in", "out")


def test_a_key_of_the_users_own_stays(tmp_path):
  one = jnp.ones(2)
  tree = {
    "alone": {"value": one},
    "attention": {"query": one, "key": one, "value": one},
    "value": {"value": {"value": one}},
  }
  save_packed(tmp_path / "net", tree)
  assert_same(load_packed(tmp_path / "net"), tree)
  save_packed(tmp_path / "one", {"value": one})
  assert_same(load_packed(tmp_path / "one"), {"value": one})
  # An old file does not say whose it is; beside other keys, it is the user's.
  reseal(tmp_path / "net", forget_boxes)
  unboxed = {"alone": one, "value": {"value": one}}
  assert_same(load_packed(tmp_path / "net"), tree | unboxed)
  assert_same(load_packed(tmp_path / "net", like=tree), tree)


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
  deep = jnp.zeros(3)
  for _ in range(65):
    deep = [deep]
  with pytest.raises(ValueError, match="a path is at most 64 keys, got 0/0/0"):
    save_packed(tmp_path / "net", deep)
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


@contextlib.contextmanager
def disk_full(most=1 << 16):
  """No file can be larger."""
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (most, hard))
  try:
    yield
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def noise(n=1 << 16, seed=0):
  return {"w": np.random.default_rng(seed).normal(size=n).astype(np.float32)}


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_failed_save_leaves_nothing_and_loses_nothing(tmp_path, overwrite):
  path, old = tmp_path / "net", net((16, 8))
  if overwrite:
    save_packed(path, old)
  with disk_full(), pytest.raises(CheckpointError, match=r"cannot save .*net"):
    save_packed(path, noise(), overwrite=overwrite)
  assert [p.name for p in tmp_path.iterdir()] == ["net"] * overwrite
  if overwrite:
    assert_same(load_packed(path), old)
  save_packed(path, noise(), overwrite=overwrite)
  assert_same(load_packed(path), jax.tree.map(jnp.asarray, noise()))


def test_a_killed_replacement_is_undone(tmp_path):
  path, old, new = tmp_path / "net", net((16, 8)), net((8, 8))
  stage = tmp_path / ".net.new"
  save_packed(stage / "old", old)
  save_packed(stage / "new", new)
  (stage / "junk").mkdir()
  assert_same(load_packed(path), old)
  with pytest.raises(CheckpointError, match="already exists: pass overwrite"):
    save_packed(path, new)
  assert [p.name for p in tmp_path.iterdir()] == ["net"]
  assert_same(load_packed(path), old)


def test_what_a_replacement_that_is_killed_at_its_end_leaves_is_deleted(
  tmp_path,
):
  path, old, new = tmp_path / "net", net((16, 8)), net((8, 8))
  save_packed(path, new)
  save_packed(tmp_path / ".net.new" / "old", old)
  assert_same(load_packed(path), new)
  save_packed(path, old, overwrite=True)
  assert_same(load_packed(path), old)
  assert [p.name for p in tmp_path.iterdir()] == ["net"]


def test_a_link_is_followed(tmp_path):
  (tmp_path / "disk").mkdir()
  (tmp_path / "link").symlink_to(tmp_path / "disk" / "net")
  for tree in (net((16, 8)), net((8, 8))):
    save_packed(tmp_path / "link", tree, overwrite=True)
    assert_same(load_packed(tmp_path / "disk" / "net"), tree)
    assert_same(load_packed(tmp_path / "link"), tree)
  assert (tmp_path / "link").is_symlink()
  assert [p.name for p in (tmp_path / "disk").iterdir()] == ["net"]


def test_one_writer_at_a_time(tmp_path, monkeypatch):
  path, saving, go_on = tmp_path / "net", threading.Event(), threading.Event()
  save = tensors.ocp.save_checkpointables

  def slow_save(*args):
    saving.set()
    assert go_on.wait(60)
    save(*args)

  monkeypatch.setattr(tensors.ocp, "save_checkpointables", slow_save)
  first = threading.Thread(target=save_packed, args=(path, net((16, 8))))
  first.start()
  assert saving.wait(60)
  monkeypatch.undo()
  for overwrite in (False, True):
    with pytest.raises(CheckpointError, match="another process is saving"):
      save_packed(path, net((8, 8)), overwrite=overwrite)
  save_packed(tmp_path / "other", net((8, 8)))
  go_on.set()
  first.join()
  assert_same(load_packed(path), net((16, 8)))
  assert sorted(p.name for p in tmp_path.iterdir()) == ["net", "other"]


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


def leaf(spec):
  return spec["leaves"]["packed"][1]


@pytest.mark.parametrize(
  ("change", "match"),
  [
    (lambda s: s.update(format=2), "has format 2, .* upgrade"),
    (lambda s: s.update(format=0), "has format 0, but .* from 1 to 1"),
    (lambda s: s.update(format="x"), "has format 'x', but .* not written by"),
    (lambda s: s.update(format=True), "has format True, but .* from 1 to 1"),
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
    (
      lambda s: s["leaves"]["packed"].append(leaf(s)),
      "two leaves have one path",
    ),
    (
      lambda s: leaf(s).update(path=["Dense_0", "bias", "0"]),
      "two leaves have one path",
    ),
    (lambda s: leaf(s).update(path="Dense"), "a list of up to 64 keys"),
    (lambda s: leaf(s).update(path=["x"] * 65), "a list of up to 64 keys"),
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
@pytest.mark.long
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
    return jnp.mean((x @ w + p.latent["b"][None] - x[:, :8]) ** 2)

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


def test_steps_to_keep(tmp_path):
  with Checkpointer(tmp_path, keep=2, keep_every=4) as run:
    for i in range(8):
      run.save(i, {"i": jnp.array(i)}, {})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["0", "4", "6", "7"]
    assert run.restore({"i": jnp.array(0)}, 4)[0]["i"] == 4
  with pytest.raises(ValueError, match="keep_every must be at least 1, got 0"):
    Checkpointer(tmp_path, keep_every=0)


def test_arrays_may_change_during_a_save(tmp_path):
  double = jax.jit(lambda x: 2 * x, donate_argnums=0)
  values = [noise(seed=i)["w"] for i in range(4)]
  with Checkpointer(tmp_path) as run:
    for i, value in enumerate(values):
      state = {"host": value.copy(), "device": jnp.array(value)}
      packed = {"device": jnp.array(value)}
      assert run.save(i, state, packed, wait=False)
      state["host"][:] = 0
      double(state["device"]).block_until_ready()
      double(packed["device"]).block_until_ready()
    run.wait()
    assert not [t for t in threading.enumerate() if "_run_loop" in t.name]
  with Checkpointer(tmp_path) as run:
    for i, value in enumerate(values):
      state = {"host": value, "device": value}
      assert_same(run.restore(state, i)[0], jax.tree.map(jnp.asarray, state))
      loaded = load_packed(tmp_path / str(i))
      np.testing.assert_array_equal(loaded["device"], value)


@pytest.mark.parametrize("call", ["wait", "close", "save", "restore"])
def test_the_next_call_says_that_a_save_failed(tmp_path, call):
  run, state = Checkpointer(tmp_path, save_interval=2), {"w": jnp.zeros(3)}
  run.save(0, state, {}, wait=False)
  calls = {
    "save": lambda: run.save(2, state, {}),
    "restore": lambda: run.restore(state),
    "wait": run.wait,
    "close": run.close,
  }
  with disk_full():
    run.save(2, noise(), {}, wait=False)
    assert not run.save(3, state, {}, wait=False)
    with pytest.raises(CheckpointError, match=r"cannot save .*/2: .*large"):
      calls[call]()
  assert [p.name for p in tmp_path.iterdir()] == ["0"]
  if call == "close":
    run = Checkpointer(tmp_path)
  assert run.save(2, state, {}, wait=False)
  assert run.restore(state)[2] == 2
  run.close()


def test_a_run_has_one_writer(tmp_path):
  state = {"w": jnp.zeros(3)}
  first, second = Checkpointer(tmp_path), Checkpointer(tmp_path)
  (tmp_path / "7.orbax-checkpoint-tmp").mkdir()
  first.save(0, state, {})
  assert [p.name for p in tmp_path.iterdir()] == ["0"]
  with pytest.raises(CheckpointError, match="a Checkpointer that was not clos"):
    second.save(1, state, {})
  assert second.restore(state)[2] == 0
  first.close()
  assert second.save(1, state, {})
  second.close()


def read_bytes():
  lines = Path("/proc/self/io").read_text().splitlines()
  return int(dict(line.split(": ") for line in lines)["rchar"])


def test_a_part_of_a_state(tmp_path):
  state = Loop(
    jnp.array(3),
    TernParams({"w": jnp.arange(3.0)}, {}),
    (noise(1 << 18), {"count": jnp.array(1)}),
    jax.random.key(0),
  )
  packed = {"k": pack(ternary((64, 8))), "large": noise(1 << 18)}
  with Checkpointer(tmp_path) as run:
    run.save(3, state, packed, extra=[1])
    before = read_bytes() if os.path.exists("/proc/self/io") else None
    part, extra, step = run.restore({"params": state.params}, partial=True)
    assert_same(part, {"params": state.params})
    assert (extra, step) == ([1], 3)
    part, _, _ = run.restore({"opt": [None, {"count": 0}]}, partial=True)
    assert part["opt"][1]["count"] == 1
    loaded = load_packed(tmp_path, {"k": packed["k"]}, partial=True)
    assert_same(loaded, {"k": packed["k"]})
    if before is not None:
      assert read_bytes() - before < 1 << 18
    assert run.restore({}, partial=True)[0] == {}
    with pytest.raises(CheckpointError, match="nothing is not stored"):
      run.restore({"nothing": jnp.zeros(3)}, partial=True)
    with pytest.raises(CheckpointError, match="key is stored, but not"):
      run.restore({"params": state.params})


PROCESSES = """
import os, pathlib, sys, warnings
import jax, numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from tern_jax.core.containers import Ternary
from tern_jax.checkpoint import *
from tern_jax.storage.packed import pack

port, i, folder = sys.argv[1:]
jax.distributed.initialize(f"localhost:{port}", 2, int(i))
mesh = jax.make_mesh((2,), ("d",), (AxisType.Auto,))
split = NamedSharding(mesh, PartitionSpec(None, "d"))
whole = NamedSharding(mesh, PartitionSpec())


def put(x, sharding):
  x = np.asarray(x)
  return jax.make_array_from_callback(x.shape, sharding, lambda at: x[at])


def same(a, b):
  for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True):
    assert x.sharding.is_equivalent_to(y.sharding, x.ndim)
    for p, q in zip(x.addressable_shards, y.addressable_shards, strict=True):
      np.testing.assert_array_equal(p.data, q.data)


w = np.arange(64 * 8, dtype=np.float32).reshape(64, 8)
state = {"w": put(w, split), "n": put(3, whole)}
codes, one = put((w % 3 - 1).astype(np.int8), split), put(np.float32(1), whole)
packed = jax.jit(pack)({"k": Ternary(codes, one, one)})
with Checkpointer(folder + "/run", keep=1) as run:
  for step in range(3):
    assert run.save(step, state, packed, extra=step, wait=step == 1)
  run.wait()
  assert run.latest_step() == 2
  same(run.restore(state)[0], state)
  for _ in range(2):
    save_packed(folder + "/net", packed, overwrite=True)
    same(load_packed(folder + "/net", packed), packed)
  if i == "1":  # One can load what the other does not.
    np.testing.assert_array_equal(load_packed(folder + "/run")["k"].w_p, 1)
  try:
    save_packed(folder + "/net", packed)
  except CheckpointError as error:
    print(error)

with Checkpointer(folder + "/damaged") as run:
  for step in range(3):
    run.save(step, state, packed, extra=step)
  assert len({read_spec(f"{folder}/damaged/{n}")["run"] for n in "012"}) == 1
  multihost_utils.sync_global_devices("all is saved")
  if i == "0":
    for file in pathlib.Path(folder, "damaged", "2", "state").rglob("*"):
      if file.is_file():
        file.write_bytes(b"")
  multihost_utils.sync_global_devices("all is damaged")
  with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter("always")
    restored, extra, step = run.restore(state)
  same(restored, state)
  assert (extra, step, run.latest_step()) == (1, 1, 1)
  assert "step 2 is passed over, step 1 is" in str(told[-1].message)
  assert run.save(2, state, packed, extra=2)
  assert run.restore(state)[1:] == (2, 2)
  assert os.path.isdir(folder + "/damaged/2.refused")
for save in (save_packed, Checkpointer):
  try:
    save(folder + "/lr[0.1]", *[packed] * (save is save_packed))
  except CheckpointError as error:
    assert "for a pattern when several processes save" in str(error)
  else:
    raise AssertionError("it is saved")
"""


@pytest.mark.long
def test_two_processes_save_one_checkpoint(tmp_path):
  with socket.socket() as free:
    free.bind(("localhost", 0))
    port = str(free.getsockname()[1])
  env = os.environ | {"XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
  processes = [
    subprocess.Popen(
      [sys.executable, "-c", PROCESSES, port, str(i), str(tmp_path)],
      env=env,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    for i in range(2)
  ]
  try:
    for process, says in zip(
      processes, ("already exists", "the first process says"), strict=True
    ):
      out, error = process.communicate(timeout=120)
      assert process.returncode == 0, error
      assert says in out
  finally:
    for process in processes:
      process.kill()
  w = np.arange(64.0 * 8, dtype=np.float32).reshape(64, 8)
  state = {"w": w, "n": np.int32(3)}
  with Checkpointer(tmp_path / "run") as run:
    restored, extra, step = run.restore(state)
  assert_same(restored, jax.tree.map(jnp.asarray, state))
  assert (extra, step) == (2, 2)
  for path in (tmp_path / "run", tmp_path / "net"):
    np.testing.assert_array_equal(
      load_packed(path)["k"].dequantize(), w % 3 - 1
    )
  left = sorted(p.name for p in tmp_path.iterdir())
  assert left == ["damaged", "net", "run"]
  assert [p.name for p in (tmp_path / "run").iterdir()] == ["2"]


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


@pytest.mark.sample(3)
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
