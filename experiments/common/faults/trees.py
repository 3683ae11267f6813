"""What all kinds of faults share: trees to save, and how they are compared."""

import logging
import multiprocessing
import sys
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tern_jax.core.containers import Ternary
from tern_jax.storage.packed import pack


def flat(tree: Any) -> list[tuple[str, tuple[int, ...], bytes]]:
  """Returns all there is to know about the arrays of a tree."""
  leaves = map(np.asarray, jax.tree.leaves(tree))
  return [(x.dtype.name, x.shape, x.tobytes()) for x in leaves]


def net(seed: int) -> dict[str, Any]:
  """Returns a small packed net."""
  rng = np.random.default_rng(seed)
  codes = jnp.asarray(rng.integers(-1, 2, (64, 24), np.int8))
  scales = jnp.asarray(rng.uniform(0.5, 1, (2, 1, 24)).astype(np.float32))
  return {
    "dense": {"kernel": pack(Ternary(codes, *scales))},
    "bias": jnp.asarray(rng.normal(size=24).astype(np.float32)),
    "empty": jnp.zeros((0, 3)),
  }


def hush() -> None:
  """Orbax reports each damage at length, and abandons coroutines."""
  logging.disable(logging.ERROR)
  warnings.filterwarnings("ignore", "coroutine", RuntimeWarning)
  sys.unraisablehook = lambda _: None


def processes() -> Any:
  """Returns what makes processes that have imported JAX, but not started it."""
  context = multiprocessing.get_context("forkserver")
  context.set_forkserver_preload(["tern_jax.checkpoint", "tern_jax.export"])
  return context
