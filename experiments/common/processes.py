"""Runs of several processes, as on the hosts of a TPU slice."""

import contextlib
import os
import socket
import sys
import traceback
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from experiments.common.errors import UsageError


@contextlib.contextmanager
def joined(distributed: bool) -> Iterator[None]:
  """Connects this process with the others of its run, before it uses jax.

  On Cloud TPU, Kubernetes, Slurm and Open MPI they find one another. Elsewhere
  JAX_COORDINATOR_ADDRESS (host:port of process 0), JAX_NUM_PROCESSES and
  JAX_PROCESS_ID say where they are.

  Args:
    distributed: whether there are others.
  """
  if not distributed:
    yield
    return
  given: dict[str, Any] = {
    name: int(os.environ[variable])
    for name, variable in (
      ("num_processes", "JAX_NUM_PROCESSES"),
      ("process_id", "JAX_PROCESS_ID"),
    )
    if variable in os.environ
  }
  # The service would swallow SIGTERM: asked by orbax, too, it tells one asker.
  jax.config.update("jax_enable_preemption_service", False)
  jax.distributed.initialize(**given)
  try:
    yield
  except BaseException as error:
    code = error.code if isinstance(error, SystemExit) else None
    if isinstance(code, int) and code > 128:
      raise  # It was asked to end, as were all.
    if not isinstance(error, SystemExit):
      traceback.print_exc()
    # A proper exit waits for the others, who may wait for this process.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) and code else 1)


def on_loopback(count: int, devices: int) -> list[dict[str, str]]:
  """Returns the environment of each process of a run on this machine's CPU.

  Args:
    count: processes; `joined` lets them find one another.
    devices: that each makes of the CPU.
  """
  with socket.socket() as free:
    free.bind(("localhost", 0))
    address = f"localhost:{free.getsockname()[1]}"
  return [
    {
      **os.environ,
      "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
      "JAX_PLATFORMS": "cpu",
      "JAX_COORDINATOR_ADDRESS": address,
      "JAX_NUM_PROCESSES": str(count),
      "JAX_PROCESS_ID": str(i),
    }
    for i in range(count)
  ]


def count() -> int:
  """Returns the number of processes, without a look at devices for one."""
  return jax.process_count() if jax.distributed.is_initialized() else 1


def leads() -> bool:
  """Whether this process is the one that writes."""
  return count() == 1 or jax.process_index() == 0


def wait_for_all(name: str) -> None:
  """Returns once all processes are here."""
  if count() > 1:
    multihost_utils.sync_global_devices(name)


@contextlib.contextmanager
def leader_first() -> Iterator[None]:
  """Lets the others in when the leader is through; if it fails, all of them do.

  Raises:
    UsageError: the leader failed.
  """
  if count() == 1:
    yield
  elif leads():
    fine = False
    try:
      yield
      fine = True
    finally:
      multihost_utils.broadcast_one_to_all(np.array(fine))
  else:
    if not multihost_utils.broadcast_one_to_all(np.array(False)):
      raise UsageError("the first process says what is wrong.")
    yield
