"""The command `python -m tern_jax`: files of all kinds, and mishaps."""

import errno
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
import zipfile

import jax.numpy as jnp
import numpy as np
import pytest
from flax import serialization
from orbax.checkpoint import v1 as orbax

from tern_jax import __main__, export
from tern_jax.checkpoint import Checkpointer, load_packed, save_packed
from tern_jax.cli import output
from tern_jax.core.containers import Ternary
from tern_jax.export import files, gguf_file
from tern_jax.storage.packed import pack, to_ternary, validate
from tests.helpers import assert_same


def layer(codes, scale=0.5):
  scale = jnp.asarray(scale, jnp.float32)
  return pack(Ternary(jnp.asarray(codes, jnp.int8), scale, scale))


def net(seed=0):
  codes = np.random.default_rng(seed).integers(-1, 2, (256, 8))
  return {"a": {"kernel": layer(codes), "bias": jnp.arange(3.0)}}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
  path = tmp_path_factory.mktemp("saved")
  save_packed(path / "net", net())
  export.to_safetensors(path / "net.safetensors", net())
  for name in export.GGUF_TYPES:
    export.to_gguf(path / f"{name}.gguf", net(), name)
  return path


def test_a_safetensors_file_is_shown_as_a_checkpoint_is(call, saved):
  _, table, _ = call("inspect", saved / "net")
  status, out, _ = call("inspect", saved / "net.safetensors")
  assert status == 0
  head, *rows = out.splitlines()
  assert head == f"{saved}/net.safetensors: safetensors, planes"
  assert rows == table.splitlines()[1:]
  _, out, _ = call("inspect", saved / "net.safetensors", "--json")
  report = json.loads(out)
  assert report["kind"] == "safetensors"
  assert (report["format"], report["codec"]) == (1, "planes")
  _, out, _ = call("inspect", saved / "net", "--json")
  expected = json.loads(out)
  assert expected["kind"] == "checkpoint"
  for key in ("layers", "others", "total"):
    assert report[key] == expected[key]
  status, out, _ = call("verify", saved / "net.safetensors")
  assert (status, out) == (
    0,
    f"{saved}/net.safetensors: all leaves are as they were saved, 2 of"
    " packed\n",
  )


def test_damage_to_a_safetensors_file_is_that_of_a_leaf(call, saved, tmp_path):
  path = tmp_path / "net.safetensors"
  data = bytearray((saved / "net.safetensors").read_bytes())
  data[data.rindex(np.arange(3.0, dtype=np.float32).tobytes())] ^= 1
  path.write_bytes(data)
  status, out, _ = call("verify", path)
  fault = f"{path}: a.bias is damaged: its crc32 differs."
  assert (status, out) == (1, f"packed/a/bias: {fault}\n")
  status, out, _ = call("inspect", path)
  assert status == 1
  assert out.endswith("  a/bias: damaged\n")
  path.write_bytes(data[:-1])
  status, out, _ = call("verify", path, "--json")
  report = json.loads(out)
  assert (status, report["kind"]) == (1, "safetensors")
  assert list(report["damaged"]) == ["header"]


@pytest.mark.parametrize("name", export.GGUF_TYPES)
def test_a_gguf_file_is_shown(call, saved, name):
  path = saved / f"{name}.gguf"
  status, out, _ = call("inspect", path, "--json")
  report = json.loads(out)
  assert (status, report["kind"]) == (0, "gguf")
  (row,), (other,) = report["layers"], report["others"]
  codes = np.asarray(to_ternary(net()["a"]["kernel"]).codes)
  assert row["path"] == "a.kernel"
  assert (row["type"], row["shape"]) == (name, [8, 256])
  assert row["sparsity"] == np.mean(codes == 0)
  bits = {"TQ1_0": 1.6875, "TQ2_0": 2.0625}[name]
  assert row["bits_per_weight"] == bits
  assert (row["scales"]["min"], row["scales"]["max"]) == (0.5, 0.5)
  assert (other["path"], other["type"]) == ("a.bias", "F32")
  status, out, _ = call("verify", path)
  assert status == 0
  assert "2 tensors are complete, and all values finite" in out
  found = {x.name: leaf for x, leaf in gguf_file.examine(path)}
  got = to_ternary(found["a.kernel"])
  np.testing.assert_array_equal(got.codes, codes.T)
  assert found["a.bias"].tolist() == [0, 1, 2]


@pytest.mark.parametrize("name", export.GGUF_TYPES)
def test_any_blocks_are_read_as_ggml_reads_them(name):
  gguf = pytest.importorskip("gguf")
  kind = gguf.GGMLQuantizationType[name]
  width = gguf.GGML_QUANT_SIZES[kind][1]
  blocks = np.random.default_rng(0).integers(0, 256, (500, width), np.uint8)
  blocks[:, -2:] = np.full(500, 1, "<f2").view(np.uint8).reshape(-1, 2)
  decode = {"TQ1_0": gguf_file._tq1_0, "TQ2_0": gguf_file._tq2_0}[name]
  expected = gguf.dequantize(blocks, kind)
  np.testing.assert_array_equal(decode(blocks[:, :-2]), expected)


@pytest.mark.sample(2)
@pytest.mark.parametrize("shape", [(768,), (12, 256), (20, 512), (3, 5, 256)])
def test_a_tensor_is_read_in_parts(tmp_path, monkeypatch, shape):
  codes = np.random.default_rng(0).integers(-1, 2, shape)
  rows = codes if len(shape) == 1 else np.moveaxis(codes, -1, -2)
  monkeypatch.setattr(gguf_file, "_PART", 2000)
  export.to_gguf(tmp_path / "x.gguf", {"x": layer(rows)})
  ((_, found),) = gguf_file.examine(tmp_path / "x.gguf")
  validate(found)
  np.testing.assert_array_equal(to_ternary(found).codes, codes)
  np.testing.assert_array_equal(found.dequantize(), 0.5 * codes)


def _changed(data, at, value):
  return data[:at] + value + data[at + len(value) :]


def test_damage_to_a_gguf_file_is_told(call, saved, tmp_path):
  data = (saved / "TQ2_0.gguf").read_bytes()
  path = tmp_path / "net.gguf"
  _, tensors = gguf_file.read_header(saved / "TQ2_0.gguf")
  start = {x.name: x.offset for x in tensors}
  for changed, name, fault in (
    (data[:-40], "packed/a.kernel", "the file ends before it does"),
    (_changed(data, start["a.kernel"], b"\xff"), "packed/a.kernel", "a code"),
    (
      _changed(data, start["a.kernel"] + 64, b"\x00\x7e"),
      "packed/a.kernel",
      "scales that are not finite",
    ),
    (
      _changed(data, start["a.bias"], b"\x00\x00\xc0\x7f"),
      "packed/a.bias",
      "values that are not finite",
    ),
    (data[:100], "header", "it ends within its header"),
    # Some claims: tensors, metadata, the length of a name.
    *(
      (_changed(data, at, b"\xff" * 7), "header", "claims")
      for at in (8, 16, 24)
    ),
    (data.replace(b"a.kernel", b"a.bernel", 1), "header", "not those of its"),
  ):
    path.write_bytes(changed)
    status, out, _ = call("verify", path, "--json")
    damaged = json.loads(out)["damaged"]
    assert status == 1
    assert list(damaged) == [name]
    assert fault in damaged[name]


def test_no_change_of_a_gguf_file_ends_in_a_traceback(saved, tmp_path, call):
  rng = np.random.default_rng(0)
  data = (saved / "TQ1_0.gguf").read_bytes()
  path = tmp_path / "net.gguf"
  for at in rng.integers(0, 480, 60):
    path.write_bytes(_changed(data, at, rng.bytes(1)))
    status, _, err = call("verify", path)
    assert status in (0, 1, 2)
    assert "Error: " not in err


def test_kinds_are_compared(call, saved, tmp_path):
  status, out, _ = call("diff", saved / "net", saved / "net.safetensors")
  assert status == 0
  assert "0 codes flipped" in out
  export.to_gguf(tmp_path / "other.gguf", net(1))
  old, new = (
    np.asarray(to_ternary(net(seed)["a"]["kernel"]).codes) for seed in (0, 1)
  )
  status, out, _ = call(
    "diff", saved / "TQ1_0.gguf", tmp_path / "other.gguf", "--json"
  )
  report = json.loads(out)
  assert status == 1
  assert report["kind"] == {"a": "gguf", "b": "gguf"}
  assert report["flips"] == np.sum(old != new)
  # The types differ, the codes and scales do not.
  status, *_ = call("diff", saved / "TQ1_0.gguf", saved / "TQ2_0.gguf")
  assert status == 0
  status, _, err = call("diff", saved / "net", saved / "TQ1_0.gguf")
  assert status == 2
  assert "names and axes of its own" in err


def test_a_digest_is_that_of_the_content(call, saved, tmp_path):
  save_packed(tmp_path / "net", net(), codec="entropy")
  lines = set()
  for path in (saved / "net", saved / "net.safetensors", tmp_path / "net"):
    status, out, _ = call("verify", path, "--sha256")
    assert status == 0
    lines.add(out.splitlines()[-1])
  (line,) = lines
  name, digest = line.split()
  assert name == "sha256"
  load_packed(saved / "net", sha256=digest)
  _, out, _ = call("verify", saved / "net", "--sha256", "--json")
  assert json.loads(out)["sha256"] == digest
  status, _, err = call("verify", saved / "TQ1_0.gguf", "--sha256")
  assert status == 2
  assert "give what it was exported from" in err


def test_what_is_exported_from_a_file(call, saved, tmp_path):
  out = tmp_path / "new.safetensors"
  status, *_ = call(
    *("export", saved / "net.safetensors", out, "--to", "safetensors"),
    *("--codec", "entropy"),
  )
  assert status == 0
  assert_same(export.from_safetensors(out), net())
  status, _, err = call(
    *("export", saved / "TQ1_0.gguf", tmp_path / "x", "--to", "safetensors")
  )
  assert status == 2
  assert "rounded to half precision" in err


def test_a_folder_with_one_checkpoint_in_it(call, tmp_path):
  work = tmp_path / "runs" / "digits"
  with Checkpointer(work / "checkpoints" / "ternary") as run:
    run.save(7, {"w": jnp.arange(3)}, net())
  (work / "config.json").write_text("{}")
  for given in (work, work / "checkpoints"):
    status, out, _ = call("verify", given, "--json")
    report = json.loads(out)
    assert (status, report["path"]) == (0, f"{work}/checkpoints/ternary/7")
    assert report["leaves"] == {"packed": 2, "state": 1}
  # What is nearer to the top is what the run came to.
  save_packed(work / "packed", net())
  for given in (work, tmp_path / "runs"):
    _, out, _ = call("verify", given, "--json")
    assert json.loads(out)["path"] == f"{work}/packed"
  save_packed(tmp_path / "runs" / "mnist" / "packed", net())
  status, _, err = call("inspect", tmp_path / "runs")
  assert status == 2
  assert "Give one of the 2 in it: digits/packed, mnist/packed." in err
  status, _, err = call("inspect", work / "packed" / "packed")
  assert status == 2
  assert f"is a part of a checkpoint: give {work}/packed" in err


def test_a_damaged_step_is_not_passed_over(call, tmp_path):
  with Checkpointer(tmp_path / "checkpoints" / "ternary") as run:
    for step in (1, 2):
      run.save(step, {"w": jnp.arange(3)}, net())
  shutil.rmtree(tmp_path / "checkpoints" / "ternary" / "2" / "spec")
  for given in (".", "checkpoints", "checkpoints/ternary"):
    status, out, err = call("verify", tmp_path / given)
    assert (status, out) == (2, "")
    assert "holds no checkpoint: its spec is missing" in err
  status, _, err = call("verify", tmp_path / "checkpoints" / "ternary" / "2")
  assert status == 2
  assert "It is what is left of a checkpoint of tern_jax." in err


def _zip(path, *names):
  with zipfile.ZipFile(path, "w") as archive:
    for name in names:
      archive.writestr(name, "content")


def _numpy(path):
  with path.open("wb") as file:
    np.save(file, np.ones(3))


FOREIGN = {
  "a PyTorch checkpoint;": lambda p: _zip(p, "net/data.pkl", "net/version"),
  "NumPy arrays (.npz)": lambda p: _zip(p, "a.npy"),
  "a Keras model": lambda p: _zip(p, "metadata.json", "model.weights.h5"),
  "a ZIP archive;": lambda p: _zip(p, "notes"),
  "a ZIP archive, incomplete": lambda p: p.write_bytes(b"PK\3\4" + bytes(40)),
  "a Python pickle, which could run code": lambda p: p.write_bytes(
    pickle.dumps({"w": [1.0]})
  ),
  "a PyTorch checkpoint, which could run code": lambda p: p.write_bytes(
    pickle.dumps(0x1950A86A20F9469CFC6C, 2)
  ),
  "a NumPy array": _numpy,
  "an HDF5 file": lambda p: p.write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(90)),
  "a TFLite model": lambda p: p.write_bytes(b"\x1c\0\0\0TFL3" + bytes(90)),
  "an ONNX model": lambda p: p.write_bytes(b"\x08\x08\x12\x07pytorch" * 9),
  "msgpack, as Flax writes it": lambda p: p.write_bytes(
    serialization.to_bytes({"params": {"w": np.ones(3)}})
  ),
  "a StableHLO artefact": lambda p: export.to_stablehlo(
    p, lambda w, x: x @ w, jnp.ones((3, 3)), jnp.ones((1, 3))
  ),
  "a safetensors file of 2 tensors, not written by to_safetensors": lambda p: (
    pytest.importorskip("safetensors.numpy").save_file(
      {"a": np.ones(3), "b": np.ones(2)}, p, {"format": "pt"}
    )
  ),
  "a GGUF file of 0 tensors, architecture unknown, not written": lambda p: (
    p.write_bytes(b"GGUF" + bytes([3, 0, 0, 0]) + bytes(16))
  ),
  "run `git lfs pull` first": lambda p: p.write_bytes(
    b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"
  ),
  "JSON": lambda p: p.write_text('{"a": 1}'),
  "text": lambda p: p.write_text("größe\n"),
  "an empty file": lambda p: p.touch(),
  "data of an unknown format": lambda p: p.write_bytes(b"\xff\0" * 99),
  "a FIFO": os.mkfifo,
  "an Orbax checkpoint, not written by tern_jax": lambda p: orbax.save(
    p, {"w": jnp.ones(3)}
  ),
  "an empty folder": lambda p: p.mkdir(),
  "its spec is missing. Give a checkpoint": lambda p: (p / "in").mkdir(
    parents=True
  ),
}


@pytest.mark.parametrize("what", FOREIGN)
def test_what_is_of_another_origin_gets_told_what_it_is(call, tmp_path, what):
  path = tmp_path / "foreign"
  FOREIGN[what](path)
  status, out, err = call("inspect", path)
  assert (status, out) == (2, "")
  assert err.startswith(f"tern_jax inspect: {path}")
  assert what in err
  assert err.count("\n") == 1


@pytest.mark.parametrize("data", [b"\x08", b"\x81", b"\x80", b"{", b"\xde\0"])
def test_a_file_of_a_byte_or_two(call, tmp_path, data):
  (tmp_path / "x").write_bytes(data)
  status, _, err = call("inspect", tmp_path / "x")
  assert status == 2
  assert "x is a file: " in err


def test_paths_as_people_write_them(call, saved, monkeypatch, tmp_path):
  monkeypatch.setenv("HOME", str(saved))
  monkeypatch.chdir(tmp_path)
  given = (f"{saved}/net/", "~/net", f"file://{saved}/net")
  for path in (*given, f"file://localhost{saved}/net.safetensors"):
    status, out, _ = call("verify", path)
    assert status == 0
    assert out.startswith(f"{saved}/net")
  for path, reason in (
    ("s3://bucket/net", "s3:// is not supported: give a path, file:///path"),
    ("http://host/net", "http:// is not supported"),
    ("file://other/net", "is on another machine: give file:///path"),
    ("gs://", "names no bucket"),
    ("", "the path is empty"),
    ("/", "is the root of all folders"),
    ("x" * 300, "File name too long"),
  ):
    status, _, err = call("inspect", path)
    assert status == 2
    assert reason in err
    assert err.count("\n") == 1


def test_a_path_that_is_no_utf8_is_no_damage(call, saved, tmp_path):
  path = os.fsencode(tmp_path / "net") + b"\xff"
  shutil.copytree(os.fsencode(saved / "net"), path)
  status, out, err = call("verify", os.fsdecode(path))
  assert (status, out) == (2, "")
  assert "net\\udcff is no UTF-8: set PYTHONUTF8=1" in err
  with pytest.raises(ValueError, match="is no UTF-8"):
    load_packed(os.fsdecode(path))


def test_file_urls_are_taken_wherever_a_path_is(tmp_path):
  url = f"file://{tmp_path}/with%20space"
  save_packed(f"{url}/net", net())
  assert_same(load_packed(tmp_path / "with space" / "net"), net())
  export.to_safetensors(f"{url}/net.safetensors", net())
  assert_same(export.from_safetensors(f"{url}/net.safetensors"), net())
  with Checkpointer(f"{url}/run") as run:
    run.save(1, {}, net())
  assert (tmp_path / "with space" / "run" / "1").is_dir()
  for save in (save_packed, export.to_safetensors):
    with pytest.raises(ValueError, match="s3:// is not supported"):
      save("s3://bucket/net", net())
  with pytest.raises(ValueError, match="is not supported"):
    Checkpointer("http://host/run")


def _full(_):
  raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_where_a_file_cannot_be_exported(call, saved, tmp_path, monkeypatch):
  (tmp_path / "folder").mkdir()
  os.mkfifo(tmp_path / "fifo")
  (tmp_path / "file").touch()
  before = sorted(tmp_path.rglob("*"))
  for out, options, reason in (
    ("folder", ["--overwrite"], "folder is a folder: give the path of a file"),
    ("new/", [], "is a folder"),
    ("fifo", ["--overwrite"], "fifo is a FIFO, and must be a regular file"),
    ("file", [], "file already exists: pass --overwrite."),
    ("file/x", [], "cannot write to the folder"),
    ("x.gguf", [], "--to safetensors writes no .gguf file: choose --to gguf"),
    ("x", ["--type", "TQ1_0"], "--to safetensors has no option --type"),
  ):
    path = f"{tmp_path}/{out}"
    status, _, err = call(
      "export", saved / "net", path, "--to", "safetensors", *options
    )
    assert status == 2
    assert reason in err
  status, _, err = call(
    "export", saved / "net", "gs://b/x", "--to", "safetensors"
  )
  assert status == 2
  assert "copy the file" in err
  # Writers of other packages do not say which file it was.
  monkeypatch.setattr(os, "fsync", _full)
  status, _, err = call(
    *("export", saved / "net", tmp_path / "x", "--to", "safetensors")
  )
  assert (status, err) == (
    2,
    f"tern_jax export: cannot write {tmp_path}/x: [Errno 28] No space left on"
    " device.\n",
  )
  assert sorted(tmp_path.rglob("*")) == before
  assert not files.unfinished


def test_what_a_file_says_is_printed_on_one_line(call, tmp_path):
  forged = "x\x1b[2J\nnet: all leaves are as they were saved"
  for name, save in (
    ("net", save_packed),
    ("net.safetensors", export.to_safetensors),
    ("net.gguf", export.to_gguf),
  ):
    path, short = tmp_path / name, forged[:9]
    key = short if name.endswith("gguf") else forged
    save(path, {key: layer(np.ones((256, 8)))})
    _, plain, _ = call("inspect", path)
    _, out, _ = call("diff", path, path)
    assert "x\\x1b[2J\\nnet" in plain
    assert "x\\x1b[2J\\nnet" in out
    assert "\x1b" not in plain + out
    assert len(plain.splitlines()) == 8
    _, out, _ = call("inspect", path, "--json")
    assert json.loads(out)["layers"][0]["path"] == key


class Broken:
  """A stream to which nothing can be written."""

  def write(self, _):
    raise BrokenPipeError

  def flush(self):
    pass


def test_output_that_nobody_reads(saved, monkeypatch):
  for stream in (Broken(), None):
    monkeypatch.setattr(sys, "stdout", stream)
    for args in (("verify", saved / "net"), ("inspect", saved / "net")):
      with pytest.raises(output.OutputError):
        __main__.main(list(map(str, args)))
    with pytest.raises(output.OutputError):
      __main__.main(["--help"])


def test_help_says_what_is_taken(capsys, monkeypatch):
  for width in ("20", "200"):
    monkeypatch.setenv("COLUMNS", width)
    for command in ("inspect", "verify", "diff", "export"):
      with pytest.raises(SystemExit) as error:
        __main__.main([command, "--help"])
      assert error.value.code == 0
      text = " ".join(capsys.readouterr().out.split())
      if width == "200":
        assert text.startswith(f"usage: python -m tern_jax {command}")
        assert "a training run, of which the latest step is taken" in text
        assert "2 if the command could not do its work" in text


def _start(*args, **options):
  command = [sys.executable, "-m", "tern_jax", *map(str, args)]
  return subprocess.Popen(
    command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options
  )


@pytest.mark.long
@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize(
  "args", [["inspect", "{}/net"], ["verify", "{}/net", "--json"], ["--help"]]
)
def test_a_pipe_may_close(saved, args, unbuffered):
  variables = os.environ | {"PYTHONUNBUFFERED": unbuffered}
  with _start(*(x.format(saved) for x in args), env=variables) as process:
    process.stdout.close()
    assert process.stderr.read() == b""
  assert process.returncode == 141


@pytest.mark.long
def test_a_full_disk_and_a_terminal_of_ascii(saved, tmp_path):
  with open("/dev/full", "w") as full:
    done = subprocess.run(
      [sys.executable, "-m", "tern_jax", "verify", saved / "net"],
      stdout=full,
      stderr=subprocess.PIPE,
      text=True,
      check=False,
    )
  assert done.returncode == 2
  assert done.stderr.startswith("tern_jax: cannot print: ")
  assert done.stderr.count("\n") == 1
  save_packed(tmp_path / "net", {"βάρος": layer(np.ones((8, 8)))})
  variables = {"LC_ALL": "C", "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
  process = _start("inspect", tmp_path / "net", env=os.environ | variables)
  out, err = process.communicate()
  assert (process.returncode, err) == (0, b"")
  assert rb"\u03b2\u03ac\u03c1\u03bf\u03c2" in out


@pytest.mark.long
def test_an_interruption_is_no_verdict(saved):
  """It used to be taken for damage by what reads the arrays."""
  statuses = []
  for seconds in (2.0, 3.0, 4.0, 5.0):
    with _start("verify", saved / "net") as process:
      time.sleep(seconds)
      process.send_signal(signal.SIGINT)
      out, err = process.communicate()
    statuses.append(process.returncode)
    if process.returncode == 130:
      assert (out, err) == (b"", b"tern_jax: interrupted\n")
  # While it is imported, or when it has ended.
  assert {*statuses} <= {130, -signal.SIGINT, 0}
