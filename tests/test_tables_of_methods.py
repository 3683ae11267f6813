"""Tables of methods: what is trained, in which order, and what is left out.

No net is trained: a stub takes the place of what trains one.
"""

import dataclasses
import doctest
import json
import signal
import threading
import types

import pytest

from experiments.benchmarks import accuracy_table, paper_table
from experiments.common import cli, errors, evaluate, guard, methods, trials
from tern_jax import TGA

PAPER_ORDER = [
  "float",
  *("SCA, .5", "SCA, .65", "SCA, .75", "SCA, .9"),
  *("EC2T, .45", "EC2T, .64", "EC2T, .73"),
  *("TWN", "TTQ", "TGA as published", "TGA()"),
]


def result(config):
  return {
    "validation_accuracy": {"rounded": 0.9},
    "accuracy": 0.875,
    "sparsity": 0.5,
    "entropy_bits_per_weight": 1.5,
    "command": "python -m x",
    "commit": "c0ffee",
    "seed": config.seed,
    "devices": "1 x cpu",
  }


def float_record(config):
  return {
    "validation": 0.91,
    "test": 0.925,
    "sparsity": None,
    "entropy": None,
    "seed": config.seed,
  }


@pytest.fixture
def trained(monkeypatch):
  """The options of all trainings, in their order; they take no time."""
  found = []

  def train(config):
    found.append(config)
    return result(config)

  def train_float(config, place):
    assert place.is_dir()
    found.append(config)
    return float_record(config)

  monkeypatch.setattr(trials.run, "run", train)
  monkeypatch.setattr(trials, "float_only", train_float)
  return found


def paper(tmp_path, preset="cpu", **options):
  given = paper_table.PaperOptions(preset, root=tmp_path, **options)
  paper_table.main(given)
  path = tmp_path / f"{given.data}-resnet20-{preset}" / "table.json"
  return json.loads(path.read_text()) if path.exists() else {}


def test_rows_come_in_order_of_importance(
  tmp_path, trained, monkeypatch, capsys
):
  monkeypatch.setattr(paper_table.jax, "default_backend", lambda: "gpu")
  table = paper(tmp_path, "gpu")
  assert list(table) == PAPER_ORDER
  assert [config.seed for config in trained] == [0, 1, 2] * len(PAPER_ORDER)
  assert len({config.workdir for config in trained[3:]}) == 33
  for config in trained:
    assert (config.epochs, config.float_epochs) == (200, 200)
    assert (config.model, config.compute) == ("resnet20", "bfloat16")
    assert config.batch_size == 128
    assert config.init == "float"
    assert config.exclude == ("stem", "head")
  assert len({config.float_directory for config in trained[3:]}) == 3
  sparsities = [config.method.sparsity for config in trained[3::3]]
  assert sparsities == [0.5, 0.65, 0.75, 0.9, 0.45, 0.64, 0.73, *[None] * 4]
  # The thresholds of TGA step as its weights do.
  for config in trained[-6:]:
    assert config.scale_optimizer == "sgd"
    assert config.scale_learning_rate == config.learning_rate == 1e-3
  shown = capsys.readouterr().out.splitlines()
  line = "90.00 ± 0.00 | 87.50 ± 0.00 | 50.0 ± 0.0 | 1.50 ± 0.00"
  assert f"| EC2T, .64 | 3 | {line} | 91.01 |" in shown
  assert f"| TWN | 3 | {line} | - |" in shown
  assert len(shown) == 2 + len(PAPER_ORDER)


def test_published_figures_lie_in_the_record(tmp_path, trained):
  table = paper(tmp_path)
  found = {label: runs[0]["published"] for label, runs in table.items()}
  assert {k: v for k, v in found.items() if v is not None} == {
    "float": 0.9167,
    "EC2T, .45": 0.9116,
    "EC2T, .64": 0.9101,
    "EC2T, .73": 0.9076,
    "TTQ": 0.9113,
    "TGA as published": 0.9039,
  }
  assert table["float"] == [
    float_record(trained[0]) | {"float_epochs": 30, "published": 0.9167}
  ]
  (run,) = table["TTQ"]
  assert run == {
    "validation": 0.9,
    "test": 0.875,
    "sparsity": 0.5,
    "entropy": 1.5,
    "command": "python -m x",
    "commit": "c0ffee",
    "seed": 0,
    "devices": "1 x cpu",
    "float_epochs": 30,
    "epochs": 30,
    "published": 0.9113,
  }
  assert all(config.schedule == "one_cycle" for config in trained)


def test_nothing_is_published_of_other_data(tmp_path, trained):
  table = paper(tmp_path, data="cifar100", rows=("TTQ", "float"), seeds=(4,))
  assert list(table) == ["float", "TTQ"]
  assert all(runs[0]["published"] is None for runs in table.values())
  assert [config.seed for config in trained] == [4, 4]


@pytest.mark.parametrize("module", [paper_table, accuracy_table])
def test_an_unknown_row(module, tmp_path, trained):
  options, first = {
    paper_table: (paper_table.PaperOptions, "cpu"),
    accuracy_table: (accuracy_table.AccuracyOptions, "mnist"),
  }[module]
  with pytest.raises(errors.UsageError, match="rows=TGA, but there are: float"):
    module.main(options(first, rows=("TWN", "TGA"), root=tmp_path))
  assert not trained
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
  ("options", "says"),
  [
    ({"minutes": 0.0}, "minutes=0, but it must be above 0"),
    ({"minutes": -1.0}, "minutes=-1, but"),
    ({"preset": "gpu"}, "wants an accelerator, and JAX finds none"),
  ],
)
def test_what_would_go_wrong_in_silence(tmp_path, trained, options, says):
  with pytest.raises(errors.UsageError, match=says):
    paper(tmp_path, **options)
  assert not trained
  assert not list(tmp_path.iterdir())


def test_no_run_is_started_that_would_not_fit(
  tmp_path, trained, monkeypatch, capsys
):
  now = [0.0]
  clock = types.SimpleNamespace(monotonic=lambda: now[0])
  monkeypatch.setattr(paper_table, "time", clock)
  seconds = iter([100, 150, 100, 140, 1000])
  train = trials.run.run

  def slow(config):
    now[0] += next(seconds)
    return train(config)

  monkeypatch.setattr(trials.run, "run", slow)
  # After 490 of 600 seconds the longest one, of 150, does not fit.
  table = paper(tmp_path, minutes=10)
  assert list(table) == PAPER_ORDER[:5]
  assert len(trained) == 5
  said = capsys.readouterr().out
  assert "5 of 12 runs are done, and time is up; to go on: " in said
  # What is done takes no time, and the first run is always started.
  now[0], seconds = 0.0, iter([0, 0, 0, 0, 10_000])
  assert list(paper(tmp_path, minutes=10)) == PAPER_ORDER[:6]


def endless(config):
  """Trains until a signal comes."""
  with guard.termination() as asked:
    came = threading.Event()
    for step in range(10_000):
      if number := asked(step):
        raise guard.stopped(f"after step {step}", number)
      came.wait(0.01)
  raise AssertionError(config)


def test_what_trains_when_time_is_up_ends(
  tmp_path, trained, monkeypatch, capsys
):
  monkeypatch.setattr(trials.run, "run", endless)
  assert list(paper(tmp_path, minutes=0.01)) == ["float"]
  assert "1 of 12 runs are done" in capsys.readouterr().out
  assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_another_signal_is_no_deadline(tmp_path, trained, monkeypatch):
  def signaled(config):
    with guard.termination() as asked:
      signal.raise_signal(signal.SIGTERM)
      raise guard.stopped("after step 1", asked(1))

  monkeypatch.setattr(trials.run, "run", signaled)
  with pytest.raises(errors.InterruptedRunError, match="SIGTERM: stopped"):
    paper(tmp_path, minutes=5)


def test_packing_goes_on_when_time_is_up(tmp_path, trained, monkeypatch):
  train = trials.run.run

  def pack(config):
    threading.Event().wait(0.4)
    return train(config)

  monkeypatch.setattr(trials.run, "run", pack)
  assert list(paper(tmp_path, minutes=0.004)) == PAPER_ORDER[:2]


def test_rows_of_accuracy_table(tmp_path, trained):
  options = accuracy_table.AccuracyOptions(
    "mnist",
    rows=("TGA as published", "float", "TGA()"),
    seeds=(1, 2),
    root=tmp_path,
  )
  accuracy_table.main(options)
  table = json.loads((tmp_path / "mnist-lenet5" / "table.json").read_text())
  assert list(table) == ["float", "TGA()", "TGA as published"]
  assert [run["test"] for run in table["float"]] == [0.925] * 2
  # Both trainings of the others together.
  epochs = [(config.float_epochs, config.epochs) for config in trained]
  assert epochs == [(3, 8), (3, 8), (11, 8)] * 2
  assert trained[0].method.method(100, 1) == TGA()
  expected = TGA(delta=0.05, of_max=True, mean=True, detach=False)
  assert trained[1].method.method(100, 1) == expected
  assert trained[1].scale_learning_rate == trained[1].learning_rate == 3e-3


def test_a_float_net_is_trained_once(tmp_path, monkeypatch):
  calls = []
  config = cli.Config(float_epochs=7, seed=3, method=methods.Twn())

  def train(config, dataset):
    calls.append(config)
    config.float_directory.mkdir(parents=True)
    return "variables"

  def score(variables, split):
    assert variables == "variables"
    return types.SimpleNamespace(accuracy={"v": 0.5, "t": 0.25}[split])

  dataset = types.SimpleNamespace(num_classes=10, validation="v", test="t")
  monkeypatch.setattr(trials.build, "load_dataset", lambda _: dataset)
  monkeypatch.setattr(trials.float_net, "train", train)
  monkeypatch.setattr(evaluate, "make_scorer", lambda *_: score)
  monkeypatch.setattr(trials.log, "provenance", lambda: {"commit": "c0ffee"})
  first = trials.float_only(config, tmp_path)
  assert first["devices"].endswith(" x cpu")
  assert first == {
    "validation": 0.5,
    "test": 0.25,
    "sparsity": None,
    "entropy": None,
    "seed": 3,
    "devices": first["devices"],
    "commit": "c0ffee",
  }
  # A later commit trains nothing, and claims nothing.
  monkeypatch.setattr(trials.log, "provenance", lambda: {"commit": "bad"})
  assert trials.float_only(config, tmp_path) == first
  trials.float_only(dataclasses.replace(config, float_epochs=8), tmp_path)
  assert [c.float_epochs for c in calls] == [7, 8]


def test_doctests():
  failed, attempted = doctest.testmod(trials)
  assert attempted
  assert not failed
