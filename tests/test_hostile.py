"""What files that nobody wrote may do: be refused, at once and by name."""

import hashlib
import json
import os
import stat
import struct
import subprocess
import sys
import time
from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.common.faults import crafted
from experiments.common.faults.crafted import reseal
from tern_jax import checkpoint, export
from tern_jax.checkpoint import (
  Checkpointer,
  CheckpointError,
  examine,
  load_packed,
  read_spec,
  save_packed,
  sha256_of,
)
from tern_jax.core.containers import Ternary
from tern_jax.export import from_safetensors, to_safetensors
from tern_jax.storage import codecs, leaves, limits, ocdbt
from tern_jax.storage.leaves import printable
from tern_jax.storage.packed import PackedTernary, pack
from tests.helpers import assert_same, long

# Orbax abandons coroutines where it finds damage.
pytestmark = pytest.mark.filterwarnings(
  "ignore::pytest.PytestUnraisableExceptionWarning",
  "ignore:coroutine .* was never awaited:RuntimeWarning",
)


def refused(path, match, load=load_packed, seconds=1.0):
  """Asserts that a load fails at once, and returns what it says."""
  start = time.perf_counter()
  with pytest.raises(ValueError, match=match) as e:
    load(path)
  assert time.perf_counter() - start < seconds
  assert "\n" not in str(e.value)
  return str(e.value)


# What arrays claim.

CLAIMS = {
  crafted.trillion_weights: r"claims 250,000,000,008 bytes .* on disk: pass",
  crafted.bomb_of_claimed_size: "claims 4,456,448,008 bytes of arrays",
  crafted.bomb_larger_than_claimed: "128,524 bytes on disk for 128",
  crafted.window_of_a_frame: "its crc32 differs",
  crafted.inner_chunks_of_one: r"chunks of shape \[1, 1\]",
  crafted.chunks_of_one: r"chunks of shape \[1, 1\]",
  crafted.chunk_larger_than_array: r"chunks of shape \[1000000, 1000000\]",
  crafted.long_keys: "the index of packed cannot be read",
  crafted.value_of_a_terabyte: "1,099,511,628,226 bytes on disk for 16",
  crafted.value_beyond_its_file: "the index of packed cannot be read",
  crafted.value_outside: "Invalid key",
  crafted.node_in_itself: "the index of packed cannot be read",
}


@pytest.mark.parametrize(
  ("build", "match"), CLAIMS.items(), ids=lambda x: getattr(x, "__name__", "")
)
def test_what_a_file_claims_is_not_believed(tmp_path, build, match):
  refused(build(tmp_path), match)


def test_a_limit_that_is_given_holds_instead(tmp_path):
  path = crafted.trillion_weights(tmp_path)
  most = 250_000_000_008
  for load in (load_packed, examine, sha256_of):
    with pytest.raises(
      CheckpointError, match=rf"and max_bytes is {most - 1:,}"
    ):
      load(path, max_bytes=most - 1)
  # What is small is held to it, too.
  tree = {"kernel": crafted.ternary()}
  save_packed(tmp_path / "small", tree)
  to_safetensors(tmp_path / "small.safetensors", tree, codec="entropy")
  size = tree["kernel"].nbytes
  with pytest.raises(CheckpointError, match=f"claims {size} .* is {size - 1}"):
    load_packed(tmp_path / "small", max_bytes=size - 1)
  assert_same(load_packed(tmp_path / "small", max_bytes=size), tree)
  coded = json.loads(metadata(tmp_path / "small.safetensors"))["leaves"][0]
  size += coded["tensors"]["kernel.coded"]["shape"][0]
  with pytest.raises(ValueError, match=rf"it claims {size} .* is {size - 1}"):
    from_safetensors(tmp_path / "small.safetensors", max_bytes=size - 1)
  again = from_safetensors(tmp_path / "small.safetensors", max_bytes=size)
  assert_same(again, tree)


def metadata(path):
  data = path.read_bytes()
  (size,) = struct.unpack("<Q", data[:8])
  return json.loads(data[8 : 8 + size])["__metadata__"]["tern_jax"]


def test_a_billion_zeros_in_8_kb_are_refused_unless_asked_for(tmp_path):
  path = crafted.zeros_in_entropy_code(tmp_path)
  assert path.stat().st_size < 13_000
  refused(path, "it claims 262,156,015 bytes", from_safetensors)


def test_a_run_has_a_limit(tmp_path):
  state = {"w": jnp.arange(8.0)}
  with Checkpointer(tmp_path) as run:
    run.save(0, state, {})
    with pytest.raises(CheckpointError, match=r"claims 32 .* max_bytes is 31"):
      run.restore(state, max_bytes=31)
    assert_same(run.restore(state, max_bytes=32)[0], state)


def test_what_does_not_fit_into_memory_is_refused(tmp_path, monkeypatch):
  save_packed(tmp_path / "net", {"w": jnp.arange(1000.0)})
  monkeypatch.setattr(limits, "FLOOR", 3999)
  monkeypatch.setattr(limits, "free_memory", lambda: 3999)
  match = "claims 4,000 bytes of arrays, and 3,999 bytes are free"
  refused(tmp_path / "net", match)
  monkeypatch.setattr(limits, "free_memory", lambda: 4000)
  load_packed(tmp_path / "net")


def test_the_free_memory_is_known_here():
  assert 1 << 24 < limits.free_memory() < 1 << 50


# What we write always loads.

ZEROS = np.zeros((1024, 1024), np.float32)


@pytest.fixture
def low(monkeypatch):
  """Limits at which small trees are large ones."""
  monkeypatch.setattr(limits, "FLOOR", 1 << 16)


def zero_weights(rows=2048, columns=1024):
  plane = np.zeros((rows // 8, columns), np.uint8)
  one = np.ones((), np.float32)
  return PackedTernary(plane, plane, one, one, (rows, columns), 0)


@pytest.mark.usefixtures("low")
@pytest.mark.parametrize("codec", ["planes", "entropy"])
def test_zeros_load_by_default(tmp_path, codec):
  tree = {"w": zero_weights(), "bias": ZEROS}
  save_packed(tmp_path / "net", tree, codec=codec)
  assert_same(load_packed(tmp_path / "net"), jax.tree.map(jnp.asarray, tree))
  to_safetensors(tmp_path / "net.st", {"w": zero_weights()}, codec=codec)
  kernel = from_safetensors(tmp_path / "net.st")["w"]
  assert_same(kernel, jax.tree.map(jnp.asarray, zero_weights()))


@pytest.mark.usefixtures("low")
def test_zeros_alone_are_stored_as_they_are(tmp_path):
  noise = np.random.default_rng(0).normal(size=(1024, 1024))
  for name, tree in {
    "zeros": {"x": ZEROS},
    "moments": {"x": noise.astype(np.float32), "mu": ZEROS, "nu": ZEROS},
  }.items():
    save_packed(tmp_path / name, tree)
    with Checkpointer(tmp_path / f"{name} run") as run:
      run.save(0, tree, {})
      state = run.restore(tree)[0]
    assert_same(state, jax.tree.map(jnp.asarray, tree))
    load_packed(tmp_path / name)
  sizes = [
    checkpoint.disk_bytes(tmp_path / name)
    for name in ("zeros", "zeros run", "moments", "moments run")
  ]
  shares = np.array(sizes) / ZEROS.nbytes
  np.testing.assert_array_less([1, 1, 0.8, 0.8], shares)
  np.testing.assert_array_less(shares, [1.1, 1.1, 1, 1])


@pytest.mark.usefixtures("low")
def test_the_codec_that_is_too_good_is_planes(tmp_path):
  save_packed(tmp_path / "net", {"w": zero_weights()}, codec="entropy")
  assert read_spec(tmp_path / "net")["codec"] == "planes"
  # Not so the weights of a net, whatever their sparsity.
  codes = np.random.default_rng(0).random((1024, 1024)) > 0.999
  sparse = pack(Ternary(codes.astype(np.int8), jnp.ones(()), jnp.ones(())))
  save_packed(tmp_path / "sparse", {"w": sparse}, codec="entropy")
  assert read_spec(tmp_path / "sparse")["codec"] == "entropy"
  assert_same(load_packed(tmp_path / "sparse"), {"w": sparse})


def test_a_description_that_could_not_be_read_is_not_saved(tmp_path):
  with (
    Checkpointer(tmp_path / "run") as run,
    pytest.raises(ValueError, match=r"the spec would have 6,000,.* 5,592,405"),
  ):
    run.save(0, {"w": jnp.zeros(1)}, {}, extra="x" * 6_000_000)
  assert not list((tmp_path / "run").iterdir())


# Layouts, trees and specs of other kinds.


@pytest.mark.sample(3)
@pytest.mark.parametrize("case", crafted.LAYOUTS)
def test_other_layouts_are_refused(tmp_path, case):
  path = crafted.described(tmp_path, crafted.LAYOUTS[case])
  refused(path, "kernel is damaged: nonzero is no array of ours|the index of")


@pytest.mark.sample(3)
@pytest.mark.parametrize("case", crafted.TREES)
def test_other_trees_are_refused(tmp_path, case):
  refused(crafted.trees(tmp_path, crafted.TREES[case]), "the index of packed")


@pytest.mark.sample(3)
@pytest.mark.parametrize("case", crafted.SPECS)
def test_other_specs_are_refused(tmp_path, case):
  path = crafted.specs(tmp_path, crafted.SPECS[case])
  # Twenty thousand leaves take a while where others compute.
  text = refused(path, "net", seconds=5 if case == "many leaves" else 1)
  assert len(text) < 1500
  assert text.isprintable()


def test_arrays_in_many_chunks_are_those_of_many_devices(tmp_path):
  """Chunks of a fair size load, as processes that share an array wrote them."""
  path, spec = tmp_path / "net", None
  wanted = np.arange(1 << 16, dtype=np.float32).reshape(64, 1024)
  save_packed(path, {"x": wanted})
  base = {"driver": "file", "path": f"{path}/packed/"}
  kvstore = {"driver": "ocdbt", "base": base, "path": "0000.value/"}
  chunk = [8, 1024]
  config = {"chunk_shape": chunk, "codecs": [{"name": "bytes"}]}
  spec = {
    "driver": "zarr3",
    "kvstore": kvstore,
    "dtype": "float32",
    "metadata": {
      "shape": [64, 1024],
      "chunk_grid": {
        "name": "regular",
        "configuration": {"chunk_shape": chunk},
      },
      "codecs": [{"name": "sharding_indexed", "configuration": config}],
    },
  }
  array = crafted.tensorstore.open(spec, create=True, delete_existing=True)
  array.result().write(wanted).result()
  np.testing.assert_array_equal(load_packed(path)["x"], wanted)


# The index.


@pytest.mark.parametrize("compression", [None, {"id": "zstd", "level": 3}])
def test_the_index_of_a_deep_tree_is_read(tmp_path, compression):
  rng, wanted = np.random.default_rng(0), {}
  config = {"max_decoded_node_bytes": 300, "max_inline_value_bytes": 20}
  config |= {"compression": compression}
  base = {"driver": "file", "path": f"{tmp_path}/"}
  spec = {"driver": "ocdbt", "base": base, "config": config}
  store = crafted.tensorstore.KvStore.open(spec).result()
  batch = crafted.tensorstore.Transaction()
  for i, size in enumerate(rng.integers(60, size=200).tolist()):
    key = f"{i:04d}.{'xyz'[i % 3]}/c"
    store.with_transaction(batch).write(key, rng.bytes(size)).result()
    wanted[key] = size
  batch.commit_sync()
  assert ocdbt.sizes(tmp_path) == wanted
  store.write("a", b"one more version").result()
  assert ocdbt.sizes(tmp_path) == wanted | {"a": 16}


def test_nodes_that_do_not_say_how_much_they_hold_can_be_read():
  # Were it not so, a new TensorStore would have nothing to check.
  assert ocdbt.readable()


def test_an_index_of_a_newer_version_is_left_to_tensorstore(tmp_path):
  manifest = crafted.saved(tmp_path) / "packed" / "manifest.ocdbt"
  data = bytearray(manifest.read_bytes())
  data[12] = 1
  manifest.write_bytes(data)
  assert ocdbt.sizes(manifest.parent) == {}
  refused(tmp_path / "net", "the index of packed cannot be read")


def test_an_index_of_thousands_of_arrays_is_read(tmp_path):
  save_packed(tmp_path / "net", {f"{i}": jnp.zeros(3) for i in range(700)})
  sizes = ocdbt.sizes(tmp_path / "net" / "packed")
  assert len(sizes) == 1400
  assert sizes["0699.value/zarr.json"] > 400


# Files that are none.


@pytest.mark.sample(3)
@pytest.mark.parametrize("place", crafted.PLACES)
@pytest.mark.parametrize("kind", crafted.KINDS)
def test_what_is_no_file_is_refused_by_name(tmp_path, kind, place):
  path = crafted.special(tmp_path, crafted.KINDS[kind], place)
  match = f"^{path}: {place} is {kind}, and must be a regular file"
  for load in (load_packed, examine, read_spec, sha256_of):
    refused(path, match, load)


@pytest.mark.parametrize("link", crafted.LINKS)
def test_links_in_a_checkpoint_are_refused(tmp_path, link):
  path = crafted.special(tmp_path, crafted.LINKS[link], "packed/more")
  refused(path, "packed/more is a symbolic link")
  # In place of a folder of it, too.
  (path / "packed" / "more").unlink()
  (path / "packed" / "d").rename(tmp_path / "d")
  (path / "packed" / "d").symlink_to(tmp_path / "d")
  refused(path, "packed/d is a symbolic link")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root makes devices")
def test_devices_are_refused(tmp_path):
  def make(path):
    try:
      os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(1, 5))
    except OSError:
      pytest.skip("no devices can be made here")

  path = crafted.special(tmp_path, make, "spec/data.json")
  refused(path, "spec/data.json is a device")


def test_a_folder_in_place_of_a_file_is_refused(tmp_path):
  for place in ("spec/data.json", "packed/_METADATA", "packed/manifest.ocdbt"):
    folder = tmp_path / place.replace("/", " ")
    folder.mkdir()
    refused(crafted.special(folder, os.mkdir, place), "read")


def test_links_to_a_checkpoint_are_followed(tmp_path):
  path = crafted.saved(tmp_path)
  (tmp_path / "latest").symlink_to(path)
  tree = {"kernel": crafted.ternary()}
  assert_same(load_packed(tmp_path / "latest"), tree)
  (tmp_path / "run").mkdir()
  (tmp_path / "run" / "7").symlink_to(path)
  assert_same(load_packed(tmp_path / "run"), tree)
  to_safetensors(tmp_path / "net.st", tree)
  (tmp_path / "link.st").symlink_to("net.st")
  assert_same(from_safetensors(tmp_path / "link.st"), tree)
  (tmp_path / "hard.st").hardlink_to(tmp_path / "net.st")
  assert_same(from_safetensors(tmp_path / "hard.st"), tree)


def test_a_run_with_a_fifo_does_not_wait(tmp_path):
  state = {"w": jnp.arange(3.0)}
  with Checkpointer(tmp_path / "run") as run:
    run.save(0, state, {})
  for place in ("_CHECKPOINT_METADATA", "state/_METADATA"):
    (tmp_path / "run" / "0" / place).unlink()
    os.mkfifo(tmp_path / "run" / "0" / place)
    match = f"run/0: {place} is a FIFO"
    run = Checkpointer(tmp_path / "run")
    refused(state, match, run.restore)
    refused(tmp_path / "run", match)
    (tmp_path / "run" / "0" / place).unlink()


@pytest.mark.parametrize("kind", ["a FIFO", "a socket"])
def test_a_safetensors_file_must_be_one(tmp_path, kind):
  path = tmp_path / "net.st"
  crafted.KINDS[kind](path)
  refused(path, f"net.st is {kind}, and must be a regular", from_safetensors)
  refused("/dev/zero", "/dev/zero is a device", from_safetensors)
  refused(tmp_path, "is a folder, and must be a regular", from_safetensors)
  with pytest.raises(FileNotFoundError):
    from_safetensors(tmp_path / "nothing")


def test_large_headers_are_not_read(tmp_path):
  path = crafted.saved(tmp_path)
  for place in ("spec/data.json", "packed/_METADATA", "packed/manifest.ocdbt"):
    data = (path / place).read_bytes()
    with (path / place).open("wb") as file:
      file.truncate(1 << 40)
    refused(path, rf"{place} has 1,099,511,627,776 bytes, and may have 16,777")
    (path / place).write_bytes(data)
  file = tmp_path / "net.st"
  with file.open("wb") as f:
    f.write(struct.pack("<Q", 100_000_000))
    f.truncate(100_000_100)
  refused(file, r"header.* has 100,000,000 bytes", from_safetensors)


def test_deep_json_is_refused(tmp_path):
  path, deep = crafted.saved(tmp_path), "[" * 100_000
  for place in ("packed/_METADATA", "spec/data.json"):
    (path / place).write_text(deep)
    refused(path, "RecursionError|cannot be read")


# Names.

ESC, RTL = "\x1b[2K\x1b[1A", "\u202e"
FORGED = f"a\npacked/kernel: fine{ESC}{RTL}\r\x00\x85\u2028\ud800"
SHOWN = r"a\npacked/kernel: fine\x1b[2K\x1b[1A\u202e\r\x00\x85\u2028\ud800"  #


def test_what_is_not_seen_is_escaped():
  assert printable(FORGED) == SHOWN
  for name in ("βάρος/权重", "Dense_0/kernel", "ö ", "層·1", "نص", "𝔴"):
    assert printable(name) == name
  assert printable("x" * 201) == "x" * 200 + "... (201 characters)"
  assert printable("\n" * 1000, 3) == r"\n\n\n... (1000 characters)"
  assert leaves.name_of(()) == "the leaf"
  assert leaves.name_of(("a", "b\x07")) == r"a/b\x07"


def test_a_forged_name_fakes_no_line(tmp_path):
  path = crafted.saved(tmp_path)
  name = FORGED[:-1]

  def forge(spec):
    crafted.leaf(spec).update(path=[name], crc32=0)

  reseal(path, forge)
  message = f"net: {SHOWN[:-6]} is damaged: its crc32 differs"
  text = refused(path, "is damaged: its crc32 differs")
  assert message in text
  (error,) = examine(path).values()
  assert message in str(error)
  like = {"kernel": crafted.ternary()}
  text = refused(path, "does not fit", lambda x: load_packed(x, like))
  assert f"{SHOWN[:-6]} is stored, but not in the tree" in text


STRINGS = {
  "format": lambda s: s.update(format=FORGED),
  "codec": lambda s: s.update(codec=FORGED),
  "a long codec": lambda s: s.update(codec="x" * 100_000),
  "kind": lambda s: crafted.leaf(s).update(kind=FORGED),
  "dtype": lambda s: crafted.arrays(s).update(dtype=FORGED),
  "shape": lambda s: crafted.arrays(s).update(shape=[FORGED]),
  "array": lambda s: crafted.leaf(s)["arrays"].update(
    {FORGED: crafted.arrays(s)}
  ),
  "axis": lambda s: crafted.leaf(s).update(axis=FORGED),
  "lead": lambda s: crafted.leaf(s).update(lead=FORGED),
  "impl": lambda s: crafted.leaf(s).update(
    kind="key", impl=FORGED, arrays={"value": crafted.arrays(s)}
  ),
}


@pytest.mark.sample(3)
@pytest.mark.parametrize("case", STRINGS)
def test_no_text_of_a_spec_is_printed_as_it_is(tmp_path, case):
  path = crafted.saved(tmp_path)
  reseal(path, STRINGS[case])
  text = refused(path, "net")
  assert text.isprintable()
  assert len(text) < 1500
  if case != "lead":  # which is that of `like`
    like = {"kernel": crafted.ternary()}
    text = refused(path, "net", lambda x: load_packed(x, like))
    assert text.isprintable()


def test_no_text_of_a_safetensors_file_is_printed_as_it_is(tmp_path):
  planes = {
    f"x.{k}": np.asarray(getattr(crafted.ternary(), k)) for k in leaves.FIELDS
  }
  path = tmp_path / "net.st"
  shape = [16, 8]
  for change in (
    {"name": FORGED[:-1]},
    {"kind": FORGED[:-1]},
    {"path": [FORGED[:-1], 1]},
    {"kind": "ternary", "axis": 1},
    {"kind": "ternary", "path": [FORGED[:-1]], "lead": 9},
    {"kind": "ternary", "path": ["x" * 10_000] * 65},
  ):
    crafted.forge(path, planes, shape, **change)
    text = refused(path, "cannot load", from_safetensors)
    assert text.isprintable()
    assert len(text) < 2500


def test_names_of_files_are_escaped(tmp_path):
  path = crafted.saved(tmp_path)
  os.mkfifo(path / "packed" / f"x\n{ESC}fine")
  text = refused(path, "is a FIFO")
  assert r"packed/x\n\x1b[2K\x1b[1Afine is a FIFO" in text


# The digest of the content.

TREE = {
  "βάρος": {"w": np.arange(6, dtype="<f4").reshape(2, 3)},
  "n": np.array(3, np.int32),
}


def independent_digest(tree):
  """The SHA-256 of a dict of dicts, by NumPy, hashlib, struct and json alone.

  A ternary leaf is (codes, w_p, w_n).
  """
  digests = []

  def add(path, x):
    if isinstance(x, dict):
      for key, value in x.items():
        add([*path, key], value)
      return
    kind, arrays = "dense", {"value": x}
    if isinstance(x, tuple):
      kind, (x, w_p, w_n) = "ternary", x
      axis = next((i for i, n in enumerate(x.shape) if n and n % 8 == 0), None)
      bits = {"nonzero": x != 0, "sign": x < 0}
      arrays = {k: np.packbits(b, axis, "little") for k, b in bits.items()}
      arrays |= {"w_p": w_p, "w_n": w_n}
    about = {
      k: {"dtype": a.dtype.name, "shape": list(a.shape)}
      for k, a in arrays.items()
    }
    header = {"arrays": about, "kind": kind, "path": path, "shape": x.shape}
    text = json.dumps(header, sort_keys=True).encode("ascii")
    data = [struct.pack("<Q", len(text)), text]
    data += [arrays[k].tobytes() for k in sorted(arrays)]
    digests.append(hashlib.sha256(b"".join(data)).digest())

  add([], tree)
  whole = b"tern_jax content 1\n" + b"".join(sorted(digests))
  return hashlib.sha256(whole).hexdigest()


@pytest.mark.parametrize("shape", [(16, 24), (3, 5), (8, 3, 16)])
def test_the_digest_is_what_the_format_says(tmp_path, shape):
  codes = np.random.default_rng(0).integers(-1, 2, shape).astype(np.int8)
  lead = (shape[0], 1, 1) if len(shape) == 3 else ()
  scales = np.random.default_rng(1).uniform(0.1, 1, (2, *lead))
  w_p, w_n = scales.astype(np.float32)
  tree = TREE | {"kernel": pack(Ternary(*map(jnp.asarray, (codes, w_p, w_n))))}
  wanted = independent_digest(TREE | {"kernel": (codes, w_p, w_n)})
  backwards = dict(reversed(tree.items()))
  for codec in ("planes", "entropy"):
    save_packed(tmp_path / codec, tree, codec=codec, method=codec)
    to_safetensors(tmp_path / f"{codec}.st", backwards, codec=codec)
    assert sha256_of(tmp_path / codec) == wanted
    assert export.sha256_of(tmp_path / f"{codec}.st") == wanted
  with Checkpointer(tmp_path / "run") as run:
    run.save(3, {"x": jnp.ones(2)}, tree, extra=[1])
  assert sha256_of(tmp_path / "run") == wanted


def test_each_part_of_the_content_changes_the_digest(tmp_path):
  kernel = crafted.ternary()
  tree = {"a": {"kernel": kernel, "bias": jnp.arange(4.0)}}

  def digest(tree):
    to_safetensors(tmp_path / "net.st", tree, overwrite=True)
    return export.sha256_of(tmp_path / "net.st")

  bias = tree["a"]["bias"]
  planes = {"nonzero": kernel.sign, "sign": 0 * kernel.sign}
  changed = [
    {"a": {"kernel": kernel, "offset": bias}},
    {"a": {"kernel": kernel}, "bias": bias},
    {"a": {"kernel": kernel, "bias": bias.at[0].set(-0.0)}},
    {"a": {"kernel": kernel, "bias": bias[None]}},
    {"a": {"kernel": kernel, "bias": bias.view(jnp.int32)}},
    {"a": {"kernel": kernel.dequantize(), "bias": bias}},
    {"a": {"kernel": replace(kernel, w_p=kernel.w_n), "bias": bias}},
    {"a": {"kernel": replace(kernel, w_p=kernel.w_p[None]), "bias": bias}},
    {"a": {"kernel": replace(kernel, **planes), "bias": bias}},
    {"a": {"bias": bias}},
    {},
  ]
  digests = [digest(x) for x in (tree, *changed)]
  assert len({*digests}) == len(digests)
  assert digest(tree) == digests[0]


def test_boxes_are_no_part_of_the_digest(tmp_path):
  class Box(NamedTuple):
    value: jax.Array

  boxed = {"a": {"bias": Box(jnp.ones(3))}, "value": {"x": jnp.zeros(1)}}
  save_packed(tmp_path / "boxed", boxed)
  save_packed(tmp_path / "plain", load_packed(tmp_path / "boxed"))
  digests = [sha256_of(tmp_path / name) for name in ("boxed", "plain")]
  assert digests[0] == digests[1]
  to_safetensors(tmp_path / "net.st", boxed)
  assert export.sha256_of(tmp_path / "net.st") == digests[0]


def test_a_digest_is_checked_by_loads(tmp_path):
  tree = {"kernel": crafted.ternary(), "bias": jnp.ones(3)}
  path, file = tmp_path / "net", tmp_path / "net.st"
  save_packed(path, tree)
  to_safetensors(file, tree, codec="entropy")
  right, wrong = sha256_of(path), "0" * 64
  for given in (right, right.upper()):
    assert_same(load_packed(path, sha256=given), tree)
    assert_same(load_packed(path, like=tree, sha256=given), tree)
    assert_same(from_safetensors(file, sha256=given), tree)
  for load in (load_packed, from_safetensors):
    where = path if load is load_packed else file
    with pytest.raises(ValueError, match=f"SHA-256 {right}, and not {wrong}"):
      load(where, sha256=wrong)
    for digest in ("abc", right[:-1] + "g", f"sha256:{right}", 7):
      with pytest.raises(ValueError, match="must be 64 hexadecimal digits"):
        load(where, sha256=digest)
  with pytest.raises(ValueError, match="it needs partial=False"):
    load_packed(path, {"bias": tree["bias"]}, partial=True, sha256=right)


def test_a_forgery_with_right_checksums_has_another_digest(tmp_path):
  path, codes = tmp_path / "net", jnp.ones((8, 8), jnp.int8)
  one, two = (
    pack(Ternary(codes, w, w)) for w in (jnp.ones(()), jnp.full((), 2.0))
  )
  save_packed(path, {"kernel": one})
  published = sha256_of(path)
  save_packed(path, {"kernel": two}, overwrite=True)
  load_packed(path)
  with pytest.raises(CheckpointError, match=f"and not {published}"):
    load_packed(path, sha256=published)


# Memory, each load in a process of its own.

PROGRAM = """
import pathlib, sys, tempfile
import numpy as np
from tern_jax.checkpoint import load_packed, save_packed
from tern_jax import Ternary, pack
from tern_jax.export import from_safetensors, to_safetensors

def memory(name):
  lines = pathlib.Path("/proc/self/status").read_text().splitlines()
  (line,) = (line for line in lines if line.startswith(name))
  return 1024 * int(line.split()[1])

load = {"net": load_packed, "st": from_safetensors}[sys.argv[1]]
one, codes = np.ones((), np.float32), np.ones((8, 8), np.int8)
tree = {"w": pack(Ternary(codes, one, one)), "x": np.zeros(8, np.float32)}
# What is loaded or compiled once is not counted.
with tempfile.TemporaryDirectory() as folder:
  for codec in ("planes", "entropy"):
    save_packed(f"{folder}/{codec}", tree, codec=codec)
    load_packed(f"{folder}/{codec}")
    to_safetensors(f"{folder}/{codec}.st", tree, codec=codec)
    from_safetensors(f"{folder}/{codec}.st")
pathlib.Path("/proc/self/clear_refs").write_text("5")  # forgets the peak
before = memory("VmRSS")
try:
  load(sys.argv[2])
except ValueError as e:
  print(e, file=sys.stderr)
print(memory("VmHWM") - before)
"""


def peak(path):
  kind = "st" if path.is_file() else "net"
  done = subprocess.run(
    [sys.executable, "-W", "ignore", "-c", PROGRAM, kind, path],
    capture_output=True,
    text=True,
    timeout=120,
    check=True,
    env=os.environ | {"JAX_PLATFORMS": "cpu"},
  )
  return int(done.stdout), done.stderr


@pytest.mark.skipif(
  not os.path.exists("/proc/self/clear_refs"), reason="measures as Linux does"
)
@pytest.mark.parametrize("build", [*map(long, CLAIMS)])
def test_hostile_files_take_no_memory(tmp_path, build):
  grown, error = peak(build(tmp_path))
  assert error
  assert grown < 32 << 20


@pytest.mark.long
@pytest.mark.skipif(
  not os.path.exists("/proc/self/clear_refs"), reason="measures as Linux does"
)
@pytest.mark.parametrize("codec", codecs.CODECS)
@pytest.mark.parametrize("kind", ["net", "net.st"])
def test_a_load_takes_three_times_its_content_at_most(tmp_path, codec, kind):
  rng, one = np.random.default_rng(0), np.ones((), np.float32)
  nonzero = rng.integers(0, 256, (2500, 4000), np.uint8)
  sign = nonzero & rng.integers(0, 256, nonzero.shape, np.uint8)
  tree = {"w": PackedTernary(nonzero, sign, one, one, (20_000, 4000), 0)}
  save = save_packed if kind == "net" else to_safetensors
  save(tmp_path / kind, tree, codec=codec)
  grown, error = peak(tmp_path / kind)
  assert not error
  assert grown < 3.1 * tree["w"].nbytes + (16 << 20)
