"""Eight simulated devices, strict promotion; set before JAX starts."""

import os

os.environ["XLA_FLAGS"] = (
  os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)
# With fewer cores than simulated devices, older jaxlibs deadlock otherwise.
os.environ["NPROC"] = "16"

import jax
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")


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
