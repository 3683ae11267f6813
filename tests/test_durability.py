"""What a checkpoint survives: power cuts, names, and others at the same place.

A power cut is played on a recorded save. At any moment the disk may hold no
more than what was told to get there, or all names, and of files what was told
to; a checkpoint that loads from both is there.
"""

import os
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from tern_jax.checkpoint import (
  Checkpointer,
  CheckpointError,
  disk_bytes,
  examine,
  load_packed,
  read_spec,
  save_packed,
)
from tern_jax.storage import durable, places, tensors
from tests.helpers import long


def net(x, n=3):
  return {"bias": jnp.full(n, float(x))}


def value(tree):
  return float(tree["bias"][0])


class Disk:
  """A folder whose writes are recorded, and the images that cuts would leave.

  Args:
    root: the folder.
    monkeypatch: of the test.
  """

  def __init__(self, root, monkeypatch):
    root.mkdir()
    self.root, self.images = root, {}
    # What is on the disk: contents of files, names in folders, by inode. The
    # open files keep inodes from being used again.
    self.contents, self.names, self.open = {}, {}, []
    self._lock = threading.RLock()
    self._fsync = os.fsync
    monkeypatch.setattr(os, "fsync", self.fsync)
    for name in ("rename", "unlink", "rmdir"):
      monkeypatch.setattr(os, name, self.cut_around(getattr(os, name)))
    durable.flush(root)

  def fsync(self, file):
    self._fsync(file)
    path, inode = (
      Path(os.readlink(f"/proc/self/fd/{file}")),
      os.fstat(file).st_ino,
    )
    self.open.append(os.dup(file))
    if path.is_dir():
      found = {x.name: (x.stat().st_ino, x.is_dir()) for x in path.iterdir()}
      self.names[inode] = found
    else:
      self.contents[inode] = path.read_bytes()

  def cut_around(self, task):
    def cut_and_do(*args, **kwargs):
      with self._lock:
        self.cut()
        task(*args, **kwargs)
        self.cut()

    return cut_and_do

  def told(self, inode, at):
    """Yields the files of which the names were told to get to the disk."""
    for name, (child, folder) in self.names.get(inode, {}).items():
      if folder:
        yield f"{at}{name}/", b""
        yield from self.told(child, f"{at}{name}/")
      else:
        yield f"{at}{name}", self.contents.get(child, b"")

  def named(self):
    """Yields all files; of their contents, what was told to."""
    for path in self.root.rglob("*"):
      name = str(path.relative_to(self.root))
      if path.is_dir():
        yield f"{name}/", b""
      else:
        yield name, self.contents.get(path.stat().st_ino, b"")

  def cut(self):
    for image in (self.told(self.root.stat().st_ino, ""), self.named()):
      self.images[frozenset(image)] = None

  def replayed(self, folder):
    """Yields the folders that cuts would have left, in the order of time."""
    for i, image in enumerate(self.images):
      for name, content in sorted(image):
        path = folder / str(i) / name
        if name.endswith("/"):
          path.mkdir(parents=True, exist_ok=True)
        else:
          path.parent.mkdir(parents=True, exist_ok=True)
          path.write_bytes(content)
      yield folder / str(i)


@pytest.fixture
def disk(tmp_path, monkeypatch):
  if not os.path.exists("/proc/self/fd"):
    pytest.skip("it tells by /proc which file is told to get to the disk")
  found = Disk(tmp_path / "disk", monkeypatch)
  yield found
  for file in found.open:
    os.close(file)


def test_a_power_cut_leaves_the_old_or_the_new(disk, tmp_path, monkeypatch):
  path = disk.root / "runs" / "net"
  save_packed(path, net(1))
  disk.images.clear()
  save_packed(path, net(2), overwrite=True)
  disk.cut()
  monkeypatch.undo()
  values = [
    value(load_packed(image / "runs" / "net"))
    for image in disk.replayed(tmp_path / "images")
  ]
  assert len(values) >= 5
  assert {*values} == {1, 2}
  assert values[-2:] == [2, 2]


def test_a_power_cut_leaves_the_first_save_once_it_returned(
  disk, tmp_path, monkeypatch
):
  save_packed(disk.root / "a" / "b" / "net", net(1))
  disk.images.clear()
  disk.cut()
  monkeypatch.undo()
  for image in disk.replayed(tmp_path / "images"):
    assert value(load_packed(image / "a" / "b" / "net")) == 1


@pytest.mark.parametrize("wait", [True, False])
def test_a_power_cut_leaves_a_step(disk, tmp_path, monkeypatch, wait):
  path = disk.root / "run"
  with Checkpointer(path, keep=1) as run:
    run.save(1, net(1), {})
    disk.images.clear()
    run.save(2, net(2), {}, wait=wait)
    run.wait()
    disk.cut()
    monkeypatch.undo()
  found = []
  for image in disk.replayed(tmp_path / "images"):
    with Checkpointer(image / "run") as run:
      state, _, step = run.restore(net(0))
    assert value(state) == step
    found.append(step)
  assert {*found} == {1, 2}
  assert found[-1] == 2
  # The last of both kinds are one if nothing was left to be told.
  assert len(found) >= 4


def test_a_folder_may_know_no_fsync(tmp_path, monkeypatch):
  def refuse(file):
    if stat.S_ISDIR(os.fstat(file).st_mode):
      raise OSError(22, "Invalid argument")

  monkeypatch.setattr(os, "fsync", refuse)
  save_packed(tmp_path / "net", net(1))
  assert value(load_packed(tmp_path / "net")) == 1


@pytest.mark.parametrize("folders", [False, True])
@pytest.mark.parametrize("call", ["save_packed", "Checkpointer"])
def test_a_disk_that_fails_costs_only_the_new(
  tmp_path, monkeypatch, call, folders
):
  save_packed(tmp_path / "net", net(1))
  run = Checkpointer(tmp_path / "run", keep=1)
  run.save(1, net(1), {})

  def fail(file):
    if stat.S_ISDIR(os.fstat(file).st_mode) == folders:
      raise OSError(5, "Input/output error")

  calls = {
    "save_packed": lambda: save_packed(
      tmp_path / "net", net(2), overwrite=True
    ),
    "Checkpointer": lambda: run.save(2, net(2), {}),
  }
  with monkeypatch.context() as m:
    m.setattr(os, "fsync", fail)
    with pytest.raises(CheckpointError, match="Input/output"):
      calls[call]()
  run.close()
  assert value(load_packed(tmp_path / "net")) == 1
  assert sorted(p.name for p in tmp_path.iterdir()) == ["net", "run"]
  assert [p.name for p in (tmp_path / "run").iterdir()] == ["1"]


# Names.


@pytest.mark.parametrize(
  "name",
  [
    "lr[0.1]",
    "what?",
    *map(long, ("*", "[", "**", "a b", "{a,b}", "%41", "~", "a:b")),
  ],
)
def test_any_name_of_a_folder_will_do(tmp_path, name):
  for path in (tmp_path / name, tmp_path / name / "net"):
    for x in (1, 2):
      save_packed(path / "net", net(x), overwrite=True)
      assert value(load_packed(path / "net")) == x
    (leaf,) = examine(path / "net").values()
    assert leaf.tolist() == [2] * 3
    with Checkpointer(path / "run", keep=1) as run:
      for step in (1, 2):
        run.save(step, net(step), {}, wait=step == 1)
      assert value(run.restore(net(0))[0]) == 2
    assert [p.name for p in (path / "run").iterdir()] == ["2"]


@pytest.mark.parametrize(
  ("name", "match"),
  [
    ("a\\b", "backslash"),
    ("gs:/net", "backslash, gs:"),
    ("a\udcff", "no UTF-8"),
    ("net.orbax-checkpoint-tmp", "what is not whole"),
  ],
)
def test_names_that_orbax_cannot_read_are_refused(tmp_path, name, match):
  for save in (
    lambda: save_packed(tmp_path / name, net(1)),
    lambda: Checkpointer(tmp_path / name),
  ):
    with pytest.raises(ValueError, match=match):
      save()
  assert not list(tmp_path.iterdir())


class Spoiled:
  """A save of orbax after which something happens to what it wrote."""

  def __init__(self, path, saving, spoil):
    self.path, self.saving, self.spoil = path, saving, spoil

  def result(self):
    self.saving.result()
    self.spoil(self.path)


@pytest.mark.parametrize(
  ("spoil", "match"),
  [
    (lambda x: next(x.glob("*/_METADATA")).unlink(), "the index of"),
    (lambda x: next(x.glob("*/manifest.ocdbt")).unlink(), "the index of"),
    (lambda x: (x / places.SPEC).unlink(), "cannot read the spec"),
    (
      lambda x: (x / places.SPEC).write_text((x / places.SPEC).read_text()[1:]),
      "cannot read the spec",
    ),
  ],
)
def test_what_cannot_be_found_again_is_not_published(
  tmp_path, monkeypatch, spoil, match
):
  save_packed(tmp_path / "net", net(1))
  run = Checkpointer(tmp_path / "run", keep=1)
  run.save(1, net(1), {})
  save, begin = (
    getattr(tensors.ocp, f"save_checkpointables{x}") for x in ("", "_async")
  )

  def spoiled(path, parts):
    save(path, parts)
    spoil(path)

  with monkeypatch.context() as m:
    m.setattr(tensors.ocp, "save_checkpointables", spoiled)
    m.setattr(
      tensors.ocp,
      "save_checkpointables_async",
      lambda path, parts: Spoiled(path, begin(path, parts), spoil),
    )
    with pytest.raises(CheckpointError, match=match):
      save_packed(tmp_path / "net", net(2), overwrite=True)
    with pytest.raises(CheckpointError, match=match):
      run.save(2, net(2), {})
  run.close()
  assert value(load_packed(tmp_path / "net")) == 1
  assert sorted(p.name for p in tmp_path.iterdir()) == ["net", "run"]
  assert [p.name for p in (tmp_path / "run").iterdir()] == ["1"]


# A reader beside a writer.


def replacing(monkeypatch, task, times):
  """Does a task before each of the first reads, as another process could."""
  load, left = tensors.ocp.load, [*range(times)]

  def replaced(*args, **kwargs):
    if left:
      left.pop()
      with monkeypatch.context() as m:
        m.setattr(tensors.ocp, "load", load)
        task()
    return load(*args, **kwargs)

  monkeypatch.setattr(tensors.ocp, "load", replaced)


@pytest.mark.sample(2)
@pytest.mark.parametrize(
  "read",
  [
    lambda path: value(load_packed(path)),
    lambda path: value(load_packed(path, net(0))),
    lambda path: float(next(iter(examine(path).values()))[0]),
  ],
)
def test_what_is_replaced_while_it_is_read_is_read_again(
  tmp_path, monkeypatch, read
):
  path, values = tmp_path / "net", iter(range(2, 9))
  save_packed(path, net(1))
  replacing(
    monkeypatch,
    lambda: save_packed(path, net(next(values)), overwrite=True),
    times=2,
  )
  assert read(path) == 3


def test_what_is_replaced_by_another_shape_is_read_again(tmp_path, monkeypatch):
  path = tmp_path / "net"
  save_packed(path, net(1))
  replacing(
    monkeypatch, lambda: save_packed(path, net(2, n=7), overwrite=True), 1
  )
  assert load_packed(path)["bias"].tolist() == [2] * 7


def test_a_run_whose_latest_step_is_deleted_is_read_again(
  tmp_path, monkeypatch
):
  with Checkpointer(tmp_path, keep=1) as run:
    steps = iter(range(1, 9))

    def save():
      step = next(steps)
      run.save(step, net(step), net(step))

    save()
    replacing(monkeypatch, save, times=2)
    assert value(load_packed(tmp_path)) == 3
    replacing(monkeypatch, save, times=2)
    reader = Checkpointer(tmp_path)
    state, _, step = reader.restore(net(0))
    assert (value(state), step, reader.latest_step()) == (5, 5, 5)
    # A step that was asked for is gone.
    replacing(monkeypatch, save, times=1)
    with pytest.raises(CheckpointError, match="/5 does not exist"):
      reader.restore(net(0), 5)


def test_a_reader_gives_up_in_the_end(tmp_path, monkeypatch):
  path = tmp_path / "net"
  save_packed(path, net(1))
  monkeypatch.setattr(places, "_ATTEMPTS", 3)
  values = iter(range(2, 99))
  replacing(
    monkeypatch,
    lambda: save_packed(path, net(next(values)), overwrite=True),
    times=9,
  )
  with pytest.raises(CheckpointError, match="bias is damaged: its crc32"):
    load_packed(path)


def test_what_is_damaged_is_read_once(tmp_path, monkeypatch):
  save_packed(tmp_path / "net", net(1))
  (tmp_path / "net" / "packed" / "_METADATA").unlink()
  reads, index_of = [], tensors.index_of

  def counted(path, part):
    reads.append(part)
    return index_of(path, part)

  monkeypatch.setattr(tensors, "index_of", counted)
  with pytest.raises(CheckpointError, match="the index of packed"):
    load_packed(tmp_path / "net")
  assert reads == ["packed"]


WRITER = """
import sys, itertools, jax.numpy as jnp
from tern_jax.checkpoint import *
folder = sys.argv[1]
with Checkpointer(folder + "/run", keep=1) as run:
  for i in itertools.count(1):
    x = {"a": jnp.full(1000, float(i)), "b": jnp.full(7, float(i))}
    save_packed(folder + "/net", x, overwrite=True)
    run.save(i, x, x, wait=i % 2 == 1)
    if i == 1:
      print("begun", flush=True)
"""


@pytest.mark.long
def test_a_reader_beside_a_writer_is_right_each_time(tmp_path):
  writer = subprocess.Popen(
    [sys.executable, "-c", WRITER, str(tmp_path)],
    stdout=subprocess.PIPE,
    text=True,
  )
  like, seen = {"a": jnp.zeros(1000), "b": jnp.zeros(7)}, []
  try:
    assert writer.stdout.readline() == "begun\n"
    end = time.monotonic() + 10
    while time.monotonic() < end:
      state, _, step = Checkpointer(tmp_path / "run").restore(like)
      trees = [load_packed(tmp_path / x) for x in ("net", "run")]
      for tree in (*trees, state):
        assert len({*np.concatenate([tree["a"], tree["b"]]).tolist()}) == 1
      assert float(state["a"][0]) == step
      assert disk_bytes(tmp_path / "net") > 0
      assert read_spec(tmp_path / "run")["step"] >= step
      seen.append(step)
  finally:
    writer.kill()
    writer.communicate()
  assert seen == sorted(seen)
  assert len({*seen}) > 3
