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
import functools
import itertools
import statistics
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from experiments.common import cli, data, evaluate, log, methods, run
from tern_jax import metrics

METHODS = methods.Sca, methods.Twn, methods.Ttq, methods.Tga, methods.Ec2t
#: {model: data set}
MODELS: dict[cli.Model, str] = {
  "mlp": "mnist",
  "lenet5": "mnist",
  "resnet8": "cifar10",
}


@dataclasses.dataclass(frozen=True)
class Options:
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


def main(options: Options) -> None:
  """Prints a table with a line for each net and method."""
  lines: log.Rows = [("net", "method", "mean off", "worst off", "worst layer")]
  for model, method in itertools.product(options.models, METHODS):
    dataset = data.load_dataset(MODELS[model], options.data_dir)
    reach = make_reach(options, model, method, dataset)
    total, layer = [], []
    runs = itertools.product(options.sparsities, range(options.seeds))
    for sparsity, seed in runs:
      zeros, sizes = jax.device_get(reach(sparsity, seed))
      total.append(abs(np.average(zeros, weights=sizes) - sparsity))
      layer.append(np.max(np.abs(zeros - sparsity)))
    worst = max(total), max(layer)
    cells = (statistics.fmean(total), *worst)
    lines.append((model, method.__name__, *(f"{x:.5f}" for x in cells)))
    print(f"{model}, {method.__name__}: done", flush=True)
  print(log.aligned(lines))


def make_reach(
  options: Options, model: cli.Model, method: Any, dataset: data.Dataset
) -> Any:
  """Makes the function (sparsity, seed) -> zeros and sizes of the layers.

  What it compiles serves all sparsities and seeds.
  """
  rows = options.steps * options.batch_size
  images = dataset.train["input"][:rows]
  images = data.standardize(images, dataset.mean, dataset.std)
  labels = dataset.train["label"][:rows]
  shape = options.steps, options.batch_size
  batches = {
    "input": images.reshape(*shape, *dataset.input_shape),
    "label": labels.reshape(shape),
  }

  def configure(sparsity: Any, seed: Any) -> cli.Config:
    return cli.Config(
      method=method(sparsity=sparsity),
      data=MODELS[model],
      model=model,
      batch_size=options.batch_size,
      seed=seed,
      parallel="jit",
      workdir="runs",  # nothing is written
    )

  def begin(sparsity: Any, seed: Any) -> run.Phase:
    config = configure(sparsity, seed)
    net: Any = evaluate.make_model(config, dataset.num_classes)
    image = jnp.zeros((1, *dataset.input_shape))
    model_state = dict(net.init(jax.random.key(seed), image, train=False))
    params = model_state.pop("params")
    return run.ternary_phase(config, options.steps, params, model_state)

  # A loop inside the program would be shorter, but XLA:CPU runs convolutions
  # in loops at a tenth of their speed.
  @functools.partial(jax.jit, static_argnums=0)
  def advance(i: int, sparsity: Any, state: Any, batch: Any) -> Any:
    config, stage = configure(sparsity, 0), begin(sparsity, 0).stages[i]
    return run.make_step(config, stage, dataset.num_classes)(state, batch)[0]

  @functools.partial(jax.jit, static_argnums=0)
  def enter(i: int, sparsity: Any, state: Any) -> Any:
    opt_state = begin(sparsity, 0).stages[i].tx.init(state.params)
    return dataclasses.replace(state, opt_state=opt_state)

  @functools.partial(jax.jit, static_argnums=0)
  def leave(i: int, sparsity: Any, state: Any) -> Any:
    return begin(sparsity, 0).stages[i].refreshed(state)

  @jax.jit
  def zeros(sparsity: Any, state: Any) -> Any:
    codes = begin(sparsity, 0).final.ternary(state)["params"]
    leaves = metrics.ternary_leaves(codes).values()
    shares = jnp.stack([metrics.sparsity(leaf) for leaf in leaves])
    return shares, np.array([leaf.codes.size for leaf in leaves])

  start = jax.jit(lambda sparsity, seed: begin(sparsity, seed).state)
  lasts = [stage.last for stage in begin(0.5, 0).stages]

  def reach(sparsity: float, seed: int) -> Any:
    state, first = start(sparsity, seed), 0
    for i, last in enumerate(lasts):
      state = enter(i, sparsity, state)
      for n in range(first, last):
        batch = {k: x[n] for k, x in batches.items()}
        state = advance(i, sparsity, state, batch)
      state, first = leave(i, sparsity, state), last
    return zeros(sparsity, state)

  return reach


if __name__ == "__main__":
  main(tyro.cli(Options, description=__doc__))
