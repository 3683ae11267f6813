"""The sweep: one program is many runs, and a run is that of the experiments."""

import dataclasses
import json

import jax
import numpy as np
import pytest

import tern_jax
from experiments import alpha_sweep
from experiments.benchmarks import equal_sparsity
from experiments.common import build, data, errors, evaluate, log, sweep
from experiments.common.runner import stages
from experiments.common.runner.step import make_step
from tern_jax import metrics

pytestmark = pytest.mark.usefixtures("standard_promotion_throughout")


@pytest.fixture(scope="module")
def config(tmp_path_factory):
  directory = tmp_path_factory.mktemp("sweep")
  return alpha_sweep.SweepOptions(
    values=(0.05, 0.2, 0.4),
    seeds=1,
    hidden=(),
    epochs=8,
    devices=1,
    data_dir=str(directory / "tfds"),
    workdir=str(directory / "alpha"),
  )


@pytest.fixture(scope="module")
def dataset(config):
  return data.load_dataset("digits", config.data_dir)


@pytest.fixture(scope="module")
def rows(config, dataset, standard_promotion_throughout):
  return sweep.run_sweep(config.sweep(), dataset)


def test_more_alpha_makes_more_zeros_as_predicted(rows):
  assert [(row["alpha"], row["seed"]) for row in rows] == [
    (0.05, 0),
    (0.2, 0),
    (0.4, 0),
  ]
  zeros = [row["zeros"] for row in rows]
  assert zeros == sorted(zeros)
  for row in rows:
    assert row["predicted"] == pytest.approx(row["zeros"], abs=0.12)
    assert row["bits"] <= np.log2(3) + 1e-6
    # Shares of 180 and 360 images.
    for name, images in (("validation", 180), ("test", 360)):
      for column in (name, f"{name}_rounded"):
        right = images * row[column]
        assert right == pytest.approx(round(right), abs=1e-3)
    assert row["validation"] > 0.6


@pytest.mark.long
def test_a_run_is_that_of_the_experiments(config, dataset, rows):
  """Step by step in Python, on the same batches: the same net."""
  options = config.run(0.2, seed=0)
  params, model_state = build.initial_variables(options, dataset)
  epoch_steps = 1257 // config.batch_size
  steps = config.epochs * epoch_steps
  phase = stages.ternary_phase(options, steps, params, model_state)
  stage, state = phase.final, phase.state
  step = make_step(options, stage, dataset.num_classes)
  key = jax.random.fold_in(jax.random.key(0), 1)
  for epoch in jax.random.split(key, config.epochs):
    order = np.asarray(jax.random.permutation(epoch, 1257))
    for n in range(epoch_steps):
      if int(state.step) == phase.snapshots[1]:
        theta = np.concatenate(
          [np.ravel(x) for x in stage.latents(state).values()]
        )
      some = order[n * config.batch_size :][: config.batch_size]
      images = dataset.train["input"][some]
      images = data.standardize(images, dataset.mean, dataset.std)
      batch = {"input": images, "label": dataset.train["label"][some]}
      state, _ = step(state, batch)
  score = evaluate.make_scorer(build.make_model(options, 10), dataset)
  right = score(stage.variables(state), dataset.validation).correct
  row = rows[1]
  assert row["validation"] == pytest.approx(right / 180, abs=2.5 / 180)
  sparsity = metrics.sparsity(stage.ternary(state))
  assert row["zeros"] == pytest.approx(float(sparsity), abs=0.01)
  barrier = np.arctanh(np.sqrt(0.2 / 2))
  predicted = np.mean(np.abs(theta) <= barrier)
  assert row["predicted"] == pytest.approx(predicted, abs=0.01)


def test_three_runs_on_two_devices_come_out_in_order():
  def train(value, seed, splits):
    return {"sum": 10 * value + seed + splits["x"]}

  program = sweep.in_one_program(train, 2)
  values, seeds = np.float32([1, 2, 3]), np.int32([4, 5, 6])
  found = program(values, seeds, {"x": np.float32(0.5)})
  np.testing.assert_array_equal(found["sum"], [14.5, 25.5, 36.5])


@pytest.mark.long
def test_runs_shared_by_two_devices(config, dataset, rows):
  """Three runs on two devices: one is repeated, and dropped."""
  two = dataclasses.replace(config, devices=2)
  for mine, other in zip(
    sweep.run_sweep(two.sweep(), dataset), rows, strict=True
  ):
    assert mine.keys() == other.keys()
    for name, value in mine.items():
      assert value == pytest.approx(other[name], abs=0.015), name


@pytest.mark.long
def test_a_sweep_of_sparsity_is_exact(config, dataset, monkeypatch, capsys):
  asked = (0.5, 0.9)
  mine = dataclasses.replace(
    config,
    by="sparsity",
    values=asked,
    hidden=(8,),
    workdir=f"{config.directory}-sparsity",
  )
  alpha_sweep.main(mine)
  table = capsys.readouterr().out
  rows = alpha_sweep.read(mine.directory / "sweep.csv")
  # 64 x 8 + 8 x 10 weights.
  for row, share in zip(rows, asked, strict=True):
    assert row["sparsity"] == pytest.approx(share)
    assert row["zeros"] == pytest.approx(share, abs=1 / 592)
    assert row["predicted"] == pytest.approx(share, abs=1 / 80)
    assert f"{100 * row['zeros']:.2f}" in table
  # The hard forward is what is rounded; only the statistics are new.
  assert rows[0]["test"] == pytest.approx(rows[0]["test_rounded"], abs=0.1)
  assert max(map(len, table.splitlines()[:-1])) <= 80
  for name in ("sparsity", "accuracy"):
    assert (mine.directory / f"{name}.png").stat().st_size > 10_000
  # A finished sweep is not repeated, and another one does not overwrite it.
  monkeypatch.setattr(sweep, "run_sweep", None)
  alpha_sweep.main(mine)
  assert capsys.readouterr().out == table
  with pytest.raises(errors.UsageError, match=r"epochs=8 there, 9 now"):
    alpha_sweep.main(dataclasses.replace(mine, epochs=9))


@pytest.mark.long
def test_one_program_is_measured_against_its_runs(config, dataset):
  tiny = dataclasses.replace(config, epochs=1, values=(0.1,), hidden=())
  measured = sweep.compare(tiny.sweep(), dataset, rounds=1)
  assert list(measured) == ["one program", "one by one", "ratio"]
  assert measured["ratio"] == pytest.approx(
    measured["one program"] / measured["one by one"]
  )


def test_dense_weights():
  one = np.float32(2)
  codes = np.array([1, 0, -1], np.int8)
  leaf = tern_jax.Ternary(*map(jax.numpy.asarray, (codes, one, one)))
  tree = sweep.dense({"a": leaf, "b": np.ones(2)})
  assert tree["a"].tolist() == [2, 0, -2]
  assert tree["b"].tolist() == [1, 1]


def test_rows_are_written_and_read(tmp_path):
  rows = [{"alpha": 0.1, "seed": 0, "bits": 1 / 3}]
  alpha_sweep.write(tmp_path / "sweep.csv", rows)
  assert alpha_sweep.read(tmp_path / "sweep.csv") == rows


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"seeds": 0}, "seeds=0, but it must be at least 1"),
    ({"devices": 99}, "devices=99, but there are"),
    ({"values": (2.5,)}, r"alpha must lie in \[0, 2\), got 2.5"),
    ({"by": "sparsity", "values": (1.0,)}, "sparsity must lie in"),
    ({"epochs": 0}, "epochs=0, but it must be at least 1"),
  ],
)
def test_options_that_do_not_fit(changes, message):
  with pytest.raises(errors.UsageError, match=message):
    alpha_sweep.SweepOptions(**{"values": (0.1,), **changes}).sweep()


def test_equal_sparsity_keeps_runs_with_other_options_apart(
  config, tmp_path, monkeypatch, capsys
):
  row = {"sparsity": 0.9, "zeros": 0.9}
  row |= {"validation_rounded": 0.8, "test_rounded": 0.75}
  monkeypatch.setattr(sweep, "run_sweep", lambda *_: [row])
  options = dataclasses.replace(
    equal_sparsity.DEFAULT,
    racers=("SCA", "TWN"),
    rates=(1e-3,),
    data="digits",
    data_dir=config.data_dir,
    sparsities=(0.9,),
    seeds=1,
    root=tmp_path,
  )
  equal_sparsity.main(options)
  assert "| TWN | 75.00 (0.001) |" in capsys.readouterr().out
  files = {path.name for path in (tmp_path / "digits-32-32").iterdir()}
  assert files >= {"Sca-0.001.json", "Twn-0.001.json", "table.md", "table.json"}
  table = json.loads((tmp_path / "digits-32-32" / "table.json").read_text())
  where = {name: table["TWN"]["0.9"][name] for name in ("command", "commit")}
  assert where == log.provenance()
  monkeypatch.delattr(sweep, "run_sweep")
  equal_sparsity.main(options)  # what is done is not done again
  with pytest.raises(errors.UsageError, match="epochs=10 there, 5 now"):
    equal_sparsity.main(dataclasses.replace(options, epochs=5))
