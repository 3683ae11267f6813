import functools
import json
import os
import pathlib
import subprocess
import sys
import zlib

import gguf
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import linen as nn
from flax import nnx
from hypothesis import strategies as st

import tern_jax
from experiments.common.models import LeNet5
from tern_jax.checkpoint import read_spec, save_packed
from tern_jax.core.containers import Ternary
from tern_jax.export import (
  CODECS,
  GGUF_TYPES,
  from_safetensors,
  to_gguf,
  to_safetensors,
  to_stablehlo,
)
from tern_jax.storage.entropy import coding
from tern_jax.storage.packed import PackedTernary, pack, unpack
from tests.helpers import assert_same, raw

# Packages that a runtime without JAX, or without this one, does not have.
OURS = ("tern_jax", "flax", "optax", "orbax", "experiments")
JAX = ("jax", "jaxlib", "ml_dtypes", *OURS)


def codes_of(shape, seed=0):
  return np.random.default_rng(seed).integers(-1, 2, shape).astype(np.int8)


def planes_of(codes):
  """The packed leaf by NumPy alone, without a compilation."""
  sizes = [i for i, n in enumerate(codes.shape) if n and n % 8 == 0]
  axis = sizes[0] if sizes else None
  planes = (
    jnp.asarray(np.packbits(bits, axis, "little"))
    for bits in (codes != 0, codes < 0)
  )
  return (*planes, codes.shape, axis)


def packed(shape, w_p=0.5, w_n=None, dtype="float32", codes=None):
  codes = codes_of(shape) if codes is None else np.broadcast_to(codes, shape)
  nonzero, sign, shape, axis = planes_of(codes)
  w_p, w_n = (
    jnp.asarray(np.asarray(w).astype(dtype))
    for w in (w_p, w_p if w_n is None else w_n)
  )
  return PackedTernary(nonzero, sign, w_p, w_n, shape, axis)


def scales(shape, seed=0):
  return np.random.default_rng(seed).uniform(0.1, 2.0, shape)


def run_without(packages, program, *args):
  """Runs a program in a process that cannot import some packages."""
  block = f"import sys\nfor p in {packages}: sys.modules[p] = None\n"
  done = subprocess.run(
    [sys.executable, "-W", "error", "-c", block + program, *map(str, args)],
    capture_output=True,
    text=True,
    timeout=120,
  )
  assert done.returncode == 0, done.stderr


# Safetensors.


@pytest.fixture
def path(tmp_path):
  return tmp_path / "folder" / "net"


NET = {
  "Dense_0": {
    "kernel": packed((64, 24), 0.3, 0.7),
    "bias": jnp.linspace(-1, 1, 24),
  },
  "channels": {"kernel": packed((5, 24), scales((1, 24)), scales((1, 24), 1))},
  "groups": packed((3, 6, 10), scales((3, 2, 10)), scales((3, 2, 10), 1)),
  "flat": {"w": packed((3, 5)), "shorter": packed((4, 3), scales(3))},
  "0-d": {"ternary": packed(()), "dense": jnp.float32(3.0)},
}
DTYPES = {
  name: jnp.asarray(np.arange(6).reshape(2, 3).astype(name))
  for name in ("bool", "int8", "int32", "uint32", "bfloat16", "complex64")
}
HALF = {
  dtype: packed((16, 3), 1.3, 0.7, dtype) for dtype in ("bfloat16", "float16")
}


@pytest.mark.parametrize(
  "tree",
  [
    NET,
    DTYPES,
    HALF,
    {"empty": packed((0, 8)), "none": jnp.zeros((0, 3))},
    {"../../etc/passwd": {"a/b": packed((8,)), "": packed((9,))}},
    packed((16, 3)),
    {},
  ],
  ids=["net", "dtypes", "half", "empty", "names", "leaf", "nothing"],
)
@pytest.mark.parametrize("codec", CODECS)
def test_a_tree_comes_back_bit_for_bit(path, tree, codec):
  to_safetensors(path, tree, codec=codec)
  assert_same(from_safetensors(path), tree)
  assert [p.name for p in path.parent.iterdir()] == ["net"]


def test_sequences_come_back_as_dicts_and_numbers_as_arrays(path):
  to_safetensors(path, {"a": [packed((8,)), np.ones(2, np.float32)], "b": 2.0})
  wanted = {
    "a": {"0": packed((8,)), "1": jnp.ones(2)},
    "b": jnp.asarray(2.0),
  }
  assert_same(from_safetensors(path), wanted)


@pytest.mark.parametrize("codec", ["planes", "entropy"])
def test_stacks_and_variables_come_back(path, codec):
  kernel = Ternary(codes_of((8, 3, 16)), *np.float32(scales((2, 8, 1, 1))))
  stack = pack(kernel)
  state = nnx.State({"layers": {0: nnx.Param(stack)}, "value": nnx.Param(1.0)})
  to_safetensors(path, state, codec=codec)
  loaded = from_safetensors(path)
  assert_same(loaded, {"layers": {"0": stack}, "value": jnp.float32(1.0)})
  assert loaded["layers"]["0"].axis == 2
  to_safetensors(path, {"a": {"value": stack}}, codec=codec, overwrite=True)
  assert_same(from_safetensors(path), {"a": {"value": stack}})


@pytest.mark.parametrize("dtype", ["<f4", ">f4"])
def test_host_arrays_of_any_byte_order_and_strides(path, dtype):
  x = np.arange(6).astype(dtype).reshape(2, 3).T
  to_safetensors(path, {"x": x})
  np.testing.assert_array_equal(from_safetensors(path)["x"], x)


READER = """
import json, sys
import numpy as np
from safetensors import safe_open

def read(file, leaf):
  tensors = [file.get_tensor(name) for name in leaf["tensors"]]
  if leaf["kind"] == "dense":
    return tensors[0]
  nonzero, sign, w_p, w_n = tensors
  shape, axis = leaf["shape"], leaf["axis"]
  count = np.prod(shape, dtype=int) if axis is None else shape[axis]
  nonzero, sign = (
    np.unpackbits(x, axis or 0, count, "little").reshape(shape)
    for x in (nonzero, sign)
  )
  for i in range(-w_p.ndim, 0):
    n = shape[i] // w_p.shape[i]
    w_p, w_n = w_p.repeat(n, i), w_n.repeat(n, i)
  zero = np.zeros((), w_p.dtype)
  return np.where(nonzero == 0, zero, np.where(sign == 1, -w_n, w_p))

with safe_open(sys.argv[1], "numpy") as file:
  leaves = json.loads(file.metadata()["tern_jax"])["leaves"]
  np.savez(sys.argv[2], **{x["name"]: read(file, x) for x in leaves})
"""


def test_numpy_and_safetensors_are_enough_to_read(path, tmp_path):
  to_safetensors(path, NET)
  out = tmp_path / "dense.npz"
  run_without(JAX, READER, path, out)
  wanted = {
    "0-d.dense": NET["0-d"]["dense"],
    "0-d.ternary": unpack(NET["0-d"]["ternary"]),
    "Dense_0.bias": NET["Dense_0"]["bias"],
    "Dense_0.kernel": unpack(NET["Dense_0"]["kernel"]),
    "channels.kernel": unpack(NET["channels"]["kernel"]),
    "flat.shorter": unpack(NET["flat"]["shorter"]),
    "flat.w": unpack(NET["flat"]["w"]),
    "groups": unpack(NET["groups"]),
  }
  with np.load(out) as found:
    assert {k: raw(x) for k, x in found.items()} == {
      k: raw(x) for k, x in wanted.items()
    }


def header(path):
  data = path.read_bytes()
  n = int.from_bytes(data[:8], "little")
  return json.loads(data[8 : 8 + n]), data[8 + n :]


def test_layout_is_the_documented_one(path):
  to_safetensors(path, {"a": {"kernel": packed((16, 3), 0.5, 0.25)}})
  tensors, data = header(path)
  metadata = tensors.pop("__metadata__")
  facts = json.loads(metadata["tern_jax"])
  assert metadata["crc32"] == str(zlib.crc32(metadata["tern_jax"].encode()))
  assert facts["format"] == 1
  codes = codes_of((16, 3))
  wanted = {
    "nonzero": np.packbits(codes != 0, 0, "little"),
    "sign": np.packbits(codes < 0, 0, "little"),
    "w_n": np.float32(0.25),
    "w_p": np.float32(0.5),
  }
  crc = zlib.crc32(b"".join(x.tobytes() for x in wanted.values()))
  (leaf,) = facts["leaves"]
  assert leaf == {
    "path": ["a", "kernel"],
    "name": "a.kernel",
    "kind": "ternary",
    "shape": [16, 3],
    "axis": 0,
    "crc32": crc,
    "tensors": {
      "a.kernel.nonzero": {"dtype": "uint8", "shape": [2, 3]},
      "a.kernel.sign": {"dtype": "uint8", "shape": [2, 3]},
      "a.kernel.w_p": {"dtype": "float32", "shape": []},
      "a.kernel.w_n": {"dtype": "float32", "shape": []},
    },
  }
  for name, x in wanted.items():
    start, stop = tensors[f"a.kernel.{name}"]["data_offsets"]
    assert data[start:stop] == x.tobytes()


def test_two_bits_a_weight_and_a_kilobyte_a_leaf(path):
  to_safetensors(path, {"kernel": packed((512, 500))})
  assert 64_008 < path.stat().st_size < 64_008 + 1024


def test_coded_weights_take_their_entropy(path):
  codes = np.random.default_rng(0).choice(
    np.arange(-1, 2, dtype=np.int8), (512, 500), p=[0.1, 0.8, 0.1]
  )
  tree = {"kernel": packed(codes.shape, codes=codes)}
  to_safetensors(path, tree, codec="entropy")
  assert_same(from_safetensors(path), tree)
  p = np.unique(codes, return_counts=True)[1] / codes.size
  entropy = -codes.size * np.sum(p * np.log2(p)) / 8
  tensors, _ = header(path)
  start, stop = tensors["kernel.coded"]["data_offsets"]
  assert entropy < stop - start < 1.001 * entropy + 64
  assert path.stat().st_size < 1.001 * entropy + 1024


def test_codecs_that_are_not_there(path, monkeypatch):
  with pytest.raises(ValueError, match=r"codec must be one of .*entropy"):
    to_safetensors(path, NET, codec="zip")
  to_safetensors(path, {"w": packed((16, 3))}, codec="entropy")
  monkeypatch.setitem(sys.modules, "constriction", None)
  coding.stream.cache_clear()
  with pytest.raises(ImportError, match="needs constriction"):
    from_safetensors(path)
  with pytest.raises(ImportError, match="needs constriction"):
    to_safetensors(path, NET, codec="entropy", overwrite=True)


def test_checksums_are_those_of_the_checkpoint(path, tmp_path):
  to_safetensors(path, NET)
  save_packed(tmp_path / "checkpoint", NET)
  facts = json.loads(header(path)[0]["__metadata__"]["tern_jax"])
  spec = read_spec(tmp_path / "checkpoint")
  assert [(x["path"], x["crc32"]) for x in facts["leaves"]] == [
    (x["path"], x["crc32"]) for x in spec["leaves"]["packed"]
  ]


SAVERS = {
  "safetensors": to_safetensors,
  "stablehlo": lambda path, tree, **kw: to_stablehlo(
    path, lambda w, x: x @ w, tree["kernel"], jnp.ones((1, 256)), **kw
  ),
  "gguf": to_gguf,
}


@pytest.mark.parametrize("save", SAVERS.values(), ids=SAVERS)
def test_a_file_is_replaced_only_if_asked(path, save):
  tree = {"kernel": packed((256, 2))}
  save(path, tree)
  first = path.read_bytes()
  with pytest.raises(FileExistsError, match="pass overwrite=True"):
    save(path, {"kernel": packed((256, 3))})
  assert path.read_bytes() == first
  save(path, {"kernel": packed((256, 3))}, overwrite=True)
  assert path.read_bytes() != first
  assert [p.name for p in path.parent.iterdir()] == ["net"]
  assert path.stat().st_mode & 0o777 == 0o666 & ~umask()


def umask():
  mask = os.umask(0)
  os.umask(mask)
  return mask


@pytest.mark.parametrize("links", [True, False])
def test_of_two_writers_the_second_is_told(path, monkeypatch, links):
  real = safetensors.numpy.save_file

  def save_file(*args):
    real(*args)
    path.write_bytes(b"other")

  def no_links(*_):
    raise PermissionError

  monkeypatch.setattr(safetensors.numpy, "save_file", save_file)
  if not links:
    monkeypatch.setattr(pathlib.Path, "hardlink_to", no_links)
  with pytest.raises(FileExistsError, match="pass overwrite=True"):
    to_safetensors(path, NET)
  assert path.read_bytes() == b"other"
  assert len(list(path.parent.iterdir())) == 1
  monkeypatch.setattr(safetensors.numpy, "save_file", real)
  path.unlink()
  to_safetensors(path, NET)
  assert_same(from_safetensors(path), NET)


def test_a_failed_save_leaves_what_was_there(path, monkeypatch):
  to_safetensors(path, NET)
  before = path.read_bytes()

  def full(*_):
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(safetensors.numpy, "save_file", full)
  with pytest.raises(OSError, match="No space left"):
    to_safetensors(path, {}, overwrite=True)
  assert path.read_bytes() == before
  assert len(list(path.parent.iterdir())) == 1


@pytest.mark.parametrize(
  ("tree", "error", "match"),
  [
    ({"a": Ternary(*jnp.ones((3, 1)))}, TypeError, "^a is a Ternary"),
    ({"a": "text"}, TypeError, "^a: leaves must be arrays .* got str"),
    ({"a": jax.random.key(0)}, TypeError, "^a: cannot save .* key"),
    ({"a": np.ones(2, jnp.float8_e5m2)}, TypeError, "^a: .* no .* float8_e5m2"),
    (
      {"a": {"b": jnp.ones(1)}, "a.b": jnp.ones(1)},
      ValueError,
      r"two leaves have the name a\.b",
    ),
    (
      {"a": packed((8,)), "a.sign": jnp.ones(1)},
      ValueError,
      r"two leaves have the name a\.sign",
    ),
    (
      PackedTernary(
        *np.ones((2, 1), np.uint8), *np.ones((2, 1), np.int8), (8,), 0
      ),
      ValueError,
      "the leaf: w_p must be floating",
    ),
  ],
)
def test_what_cannot_be_saved_is_named(path, tree, error, match):
  with pytest.raises(error, match=match):
    to_safetensors(path, tree)
  assert not path.exists()


def nested(depth):
  tree = jnp.ones(1)
  for _ in range(depth):
    tree = {"a": tree}
  return tree


def test_the_deepest_tree(path):
  to_safetensors(path, nested(64))
  assert_same(from_safetensors(path), nested(64))
  with pytest.raises(ValueError, match="a path is up to 64 strings"):
    to_safetensors(path, nested(65), overwrite=True)


# Damage and malice.


def test_no_flipped_byte_goes_unnoticed(path):
  tree = {"a": packed((16, 3), 0.5, 0.25), "b": jnp.ones(2, jnp.bfloat16)}
  to_safetensors(path, tree)
  good = path.read_bytes()
  rng = np.random.default_rng(0)
  for i in rng.permutation(len(good))[:150]:
    bad = bytearray(good)
    bad[i] ^= 1 << rng.integers(8)
    path.write_bytes(bad)
    with pytest.raises(ValueError, match=r"^cannot load .*net: "):
      from_safetensors(path)
  for n in (0, 7, 8, 100, len(good) - 1):
    path.write_bytes(good[:n])
    with pytest.raises(ValueError, match=r"^cannot load .*net: "):
      from_safetensors(path)
  path.write_bytes(good + b"\0")
  with pytest.raises(ValueError, match="not fully covered"):
    from_safetensors(path)


def forge(path, facts, tensors=None):
  """Writes a file of given metadata, with the checksum that it should have."""
  text = facts if isinstance(facts, str) else json.dumps(facts)
  metadata = {"tern_jax": text, "crc32": str(zlib.crc32(text.encode()))}
  path.parent.mkdir(exist_ok=True)
  safetensors.numpy.save_file(tensors or {}, path, metadata)


def crc_of(tensors):
  return zlib.crc32(b"".join(tensors[k].tobytes() for k in sorted(tensors)))


def leaf_of(tensors, shape=None, /, **changes):
  leaf = {
    "path": ["x"],
    "name": "x",
    "kind": "dense" if shape is None else "ternary",
    "tensors": {
      k: {"dtype": x.dtype.name, "shape": list(x.shape)}
      for k, x in tensors.items()
    },
    "crc32": crc_of(tensors),
    "shape": shape,
    "axis": None,
  }
  return {"format": 1, "leaves": [leaf | changes]}


def planes(size, scale=None):
  scale = np.ones((), np.float32) if scale is None else scale
  return {
    "x.nonzero": np.zeros(size, np.uint8),
    "x.sign": np.zeros(size, np.uint8),
    "x.w_p": scale,
    "x.w_n": scale,
  }


CODED = {
  "x.coded": np.full(9, 7, np.uint8),
  "x.w_p": np.ones((), np.float32),
  "x.w_n": np.ones((), np.float32),
}
DENSE = {"x": np.ones(2, np.float32)}
GOOD = leaf_of(planes(1), [3])["leaves"][0]


@pytest.mark.parametrize(
  ("facts", "tensors", "match"),
  [
    ("[" * 100_000, None, "its metadata is no JSON"),
    ("{" + '"a":{' * 100_000, None, "its metadata is no JSON"),
    ('{"format": 1, "leaves": [' + "9" * 5000 + "]}", None, "is no JSON"),
    ([], None, "no format or no leaves"),
    ({"format": "1", "leaves": []}, None, "no format or no leaves"),
    ({"format": 0, "leaves": []}, None, "no format or no leaves"),
    ({"format": 2, "leaves": []}, None, "reads up to 1: upgrade"),
    ({"format": 1, "leaves": {}}, None, "no format or no leaves"),
    ({"format": 1, "leaves": [[]]}, None, "a leaf that lacks a field"),
    ({"format": 1, "leaves": []}, DENSE, "tensors are not those"),
    (leaf_of(DENSE, kind="key"), DENSE, "a leaf that lacks a field"),
    (leaf_of(DENSE, crc32="1"), DENSE, "a leaf that lacks a field"),
    (leaf_of(DENSE, crc32=1), DENSE, "x is damaged: its crc32 differs"),
    (leaf_of(DENSE, path=["a"] * 65), DENSE, "a path is up to 64 strings"),
    (leaf_of(DENSE, path=[[]]), DENSE, "a path is up to 64 strings"),
    (leaf_of(DENSE, name="y"), DENSE, r"the tensors must be \['y'\]"),
    (leaf_of(DENSE, tensors={}), DENSE, r"the tensors must be \['x'\]"),
    (leaf_of(DENSE, tensors={"x": []}), DENSE, "lacks its dtype or shape"),
    (
      leaf_of(DENSE, tensors={"x": {"dtype": "float32", "shape": [2.0]}}),
      DENSE,
      "lacks its dtype or shape",
    ),
    (
      leaf_of(DENSE, tensors={"x": {"dtype": "float32", "shape": [2**62]}}),
      DENSE,
      "tensors are not those",
    ),
    (
      leaf_of(DENSE, tensors={"x": {"dtype": "int32", "shape": [2]}}),
      DENSE,
      "its dtypes are not those",
    ),
    (leaf_of({"x": np.ones(2)}), {"x": np.ones(2)}, "set jax_enable_x64"),
    (leaf_of(planes(1), [2**80]), planes(1), "lack their shape"),
    (leaf_of(planes(1), [-3]), planes(1), "lack their shape"),
    (leaf_of(planes(1), [1] * 33), planes(1), "lack their shape"),
    (leaf_of(planes(1), "3"), planes(1), "lack their shape"),
    (leaf_of(planes(1), [2**62 + 1]), planes(1), r"x: nonzero must be uint8"),
    (leaf_of(planes(1), [8]), planes(1), "x: axis must be 0"),
    (leaf_of(planes(1), [3], axis="0"), planes(1), "lack their shape"),
    (leaf_of(planes(1), [3], lead=2), planes(1), "lead must be from 0 to 1"),
    (leaf_of(planes(1), [3], axis=7), planes(1), "x: axis must be None"),
    (
      leaf_of(planes(1, np.ones((), np.int32)), [3]),
      planes(1, np.ones((), np.int32)),
      "x: w_p must be floating",
    ),
    (
      leaf_of(planes(1) | {"x.sign": np.ones(1, np.uint8)}, [3]),
      planes(1) | {"x.sign": np.ones(1, np.uint8)},
      "1 sign bits are set where the weight is zero",
    ),
    (leaf_of(CODED, [3], kind="coded"), CODED, "the version must be 1, got 7"),
    (
      leaf_of(CODED, [2**62], kind="coded"),
      CODED,
      "claims 1,152,921,504,606,846,993 bytes of arrays, more than",
    ),
    (leaf_of(CODED, kind="coded"), CODED, "lack their shape or axis"),
    (leaf_of(CODED, [3]), CODED, "the tensors must be .*'x.nonzero'"),
    ({"format": 1, "leaves": [GOOD, GOOD]}, planes(1), "two leaves .* name"),
    (
      {
        "format": 1,
        "leaves": [GOOD, leaf_of({"y": DENSE["x"]}, name="y")["leaves"][0]],
      },
      planes(1) | {"y": DENSE["x"]},
      "two leaves have one path",
    ),
    (
      {
        "format": 1,
        "leaves": [
          GOOD,
          leaf_of({"y": DENSE["x"]}, name="y", path=["x", "y"])["leaves"][0],
        ],
      },
      planes(1) | {"y": DENSE["x"]},
      "two leaves have one path",
    ),
  ],
)
def test_hostile_metadata_is_refused(path, facts, tensors, match):
  forge(path, facts, tensors)
  with pytest.raises(ValueError, match=rf"^cannot load .*net: .*{match}"):
    from_safetensors(path)


def test_what_the_forger_changes_was_good(path):
  forge(path, leaf_of(planes(1), [3]), planes(1))
  assert_same(from_safetensors(path)["x"].shape, (3,))
  forge(path, leaf_of(DENSE), DENSE)
  assert_same(from_safetensors(path), {"x": jnp.ones(2)})


def test_files_of_others_are_refused(path):
  path.parent.mkdir()
  safetensors.numpy.save_file(DENSE, path)
  with pytest.raises(ValueError, match="was not written by tern_jax"):
    from_safetensors(path)
  path.write_bytes(b"\xff" * 1000)
  with pytest.raises(ValueError, match="header too large"):
    from_safetensors(path)
  with pytest.raises(FileNotFoundError):
    from_safetensors(path.with_name("missing"))


JSON = st.recursive(
  st.none() | st.booleans() | st.integers() | st.text(max_size=3),
  lambda x: (
    st.lists(x, max_size=3)
    | st.dictionaries(st.sampled_from([*GOOD, "x", "dtype"]), x, max_size=7)
  ),
  max_leaves=12,
)


@hypothesis.settings(
  max_examples=60,
  deadline=None,
  derandomize=True,
  database=None,
  suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
@hypothesis.given(changes=st.dictionaries(st.sampled_from([*GOOD]), JSON))
def test_any_other_metadata_is_refused_or_harmless(path, changes):
  forge(path, {"format": 1, "leaves": [GOOD | changes]}, planes(1))
  try:
    tree = from_safetensors(path)
  except ValueError as e:
    assert str(e).startswith("cannot load")  # noqa: PT017
  else:
    (leaf,) = jax.tree.leaves(
      tree, is_leaf=lambda x: isinstance(x, PackedTernary)
    )
    assert unpack(leaf).size in range(9)


@pytest.mark.parametrize(
  ("package", "save"),
  [
    ("safetensors", to_safetensors),
    ("flatbuffers", SAVERS["stablehlo"]),
    ("gguf", to_gguf),
  ],
)
def test_missing_packages_are_named(path, monkeypatch, package, save):
  for name in (package, f"{package}.numpy"):
    monkeypatch.setitem(sys.modules, name, None)
  with pytest.raises(
    ImportError, match=rf"{package}: pip install 'tern_jax\[export\]'"
  ):
    save(path, {"kernel": packed((256, 2))})


# StableHLO.

RUNNER = """
import sys
import jax, numpy as np

with open(sys.argv[1], "rb") as file:
  net = jax.export.deserialize(bytearray(file.read()))
with np.load(sys.argv[2]) as images:
  np.savez(sys.argv[3], **{k: net.call(x) for k, x in images.items()})
"""


def test_lenet_predicts_exactly_with_jax_alone(path, tmp_path):
  model = LeNet5(10)
  image = np.zeros((1, 28, 28, 1), np.float32)
  init = functools.partial(model.init, train=False)
  params = jax.eval_shape(init, jax.random.key(0), image)

  def ternarize(x):
    if x.ndim < 2:
      return jnp.linspace(-1, 1, x.size)
    return packed(x.shape, 0.2, 0.3, codes=codes_of(x.shape, seed=x.size))

  tree = jax.tree.map(ternarize, params)

  def apply(variables, x):
    return model.apply(variables, x, train=False)

  data = to_stablehlo(path, apply, tree, image)
  assert path.read_bytes() == data
  weights = sum(x.size for x in jax.tree.leaves(params))
  assert weights == 61_706
  assert weights / 4 < len(data) < weights / 4 + 16_384
  # Nothing of the machine that wrote it, nor of how it was called.
  assert b".py" not in data

  rng = np.random.default_rng(0)
  images = {
    f"batch{n}": rng.normal(size=(n, 28, 28, 1)).astype(np.float32)
    for n in (1, 3)
  }
  np.savez(tmp_path / "images.npz", **images)
  run_without(OURS, RUNNER, path, tmp_path / "images.npz", tmp_path / "out.npz")
  dense = jax.jit(unpack)(tree)
  with np.load(tmp_path / "out.npz") as found:
    for name, x in images.items():
      assert raw(found[name]) == raw(jax.jit(apply)(dense, x))


def test_one_artefact_for_any_batch_and_three_platforms():
  tree = {"kernel": packed((512, 512)), "bias": jnp.ones(512)}

  def apply(w, xs, scale):
    return {"y": (xs["a"] + xs["b"]) @ w["kernel"] * scale + w["bias"][None]}

  x = jnp.ones((1, 512))
  data = to_stablehlo(None, apply, tree, {"a": x, "b": x}, 2.0)
  assert 65_536 < len(data) < 65_536 + 16_384
  net = jax.export.deserialize(bytearray(data))
  assert net.platforms == ("cpu", "cuda", "tpu")
  assert [str(a.shape) for a in net.in_avals] == [
    "(batch, 512)", "(batch, 512)", "()",
  ]  # fmt: skip
  rng = np.random.default_rng(0)
  for n in (1, 5):
    xs = {k: rng.integers(-9, 9, (n, 512)).astype(np.float32) for k in "ab"}
    wanted = (xs["a"] + xs["b"]) @ (codes_of((512, 512)) * 0.5) * 3 + 1
    np.testing.assert_array_equal(net.call(xs, 3.0)["y"], wanted)


def test_shapes_and_platforms_can_be_fixed():
  data = to_stablehlo(
    None,
    lambda w, x: x @ w,
    packed((8, 2)),
    jax.ShapeDtypeStruct((4, 8), jnp.float32),
    platforms=("cpu",),
  )
  net = jax.export.deserialize(bytearray(data))
  assert (net.platforms, net.in_avals[0].shape) == (("cpu",), (4, 8))


def test_unpacked_weights_are_not_exported():
  ternary = Ternary(jnp.ones((8, 2), jnp.int8), jnp.ones(()), jnp.ones(()))
  with pytest.raises(TypeError, match=r"has a Ternary: call tern_jax\.pack"):
    to_stablehlo(None, lambda w, x: x @ w, ternary, jnp.ones((1, 8)))


# GGUF.


def read_gguf(path):
  """Returns {name: (type, shape in NumPy's order, values)} by the package."""
  found = {}
  for t in gguf.GGUFReader(path).tensors:
    type, values = t.tensor_type, t.data
    if type.name in GGUF_TYPES:
      values = gguf.dequantize(values, type)
    found[t.name] = type.name, tuple(t.shape[::-1].tolist()), values
  return found


@pytest.mark.sample(3)
@pytest.mark.parametrize(
  ("type", "bits"), [("TQ1_0", 1.6875), ("TQ2_0", 2.0625)]
)
@pytest.mark.parametrize(
  ("shape", "scale_shape"),
  [
    ((512, 3), ()),
    ((512, 3), (1, 3)),
    ((512, 3), (3,)),
    ((512, 3), (2, 3)),
    ((2, 256, 3), (2, 1, 1)),
    ((3, 1, 256, 2), (1, 1, 1, 2)),
    ((512,), (2,)),
  ],
  ids=str,
)
def test_every_code_is_exact(path, type, bits, shape, scale_shape):
  scale = scales(scale_shape).astype(np.float32)
  tree = {"x": {"kernel": packed(shape, scale)}}
  errors = to_gguf(path, tree, type)
  order = np.arange(len(shape))
  order[-2:] = order[-2:][::-1]
  half = scale.astype(np.float16).astype(np.float32)
  wanted = np.asarray(unpack(packed(shape, half))).transpose(order)
  (stored,) = gguf.GGUFReader(path).tensors
  assert 8 * stored.n_bytes == bits * np.prod(shape)
  (found,) = read_gguf(path).items()
  assert found[:1] + found[1][:2] == ("x.kernel", type, wanted.shape)
  assert raw(found[1][2]) == raw(wanted)
  codes = codes_of(shape).transpose(order)
  np.testing.assert_array_equal(np.sign(found[1][2]), codes)
  exact = np.asarray(unpack(tree)["x"]["kernel"], np.float64).transpose(order)
  error = np.sqrt(np.sum((wanted - exact) ** 2) / np.sum(exact**2))
  assert errors == {"x.kernel": pytest.approx(error, rel=1e-4)}
  assert error <= 2.0**-11


def test_scales_that_half_precision_holds_lose_nothing(path):
  tree = {
    "a": packed((256, 2), 0.3, dtype=jnp.bfloat16),
    "b": packed((256, 2), 0.3, dtype=jnp.float16),
    "c": packed((256, 2), 65504.0),
    "d": packed((256, 2), 2.0**-14),
    "e": packed((256, 2), 7e9, 1.0, codes=np.int8(0)),
  }
  assert to_gguf(path, tree) == dict.fromkeys("abcde", 0.0)
  for name, (_, _, values) in read_gguf(path).items():
    wanted = unpack(tree)[name].astype(jnp.float32).T
    np.testing.assert_array_equal(values, wanted)


def test_rows_lie_along_the_inputs_of_every_library(path):
  codes = codes_of((4, 256, 3, 3))
  equinox = packed(codes.shape, codes=codes)
  to_gguf(path, {"weight": equinox}, channel_axis=0)
  first = read_gguf(path)["weight"]
  flax = packed((3, 3, 256, 4), codes=codes.transpose(2, 3, 1, 0))
  to_gguf(path, {"weight": flax}, overwrite=True)
  second = read_gguf(path)["weight"]
  assert first[1] == second[1] == (3, 3, 4, 256)
  assert raw(first[2]) == raw(second[2])
  np.testing.assert_array_equal(first[2][1, 2], 0.5 * codes[:, :, 1, 2])


@pytest.mark.parametrize("stack", [(), (3,)], ids=["one", "stacked"])
def test_rows_of_attention_lie_along_its_inputs(path, stack):
  heads, dim, out = 4, 64, 2
  codes = {
    "query": codes_of((*stack, 256, heads, dim)),
    "out": codes_of((*stack, heads, dim, out), 1),
  }
  scale = np.linspace(0.5, 1.0, heads * dim).astype(np.float32)
  scale = scale.reshape((1,) * len(stack) + (1, heads, dim))
  tree = {
    "attn": {
      "query": {
        "kernel": packed(codes["query"].shape, scale, codes=codes["query"])
      },
      "out": {"kernel": packed(codes["out"].shape, codes=codes["out"])},
      "value": {"kernel": codes["query"].astype(np.float32)},
    },
    # No attention: nothing beside it has its heads.
    "head": {"out": {"kernel": packed((3, 256, 2))}},
  }
  to_gguf(path, tree)
  found = {k: x[2] for k, x in read_gguf(path).items()}
  query = codes["query"] * scale.astype(np.float16).astype(np.float32)
  rows = np.swapaxes(query.reshape(*stack, 256, heads * dim), -1, -2)
  np.testing.assert_array_equal(found["attn.query.kernel"], rows)
  value = codes["query"].reshape(*stack, 256, heads * dim)
  np.testing.assert_array_equal(
    found["attn.value.kernel"], np.swapaxes(value, -1, -2)
  )
  rows = np.swapaxes(codes["out"].reshape(*stack, heads * dim, out), -1, -2)
  np.testing.assert_array_equal(found["attn.out.kernel"], 0.5 * rows)
  assert found["head.out.kernel"].shape == (3, 2, 256)
  # As the runtime multiplies: rows times inputs.
  x = np.random.default_rng(0).normal(size=256).astype(np.float32)
  if not stack:
    wanted = np.einsum("i,ihd->hd", x, query)
    got = (found["attn.query.kernel"] @ x).reshape(heads, dim)
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.sample(2)
@pytest.mark.parametrize("library", ["linen", "nnx"])
def test_attention_of_flax_comes_back(path, library):
  options = {"num_heads": 4, "qkv_features": 256}
  if library == "linen":
    model = nn.MultiHeadDotProductAttention(**options)
    init = functools.partial(model.init, jax.random.key(0))
    params = jax.jit(init)(jnp.ones((1, 2, 256)))["params"]
  else:
    attention = functools.partial(nnx.MultiHeadAttention, in_features=256)
    params = nnx.state(
      attention(**options, decode=False, rngs=nnx.Rngs(0)), nnx.Param
    )
  tern = tern_jax.ParamTransform(tern_jax.TWN(channel_axis=-1), group_size=256)
  start = jax.jit(lambda p: tern.discretize(*tern.init(p)))
  tree = tern_jax.pack(start(params))
  errors = to_gguf(path, tree)
  assert len(errors) == 4
  found = read_gguf(path)
  for name, leaf in tern_jax.metrics.ternary_leaves(tree).items():
    kind, shape, values = found[name.replace("/", ".")]
    assert (kind, shape) == ("TQ2_0", (256, 256))
    back = values.T.reshape(leaf.shape)
    np.testing.assert_array_equal(np.sign(back), leaf.codes)
    np.testing.assert_allclose(back, leaf.dequantize(), rtol=2.0**-11)


def test_stacked_matrices_named_as_attention_are_none(path):
  tree = {k: {"kernel": packed((3, 256, 256))} for k in ("query", "out")}
  to_gguf(path, tree)
  wanted = 0.5 * np.swapaxes(codes_of((3, 256, 256)), -1, -2)
  for _, _, values in read_gguf(path).values():
    np.testing.assert_array_equal(values, wanted)


def test_other_leaves_and_facts(path):
  kernel = np.arange(6, dtype=np.float32).reshape(2, 3)
  tree = {
    "body": [{"kernel": packed((256, 2))}],
    "head": {"kernel": kernel.astype(np.float16), "bias": jnp.arange(3.0)},
    "norm": {"scale": jnp.full(2, 0.1, jnp.bfloat16), "count": jnp.int32(7)},
    "table": {"embedding": kernel},
  }
  assert list(to_gguf(path, tree, "TQ1_0")) == ["body.0.kernel"]
  found = read_gguf(path)
  assert {k: x[:2] for k, x in found.items()} == {
    "body.0.kernel": ("TQ1_0", (2, 256)),
    "head.bias": ("F32", (3,)),
    "head.kernel": ("F32", (3, 2)),
    "norm.count": ("I32", (1,)),
    "norm.scale": ("F32", (2,)),
    "table.embedding": ("F32", (2, 3)),
  }
  np.testing.assert_array_equal(found["head.kernel"][2], kernel.T)
  np.testing.assert_array_equal(found["table.embedding"][2], kernel)
  np.testing.assert_array_equal(found["norm.scale"][2], 0.10009765625)
  fields = gguf.GGUFReader(path).fields
  facts = {k: f.contents() for k, f in fields.items() if "GGUF" not in k}
  assert facts.pop("tern_jax.version")
  assert facts == {
    "general.architecture": "tern_jax",
    "general.file_type": 36,
    "general.quantization_version": 2,
    "tern_jax.format": 1,
    "tern_jax.ternary": ["body.0.kernel"],
  }


SIGNS = np.where(np.arange(256) < 128, 1, -1).astype(np.int8)[:, None]


@pytest.mark.parametrize(
  ("leaf", "match"),
  [
    (
      packed((200, 2)),
      r"rows of 200 weights, no multiple of 256 \(forced: zeros up to 256\);"
      r" forced, .* 0\.0e\+00\.",
    ),
    (packed(()), "rows of 1 weights"),
    (
      packed((256, 1), 1.0, 3.0, codes=SIGNS),
      # Magnitudes 1 and 3 become 2: sqrt(1 / 5).
      r"w_p and w_n differ within 256 weights .* 4\.5e-01\.",
    ),
    (
      packed((256, 1), [[1.0], [3.0]], codes=SIGNS),
      r"its scale changes within 256 weights .* 4\.5e-01\.",
    ),
    (
      packed((256, 1), 16.5 * 2.0**-24),
      # Subnormal halves are multiples of 2^-24: 16.5 of them become 16.
      r"magnitudes outside \[2\^-14, 65504\] .* 3\.0e-02\.",
    ),
    (packed((256, 1), 1e6), r"magnitudes outside .* 9\.3e-01\."),
    (packed((256, 1), -1.0), "magnitudes outside"),
    (packed((256, 1), 0.0), "magnitudes outside"),
    (packed((256, 1), np.nan), "magnitudes outside"),
    (packed((1, 1, 1, 256, 2)), "5 axes are more than 4"),
    (jnp.ones((1,) * 5), "5 axes are more than 4"),
    (packed((256, 0)), "it is empty"),
    (jnp.ones((0, 256)), "it is empty"),
  ],
)
def test_leaves_that_do_not_fit_are_refused_with_the_error(path, leaf, match):
  tree = {"good": packed((256, 1)), "bad": {"kernel": leaf}}
  match = rf"^TQ2_0 has one .* do not fit\. bad\.kernel: {match}"
  with pytest.raises(ValueError, match=match):
    to_gguf(path, tree)
  assert not path.parent.exists()


def test_w_p_and_w_n_may_differ_where_only_one_is_used(path):
  leaf = packed((256, 1), 1.0, 3.0, codes=np.int8(1))
  assert to_gguf(path, {"kernel": leaf}) == {"kernel": 0.0}


@pytest.mark.parametrize(
  ("tree", "options", "error", "match"),
  [
    ({"x" * 64: jnp.ones(1)}, {}, ValueError, "name is longer than 63 bytes"),
    ({"x": jnp.ones(1, bool)}, {}, TypeError, "^x: ggml has no .* bool"),
    (
      {"x.y": jnp.ones(1), "x": {"y": jnp.ones(1)}},
      {},
      ValueError,
      r"two leaves have the name x\.y",
    ),
    ({}, {"type": "Q4_0"}, ValueError, "type must be one of .*TQ2_0"),
    ({}, {"channel_axis": 1}, ValueError, r"-1 \(Flax, Haiku\) or 0 \(Equin"),
  ],
)
def test_what_ggml_does_not_have(path, tree, options, error, match):
  with pytest.raises(error, match=match):
    to_gguf(path, tree, **options)


def test_a_wrong_writer_is_noticed(path, monkeypatch):
  real = gguf.quantize

  def quantize(rows, type):
    blocks = real(rows, type)
    blocks[0, 0] ^= 1
    return blocks

  monkeypatch.setattr(gguf, "quantize", quantize)
  with pytest.raises(OSError, match=r"kernel was not written as it is"):
    to_gguf(path, {"kernel": packed((256, 2))})
  assert not list(path.parent.iterdir())
