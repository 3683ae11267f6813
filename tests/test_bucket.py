"""Checkpoints and runs in a bucket, served on this machine by `gcs`.

A kill is played by taking away what the process would not have written yet.
"""

import http.server
import json
import socket
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX import record_writer

from experiments.common import cli, data, evaluate, log
from experiments.common.runner import run
from tern_jax import __main__, checkpoint
from tern_jax.core.containers import Ternary
from tern_jax.storage import bucket, tensors
from tern_jax.storage.packed import pack
from tests import gcs

# Writers of events are closed, but as they go they would look for the server
# once more, for two minutes each.
del record_writer.GCSRecordWriter.__del__

pytestmark = pytest.mark.usefixtures("standard_promotion_throughout")

MARK = "commit_success.txt"


@pytest.fixture(scope="module")
def objects():
  with gcs.serving() as (variables, objects), pytest.MonkeyPatch.context() as m:
    for name, value in variables.items():
      m.setenv(name, value)
    yield objects


@pytest.fixture
def place(objects, request):
  # Brackets would be taken for a pattern.
  name = request.node.name.translate(str.maketrans("[]", "__"))
  return f"gs://bucket/{name}"


def net(seed):
  codes = jax.random.randint(jax.random.key(seed), (16, 8), -1, 2, jnp.int8)
  scale = jnp.float32(seed)
  return {"kernel": pack(Ternary(codes, scale, scale)), "bias": jnp.ones(seed)}


def assert_same(got, expected):
  jax.tree.map(np.testing.assert_array_equal, got, expected)


def under(objects, place):
  """Returns the names of what lies at a place, relative to it."""
  prefix = place.removeprefix("gs://bucket/") + "/"
  return {n.removeprefix(prefix) for _, n in objects if n.startswith(prefix)}


def move(objects, place, target):
  """Moves all objects at a place."""
  for name in under(objects, place):
    old, new = (
      ("bucket", f"{x.removeprefix('gs://bucket/')}/{name}")
      for x in (place, target)
    )
    objects[new] = objects.pop(old)


def test_packed_weights_are_saved_and_replaced(place, objects):
  checkpoint.save_packed(place, net(1))
  assert_same(checkpoint.load_packed(place), net(1))
  with pytest.raises(checkpoint.CheckpointError, match=f"{place} already"):
    checkpoint.save_packed(place, net(2))
  checkpoint.save_packed(place, net(2), overwrite=True)
  assert_same(checkpoint.load_packed(place), net(2))
  assert not under(objects, place.replace("/test", "/.test") + ".new")
  stored = sum(
    len(content)
    for (_, name), (_, content) in objects.items()
    if f"gs://bucket/{name}".startswith(f"{place}/")
  )
  assert checkpoint.disk_bytes(place) == stored


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_is_not_whole_is_no_checkpoint(place, objects, overwrite):
  with pytest.raises(checkpoint.CheckpointError, match="does not exist"):
    checkpoint.load_packed(place)
  checkpoint.save_packed(place, net(1))
  del objects["bucket", f"{place.removeprefix('gs://bucket/')}/{MARK}"]
  with pytest.raises(checkpoint.CheckpointError, match="holds no checkpoint"):
    checkpoint.load_packed(place)
  checkpoint.save_packed(place, net(2), overwrite=overwrite)
  assert_same(checkpoint.load_packed(place), net(2))


def test_what_is_no_checkpoint_stays(place, objects):
  name = place.removeprefix("gs://bucket/")
  objects["bucket", f"{name}/notes.txt"] = 1, b"mine"
  with pytest.raises(checkpoint.CheckpointError, match="is not a checkpoint"):
    checkpoint.save_packed(place, net(1), overwrite=True)
  assert under(objects, place) == {"notes.txt"}


@pytest.mark.long
@pytest.mark.parametrize("copied", [0, 1, 3])
def test_a_killed_replacement_is_undone(place, objects, copied):
  stage = place.replace("/test", "/.test") + ".new"
  checkpoint.save_packed(f"{stage}/old", net(1))
  checkpoint.save_packed(f"{stage}/new", net(2))
  # The spec comes first, the mark last.
  names = sorted(under(objects, f"{stage}/new") - {MARK}, reverse=True)
  assert names[0] == "spec/data.json"
  for name in names[:copied]:
    head = f"{stage.removeprefix('gs://bucket/')}/new/{name}"
    tail = f"{place.removeprefix('gs://bucket/')}/{name}"
    objects["bucket", tail] = objects["bucket", head]
  assert_same(checkpoint.load_packed(place), net(1))
  with pytest.raises(checkpoint.CheckpointError, match="already exists"):
    checkpoint.save_packed(place, net(2))
  assert_same(checkpoint.load_packed(place), net(1))
  assert not under(objects, stage)


def test_steps_of_a_run(place, objects):
  def state(step):
    return {"w": jnp.arange(3.0) + step, "key": jax.random.key(step)}

  with checkpoint.Checkpointer(place, save_interval=10, keep=2) as saved:
    due = [
      n for n in range(41) if saved.save(n, state(n), net(1), wait=n != 20)
    ]
    assert due == [0, 10, 20, 30, 40]
  steps = {name.split("/")[0] for name in under(objects, place)}
  assert steps == {"30", "40"}
  assert_same(checkpoint.load_packed(place), net(1))
  # A kill before the last step was whole.
  name = place.removeprefix("gs://bucket/")
  del objects["bucket", f"{name}/40/{MARK}"]
  objects["bucket", f"{name}/2024/notes.txt"] = 1, b"mine"
  with checkpoint.Checkpointer(place, keep=2) as saved:
    assert saved.latest_step() == 30
    restored, _, step = saved.restore(like=state(0))
    assert step == 30
    assert restored["w"].tolist() == [30, 31, 32]
    saved.save(40, state(41), net(2))
    assert saved.restore(like=state(0))[0]["w"].tolist() == [41, 42, 43]
  assert_same(checkpoint.load_packed(place), net(2))
  assert "2024/notes.txt" in under(objects, place)


@pytest.mark.long
def test_a_damaged_step_is_passed_over_and_set_aside(place, objects):
  state = {"w": jnp.arange(3.0)}
  with checkpoint.Checkpointer(place, keep=1, keep_best=1) as saved:
    for step, metric in ((1, 0.9), (2, 0.5), (3, 0.7)):
      saved.save(step, state, {}, metric=metric, extra=step)
    assert saved.best_step() == 1
  assert {n.split("/")[0] for n in under(objects, place)} == {"1", "3"}
  name = place.removeprefix("gs://bucket/")
  objects["bucket", f"{name}/3/spec/data.json"] = 9, b"{}"
  with checkpoint.Checkpointer(place, keep=2) as saved:
    with pytest.warns(UserWarning, match="step 3 is passed over, step 1 is"):
      assert saved.restore(state)[1:] == (1, 1)
    saved.save(3, state, {})
  steps = {n.split("/")[0] for n in under(objects, place)}
  assert steps == {"1", "3", "3.refused"}
  move(objects, f"{place}/1", f"{place}/8")
  with pytest.raises(checkpoint.CheckpointError, match="it is step 1, renamed"):
    checkpoint.load_packed(place)


def test_patterns_are_refused(place, objects):
  for save in (
    lambda: checkpoint.save_packed(f"{place}/lr[0.1]/net", net(1)),
    lambda: checkpoint.Checkpointer(f"{place}/lr[0.1]/run"),
  ):
    with pytest.raises(checkpoint.CheckpointError, match="pattern in a bucket"):
      save()
  assert not under(objects, place)


def test_what_is_replaced_while_it_is_read_is_read_again(
  place, objects, monkeypatch
):
  checkpoint.save_packed(place, net(1))
  checkpoint.save_packed(f"{place}2", net(2))
  read, left = tensors.read, [0]

  def replaced(*args):
    if left:
      left.clear()
      for name in under(objects, place):
        del objects["bucket", f"{place.removeprefix('gs://bucket/')}/{name}"]
      move(objects, f"{place}2", place)
    return read(*args)

  monkeypatch.setattr(tensors, "read", replaced)
  assert_same(checkpoint.load_packed(place), net(2))


@pytest.mark.long
def test_a_run_goes_on_where_it_was_killed(
  place, objects, tmp_path, monkeypatch
):
  monkeypatch.setattr(evaluate, "in_fresh_process", evaluate.evaluate)

  def train(workdir):
    return run.run(
      cli.Config(
        data="digits",
        data_dir=str(tmp_path),
        epochs=2,
        hidden=(16,),
        parallel="jit",
        log_every=10,
        checkpoint_every=15,
        workdir=workdir,
      )
    )

  here, there = train(str(tmp_path / "run")), train(f"{place}/run")
  for name in ("seconds", "disk_bytes"):
    del here[name], there[name]
  assert there == here
  # All but the clock.
  metrics = log.read_metrics(tmp_path / "run")
  assert [line["step"] for line in metrics] == [10, 18]
  bucket = checkpoint.absolute(f"{place}/run")
  name = place.removeprefix("gs://bucket/") + "/run"
  assert log.read_metrics(bucket) == metrics
  assert objects["bucket", f"{name}/curves.png"][1].startswith(b"\x89PNG")
  assert any("tensorboard/ternary" in n for n in under(objects, f"{place}/run"))

  last = max(
    int(n.split("/")[2])
    for n in under(objects, f"{place}/run")
    if n.startswith("checkpoints/ternary/")
  )
  killed = ("result.json", "packed/", f"checkpoints/ternary/{last}/{MARK}")
  for lost in under(objects, f"{place}/run"):
    if lost.startswith(killed):
      del objects["bucket", f"{name}/{lost}"]
  again = train(f"{place}/run")
  for key in ("seconds", "disk_bytes"):
    del again[key]
  assert again == here
  assert log.read_metrics(bucket) == metrics
  assert json.loads(objects["bucket", f"{name}/result.json"][1])["seed"] == 0


@pytest.mark.long
def test_the_command_looks_into_buckets(place, objects, capsys):
  def call(*args):
    return __main__.main([*args]), *capsys.readouterr()

  checkpoint.save_packed(f"{place}/runs/a/packed", net(1))
  status, out, _ = call("verify", f"{place}/runs/a")
  assert status == 0
  assert out.startswith(f"{place}/runs/a/packed: all leaves are as they were")
  checkpoint.save_packed(f"{place}/runs/b", net(1))
  status, out, _ = call("diff", f"{place}/runs/a", f"{place}/runs/b")
  assert status == 0
  name = place.removeprefix("gs://bucket/")
  objects["bucket", f"{name}/notes.txt"] = 1, b"mine"
  for path, reason in (
    (f"{place}/runs/c", "does not exist"),
    (f"{place}/notes.txt", "is a file"),
    ("gs://bucket", "holds no checkpoint"),
  ):
    status, _, err = call("inspect", path)
    assert status == 2
    assert err.count("\n") == 1
    assert reason in err


class Refusing(http.server.BaseHTTPRequestHandler):
  """A server that wants to know who asks, or knows nothing."""

  def log_message(self, *_):
    pass

  def do_GET(self):
    self.send_response(404 if "unknown" in self.path else 401)
    self.send_header("Content-Length", "0")
    self.end_headers()


@pytest.fixture(scope="module")
def refusing():
  server = http.server.HTTPServer(("127.0.0.1", 0), Refusing)
  thread = threading.Thread(target=server.serve_forever, daemon=True)
  thread.start()
  yield f"http://127.0.0.1:{server.server_port}"
  server.shutdown()
  server.server_close()
  thread.join()


@pytest.fixture
def silent():
  """A server that takes a connection, and then says nothing."""
  with socket.create_server(("127.0.0.1", 0)) as server:
    yield f"http://127.0.0.1:{server.getsockname()[1]}"


@pytest.mark.parametrize("host", ["closed", "nowhere", "silent", "no address"])
def test_a_bucket_out_of_reach(host, silent, monkeypatch, capsys):
  monkeypatch.setattr(bucket, "_ANSWER", 0.1)
  hosts = {
    "closed": "http://127.0.0.1:1",
    "nowhere": "nothing.invalid",
    "silent": silent,
    "no address": "http://a b",
  }
  monkeypatch.setenv("STORAGE_EMULATOR_HOST", hosts[host])
  start = time.monotonic()
  for args in (["inspect"], ["verify"], ["export", "x", "--to", "safetensors"]):
    status = __main__.main([args[0], "gs://afar/net", *args[1:]])
    err = capsys.readouterr().err
    assert status == 2
    assert "cannot reach gs://afar/net at http://" in err
    assert err.endswith(
      "check the network, proxies and STORAGE_EMULATOR_HOST.\n"
    )
    assert err.count("\n") == 1
  for task in (
    lambda: checkpoint.save_packed("gs://afar/net", net(1)),
    lambda: checkpoint.Checkpointer("gs://afar/run"),
  ):
    with pytest.raises(checkpoint.CheckpointError, match="cannot reach"):
      task()
  assert time.monotonic() - start < 10


def test_an_answer_that_never_comes_is_not_waited_for(monkeypatch):
  monkeypatch.setattr(bucket, "_TOGETHER", 0.1)
  # The system looks for the address of a host as long as it likes.
  monkeypatch.setattr(bucket, "_status", lambda _: time.sleep(1))
  with pytest.raises(checkpoint.CheckpointError, match=r"no answer in 0\.1 s"):
    checkpoint.load_packed("gs://afar/net")


@pytest.mark.parametrize("found", ["none", "broken"])
def test_a_bucket_that_needs_credentials(
  found, refusing, monkeypatch, tmp_path, capsys
):
  monkeypatch.setenv("STORAGE_EMULATOR_HOST", refusing)
  key = {"type": "authorized_user", "client_id": "", "client_secret": ""}
  if found == "broken":
    key |= {"refresh_token": "x", "token_uri": f"{refusing}/token"}
    (tmp_path / "key.json").write_text(json.dumps(key))
  variable = "GOOGLE_APPLICATION_CREDENTIALS"
  monkeypatch.setenv(variable, str(tmp_path / "key.json"))
  assert __main__.main(["verify", "gs://private/net"]) == 2
  err = capsys.readouterr().err
  said = {"none": "needs credentials", "broken": "credentials are not accepted"}
  assert said[found] in err
  assert f"auth application-default login`, or set {variable}" in err
  assert err.count("\n") == 1


def test_a_bucket_that_does_not_exist(refusing, monkeypatch):
  monkeypatch.setenv("STORAGE_EMULATOR_HOST", refusing)
  with pytest.raises(checkpoint.CheckpointError, match="has no bucket of this"):
    checkpoint.load_packed("gs://unknown/net")


def test_the_package_for_buckets_may_be_missing(monkeypatch):
  monkeypatch.setattr(bucket.importlib.util, "find_spec", lambda _: None)
  with pytest.raises(ImportError, match=r"gcsfs: pip install 'tern_jax\[buck"):
    checkpoint.load_packed("gs://afar/net")


def test_data_sets_in_a_bucket_are_refused():
  with pytest.raises(data.DataNotPreparedError, match="reads files only"):
    data.load("digits", "train", "gs://bucket/tfds")
