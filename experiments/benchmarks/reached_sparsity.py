"""Asked and reached sparsity of every method that takes a target.

  python -m experiments.benchmarks.reached_sparsity
  python -m experiments.benchmarks.reached_sparsity --models lenet5

Trains each net for some steps with each method at each sparsity, and counts the
zeros of the codes that would be packed: over all weights, and in the layer that
misses its target most. A layer of n weights can be off by 1 / 2n.
"""

import dataclasses
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
  """Makes the compiled function (sparsity, seed) -> zeros, sizes of layers."""
  split = dataset.train
  rows = options.steps * options.batch_size
  batches = jax.tree.map(
    lambda x: x[:rows].reshape(options.steps, options.batch_size, *x.shape[1:]),
    {k: np.asarray(split[k]) for k in ("image", "label")},
  )

  @jax.jit
  def reach(sparsity: Any, seed: Any) -> Any:
    config = cli.Config(
      method=method(sparsity=sparsity),
      data=MODELS[model],
      model=model,
      batch_size=options.batch_size,
      seed=seed,
      parallel="jit",
      workdir="runs",  # nothing is written
    )
    net: Any = evaluate.make_model(config, dataset.num_classes)
    image = jnp.zeros((1, *dataset.image_shape))
    model_state = dict(net.init(jax.random.key(seed), image, train=False))
    params = model_state.pop("params")
    phase = run.ternary_phase(config, options.steps, params, model_state)
    state, first = phase.state, 0
    for stage in phase.stages:
      step = run.make_step(config, stage, dataset.num_classes)

      def advance(state: Any, batch: Any, step: Any = step) -> Any:
        image = batch["image"].astype(jnp.float32)
        image = (image - dataset.mean) / dataset.std
        return step(state, {**batch, "image": image})[0], None

      part = jax.tree.map(lambda x: x[first : stage.last], batches)  # noqa: B023
      opt_state = stage.tx.init(state.params)
      state = dataclasses.replace(state, opt_state=opt_state)
      state = stage.refreshed(jax.lax.scan(advance, state, part)[0])
      first = stage.last
    codes = metrics.ternary_leaves(phase.final.ternary(state)["params"])
    leaves = codes.values()
    zeros = jnp.stack([metrics.sparsity(leaf) for leaf in leaves])
    return zeros, np.array([leaf.codes.size for leaf in leaves])

  return reach


if __name__ == "__main__":
  main(tyro.cli(Options, description=__doc__))
