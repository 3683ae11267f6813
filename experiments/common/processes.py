"""Runs of several processes, as on the hosts of a TPU slice."""

import contextlib
import os
import socket
import sys
import traceback
from collections.abc import Iterator
from typing import Any

import jax
from jax.experimental import multihost_utils

from experiments.common.errors import INTERRUPTED


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
    if isinstance(error, SystemExit) and error.code == INTERRUPTED:
      raise  # So do all.
    if not isinstance(error, SystemExit):
      traceback.print_exc()
    # A proper exit waits for the others, who may wait for this process.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)


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


def leads() -> bool:
  """Whether this process is the one that writes."""
  return jax.process_index() == 0


def wait_for_all(name: str) -> None:
  """Returns once all processes are here."""
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(name)


@contextlib.contextmanager
def leader_first(name: str) -> Iterator[None]:
  """Lets the others in when the leader is through, be it by an error."""
  if not leads():
    wait_for_all(name)
  try:
    yield
  finally:
    if leads():
      wait_for_all(name)
