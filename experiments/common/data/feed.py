"""Batches of training and of evaluation, by restorable iterators."""

import functools
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import grain
import numpy as np

from experiments.common.data.augment import Augment
from experiments.common.data.splits import Arrays, Images, Split

# Images are decoded by one thread each; more only hold memory.
_DECODERS = min(16, os.cpu_count() or 1)


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
  part = _part(batch_size, process_index, process_count)
  rows_of = training_rows(len(split["label"]), batch_size, seed)

  # One grain element is a batch, not an example: six times as fast.
  def make_batch(step: int, rng: np.random.Generator) -> Arrays:
    rows = rows_of(step)
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

  made = random_steps(make_batch, seed)
  return iter(made.to_iter_dataset(_reading(split)))


def training_rows(
  count: int, batch_size: int, seed: int
) -> Callable[[int], np.ndarray]:
  """Returns the function from a training step, 0, 1, ..., to its examples.

  Args:
    count: Examples of the split.
    batch_size: Examples a batch.
    seed: Of shuffling.

  Returns:
    `rows_of(step)`, int64 [batch_size].

  Raises:
    ValueError: The batch size exceeds the split.
  """
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

  def rows_of(step: int) -> np.ndarray:
    epoch, step = divmod(step, epoch_steps)
    return permutation(epoch)[step * batch_size : (step + 1) * batch_size]

  return rows_of


def random_steps(
  make: Callable[[int, np.random.Generator], Any], seed: int
) -> grain.MapDataset[Any]:
  """Returns what `make` makes of each step and a random generator of its own.

  Args:
    make: From a step and its generator to an element.
    seed: Of the generators; equal ones at equal steps are equal.
  """
  return grain.MapDataset.range(sys.maxsize).seed(seed).random_map(make)


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
