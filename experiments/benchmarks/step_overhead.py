"""What ternary training costs: time of a step over that of the float step.

    python -m experiments.benchmarks.step_overhead

Float and ternary steps of the same model and batch run in turns in one
process; the figure is the median of the ratios of neighboring turns. Absolute
times depend on the machine and mean nothing here.

On CPU, set GLIBC_TUNABLES=glibc.malloc.hugetlb=1 to keep page faults out of it.

Measured on 2 CPU cores of a shared machine, jax 0.12: medians, least and
largest. `--model resnet20 --batch-size 32 --rounds 7 --steps 5`:

  float          1.005  (0.920 to 1.097)
  SCA(sparsity)  1.070  (0.845 to 1.185)
  SCA(alpha)     1.001  (0.974 to 1.101)
  TWN()          1.024  (0.944 to 1.173)
  TWN(sparsity)  1.039  (0.948 to 1.112)
  TTQ()          1.034  (0.982 to 1.077)
  EC2T()         1.002  (0.957 to 1.080)
  TGA()          0.993  (0.900 to 1.021)
  AbsMean()      1.047  (0.877 to 1.155)

`--model resnet20 --batch-size 128 --rounds 5 --steps 1`:

  float          1.017  (0.853 to 1.038)
  SCA(sparsity)  1.007  (0.933 to 1.132)
  SCA(alpha)     1.041  (0.931 to 1.068)
  TWN()          0.970  (0.907 to 1.035)
  TWN(sparsity)  1.030  (0.938 to 1.275)
  TTQ()          0.999  (0.884 to 1.067)
  EC2T()         0.980  (0.936 to 1.031)
  TGA()          0.992  (0.969 to 1.006)
  AbsMean()      1.044  (0.946 to 1.064)

`--model mlp --rounds 7 --steps 10`:

  float          1.005  (0.899 to 1.086)
  SCA(sparsity)  1.372  (1.308 to 1.403)
  SCA(alpha)     1.423  (1.374 to 1.599)
  TWN()          1.059  (1.009 to 1.095)
  TWN(sparsity)  1.090  (1.040 to 1.186)
  TTQ()          1.260  (1.245 to 1.286)
  EC2T()         1.295  (1.183 to 1.317)
  TGA()          1.188  (1.110 to 1.224)
  AbsMean()      1.147  (1.069 to 1.212)

Where the time goes on the MLP: its 4.2 million weights are 17 MB, and each pass
over them that reads one array and writes one is about .05 of the float step.
AbsMean has one to write the ternary weights; its mean is nearly free. So are
sums of products of the gradient with these weights, which XLA hands to a
library without writing the products. What else is elementwise and then summed
is written first: hence statistics are looked at every few steps only. What is
left is: for SCA a pass for the gradient of tanh, which XLA keeps in memory
because it is expensive to compute twice, a copy where a late WDR is off, and a
search of the quantile every 10 steps; for TTQ and EC2T the factor of each
cluster, read twice by Adam, and the second of their two sums.
"""

import dataclasses
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
from experiments.common import errors
from experiments.common.models import LeNet5, ResNet
from experiments.common.tables import Table
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
  "resnet20": (ResNet(blocks=3, classes=10), (32, 32, 3)),
}


@dataclasses.dataclass
class OverheadOptions:
  """Command line of the benchmark.

  Attributes:
    model: lenet5, resnet20, or mlp (3072-1024-1024-10).
    batch_size: examples a step.
    rounds: turns, of which the median ratio is reported.
    steps: steps a turn.
    sparsity: share of zeros asked of the methods that take a target.
    only: labels of the methods to measure; none given takes all.
  """

  model: str = "lenet5"
  batch_size: int = 128
  rounds: int = 15
  steps: int = 20
  sparsity: float = 0.8
  only: tuple[str, ...] = ()


def methods(options: OverheadOptions) -> dict[str, tuple[Any, Any]]:
  """Returns {label: (method or None for float, gradient transform)}."""
  steps = 10 * options.steps * options.rounds
  target = tern_jax.ramp(options.sparsity, steps)
  sca, wdr = tern_jax.recipe(options.sparsity, steps)
  return {
    "float": (None, optax.identity()),
    "SCA(sparsity)": (sca.method, wdr),
    "SCA(alpha)": (
      tern_jax.SCA(alpha=0.1),
      tern_jax.wdr_transform(0.1, 1e-3, where=sca.where),
    ),
    "TWN()": (tern_jax.TWN(), optax.identity()),
    "TWN(sparsity)": (tern_jax.TWN(sparsity=target), optax.identity()),
    "TTQ()": (tern_jax.TTQ(), optax.identity()),
    "EC2T()": (tern_jax.EC2T(), optax.identity()),
    "TGA()": (tern_jax.TGA(), optax.identity()),
    "AbsMean()": (tern_jax.AbsMean(), optax.identity()),
  }


def make_run(
  model: nn.Module, shape: tuple[int, ...], method: Any, regularizer: Any
) -> tuple[Any, training.TrainState]:
  """Returns the jitted step of one method, and its state."""
  image = jnp.ones((1, *shape))
  model_state: Any = dict(model.init(jax.random.key(0), image, train=False))
  params = model_state.pop("params")
  tern = None if method is None else tern_jax.ParamTransform(method)
  tx = optax.chain(regularizer, optax.adam(1e-3))

  def loss_fn(weights, model_state, batch, key):
    del key
    logits, model_state = model.apply(
      {"params": weights, **model_state},
      batch["input"],
      train=True,
      mutable=list(model_state),
    )
    losses = optax.softmax_cross_entropy_with_integer_labels(
      logits, batch["label"]
    )
    return jnp.mean(losses), (model_state, {})

  state = training.init_state(params, tx, tern, model_state)
  step = training.make_step(loss_fn, tx, tern)
  return jax.jit(step, donate_argnums=0), state


@dataclasses.dataclass
class Run:
  """A jitted step, and the state that it goes on from."""

  step: Any
  state: training.TrainState

  def turn(self, batch: Any, steps: int) -> float:
    """Runs some steps; returns the seconds that they took."""
    start = time.perf_counter()
    for _ in range(steps):
      self.state, _ = self.step(self.state, batch)
    jax.block_until_ready(self.state)
    return time.perf_counter() - start


def main(options: OverheadOptions) -> dict[str, float]:
  """Runs the benchmark; returns and prints {label: ratio to float}."""
  model, shape = MODELS[options.model]
  rng = np.random.default_rng(0)
  batch = {
    "input": rng.normal(size=(options.batch_size, *shape)).astype(np.float32),
    "label": rng.integers(0, 10, options.batch_size).astype(np.int32),
  }
  batch = jax.device_put(batch)
  specs = methods(options)
  plain = Run(*make_run(model, shape, *specs["float"]))
  plain.turn(batch, options.steps)  # compiles and warms up
  ratios: dict[str, list[float]] = {}
  for label in options.only or specs:
    spec = specs[label]
    # Only two runs are alive at a time, so that memory is not what differs.
    mine = Run(*make_run(model, shape, *spec))
    mine.turn(batch, options.steps)
    ratios[label] = []
    for _ in range(options.rounds):
      # Each turn has its own float neighbors, so that a slow phase of a
      # shared machine hits both sides.
      before = plain.turn(batch, options.steps)
      own = mine.turn(batch, options.steps)
      after = plain.turn(batch, options.steps)
      ratios[label].append(2 * own / (before + after))
  result = {label: statistics.median(r) for label, r in ratios.items()}
  table = Table(("method", "median", "least", "largest"))
  for label, ratio in result.items():
    figures = (ratio, min(ratios[label]), max(ratios[label]))
    table.rows.append((label, *(f"{x:.3f}" for x in figures)))
  print(f"{options.model}, batch {options.batch_size}: step time over float")
  print(table.text())
  return result


if __name__ == "__main__":
  with errors.explained():
    main(tyro.cli(OverheadOptions))
