"""Random changes of training images, each a function of a batch.

An augmentation maps uint8 images [B, H, W, C] and a random generator to as many
images, all but `random_resized_crop` to those of the same shape:

```python
augment = chain(flip_and_crop, color_jitter, cutout)
train = data.batches(split, 128, seed=0, mean=mean, std=std, augment=augment)
```
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike
from PIL import Image

Augment = Callable[[np.ndarray, np.random.Generator], np.ndarray]

#: Red, green and blue in gray, by ITU-R BT.601.
_LUMA = np.array([0.299, 0.587, 0.114], np.float32)


def chain(*augments: Augment) -> Augment:
  """Returns the augmentation that applies others, the first one first.

  >>> brighter = lambda images, rng: images + np.uint8(1)
  >>> chain(brighter, brighter)(np.zeros(1, np.uint8), np.random.default_rng(0))
  array([2], dtype=uint8)
  """

  def apply(images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    for augment in augments:
      images = augment(images, rng)
    return images

  return apply


def flip_and_crop(
  images: np.ndarray, rng: np.random.Generator, pad: int = 4
) -> np.ndarray:
  """Augments by a random mirror image and a random shift.

  Args:
    images: uint8 [B, H, W, C].
    rng: Source of the flips and shifts.
    pad: Black pixels added on each side before cropping to the old size.

  Returns:
    uint8 [B, H, W, C].
  """
  size, height, width, _ = images.shape
  padded = np.pad(images, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
  tops, lefts, steps = draw_flip_and_crop(rng, size, pad).values()
  # Copying whole rows in a loop is three times as fast as fancy indexing.
  return np.stack(
    [
      image[top : top + height, left : left + width][:, ::step]
      for image, top, left, step in zip(padded, tops, lefts, steps, strict=True)
    ]
  )


def draw_flip_and_crop(
  rng: np.random.Generator, size: int, pad: int = 4
) -> dict[str, np.ndarray]:
  """Draws what is random in `flip_and_crop`.

  Args:
    rng: Source of the flips and shifts.
    size: Number of images.
    pad: As for `flip_and_crop`.

  Returns:
    The first row and column of each crop in its padded image, "top" and "left",
    and the "step" from column to column, -1 where it is mirrored; int64 [size].
  """
  tops, lefts = rng.integers(0, 2 * pad, (2, size), endpoint=True)
  return {"top": tops, "left": lefts, "step": rng.choice([-1, 1], size)}


def random_resized_crop(
  images: np.ndarray, rng: np.random.Generator, size: int = 224
) -> np.ndarray:
  """Augments by a random part of each image, resized, and a random mirror.

  A part has a share of the area drawn from [0.08, 1], and a ratio of width to
  height from [3/4, 4/3], uniformly in its logarithm; it lies anywhere. Of an
  image that none of ten such draws fits into, the part is the largest one at
  the center whose ratio is allowed.

  Args:
    images: uint8 [B, H, W, C], C 1 or 3.
    rng: Source of the parts and flips.
    size: Side of what is returned, in pixels.

  Returns:
    uint8 [B, size, size, C].

  Source: Szegedy et al., arXiv 1409.4842, as RandomResizedCrop of torchvision.
  """
  parts = []
  for image in images:
    rows, columns = _draw_part(image.shape[0], image.shape[1], rng)
    part = resize(image[rows, columns], size, size)
    parts.append(part[:, :: rng.choice([-1, 1])])
  return np.stack(parts)


def _draw_part(
  height: int, width: int, rng: np.random.Generator
) -> tuple[slice, slice]:
  """Returns the rows and columns of a random part of an image."""
  least, most = 3 / 4, 4 / 3
  area = height * width * rng.uniform(0.08, 1, 10)
  ratio = np.exp(rng.uniform(np.log(least), np.log(most), 10))
  heights, widths = np.rint(np.sqrt([area / ratio, area * ratio])).astype(int)
  fits = (heights > 0) & (heights <= height) & (widths > 0) & (widths <= width)
  if fits.any():
    h, w = int(heights[fits][0]), int(widths[fits][0])
    top, left = rng.integers([height - h, width - w], endpoint=True)
  else:
    h = min(height, round(width / least))
    w = min(width, round(height * most))
    top, left = (height - h) // 2, (width - w) // 2
  return slice(top, top + h), slice(left, left + w)


def center_crop(image: np.ndarray, size: int, resized: int) -> np.ndarray:
  """Returns the center of an image, resized before; for evaluation.

  Args:
    image: uint8 [H, W, C], C 1 or 3.
    size: Side of the square at the center that is returned, in pixels.
    resized: To which the shorter side is resized before, at least `size`.

  Returns:
    uint8 [size, size, C].

  >>> center_crop(np.arange(15, dtype=np.uint8).reshape(3, 5, 1), 1, 3).item()
  7
  """
  height, width = (
    resized * side // min(image.shape[:2]) for side in image.shape[:2]
  )
  top, left = round((height - size) / 2), round((width - size) / 2)
  whole = resize(image, height, width)
  return whole[top : top + size, left : left + size]


def resize(image: np.ndarray, height: int, width: int) -> np.ndarray:
  """Resizes an image, linearly between pixels, by means where it gets smaller.

  Args:
    image: uint8 [H, W, C], C 1 or 3.
    height: Rows of the result.
    width: Columns of the result.

  Returns:
    uint8 [height, width, C].
  """
  # Pillow has no images with one channel as an axis.
  plane = image[..., 0] if image.shape[-1] == 1 else image
  resized = Image.fromarray(np.ascontiguousarray(plane)).resize(
    (width, height), Image.Resampling.BILINEAR
  )
  return np.asarray(resized).reshape(height, width, -1)


def cutout(
  images: np.ndarray,
  rng: np.random.Generator,
  size: int = 16,
  fill: ArrayLike = 0,
) -> np.ndarray:
  """Augments by covering a square around a random pixel of each image.

  The square begins `size // 2` rows above and columns left of its pixel, and is
  cut off at the borders.

  Args:
    images: uint8 [B, H, W, C].
    rng: Source of the pixels, all of which are equally likely.
    size: Side of the square, in pixels.
    fill: Its color, 0-d or [C], 0 to 255. The mean of each channel becomes 0
      in standardized images, as in the paper.

  Returns:
    uint8 [B, H, W, C].

  Source: DeVries & Taylor, arXiv 1708.04552.
  """
  count, height, width, _ = images.shape

  def inside(length: int) -> np.ndarray:
    starts = rng.integers(0, length, (count, 1)) - size // 2
    pixels = np.arange(length)
    return (starts <= pixels) & (pixels < starts + size)

  square = inside(height)[:, :, None] & inside(width)[:, None, :]
  return np.where(square[..., None], np.rint(fill).astype(np.uint8), images)


def color_jitter(
  images: np.ndarray,
  rng: np.random.Generator,
  brightness: float = 0.3,
  contrast: float = 0.3,
  saturation: float = 0.3,
  hue: float = 0.075,
) -> np.ndarray:
  """Augments by random brightness, contrast, saturation and hue.

  Each image draws factors f uniformly from [1 - x, 1 + x], x being the strength
  of a change, and a turn from [-hue, hue]. Of a pixel p, brightness makes
  `f p`, contrast `f p + (1 - f) m` with m the mean gray of its image, and
  saturation `f p + (1 - f) g` with g its own gray; its hue is turned around the
  color circle. Values are clipped after each change, and rounded after the
  last.

  Args:
    images: uint8 [B, H, W, 3], red, green and blue.
    rng: Source of the factors, the turns and the order of the changes.
    brightness: Strength, in [0, 1].
    contrast: Strength, in [0, 1].
    saturation: Strength, in [0, 1].
    hue: Largest turn, as a share of the circle, in [0, 0.5].

  Returns:
    uint8 [B, H, W, 3].

  Raises:
    ValueError: The images have no three channels.

  Source: ColorJitter of torchvision, with the strengths of the code of Marban
  et al., arXiv 2004.01077. Differs from it: the random order of the changes is
  drawn for the batch, not for each image.
  """
  if images.shape[-1] != 3:
    raise ValueError(
      f"color_jitter got images of shape {images.shape}, but it needs red, "
      "green and blue in the last axis: leave it out for gray images."
    )

  def draw(strength: float) -> np.ndarray:
    draws = rng.uniform(-strength, strength, (len(images), 1, 1))
    return draws.astype(np.float32)

  lit, spread, colored = (
    1 + draw(x) for x in (brightness, contrast, saturation)
  )
  turn = draw(hue)
  changes = (
    lambda x: lit * x,
    lambda x: _blend(_gray(x).mean((1, 2), keepdims=True), x, spread),
    lambda x: _blend(_gray(x), x, colored),
    lambda x: _turn_hue(x, turn),
  )
  # Channels first, because NumPy is slow along an axis of 3.
  pixels = np.ascontiguousarray(np.moveaxis(images, -1, 0), np.float32)
  for n in rng.permutation(4):
    pixels = np.clip(changes[n](pixels), 0, 255)
  rounded = np.rint(pixels).astype(np.uint8)
  return np.ascontiguousarray(np.moveaxis(rounded, 0, -1))


def _gray(pixels: np.ndarray) -> np.ndarray:
  """Returns the gray [B, H, W] of colors [3, B, H, W]."""
  return np.tensordot(_LUMA, pixels, 1)


def _blend(start: np.ndarray, end: np.ndarray, share: np.ndarray) -> np.ndarray:
  return start + share * (end - start)


def _turn_hue(pixels: np.ndarray, turn: np.ndarray) -> np.ndarray:
  """Turns the hue of colors [3, B, H, W], keeping lightest and darkest."""
  red, green, blue = pixels
  value = pixels.max(0)
  chroma = value - pixels.min(0)
  # Gray has no hue: whatever is divided by 1 there is multiplied by 0 below.
  unit = np.where(chroma > 0, chroma, 1)
  sixths = np.where(
    value == red,
    (green - blue) / unit,
    np.where(value == green, 2 + (blue - red) / unit, 4 + (red - green) / unit),
  )
  sixths = (sixths + 6 * turn) % 6
  # How far each channel is lit: trapezoids around 0, 2 and 4 sixths.
  shares = np.stack(
    [abs(sixths - 3) - 1, 2 - abs(sixths - 2), 2 - abs(sixths - 4)]
  )
  return value - chroma * (1 - np.clip(shares, 0, 1))
