"""How fast whole networks run on packed weights, beside float ones.

    python -m experiments.benchmarks.inference_models --cores 1

`tern_jax.inference.apply_fn` runs each network as it is, on weights that
`prepare` has laid out, for float32 and for int8 activations. The programs run
in turns in one process; a figure is the median ratio of the times of
neighboring turns, CPU time on one core and wall time on several. Bits are those
in memory of a ternary weight, scales included. Kernels are ternary, by TWN at
random weights; embeddings, norms and biases are floats.

Measured on one core with AVX-512, jax 0.10.2, on a busy machine: times as fast
as floats, and bits of a ternary weight.

  network, batch              float µs  float32   int8  bits
  mlp, 1                           490     4.03   8.72  2.00
  mlp, 32                         4236     1.88   5.71  2.00
  lenet5, 1                        158     1.92   1.50  2.04
  lenet5, 32                      3856     3.49   2.21  2.04
  resnet20, 1                     1821     1.15   1.32  2.01
  resnet20, 32                   40596     1.27   1.50  2.01
  transformer, 1                 22479     1.47   3.31  2.00
  transformer, 32               586106     1.17   2.25  2.00
  transformer, one token, 1       4199     3.29   3.70  2.00
  transformer, one token, 32     18584     2.25   4.74  2.00

Of int8 convolutions each patch is rounded by its own largest magnitude, which
takes most of the time of layers of few channels: those of LeNet-5 are faster
with float activations.
"""

import dataclasses
import functools
import os
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import tyro

import tern_jax
from experiments.common import timing
from experiments.common.models import MLP, LeNet5, ResNet, Transformer
from experiments.common.tables import Table
from tern_jax.inference import Prepared, apply_fn, cpu

#: Network and shape of an example, of images or of tokens.
MODELS: dict[str, tuple[Any, tuple[int, ...]]] = {
  "mlp": (MLP(classes=10, hidden=(1024, 1024)), (32, 32, 3)),
  "lenet5": (LeNet5(classes=10), (28, 28, 1)),
  "resnet20": (ResNet(blocks=3, classes=10), (32, 32, 3)),
  "transformer": (
    Transformer(layers=4, width=512, context=64, classes=256),
    (64,),
  ),
  "transformer, one token": (
    Transformer(layers=4, width=512, context=64, classes=256),
    (1,),
  ),
}
FORMS = ("float32", "int8")


@dataclasses.dataclass
class ModelOptions:
  """Command line of the benchmark.

  Attributes:
    models: some of mlp, lenet5, resnet20, transformer.
    batches: examples.
    cores: cores that the process may use.
    rounds: turns, of which the median ratio is reported.
    turn: seconds of a turn, at least one call.
    sparsity: share of zeros among ternary weights.
  """

  models: tuple[str, ...] = tuple(MODELS)
  batches: tuple[int, ...] = (1, 32)
  cores: int = 1
  rounds: int = 9
  turn: float = 0.02
  sparsity: float = 0.5


def networks(
  options: ModelOptions, name: str, batch: int
) -> tuple[dict[str, Callable[[], jax.Array]], dict[str, float]]:
  """Returns {form: forward pass} and {form: bits of a ternary weight}."""
  model, shape = MODELS[name]
  if len(shape) == 1:
    x = jnp.arange(batch * shape[0]).reshape(batch, *shape) % 256
  else:
    x = jax.random.normal(jax.random.key(0), (batch, *shape))
  init = jax.jit(functools.partial(model.init, train=False))
  variables = init(jax.random.key(1), x)
  method = tern_jax.TWN(sparsity=options.sparsity)
  stacked = ("blocks",) if "blocks" in variables["params"] else ()
  tern = tern_jax.ParamTransform(method, tern_jax.kernels(), stacked=stacked)
  packed = tern_jax.pack(tern.finalize(*tern.init(variables["params"])))
  rest = {k: v for k, v in variables.items() if k != "params"}

  def forward(params: Any, x: jax.Array) -> jax.Array:
    return model.apply({"params": params, **rest}, x, train=False)

  net = apply_fn(forward)
  weights = {
    "": tern_jax.unpack(packed),
    **{form: net.prepare(packed, x, activations=form) for form in FORMS},
  }
  programs: dict[str, Callable] = {
    form: jax.jit(net if form else forward) for form in weights
  }
  wanted = programs[""](weights[""], x)
  error = jnp.max(jnp.abs(programs["float32"](weights["float32"], x) - wanted))
  # Layers add up what the order of sums rounds otherwise.
  assert error <= 1e-4 * jnp.max(jnp.abs(wanted)), f"{name}: off by {error}"
  calls: dict[str, Callable[[], jax.Array]] = {
    form: functools.partial(programs[form], tree, x)
    for form, tree in weights.items()
  }
  return calls, {form: bits(weights[form]) for form in FORMS}


def bits(tree: Any) -> float:
  """Returns the bits in memory of a ternary weight of a tree."""
  ternary = tern_jax.PackedTernary | Prepared
  leaves = jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, ternary))
  leaves = [x for x in leaves if isinstance(x, ternary)]
  return 8 * sum(x.nbytes for x in leaves) / sum(x.size for x in leaves)


def main(options: ModelOptions) -> list[dict[str, float]]:
  """Runs the benchmark; returns and prints how many times as fast they are."""
  # Before JAX starts: its threads are as many as the cores.
  os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.cores])
  clock = time.process_time if options.cores == 1 else time.perf_counter
  head = "network, batch", "float µs", *FORMS, *(f"bits, {x}" for x in FORMS)
  table, results = Table(head), []
  for name in options.models:
    for batch in options.batches:
      calls, sizes = networks(options, name, batch)
      result = timing.ratios(calls, options.rounds, options.turn, clock)
      results.append({**result, **{f"bits, {x}": sizes[x] for x in FORMS}})
      cells = (f"{result[form]:.2f}" for form in FORMS)
      memory = (f"{sizes[form]:.2f}" for form in FORMS)
      figures = (f"{1e6 * result['']:.0f}", *cells, *memory)
      table.rows.append((f"{name}, {batch}", *figures))
  print(f"{options.cores} cores, {cpu.isa() or 'no native code'}")
  print(table.text())
  return results


if __name__ == "__main__":
  main(tyro.cli(ModelOptions))
