"""Prepared data sets, read without TensorFlow."""

import os
from typing import Any

import tensorflow_datasets as tfds
from tensorflow_datasets.core.data_sources.array_record import (
  ArrayRecordDataSource,
)

from experiments.common.data import directory
from experiments.common.data.sets import SETS, DataSet
from experiments.common.errors import DataNotPreparedError

SPLITS = ("train", "validation", "test", "train+validation")


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
  known = SETS.get(name.split("/")[0], DataSet())
  data_dir = directory.resolve_data_dir(data_dir)
  version_dir = directory.find_version(name, data_dir)
  if version_dir is None and known.prepare and name in SETS:
    version_dir = known.prepare(data_dir)
  command = directory.command(name, data_dir)
  if version_dir is None:
    raise DataNotPreparedError(
      f"Data set {name!r} is not prepared in {data_dir}, which holds "
      f"{directory.prepared(data_dir)}. Prepare it with\n  {command}\n"
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
      f"prepare it with\n  {command}"
    )
  sizes = {k: v.num_examples for k, v in builder.info.splits.items()}
  return builder.as_data_source(_part_of(sizes, split, known.has_test_labels))


def _part_of(sizes: dict[str, int], split: str, has_test_labels: bool) -> str:
  """Returns a split in terms of those that a set has.

  >>> _part_of({"train": 60_000, "test": 10_000}, "validation", True)
  'train[54000:]'
  """
  tested = "test" in sizes and has_test_labels
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
