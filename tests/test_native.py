"""The native code by itself: sanitizers, an emulated processor, threads."""

import pathlib
import shutil
import subprocess
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tern_jax import Ternary, pack
from tern_jax.inference import cpu, dot, prepare

ROOT = pathlib.Path(__file__).parents[1]
SOURCES = ROOT / "tern_jax" / "inference" / "csrc"

pytestmark = pytest.mark.long


def run(tmp_path, compiler, flags, arguments, emulator=()):
  """Compiles tests/native.cc with the products, without XLA, and runs it."""
  if shutil.which(compiler) is None:
    pytest.skip(f"{compiler} is not installed")
  if emulator and shutil.which(emulator[0]) is None:
    pytest.skip(f"{emulator[0]} is not installed")
  names = "product", "convolution", "avx2", "avx512", "neon"
  files = [
    ROOT / "tests" / "native.cc",
    *(SOURCES / f"{name}.cc" for name in names),
  ]
  program = tmp_path / "native"
  always = ("-std=c++17", "-ffp-contract=off", "-w", "-pthread")
  subprocess.run(
    [compiler, *always, *flags, f"-I{SOURCES}", *files, "-o", program],
    check=True,
  )
  subprocess.run([*emulator, program, *arguments], check=True, timeout=1200)


def test_no_address_or_undefined_behavior_is_wrong(tmp_path):
  flags = "-fsanitize=address,undefined", "-fno-sanitize-recover=all"
  run(tmp_path, "g++", ("-O1", "-g", *flags), ("300", "400"))


def test_threads_do_not_race(tmp_path):
  run(tmp_path, "g++", ("-O1", "-g", "-fsanitize=thread"), ("10", "100"))


def test_ten_thousand_runs_from_four_threads_are_equal(tmp_path):
  run(tmp_path, "g++", ("-O3",), ("0", "10000"))


def test_neon_under_emulation(tmp_path):
  emulator = "qemu-aarch64", "-cpu", "max"
  flags = "-O2", "-static"
  run(tmp_path, "aarch64-linux-gnu-g++", flags, ("100", "40"), emulator)


@pytest.mark.skipif(cpu.isa() is None, reason="there is no native code here")
@pytest.mark.parametrize("activations", ["float32", "int8"])
def test_threads_of_python_get_equal_bits(activations):
  rng = np.random.default_rng(0)
  codes = jnp.asarray(rng.integers(-1, 2, (512, 1024)), jnp.int8)
  one = jnp.ones(())
  w = prepare(pack(Ternary(codes, one, one)), activations)
  x = jnp.asarray(rng.normal(size=(32, 512)), jnp.float32)
  product = jax.jit(dot)
  wanted = np.asarray(product(x, w))
  wrong = []

  def call():
    for _ in range(250):
      if not np.array_equal(product(x, w), wanted):
        wrong.append(1)

  threads = [threading.Thread(target=call) for _ in range(4)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join(300)
    assert not thread.is_alive()
  assert not wrong
