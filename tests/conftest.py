"""Eight devices, quick compilation, no promotion; set before JAX starts."""

import collections
import contextlib
import gc
import os
import shutil
import signal
import tempfile

# Most of a run's time is compilation. Flags that are given come last and win:
# .ci/run tests level 3, which users run, on one of its stacks.
os.environ["XLA_FLAGS"] = (
  "--xla_backend_optimization_level=0 --xla_force_host_platform_device_count=8 "
  + os.environ.get("XLA_FLAGS", "")
)
# With fewer cores than simulated devices, older jaxlibs deadlock otherwise.
os.environ["NPROC"] = "16"
os.environ["KERAS_BACKEND"] = "jax"
# The same programs are compiled where a run is resumed or evaluated in a fresh
# process. Each worker has a cache of its own, because entries are not written
# at one stroke.
os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp()
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"

import jax
import pytest

# What a shell starts in the background ignores Ctrl-C, and so would all that
# the tests start.
with contextlib.suppress(ValueError):  # not the main thread
  if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
  if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
  """Marks all but every n-th row of a test marked sample(n) as long."""
  seen = collections.Counter()
  for item in items:
    if marker := item.get_closest_marker("sample"):
      test = item.nodeid.partition("[")[0]
      if seen[test] % marker.args[0]:
        item.add_marker(pytest.mark.long)
      seen[test] += 1


def pytest_collection_finish():
  # What is there now stays; looking it through again and again takes time.
  gc.collect()
  gc.freeze()
  gc.set_threshold(50_000, 20, 20)


def pytest_unconfigure():
  shutil.rmtree(os.environ["JAX_COMPILATION_CACHE_DIR"])


@pytest.fixture
def standard_promotion():
  """For tests through optax.adam, which mixes floats with an int32 count."""
  with jax.numpy_dtype_promotion("standard"):
    yield


@pytest.fixture(scope="module")
def standard_promotion_throughout():
  """The same for a whole module, its own fixtures included."""
  with jax.numpy_dtype_promotion("standard"):
    yield


@pytest.fixture
def call(capsys):
  """Runs the command `tern_jax`; returns its status, output and errors."""
  from tern_jax import __main__

  def run(*args):
    status = __main__.main([str(arg) for arg in args])
    out, err = capsys.readouterr()
    return status, out, err

  return run
