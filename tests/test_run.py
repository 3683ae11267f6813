"""Steps of a run: which are believed, restored and kept; what they record."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments.common.faults.crafted import reseal
from tern_jax import SCA, TTQ, TWN
from tern_jax.checkpoint import (
  Checkpointer,
  CheckpointError,
  load_packed,
  read_spec,
  save_packed,
)
from tern_jax.storage import steps


def state(step):
  return {"w": jnp.full(3, float(step))}


def save(path, *numbers, **options):
  with Checkpointer(path, **options) as run:
    for n in numbers:
      assert run.save(n, state(n), state(n), extra=n)


def restored(path):
  """Returns the step that is restored, its values and warnings checked."""
  with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter("always")
    found, extra, step = Checkpointer(path).restore(state(0))
  assert found["w"].tolist() == [step] * 3
  assert extra == step
  assert all(x.category is UserWarning for x in told)
  assert {x.filename for x in told} <= {__file__}
  return step, [str(x.message) for x in told]


@contextlib.contextmanager
def passing_over(*numbers):
  """Expects warnings of these steps, the latest first, and of nothing else."""
  with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter("always")
    yield
  found = [str(x.message).split(" is passed over, ")[0] for x in told]
  assert found == [f"step {n}" for n in numbers]


def names(path):
  return sorted(x.name for x in path.iterdir())


def empty(path, keep=0):
  """Cuts all files in a folder short."""
  for file in path.rglob("*"):
    if file.is_file():
      file.write_bytes(file.read_bytes()[:keep])


DAMAGES = {
  "no spec": (lambda x: (x / "spec/data.json").unlink(), "spec is missing"),
  "cut spec": (lambda x: empty(x / "spec", 20), "JSONDecodeError"),
  "no state": (lambda x: shutil.rmtree(x / "state"), "not those of the spec"),
  "no index": (lambda x: empty(x / "state"), "the index of state"),
  "crc32": (
    lambda x: reseal(x, lambda s: s["leaves"]["state"][0].update(crc32=0)),
    "w is damaged: its crc32 differs",
  ),
}


@pytest.mark.sample(2)
@pytest.mark.parametrize("damage", DAMAGES)
def test_the_latest_whole_step_is_restored(tmp_path, damage):
  do, why = DAMAGES[damage]
  save(tmp_path, 1, 2, 3)
  do(tmp_path / "3")
  step, (told,) = restored(tmp_path)
  assert step == 2
  assert f"step 3 is passed over, step 2 is restored: {tmp_path}/3" in (
    told.replace("cannot read the spec of ", "").replace("cannot read ", "")
  )
  assert why in told
  with pytest.raises(CheckpointError, match=f"{tmp_path}/3"):
    Checkpointer(tmp_path).restore(state(0), step=3)
  do(tmp_path / "2")
  step, told = restored(tmp_path)
  assert step == 1
  assert [x[:17] for x in told] == [f"step {n} is passed " for n in (3, 2)]
  do(tmp_path / "1")
  with pytest.raises(CheckpointError, match=f"{tmp_path}/3.*{why}"):
    Checkpointer(tmp_path).restore(state(0))


def test_a_run_goes_on_from_an_earlier_step(tmp_path):
  save(tmp_path, 1, 2, 3, 4)
  for step in (3, 4):
    (tmp_path / str(step) / "spec/data.json").write_text("{}")
  with Checkpointer(tmp_path, keep=2) as run:
    with passing_over(4, 3):
      run.restore(state(0))
    assert run.latest_step() == 2
    assert run.save(3, state(3), state(3), extra=3)
    # What was refused is kept, but is no step, and none is deleted for it.
    assert names(tmp_path) == ["2", "3", "3.refused", "4.refused"]
    assert run.latest_step() == 3
    run.save(4, state(4), state(4), extra=4)
    assert names(tmp_path) == ["3", "3.refused", "4", "4.refused"]
  assert restored(tmp_path) == (4, [])
  assert load_packed(tmp_path)["w"].tolist() == [4] * 3


def test_what_does_not_fit_is_no_damage(tmp_path):
  save(tmp_path, 1)
  with Checkpointer(tmp_path) as run:
    run.save(2, {"w": jnp.zeros(4)}, {})
  for like, match in (
    (state(0), r"/2 does not fit the tree: w .*\[4\]"),
    ({"v": jnp.zeros(4)}, "v is not stored"),
  ):
    with pytest.raises(CheckpointError, match=match):
      Checkpointer(tmp_path).restore(like)
  reseal(tmp_path / "2", lambda spec: spec.update(format=2))
  with pytest.raises(CheckpointError, match="upgrade tern_jax"):
    Checkpointer(tmp_path).restore(state(0))


def test_what_cannot_be_opened_is_no_damage(tmp_path, monkeypatch):
  save(tmp_path, 1, 2)
  read = steps.spec.read

  def denied(folder):
    if folder.name == "2":
      raise CheckpointError("denied") from PermissionError()
    return read(folder)

  monkeypatch.setattr(steps.spec, "read", denied)
  with pytest.raises(CheckpointError, match="denied"):
    Checkpointer(tmp_path).restore(state(0))


# Names.


def test_only_folders_of_checkpoints_with_canonical_names_are_steps(tmp_path):
  save(tmp_path, 7)
  (tmp_path / "9").write_text("a file")
  for name in ("10", "٣", "1²", "-5", "+8", "8.0", "1_0", "9" * 30):
    (tmp_path / name).mkdir()
  for name in ("007", "٢", "08", " 8", "8 "):
    shutil.copytree(tmp_path / "7", tmp_path / name)
  assert Checkpointer(tmp_path).latest_step() == 7
  assert restored(tmp_path) == (7, [])
  assert load_packed(tmp_path)["w"].tolist() == [7] * 3
  with Checkpointer(tmp_path, keep=1) as run:
    before = {*names(tmp_path)}
    run.save(8, state(8), state(8), extra=8)
    assert {*names(tmp_path)} == before - {"7"} | {"8"}
    for n in (9, 10):
      with pytest.raises(CheckpointError, match=f"/{n} is in the way"):
        run.save(n, state(n), {})
    assert run.save(11, state(11), {})
  assert (tmp_path / "9").read_text() == "a file"


@pytest.mark.parametrize("step", [-1, -10])
def test_a_negative_step_is_refused(tmp_path, step):
  with (
    Checkpointer(tmp_path) as run,
    pytest.raises(ValueError, match=f"step must be at least 0, got {step}"),
  ):
    run.save(step, state(0), {})


def test_a_step_of_another_name_is_refused(tmp_path):
  save(tmp_path, 0, 1, 2)
  shutil.copytree(tmp_path / "1", tmp_path / "900")
  step, (told,) = restored(tmp_path)
  assert step == 2
  assert f"{tmp_path}/900 is no step of this run: it is step 1, renamed" in told
  assert "name it 1 again" in told
  (tmp_path / "0").rename(tmp_path / "800")
  assert restored(tmp_path)[0] == 2
  for refused in (
    lambda: load_packed(tmp_path),
    lambda: read_spec(tmp_path),
    lambda: Checkpointer(tmp_path).restore(state(0), step=900),
  ):
    with pytest.raises(CheckpointError, match="900 is no step of this run"):
      refused()
  # By itself it may have any name.
  assert load_packed(tmp_path / "900")["w"].tolist() == [1] * 3
  with Checkpointer(tmp_path) as run:
    with passing_over(900, 800):
      run.restore(state(0))
    run.save(3, state(3), state(3), extra=3)
  assert names(tmp_path) == ["1", "2", "3", "800.refused", "900.refused"]
  assert restored(tmp_path) == (3, [])


def test_a_step_of_another_run_is_refused(tmp_path):
  a, b = tmp_path / "a", tmp_path / "b"
  save(a, 1, 2)
  save(b, 8, 9)
  ids = [read_spec(x)["run"] for x in (a, b)]
  assert len({*ids}) == 2
  assert read_spec(a / "1")["run"] == ids[0]
  shutil.copytree(b / "9", a / "9")
  step, (told,) = restored(a)
  assert step == 2
  assert (
    f"/9 is no step of this run: it is of run {ids[1]}, not of {ids[0]}"
    in (told)
  )
  with pytest.raises(CheckpointError, match="9 is no step of this run"):
    load_packed(a)
  with pytest.raises(CheckpointError, match="9 is no step of this run"):
    Checkpointer(a).restore(state(0), step=9)
  # A run that goes on keeps its name, and neither counts nor deletes others'.
  shutil.copytree(b / "8", a / "0")
  with Checkpointer(a, keep=2) as run:
    with passing_over(9):
      run.restore(state(0))
    run.save(3, state(3), state(3), extra=3)
  assert names(a) == ["0", "2", "3", "9.refused"]
  assert read_spec(a)["run"] == ids[0]
  assert restored(a) == (3, [])


def test_one_step_each_of_two_runs(tmp_path):
  save(tmp_path / "a", 1)
  save(tmp_path / "b", 2)
  (tmp_path / "b" / "2").rename(tmp_path / "a" / "2")
  assert restored(tmp_path / "a")[0] == 1


def test_a_copied_run_is_whole_and_goes_on(tmp_path):
  save(tmp_path / "a", 1, 2)
  shutil.copytree(tmp_path / "a", tmp_path / "b")
  (tmp_path / "a").rename(tmp_path / "c")
  for name in "bc":
    assert restored(tmp_path / name) == (2, [])
    save(tmp_path / name, 3)
    assert restored(tmp_path / name) == (3, [])
  # A step that is copied to a place of its own begins a run there.
  shutil.copytree(tmp_path / "b" / "2", tmp_path / "d" / "2")
  assert restored(tmp_path / "d") == (2, [])
  save(tmp_path / "d", 5)
  assert restored(tmp_path / "d") == (5, [])


def forget(spec):
  for name in ("step", "run", "metric", "describe"):
    del spec[name]


def test_steps_of_older_versions_are_believed(tmp_path):
  save(tmp_path, 1, 2)
  for step in "12":
    reseal(tmp_path / step, forget)
  assert restored(tmp_path) == (2, [])
  assert load_packed(tmp_path)["w"].tolist() == [2] * 3
  save(tmp_path, 3, keep=2)
  assert names(tmp_path) == ["2", "3"]
  assert restored(tmp_path) == (3, [])


@pytest.mark.sample(3)
@pytest.mark.parametrize("value", [None, 7, [], {}, "x", "x" * 16, True, 1e9])
def test_hostile_facts_are_no_traceback(tmp_path, value):
  save(tmp_path, 1, 2)
  facts = ("step", "run", "metric", "describe")
  for name in facts:
    reseal(tmp_path / "2", lambda spec, name=name: spec.update({name: value}))
    run = Checkpointer(tmp_path, describe={"x": "y"})
    with contextlib.suppress(CheckpointError), warnings.catch_warnings():
      warnings.simplefilter("ignore")
      assert run.restore(state(0))[2] in (1, 2)
    assert run.best_step() in (None, 2)


# The best.


def test_the_best_steps_are_kept(tmp_path):
  seen = []
  metrics = [0.1, 0.9, 0.5, float("nan"), 0.9, None, 0.2]
  with Checkpointer(tmp_path, keep=1, keep_best=2) as run:
    assert run.best_step() is None
    for step, metric in enumerate(metrics):
      run.save(step, state(step), {}, extra=step, metric=metric)
      seen.append((*names(tmp_path), run.best_step()))
  assert seen == [
    ("0", 0),
    ("0", "1", 1),
    ("1", "2", 1),
    ("1", "2", "3", 1),
    ("1", "4", 1),
    ("1", "4", "5", 1),
    ("1", "4", "6", 1),
  ]
  # The next process knows them, and may want others.
  with Checkpointer(tmp_path, keep=1, keep_best=1) as run:
    assert run.best_step() == 1
    assert run.restore(state(0), run.best_step())[2] == 1
    run.save(7, state(7), {}, metric=0.3)
  assert names(tmp_path) == ["1", "7"]
  assert [read_spec(tmp_path / x)["metric"] for x in "17"] == [0.9, 0.3]


def test_the_best_may_be_the_least(tmp_path):
  options = {"keep": 2, "keep_best": 1, "keep_every": 4, "best_mode": "min"}
  with Checkpointer(tmp_path, **options) as run:
    for step, loss in enumerate([3.0, 2.0, 0.5, 1.0, 0.7, 0.5, 0.9, 0.8]):
      run.save(step, state(step), {}, metric=jnp.float32(loss), wait=False)
    run.wait()
    assert names(tmp_path) == ["0", "2", "4", "6", "7"]
    assert run.best_step() == 2
  with Checkpointer(tmp_path, best_mode="max") as run:
    assert run.best_step() == 0


def test_a_best_step_that_is_damaged_is_none(tmp_path):
  with Checkpointer(tmp_path, keep=1, keep_best=1) as run:
    for step, metric in enumerate((3, np.int64(5), np.float64(4))):
      run.save(step, state(step), {}, extra=step, metric=metric)
  assert names(tmp_path) == ["1", "2"]
  (tmp_path / "1" / "spec/data.json").write_text("{}")
  assert Checkpointer(tmp_path).best_step() == 2
  assert Checkpointer(tmp_path, best_mode="min").best_step() == 2


@pytest.mark.sample(2)
@pytest.mark.parametrize("metric", ["0.9", True, np.ones(1), 1j, [0.5], b"1"])
def test_a_metric_is_a_number(tmp_path, metric):
  with (
    Checkpointer(tmp_path) as run,
    pytest.raises(TypeError, match="metric must be a number, got"),
  ):
    run.save(0, state(0), {}, metric=metric)
  assert not names(tmp_path)


def test_bad_arguments(tmp_path):
  with pytest.raises(ValueError, match="keep_best must be at least 1, got 0"):
    Checkpointer(tmp_path / "run", keep_best=0)
  with pytest.raises(ValueError, match=r"one of \('max', 'min'\), got 'best'"):
    Checkpointer(tmp_path / "run", best_mode="best")
  assert not names(tmp_path)


# What comes back besides.


def extras():
  one = np.float32(0.1)
  return {
    "scalars": (
      {"loss": one, "epoch": np.int64(3), "done": np.bool_(True)},
      {"loss": 0.10000000149011612, "epoch": 3, "done": True},
    ),
    "inside": (
      [(jnp.float32(0.5), {"a": [jnp.array(7), jnp.array(False)]}), "x", None],
      [[0.5, {"a": [7, False]}], "x", None],
    ),
    "narrow": (
      [jnp.bfloat16(1.5), np.float16(0.25), jnp.array(-3, jnp.int4)],
      [1.5, 0.25, -3],
    ),
    "wide": (
      [np.uint64(2**64 - 1), 10**30, np.float64(1e300), -0.0],
      [2**64 - 1, 10**30, 1e300, -0.0],
    ),
    "keys": (
      {False: "a", np.int64(2): "b", None: "d", 1.5: "e", "f": "g"},
      {"false": "a", "2": "b", "null": "d", "1.5": "e", "f": "g"},
    ),
    "text": ({"ö": np.str_("\ud800\n")}, {"ö": "\ud800\n"}),
    "alone": (np.float32(2), 2.0),
    "none": (None, None),
  }


@pytest.mark.sample(2)
@pytest.mark.parametrize("name", extras())
def test_extra_comes_back(tmp_path, name):
  extra, wanted = extras()[name]
  with Checkpointer(tmp_path) as run:
    run.save(0, state(0), {}, extra=extra)
    found = run.restore(state(0))[1]
  assert found == wanted
  # Types, and the sign of 0, too.
  assert json.dumps(found) == json.dumps(wanted, sort_keys=True)


def test_extra_may_be_no_number(tmp_path):
  values = [float("nan"), np.float32("nan"), jnp.array(jnp.inf), -np.inf]
  with Checkpointer(tmp_path) as run:
    run.save(0, state(0), {}, extra=values)
    found = run.restore(state(0))[1]
  np.testing.assert_array_equal(found, [np.nan, np.nan, np.inf, -np.inf])


@pytest.mark.parametrize(
  ("extra", "match"),
  [
    ({"a": [1, np.zeros(3)]}, r"extra\['a'\]\[1\] is an array of float64\[3\]"),
    ({"a": jnp.zeros((0, 2))}, r"is an array of float32\[0, 2\]: .*tolist"),
    (np.complex64(1), r"extra is an array of complex64\[\]"),
    (np.datetime64("2020-01-01"), "extra is an array of datetime64"),
    ({"key": jax.random.key(0)}, r"extra\['key'\] is an array of key<fry>"),
    ({"a": b"x"}, r"extra\['a'\] is a bytes"),
    ({1, 2}, "extra is a set"),
    ({"f": len}, "is a builtin_function_or_method"),
    ({1: "a", "1": "b"}, "extra has two keys '1', once they are strings"),
    ({"a": {np.int8(1): 0, 1: 0, "1": 2}}, r"extra\['a'\] has two keys '1'"),
    ({(1, 2): 3}, r"a key of extra is \(1, 2\)"),
  ],
)
def test_what_is_no_json_is_refused_by_name(tmp_path, extra, match):
  with (
    Checkpointer(tmp_path) as run,
    pytest.raises(TypeError, match=match),
  ):
    run.save(0, state(0), {}, extra=extra)
  assert not names(tmp_path)


# What a run was made of.


def test_another_optimizer_or_method_is_told(tmp_path):
  def describe(tx, method):
    return {"optimizer": tx, "method": method, "data": "digits"}

  made = describe(optax.adam(0.1), TWN())
  with Checkpointer(tmp_path, describe=made) as run:
    run.save(0, state(0), {})
  spec = read_spec(tmp_path)
  assert (spec["method"], spec["describe"]["method"]) == ("TWN()", "TWN()")
  like = state(0)
  again = describe(optax.adam(0.1), TWN())
  assert Checkpointer(tmp_path, describe=again).restore(like)[2] == 0
  assert Checkpointer(tmp_path).restore(like)[2] == 0
  assert Checkpointer(tmp_path, describe={"new": "x"}).restore(like)[2] == 0
  other = Checkpointer(
    tmp_path, describe=describe(optax.nadam(0.1), SCA(alpha=0.1))
  )
  with pytest.warns(UserWarning, match="of the restored step was") as told:
    assert other.restore(like, step=0)[2] == 0
  method, optimizer = (str(x.message) for x in told)
  assert method == (
    f"the method of the restored step was TWN(), now it is {SCA(alpha=0.1)!r}."
  )
  was, now = optimizer.split(", now it is ")
  assert "the optimizer of the restored step was chain(scale_by_adam(" in was
  assert "nesterov=False" in was
  assert "nesterov=True" in now
  assert {x.filename for x in told} == {__file__}


def test_another_method_is_told_at_the_next_save(tmp_path):
  with Checkpointer(tmp_path) as run:
    run.save(0, state(0), {}, method=TWN())
    run.save(1, state(1), {}, method=TTQ())  # Nothing was restored.
  with Checkpointer(tmp_path) as run:
    run.restore(state(0))
    run.save(2, state(2), {}, method=TTQ())
  with Checkpointer(tmp_path) as run:
    run.restore(state(0))
    with pytest.warns(
      UserWarning, match=r"method .* was TTQ\(\), now .*TWN\(\)"
    ):
      run.save(3, state(3), {}, method=TWN())
    run.save(4, state(4), {}, method=TWN())
    run.restore(state(0), 3)
    run.save(5, state(5), {})
    run.restore(state(0))
    # What has an address may be the same.
    run.save(6, state(6), {}, method=lambda: 0)
    run.restore(state(0))
    run.save(7, state(7), {}, method=lambda: 0)


def test_only_steps_name_step_and_run(tmp_path):
  save_packed(tmp_path / "net", state(0))
  save(tmp_path / "run", 3)
  alone, step = (read_spec(tmp_path / x) for x in ("net", "run"))
  assert step.keys() - alone.keys() == {"step", "run", "metric", "describe"}
  assert (step["step"], step["metric"], step["describe"]) == (3, None, {})
  assert len(step["run"]) == 16


KILLED = """
import os, sys, jax.numpy as jnp
from tern_jax.checkpoint import Checkpointer
from tern_jax.storage import staging
rmtree = staging.shutil.rmtree

def kill(path, **kwargs):
  if os.path.basename(path).startswith("1.") and os.path.exists(path):
    os._exit(9)
  rmtree(path, **kwargs)

run = Checkpointer(sys.argv[1], keep=1)
run.save(1, {"w": jnp.zeros(3)}, {})
staging.shutil.rmtree = kill
run.save(2, {"w": jnp.ones(3)}, {})
"""


@pytest.mark.long
def test_a_step_is_deleted_as_a_whole(tmp_path):
  process = subprocess.run(
    [sys.executable, "-c", KILLED, str(tmp_path)], env=os.environ, check=False
  )
  assert process.returncode == 9
  assert names(tmp_path) == ["1.orbax-checkpoint-tmp", "2"]
  save(tmp_path, 3)
  assert names(tmp_path) == ["2", "3"]
