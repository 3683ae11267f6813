"""What ternary training costs: time of a step over that of the float step.

    python -m experiments.benchmarks.step_overhead

Float and ternary steps of the same model and batch run in turns in one
process; the figure is the median of the ratios of neighboring turns. Absolute
times depend on the machine and mean nothing here.
"""

import dataclasses
import functools
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from flax import linen as nn

import tern_jax
from experiments.common.models import LeNet5
from tern_jax import training


class WideMLP(nn.Module):
  """Multi-layer perceptron without normalization: 3072-1024-1024-10."""

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    """Maps images [B, ...] to logits [B, 10]."""
    del train
    x = x.reshape((x.shape[0], -1))
    for width in (1024, 1024):
      x = nn.relu(nn.Dense(width)(x))
    return nn.Dense(10)(x)


MODELS = {
  "lenet5": (LeNet5(classes=10), (28, 28, 1)),
  "mlp": (WideMLP(), (32, 32, 3)),
}


@dataclasses.dataclass
class Options:
  """Command line of the benchmark.

  Attributes:
    model: lenet5, or mlp (3072-1024-1024-10).
    batch_size: examples a step.
    rounds: turns, of which the median ratio is reported.
    steps: steps a turn.
    sparsity: share of zeros asked of the methods that take a target.
  """

  model: str = "lenet5"
  batch_size: int = 128
  rounds: int = 15
  steps: int = 20
  sparsity: float = 0.8


def methods(options: Options) -> dict[str, tuple[Any, Any]]:
  """Returns {label: (method or None for float, gradient transform)}."""
  steps = 10 * options.steps * options.rounds
  where = tern_jax.kernels()
  target = tern_jax.ramp(options.sparsity, steps)
  late = functools.partial(
    tern_jax.wdr_transform,
    tern_jax.at_sparsity(target),
    tern_jax.relative(tern_jax.late_kappa(steps)),
    mask=where,
  )
  return {
    "float": (None, optax.identity()),
    "SCA(sparsity)": (tern_jax.SCA(sparsity=target), late()),
    "SCA(alpha)": (
      tern_jax.SCA(alpha=0.1),
      tern_jax.wdr_transform(0.1, 1e-3, mask=where),
    ),
    "TWN()": (tern_jax.TWN(), optax.identity()),
    "TWN(sparsity)": (tern_jax.TWN(sparsity=target), optax.identity()),
  }


def make_run(
  model: nn.Module, shape: tuple[int, ...], method: Any, regularizer: Any
) -> tuple[Any, training.TrainState]:
  """Returns the jitted step of one method, and its state."""
  variables = model.init(jax.random.key(0), jnp.ones((1, *shape)), train=False)
  tern = None if method is None else tern_jax.ParamTransform(method)
  tx = optax.chain(regularizer, optax.adam(1e-3))

  def loss_fn(weights, model_state, batch, key):
    del key
    logits: Any = model.apply({"params": weights}, batch["image"], train=True)
    losses = optax.softmax_cross_entropy_with_integer_labels(
      logits, batch["label"]
    )
    return jnp.mean(losses), (model_state, {})

  state = training.init_state(variables["params"], tx, tern)
  step = training.make_step(loss_fn, tx, tern)
  return jax.jit(step, donate_argnums=0), state


def main(options: Options) -> dict[str, float]:
  """Runs the benchmark; returns and prints {label: ratio to float}."""
  model, shape = MODELS[options.model]
  rng = np.random.default_rng(0)
  batch = {
    "image": rng.normal(size=(options.batch_size, *shape)).astype(np.float32),
    "label": rng.integers(0, 10, options.batch_size).astype(np.int32),
  }
  batch = jax.device_put(batch)
  runs = {
    label: make_run(model, shape, *spec)
    for label, spec in methods(options).items()
  }

  def turn(label: str) -> float:
    step, state = runs[label]
    start = time.perf_counter()
    for _ in range(options.steps):
      state, _ = step(state, batch)
    jax.block_until_ready(state)
    runs[label] = (step, state)
    return time.perf_counter() - start

  for label in runs:  # compile and warm up
    turn(label)
  ratios: dict[str, list[float]] = {label: [] for label in runs}
  for _ in range(options.rounds):
    for label in runs:
      # Each turn has its own float neighbors, so that a slow phase of a
      # shared machine hits both sides.
      before = turn("float")
      mine = turn(label)
      after = turn("float")
      ratios[label].append(2 * mine / (before + after))
  result = {label: statistics.median(r) for label, r in ratios.items()}
  print(f"{options.model}, batch {options.batch_size}: step time over float")
  for label, ratio in result.items():
    low, high = min(ratios[label]), max(ratios[label])
    print(f"  {label:<14} {ratio:5.3f}  ({low:.3f} to {high:.3f})")
  return result


if __name__ == "__main__":
  main(tyro.cli(Options))
