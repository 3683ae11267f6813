"""A small data set of JPEG images that differ in size, as ImageNet's do."""

import io
from typing import ClassVar

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

CLASSES = 4


class Photos(tfds.core.GeneratorBasedBuilder, skip_registration=True):
  """Under ImageNet's name; the brightness of an image tells its label."""

  name = "imagenet2012"
  VERSION = tfds.core.Version("1.0.0")
  url_infos: ClassVar[dict] = {}
  sizes: ClassVar[dict[str, int]] = {"train": 40, "validation": 12}

  def _info(self):
    return tfds.core.DatasetInfo(
      builder=self,
      features=tfds.features.FeaturesDict(
        {
          "image": tfds.features.Image(encoding_format="jpeg"),
          "label": tfds.features.ClassLabel(num_classes=CLASSES),
          "file_name": tfds.features.Text(),
        }
      ),
    )

  def _split_generators(self, dl_manager):
    return {
      split: self._generate_examples(count, seed)
      for seed, (split, count) in enumerate(self.sizes.items())
    }

  def _generate_examples(self, count, seed):
    rng = np.random.default_rng(seed)
    for n in range(count):
      height, width = rng.integers(20, 60, 2)
      label = n % CLASSES
      # One in five is gray.
      channels = () if n % 5 == 0 else (3,)
      image = rng.integers(0, 64, (height, width, *channels)) + 60 * label
      file = io.BytesIO()
      Image.fromarray(image.astype(np.uint8)).save(file, "JPEG")
      # The image features of tfds need TensorFlow for arrays, not for files.
      yield (
        n,
        {"image": file.getvalue(), "label": label, "file_name": f"{n}.JPEG"},
      )


def prepare(data_dir):
  """Writes the set to a data directory."""
  Photos(data_dir=data_dir, file_format="array_record").download_and_prepare()
