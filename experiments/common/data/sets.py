"""The data sets by name; a new one is an entry here.

Any other set of images that tensorflow-datasets knows works by its name, too.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path

from experiments.common.data import digits


@dataclasses.dataclass(frozen=True)
class DataSet:
  """What is to be known of a data set beside its files.

  Attributes:
    title: What tables call it; None for its name.
    prepare: Writes it to a data directory and returns where, on first use;
      None for what must be prepared by `experiments.prepare`.
    has_test_labels: Whether its test images have public labels. Otherwise the
      world tests on validation.
  """

  title: str | None = None
  prepare: Callable[[Path], Path] | None = None
  has_test_labels: bool = True


SETS = {
  "digits": DataSet(prepare=digits.prepare),
  "mnist": DataSet("MNIST"),
  "fashion_mnist": DataSet("Fashion-MNIST"),
  "cifar10": DataSet("CIFAR-10"),
  "cifar100": DataSet("CIFAR-100"),
  "imagenet2012": DataSet("ImageNet", has_test_labels=False),
}
