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

    python -m experiments.benchmarks.inference_models --artefacts

times the artefacts of `tern_jax.export.to_stablehlo`, as it writes them by
default and with `native=True`, and one of float weights, against one that
unpacks all weights at each call. On the same machine, and the
kB of the default:

  network, batch              unpacking µs  float  default  native  kB
  mlp, 1                              2026   1.76     1.61   13.85  1064
  mlp, 32                             4975   1.17     1.20    2.08  1064
  lenet5, 1                            196   1.21     1.08    1.23    29
  lenet5, 32                          3733   1.04     1.06    1.03    29
  resnet20, 1                         1792   1.11     1.01    0.98    99
  transformer, one token, 1          37765   4.19     6.62   17.20  3857
  transformer, one token, 32         44446   2.19     2.41    3.37  3857
"""

import dataclasses
import functools
import os
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import tyro

import tern_jax
from experiments.common import timing
from experiments.common.models import MLP, LeNet5, ResNet, Transformer
from experiments.common.tables import Table
from tern_jax.export import to_stablehlo
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
#: The same of artefacts.
ARTEFACTS = ("float", "default", "native")


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
    artefacts: time StableHLO artefacts.
  """

  models: tuple[str, ...] = tuple(MODELS)
  batches: tuple[int, ...] = (1, 32)
  cores: int = 1
  rounds: int = 9
  turn: float = 0.02
  sparsity: float = 0.5
  artefacts: bool = False


def network(
  options: ModelOptions, name: str, batch: int
) -> tuple[Callable[[Any, jax.Array], jax.Array], Any, jax.Array]:
  """Returns a forward pass, its packed weights and an input."""
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

  return forward, packed, x


def prepared_nets(
  options: ModelOptions, name: str, batch: int
) -> tuple[dict[str, Callable[[], jax.Array]], dict[str, float]]:
  """Returns {form: forward pass} and {form: bits of a ternary weight}."""
  forward, packed, x = network(options, name, batch)
  net = apply_fn(forward)
  weights = {
    "": tern_jax.unpack(packed),
    **{form: net.prepare(packed, x, activations=form) for form in FORMS},
  }
  programs: dict[str, Callable] = {
    form: jax.jit(net if form else forward) for form in weights
  }
  wanted = programs[""](weights[""], x)
  check(name, programs["float32"](weights["float32"], x), wanted)
  calls: dict[str, Callable[[], jax.Array]] = {
    form: functools.partial(programs[form], tree, x)
    for form, tree in weights.items()
  }
  return calls, {form: bits(weights[form]) for form in FORMS}


def artefacts(
  options: ModelOptions, name: str, batch: int
) -> tuple[dict[str, Callable[[], jax.Array]], dict[str, float]]:
  """Returns {form: forward pass} and {form: kilobytes of the artefact}."""
  forward, packed, x = network(options, name, batch)
  arrays, treedef = jax.tree.flatten(packed)

  def unpacking(arrays: Any, x: jax.Array) -> jax.Array:
    hidden = jax.lax.optimization_barrier(arrays)
    dense = tern_jax.unpack(jax.tree.unflatten(treedef, hidden))
    return forward(jax.lax.optimization_barrier(dense), x)

  write = functools.partial(to_stablehlo, None, platforms=("cpu",))
  written = {
    "": write(unpacking, arrays, x),
    "float": write(forward, tern_jax.unpack(packed), x),
    "default": write(forward, packed, x),
  }
  if cpu.isa():
    written["native"] = write(forward, packed, x, native=True)
  calls: dict[str, Callable[[], jax.Array]] = {}
  for form, data in written.items():
    net = jax.jit(jax.export.deserialize(bytearray(data)).call)
    calls[form] = functools.partial(net, x)
    check(name, calls[form](), calls[""]())
  return calls, {form: len(data) / 1000 for form, data in written.items()}


def check(name: str, found: jax.Array, wanted: jax.Array) -> None:
  """Raises if outputs differ by more than the order of sums explains."""
  error = jnp.max(jnp.abs(found - wanted))
  # Layers add up what the order of sums rounds otherwise.
  assert error <= 1e-4 * jnp.max(jnp.abs(wanted)), f"{name}: off by {error}"


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
  make, unit, forms = prepared_nets, "bits", FORMS
  if options.artefacts:
    make, unit, forms = artefacts, "kB", ("", *ARTEFACTS[: 2 + bool(cpu.isa())])
  timed = [form for form in forms if form]
  sizes_of = [f"{unit}, {form or 'unpacking'}" for form in forms]
  table = Table(("network, batch", "base µs", *timed, *sizes_of))
  results = []
  for name in options.models:
    for batch in options.batches:
      calls, sizes = make(options, name, batch)
      result = timing.ratios(calls, options.rounds, options.turn, clock)
      memory = {x: sizes[form] for x, form in zip(sizes_of, forms, strict=True)}
      results.append({**result, **memory})
      cells = (f"{result[form]:.2f}" for form in timed)
      shown = (f"{size:.2f}" for size in memory.values())
      base = f"{1e6 * result['']:.0f}"
      table.rows.append((f"{name}, {batch}", base, *cells, *shown))
  print(f"{options.cores} cores, {cpu.isa() or 'no native code'}")
  print(table.text())
  return results


if __name__ == "__main__":
  main(tyro.cli(ModelOptions))
