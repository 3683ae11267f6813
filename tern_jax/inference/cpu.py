"""The native code: whether it is there, fits, and what it uses here."""

import contextlib
import ctypes
import functools
import logging
import os
import pathlib
import re

import jax

from tern_jax.inference.sources import digest

#: Instruction sets, best first, in the order of csrc/product.h.
ISAS = ("avx512", "avx2", "neon")
#: An instruction set not to go beyond, or "off".
VARIABLE = "TERN_JAX_CPU"

_LIBRARY = pathlib.Path(__file__).with_name("_kernels.so")
#: What programs call.
TARGETS = (
  "tern_jax_tiles",
  "tern_jax_lists",
  "tern_jax_convolution",
  "tern_jax_list_convolution",
)
_log = logging.getLogger("tern_jax")


class UnavailableError(Exception):
  """Why there is no native code here."""


@functools.cache
def isa() -> str | None:
  """Returns the instruction set that products use, None without native code.

  The environment variable TERN_JAX_CPU caps it. Says so, once, if weights will
  be multiplied by XLA's operations for lack of native code.

  Raises:
    ValueError: TERN_JAX_CPU is neither an instruction set that is here nor off.
  """
  try:
    return load()
  except UnavailableError as error:
    if os.environ.get(VARIABLE) != "off":
      _log.warning("tern_jax multiplies by XLA's operations: %s", error)
    return None


@functools.cache
def load() -> str:
  """Registers the native code; returns the instruction set that it uses.

  Raises:
    UnavailableError: it cannot be used, with the reason.
    ValueError: as in `isa`.
  """
  return _registered()


def register() -> None:
  """Registers the native code, if it is there, for programs that call it.

  Why it cannot be used, and what is wrong with TERN_JAX_CPU, is said by `isa`,
  when weights are multiplied.
  """
  with contextlib.suppress(UnavailableError, ValueError):
    _registered()


def _registered() -> str:
  wanted = os.environ.get(VARIABLE, "")
  if wanted not in ("", "off", *ISAS):
    known = ", ".join((*ISAS, "off"))
    raise ValueError(f"{VARIABLE} must be one of {known}, got {wanted!r}.")
  if wanted == "off":
    raise UnavailableError(f"{VARIABLE}=off")
  library = _opened()
  here = [x for i, x in enumerate(ISAS) if library.tern_jax_has_isa(i)]
  if wanted and wanted not in here:
    raise ValueError(
      f"{VARIABLE}={wanted}, but this machine has {', '.join(here) or 'none'}"
      f" of {', '.join(ISAS)}."
    )
  if not here:
    raise UnavailableError(f"this processor has none of {', '.join(ISAS)}")
  for name in TARGETS:
    capsule = jax.ffi.pycapsule(getattr(library, name))
    jax.ffi.register_ffi_target(name, capsule, platform="cpu")
  used = wanted or here[0]
  library.tern_jax_use_isa(ISAS.index(used))
  return used


def _opened() -> ctypes.CDLL:
  if not _LIBRARY.exists():
    raise UnavailableError(
      "the native code was not compiled when tern_jax was installed. Install a"
      " C++17 compiler, and tern_jax again; pip install -v shows what is wrong."
    )
  try:
    library = ctypes.CDLL(str(_LIBRARY))
  except OSError as error:
    raise UnavailableError(f"it cannot be loaded: {error}") from None
  built = library.tern_jax_api_major(), library.tern_jax_api_minor()
  runs = _api_version()
  # A newer interface than jaxlib's stops its CPU backend from starting at all.
  if built[0] != runs[0] or built > runs:
    raise UnavailableError(
      f"it was compiled for version {built[0]}.{built[1]} of XLA's interface,"
      f" and jaxlib has {runs[0]}.{runs[1]}. Install tern_jax again."
    )
  sources = _LIBRARY.with_name("csrc")
  # Wheels have none: their library cannot be of others.
  if sources.is_dir() and _digest_of(library) != digest(sources):
    raise UnavailableError(
      f"it was not compiled from the sources in {sources}, which have changed."
      " Install tern_jax again."
    )
  return library


def _digest_of(library: ctypes.CDLL) -> str:
  """Returns the digest of the sources of a library."""
  call = getattr(library, "tern_jax_sources", None)
  if call is None:
    return ""
  call.restype = ctypes.c_char_p
  return call().decode()


def _api_version() -> tuple[int, int]:
  """Returns the version of the interface that the installed jaxlib has."""
  header = pathlib.Path(jax.ffi.include_dir(), "xla/ffi/api/c_api.h")
  try:
    text = header.read_text()
  except OSError as error:
    raise UnavailableError(f"jaxlib has no headers: {error}") from None
  major, minor = (
    re.search(rf"#define XLA_FFI_API_{part} (\d+)", text)
    for part in ("MAJOR", "MINOR")
  )
  if not major or not minor:
    raise UnavailableError(f"{header} does not say its version")
  return int(major[1]), int(minor[1])
