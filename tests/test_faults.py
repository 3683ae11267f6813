"""What checkpoints survive: few cases of each kind, and how large they get."""

from pathlib import Path

import pytest

from experiments.benchmarks import checkpoint_scale, faults

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
  counts = faults.kills(2, 0, tmp_path)
  assert counts["kills"] == 2


@pytest.mark.long
def test_no_damage_is_silent(tmp_path):
  counts = faults.flips(60, 0, tmp_path)
  assert counts["noticed"] + counts["harmless"] == 60
  assert min(counts["noticed"], counts["harmless"]) > 12


def test_hostile_files_are_refused(tmp_path):
  counts = faults.fuzz(300, 0, tmp_path)
  for name, cases in (("specs", 90), ("codec", 150), ("safetensors", 60)):
    refused, loaded = counts[f"{name} refused"], counts[f"{name} loaded"]
    assert refused + loaded == cases
    assert refused > cases / 2


@pytest.mark.long
def test_a_save_takes_little_memory(capsys):
  options = checkpoint_scale.Options(millions=(4,), codecs=("planes",))
  rows = checkpoint_scale.measure(options)
  assert [row["bytes"] for row in rows] == [4e6 / 4 + 8] * 2
  assert all(row["bound"] < 1.5 for row in rows)
  assert "planes    load          4" in capsys.readouterr().out
