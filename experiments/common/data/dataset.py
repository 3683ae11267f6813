"""A whole data set: its splits and the statistics of its images."""

import dataclasses
import hashlib
import os
from typing import Any

import numpy as np

from experiments.common.data import text
from experiments.common.data.prepared import load
from experiments.common.data.splits import Split, arrays, streamed
from experiments.common.errors import DataNotPreparedError

#: Mean and standard deviation of ImageNet's channels, as all use them.
_MEAN = 255 * np.array([0.485, 0.456, 0.406], np.float32)
_STD = 255 * np.array([0.229, 0.224, 0.225], np.float32)


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
