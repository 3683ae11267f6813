"""The directory of prepared data sets, and what lies in it."""

import importlib.util
import os
from pathlib import Path

import tensorflow_datasets as tfds

from experiments.common.errors import DataNotPreparedError


def resolve_data_dir(data_dir: str | os.PathLike | None = None) -> Path:
  """Returns the directory of prepared data sets.

  Args:
    data_dir: The directory, or None for `$TFDS_DATA_DIR`, or where that is not
      set `~/tensorflow_datasets`.

  Returns:
    The path, with `~` expanded.

  Raises:
    DataNotPreparedError: It is in a bucket, or nothing here can read it.
  """
  if importlib.util.find_spec("array_record") is None:
    raise DataNotPreparedError(
      "Data sets are read by the package array_record, which is not here: pip"
      " install 'tern_jax[data]'. It has no wheels for Windows: use Linux,"
      " macOS or the Windows Subsystem for Linux."
    )
  default = os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")
  place = os.fspath(default if data_dir is None else data_dir)
  if "://" in place:
    raise DataNotPreparedError(
      f"{place} is in a bucket, but array_record reads files only: copy it to"
      " a directory, or mount the bucket as one, and give that as"
      " TFDS_DATA_DIR or data_dir."
    )
  return Path(place).expanduser()


def find_version(name: str, data_dir: Path) -> Path | None:
  """Returns the directory of the newest prepared version, None if none."""
  # Directories still being written are named `incomplete.*`: no version.
  versions = [
    path.parent
    for path in (data_dir / name).glob("*/features.json")
    if tfds.core.Version.is_valid(path.parent.name)
  ]
  return max(
    versions, key=lambda path: tfds.core.Version(path.name), default=None
  )


def is_prepared(name: str, data_dir: str | os.PathLike | None = None) -> bool:
  """Whether a data set is in a data directory, see `resolve_data_dir`."""
  return find_version(name, resolve_data_dir(data_dir)) is not None


def prepared(data_dir: Path) -> str:
  """Returns the names of the sets in a data directory, for a message."""
  paths = sorted(data_dir.iterdir()) if data_dir.is_dir() else []
  names = [path.name for path in paths if find_version(path.name, data_dir)]
  return ", ".join(names) or "no data sets"


def command(name: str, data_dir: Path) -> str:
  """Returns the command that prepares a data set."""
  return (
    'pip install "tern_jax[prepare]" && '
    f"python -m experiments.prepare {name} --data-dir {data_dir}"
  )
