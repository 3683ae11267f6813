"""What multiplies packed weights on the machine at hand, and how fast."""

import functools
import os
import statistics
import time
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from tern_jax.core.containers import Ternary
from tern_jax.core.types import Array
from tern_jax.inference import cpu
from tern_jax.inference.multiply import dot
from tern_jax.inference.preparation import lay_out
from tern_jax.inference.prepared import ACTIVATIONS
from tern_jax.storage.leaves import Json

_ROUNDS = 5


def examine(n: int = 2048, batches: tuple[int, ...] = (1, 32)) -> Json:
  """Returns the platform, the native code that is used, and its speed.

  Speed is that of random weights [n, n], prepared, beside XLA's product with
  float weights: medians of times that are taken in turns.

  Args:
    n: inputs and outputs.
    batches: rows of the float array.
  """
  device = jax.devices()[0]
  try:
    isa, reason = cpu.load(), ""
  except cpu.UnavailableError as error:
    isa, reason = None, str(error)
  return {
    "platform": device.platform,
    "device": device.device_kind,
    "cores": _cores(),
    "native": isa,
    "reason": reason,
    "cap": os.environ.get(cpu.VARIABLE, ""),
    "products": list(_products(n, batches)),
  }


def lines(found: Json) -> Iterator[str]:
  """Yields what `examine` found as text."""
  yield f"platform: {found['platform']}, {found['device']}"
  yield f"cores: {found['cores']}"
  if found["native"] is None:
    yield f"native code: not used, {found['reason']}"
  else:
    used = "used" if found["platform"] == "cpu" else "there, but for CPUs only"
    capped = f", capped by {cpu.VARIABLE}" if found["cap"] else ""
    yield f"native code: {used}, {found['native']}{capped}"
  for x in found["products"]:
    yield (
      f"{x['activations']} activations, [{x['batch']}, {x['n']}] @"
      f" [{x['n']}, {x['n']}]: {1e6 * x['seconds']:.0f} µs,"
      f" {x['times']:.1f} times as fast as float weights;"
      f" {x['layout']}, {x['bits']:.2f} bits a weight"
    )


def _cores() -> int | None:
  if hasattr(os, "sched_getaffinity"):
    return len(os.sched_getaffinity(0))
  return os.cpu_count()


def _products(n: int, batches: tuple[int, ...]) -> Iterator[Json]:
  rng = np.random.default_rng(0)
  codes = jnp.asarray(rng.integers(-1, 2, (n, n)), jnp.int8)
  one = jnp.ones((), jnp.float32)
  weights = Ternary(codes, one, one)
  dense = weights.dequantize()
  product, float_product = jax.jit(dot), jax.jit(jnp.matmul)
  for activations in ACTIVATIONS:
    w = lay_out(weights, (0,), activations)
    for batch in batches:
      x = jnp.asarray(rng.normal(size=(batch, n)), jnp.float32)
      own = functools.partial(product, x, w)
      base = functools.partial(float_product, x, dense)
      seconds, times = _compare(own, base)
      yield {
        "activations": activations,
        "batch": batch,
        "n": n,
        "seconds": seconds,
        "times": times,
        "layout": w.layout,
        "bits": 8 * w.nbytes / w.size,
      }


def _compare(
  own: Callable[[], Array], base: Callable[[], Array]
) -> tuple[float, float]:
  """Returns the time of one call, and how many times faster it is."""

  def seconds(call: Callable[[], Array]) -> float:
    start = time.perf_counter()
    for _ in range(3):
      jax.block_until_ready(call())
    return (time.perf_counter() - start) / 3

  seconds(own), seconds(base)  # compiles
  times = [(seconds(own), seconds(base)) for _ in range(_ROUNDS)]
  took = statistics.median(t for t, _ in times)
  return took, statistics.median(b / t for t, b in times)
