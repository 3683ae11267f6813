"""Asked and reached sparsity of every method that takes a target.

  python -m experiments.benchmarks.reached_sparsity
  python -m experiments.benchmarks.reached_sparsity --models lenet5

Trains each net for some steps with each method at each sparsity, and counts the
zeros of the codes that would be packed: over all weights, and in the layer that
misses its target most. A layer of n weights can be off by 1 / 2n, which is
.0033 in the first one of LeNet-5.

Last output, at .5, .7, .8, .9 and .95, seeds 0 to 2, jax 0.10:

  net      method  mean off  worst off  worst layer
  -------------------------------------------------
  mlp         Sca   0.00001    0.00001      0.00010
  mlp         Twn   0.00001    0.00001      0.00010
  mlp         Ttq   0.00001    0.00001      0.00010
  mlp         Tga   0.00001    0.00001      0.00010
  mlp        Ec2t   0.00001    0.00003      0.00010
  lenet5      Sca   0.00000    0.00001      0.00333
  lenet5      Twn   0.00000    0.00001      0.00333
  lenet5      Ttq   0.00000    0.00001      0.00333
  lenet5      Tga   0.00000    0.00001      0.00333
  lenet5     Ec2t   0.00000    0.00002      0.00333
  resnet8     Sca   0.00000    0.00001      0.00093
  resnet8     Twn   0.00000    0.00001      0.00093
  resnet8     Ttq   0.00000    0.00001      0.00093
  resnet8     Tga   0.00000    0.00001      0.00093
  resnet8    Ec2t   0.00000    0.00001      0.00093
"""

import dataclasses
import itertools
import statistics
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from experiments.common import build, cli, data, errors, methods
from experiments.common.runner import stages
from experiments.common.runner.step import make_step
from experiments.common.tables import Table
from tern_jax import metrics

METHODS = methods.Sca, methods.Twn, methods.Ttq, methods.Tga, methods.Ec2t
#: {model: data set}
MODELS: dict[cli.Model, str] = {
  "mlp": "mnist",
  "lenet5": "mnist",
  "resnet8": "cifar10",
}


@dataclasses.dataclass(frozen=True)
class ReachedOptions:
  """Command line of the benchmark."""

  models: tuple[cli.Model, ...] = tuple(MODELS)
  """Networks."""
  sparsities: tuple[float, ...] = (0.5, 0.7, 0.8, 0.9, 0.95)
  """Shares of zeros."""
  seeds: int = 3
  """Runs of each."""
  steps: int = 60
  """Training steps of a run."""
  batch_size: int = 32
  """Images a step."""
  data_dir: str | None = None
  """Directory of prepared data sets; None for the usual one."""


def main(options: ReachedOptions) -> None:
  """Prints a table with a line for each net and method."""
  table = Table(("net", "method", "mean off", "worst off", "worst layer"))
  for model, method in itertools.product(options.models, METHODS):
    dataset = data.load_dataset(MODELS[model], options.data_dir)
    reach = Reach(options, model, method, dataset)
    total, layer = [], []
    runs = itertools.product(options.sparsities, range(options.seeds))
    for sparsity, seed in runs:
      zeros, sizes = jax.device_get(reach(sparsity, seed))
      total.append(abs(np.average(zeros, weights=sizes) - sparsity))
      layer.append(np.max(np.abs(zeros - sparsity)))
    worst = max(total), max(layer)
    cells = (statistics.fmean(total), *worst)
    figures = (f"{x:.5f}" for x in cells)
    table.rows.append((model, method.__name__, *figures))
    print(f"{model}, {method.__name__}: done", flush=True)
  print(table.text())


class Reach:
  """The zeros that a method reaches; called with a sparsity and a seed.

  What it compiles serves all sparsities and seeds. A loop inside the program
  would be shorter, but XLA:CPU runs convolutions in loops at a tenth of their
  speed.

  Args:
    options: of the benchmark.
    model: network.
    method: class of the method.
    dataset: to train on.
  """

  def __init__(
    self,
    options: ReachedOptions,
    model: cli.Model,
    method: Any,
    dataset: data.Dataset,
  ):
    self._options, self._dataset = options, dataset
    self._model, self._method = model, method
    rows, shape = options.steps * options.batch_size, dataset.input_shape
    images = dataset.train["input"][:rows]
    images = data.standardize(images, dataset.mean, dataset.std)
    steps = options.steps, options.batch_size
    self._batches = {
      "input": images.reshape(*steps, *shape),
      "label": dataset.train["label"][:rows].reshape(steps),
    }
    self._start = jax.jit(lambda share, seed: self._begin(share, seed).state)
    self._enter = jax.jit(self._enter_stage, static_argnums=0)
    self._advance = jax.jit(self._one_step, static_argnums=0)
    self._leave = jax.jit(self._leave_stage, static_argnums=0)
    self._zeros = jax.jit(self._count_zeros)

  def __call__(self, sparsity: float, seed: int) -> Any:
    """Returns the shares of zeros of the layers, and their sizes."""
    state, first = self._start(sparsity, seed), 0
    for i, stage in enumerate(self._begin(0.5, 0).stages):
      state = self._enter(i, sparsity, state)
      for n in range(first, stage.last):
        batch = {k: x[n] for k, x in self._batches.items()}
        state = self._advance(i, sparsity, state, batch)
      state, first = self._leave(i, sparsity, state), stage.last
    return self._zeros(sparsity, state)

  def _config(self, sparsity: Any, seed: Any) -> cli.Config:
    return cli.Config(
      method=self._method(sparsity=sparsity),
      data=MODELS[self._model],
      model=self._model,
      batch_size=self._options.batch_size,
      seed=seed,
      parallel="jit",
      workdir="runs",  # nothing is written
    )

  def _begin(self, sparsity: Any, seed: Any) -> stages.Phase:
    config = self._config(sparsity, seed)
    net: Any = build.make_model(config, self._dataset.num_classes)
    image = jnp.zeros((1, *self._dataset.input_shape))
    model_state = dict(net.init(jax.random.key(seed), image, train=False))
    params = model_state.pop("params")
    steps = self._options.steps
    return stages.ternary_phase(config, steps, params, model_state)

  def _enter_stage(self, i: int, sparsity: Any, state: Any) -> Any:
    opt_state = self._begin(sparsity, 0).stages[i].tx.init(state.params)
    return dataclasses.replace(state, opt_state=opt_state)

  def _one_step(self, i: int, sparsity: Any, state: Any, batch: Any) -> Any:
    config = self._config(sparsity, 0)
    stage = self._begin(sparsity, 0).stages[i]
    step = make_step(config, stage, self._dataset.num_classes)
    return step(state, batch)[0]

  def _leave_stage(self, i: int, sparsity: Any, state: Any) -> Any:
    return self._begin(sparsity, 0).stages[i].refreshed(state)

  def _count_zeros(self, sparsity: Any, state: Any) -> Any:
    codes = self._begin(sparsity, 0).final.ternary(state)["params"]
    leaves = metrics.ternary_leaves(codes).values()
    shares = jnp.stack([metrics.sparsity(leaf) for leaf in leaves])
    return shares, np.array([leaf.codes.size for leaf in leaves])


if __name__ == "__main__":
  with errors.explained():
    main(tyro.cli(ReachedOptions, description=__doc__))
