"""The benchmark of the recipe as it comes."""

import dataclasses
import json

import jax
import numpy as np
import optax
import pytest

import tern_jax
from experiments.benchmarks import defaults
from experiments.common import build, data, errors, sweep

pytestmark = pytest.mark.usefixtures("standard_promotion_throughout")


@pytest.fixture(scope="module")
def options(tmp_path_factory):
  folder = tmp_path_factory.mktemp("defaults")
  data.load_dataset("digits", folder / "tfds")  # prepares it, and says so
  return defaults.DefaultsOptions(
    nets=("digits",),
    sparsities=(0.5, 0.9),
    seeds=2,
    length=10 / (60 * 19),
    data_dir=str(folder / "tfds"),
    root=folder / "runs",
  )


def test_a_table_shows_defaults_and_chosen_rates(options, monkeypatch, capsys):
  def runner_of(runs, _):
    def run(rate=None):
      # The best rate is another one at each sparsity.
      best = {0.5: 3e-3, 0.9: 1e-2}
      score = {s: 0.9 if rate == best[s] else 0.8 for s in runs.values}
      return [
        {
          "sparsity": s,
          "zeros": s,
          "validation_rounded": score[s],
          "test_rounded": 0.85 if rate is None else score[s],
        }
        for s, _ in runs.grid
      ]

    return run

  monkeypatch.setattr(sweep, "runner_of", runner_of)
  defaults.main(options)
  out = capsys.readouterr().out
  name = "digits-batch-x0.00877193-scratch"
  others = "straight-through, best", "pruned float", "pruned float, dense"
  assert out.splitlines()[1:] == [
    name,
    "",
    "| test %, zeros: | 0.5 | 0.9 |",
    "| --- | --- | --- |",
    "| SCA | 85.00 ± 0.00 | 85.00 ± 0.00 |",
    "| straight-through, 0.001 | 80.00 ± 0.00 (0.001) | 80.00 ± 0.00 (0.001) |",
    *(
      f"| {label} | 90.00 ± 0.00 (0.003) | 90.00 ± 0.00 (0.01) |"
      for label in others
    ),
    "| SCA - straight-through, 0.001 | +5.00 | +5.00 |",
    *(f"| SCA - {label} | -5.00 | -5.00 |" for label in others),
  ]
  # What is done is not done again.
  monkeypatch.setattr(sweep, "runner_of", lambda *_: pytest.fail)
  defaults.main(options)
  assert capsys.readouterr().out == out
  with pytest.raises(errors.UsageError, match="seeds=2 there, 3 now"):
    defaults.main(dataclasses.replace(options, seeds=3))


def test_data_that_are_not_prepared_are_left_out(options, capsys):
  defaults.main(dataclasses.replace(options, nets=("fashion_mnist",)))
  captured = capsys.readouterr()
  assert not captured.out
  assert captured.err.startswith(
    "fashion_mnist is left out: Data set 'fashion_mnist' is not prepared in"
  )
  assert captured.err.count("\n") == 1


@pytest.mark.long
@pytest.mark.parametrize(
  ("norm", "start"), [("batch", "scratch"), ("layer", "float")]
)
def test_ten_steps_of_all_methods(options, tmp_path, norm, start):
  own = dataclasses.replace(options, norm=norm, start=start, root=tmp_path)
  defaults.main(own)
  (place,) = tmp_path.iterdir()
  table = json.loads((place / "table.json").read_text())
  assert len(table) == 5
  for row in table.values():
    for sparsity, cell in row.items():
      assert len(cell["test"]) == 2
      np.testing.assert_allclose(cell["zeros"], float(sparsity), atol=1e-3)


@pytest.mark.long
@pytest.mark.parametrize("label", ["SCA", "pruned float"])
def test_a_run_is_that_of_a_users_script(options, label):
  """Step by step in Python, on the same batches: the same net."""
  # So few that no rounding of sums has flipped many codes yet.
  steps, rate = 12, None if label == "SCA" else 1e-2
  own = dataclasses.replace(
    options, length=steps / (60 * 19), sparsities=(0.5,), seeds=1, norm="none"
  )
  dataset = defaults.loaded(defaults.SETTINGS["digits"], own.data_dir)
  runs = own.sweep("digits", label)
  (row,) = sweep.runner_of(runs, dataset)(rate)

  config = runs.config(0.5, 0)
  params, _ = build.initial_variables(config, dataset)
  model = build.make_model(config, 10)
  racer, where = defaults.RACERS[label], tern_jax.kernels()
  tx = defaults.optimizer_of(racer, 0.5, steps, where, rate)
  key = jax.random.fold_in(jax.random.key(0), 1)
  rows = [
    np.asarray(jax.random.permutation(k, 1257))[: 19 * 64].reshape(19, 64)
    for k in jax.random.split(key, 1)
  ]

  @jax.jit
  def step(params, opt_state, image, label):
    def loss(params):
      logits = model.apply({"params": params}, image, train=True)
      losses = optax.softmax_cross_entropy_with_integer_labels(logits, label)
      return losses.mean()

    updates, opt_state = tx.update(jax.grad(loss)(params), opt_state, params)
    return optax.apply_updates(params, updates), opt_state

  opt_state = tx.init(params)
  for some in np.concatenate(rows)[:steps]:
    image = data.standardize(
      dataset.train["input"][some], dataset.mean, dataset.std
    )
    label = dataset.train["label"][some]
    params, opt_state = step(params, opt_state, image, label)
  image = data.standardize(dataset.test["input"], dataset.mean, dataset.std)
  found = sweep.dense(tx.tern.finalize(opt_state))
  logits = model.apply({"params": found}, image, train=False)
  right = float(np.mean(np.argmax(logits, -1) == dataset.test["label"]))
  assert row["zeros"] == pytest.approx(0.5, abs=1e-3)
  assert row["test_rounded"] == pytest.approx(right, abs=2.5 / 360)
  assert right > 0.2  # chance is 0.1


def test_pixels_are_averaged(options):
  digits = data.load_dataset("digits", options.data_dir)
  found = defaults.averaged(digits, 4)
  assert found.input_shape == (2, 2, 1)
  for name in ("train", "validation", "test"):
    images = getattr(digits, name)["input"]
    mean = [
      [images[:, i : i + 4, j : j + 4].mean((1, 2)) for j in (0, 4)]
      for i in (0, 4)
    ]
    expected = np.moveaxis(np.array(mean), 2, 0)
    split = getattr(found, name)
    np.testing.assert_allclose(split["input"], expected, atol=0.5)
    np.testing.assert_array_equal(
      split["label"], getattr(digits, name)["label"]
    )
  images = found.train["input"]
  np.testing.assert_allclose(found.mean, images.mean(), rtol=1e-6)
  np.testing.assert_allclose(found.std, images.std(), rtol=1e-5)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"nets": ("mnist8",)}, "nets={'mnist8'}, but there are 'digits', 'mnist'"),
    ({"racers": ("TWN",)}, "racers={'TWN'}, but there are 'SCA'"),
    ({"length": 0.0}, "length=0.0, but it must be above 0"),
    ({"start": "float", "float_share": 1.0}, r"float_share=1.0, but it must"),
    ({"sparsities": (1.0,)}, "sparsity must lie in"),
  ],
)
def test_options_that_do_not_fit(changes, message):
  with pytest.raises(errors.UsageError, match=message):
    defaults.DefaultsOptions(**changes).sweep("digits", "SCA")
