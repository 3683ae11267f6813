"""The command `python -m tern_jax`."""

import json
import re
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from experiments.common.faults.crafted import reseal
from tern_jax import __main__, export, metrics
from tern_jax.checkpoint import Checkpointer, load_packed, save_packed
from tern_jax.core.containers import Ternary
from tern_jax.storage.packed import pack
from tests.helpers import assert_same


def layer(codes, *scales):
  w_p, w_n = jnp.asarray(scales, jnp.float32)
  return pack(Ternary(jnp.asarray(codes, jnp.int8), w_p, w_n))


def net(flipped=0):
  """Two layers: 1.5 bits of entropy a weight, and binary ones in channels."""
  codes = np.tile([0, 1, 0, -1], 16).reshape(8, 8)
  codes.ravel()[1 : 4 * flipped : 4] = -1
  return {
    "a": {"kernel": layer(codes, 0.5, 0.25), "bias": jnp.zeros(8)},
    "b": {"kernel": layer(np.resize([1, -1], (8, 2)), *[[[1.0, 2.0]]] * 2)},
  }


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
  path = tmp_path_factory.mktemp("saved")
  save_packed(path / "net", net(), method="TTQ()")
  with Checkpointer(path / "run") as run:
    for step in (3, 12):
      run.save(step, {"w": jnp.arange(step)}, net(step))
  return path


@pytest.fixture
def damaged(tmp_path):
  """A checkpoint of which one leaf is damaged."""
  save_packed(tmp_path / "net", net())
  reseal(tmp_path / "net", lambda s: s["leaves"]["packed"][1].update(crc32=0))
  return tmp_path / "net"


def test_inspect_prints_a_table(call, saved):
  status, out, err = call("inspect", saved / "net")
  assert (status, err) == (0, "")
  assert (
    out
    == f"""\
{saved}/net: TTQ(), planes
layer     shape  zeros    bits  entropy              scales  crc32
a/kernel    8x8  0.500   3.000    1.500  tensor 0.25 to 0.5     ok
b/kernel    8x2  0.000  10.000    1.000          1x2 1 to 2     ok
80 weights, 0.400 of them zero
  float32              320 bytes   32.000 bits a weight
  stored                44 bytes    4.400 bits a weight
  entropy               14 bytes    1.400 bits a weight
  stored is 1 / 7.27 of float32, and 3.143 times the entropy
1 other arrays of 32 bytes
"""
  )


def test_inspect_says_as_much_in_json(call, saved):
  status, out, _ = call("inspect", saved / "net", "--json")
  report = json.loads(out)
  assert status == 0
  assert report["method"] == "TTQ()"
  assert report["codec"] == "planes"
  tree, total = net(), report["total"]
  for row, name in zip(report["layers"], "ab", strict=True):
    leaf = tree[name]["kernel"]
    assert row["path"] == f"{name}/kernel"
    assert row["weights"] == leaf.size
    assert row["bytes"] == leaf.nbytes
    assert row["sparsity"] == float(metrics.sparsity(leaf))
    assert row["entropy"] == pytest.approx(float(metrics.entropy(leaf)))
    assert row["bits_per_weight"] == metrics.bits_per_weight(leaf)
    assert row["crc32"] == "ok"
  assert report["layers"][0]["scales"] == {
    "shape": [],
    "equal": False,
    "min": 0.25,
    "max": 0.5,
  }
  assert [row["bytes"] for row in report["others"]] == [32]
  assert total["weights"] == 80
  assert total["bytes"] == 24 + 20
  assert total["float32_bytes"] == 320
  assert total["entropy_bytes"] == pytest.approx((64 * 1.5 + 16) / 8)
  assert total["entropy_ratio"] == pytest.approx(44 / 14)
  assert total["float32_ratio"] == pytest.approx(320 / 44)
  assert total["sparsity"] == 32 / 80


def test_inspect_counts_what_a_codec_stores(call, tmp_path):
  rng = np.random.default_rng(0)
  codes = rng.choice([0, 1, -1], (256, 256), p=[0.9, 0.05, 0.05])
  save_packed(tmp_path / "net", {"w": layer(codes, 0.5, 0.5)}, codec="entropy")
  _, out, _ = call("inspect", tmp_path / "net", "--json")
  report = json.loads(out)
  assert report["codec"] == "entropy"
  assert 1 < report["total"]["entropy_ratio"] < 1.02


def test_inspect_and_verify_tell_damaged_leaves_from_whole_ones(call, damaged):
  status, out, _ = call("inspect", damaged)
  assert status == 1
  assert [line.split()[-1] for line in out.splitlines()[2:4]] == [
    "damaged",
    "ok",
  ]
  # Sums are over what is whole.
  assert "16 weights, 0.000 of them zero" in out
  status, out, _ = call("verify", damaged)
  assert status == 1
  fault = f"{damaged}: a/kernel is damaged: its crc32 differs."
  assert out == f"packed/a/kernel: {fault}\n"
  status, out, _ = call("verify", damaged, "--json")
  assert status == 1
  assert json.loads(out)["damaged"] == {"packed/a/kernel": fault}


def test_verify_looks_at_every_part(call, saved, tmp_path):
  status, out, _ = call("verify", saved / "run")
  assert status == 0
  assert out == (
    f"{saved}/run/12: all leaves are as they were saved, 3 of packed, 1 of"
    " state\n"
  )
  with Checkpointer(tmp_path / "run") as run:
    run.save(1, {"w": jnp.arange(3)}, net())
  reseal(
    tmp_path / "run" / "1", lambda s: s["leaves"]["state"][0].update(crc32=0)
  )
  status, out, _ = call("verify", tmp_path / "run")
  assert status == 1
  assert out.startswith("state/w: ")
  spec = tmp_path / "run" / "1" / "spec" / "data.json"
  spec.write_text(spec.read_text()[:-5])
  status, out, _ = call("verify", tmp_path / "run")
  assert status == 1
  assert out.startswith("spec: ")


# Orbax abandons coroutines where it finds damage.
abandons = pytest.mark.filterwarnings(
  "ignore::pytest.PytestUnraisableExceptionWarning",
  "ignore:coroutine .* was never awaited:RuntimeWarning",
)


@abandons
def test_a_chunk_that_cannot_be_read_is_that_of_one_leaf(call, tmp_path):
  codes = np.random.default_rng(0).integers(-1, 2, (2, 128, 128))
  tree = {"a": layer(codes[0], 1, 1), "b": layer(codes[1], 1, 1)}
  path, magic = tmp_path / "net", b"\x28\xb5\x2f\xfd"  # of a Zstandard frame
  save_packed(path, tree | {"bias": jnp.arange(5000.0)})
  blamed = []
  for file in (path / "packed" / "ocdbt.process_0" / "d").iterdir():
    data = file.read_bytes()
    for frame in re.finditer(re.escape(magic), data):
      at = frame.start()
      file.write_bytes(data[:at] + b"\0" + data[at + 1 :])
      status, out, _ = call("inspect", path, "--json")
      report = json.loads(out)
      rows = report["layers"] + report["others"]
      damaged = [row["path"] for row in rows if row["crc32"] != "ok"]
      # Some of what orbax writes is never read.
      assert (status, len(damaged)) in ((0, 0), (1, 1))
      blamed += damaged
    file.write_bytes(data)
  assert {*blamed} == {"a", "b", "bias"}


@abandons
def test_an_index_that_cannot_be_read_is_that_of_all_leaves(call, tmp_path):
  path = tmp_path / "net"
  save_packed(path, net())
  (path / "packed" / "manifest.ocdbt").write_bytes(b"")
  status, out, _ = call("verify", path)
  assert status == 1
  assert out.splitlines() == [
    f"packed/{name}: {path}: the index of packed cannot be read: any of its"
    " leaves may be damaged."
    for name in ("a/bias", "a/kernel", "b/kernel")
  ]


def test_all_leaves_are_lost_with_their_file(call, saved, tmp_path):
  save_packed(tmp_path / "net", net())
  for file in (tmp_path / "net" / "packed").rglob("*"):
    if file.is_file():
      file.unlink()
  status, out, _ = call("verify", tmp_path / "net", "--json")
  assert status == 1
  assert list(json.loads(out)["damaged"]) == [
    "packed/a/bias",
    "packed/a/kernel",
    "packed/b/kernel",
  ]


def test_diff_counts_flips(call, saved):
  status, out, _ = call("diff", saved / "run" / "3", saved / "run")
  assert status == 1
  assert (
    out
    == """\
layer     weights  flips     share  +zeros  -zeros  signs
a/kernel       64      9  14.0625%       0       0      9
b/kernel       16      0   0.0000%       0       0      0
9 codes flipped, 11.2500%
"""
  )
  status, out, _ = call("diff", saved / "net", saved / "net", "--json")
  assert status == 0
  assert json.loads(out)["flips"] == 0


def test_diff_tells_what_cannot_be_compared(call, tmp_path):
  old, new = net(), net()
  codes = np.resize([1, 0, 0, -1], (8, 8))
  new["a"] = {"kernel": layer(codes, 0.5, 0.3), "bias": jnp.ones(8)}
  new["b"] = {"kernel": jnp.ones((8, 2))}
  new["c"] = jnp.ones(3)
  save_packed(tmp_path / "old", {**old, "d": jnp.ones(2)})
  save_packed(tmp_path / "new", new)
  status, out, _ = call("diff", tmp_path / "old", tmp_path / "new")
  assert status == 1
  assert (
    out
    == f"""\
layer     weights  flips     share  +zeros  -zeros  signs
a/kernel       64     32  50.0000%      16      16      0  other magnitudes
32 codes flipped, 50.0000%
d: only in {tmp_path}/old
c: only in {tmp_path}/new
b/kernel: ternary float32 8x2 became float32 8x2
a/bias: other values
"""
  )


def test_export_writes_a_file(call, saved, tmp_path):
  status, *_ = call(
    *("export", saved / "net", tmp_path / "x.safetensors"),
    *("--to", "safetensors", "--codec", "entropy"),
  )
  assert status == 0
  got = export.from_safetensors(tmp_path / "x.safetensors")
  assert_same(got, load_packed(saved / "net"))
  status, _, err = call(
    "export", saved / "net", tmp_path / "x.safetensors", "--to", "safetensors"
  )
  assert status == 2
  assert "already exists" in err
  save_packed(tmp_path / "rows", {"w": layer(np.ones((256, 2)), 0.5, 0.5)})
  status, out, _ = call(
    "export", tmp_path / "rows", tmp_path / "x.gguf", "--to", "gguf"
  )
  assert (status, out) == (0, "w: relative RMS error 0.0e+00\n")


@pytest.mark.parametrize(
  ("args", "reason"),
  [
    (("inspect", "{}/none"), "none does not exist: give the folder"),
    (("verify", "{}"), "holds no checkpoint: its spec is missing"),
    (("diff", "{}/net", "{}/none"), "none does not exist"),
    (("inspect", "{}/net/spec/data.json"), "data.json is a file"),
    (("export", "{}/net", "{}/x", "--to", "stablehlo"), "the model in it"),
    (("export", "{}/net", "{}/x", "--to", "gguf"), "no multiple of 256"),
  ],
)
def test_bad_input_is_explained_in_one_line(call, saved, args, reason):
  status, out, err = call(*(arg.format(saved) for arg in args))
  assert (status, out) == (2, "")
  assert err.startswith(f"tern_jax {args[0]}: ")
  assert err.count("\n") == 1
  assert reason in err


def test_damage_ends_a_comparison(call, damaged):
  status, out, err = call("diff", damaged, damaged)
  assert (status, out) == (2, "")
  assert "a/kernel is damaged" in err


def test_a_spec_that_lacks_fields_is_explained(call, damaged):
  reseal(damaged, lambda s: s.pop("versions"))
  status, _, err = call("inspect", damaged)
  assert status == 2
  assert err == "tern_jax inspect: KeyError: 'versions'\n"


def test_without_a_command_there_is_help(capsys):
  with pytest.raises(SystemExit) as error:
    __main__.main([])
  assert error.value.code == 2
  assert "inspect,verify,diff,export" in capsys.readouterr().err


def test_as_a_process(saved):
  done = subprocess.run(
    [sys.executable, "-m", "tern_jax", "verify", saved / "net"],
    capture_output=True,
    text=True,
    check=True,
  )
  assert "all leaves are as they were saved, 3 of packed" in done.stdout
  assert not done.stderr
