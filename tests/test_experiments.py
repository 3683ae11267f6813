"""The experiments end to end, on digits: the record, resuming, errors."""

import dataclasses
import json
import re
import shutil
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tern_jax
from experiments.common import cli, command, errors, evaluate, log, methods
from experiments.common.runner import advance, checks, loop, record, run
from tern_jax import load_packed, metrics
from tern_jax.inference import cpu

# What may differ between two runs of the same config; orbax writes down times.
INCIDENTAL = ("seconds", "command", "disk_bytes", "forward")
NETS = {"float", "unrounded", "rounded"}


pytestmark = pytest.mark.usefixtures("standard_promotion_throughout")


@pytest.fixture(scope="module")
def config(tmp_path_factory):
  directory = tmp_path_factory.mktemp("experiments")
  return cli.Config(
    epochs=10,
    batch_size=64,
    hidden=(16,),
    learning_rate=0.02,
    float_learning_rate=0.02,
    parallel="jit",
    log_every=19,
    checkpoint_every=38,
    resident="off",
    data_dir=str(directory / "tfds"),
    workdir=str(directory / "whole"),
  )


@pytest.fixture(scope="module")
def result(config, standard_promotion_throughout):
  return run.run(config)


@pytest.fixture
def brief(result, monkeypatch):
  """Leaves out what the first run has shown: pictures, a fresh process."""
  monkeypatch.setattr(run.pictures, "draw", lambda *_: None)
  monkeypatch.setattr(evaluate, "in_fresh_process", evaluate.evaluate)


def essential(result):
  return {k: v for k, v in result.items() if k not in INCIDENTAL}


def test_the_record_is_consistent(config, result):
  assert json.loads((config.directory / "result.json").read_text()) == result
  correct = result["correct"]
  assert correct["packed"] == correct["rounded"]
  assert result["accuracy"] == correct["packed"] / result["total"]
  assert result["total"] == 360
  assert min(result["accuracy"], result["float_accuracy"]) > 0.8
  for key, nets in (("loss", set(correct)), ("validation_loss", NETS)):
    assert set(result[key]) == nets
    assert all(0 < loss < 1 for loss in result[key].values())
  packed = result["loss"]["packed"]
  assert packed == pytest.approx(result["loss"]["rounded"], rel=1e-6)
  assert result["asked_sparsity"] == 0.7
  assert result["predicted_sparsity"] == pytest.approx(0.7, abs=0.001)
  assert result["sparsity"] == pytest.approx(0.7, abs=0.005)
  assert set(result["layers"]) == {"Dense_0/kernel", "Dense_1/kernel"}
  for layer in result["layers"].values():
    assert layer["reached"] == pytest.approx(0.7, abs=0.005)
  assert 2 < result["bits_per_weight"] < 2.2
  assert 1 < result["entropy_bits_per_weight"] < 1.19
  assert result["packed_bytes"] < result["float_bytes"] / 4
  assert result["packed_bytes"] < result["disk_bytes"]
  assert result["method"].startswith("ParamTransform(method=SCA(sparsity=ramp(")


def test_forward_passes_are_timed(result):
  found = result["forward"]
  assert found["device"] == jax.devices()[0].device_kind
  assert found["native"] == cpu.isa()
  assert list(found["forms"]) == ["float", "packed", "packed_int8"]
  for name, form in found["forms"].items():
    assert [batch["size"] for batch in form["batches"]] == [1, 360]
    for batch in form["batches"]:
      assert 0 < batch["seconds"] < 10
      if name == "float":
        assert batch["bytes"] == result["float_bytes"]
      else:
        assert batch["bytes"] < result["float_bytes"] / 4
    assert abs(form["correct"] - result["correct"]["rounded"]) <= 2
  for name, net in (("float", "rounded"), ("packed", "packed")):
    assert found["forms"][name]["correct"] == result["correct"][net]
    assert found["forms"][name]["loss"] == pytest.approx(
      result["loss"][net], rel=1e-6
    )
  lines = record.text(result).splitlines()
  (at,) = (i for i, line in enumerate(lines) if "forward pass" in line)
  assert "batch 1, ms  batch 360, ms" in lines[at]
  assert [line.split("  ")[0] for line in lines[at + 2 :]] == [
    "float weights", "packed weights", "packed, int8 activations",
  ]  # fmt: skip


def test_records_of_earlier_versions_are_shown(result):
  earlier = {k: v for k, v in result.items() if k != "forward"}
  text = record.text(earlier)
  assert record.text(result).startswith(text)
  assert "forward pass" not in text


def test_what_a_run_leaves(config, result):
  directory = config.directory
  for name in ("curves", "diagnostics", "histograms", "layers"):
    assert (directory / f"{name}.png").stat().st_size > 10_000
  for phase, place in (
    ("float", config.float_directory),
    ("ternary", directory),
  ):
    assert list((place / "tensorboard" / phase).glob("events.*"))
    records = log.read_metrics(place)
    assert {record["phase"] for record in records} == {phase}
    steps = [record["step"] for record in records]
    assert steps == list(range(19, 191, 19))
    # It is the same net, and the same split.
    key = "float" if phase == "float" else "unrounded"
    for name in ("validation_accuracy", "validation_loss"):
      assert records[-1][name] == pytest.approx(result[name][key], rel=1e-6)
  assert log.read_config(directory) == config
  table = record.text(result)
  assert f"{100 * result['accuracy']:.2f}" in table
  assert max(map(len, table.splitlines())) <= 80


def test_weights_are_watched_by_layer(config, result):
  records = log.read_metrics(config.directory)
  names = ("sparsity", "entropy", "barrier", "converged", "zeros_rms")
  for path, layer in result["layers"].items():
    series = {
      name: [record[f"{name}/{path}"] for record in records]
      for name in (*names, "flip_rate")
    }
    assert series["sparsity"][-1] == layer["reached"]
    assert all(0 <= share < 1 for share in series["flip_rate"])
    assert series["flip_rate"][0] > series["flip_rate"][-1]
    # The late WDR, from the seventh record on, brings weights to their codes;
    # in the last layer, at this rate, tanh has no slope left.
    if path != "Dense_1/kernel":
      assert series["converged"][-1] >= series["converged"][6]
      assert series["converged"][-1] > min(series["converged"][1:])
    for rms, top in zip(series["zeros_rms"], series["barrier"], strict=True):
      assert 0 < rms < top < 1
    latents = log.load_latents(config.directory, records[-1]["step"])[path]
    least = np.quantile(np.abs(np.tanh(latents)), layer["reached"] - 0.01)
    assert series["barrier"][-1] > least
  late, last = (
    sum(records[i][f"flip_rate/{path}"] for path in result["layers"])
    for i in (6, -1)
  )
  assert last < late
  assert all(
    "/" not in name
    for record in log.read_metrics(config.float_directory)
    for name in record
  )


def test_lines_tell_rates_strengths_and_norms(config, result):
  steps = np.arange(19, 191, 19)
  # The rate of the last update, and kappa: from .1 at .7 to 30 at .95.
  done = (steps - 1) / 190
  cosine = 0.05 + 0.95 * 0.5 * (1 + np.cos(np.pi * done))
  kappa = 0.1 * 300 ** np.clip((done - 0.7) / 0.25, 0, 1) * (done >= 0.7)
  lines = log.read_metrics(config.directory)
  series = {
    name: np.array([line[name] for line in lines])
    for name in ("learning_rate", "wdr_strength", "gradient_norm")
  }
  np.testing.assert_allclose(series["learning_rate"], 0.02 * cosine, rtol=1e-5)
  share = series["wdr_strength"][-1] / kappa[-1]
  assert 0 < share <= 1
  np.testing.assert_allclose(series["wdr_strength"], share * kappa, rtol=1e-5)
  assert (series["gradient_norm"] > 0).all()
  floats = log.read_metrics(config.float_directory)
  rates = [line["learning_rate"] for line in floats]
  np.testing.assert_allclose(rates, 0.02 * cosine, rtol=1e-5)
  assert all("wdr_strength" not in line for line in floats)


@pytest.mark.usefixtures("brief")
def test_a_run_says_what_it_does(config, result, tmp_path, capsys, monkeypatch):
  monkeypatch.setattr(
    evaluate,
    "in_fresh_process",
    lambda run: evaluate.evaluate(run) | {"forward": result["forward"]},
  )
  again = dataclasses.replace(config, workdir=str(tmp_path / "again"))
  shutil.copytree(config.directory, again.directory)
  shutil.copytree(config.float_directory, again.float_directory)
  (again.directory / "result.json").write_text("")  # A power cut.
  # Apart from the time, it is the same run.
  assert essential(run.run(again)) == essential(result)
  said = capsys.readouterr().out.splitlines()
  assert said == [
    "Sca on digits, mlp: 190 float and 190 ternary steps on 1 x cpu, in"
    f" {again.directory}",
    f"float net: all of its 190 steps are done, in {again.float_directory}",
    f"ternary net: all of its 190 steps are done, in {again.directory}",
    "packing, and evaluating on validation and test data",
    "drawing",
  ]


def test_a_finished_run_is_not_repeated(config, result, monkeypatch):
  monkeypatch.setattr(loop, "train", None)
  assert run.run(config) == result


@pytest.mark.long
def test_a_run_that_was_stopped_resumes_bit_for_bit(
  config, result, tmp_path, monkeypatch
):
  again = dataclasses.replace(config, workdir=str(tmp_path / "stopped"))
  write, make_step = log.Log.write, advance.make_step
  # One line later than a checkpoint, so that steps are to be repeated; and
  # between two lines, when the machine is taken away.
  kills = {("float", 57), ("ternary", 57)}
  last = result["steps"]
  signals = {("float", 70), ("float", last), ("ternary", 45), ("ternary", 100)}

  def killed(self, step, metrics):
    write(self, step, metrics)
    if (self.phase, step) in kills:
      kills.remove((self.phase, step))
      raise KeyboardInterrupt

  def preempted(config, stage, classes):
    step = make_step(config, stage, classes)

    def wrapped(state, batch):
      now = ("ternary" if stage.tern else "float"), int(state.step) + 1
      if now in signals:
        signals.remove(now)
        signal.raise_signal(signal.SIGTERM)
      return step(state, batch)

    return wrapped

  monkeypatch.setattr(log.Log, "write", killed)
  monkeypatch.setattr(advance, "make_step", preempted)
  for phase, step in (
    ("float", 57),
    ("float", 70),
    ("float", last),
    ("ternary", 45),
    ("ternary", 57),
    ("ternary", 100),
  ):
    directory = again.float_directory if phase == "float" else again.directory
    if step == 57:
      with pytest.raises(KeyboardInterrupt):
        run.run(again)
      continue
    told = "between two phases" if step == last else f"after step {step} of"
    with pytest.raises(errors.InterruptedRunError, match=told):
      run.run(again)
    kept = directory / "checkpoints" / phase
    assert step in [int(x.name) for x in kept.iterdir() if x.name.isdigit()]
  assert not kills | signals
  assert essential(run.run(again)) == essential(result)
  for place in ("directory", "float_directory"):
    assert log.read_metrics(getattr(again, place)) == log.read_metrics(
      getattr(config, place)
    )


def test_a_preempted_process_ends_cleanly(config, monkeypatch, capsys):
  def preempted(_):
    raise errors.InterruptedRunError("SIGTERM: stopped after step 3 of 9")

  before = signal.getsignal(signal.SIGTERM)
  monkeypatch.setattr("sys.argv", ["digits"])
  monkeypatch.setattr(run, "run", preempted)
  with pytest.raises(SystemExit) as stopped:
    command.main(config, "Digits")
  assert stopped.value.code == 143
  assert capsys.readouterr().err.startswith("SIGTERM: stopped after step 3")
  assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.long
def test_numbers_that_are_not_finite_stop_a_run(config, result, tmp_path):
  wild = dataclasses.replace(
    config,
    epochs=2,
    float_epochs=10,
    scale_learning_rate=3e38,
    workdir=str(config.directory.parent / "wild"),
  )
  for _ in range(2):
    with pytest.raises(errors.DivergedError) as stopped:
      run.run(wild)
    told = str(stopped.value)
    assert re.match(r"Step \d+ is the first that is not finite: its loss", told)
    assert "params/scales/Dense_0/kernel/a" in told
    # Nothing after the start was fit to be kept.
    kept = wild.directory / "checkpoints" / "ternary"
    assert f"The last good checkpoint is {kept / '0'}." in told
    assert [x.name for x in kept.iterdir() if x.name.isdigit()] == ["0"]
  assert not (wild.directory / "result.json").exists()


@pytest.mark.long
@pytest.mark.usefixtures("brief")
def test_runs_share_a_float_net(config, result):
  ec2t = dataclasses.replace(
    config,
    method=methods.Ec2t(gamma=0.5),
    epochs=3,
    float_epochs=10,
    workdir=str(config.directory.parent / "ec2t"),
  )
  assert ec2t.float_directory == config.float_directory
  measured = run.run(ec2t)
  assert measured["float_accuracy"] == result["float_accuracy"]
  records = log.read_metrics(ec2t.directory)
  assert [r["step"] for r in records] == [19, 38, 57]
  assert records[0]["validation_accuracy"] > 0.6
  # The last third keeps the codes of the best state before.
  best = max(records[:2], key=lambda r: r["validation_accuracy"])
  assert records[2]["sparsity"] == best["sparsity"]
  for path in measured["layers"]:
    # Flips of the last stage are counted from the state that it starts with.
    assert [r[f"flip_rate/{path}"] > 0 for r in records] == [True, True, False]
  assert "frozen=True" in measured["method"]


@pytest.mark.long
@pytest.mark.usefixtures("brief")
@pytest.mark.parametrize(
  "parallel", [pytest.param("pmap", marks=pytest.mark.long), "shard_map"]
)
def test_two_devices_share_a_batch(config, tmp_path, parallel):
  again = dataclasses.replace(
    config,
    parallel=parallel,
    devices=2,
    hidden=(),
    epochs=1,
    method=methods.Twn(),
    workdir=str(tmp_path / "run"),
  )
  measured = run.run(again)
  assert measured["devices"].startswith("2 x")
  assert measured["asked_sparsity"] is None
  assert measured["predicted_sparsity"] is None
  assert 0.3 < measured["sparsity"] < 0.6
  assert "-" in record.text(measured)


def test_a_dry_run_tells_what_a_run_would_be(tmp_path, monkeypatch, capsys):
  place = tmp_path / "run"
  monkeypatch.chdir(tmp_path)
  arguments = ["--dry-run", "--parallel", "jit", "--workdir", str(place)]
  arguments += ["--data-dir", str(tmp_path / "tfds")]
  monkeypatch.setattr("sys.argv", ["digits", *arguments])
  command.main(cli.Config(hidden=(16,), batch_size=64, epochs=2), "Digits")
  told = [line.split() for line in capsys.readouterr().out.splitlines()]
  assert ["Dense_0/kernel", "64x16", "1,024", "ternary"] in told
  assert ["BatchNorm_0/scale", "16", "16", "float"] in told
  makes = "kernels() makes 2 leaves ternary, 1,184 of 1,226 weights:"
  assert makes.split() in told
  assert ["Dense_0/kernel", "[64,", "16]"] in told
  assert ["ternary", "in", "all", "1,184", "ternary"] in told
  assert ["steps,", "float", "and", "ternary", "38", "+", "38"] in told
  assert ["training", "data", "0.1", "MiB", "a", "device"] in told
  assert any(line[:3] == ["steps", "a", "second"] for line in told)
  assert not list(tmp_path.iterdir())


def test_other_options_do_not_overwrite_a_run(config, result):
  other = dataclasses.replace(config, seed=1)
  with pytest.raises(errors.UsageError, match="seed=0 there, 1 now"):
    run.run(other)
  assert log.read_config(config.directory) == config


def test_a_directory_of_something_else_is_left_alone(config, result, tmp_path):
  (tmp_path / "thesis.txt").write_text("mine")
  taken = dataclasses.replace(config, workdir=str(tmp_path))
  with pytest.raises(errors.UsageError, match="is not empty and holds no run"):
    run.run(taken)
  assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_data_set_that_is_not_prepared(tmp_path, monkeypatch, capsys):
  arguments = ["--data-dir", str(tmp_path), "--workdir", str(tmp_path / "run")]
  monkeypatch.setattr("sys.argv", ["mnist", *arguments])
  with pytest.raises(SystemExit) as stopped:
    command.main(cli.Config(data="mnist", model="lenet5"), "MNIST")
  assert stopped.value.code == 2
  told = capsys.readouterr().err
  assert told.startswith("error: Data set 'mnist' is not prepared")
  assert not (tmp_path / "run").exists()


def test_a_packed_file_that_answers_otherwise_is_an_error(
  config, result, tmp_path, monkeypatch
):
  again = dataclasses.replace(config, workdir=str(tmp_path / "run"))
  shutil.copytree(config.directory, again.directory)
  (again.directory / "result.json").unlink()
  monkeypatch.setattr(evaluate, "in_fresh_process", lambda _: {"correct": -1})
  with pytest.raises(RuntimeError, match="gives -1 right answers"):
    run.run(again)
  assert not (again.directory / "result.json").exists()


@pytest.mark.parametrize(("correct", "fits"), [(349, True), (348, False)])
def test_products_by_packed_weights_answer_alike(
  config, monkeypatch, correct, fits
):
  packed = {"correct": correct, "loss": 0.2}
  found = {"correct": 350, "forward": {"forms": {"packed": packed}}}
  monkeypatch.setattr(evaluate, "in_fresh_process", lambda _: found)
  rounded = evaluate.Score(350, 360, 0.1)
  if fits:
    score, forward = record._score_of_file(config, rounded)
    assert (score, forward) == ((349, 360, 0.2), found["forward"])
  else:
    with pytest.raises(RuntimeError, match=r"give 348 right answers, .* 350"):
      record._score_of_file(config, rounded)


@pytest.mark.long
@pytest.mark.usefixtures("brief")
def test_averaged_weights_of_a_run_with_all_options(config, tmp_path):
  own = dataclasses.replace(
    config,
    epochs=3,
    ema=0.9,
    label_smoothing=0.1,
    compute="bfloat16",
    micro_batches=2,
    schedule="step",
    parallel="pmap",
    devices=2,
    workdir=str(tmp_path / "run"),
  )
  result = run.run(own)
  assert result["sparsity"] == pytest.approx(0.7, abs=0.001)
  assert min(result["accuracy"], result["float_accuracy"]) > 0.5
  # What is packed is the average, whose latents are kept, in float32.
  saved = load_packed(own.directory / "packed")["params"]
  with np.load(own.directory / "latents" / "57.npz") as latents:
    for path, leaf in metrics.ternary_leaves(saved).items():
      theta, codes = latents[path], np.asarray(leaf.codes)
      assert theta.dtype == leaf.w_p.dtype == np.float32
      np.testing.assert_array_equal(codes, np.sign(theta) * (codes != 0))
      size = np.abs(theta)
      assert size[codes != 0].min() > size[codes == 0].max()


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"epochs": 0}, "epochs=0, but it must be at least 1"),
    ({"checkpoint_every": 0}, "checkpoint_every=0, but it must be at least"),
    ({"parallel": "pmap", "devices": 99}, "can use 1 to"),
    ({"parallel": "pmap", "devices": 3}, "cannot be shared by 3 devices"),
    ({"micro_batches": 5}, "in 5 micro-batches each"),
  ],
)
def test_options_that_do_not_fit(changes, message):
  with pytest.raises(errors.UsageError, match=message):
    checks.device_count(dataclasses.replace(cli.Config(), **changes))


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"batch_size": 5000}, "exceeds the 1257 training images"),
    ({"exclude": ("head",)}, "'head' matches no leaf"),
    ({"method": methods.Sca(sparsity=1.5)}, "sparsity must lie in"),
    ({"method": methods.Sca(sparsity=0.5, alpha=0.1)}, "give exactly one"),
    ({"method": methods.Tga(published=True)}, "give surrogate None with it"),
  ],
)
def test_what_does_not_fit_writes_nothing(config, tmp_path, changes, message):
  changes = {"workdir": str(tmp_path / "run"), **changes}
  with pytest.raises(errors.UsageError, match=message):
    run.run(dataclasses.replace(config, **changes))
  assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
  ("arguments", "method", "directory"),
  [
    ([], methods.Sca(), "digits-mlp-sca-sparsity0.7-seed0"),
    (["method:twn", "--seed", "3"], methods.Twn(), "digits-mlp-twn-seed3"),
    (
      ["method:sca", "--method.sparsity", "0.9"],
      methods.Sca(sparsity=0.9),
      "digits-mlp-sca-sparsity0.9-seed0",
    ),
    (
      ["method:sca", "--method.alpha", "0.1"],
      methods.Sca(alpha=0.1),
      "digits-mlp-sca-alpha0.1-seed0",
    ),
    (
      ["method:sca", "--method.kappa", "1"],
      methods.Sca(kappa=1),
      "digits-mlp-sca-kappa1-sparsity0.7-seed0",
    ),
    (
      ["method:sca", "--method.bytes", "134411"],
      methods.Sca(bytes=134411),
      "digits-mlp-sca-bytes134411-seed0",
    ),
    (
      ["method:tga", "--method.surrogate", "None", "--method.frozen"],
      methods.Tga(surrogate=None, frozen=True),
      "digits-mlp-tga-no_surrogate-frozen-seed0",
    ),
    (
      ["method:tga", "--method.surrogate", "None", "--method.published"],
      methods.Tga(surrogate=None, published=True),
      "digits-mlp-tga-no_surrogate-published-seed0",
    ),
  ],
)
def test_the_command_line(arguments, method, directory, monkeypatch):
  monkeypatch.setattr("sys.argv", ["digits", *arguments])
  config = cli.parse(cli.Config(), "Digits")
  assert config.method == method
  assert config.directory.name == directory


@pytest.mark.long
@pytest.mark.usefixtures("brief")
def test_an_asked_size_is_met(config, tmp_path):
  asked = dataclasses.replace(
    config,
    epochs=2,
    method=methods.Sca(bytes=480),
    workdir=str(tmp_path / "budget"),
  )
  sized = run.run(asked)
  assert 0.98 * 480 < sized["entropy_bytes"] <= 480
  assert sized["asked_sparsity"] is None
  layers = sized["layers"].values()
  assert len({layer["asked"] for layer in layers}) == 2
  for layer in layers:
    assert layer["reached"] == pytest.approx(layer["asked"], abs=0.005)
  assert "bytes480" in dataclasses.replace(asked, workdir=None).directory.name


@pytest.mark.parametrize(
  ("method", "message"),
  [
    (methods.Twn(bytes=300), "300 bytes are too few"),
    (methods.Sca(bytes=480, sparsity=0.7), "give one of them"),
    (methods.Sca(bytes=480, across_layers=True), "neither alpha nor bytes"),
    (methods.Twn(across_layers=True), "no sparsity that all layers could"),
  ],
)
def test_a_size_that_does_not_fit(config, result, tmp_path, method, message):
  asked = dataclasses.replace(
    config, method=method, workdir=str(tmp_path / "budget")
  )
  with pytest.raises(errors.UsageError, match=message):
    run.run(asked)
  assert not list(tmp_path.iterdir())


@pytest.mark.long
@pytest.mark.parametrize("name", methods.METHODS)
def test_every_method_has_a_recipe_and_a_picture(name):
  config = methods.METHODS[name]()
  plan = config.plan(100, largest=512)
  w = jax.random.normal(jax.random.key(0), (32, 16))
  theta = plan.stages[0].method.latent(w)
  shown = config.shown("w", theta)
  assert shown.shape == theta.shape
  # Latents and the codes that they are drawn against have one unit.
  assert 0.1 < float(abs(shown).mean()) < 2

  @jax.jit
  def diagnose(theta):
    method = plan.stages[0].method
    codes = method.discretize(theta, *method.init(theta))
    return metrics.diagnose({"w": config.shown("w", theta)}, {"w": codes})["w"]

  measured = diagnose(theta)
  assert 0 <= measured["zeros_rms"] <= measured["barrier"] < 2
  assert 0 <= measured["converged"] <= 1
  assert 0 <= plan.onset <= 100
  assert plan.stages[-1].last == 100


@pytest.mark.parametrize("name", ["Twn", "Ttq", "Ec2t", "Tga"])
def test_an_asked_sparsity_is_reached_before_the_best_state_is_sought(name):
  config = methods.METHODS[name](sparsity=0.9)
  assert config.asked == 0.9
  stages = config.plan(90, largest=512).stages
  assert [stage.last for stage in stages] == (
    [30, 60, 90] if name == "Ec2t" else [90]
  )
  first = 0
  for stage in stages:
    shares = [stage.method.sparsity(n) for n in (first, stage.last)]
    assert shares[1] == pytest.approx(0.9)
    assert not stage.keep_best or shares[0] == pytest.approx(0.9)
    first = stage.last


@pytest.mark.long
@pytest.mark.parametrize("name", ["Sca", "Twn", "Ttq", "Ec2t", "Tga"])
def test_a_sparsity_of_all_layers_together(name):
  config = methods.METHODS[name](sparsity=0.9, across_layers=True)
  target = tern_jax.ramp(tern_jax.across_layers(0.9), 50, until=0.25)
  assert config.target(50) == target
  method = config.plan(50, largest=512).stages[-1].method
  assert isinstance(method.sparsity, type(target))
  assert config.asked == 0.9
  # What one layer gets depends on the others.
  theta = jnp.linspace(-0.1, 0.1, 64).reshape(8, 8)
  assert config.asked_of("w") is config.predict("w", theta) is None
  assert config.shown("w", theta).shape == (8, 8)


def test_the_paper_face_predicts_by_its_alpha():
  theta = 0.2 * jax.random.normal(jax.random.key(0), (100, 100))
  assert methods.Sca(alpha=0.1).predict("w", theta) == pytest.approx(
    0.744, abs=0.02
  )
  assert methods.Sca(sparsity=0.9).predict("w", theta) == pytest.approx(
    0.9, abs=1e-3
  )
