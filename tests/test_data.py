import importlib.util
import json
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest.mock import MagicMock

import grain
import numpy as np
import pytest
import tyro
from sklearn.datasets import load_digits

from experiments import prepare
from experiments.common import data
from experiments.common.data import augment, prepared
from experiments.common.data.augment import flip_and_crop, random_resized_crop
from tests import photos

SIZES = {"train": 1257, "validation": 180, "test": 360}
MEAN, STD = np.float32([5, 6, 7]), np.float32([1, 2, 4])


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
  """A data directory in which only the digits are prepared."""
  path = tmp_path_factory.mktemp("data")
  data.load("digits", "train", path)
  return path


@pytest.fixture(scope="module")
def digits(data_dir):
  return data.load_dataset("digits", data_dir)


def numbered(count):
  """A split of gray images whose pixels and label are their row number."""
  rows = np.arange(count, dtype=np.int32)
  image = np.tile(rows.astype(np.uint8)[:, None, None, None], (1, 6, 5, 3))
  return {"input": image, "label": rows}


def start(split, batch_size, **kwargs):
  kwargs = {"seed": 0, "mean": MEAN, "std": STD} | kwargs
  return data.batches(split, batch_size, **kwargs)


def take(iterator, count):
  return [next(iterator) for _ in range(count)]


def assert_equal(left, right):
  assert len(left) == len(right)
  for a, b in zip(left, right, strict=True):
    assert a.keys() == b.keys()
    for key in a:
      np.testing.assert_array_equal(a[key], b[key])
      assert a[key].dtype == b[key].dtype


def joined(dataset):
  """The examples of the train and the validation split."""
  first, last = dataset.train, dataset.validation
  return {key: np.concatenate([first[key], last[key]]) for key in first}


def as_set(split):
  """Pixels and label of each example; all 1,797 digits differ."""
  return {
    image.tobytes() + bytes([label])
    for image, label in zip(split["input"], split["label"], strict=True)
  }


# The digits and their splits.


def test_digits_are_those_of_scikit_learn_each_in_one_split(digits):
  images, labels = load_digits(return_X_y=True)
  images = images.astype(np.uint8).reshape(-1, 8, 8, 1)
  splits = [as_set(getattr(digits, split)) for split in SIZES]
  assert [len(split) for split in splits] == list(SIZES.values())
  assert set.union(*splits) == as_set({"input": images, "label": labels})
  assert sum(map(len, splits)) == len(set.union(*splits)) == 1797


def test_dataset_says_what_it_holds(digits):
  assert digits.name == "digits"
  assert digits.input_shape == (8, 8, 1)
  assert digits.num_classes == 10
  for split, size in SIZES.items():
    image, label = getattr(digits, split).values()
    assert (image.shape, image.dtype) == ((size, 8, 8, 1), np.uint8)
    assert (label.shape, label.dtype) == ((size,), np.int32)
    assert image.max() == 16
    # Stratified: every digit is a tenth, to within 1 %.
    assert np.ptp(np.bincount(label) / size) < 0.02
  assert repr(digits).startswith("Dataset(name='digits', input_shape=(8, 8, 1)")
  assert "train" not in repr(digits)


def test_splits_stay_the_same_across_versions(digits):
  # A changed split would make results incomparable without anyone noticing.
  assert digits.train["label"][:8].tolist() == [4, 7, 6, 0, 8, 0, 6, 8]
  assert digits.test["label"][:8].tolist() == [1, 4, 2, 3, 2, 9, 6, 4]


def test_train_and_validation_join(digits, data_dir):
  both = joined(digits)
  assert_equal(
    [both], [data.arrays(data.load("digits", "train+validation", data_dir))]
  )
  assert as_set(both) == as_set(digits.train) | as_set(digits.validation)


def test_load_gives_random_access(data_dir, digits):
  source = data.load("digits", "test", data_dir)
  assert len(source) == 360
  np.testing.assert_array_equal(source[7]["image"], digits.test["input"][7])
  assert source[7]["label"] == digits.test["label"][7]


def test_preparing_happens_once(data_dir):
  files = sorted((data_dir / "digits").rglob("*"))
  times = [path.stat().st_mtime_ns for path in files]
  data.load("digits", "test", data_dir)
  assert sorted((data_dir / "digits").rglob("*")) == files
  assert [path.stat().st_mtime_ns for path in files] == times


def test_many_may_prepare_at_once(tmp_path):
  with ThreadPoolExecutor(4) as executor:
    barrier = threading.Barrier(4)

    def prepare_together(_):
      barrier.wait(timeout=20)
      return len(data.load("digits", "test", tmp_path))

    assert list(executor.map(prepare_together, range(4))) == [360] * 4
  assert [path.name for path in (tmp_path / "digits").iterdir()] == ["1.0.0"]


def test_the_loser_of_a_race_reads_the_files_of_the_winner(
  tmp_path, monkeypatch
):
  prepare_digits = data.Digits.download_and_prepare

  def lose(builder):
    prepare_digits(builder)
    raise OSError("Directory not empty")

  monkeypatch.setattr(data.Digits, "download_and_prepare", lose)
  assert len(data.load("digits", "test", tmp_path)) == 360


def test_data_dir_comes_from_the_environment(data_dir, monkeypatch):
  monkeypatch.setenv("TFDS_DATA_DIR", str(data_dir))
  assert len(data.load("digits", "validation")) == 180
  monkeypatch.delenv("TFDS_DATA_DIR")
  monkeypatch.setenv("HOME", "/home/someone")
  assert str(data.resolve_data_dir()) == "/home/someone/tensorflow_datasets"


@pytest.mark.long
def test_nothing_needs_tensorflow_or_a_network(tmp_path):
  program = f"""
import os, sys

def forbid(event, args):
  # An exception might be caught on the way up.
  if event in ("socket.connect", "socket.getaddrinfo"):
    os._exit(3)

sys.addaudithook(forbid)
from experiments.common import data
print(data.load_dataset("digits", {str(tmp_path)!r}).num_classes)
assert "tensorflow" not in sys.modules
"""
  done = subprocess.run(
    [sys.executable, "-W", "error", "-c", program],
    capture_output=True,
    text=True,
    timeout=60,
  )
  assert done.returncode == 0, done.stderr
  assert done.stdout.splitlines()[-1] == "10"


# Data sets made by editing the files of the digits.


def rewritten(data_dir, tmp_path, edit):
  """Copies the prepared digits with another dataset_info.json."""
  old, new = data_dir / "digits/1.0.0", tmp_path / "digits/1.0.0"
  new.mkdir(parents=True)
  info = json.loads((old / "dataset_info.json").read_text())
  edit(info)
  for path in old.iterdir():
    (new / path.name).write_bytes(path.read_bytes())
  (new / "dataset_info.json").write_text(json.dumps(info))
  return tmp_path


def test_validation_is_carved_off_train_where_there_is_none(
  data_dir, digits, tmp_path
):
  def drop_validation(info):
    info["splits"] = [
      split for split in info["splits"] if split["name"] != "validation"
    ]

  path = rewritten(data_dir, tmp_path, drop_validation)
  carved = data.load_dataset("digits", path)
  assert len(carved.train["label"]) == 1131
  assert len(carved.validation["label"]) == 126
  assert_equal([joined(carved)], [digits.train])
  assert_equal([carved.test], [digits.test])
  whole = data.load("digits", "train+validation", path)
  assert_equal([data.arrays(whole)], [digits.train])


def test_tfrecord_is_refused(data_dir, tmp_path):
  path = rewritten(
    data_dir, tmp_path, lambda info: info.update(fileFormat="tfrecord")
  )
  with pytest.raises(data.DataNotPreparedError) as error:
    data.load("digits", "train", path)
  assert f"{path}/digits/1.0.0 is stored as tfrecord" in str(error.value)
  assert "array_record is needed" in str(error.value)
  assert "Remove that directory" in str(error.value)


def test_the_newest_whole_version_is_read(data_dir, tmp_path):
  rewritten(data_dir, tmp_path, lambda info: None)
  root = tmp_path / "digits"
  (root / "1.0.0").rename(root / "10.0.0")
  # Neither an older version nor one still being written may be opened.
  for name in ("9.0.0", "incomplete.ABCDEF_11.0.0"):
    (root / name).mkdir()
    (root / name / "features.json").write_text("not JSON")
  assert len(data.load("digits", "test", tmp_path)) == 360


@pytest.mark.parametrize("name", ["mnist", "no_such_set", ""])
def test_unprepared_sets_say_how_to_prepare_them(name, data_dir):
  with pytest.raises(FileNotFoundError) as error:
    data.load_dataset(name, data_dir)
  assert isinstance(error.value, data.DataNotPreparedError)
  assert str(error.value) == (
    f"Data set {name!r} is not prepared in {data_dir}, which holds digits. "
    'Prepare it with\n  pip install "tern_jax[prepare]" && '
    f"python -m experiments.prepare {name} --data-dir {data_dir}\n"
    "or point TFDS_DATA_DIR or data_dir at the directory that has it."
  )


def test_missing_directories_are_named(tmp_path):
  with pytest.raises(
    data.DataNotPreparedError, match=r"not prepared in .*/none, .* no data sets"
  ):
    data.load("mnist", "train", tmp_path / "none")
  assert not (tmp_path / "none").exists()


def test_unwritable_directories_are_named(tmp_path):
  blocker = tmp_path / "file"
  blocker.touch()
  with pytest.raises(
    data.DataNotPreparedError, match=r"cannot be written to .*/file .*writable"
  ):
    data.load("digits", "train", blocker)


def test_unknown_splits_are_refused(data_dir):
  with pytest.raises(ValueError, match="Unknown split 'dev': give one of"):
    data.load("digits", "dev", data_dir)


# Statistics and standardization.


@pytest.mark.parametrize("channels", [1, 3])
def test_standardized_train_images_have_mean_0_and_variance_1(channels):
  images = np.random.default_rng(0).integers(
    0, 256, (50, 7, 5, channels), np.uint8
  )
  images[..., -1] //= 3
  mean, std = data.channel_statistics(images)
  axes = (0, 1, 2)
  np.testing.assert_allclose(mean, images.mean(axes), rtol=1e-6)
  np.testing.assert_allclose(std, images.std(axes), rtol=1e-6)
  result = data.standardize(images, mean, std)
  assert result.dtype == mean.dtype == std.dtype == np.float32
  np.testing.assert_allclose(result, (images - mean) / std, rtol=1e-6)
  np.testing.assert_allclose(result.mean(axes, np.float64), 0, atol=1e-5)
  np.testing.assert_allclose(result.std(axes, np.float64), 1, atol=1e-5)


def test_statistics_come_from_train_alone(digits):
  image = digits.train["input"]
  np.testing.assert_allclose(digits.mean, image.mean((0, 1, 2)), rtol=1e-6)
  np.testing.assert_allclose(digits.std, image.std((0, 1, 2)), rtol=1e-6)
  assert abs(digits.mean - digits.test["input"].mean()) > 1e-3


# Training batches.


def test_batches_are_standardized_rows_of_the_split(digits):
  batch = next(start(digits.train, 32, mean=digits.mean, std=digits.std))
  assert batch["input"].dtype == np.float32
  assert batch["label"].dtype == np.int32
  standardized = data.standardize(
    digits.train["input"], digits.mean, digits.std
  )
  rows = {
    image.tobytes(): label
    for image, label in zip(standardized, digits.train["label"], strict=True)
  }
  assert batch["input"].shape == (32, 8, 8, 1)
  assert [rows[image.tobytes()] for image in batch["input"]] == list(
    batch["label"]
  )


def test_an_epoch_holds_no_example_twice_and_each_epoch_differs():
  iterator = start(numbered(50), 8)
  epochs = [
    np.concatenate([batch["label"] for batch in take(iterator, 6)])
    for _ in range(20)
  ]
  for epoch in epochs:
    assert len(set(epoch.tolist())) == 48
  assert len({epoch.tobytes() for epoch in epochs}) == 20
  # The two examples that an epoch leaves out change, too.
  assert set(np.concatenate(epochs).tolist()) == set(range(50))


@pytest.mark.parametrize("augment", [None, flip_and_crop])
def test_the_seed_determines_the_batches(augment):
  split = numbered(50)
  first = take(start(split, 8, seed=3, augment=augment), 14)
  assert_equal(first, take(start(split, 8, seed=3, augment=augment), 14))
  other = take(start(split, 8, seed=4, augment=augment), 14)
  assert not np.array_equal(first[0]["label"], other[0]["label"])
  # Seeds in a row must not share permutations one epoch apart.
  assert not np.array_equal(first[6]["label"], other[0]["label"])


@pytest.mark.parametrize("augment", [None, flip_and_crop])
@pytest.mark.parametrize("step", [0, 4, 6, 9])
def test_restoring_continues_bit_for_bit(step, augment):
  split = numbered(50)
  original = start(split, 8, augment=augment)
  take(original, step)
  state = json.loads(json.dumps(original.get_state()))
  expected = take(original, 10)  # Over the end of an epoch of 6 steps.

  fresh = start(split, 8, augment=augment)
  fresh.set_state(state)
  assert_equal(take(fresh, 10), expected)
  # Also from an iterator that has already prefetched elsewhere.
  original.set_state(state)
  assert_equal(take(original, 10), expected)


def test_augmentation_differs_by_example_and_by_epoch():
  split = numbered(8)
  iterator = start(split, 8, augment=flip_and_crop)
  images = np.concatenate(
    [batch["input"][np.argsort(batch["label"])] for batch in take(iterator, 2)]
  )
  assert images.shape == (16, 6, 5, 3)
  lit = images[..., 0] == np.tile(np.arange(8), 2)[:, None, None] - 5
  assert len({example.tobytes() for example in lit[1:8]}) > 4
  assert not np.array_equal(lit[:8], lit[8:])


@pytest.mark.parametrize("augment", [None, flip_and_crop])
@pytest.mark.parametrize("process_count", [2, 4])
def test_processes_share_the_batches_of_one(process_count, augment):
  split = numbered(50)
  whole = take(start(split, 8, augment=augment), 14)
  parts = [
    take(
      start(
        split,
        8,
        augment=augment,
        process_index=index,
        process_count=process_count,
      ),
      14,
    )
    for index in range(process_count)
  ]
  joined = [
    {key: np.concatenate([part[key] for part in step]) for key in step[0]}
    for step in zip(*parts, strict=True)
  ]
  assert_equal(joined, whole)


def test_batches_are_a_grain_iterator():
  assert isinstance(start(numbered(9), 3), grain.DatasetIterator)


@pytest.mark.parametrize("make", [data.batches, data.eval_batches])
@pytest.mark.parametrize(
  ("kwargs", "message"),
  [
    (
      {"batch_size": 6, "process_count": 4},
      "batch_size is 6, expected a positive multiple of process_count=4",
    ),
    ({"batch_size": 0}, "batch_size is 0, expected a positive multiple"),
    (
      {"batch_size": 4, "process_index": 2, "process_count": 2},
      "process_index is 2, expected 0 to 1 for process_count=2",
    ),
  ],
)
def test_batches_that_cannot_be_shared_are_refused(make, kwargs, message):
  seed = {"seed": 0} if make is data.batches else {}
  with pytest.raises(ValueError, match=message):
    make(numbered(10), mean=MEAN, std=STD, **seed, **kwargs)


def test_a_batch_larger_than_the_split_is_refused():
  with pytest.raises(
    ValueError, match="batch_size is 11, but the split has only 10 examples"
  ):
    start(numbered(10), 11)


# Evaluation batches.


@pytest.mark.parametrize("batch_size", [1, 7, 10, 16])
@pytest.mark.parametrize("process_count", [1, 2])
def test_evaluation_counts_every_example_once_in_order(
  batch_size, process_count
):
  split = numbered(20)
  size = batch_size * process_count
  parts = [
    list(
      data.eval_batches(
        split,
        size,
        mean=MEAN,
        std=STD,
        process_index=index,
        process_count=process_count,
      )
    )
    for index in range(process_count)
  ]
  labels, weights, images = (
    np.concatenate(
      [part[key] for step in zip(*parts, strict=True) for part in step]
    )
    for key in ("label", "weight", "input")
  )
  for part in parts:
    assert len(part) == -(-20 // size)
    for batch in part:
      assert batch["input"].shape == (batch_size, 6, 5, 3)
      assert batch["weight"].shape == batch["label"].shape == (batch_size,)
      assert batch["weight"].dtype == np.float32
  assert weights.sum() == 20
  np.testing.assert_array_equal(labels[weights == 1], np.arange(20))
  np.testing.assert_array_equal(labels[weights == 0], 19)
  np.testing.assert_array_equal(
    images[:20], data.standardize(split["input"], MEAN, STD)
  )


# Images that differ in size, as ImageNet's do.


@pytest.fixture(scope="module")
def large(tmp_path_factory):
  path = tmp_path_factory.mktemp("large")
  photos.prepare(path)
  return data.load_dataset("imagenet2012", path, image_size=14)


def to_14(images, rng):
  return random_resized_crop(images, rng, 14)


def test_a_set_that_is_streamed_says_what_it_holds(large):
  assert (large.input_shape, large.num_classes) == ((14, 14, 3), 4)
  # The test labels of ImageNet are not public.
  splits = (large.train, large.validation, large.test)
  assert [split["label"].size for split in splits] == [36, 4, 12]
  assert [len(split["input"]) for split in splits] == [36, 4, 12]
  np.testing.assert_allclose(large.mean, [123.675, 116.28, 103.53])
  np.testing.assert_allclose(large.std, [58.395, 57.12, 57.375])
  assert large.mean.dtype == large.std.dtype == np.float32


def test_splits_where_test_labels_are_not_public():
  sizes = {"train": 1_281_167, "validation": 50_000, "test": 100_000}
  parts = {
    split: prepared._part_of(sizes, split, has_test_labels=False)
    for split in data.SPLITS
  }
  assert parts == {
    "train": "train[:1271167]",
    "validation": "train[1271167:]",
    "test": "validation",
    "train+validation": "train",
  }
  for split in data.SPLITS:
    assert prepared._part_of(sizes, split, has_test_labels=True) == split


def test_rows_are_read_as_from_arrays(large):
  rows = np.array([7, 0, 7, 35])
  images, labels = (large.train[key][rows] for key in ("input", "label"))
  assert (images.shape, images.dtype) == ((4, 14, 14, 3), np.uint8)
  assert (labels.shape, labels.dtype) == ((4,), np.int32)
  # Their brightness, as the set was made.
  np.testing.assert_array_equal(images.mean((1, 2, 3)) // 60, labels)
  whole = list(large.train["input"].whole(rows))
  assert len({image.shape for image in whole}) == 3
  for image, center in zip(whole, images, strict=True):
    np.testing.assert_array_equal(center, augment.center_crop(image, 14, 16))


def test_streamed_batches_are_crops_of_rows(large):
  settings = {"mean": large.mean, "std": large.std, "augment": to_14}
  first, second = (
    take(start(large.train, 12, **settings), 6) for _ in range(2)
  )
  assert_equal(first, second)
  for batch in first:
    assert batch["input"].shape == (12, 14, 14, 3)
    assert batch["input"].dtype == np.float32
    pixels = batch["input"] * large.std + large.mean
    brightness = pixels.mean((1, 2, 3)) // 60
    np.testing.assert_array_equal(brightness, batch["label"])
  # Of the same images, other parts in the second epoch.
  epochs = [
    {x.tobytes() for batch in first[i : i + 3] for x in batch["input"]}
    for i in (0, 3)
  ]
  assert len(epochs[0] | epochs[1]) == 72
  plain = next(start(large.train, 12, **settings | {"augment": None}))
  np.testing.assert_array_equal(plain["label"], first[0]["label"])


def test_streamed_batches_continue_bit_for_bit(large):
  original = start(large.train, 8, augment=to_14)
  take(original, 3)
  state = json.loads(json.dumps(original.get_state()))
  expected = take(original, 5)
  fresh = start(large.train, 8, augment=to_14)
  fresh.set_state(state)
  assert_equal(take(fresh, 5), expected)


def test_each_process_decodes_its_own_images_alone(large):
  decoded = []

  class Counted(data.Images):
    def whole(self, rows):
      decoded.append(len(rows))
      return super().whole(rows)

  split = large.train | {"input": Counted(large.train["input"].source, 14)}
  parts = [
    take(
      start(split, 12, augment=to_14, process_index=index, process_count=3), 3
    )
    for index in range(3)
  ]
  assert set(decoded) == {4}
  joined = [
    {key: np.concatenate([part[key] for part in step]) for key in step[0]}
    for step in zip(*parts, strict=True)
  ]
  assert_equal(joined, take(start(large.train, 12, augment=to_14), 3))


def test_a_streamed_split_is_evaluated_in_order(large):
  batches = list(
    data.eval_batches(large.test, 5, mean=large.mean, std=large.std)
  )
  weights, labels, images = (
    np.concatenate([batch[key] for batch in batches])
    for key in ("weight", "label", "input")
  )
  assert weights.tolist() == [1] * 12 + [0] * 3
  rows = np.arange(12)
  np.testing.assert_array_equal(labels[:12], large.test["label"][rows])
  centers = data.standardize(large.test["input"][rows], large.mean, large.std)
  np.testing.assert_array_equal(images[:12], centers)


def test_images_that_differ_in_size_need_one(large):
  path = large.train["label"].source.dataset_info.data_dir
  with pytest.raises(ValueError, match="differ in size: give an image_size"):
    data.load_dataset("imagenet2012", Path(path).parents[1])


# The command that prepares a set.


def test_command_prepares_digits(tmp_path, capsys):
  tyro.cli(prepare.prepare, args=["digits", "--data-dir", str(tmp_path)])
  assert capsys.readouterr().out.endswith(
    f"digits is ready in {tmp_path}/digits/1.0.0\n"
  )


def test_command_asks_for_tensorflow(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, "tensorflow", None)
  with pytest.raises(SystemExit, match=r"'mnist' needs TensorFlow(.|\n)*pip"):
    prepare.prepare("mnist", tmp_path)


def test_command_suggests_a_known_name(tmp_path):
  with pytest.raises(SystemExit, match=r"Unknown data set 'mnits': .* mnist"):
    prepare.prepare("mnits", tmp_path)


def test_command_downloads_what_is_missing(tmp_path, monkeypatch):
  def build(name, *, data_dir, file_format):
    assert (name, file_format) == ("mnist", "array_record")
    return data.Digits(data_dir=data_dir, file_format=file_format)

  monkeypatch.setattr(prepare, "importlib", MagicMock())
  monkeypatch.setattr(prepare.tfds, "builder", build)
  with pytest.raises(data.DataNotPreparedError, match="which holds digits"):
    prepare.prepare("mnist", tmp_path)


def test_command_says_where_archives_go_that_it_cannot_download(
  tmp_path, monkeypatch
):
  builder = MagicMock(MANUAL_DOWNLOAD_INSTRUCTIONS="Two files:\n  train.tar")
  monkeypatch.setattr(prepare, "importlib", MagicMock())
  monkeypatch.setattr(prepare.tfds, "builder", lambda *_, **__: builder)
  with pytest.raises(SystemExit) as stopped:
    prepare.prepare("imagenet2012", tmp_path)
  told = str(stopped.value)
  assert "'imagenet2012' must be downloaded by hand" in told
  assert f"\n  {tmp_path}/downloads/manual\n" in told
  assert told.endswith("\nTwo files: train.tar")
  builder.download_and_prepare.assert_not_called()


def test_a_platform_without_a_reader_is_told_so(tmp_path, monkeypatch):
  find = importlib.util.find_spec
  monkeypatch.setattr(
    importlib.util,
    "find_spec",
    lambda name: None if name == "array_record" else find(name),
  )
  with pytest.raises(data.DataNotPreparedError, match="no wheels for Windows"):
    data.resolve_data_dir(tmp_path)
