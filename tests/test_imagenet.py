"""ImageNet's experiment from its options, on a few small JPEG images."""

import dataclasses

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from experiments import imagenet
from experiments.common import build, command, errors, evaluate, methods
from experiments.common.runner import checks, float_net, pretrained, run
from tern_jax.checkpoint import CheckpointError
from tests import photos

pytestmark = pytest.mark.usefixtures("standard_promotion_throughout")


@pytest.fixture(scope="module")
def config(tmp_path_factory):
  """The experiment on images of 16x16, with a net that compiles quickly."""
  directory = tmp_path_factory.mktemp("imagenet")
  photos.prepare(directory / "tfds")
  return dataclasses.replace(
    imagenet.DEFAULT,
    method=methods.Twn(sparsity=0.59),
    image_size=16,
    model="mlp",
    hidden=(),
    exclude=(),
    epochs=2,
    float_epochs=20,
    batch_size=12,
    float_learning_rate=0.02,
    float_optimizer="adam",
    parallel="jit",
    log_every=30,
    checkpoint_every=30,
    data_dir=str(directory / "tfds"),
    workdir=str(directory / "run"),
  )


@pytest.fixture(scope="module")
def floats(config, standard_promotion_throughout):
  return float_net.train(config, build.load_dataset(config))


def test_the_recipe():
  steps = checks.count_steps(imagenet.DEFAULT, 1_271_167)
  assert steps == (90 * 4965, 35 * 4965)
  plan = imagenet.DEFAULT.method.plan(steps[1], 9 * 512 * 512)
  ends = [stage.last for stage in plan.stages]
  assert ends == [10 * 4965, 20 * 4965, 35 * 4965]


def kernel_of(variables):
  return variables["params"]["Dense_0"]["kernel"]


@pytest.mark.long
def test_a_run_on_images_that_differ_in_size(config, floats, monkeypatch):
  monkeypatch.setattr(float_net, "train", None)
  # The pictures, and that a fresh process reads the file, are those of every
  # run.
  monkeypatch.setattr(run.pictures, "draw", lambda *_: None)
  monkeypatch.setattr(evaluate, "in_fresh_process", evaluate.evaluate)
  result = run.run(
    dataclasses.replace(config, float_from=str(config.float_directory))
  )
  # The validation split; four of the 40 training images choose.
  assert result["total"] == 12
  assert result["correct"]["packed"] == result["correct"]["rounded"]
  assert result["sparsity"] == pytest.approx(0.59, abs=0.001)
  # Brightness alone tells the four classes.
  assert result["float_accuracy"] > 0.9
  assert result["accuracy"] > 0.7


@pytest.mark.long
@pytest.mark.parametrize("ema", [None, 0.9])
def test_a_float_net_of_an_earlier_run(config, floats, ema):
  like = jax.tree.map(np.zeros_like, floats)
  config = dataclasses.replace(config, ema=ema)
  # Trained before, or now with an average of its own.
  expected = float_net.train(config, build.load_dataset(config))
  assert (ema is None) == np.array_equal(*map(kernel_of, (expected, floats)))
  found = pretrained.load(str(config.float_directory), like)
  jax.tree.map(np.testing.assert_array_equal, found, expected)
  wider = {"params": {"Dense_0": {"kernel": np.zeros((2, 2), np.float32)}}}
  with pytest.raises(CheckpointError, match="Dense_0/kernel"):
    pretrained.load(str(config.float_directory), wider)


def test_weights_from_a_file(tmp_path):
  tensors = {"conv1.weight": np.arange(24, dtype=np.float32)}
  like = {"params": {"stem": {"kernel": np.zeros((3, 2, 2, 2), np.float32)}}}
  shaped = tensors["conv1.weight"].reshape(2, 2, 3, 2)
  save_file({"conv1.weight": shaped}, tmp_path / "net.safetensors")
  loaded = pretrained.load(str(tmp_path / "net.safetensors"), like)
  kernel = loaded["params"]["stem"]["kernel"]
  # Output 1 of input 0 at row 2, column 1.
  assert kernel[2, 1, 0, 1] == shaped[1, 0, 2, 1] == 17


def test_float_nets_that_are_none(config, tmp_path):
  (tmp_path / "other").write_text("not a net")
  for name, message in (
    ("none", "neither a file nor the directory of a float net"),
    ("other", "other is no safetensors file"),
  ):
    wrong = dataclasses.replace(
      config,
      float_from=str(tmp_path / name),
      workdir=str(tmp_path / "run"),
    )
    with pytest.raises(errors.UsageError, match=message):
      run.run(wrong)
  # Nothing is written before.
  assert [path.name for path in tmp_path.iterdir()] == ["other"]


def test_options_that_do_not_fit_the_images(config):
  for changes, message in (
    ({"image_size": None}, "differ in size: give an image_size"),
    ({"augment": "flip_crop"}, "give --augment resized_crop"),
  ):
    with pytest.raises(errors.UsageError, match=message):
      build.load_dataset(dataclasses.replace(config, **changes))


@pytest.mark.sample(2)
def test_a_dry_run(config, floats, monkeypatch, capsys):
  arguments = ["--dry-run", "--workdir", str(config.directory.parent / "dry")]
  monkeypatch.setattr("sys.argv", ["imagenet", *arguments])
  given = dataclasses.replace(config, float_from=str(config.float_directory))
  command.main(given, imagenet.__doc__)
  told = [line.split() for line in capsys.readouterr().out.splitlines()]
  assert ["Dense_0/kernel", "768x4", "3,072", "ternary"] in told
  assert ["steps,", "float", "and", "ternary", "0", "+", "6"] in told
