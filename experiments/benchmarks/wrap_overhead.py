"""What `tern_jax.wrap` costs over the same training by hand.

    python -m experiments.benchmarks.wrap_overhead --model mlp

The step of a script with `wrap(adam, tern, wdr)` and that of the loop by hand,
`tern(params, state)` in the loss and `after_step` behind the update, run in
turns in one process, buffers donated; the figure is the median ratio of the CPU
times of neighboring turns. Memory is what XLA plans for a step, arguments and
intermediates, in copies of the parameters.

Measured on 2 CPU cores, jax 0.12, GLIBC_TUNABLES=glibc.malloc.hugetlb=1: median
of the time (least to largest), and more copies of the parameters.

  mlp, 9 rounds                           1.075  (1.061 to 1.084)  1.03
  lenet5, 9 rounds                        1.010  (0.991 to 1.018)  0.95
  resnet20, batch 32, 7 rounds of 3 steps  1.007  (0.977 to 1.015)  0.94
"""

import dataclasses
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import optax
import tyro

import tern_jax
from experiments.common import errors
from experiments.common.models import MLP, LeNet5, ResNet
from experiments.common.tables import Table

MODELS = {
  "lenet5": (LeNet5(classes=10), (28, 28, 1)),
  "mlp": (MLP(classes=10, hidden=(1024, 1024), norm=False), (32, 32, 3)),
  "resnet20": (ResNet(blocks=3, classes=10), (32, 32, 3)),
}


@dataclasses.dataclass
class WrapOptions:
  """Command line of the benchmark.

  Attributes:
    model: lenet5, resnet20, or mlp (3072-1024-1024-10).
    batch_size: examples a step.
    rounds: turns, of which the median ratio is reported.
    steps: steps a turn.
    sparsity: share of zeros that is asked of SCA.
  """

  model: str = "lenet5"
  batch_size: int = 128
  rounds: int = 9
  steps: int = 10
  sparsity: float = 0.8


def steps_of(options: WrapOptions) -> dict[str, tuple[Any, Any]]:
  """Returns {label: (jitted step of a state, state)}."""
  model, shape = MODELS[options.model]
  keys = jax.random.split(jax.random.key(0), 3)
  x = jax.random.normal(keys[0], (options.batch_size, *shape))
  y = jax.random.randint(keys[1], (options.batch_size,), 0, 10)
  rest: Any = dict(model.init(keys[2], x[:1], train=False))
  tree = rest.pop("params")
  steps = 10 * options.steps * options.rounds
  tern, wdr = tern_jax.recipe(options.sparsity, steps)
  adam = optax.adam(optax.cosine_decay_schedule(1e-3, steps, 0.05))

  def loss(weights: Any) -> jax.Array:
    logits, _ = model.apply(
      {"params": weights, **rest}, x, train=True, mutable=list(rest)
    )
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, y)
    return jnp.mean(losses)

  chain = optax.chain(wdr, adam)

  def by_hand(carry: Any) -> Any:
    held, state, opt_state = carry
    grads = jax.grad(lambda p: loss(tern(p, state)))(held)
    updates, opt_state = chain.update(grads, opt_state, held)
    params: Any = optax.apply_updates(held, updates)
    return *tern.after_step(params, state), opt_state

  tx = tern_jax.wrap(adam, tern, wdr)

  def wrapped(carry: Any) -> Any:
    params, opt_state = carry
    updates, opt_state = tx.update(jax.grad(loss)(params), opt_state, params)
    return optax.apply_updates(params, updates), opt_state

  trained: Any = tern.init(jax.tree.map(jnp.array, tree))
  return {
    "by hand": (by_hand, (*trained, chain.init(trained[0]))),
    "wrap": (wrapped, (tree, tx.init(tree))),
  }


def main(options: WrapOptions) -> dict[str, float]:
  """Runs the benchmark; returns and prints the ratios of wrap to by hand."""
  steps, states, memory = {}, {}, {}
  for label, (step, state) in steps_of(options).items():
    states[label] = jax.tree.map(jnp.array, state)
    program = jax.jit(step, donate_argnums=0).lower(state).compile()
    plan: Any = program.memory_analysis()
    memory[label] = plan.argument_size_in_bytes + plan.temp_size_in_bytes
    steps[label] = program

  def turn(label: str) -> float:
    start = time.process_time()
    for _ in range(options.steps):
      states[label] = steps[label](states[label])
    jax.block_until_ready(states[label])
    return time.process_time() - start

  turn("by hand"), turn("wrap")  # warms up
  ratios = []
  for _ in range(options.rounds):
    before, own, after = turn("by hand"), turn("wrap"), turn("by hand")
    ratios.append(2 * own / (before + after))
  weights = sum(x.nbytes for x in jax.tree.leaves(states["wrap"][0]))
  copies = (memory["wrap"] - memory["by hand"]) / weights
  table = Table(("figure", "median", "least", "largest"))
  figures = statistics.median(ratios), min(ratios), max(ratios)
  table.rows.append(("CPU time over by hand", *(f"{x:.3f}" for x in figures)))
  table.rows.append(("more copies of the parameters", f"{copies:.2f}", "", ""))
  print(f"{options.model}, batch {options.batch_size}")
  print(table.text())
  return {"time": figures[0], "copies": copies}


if __name__ == "__main__":
  with errors.explained():
    main(tyro.cli(WrapOptions))
