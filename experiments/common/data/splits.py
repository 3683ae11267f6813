"""Splits in memory, and splits that are read and decoded where asked for."""

import dataclasses
import io
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image
from tensorflow_datasets.core.data_sources.array_record import (
  ArrayRecordDataSource,
)

from experiments.common.data.augment import center_crop

Arrays = dict[str, np.ndarray]
#: A split: arrays, or what reads them by rows.
Split = dict[str, Any]


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
