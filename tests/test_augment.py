import colorsys

import numpy as np
import pytest

from experiments.common.data import augment


def random_images(count, height=7, width=5):
  rng = np.random.default_rng(0)
  return rng.integers(0, 256, (count, height, width, 3), np.uint8)


def generator(seed=0):
  return np.random.default_rng(seed)


def jittered(images, seed=0, **strengths):
  """Jitters by the given strengths alone."""
  off = dict.fromkeys(("brightness", "contrast", "saturation", "hue"), 0.0)
  return augment.color_jitter(images, generator(seed), **off | strengths)


def solved(images, center, result):
  """The factor of each image by which pixels moved away from a center."""
  old, new = images - center, result - center
  # By least squares, to within what rounding hides.
  axes = (1, 2, 3)
  return (old * new).sum(axes) / (old * old).sum(axes)


def test_chain_applies_the_first_one_first():
  def double(images, rng):
    return images * np.uint8(2)

  def add(images, rng):
    return images + rng.integers(1, 2, images.shape, np.uint8)

  images = np.full((2, 1, 1, 1), 5, np.uint8)
  both = augment.chain(double, add)(images, generator())
  assert both.ravel().tolist() == [11, 11]
  assert augment.chain(add, double)(images, generator()).max() == 12
  assert augment.chain()(images, generator()) is images


@pytest.mark.parametrize(
  "change", [augment.flip_and_crop, augment.cutout, augment.color_jitter]
)
def test_all_follow_the_generator_and_leave_their_input_alone(change):
  images = random_images(16, 32, 32)
  before = images.copy()
  first = change(images, generator(3))
  assert (first.shape, first.dtype) == (images.shape, np.uint8)
  assert first.flags.c_contiguous
  np.testing.assert_array_equal(images, before)
  np.testing.assert_array_equal(first, change(images, generator(3)))
  assert not np.array_equal(first, change(images, generator(4)))
  # No two images of a batch are changed alike.
  same = change(np.stack([images[0]] * 8), generator(3))
  assert len({image.tobytes() for image in same}) > 4


def test_flip_and_crop_gives_every_shifted_mirror_image():
  image = np.arange(1, 31, dtype=np.uint8).reshape(5, 3, 2)
  padded = np.pad(image, ((1, 1), (1, 1), (0, 0)))
  expected = {
    padded[top : top + 5, left : left + 3][:, ::step].tobytes()
    for top in range(3)
    for left in range(3)
    for step in (-1, 1)
  }
  result = augment.flip_and_crop(np.stack([image] * 500), generator(), pad=1)
  assert (result.shape, result.dtype) == ((500, 5, 3, 2), np.uint8)
  assert {image.tobytes() for image in result} == expected


def triangles(old, new):
  """Weights [new, old] of linear resizing, of means where it gets smaller."""
  reach = max(old / new, 1)
  centers = (np.arange(new) + 0.5) * old / new
  away = np.abs(np.arange(old) + 0.5 - centers[:, None]) / reach
  weights = np.maximum(1 - away, 0)
  return weights / weights.sum(1, keepdims=True)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("shape", [(3, 2), (7, 5), (20, 13), (4, 15)])
def test_resizing_is_by_triangles(shape, channels):
  image = random_images(1)[0, ..., :channels]
  rows, columns = (
    triangles(old, new) for old, new in zip((7, 5), shape, strict=True)
  )
  expected = np.einsum("hH,wW,HWc->hwc", rows, columns, image.astype(float))
  result = augment.resize(image, *shape)
  assert (result.shape, result.dtype) == ((*shape, channels), np.uint8)
  # Rounded once after each axis.
  np.testing.assert_allclose(result, expected, atol=1.01)


@pytest.mark.parametrize(
  ("shape", "resized"), [((40, 64), (32, 51)), ((90, 45), (64, 32))]
)
def test_the_center_of_the_resized_image(shape, resized):
  image = random_images(1, *shape)[0]
  result = augment.center_crop(image, 28, 32)
  top, left = ((side - 28 + 1) // 2 for side in resized)
  whole = augment.resize(image, *resized)
  expected = whole[top : top + 28, left : left + 28]
  np.testing.assert_array_equal(result, expected)


def test_random_parts_are_of_all_allowed_sizes_at_all_places():
  # Rows in one channel and columns in another show what the part was.
  image = np.zeros((100, 80, 3), np.uint8)
  image[..., 0] = 2 * np.arange(100)[:, None]
  image[..., 1] = 3 * np.arange(80)
  parts = []
  rng = generator()
  for _ in range(2000):
    rows, columns = augment._draw_part(100, 80, rng)
    part = image[rows, columns, :2]
    assert part.size
    parts.append([*part[0, 0], *part[-1, -1]])
  top, left, bottom, right = np.array(parts, float).T / [[2], [3], [2], [3]]
  heights, widths = bottom - top + 1, right - left + 1
  share, ratio = heights * widths / 8000, widths / heights
  assert 0.07 < share.min() < 0.1
  assert 0.97 < share.max() <= 1
  # Large parts fit less often.
  assert 0.45 < share.mean() < 0.54
  assert ratio.min() == pytest.approx(3 / 4, abs=0.04)
  assert ratio.max() == pytest.approx(4 / 3, abs=0.04)
  for start, most in ((top, 100 - heights), (left, 80 - widths)):
    movable = most > 30
    where = start[movable] / most[movable]
    assert (where.min(), where.max()) == (0, 1)
    assert where.mean() == pytest.approx(0.5, abs=0.03)


def test_long_images_lose_their_ends():
  rng = generator()
  assert augment._draw_part(20, 400, rng) == (slice(0, 20), slice(186, 213))
  assert augment._draw_part(401, 20, rng) == (slice(187, 214), slice(0, 20))


def test_random_parts_are_resized_and_mirrored():
  image = np.zeros((40, 40, 3), np.uint8)
  image[..., 0] = 6 * np.arange(40)
  images = np.stack([image] * 200)
  before = images.copy()
  result = augment.random_resized_crop(images, generator(), size=12)
  assert (result.shape, result.dtype) == ((200, 12, 12, 3), np.uint8)
  np.testing.assert_array_equal(images, before)
  again = augment.random_resized_crop(images, generator(), size=12)
  np.testing.assert_array_equal(result, again)
  assert len({part.tobytes() for part in result}) > 150
  steps = np.sign(np.diff(result[..., 0].astype(int), axis=2)).mean((1, 2))
  assert set(np.abs(steps)) == {1}
  assert (steps > 0).mean() == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize("size", [1, 3, 4, 16])
def test_cutout_covers_every_square_around_a_pixel(size):
  expected = set()
  image = random_images(1)[0]
  for row in range(7):
    for column in range(5):
      top, left = row - size // 2, column - size // 2
      covered = image.copy()
      covered[max(top, 0) : top + size, max(left, 0) : left + size] = 9, 0, 255
      expected.add(covered.tobytes())
  images = np.stack([image] * 2000)
  result = augment.cutout(images, generator(), size, fill=[9.4, 0, 254.5001])
  assert {image.tobytes() for image in result} == expected


def test_cutout_is_black_where_not_told_otherwise():
  images = np.full((500, 9, 9, 1), 200, np.uint8)
  result = augment.cutout(images, generator(), 4)
  assert set(np.unique(result)) == {0, 200}
  # A square of 4 whose rows begin at -2 to 6 has 2, 3, 4, ..., 4 and 3 in 9.
  share = ((2 + 3 + 6 * 4 + 3) / 9 / 9) ** 2
  assert (result == 0).mean() == pytest.approx(share, abs=0.01)


def test_brightness_multiplies():
  images = random_images(400) // 2
  result = jittered(images, brightness=0.3)
  factors = solved(images.astype(float), 0, result)
  expected = images * factors[:, None, None, None]
  np.testing.assert_allclose(result, expected, atol=1)
  assert factors.min() == pytest.approx(0.7, abs=0.01)
  assert factors.max() == pytest.approx(1.3, abs=0.01)
  assert factors.mean() == pytest.approx(1, abs=0.03)


@pytest.mark.parametrize("change", ["contrast", "saturation"])
def test_contrast_and_saturation_scale_the_distance_from_gray(change):
  images = 64 + random_images(400) // 2
  gray = (images @ np.array([0.299, 0.587, 0.114]))[..., None]
  center = gray
  if change == "contrast":
    center = gray.mean((1, 2), keepdims=True)
  result = jittered(images, **{change: 0.3})
  factors = solved(images, center, result)
  expected = center + factors[:, None, None, None] * (images - center)
  np.testing.assert_allclose(result, expected, atol=1)
  assert factors.min() == pytest.approx(0.7, abs=0.01)
  assert factors.max() == pytest.approx(1.3, abs=0.01)
  assert factors.mean() == pytest.approx(1, abs=0.03)


def test_hue_turns_and_keeps_the_rest():
  images = random_images(50)
  result = jittered(images, hue=0.5)
  for old, new in zip(images, result, strict=True):
    pairs = [
      (colorsys.rgb_to_hsv(*a), colorsys.rgb_to_hsv(*b))
      for a, b in zip(
        old.reshape(-1, 3) / 255, new.reshape(-1, 3) / 255, strict=True
      )
    ]
    vivid = [(a, b) for a, b in pairs if a[1] * a[2] > 0.5]
    turns = np.exp([2j * np.pi * (b[0] - a[0]) for a, b in vivid])
    # One turn for the image, to within what rounding to 1/255 hides.
    np.testing.assert_allclose(turns, turns.mean(), atol=0.03)
    for a, b in pairs:
      np.testing.assert_allclose(a[2], b[2], atol=1e-9)
      np.testing.assert_allclose(a[1] * a[2], b[1] * b[2], atol=2.01 / 255)
  small = jittered(images, hue=0.075)
  assert not np.array_equal(small, images)
  # A sixth of the circle carries a channel all the way.
  assert np.abs(small - images.astype(int)).max() <= 255 * 6 * 0.075 + 1


def test_a_third_of_the_circle_permutes_the_channels():
  images = random_images(200)
  turned = augment._turn_hue(
    np.moveaxis(images, -1, 0).astype(np.float32), np.float32(1 / 3)
  )
  np.testing.assert_allclose(
    np.moveaxis(turned, 0, -1), images[..., [2, 0, 1]], atol=1e-3
  )


def test_gray_stays_gray():
  images = np.repeat(random_images(30)[..., :1], 3, -1)
  np.testing.assert_array_equal(jittered(images, hue=0.5), images)
  np.testing.assert_array_equal(jittered(images, saturation=1), images)
  result = augment.color_jitter(images, generator())
  assert np.ptp(result, -1).max() == 0


def test_jitter_without_strength_does_nothing():
  images = random_images(10)
  np.testing.assert_array_equal(jittered(images), images)


def test_values_are_clipped_not_wrapped():
  images = np.full((50, 2, 2, 3), 250, np.uint8)
  assert jittered(images, brightness=0.3).min() >= 0.7 * 250 - 1
  assert jittered(images, brightness=0.3).max() == 255


@pytest.mark.parametrize(
  ("order", "expected"),
  [
    # 100 and 210 become 130 and 255, of mean gray 192.5; 192.5 - 1.3 * 62.5.
    ([0, 1, 2, 3], [111, 255]),
    # 155 - 1.3 * 55 = 83.5, then 1.3 times that.
    ([3, 1, 2, 0], [109, 255]),
  ],
)
def test_the_order_of_the_changes_is_drawn(order, expected):
  class Fixed:
    def uniform(self, low, high, shape):
      return np.full(shape, high)

    def permutation(self, count):
      assert count == len(order)
      return order

  images = np.repeat(np.uint8([100, 210]), 3).reshape(1, 1, 2, 3)
  result = augment.color_jitter(images, Fixed())
  np.testing.assert_array_equal(result[0, 0], np.array([expected] * 3).T)


def test_gray_images_cannot_be_jittered():
  images = np.zeros((4, 7, 5, 1), np.uint8)
  with pytest.raises(ValueError, match=r"\(4, 7, 5, 1\), but it needs red"):
    augment.color_jitter(images, generator())
