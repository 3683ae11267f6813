"""What checkpoints survive: few cases of each kind, and how large they get."""

from pathlib import Path

import pytest

from experiments.benchmarks import checkpoint_scale
from experiments.common.faults.damages import flips
from experiments.common.faults.fuzz import fuzz
from experiments.common.faults.hostile import hostile
from experiments.common.faults.kills import kills
from experiments.common.faults.names import names
from experiments.common.faults.power import power
from experiments.common.faults.readers import readers

# Orbax abandons coroutines where it finds damage.
pytestmark = [
  pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning",
    "ignore:coroutine .* was never awaited:RuntimeWarning",
  ),
  pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="measures as Linux does"
  ),
]


@pytest.mark.long
def test_a_killed_training_resumes_bit_for_bit(tmp_path):
  counts = kills(2, 0, tmp_path)
  assert counts["kills"] == 2


@pytest.mark.long
def test_no_damage_is_silent(tmp_path):
  counts = flips(60, 0, tmp_path)
  assert counts["noticed"] + counts["harmless"] == 60
  assert min(counts["noticed"], counts["harmless"]) > 12


@pytest.mark.long
def test_hostile_files_are_refused(tmp_path):
  counts = fuzz(300, 0, tmp_path)
  for name, cases in (("specs", 90), ("codec", 150), ("safetensors", 60)):
    refused, loaded = counts[f"{name} refused"], counts[f"{name} loaded"]
    assert refused + loaded == cases
    assert refused > cases / 2


@pytest.mark.long
def test_a_hostile_file_takes_no_memory(tmp_path):
  assert hostile(8, 0, tmp_path)["refused"] == 8


@pytest.mark.long
def test_names_that_are_patterns(tmp_path):
  counts = names(5, 0, tmp_path)
  assert counts["right"] + counts["refused"] == 10


@pytest.mark.long
def test_what_is_saved_survives_power_cuts(tmp_path):
  counts = power(3, 0, tmp_path)
  if "right" not in counts:
    pytest.skip("no file system can be mounted here")
  assert counts["right"] == 3


@pytest.mark.long
def test_a_reader_beside_a_writer(tmp_path):
  counts = readers(4, 0, tmp_path)
  assert min(counts["net loaded"], counts["run loaded"]) > 0


@pytest.mark.long
def test_a_save_takes_little_memory(capsys):
  options = checkpoint_scale.Options(millions=(4,), codecs=("planes",))
  rows = checkpoint_scale.measure(options)
  assert [row["bytes"] for row in rows] == [4e6 / 4 + 8] * 2
  assert all(row["bound"] < 1.5 for row in rows)
  assert "planes    load          4" in capsys.readouterr().out
