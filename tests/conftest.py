"""Eight simulated devices, strict promotion; set before JAX starts."""

import os

os.environ["XLA_FLAGS"] = (
  os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)
# With fewer cores than simulated devices, older jaxlibs deadlock otherwise.
os.environ["NPROC"] = "16"

import jax

jax.config.update("jax_numpy_dtype_promotion", "strict")
