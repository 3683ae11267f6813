"""Accidents of runs: two starts, full disks, Ctrl-C, logs, terminals."""

import contextlib
import dataclasses
import errno
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments.common import (
  cli,
  command,
  errors,
  files,
  guard,
  lock,
  log,
  places,
  terminal,
)
from experiments.common.runner import run, stages
from experiments.common.runner.step import make_step
from tern_jax import training
from tests.helpers import long

ROOT = Path(__file__).parents[1]
ME = f"pid {os.getpid()} on {socket.gethostname()} since 20"


def listing(folder):
  """{path: bytes of a file} of all that is in a folder."""
  return {
    str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b""
    for path in folder.rglob("*")
  }


@contextlib.contextmanager
def started(code, *arguments):
  """A Python process that has said that it is ready."""
  process = subprocess.Popen(
    [sys.executable, "-c", code, *map(str, arguments)],
    cwd=ROOT,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )
  try:
    assert process.stdout.readline() == "ready\n"
    yield process
  finally:
    process.kill()
    process.communicate()


class TestFiles:
  def test_content_takes_the_place_of_what_was_there(self, tmp_path):
    for content in ("one", b"\x00\xff", ""):
      files.write(tmp_path / "a", content)
      data = content.encode() if isinstance(content, str) else content
      assert listing(tmp_path) == {"a": data}

  @pytest.mark.parametrize("call", ["fsync", "replace", "open"])
  def test_what_was_there_outlives_a_full_disk(
    self, tmp_path, monkeypatch, call
  ):
    path = tmp_path / "a"
    files.write(path, "old")

    def full(*_, **__):
      raise OSError(errno.ENOSPC, "No space left on device")

    owner = os if call == "fsync" else Path
    monkeypatch.setattr(owner, call, full)
    with pytest.raises(OSError, match="No space left") as failed:
      files.write(path, "new")
    monkeypatch.undo()
    assert failed.value.errno == errno.ENOSPC
    assert failed.value.filename == str(path)
    assert listing(tmp_path) == {"a": b"old"}

  def test_what_a_killed_writer_left_is_removed(self, tmp_path):
    left = (".a.01234567.part", "latents/.0.npz.89abcdef.part")
    kept = (".mine.part", "a.01234567.part", "deep/er/.a.01234567.part")
    for name in (*left, *kept):
      (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
      (tmp_path / name).touch()
    with lock.held(tmp_path):
      pass
    found = [name for name, _ in listing(tmp_path).items() if "part" in name]
    assert sorted(found) == sorted(kept)


class TestLock:
  def test_the_second_is_told_who_the_first_is(self, tmp_path):
    place = tmp_path / "a" / "run"
    with lock.held(place):
      assert (place / lock.NAME).read_text().startswith(ME)
      with (
        pytest.raises(errors.UsageError, match=f"{place} is in use by {ME}"),
        lock.held(place),
      ):
        pass
      (place / "written").touch()
    assert set(listing(tmp_path)) == {"a", "a/run", "a/run/written"}
    with lock.held(place):
      pass

  @pytest.mark.parametrize("text", ["", "\x1b[2Jpid 1", "pid 1\nall is well"])
  def test_a_holder_of_odd_words_is_another_process(self, tmp_path, text):
    with lock.held(tmp_path):
      (tmp_path / lock.NAME).write_text(text)
      with (
        pytest.raises(errors.UsageError, match="in use by another process: w"),
        lock.held(tmp_path),
      ):
        pass

  def test_nothing_written_is_nothing_left(self, tmp_path):
    with lock.held(tmp_path / "a" / "b" / "c"):
      pass
    assert not listing(tmp_path)
    (tmp_path / "mine").mkdir()
    with lock.held(tmp_path / "mine" / "run"):
      pass
    assert set(listing(tmp_path)) == {"mine"}

  @pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM])
  def test_a_process_that_has_died_holds_nothing(self, tmp_path, end):
    code = """
import fcntl, os, sys, time
number = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)
os.write(number, b"pid 7 on elsewhere since long ago")
fcntl.flock(number, fcntl.LOCK_EX)
print("ready", flush=True)
time.sleep(60)
"""
    with started(code, tmp_path / lock.NAME) as process:
      told = "in use by pid 7 on elsewhere since long ago: wait"
      # One that is stopped may go on.
      for number in (signal.SIGSTOP, signal.SIGCONT):
        process.send_signal(number)
        with pytest.raises(errors.UsageError, match=told), lock.held(tmp_path):
          pass
      process.send_signal(end)
      process.wait(30)
      assert (tmp_path / lock.NAME).exists()
      with lock.held(tmp_path):
        assert (tmp_path / lock.NAME).read_text().startswith(ME)
    assert not listing(tmp_path)

  def test_who_waits_says_so_and_comes_next(self, tmp_path):
    order, told = [], []
    waiting = threading.Event()

    def wait(holder):
      told.append(holder)
      waiting.set()

    def second():
      with lock.held(tmp_path, wait):
        order.append("second")

    thread = threading.Thread(target=second)
    with lock.held(tmp_path):
      thread.start()
      assert waiting.wait(30)
      order.append("first")
    thread.join(30)
    assert order == ["first", "second"]
    assert told[0].startswith(ME)
    assert not listing(tmp_path)

  def test_many_threads_are_alone_one_by_one(self, tmp_path):
    place, inside, most = tmp_path / "run", [], []

    def work():
      for _ in range(20):
        with lock.held(place, lambda _: None):
          inside.append(1)
          most.append(len(inside))
          inside.pop()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
      thread.start()
    for thread in threads:
      thread.join(30)
    assert most == [1] * 80

  @pytest.mark.parametrize("name", ["file", "file/below"])
  def test_a_file_is_no_directory(self, tmp_path, name):
    (tmp_path / "file").write_text("mine")
    with (
      pytest.raises(errors.UsageError, match="cannot be written to"),
      lock.held(tmp_path / name),
    ):
      pass
    assert listing(tmp_path) == {"file": b"mine"}

  def test_a_file_system_without_locks(self, tmp_path, monkeypatch, capsys):
    def none(*_):
      raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(lock.fcntl, "flock", none)
    with lock.held(tmp_path / "run"):
      pass
    assert "cannot be locked (No locks available)" in capsys.readouterr().err

  def test_a_directory_has_many_names(self, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to(tmp_path / "run")
    names = ("run", "run/", "run//", "./run", "link", "link/../run", "/dev/..")
    found = [
      places.run_directory(cli.Config(workdir=name)) for name in names[:-1]
    ]
    assert set(found) == {tmp_path / "run"}


class TestRecords:
  def test_a_config_of_nothing_else_is_written_again(self, tmp_path):
    record = places.run_record(cli.Config())
    for content in ("", "{", "[1]", "\x00" * 9, json.dumps(record)):
      (tmp_path / "config.json").write_text(content)
      log.claim(tmp_path, record)
      assert json.loads((tmp_path / "config.json").read_text()) == record

  @pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff\xfe"])
  def test_a_damaged_config_of_a_run_is_an_error(self, tmp_path, content):
    (tmp_path / "config.json").write_bytes(content)
    (tmp_path / "metrics.jsonl").touch()
    for use in (
      lambda: log.claim(tmp_path, places.run_record(cli.Config())),
      lambda: log.read_config(tmp_path),
    ):
      with pytest.raises(errors.UsageError) as told:
        use()
      assert str(told.value) == (
        f"{tmp_path}/config.json is damaged: its {len(content)} bytes are not"
        " what a run writes. Copy it from another run with the same options,"
        " or choose another directory."
      )
    assert (tmp_path / "config.json").read_bytes() == content

  @pytest.mark.parametrize(
    "record", [{}, {"method": 1}, {"method": {"name": "No"}}, {"method": {}}]
  )
  def test_the_config_of_something_else(self, tmp_path, record):
    (tmp_path / "config.json").write_text(json.dumps(record))
    with pytest.raises(errors.UsageError, match="not hold the options of a"):
      log.read_config(tmp_path)

  def test_a_damaged_result_is_none(self, tmp_path):
    path = tmp_path / "result.json"
    for content, found in (
      (None, None),
      ("", None),
      ('{"a"', None),
      ('{"a": 1}', {"a": 1}),
    ):
      if content is not None:
        path.write_text(content)
      assert log.read_object(path) == found

  def test_unreadable_lines_lose_no_others(self, tmp_path, capsys):
    (tmp_path / "config.json").write_text("{}")
    lines = [{"phase": "float", "step": n, "loss": n / 8} for n in (1, 2, 3)]
    texts = [json.dumps(line).encode() for line in lines]
    others = (b"\x00" * 5, b"[1]", b'{"step": 2}', b"\xff", texts[2][:9])
    content = b"\n".join([texts[0], *others, texts[1], texts[2], others[-1]])
    (tmp_path / "metrics.jsonl").write_bytes(content)
    assert log.read_metrics(tmp_path) == lines
    with log.Log(tmp_path, "float", 2, 9):
      pass
    assert "metrics.jsonl: 6 unreadable lines" in capsys.readouterr().out
    written = (tmp_path / "metrics.jsonl").read_bytes()
    assert written == b"\n".join(texts[:2]) + b"\n"
    with log.Log(tmp_path, "float", 2, 9):
      pass
    assert "unreadable lines" not in capsys.readouterr().out

  def test_a_line_that_the_disk_had_no_room_for(self, tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text("{}")
    with log.Log(tmp_path, "float", 0, 9) as out:
      out.write(1, {"loss": 0.5})
      size = (tmp_path / "metrics.jsonl").stat().st_size
      # What is left of a quota, as a disk that is full: a part of a line.
      resource = pytest.importorskip("resource")
      limit = resource.getrlimit(resource.RLIMIT_FSIZE)
      handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
      resource.setrlimit(resource.RLIMIT_FSIZE, (size + 20, limit[1]))
      try:
        with pytest.raises(OSError, match="File too large"):
          out.write(2, {"loss": 0.25})
      finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, handler)
      with contextlib.suppress(OSError):
        out.sync()
    assert log.read_metrics(tmp_path)[0]["step"] == 1
    with log.Log(tmp_path, "float", 1, 9) as out:
      out.write(2, {"loss": 0.25})
    assert log.read_metrics(tmp_path) == [
      {"phase": "float", "step": 1, "loss": 0.5},
      {"phase": "float", "step": 2, "loss": 0.25},
    ]

  def test_the_clock_is_in_the_file_alone(self, tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text('{"epochs": 123}')
    now = iter([1000.0, 900.0])  # Somebody sets the clock back.
    clock = types.SimpleNamespace(time=lambda: next(now))
    monkeypatch.setattr(log, "time", clock)
    with log.Log(tmp_path, "float", 0, 9) as out:
      out.write(1, {"loss": 0.5})
      out.write(2, {"loss": 0.25, "gradient_norm": 3.0})
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    first, second = map(json.loads, lines)
    assert "steps_per_second" not in first  # It compiled something.
    assert second.pop("steps_per_second") > 0
    assert (first.pop("wall_time"), second.pop("wall_time")) == (1000, 900)
    assert log.read_metrics(tmp_path) == [first, second]
    (events,) = (tmp_path / "tensorboard" / "float").glob("events.*")
    content = events.read_bytes()
    for name in (b"gradient_norm", b"steps_per_second", b'"epochs": 123'):
      assert name in content

  def test_the_command_can_be_given_again(self, monkeypatch):
    given = ["/usr/bin/python3", "-m", "x", "--workdir", "my runs/a&b"]
    monkeypatch.setattr(sys, "orig_argv", given)
    assert errors.command_line() == "python -m x --workdir 'my runs/a&b'"
    assert log.provenance()["command"] == errors.command_line()


FIGURES = {
  "loss": 0.01234,
  "validation_accuracy": 0.97823,
  "sparsity": 0.70004,
  "validation_loss": 1.0,
}


class TestProgress:
  def test_what_fits_a_terminal(self):
    now = [0.0]
    progress = terminal.Progress("ternary", 28500, lambda: now[0])
    progress.is_due(1)
    now[0] = 10.0
    progress.show(1234, FIGURES)
    # (1234 - 1) / 10 steps a second.
    for columns, line in (
      (
        200,
        "ternary 1234/28500  4%  123/s  3m41s left  loss 0.0123  acc 97.8%"
        "  zeros 70.0%",
      ),
      (
        79,
        "ternary 1234/28500  4%  123/s  3m41s left  loss 0.0123  acc 97.8%"
        "  zeros 70.0%",
      ),
      (59, "ternary 1234/28500  3m41s left  acc 97.8%  zeros 70.0%"),
      (19, "ternary 1234/28500"),
      (9, "ternary 1"),
      (0, ""),
    ):
      assert progress.short(1234, FIGURES, columns) == line
      assert len(line) <= columns
    assert progress.long(1234, FIGURES) == (
      "ternary 1234/28500 (4%), 123 steps/s, 3m41s left, loss 0.0123,"
      " validation accuracy 97.82%, zeros 70.00%"
    )
    # Even where millions of steps are many a second.
    progress = terminal.Progress("ternary", 9_999_999, lambda: now[0])
    progress.is_due(0)
    now[0] += 2000
    progress.show(5_000_000, FIGURES)
    for columns in (79, 59):
      line = progress.short(5_000_000, FIGURES, columns)
      assert "acc 97.8%" in line
      assert "zeros 70.0%" in line

  def test_a_log_has_a_line_by_the_clock(self, capsys):
    now = [100.0]
    progress = terminal.Progress("float", 1000, lambda: now[0])
    said = []
    for step in range(1, 1001):
      now[0] += 0.5 if step > 1 else 90  # The first one compiles.
      if progress.is_due(step):
        progress.show(step, {"loss": 1.0})
        said.append(step)
    progress.close()
    # After 5 s, then every 60 s, and at the end.
    assert said == [11, *range(131, 1000, 120), 1000]
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "float 11/1000 (1%), 2 steps/s, 8m14s left, loss 1.0000"
    assert lines[-1] == "float 1000/1000 (100%), 2 steps/s, loss 1.0000"
    assert len(lines) == len(said)

  def test_slow_steps_are_told_one_by_one(self):
    now = [0.0]
    progress = terminal.Progress("float", 9, lambda: now[0])
    due = []
    for step in range(1, 10):
      now[0] += 300
      due.append(progress.is_due(step))
      if due[-1]:
        progress.show(step, {})
    assert due == [False] + [True] * 8

  def test_a_clock_that_stands_still(self):
    progress = terminal.Progress("float", 3, lambda: 7.0)
    for step in (1, 2, 3):
      assert progress.is_due(step) == (step == 3)
    progress.show(3, {})
    assert progress.long(3, {}) == "float 3/3 (100%)"

  @pytest.mark.parametrize("term", ["dumb", None])
  def test_a_dumb_terminal_gets_lines(self, monkeypatch, capsys, term):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    if term is None:
      monkeypatch.delenv("TERM", raising=False)
    else:
      monkeypatch.setenv("TERM", term)
    terminal.Progress("float", 3).show(3, {})
    assert capsys.readouterr() == ("float 3/3 (100%)\n", "")

  @pytest.mark.parametrize("columns", [80, 60, 20, 0])
  def test_a_terminal_is_never_too_narrow(self, columns):
    code = """
import fcntl, itertools, struct, sys, termios
from experiments.common import terminal
size = struct.pack("HHHH", 24, int(sys.argv[1]), 0, 0)
fcntl.ioctl(2, termios.TIOCSWINSZ, size)
progress = terminal.Progress("ternary", 28500, itertools.count().__next__)
for step in range(1, 100):
  if progress.is_due(step):
    figures = {"loss": .1, "validation_accuracy": .9, "sparsity": .7}
    progress.show(step, figures)
progress.close()
"""
    pty = pytest.importorskip("pty")
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm"}
    environment.pop("COLUMNS", None)
    done = subprocess.run(
      [sys.executable, "-c", code, str(columns)],
      cwd=ROOT,
      env=environment,
      stderr=theirs,
      capture_output=False,
      check=True,
    )
    os.close(theirs)
    content = b""
    with contextlib.suppress(OSError):
      while chunk := os.read(ours, 1 << 16):
        content += chunk
    os.close(ours)
    assert done.returncode == 0
    drawn = content.decode().removesuffix("\r\n").split("\r")[1:]
    assert len(drawn) > 10
    for line in drawn:
      assert line.endswith("\x1b[K")
      assert "\n" not in line
      assert len(line.removesuffix("\x1b[K")) < (columns or 80)
      assert ("acc 90.0%  zeros 70.0%" in line) == (columns != 20)

  def test_a_reader_that_has_gone_ends_nothing(self):
    code = """
import sys
from experiments.common import terminal
print("ready", flush=True)
sys.stdin.readline()
for _ in range(3):
  terminal.say("more")
sys.stderr.write("through")
"""
    process = subprocess.Popen(
      [sys.executable, "-c", code],
      cwd=ROOT,
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
    )
    assert process.stdout.readline() == b"ready\n"
    process.stdout.close()
    process.stdin.write(b"\n")
    process.stdin.close()
    assert process.stderr.read() == b"through"
    process.stderr.close()
    assert process.wait(30) == 0


class TestSignals:
  @pytest.mark.parametrize("number", guard.SIGNALS)
  def test_a_signal_is_a_question(self, number):
    before = [signal.getsignal(x) for x in guard.SIGNALS]
    answers = []

    def train():
      with guard.termination() as asked:
        for raised in (None, number, signal.SIGTERM):  # The first one counts.
          if raised is not None:
            signal.raise_signal(raised)
          answers.append(asked(1))

    with pytest.raises(errors.InterruptedRunError) as stopped:
      train()
    assert answers == [0, number, number]
    assert stopped.value.status == 128 + number
    assert str(stopped.value) == (
      f"{number.name}: stopped between two phases; to go on:"
      f" {errors.command_line()}"
    )
    assert [signal.getsignal(x) for x in guard.SIGNALS] == before
    assert signal.set_wakeup_fd(-1) == -1

  @pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT])
  def test_what_nohup_ignores_stays_ignored(self, number):
    before = signal.signal(number, signal.SIG_IGN)
    try:
      with errors.explained(), guard.termination() as asked:
        signal.raise_signal(number)
        assert asked(1) == 0
      assert signal.getsignal(number) == signal.SIG_IGN
    finally:
      signal.signal(number, before)

  def test_a_second_ctrl_c_ends_at_once(self):
    # In a call that no handler in Python could interrupt.
    code = """
import hashlib
from experiments.common import errors, guard
errors.PATIENCE = 0.2
with guard.termination():
  print("ready", flush=True)
  hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)
"""
    with started(code) as process:
      process.send_signal(signal.SIGINT)
      assert process.stderr.readline() == (
        "SIGINT: ends with a checkpoint after this step; again: at once\n"
      )
      process.send_signal(signal.SIGINT)
      assert process.wait(30) == 130
      told = process.stderr.read()
    assert told.startswith("SIGINT: ended at once; to go on: python -c")

  @pytest.mark.parametrize(
    ("error", "status", "told"),
    [
      (
        KeyboardInterrupt(),
        130,
        r"SIGINT: ended before it was done; to go on: python .+",
      ),
      (errors.InterruptedRunError("why", signal.SIGHUP), 129, "why"),
      (errors.InterruptedRunError("why"), 143, "why"),
      (errors.UsageError("what"), 2, "error: what"),
      (
        OSError(errno.ENOSPC, "No space left on device", "/a/b"),
        2,
        r"error: /a/b: No space left on device\. Once that .+: python .+",
      ),
      (OSError("odd"), 2, r"error: odd\. Once that is mended, .+"),
    ],
  )
  def test_an_end_is_one_line(self, error, status, told, capsys):
    with pytest.raises(SystemExit) as stopped, errors.explained():
      raise error
    assert stopped.value.code == status
    output, line = capsys.readouterr()
    assert output == ""
    assert re.fullmatch(told, line.removesuffix("\n"))

  def test_a_mistake_of_ours_keeps_its_traceback(self):
    with pytest.raises(ZeroDivisionError), errors.explained():
      raise ZeroDivisionError

  @pytest.mark.sample(5)
  @pytest.mark.parametrize(
    "module",
    ["digits", "alpha_sweep", "report", "prepare", "benchmarks.equal_sparsity"],
  )
  def test_ctrl_c_while_a_command_is_imported(self, module):
    command = [sys.executable, "-X", "importtime", "-m"]
    process = subprocess.Popen(
      [*command, f"experiments.{module}"],
      cwd=ROOT,
      stdout=subprocess.DEVNULL,
      stderr=subprocess.PIPE,
      text=True,
    )
    # The first modules that the package itself imports have been loaded.
    lines = iter(process.stderr.readline, "")
    assert any("| experiments" in line for line in lines)
    process.send_signal(signal.SIGINT)
    rest = [line for line in lines if not line.startswith("import time:")]
    process.stderr.close()
    assert process.wait(30) == 130
    assert rest == ["SIGINT: ended before it began.\n"]


class TestRuns:
  @pytest.fixture
  def config(self, tmp_path):
    return cli.Config(
      epochs=1,
      hidden=(8,),
      parallel="jit",
      data_dir=str(tmp_path / "data"),
      workdir=str(tmp_path / "runs" / "run"),
    )

  def test_a_second_start_is_refused_before_data_are_loaded(
    self, config, tmp_path, monkeypatch, capsys
  ):
    monkeypatch.setattr(run.build, "load_dataset", None)
    monkeypatch.setattr("sys.argv", ["digits"])
    with lock.held(config.directory):
      log.claim(config.directory, places.run_record(config))
      (config.directory / "metrics.jsonl").write_text("torn")
      before = listing(tmp_path)
      with pytest.raises(SystemExit) as stopped:
        command.main(config, "Digits")
      assert listing(tmp_path) == before
    assert stopped.value.code == 2
    told = capsys.readouterr().err
    assert told.startswith(f"error: {config.directory} is in use by {ME}")
    assert told.count("\n") == 1

  def test_a_finished_run_needs_neither_data_nor_a_lock(
    self, config, monkeypatch
  ):
    log.claim(config.directory, places.run_record(config))
    files.write(config.directory / "result.json", '{"accuracy": 1}')
    monkeypatch.setattr(run.build, "load_dataset", None)
    monkeypatch.setattr(lock, "held", None)
    assert run.run(config) == {"accuracy": 1}

  def test_a_file_in_the_place_of_a_run(self, config, tmp_path):
    (tmp_path / "runs").write_text("mine")
    with pytest.raises(errors.UsageError, match="cannot be written to"):
      run.run(config)
    assert listing(tmp_path) == {"runs": b"mine"}

  @pytest.mark.parametrize("parallel", ["jit", long("pmap")])
  def test_the_gradient_norm_is_that_of_the_step(
    self, config, standard_promotion, parallel
  ):
    rng = np.random.default_rng(0)
    batch = {
      "input": rng.normal(size=(8, 8, 8, 1)).astype(np.float32),
      "label": rng.integers(0, 10, 8).astype(np.int32),
    }
    own = dataclasses.replace(
      config,
      norm=False,
      hidden=(),
      batch_size=8,
      parallel=parallel,
      devices=2 if parallel == "pmap" else None,
    )
    rate = 0.5
    tx = optax.sgd(rate)
    stage = stages.Stage(None, tx, 9, rate=lambda _: rate)
    kernel = rng.normal(size=(64, 10)).astype(np.float32)
    params = {"Dense_0": {"kernel": jnp.asarray(kernel), "bias": jnp.zeros(10)}}
    state = training.init_state(params, tx)
    after, measured = make_step(own, stage, 10)(state, batch)
    # The gradient of softmax regression.
    x = batch["input"].reshape(8, 64).astype(np.float64)
    logits = x @ kernel
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    error = (p - np.eye(10)[batch["label"]]) / 8
    norm = np.sqrt(((x.T @ error) ** 2).sum() + (error.sum(0) ** 2).sum())
    assert float(measured["gradient_norm"]) == pytest.approx(norm, rel=1e-5)
    moved = jax.tree.map(lambda a, b: (a - b) / rate, params, after.params)
    assert float(optax.tree.norm(moved)) == pytest.approx(norm, rel=1e-5)


DIGITS = """
import sys
from experiments.common import cli, command, evaluate
from experiments.common.runner import run
sys.argv = ["digits", *sys.argv[1:]]
run.pictures.draw = lambda *_: None
config = cli.Config(epochs=6, hidden=(8,), log_every=5, checkpoint_every=20,
                    parallel="jit")
print("ready", flush=True)
command.main(config, "Digits")
"""


def record_of(workdir):
  """What two runs of the same options have alike."""
  result = json.loads((workdir / "result.json").read_text())
  incidental = ("seconds", "command", "disk_bytes", "forward")
  (floats,) = workdir.parent.glob("float/*")
  essential = {k: v for k, v in result.items() if k not in incidental}
  return essential, log.read_metrics(workdir), log.read_metrics(floats)


@pytest.mark.long
def test_starts_at_once_and_ctrl_c_change_no_record(tmp_path):
  data = ("--data-dir", tmp_path / "tfds")
  whole = tmp_path / "whole" / "run"
  with started(DIGITS, *data, "--workdir", whole) as alone:
    assert alone.wait(300) == 0

  shared = tmp_path / "shared" / "run"
  with started(DIGITS, *data, "--workdir", shared) as first:
    while not (shared / lock.NAME).exists():
      time.sleep(0.01)
    with started(DIGITS, *data, "--workdir", f"{shared}/") as second:
      assert second.wait(30) == 2
      told = second.stderr.read()
    assert f"in use by pid {first.pid} on" in told
    assert told.count("\n") == 1
    assert first.wait(300) == 0
  assert record_of(shared) == record_of(whole)

  often = tmp_path / "often" / "run"
  for word in ("float net", "ternary net"):
    with started(DIGITS, *data, "--workdir", often) as process:
      for line in iter(process.stdout.readline, ""):
        if line.startswith(word):
          process.send_signal(signal.SIGINT)
          break
      assert process.wait(300) == 130
      told = process.stderr.read()
      assert re.search("SIGINT: stopped .+; to go on: python -c", told)
  with started(DIGITS, *data, "--workdir", often) as process:
    assert process.wait(300) == 0
  assert record_of(often) == record_of(whole)
