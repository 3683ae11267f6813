"""What ternary training costs: time of a step over that of the float step.

    python -m experiments.benchmarks.step_overhead

Float and ternary steps of the same model and batch run in turns in one
process; the figure is the median of the ratios of neighboring turns. Absolute
times depend on the machine and mean nothing here.

On CPU, set GLIBC_TUNABLES=glibc.malloc.hugetlb=1 to keep page faults out of it.

Measured on 2 CPU cores of a shared machine, jax 0.10.2: medians, least and
largest. `--model resnet20 --batch-size 32 --rounds 7 --steps 5`:

  float          1.002  (0.921 to 1.021)
  SCA(sparsity)  1.023  (1.008 to 1.030)
  SCA(alpha)     1.000  (0.922 to 1.039)
  TWN()          1.004  (0.968 to 1.031)
  TWN(sparsity)  1.001  (0.919 to 1.249)
  TTQ()          1.009  (1.002 to 1.165)
  EC2T()         1.036  (0.992 to 1.102)
  TGA()          1.052  (0.972 to 1.082)
  AbsMean()      1.028  (0.929 to 1.091)

`--model resnet20 --batch-size 128 --rounds 5 --steps 1`:

  float          1.005  (0.965 to 1.764)
  SCA(sparsity)  0.992  (0.810 to 1.601)
  SCA(alpha)     0.970  (0.758 to 1.006)
  TWN()          0.989  (0.979 to 1.035)
  TWN(sparsity)  1.005  (0.877 to 1.053)
  TTQ()          0.974  (0.824 to 1.331)
  EC2T()         1.001  (0.901 to 1.096)
  TGA()          0.985  (0.769 to 0.999)
  AbsMean()      1.019  (0.795 to 1.036)

`--model mlp --rounds 9 --steps 10`, some with `--only`:

  SCA(sparsity)  1.322  (1.291 to 1.353)
  SCA(alpha)     1.299  (1.232 to 1.349)
  TWN()          1.059  (1.025 to 1.177)
  TWN(sparsity)  1.154  (1.118 to 1.162)
  TTQ()          1.242  (1.215 to 1.439)
  EC2T()         1.271  (1.153 to 1.512)
  TGA()          1.121  (1.040 to 1.229)
  AbsMean()      1.050  (1.036 to 1.108)

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
from experiments.common.models import LeNet5, ResNet
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
class Options:
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


def methods(options: Options) -> dict[str, tuple[Any, Any]]:
  """Returns {label: (method or None for float, gradient transform)}."""
  steps = 10 * options.steps * options.rounds
  target = tern_jax.ramp(options.sparsity, steps)
  sca, wdr = tern_jax.recipe(options.sparsity, steps)
  return {
    "float": (None, optax.identity()),
    "SCA(sparsity)": (sca.method, wdr),
    "SCA(alpha)": (
      tern_jax.SCA(alpha=0.1),
      tern_jax.wdr_transform(0.1, 1e-3, mask=sca.where),
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


def main(options: Options) -> dict[str, float]:
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
  print(f"{options.model}, batch {options.batch_size}: step time over float")
  for label, ratio in result.items():
    low, high = min(ratios[label]), max(ratios[label])
    print(f"  {label:<14} {ratio:5.3f}  ({low:.3f} to {high:.3f})")
  return result


if __name__ == "__main__":
  main(tyro.cli(Options))
