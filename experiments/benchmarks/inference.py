"""How fast products by packed weights are, beside XLA's by float weights.

    python -m experiments.benchmarks.inference --cores 1

Every program runs in turns with `jax.jit(x @ w)` in one process; a figure is
the median ratio of the times of neighboring turns, CPU time on one core and
wall time on several. The float weights, the columns of tiles and those in XLA's
operations are a third zeros; the lists are of weights with more.

`TERN_JAX_CPU=avx2` caps the instruction set, `off` leaves the native code out.

Measured on one core of a Zen 4 with AVX-512 and VNNI, jax 0.10.2, times as fast
as float weights, for which XLA uses AVX-512 throughout:

  4096, rows             1     8    32   128
  float32             11.6   3.8   1.9   1.4
  int8                33.2  12.3   5.7   4.4
  lists, 90 % zeros    8.1   8.5   6.6   4.9
  lists, 98 % zeros   32.7  35.2  24.1  18.1
  1024, rows             1     8    32   128
  float32              3.0   1.4   1.5   1.3
  int8                 5.4   3.7   4.3   3.9
  AVX2, 4096, rows       1     8    32   128
  float32              5.2   1.4   1.2   1.0
  int8                19.9   6.7   3.5   2.7
  XLA, 4096, rows        1     8    32   128
  float32              1.0   1.3   0.9   0.8
  int8                 9.2   2.8   1.3   1.0
"""

import dataclasses
import functools
import os
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from experiments.common import timing
from experiments.common.tables import Table
from tern_jax import Ternary
from tern_jax.inference import cpu, dot
from tern_jax.inference.prepared import prepared_of

#: Title, layout, activations and share of zeros.
XLA = (
  ("xla float32", "fields", "float32", 1 / 3),
  ("xla int8", "words", "int8", 1 / 3),
)
NATIVE = (
  ("float32", "tiles", "float32", 1 / 3),
  ("int8", "tiles", "int8", 1 / 3),
  ("lists 90 %", "lists", "float32", 0.9),
  ("lists 98 %", "lists", "float32", 0.98),
)


@dataclasses.dataclass
class InferenceOptions:
  """Command line of the benchmark.

  Attributes:
    sizes: inputs and outputs of square matrices.
    batches: rows of x.
    cores: cores that the process may use.
    rounds: turns, of which the median ratio is reported.
    turn: seconds of a turn, at least one call.
    two: whether positive and negative weights have magnitudes of their own.
  """

  sizes: tuple[int, ...] = (4096, 1024)
  batches: tuple[int, ...] = (1, 8, 32, 128)
  cores: int = 1
  rounds: int = 7
  turn: float = 0.02
  two: bool = False


def ternary(n: int, zeros: float, two: bool) -> Ternary:
  """Returns random weights with one scale for each output."""
  rng = np.random.default_rng(0)
  share = (1 - zeros) / 2
  codes = rng.choice(3, (n, n), p=[share, zeros, share]) - 1
  w_p = jnp.asarray(rng.uniform(0.5, 2, (1, n)), jnp.float32)
  return Ternary(jnp.asarray(codes, jnp.int8), w_p, 2 * w_p if two else w_p)


def ratios(
  options: InferenceOptions, n: int, batch: int, clock: Callable
) -> dict[str, float]:
  """Returns the median time of XLA's product, and how many times faster."""
  rng = np.random.default_rng(1)
  x = jnp.asarray(rng.normal(size=(batch, n)), jnp.float32)
  dense = ternary(n, 1 / 3, options.two).dequantize()
  float_product = jax.jit(jnp.matmul)
  forms = XLA + (NATIVE if cpu.isa() else ())
  product = jax.jit(dot)
  calls = {"": functools.partial(float_product, x, dense)}
  for title, layout, activations, zeros in forms:
    w = prepared_of(ternary(n, zeros, options.two), (0,), layout, activations)
    calls[title] = functools.partial(product, x, w)
  return timing.ratios(calls, options.rounds, options.turn, clock)


def main(options: InferenceOptions) -> list[dict[str, float]]:
  """Runs the benchmark; returns and prints the ratios of XLA's product."""
  # Before JAX starts: its threads are as many as the cores.
  os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.cores])
  clock = time.process_time if options.cores == 1 else time.perf_counter
  titles = [title for title, *_ in XLA + (NATIVE if cpu.isa() else ())]
  table = Table(("matrix, batch", "float µs", *titles))
  results = []
  for n in options.sizes:
    for batch in options.batches:
      result = ratios(options, n, batch, clock)
      results.append(result)
      cells = (f"{result[title]:.2f}" for title in titles)
      table.rows.append((f"{n}, {batch}", f"{1e6 * result['']:.0f}", *cells))
  print(f"{options.cores} cores, {cpu.isa() or 'no native code'}")
  print(table.text())
  return results


if __name__ == "__main__":
  main(tyro.cli(InferenceOptions))
