"""Data to classify, images or text, fed by restorable iterators.

Data sets come from tensorflow-datasets, prepared once in the array_record
format and read without TensorFlow. `load_dataset` decodes a set into uint8
arrays, or, where images differ in size, into `Images` that are decoded where
they are asked for; `batches` and `eval_batches` turn a split into the
standardized batches that training and evaluation consume:

```python
mnist = load_dataset("mnist")
train = batches(mnist.train, 128, seed=0, mean=mnist.mean, std=mnist.std)
batch = next(train)  # {"input": float32 [128, 28, 28, 1], "label": int32 [128]}
train.set_state(train.get_state())  # a JSON-able dict that resumes bit for bit
```

Text, see `text`, is windows of tokens, each with the token that follows it for
its label.
"""

import dataclasses
import functools
import hashlib
import io
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import grain
import numpy as np
import tensorflow_datasets as tfds
from PIL import Image
from tensorflow_datasets.core.data_sources.array_record import (
  ArrayRecordDataSource,
)

from experiments.common import text
from experiments.common.augment import Augment, center_crop

Arrays = dict[str, np.ndarray]
#: A split: arrays, or what reads them by rows.
Split = dict[str, Any]

SPLITS = ("train", "validation", "test", "train+validation")

#: Sets whose test images have no public labels: the world tests on validation.
_UNLABELED_TEST = ("imagenet2012",)

#: Mean and standard deviation of ImageNet's channels, as all use them.
_MEAN = 255 * np.array([0.485, 0.456, 0.406], np.float32)
_STD = 255 * np.array([0.229, 0.224, 0.225], np.float32)

# Images are decoded by one thread each; more only hold memory.
_DECODERS = min(16, os.cpu_count() or 1)


class DataNotPreparedError(FileNotFoundError):
  """A data set is not in the data directory in a readable form."""


class Digits(tfds.core.GeneratorBasedBuilder):
  """The 1,797 handwritten 8×8 digits that come with scikit-learn.

  Images are uint8 [8, 8, 1] with ink from 0 to 16 (not 255), labels 0 to 9.
  The splits train (1,257), validation (180) and test (360) are fixed and
  stratified by label. Nothing is downloaded.
  """

  VERSION = tfds.core.Version("1.0.0")

  # Nothing to download. Without this, tfds searches its checksums by way of
  # importlib_resources, which it does not install.
  url_infos: ClassVar[dict[str, Any]] = {}

  def _info(self) -> tfds.core.DatasetInfo:
    return tfds.core.DatasetInfo(
      builder=self,
      features=tfds.features.FeaturesDict(
        {
          # The features.Image of tfds needs TensorFlow to encode.
          "image": tfds.features.Tensor(shape=(8, 8, 1), dtype=np.uint8),
          "label": tfds.features.ClassLabel(num_classes=10),
        }
      ),
      supervised_keys=("image", "label"),
    )

  def _split_generators(self, dl_manager: Any) -> dict[str, Iterator]:
    # scikit-learn takes a second to import and is needed only here.
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits: Any = load_digits()
    images, labels = digits.images[..., None].astype(np.uint8), digits.target
    split = functools.partial(train_test_split, random_state=0)
    rows, test = split(np.arange(1797), test_size=360, stratify=labels)
    train, validation = split(rows, test_size=180, stratify=labels[rows])
    return {
      "train": self._generate_examples(images, labels, train),
      "validation": self._generate_examples(images, labels, validation),
      "test": self._generate_examples(images, labels, test),
    }

  def _generate_examples(
    self, images: np.ndarray, labels: np.ndarray, rows: np.ndarray
  ) -> Iterator[tuple[int, dict[str, Any]]]:
    for row in rows.tolist():
      yield row, {"image": images[row], "label": int(labels[row])}


def resolve_data_dir(data_dir: str | os.PathLike | None = None) -> Path:
  """Returns the directory of prepared data sets.

  Args:
    data_dir: The directory, or None for `$TFDS_DATA_DIR`, or where that is not
      set `~/tensorflow_datasets`.

  Returns:
    The path, with `~` expanded.

  Raises:
    DataNotPreparedError: It is in a bucket.
  """
  default = os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")
  place = os.fspath(default if data_dir is None else data_dir)
  if "://" in place:
    raise DataNotPreparedError(
      f"{place} is in a bucket, but array_record reads files only: copy it to"
      " a directory, or mount the bucket as one, and give that as"
      " TFDS_DATA_DIR or data_dir."
    )
  return Path(place).expanduser()


def load(
  name: str, split: str, data_dir: str | os.PathLike | None = None
) -> ArrayRecordDataSource:
  """Opens a split of a prepared data set for random access.

  `"digits"` is prepared on first use. A set without labeled test images is
  tested on its validation split. One without a validation split, or whose own
  is taken so, has the last 10 % of its training examples carved off for one,
  at most 10,000.

  Args:
    name: `"digits"` or any prepared image classification set, such as
      `"mnist"` or `"cifar10"`, with `"name/config"` where a set has configs.
    split: `"train"`, `"validation"`, `"test"` or `"train+validation"`.
    data_dir: Where the prepared sets lie, see `resolve_data_dir`.

  Returns:
    A sequence of `{"image": uint8 [H, W, C], "label": int}`, whose
    `dataset_info.features` tell the image shape and the number of classes.

  Raises:
    DataNotPreparedError: The set is not there, or not in array_record format.
    ValueError: The set has no such split.
  """
  if split not in SPLITS:
    raise ValueError(f"Unknown split {split!r}: give one of {SPLITS}.")
  data_dir = resolve_data_dir(data_dir)
  version_dir = _find_version(name, data_dir)
  if version_dir is None and name == "digits":
    version_dir = _prepare_digits(data_dir)
  if version_dir is None:
    raise DataNotPreparedError(
      f"Data set {name!r} is not prepared in {data_dir}, which holds "
      f"{_prepared(data_dir)}. Prepare it with\n  {_command(name, data_dir)}\n"
      "or point TFDS_DATA_DIR or data_dir at the directory that has it."
    )
  # Only the files are consulted: no code of the set, no network.
  builder: Any = tfds.builder_from_directory(version_dir)
  found = builder.info.file_format
  if found is not tfds.core.FileFormat.ARRAY_RECORD:
    raise DataNotPreparedError(
      f"Data set {name!r} in {version_dir} is stored as "
      f"{found.value if found else 'an unknown format'}, but array_record is "
      "needed. Remove that directory or choose another data directory, then "
      f"prepare it with\n  {_command(name, data_dir)}"
    )
  sizes = {k: v.num_examples for k, v in builder.info.splits.items()}
  return builder.as_data_source(_part_of(sizes, split, name))


def _part_of(sizes: dict[str, int], split: str, name: str) -> str:
  """Returns a split in terms of those that a set has.

  >>> _part_of({"train": 60_000, "test": 10_000}, "validation", "mnist")
  'train[54000:]'
  """
  tested = "test" in sizes and name.split("/")[0] not in _UNLABELED_TEST
  if split == "test":
    return "test" if tested else "validation"
  if tested and "validation" in sizes:
    return split
  # The examples of a prepared set are already in a fixed random order, so the
  # tail is a fair sample.
  count = sizes.get("train", 0)
  first = count - min(round(count / 10), 10_000)
  return {
    "train": f"train[:{first}]",
    "validation": f"train[{first}:]",
    "train+validation": "train",
  }[split]


def _find_version(name: str, data_dir: Path) -> Path | None:
  """Returns the directory of the newest prepared version, None if none."""
  # Directories still being written are named `incomplete.*`: no version.
  versions = [
    path.parent
    for path in (data_dir / name).glob("*/features.json")
    if tfds.core.Version.is_valid(path.parent.name)
  ]
  return max(
    versions, key=lambda path: tfds.core.Version(path.name), default=None
  )


def _prepared(data_dir: Path) -> str:
  paths = sorted(data_dir.iterdir()) if data_dir.is_dir() else []
  names = [path.name for path in paths if _find_version(path.name, data_dir)]
  return ", ".join(names) or "no data sets"


def _command(name: str, data_dir: Path) -> str:
  return (
    'pip install "tern_jax[prepare]" && '
    f"python -m experiments.prepare {name} --data-dir {data_dir}"
  )


def _prepare_digits(data_dir: Path) -> Path:
  try:
    builder = Digits(data_dir=data_dir, file_format="array_record")
    tfds.disable_progress_bar()
    builder.download_and_prepare()
  except OSError as error:
    # The set is written aside and then renamed. The loser of a race cannot
    # rename, but finds the winner's files.
    if _find_version("digits", data_dir) is None:
      raise DataNotPreparedError(
        f"Data set 'digits' cannot be written to {data_dir} ({error}). Point "
        "TFDS_DATA_DIR or data_dir at a writable directory."
      ) from error
  return data_dir / "digits" / str(Digits.VERSION)


def arrays(source: ArrayRecordDataSource) -> Arrays:
  """Decodes a whole split into memory.

  Args:
    source: What `load` returns, of images that all have the same shape.

  Returns:
    `{"input": uint8 [N, H, W, C], "label": int32 [N]}`.
  """
  # All at once: three times as fast as one by one.
  examples = source.__getitems__(range(len(source)))
  return {
    "input": np.stack([example["image"] for example in examples]),
    "label": np.array([example["label"] for example in examples], np.int32),
  }


@dataclasses.dataclass(frozen=True, eq=False)
class Labels:
  """The labels of a split too large for memory: `labels[rows]` reads them.

  Attributes:
    source: What `load` returns, with images left encoded.
  """

  source: ArrayRecordDataSource

  def __len__(self) -> int:
    return len(self.source)

  @property
  def size(self) -> int:
    """How many they are."""
    return len(self)

  def __getitem__(self, rows: np.ndarray) -> np.ndarray:
    """Returns int32 [N], N the number of rows."""
    examples = self.source.__getitems__(rows.tolist())
    return np.array([example["label"] for example in examples], np.int32)


@dataclasses.dataclass(frozen=True, eq=False)
class Images:
  """The images of a split too large for memory, which may differ in size.

  `images[rows]` reads and decodes them: of each the center, 224 pixels of its
  shorter side resized to 256, or as many of the size asked for.

  Attributes:
    source: What `load` returns, with images left encoded.
    size: Side of the centers, in pixels.
  """

  source: ArrayRecordDataSource
  size: int

  def __len__(self) -> int:
    return len(self.source)

  def __getitem__(self, rows: np.ndarray) -> np.ndarray:
    """Returns uint8 [N, size, size, 3], N the number of rows."""
    resized = round(self.size * 256 / 224)
    return np.stack(
      [center_crop(image, self.size, resized) for image in self.whole(rows)]
    )

  def whole(self, rows: np.ndarray) -> Iterator[np.ndarray]:
    """Yields the images of rows as they are, each uint8 [H, W, 3]."""
    for example in self.source.__getitems__(rows.tolist()):
      with Image.open(io.BytesIO(example["image"])) as image:
        # Some are gray.
        yield np.asarray(image.convert("RGB"))


def streamed(source: ArrayRecordDataSource, size: int) -> Split:
  """Opens a split to be read where it is asked for.

  Args:
    source: What `load` returns.
    size: See `Images`.

  Returns:
    `{"input": Images, "label": Labels}`, indexed by rows as arrays are.
  """
  encoded: Any = {"image": tfds.decode.SkipDecoding()}
  source = dataclasses.replace(source, decoders=encoded)
  return {"input": Images(source, size), "label": Labels(source)}


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
  """A classification set, in memory or streamed.

  Attributes:
    name: The name that it was loaded by.
    input_shape: (H, W, C), or (T,) of text.
    num_classes: Labels are 0 to `num_classes - 1`.
    mean: Of each channel over the train split, in pixel values, float32 [C];
      ImageNet's where the set is streamed, none, [0], of text.
    std: Of each channel likewise, float32 [C].
    train: `{"input": uint8 [N, H, W, C], "label": int32 [N]}`, or what
      `streamed` returns, or of text int32 [N, T] both.
    validation: The same, for choosing hyper-parameters.
    test: The same, for the final number only.
    sha256: Of a text, which is not the same everywhere.
  """

  name: str
  input_shape: tuple[int, ...]
  num_classes: int
  mean: np.ndarray
  std: np.ndarray
  train: Split = dataclasses.field(repr=False)
  validation: Split = dataclasses.field(repr=False)
  test: Split = dataclasses.field(repr=False)
  sha256: str | None = None

  @property
  def blank(self) -> np.ndarray:
    """An input of zeros, [1, *input_shape], of the type that a net gets."""
    dtype = np.float32 if self.mean.size else np.int32
    return np.zeros((1, *self.input_shape), dtype)

  @property
  def train_and_validation(self) -> Arrays:
    """All that may be trained on of a set in memory, in a new copy."""
    return {
      key: np.concatenate([self.train[key], self.validation[key]])
      for key in self.train
    }


def load_dataset(
  name: str,
  data_dir: str | os.PathLike | None = None,
  image_size: int | None = None,
) -> Dataset:
  """Loads a data set into memory, or opens it to be streamed.

  Args:
    name: As for `load`, or a text, as for `text.read`.
    data_dir: As for `load`.
    image_size: Side to which images that differ in size are cropped; such a
      set is read and decoded in the background, batch by batch. Not used where
      all images have one shape.

  Returns:
    The three splits and the statistics of the train split.

  Raises:
    DataNotPreparedError: The set is not there, or not in array_record format;
      or the text cannot be read, or is too short.
    ValueError: The set lacks a split, or an `image_size` that it needs.
  """
  if text.is_text(name):
    return _load_text(name)
  sources = {
    split: load(name, split, data_dir)
    for split in ("train", "validation", "test")
  }
  features: Any = sources["train"].dataset_info.features
  shape = features["image"].shape
  if None not in shape:
    splits = {split: arrays(source) for split, source in sources.items()}
    mean, std = channel_statistics(splits["train"]["input"])
  elif image_size is None:
    raise ValueError(
      f"Images of {name!r} differ in size: give an image_size to crop them to."
    )
  else:
    splits = {k: streamed(source, image_size) for k, source in sources.items()}
    mean, std = _MEAN, _STD
    shape = (image_size, image_size, 3)
  return Dataset(
    name=name,
    input_shape=shape,
    num_classes=features["label"].num_classes,
    mean=mean,
    std=std,
    train=splits["train"],
    validation=splits["validation"],
    test=splits["test"],
  )


def _load_text(name: str) -> Dataset:
  try:
    whole = text.read(name)
    splits = text.splits(whole)
  except (OSError, ValueError) as error:
    raise DataNotPreparedError(f"Data set {name!r}: {error}") from error
  return Dataset(
    name=name,
    input_shape=(text.CONTEXT,),
    num_classes=text.VOCABULARY,
    mean=np.zeros(0, np.float32),
    std=np.zeros(0, np.float32),
    sha256=hashlib.sha256(whole).hexdigest(),
    **splits,
  )


def channel_statistics(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Computes mean and standard deviation of each channel.

  Args:
    images: uint8 [N, H, W, C].

  Returns:
    Mean and standard deviation in pixel values, float32 [C] each.

  >>> channel_statistics(np.array([1, 3], np.uint8).reshape(2, 1, 1, 1))
  (array([2.], dtype=float32), array([1.], dtype=float32))
  """
  # Exact integer sums: no float copy of the images, no cancellation.
  count = images[..., 0].size
  mean = images.sum(axis=(0, 1, 2), dtype=np.int64) / count
  square = np.einsum("nhwc,nhwc->c", images, images, dtype=np.int64) / count
  std = np.sqrt(square - mean**2)
  return mean.astype(np.float32), std.astype(np.float32)


def standardize(
  images: np.ndarray, mean: np.ndarray, std: np.ndarray
) -> np.ndarray:
  """Returns `(images - mean) / std`.

  Args:
    images: uint8 [..., H, W, C].
    mean: Pixel values to subtract, float32 [C]; empty for what is no image,
      which is returned as it is.
    std: Pixel values to divide by, float32 [C].

  Returns:
    float32 [..., H, W, C]. Pixels need no scaling to [0, 1] before: a common
    factor of images, mean and standard deviation cancels.

  >>> pixels = np.array([0, 128], np.uint8).reshape(1, 2, 1)
  >>> standardize(pixels, np.float32([128]), np.float32([64])).ravel()
  array([-2.,  0.], dtype=float32)
  """
  if not mean.size:
    return images
  # Rows of width × channels, because NumPy is slow along an axis of 3.
  width = images.shape[-2]
  rows = images.reshape(*images.shape[:-2], -1)
  result = np.subtract(rows, np.tile(mean, width), dtype=np.float32)
  result /= np.tile(std, width)
  return result.reshape(images.shape)


def batches(
  split: Split,
  batch_size: int,
  *,
  seed: int,
  mean: np.ndarray,
  std: np.ndarray,
  augment: Augment | None = None,
  process_index: int = 0,
  process_count: int = 1,
) -> grain.DatasetIterator[Arrays]:
  """Iterates over a split for training, forever, reshuffled every epoch.

  The global batches depend on the seed alone, whatever the number of
  processes: each process gets its block of rows of the same batch, augmented
  alike. An epoch's last incomplete batch is dropped. Of `Images`, a process
  decodes only its rows, and each image is augmented alone.

  Args:
    split: `{"input": uint8 [N, H, W, C], "label": int32 [N]}`, or what
      `streamed` returns.
    batch_size: Examples a batch, of all processes together.
    seed: Of shuffling and augmentation, 0 to 2³² - 1.
    mean: See `standardize`, float32 [C].
    std: See `standardize`, float32 [C].
    augment: From uint8 images, those of a global batch or a single one, and a
      random generator to as many images, such as `augment.flip_and_crop`.
    process_index: Which process this is.
    process_count: How many processes share a batch.

  Returns:
    An iterator of `{"input": float32 [B, H, W, C], "label": int32 [B]}`, with
    B = `batch_size // process_count`. Its `get_state()` is a JSON-able dict;
    after `set_state`, it continues bit for bit as the original did.

  Raises:
    ValueError: The batch size exceeds the split or cannot be shared equally.
  """
  count = len(split["label"])
  part = _part(batch_size, process_index, process_count)
  epoch_steps = count // batch_size
  if not epoch_steps:
    raise ValueError(
      f"batch_size is {batch_size}, but the split has only {count} examples: "
      "give a smaller batch_size."
    )

  # Two, because prefetching looks beyond the end of an epoch.
  @functools.lru_cache(maxsize=2)
  def permutation(epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(count)

  # One grain element is a batch, not an example: six times as fast.
  def make_batch(step: int, rng: np.random.Generator) -> Arrays:
    epoch, step = divmod(step, epoch_steps)
    rows = permutation(epoch)[step * batch_size : (step + 1) * batch_size]
    images = split["input"]
    if augment is None:
      images = images[rows[part]]
    elif isinstance(images, Images):
      seeds = rng.integers(2**63, size=batch_size)[part]
      changed = [
        augment(image[None], np.random.default_rng(seed))
        for image, seed in zip(images.whole(rows[part]), seeds, strict=True)
      ]
      images = np.concatenate(changed)
    else:
      images = augment(images[rows], rng)[part]
    return {
      "input": standardize(images, mean, std),
      "label": split["label"][rows[part]],
    }

  steps = grain.MapDataset.range(sys.maxsize).seed(seed)
  made = steps.random_map(make_batch)
  return iter(made.to_iter_dataset(_reading(split)))


def eval_batches(
  split: Split,
  batch_size: int,
  *,
  mean: np.ndarray,
  std: np.ndarray,
  process_index: int = 0,
  process_count: int = 1,
) -> Iterator[Arrays]:
  """Iterates once over a split in order, in batches of one static shape.

  The last batch is filled up with copies of the last example at weight 0, so
  that weighted sums over all batches count every example exactly once.

  Args:
    split: As for `batches`.
    batch_size: Examples a batch, of all processes together.
    mean: See `standardize`, float32 [C].
    std: See `standardize`, float32 [C].
    process_index: Which process this is.
    process_count: How many processes share a batch.

  Returns:
    An iterator of `{"input": float32 [B, H, W, C], "label": int32 [B],
    "weight": float32 [B]}`, with B = `batch_size // process_count`.

  Raises:
    ValueError: The batch size cannot be shared equally by the processes.
  """
  count = len(split["label"])
  part = _part(batch_size, process_index, process_count)

  def make_batch(start: int) -> Arrays:
    rows = np.arange(start, start + batch_size)[part]
    clipped = np.minimum(rows, count - 1)
    return {
      "input": standardize(split["input"][clipped], mean, std),
      "label": split["label"][clipped],
      "weight": (rows < count).astype(np.float32),
    }

  starts = grain.MapDataset.range(0, count, batch_size)
  return iter(starts.map(make_batch).to_iter_dataset(_reading(split)))


def _reading(split: Split) -> grain.ReadOptions:
  """Returns how batches are made in the background."""
  if isinstance(split["input"], Images):
    return grain.ReadOptions(_DECODERS, prefetch_buffer_size=_DECODERS)
  # Enough to overlap with the training step; more only holds memory.
  return grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)


def _part(batch_size: int, process_index: int, process_count: int) -> slice:
  """Returns the rows of a global batch that one process gets."""
  if not 0 <= process_index < process_count:
    raise ValueError(
      f"process_index is {process_index}, expected 0 to {process_count - 1} "
      f"for process_count={process_count}."
    )
  if batch_size < 1 or batch_size % process_count:
    raise ValueError(
      f"batch_size is {batch_size}, expected a positive multiple of "
      f"process_count={process_count}."
    )
  size = batch_size // process_count
  return slice(process_index * size, (process_index + 1) * size)
