"""Which version of a package wrote a file."""

import importlib.metadata


def version(package: str = "tern_jax") -> str:
  """Returns the version of an installed package, or "not installed"."""
  try:
    return importlib.metadata.version(package)
  except importlib.metadata.PackageNotFoundError:
    return "not installed"
