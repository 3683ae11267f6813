"""Prepares a data set for the experiments, once.

  python -m experiments.prepare mnist --data-dir ~/tensorflow_datasets

downloads the original archive and writes it as array_record files, which are
then read without TensorFlow. Preparing needs it: `tern_jax[prepare]`. The
archives of some sets, such as imagenet2012, must be downloaded by hand: it then
says which, and where to put them.
"""

import difflib
import importlib.util
from pathlib import Path

import tensorflow_datasets as tfds
import tyro

from experiments.common import data, errors


def prepare(
  name: tyro.conf.Positional[str], /, data_dir: Path | None = None
) -> None:
  """Prepares a data set for the experiments.

  Args:
    name: Name in tensorflow-datasets, such as mnist, cifar10, cifar100 or
      imagenet2012, or digits.
    data_dir: Where to write it; None for $TFDS_DATA_DIR, else
      ~/tensorflow_datasets.

  Raises:
    SystemExit: The data set is unknown, or TensorFlow or archives are missing.
  """
  data_dir = data.resolve_data_dir(data_dir)
  try:
    source = data.load(name, "test", data_dir)
  except data.DataNotPreparedError:
    _download(name, data_dir)
    source = data.load(name, "test", data_dir)
  print(f"{name} is ready in {source.dataset_info.data_dir}")


def _download(name: str, data_dir: Path) -> None:
  known = tfds.list_builders(with_community_datasets=False)
  if name.split("/")[0] not in known:
    close = difflib.get_close_matches(name, known) or ["mnist", "cifar10"]
    raise SystemExit(
      f"Unknown data set {name!r}: give a name that tensorflow-datasets "
      f"knows, such as {', '.join(close)}."
    )
  if importlib.util.find_spec("tensorflow") is None:
    raise SystemExit(
      f"Preparing {name!r} needs TensorFlow, which is not installed. "
      'Install it with\n  pip install "tern_jax[prepare]"'
    )
  builder = tfds.builder(name, data_dir=data_dir, file_format="array_record")
  archives = data_dir / "downloads" / "manual"
  if builder.MANUAL_DOWNLOAD_INSTRUCTIONS and not archives.is_dir():
    told = " ".join(builder.MANUAL_DOWNLOAD_INSTRUCTIONS.split())
    raise SystemExit(
      f"The archives of {name!r} must be downloaded by hand. Put them into\n"
      f"  {archives}\nwhich is the manual_dir here, and repeat the command:\n"
      f"{told}"
    )
  builder.download_and_prepare()


if __name__ == "__main__":
  with errors.explained():
    tyro.cli(prepare)
