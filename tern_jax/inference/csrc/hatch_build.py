"""Compiles the native code of tern_jax.inference, where there is a compiler.

Without one, or if it fails, tern_jax is installed all the same, and multiplies
by XLA's operations. `pip install -v` shows what the compiler said.
"""

import importlib.util
import os
import pathlib
import runpy
import shlex
import shutil
import subprocess
import sysconfig
import tempfile
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

ROOM = pathlib.Path("tern_jax", "inference")
LIBRARY = "_kernels.so"
FLAGS = (
  *("-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-w"),
  # Products of rounded activations are the same on all machines.
  "-ffp-contract=off",
)


def compiler() -> list[str] | None:
  """Returns the command of a C++ compiler, CXX if that is set."""
  if chosen := os.environ.get("CXX"):
    return shlex.split(chosen)
  found = (shutil.which(name) for name in ("c++", "g++", "clang++"))
  return next(([path] for path in found if path), None)


def headers() -> pathlib.Path:
  """Returns the folder of XLA's headers, those of the jaxlib that is here.

  In a build it is the oldest that tern_jax supports: a library that newer
  headers made would stop older jaxlibs from starting.

  Raises:
    RuntimeError: there is none.
  """
  spec = importlib.util.find_spec("jaxlib")
  if spec is None or not spec.submodule_search_locations:
    raise RuntimeError("jaxlib is missing, which has XLA's headers")
  return pathlib.Path(spec.submodule_search_locations[0], "include")


def compile_library(
  command: list[str], source: pathlib.Path, to: pathlib.Path
) -> None:
  """Compiles all files of a folder, side by side, and links them.

  Raises:
    RuntimeError: there are no headers, or with what the compiler said.
  """
  digest = runpy.run_path(str(source.with_name("sources.py")))["digest"]
  made_of = f'-DTERN_JAX_SOURCES="{digest(source)}"'
  options = [*FLAGS, f"-I{source}", f"-I{headers()}", made_of]
  with tempfile.TemporaryDirectory() as scratch:
    started = []
    for file in sorted(source.glob("*.cc")):
      out = pathlib.Path(scratch, f"{file.stem}.o")
      call = [*command, *options, "-c", str(file), "-o", str(out)]
      started.append((out, _start(call)))
    for _, process in started:
      _finish(process)
    built = pathlib.Path(scratch, LIBRARY)
    objects = [str(out) for out, _ in started]
    _finish(_start([*command, "-shared", *objects, "-o", str(built)]))
    # At one stroke: the old library may be in use.
    staged = to.with_name(f"{to.name}.new")
    shutil.copy(built, staged)
    staged.replace(to)


def _start(call: list[str]) -> subprocess.Popen:
  return subprocess.Popen(
    call, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
  )


def _finish(process: subprocess.Popen) -> None:
  output, _ = process.communicate()
  if process.returncode:
    raise RuntimeError(output)


class NativeCode(BuildHookInterface):
  """Adds the library to wheels, and to the clone of an editable install."""

  def initialize(self, version: str, build_data: dict[str, Any]) -> None:
    """Compiles, and marks the wheel as one for this platform."""
    library = pathlib.Path(self.root, ROOM, LIBRARY)
    library.unlink(missing_ok=True)  # of other sources, in a clone
    command = compiler()
    if command is None:
      self.app.display_warning("no C++ compiler: the native code is left out")
      return
    try:
      compile_library(command, library.with_name("csrc"), library)
    except (OSError, RuntimeError) as error:
      self.app.display_warning(f"the native code is left out: {error}")
      return
    build_data["artifacts"].append(str(ROOM / LIBRARY))
    build_data["pure_python"] = False
    platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
    build_data["tag"] = f"py3-none-{platform}"
