"""Starts: the same command is given twice at once."""

import json
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from experiments.common import log
from experiments.common.faults.trees import flat
from tern_jax.checkpoint import load_packed

#: Most seconds of CPU that the second process may take.
SECONDS = 5.0
#: What tells two runs of one command apart: how large its own files get depends
#: on how fast orbax comes to write them.
_OWN = ("seconds", "command", "commit", "disk_bytes", "forward")


def start(workdir: Path) -> subprocess.Popen[str]:
  """Starts a short training."""
  options = ["--epochs", "4", "--float-epochs", "2", "--log-every", "20"]
  command = [sys.executable, "-m", "experiments.digits", *options]
  return subprocess.Popen(
    [*command, "--workdir", str(workdir)],
    stdout=subprocess.DEVNULL,
    stderr=subprocess.PIPE,
    text=True,
  )


def record(workdir: Path) -> Any:
  """Returns what a run has written, without what the clock says."""
  result = json.loads((workdir / "result.json").read_text())
  weights = flat(load_packed(workdir / "checkpoints" / "ternary"))
  own = {k: v for k, v in result.items() if k not in _OWN}
  return own, log.read_metrics(workdir), weights


def starts(times: int, seed: int, folder: Path) -> Counter[str]:
  """Starts a run beside itself; returns how often that did no harm."""
  del seed
  counts: Counter[str] = Counter()
  if not times:
    return counts
  alone = start(folder / "alone" / "run")
  assert alone.wait() == 0, alone.communicate()[1]
  wanted = record(folder / "alone" / "run")
  for i in range(times):
    workdir = folder / str(i) / "run"
    first = start(workdir)
    # The further the first one has come, the later the second one starts.
    stage = ("config.json", "metrics.jsonl", "result.json")[i % 3]
    while first.poll() is None and not (workdir / stage).exists():
      time.sleep(0.02)
    second = start(workdir)
    errors = second.stderr.read() if second.stderr else ""
    _, status, used = os.wait4(second.pid, 0)
    code = os.waitstatus_to_exitcode(status)
    if first.poll() is None:
      assert code == 2, f"the second one ended with {code}: {errors}"
      assert len(errors.splitlines()) == 1, f"not one line: {errors}"
      seconds = used.ru_utime + used.ru_stime
      assert seconds < SECONDS, f"the second one took {seconds} s of CPU"
      counts["refused"] += 1
      slowest = max(counts["slowest in ms"], round(1000 * seconds))
      counts["slowest in ms"] = slowest
    else:
      assert code == 0, f"the second one ended with {code}: {errors}"
      counts["came after the end"] += 1
    assert first.wait() == 0, first.communicate()[1]
    assert record(workdir) == wanted, f"the record of run {i} is another"
    counts["records right"] += 1
  return counts
