"""SCA and straight-through training at the same sparsity, with equal care.

  python -m experiments.benchmarks.equal_sparsity
  python -m experiments.benchmarks.equal_sparsity --data digits --epochs 100 \
    --batch-size 64 --seeds 20

A net without capacity to spare, all kernels ternary, trained from scratch by
each method, at each of its rates, for the same epochs: all sparsities and seeds
of one rate are one program. The references, "pruned float", have float values
where the others have codes; "dense" passes gradients to zeros, too. The rate of
a method is chosen by validation accuracy, at each sparsity by itself; the test
split is read once a run, at its end. What is done lies under --root: the
command can be stopped and given again.
"""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import optax
import tyro

import tern_jax
from experiments.common import (
  bench,
  cli,
  data,
  errors,
  files,
  lock,
  log,
  methods,
  sweep,
)
from experiments.common.errors import UsageError
from experiments.common.methods import Plan
from experiments.common.pruning import Pruned

#: Standard deviation of the latents with which SCA starts.
SIGMA: Any = tern_jax.SCA(sparsity=0.5).sigma


def frozen_late(plan: Plan, steps: int) -> Plan:
  """Keeps the latents, and so the codes, from 70 % of the run on."""
  stop = round(0.7 * steps)

  def before(count: Any) -> Any:
    return jnp.where(count < stop, 1.0, 0.0)

  return plan._replace(regularizer=optax.scale_by_schedule(before))


def without_regularizer(plan: Plan, steps: int) -> Plan:
  """Leaves the hard forward and the barrier alone: what WDR is worth."""
  del steps
  return plan._replace(regularizer=optax.identity())


def pruned(plan: Plan, steps: int, dense: bool = False) -> Plan:
  """Keeps float values beyond the threshold: the reference for all of them."""
  del steps
  stages = tuple(
    stage._replace(method=Pruned(stage.method.sparsity, dense=dense))
    for stage in plan.stages
  )
  return plan._replace(stages=stages)


def one_shot(sparsity: Any, across_layers: bool) -> methods.Sca:
  """Returns SCA as published: one alpha, set from the latents of the start."""
  del across_layers
  alpha: Any = tern_jax.alpha_for_sparsity(SIGMA, sparsity)
  return methods.Sca(alpha=alpha)


class Racer(NamedTuple):
  """A method as it is trained here.

  Attributes:
    name: of its files.
    method: from sparsity and `across_layers` to the method.
    rates: Adam's first rates on latents.
    change: of its plan; None for the plan as it is.
  """

  name: str
  method: Callable[..., methods.Method]
  rates: tuple[float, ...]
  change: Callable[[Plan, int], Plan] | None = None


#: By their names in the table.
RACERS = {
  "SCA": Racer("Sca", methods.Sca, (5e-4, 1e-3)),
  "TWN": Racer("Twn", methods.Twn, (3e-4, 1e-3, 3e-3, 1e-2)),
  "TWN, frozen": Racer("FrozenTwn", methods.Twn, (1e-3, 3e-3), frozen_late),
  # WDR as published, whose force vanishes at the barrier.
  "SCA, smooth WDR": Racer(
    "SmoothWdr", functools.partial(methods.Sca, sharp=False), (5e-4, 1e-3)
  ),
  "SCA without WDR": Racer(
    "WithoutWdr", methods.Sca, (5e-4, 1e-3), without_regularizer
  ),
  "SCA, one-shot": Racer("OneShot", one_shot, (5e-3, 1e-2)),
  "pruned float": Racer("Pruned", methods.Twn, (1e-3, 3e-3, 1e-2), pruned),
  "pruned float, dense": Racer(
    "PrunedDense",
    methods.Twn,
    (1e-3, 3e-3, 1e-2),
    functools.partial(pruned, dense=True),
  ),
}


@dataclasses.dataclass(frozen=True)
class EqualOptions(sweep.SmallNet):
  """Command line of the benchmark."""

  racers: tuple[str, ...] = tuple(RACERS)
  """Methods, by their names in the table."""
  rates: tuple[float, ...] = ()
  """Adam's first rates on latents, for all of them; none given takes those of
  each method in turn."""
  sparsities: tuple[float, ...] = (0.5, 0.8, 0.9, 0.95, 0.98)
  """Shares of zeros, of each layer."""
  across_layers: bool = False
  """Whether they are those of all layers together instead."""
  seeds: int = 5
  """Runs of each."""
  root: Path = Path("runs/equal_sparsity")
  """Where what is done lies."""

  @property
  def place(self) -> Path:
    """Where the runs on these data and this network lie."""
    parts = [self.data]
    parts += [] if self.model == "mlp" else [self.model]
    parts += [*map(str, self.hidden), *self.exclude]
    parts += [] if self.norm else ["bare"]
    parts += ["across"] if self.across_layers else []
    return self.root / "-".join(parts)

  def sweep(self, racer: Racer, rate: float) -> sweep.Sweep:
    """Returns the runs of a method at one rate."""

    def config(value: Any, seed: Any) -> cli.Config:
      method = racer.method(sparsity=value, across_layers=self.across_layers)
      return self.config(method=method, seed=seed, learning_rate=rate)

    return sweep.Sweep(
      "sparsity", self.sparsities, self.seeds, config, change=racer.change
    )


DEFAULT = EqualOptions(data="mnist", epochs=10, batch_size=128)


def main(options: EqualOptions) -> None:
  """Runs what is not done yet, and prints the table."""
  if unknown := set(options.racers) - set(RACERS):
    known = ", ".join(map(repr, RACERS))
    raise UsageError(f"racers={unknown}, but there are {known}.")
  dataset = data.load_dataset(options.data, options.data_dir)
  # What the names of directory and files do not tell.
  record = {
    "sparsities": list(options.sparsities),
    "seeds": options.seeds,
    "epochs": options.epochs,
    "batch_size": options.batch_size,
  }
  log.check(options.place, record)
  table: dict[str, Any] = {}
  with lock.held(options.place):
    log.claim(options.place, record)
    for label in options.racers:
      tried = trained(options, label, dataset)
      table[label] = {
        str(s): bench.best_rate(tried, s) for s in options.sparsities
      }
      text = bench.equal_sparsity(table, options.sparsities).markdown()
      files.write_table(options.place, text, table)
  print(text)


def trained(
  options: EqualOptions, label: str, dataset: data.Dataset
) -> dict[float, Any]:
  """Returns the runs of a method at each rate; runs what is not done yet."""
  racer, tried = RACERS[label], {}
  for rate in options.rates or racer.rates:
    runs = options.sweep(racer, rate)
    tried[rate] = sweep.run_once(
      options.place / f"{racer.name}-{rate:g}.json",
      lambda runs=runs: sweep.run_sweep(runs, dataset),
    )
  return tried


if __name__ == "__main__":
  with errors.explained():
    main(tyro.cli(EqualOptions, default=DEFAULT, description=__doc__))
