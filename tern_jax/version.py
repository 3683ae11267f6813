"""The version of the installed package, which checkpoints and files record."""

import importlib.metadata


def version_of(package: str) -> str:
  """Returns the version of an installed package.

  >>> version_of("no-such-package")
  'not installed'
  """
  try:
    return importlib.metadata.version(package)
  except importlib.metadata.PackageNotFoundError:
    return "not installed"


__version__ = version_of("tern_jax")
