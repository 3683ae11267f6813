"""The handwritten digits of scikit-learn as a data set, made on first use."""

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import tensorflow_datasets as tfds

from experiments.common.data.directory import find_version
from experiments.common.errors import DataNotPreparedError


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


def prepare(data_dir: Path) -> Path:
  """Writes the digits to a data directory.

  Returns:
    The directory of their files.

  Raises:
    DataNotPreparedError: It cannot be written to.
  """
  try:
    builder = Digits(data_dir=data_dir, file_format="array_record")
    tfds.disable_progress_bar()
    builder.download_and_prepare()
  except OSError as error:
    # The set is written aside and then renamed. The loser of a race cannot
    # rename, but finds the winner's files.
    if find_version("digits", data_dir) is None:
      raise DataNotPreparedError(
        f"Data set 'digits' cannot be written to {data_dir} ({error}). Point "
        "TFDS_DATA_DIR or data_dir at a writable directory."
      ) from error
  return data_dir / "digits" / str(Digits.VERSION)
