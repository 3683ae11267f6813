"""SCA and straight-through training at the same sparsity, with equal care.

  python -m experiments.benchmarks.equal_sparsity
  python -m experiments.benchmarks.equal_sparsity --data digits --epochs 100 \
    --batch-size 64 --seeds 20

A net without capacity to spare, all kernels ternary, trained from scratch by
each method, at each of its rates, for the same epochs: all sparsities and seeds
of one rate are one program. The rate of a method is chosen by validation
accuracy, at each sparsity by itself; the test split is read once a run, at its
end. What is done lies under --root: the command can be stopped and given again.
"""

import dataclasses
import json
import statistics
from pathlib import Path
from typing import Any, Literal

import jax.numpy as jnp
import optax
import tyro

import tern_jax
from experiments import alpha_sweep
from experiments.common import cli, data, log, methods

#: Standard deviation of the latents with which SCA starts.
SIGMA: Any = tern_jax.SCA(sparsity=0.5).sigma


@dataclasses.dataclass(frozen=True)
class FrozenTwn(methods.Twn):
  """TWN whose latents, and so its codes, stay from 70 % of the run on."""

  def recipe(
    self, steps: int, largest: int, stacked: tuple[str, ...] = ()
  ) -> methods.Recipe:
    """Returns the training of TWN without late gradients."""
    stop = round(0.7 * steps)

    def before(count: Any) -> Any:
      return jnp.where(count < stop, 1.0, 0.0)

    gate = optax.scale_by_schedule(before)
    recipe = super().recipe(steps, largest, stacked)
    return recipe._replace(regularizer=gate)


@dataclasses.dataclass(frozen=True)
class SmoothWdr(methods.Sca):
  """SCA with WDR as published, whose force vanishes at the barrier."""

  sharp: bool = False


@dataclasses.dataclass(frozen=True)
class WithoutWdr(methods.Sca):
  """SCA's hard forward and barrier alone: what WDR is worth."""

  def recipe(
    self, steps: int, largest: int, stacked: tuple[str, ...] = ()
  ) -> methods.Recipe:
    """Returns the training of SCA without its regularizer."""
    recipe = super().recipe(steps, largest, stacked)
    return recipe._replace(regularizer=optax.identity())


@dataclasses.dataclass(frozen=True)
class OneShot(methods.Sca):
  """SCA as published: one alpha, set from the latents of the start."""

  def recipe(
    self, steps: int, largest: int, stacked: tuple[str, ...] = ()
  ) -> methods.Recipe:
    """Returns the training with that alpha."""
    asked: Any = self.asked
    alpha: Any = tern_jax.alpha_for_sparsity(SIGMA, asked)
    published = methods.Sca(alpha=alpha, strength=self.strength)
    return published.recipe(steps, largest, stacked)


#: {name: (method, Adam's first rates on latents)}
RACERS: dict[str, tuple[Any, tuple[float, ...]]] = {
  "SCA": (methods.Sca, (5e-4, 1e-3)),
  "TWN": (methods.Twn, (3e-4, 1e-3, 3e-3, 1e-2)),
  "TWN, frozen": (FrozenTwn, (1e-3, 3e-3)),
  "SCA, smooth WDR": (SmoothWdr, (5e-4, 1e-3)),
  "SCA without WDR": (WithoutWdr, (5e-4, 1e-3)),
  "SCA, one-shot": (OneShot, (5e-3, 1e-2)),
}


@dataclasses.dataclass(frozen=True)
class Program(alpha_sweep.Config):
  """Runs of one method at one rate."""

  method: Any = methods.Sca
  across_layers: bool = False
  learning_rate: float = 1e-2

  def run(self, value: Any, seed: Any = 0) -> cli.Config:
    """Returns the config of one run, whose value and seed may be traced."""
    return dataclasses.replace(
      super().run(value, seed),
      method=self.method(sparsity=value, across_layers=self.across_layers),
      learning_rate=self.learning_rate,
    )


@dataclasses.dataclass(frozen=True)
class Options:
  """Command line of the benchmark."""

  racers: tuple[str, ...] = tuple(RACERS)
  """Methods, by their names in the table."""
  rates: tuple[float, ...] = ()
  """Adam's first rates on latents, for all of them; none given takes those of
  each method in turn."""
  data: str = "mnist"
  """Data set of images, by its name."""
  data_dir: str | None = None
  """Directory of prepared data sets; None for the usual one."""
  model: Literal["mlp", "convnet"] = "mlp"
  """Network."""
  hidden: tuple[int, ...] = (32, 32)
  """Widths of the hidden layers of mlp, channels of convnet."""
  norm: bool = True
  """Batch norm after the hidden layers of mlp, instead of biases in them."""
  exclude: tuple[str, ...] = ()
  """Patterns of kernels that stay float, such as stem."""
  sparsities: tuple[float, ...] = (0.5, 0.8, 0.9, 0.95, 0.98)
  """Shares of zeros, of each layer."""
  across_layers: bool = False
  """Whether they are those of all layers together instead."""
  seeds: int = 5
  """Runs of each."""
  epochs: int = 10
  """Passes over the training data."""
  batch_size: int = 128
  """Images a step."""
  root: Path = Path("runs/equal_sparsity")
  """Where what is done lies."""


def main(options: Options) -> None:
  """Runs what is not done yet, and prints the table."""
  if unknown := set(options.racers) - set(RACERS):
    known = ", ".join(map(repr, RACERS))
    raise cli.UsageError(f"racers={unknown}, but there are {known}.")
  dataset = data.load_dataset(options.data, options.data_dir)
  net = "" if options.model == "mlp" else f"{options.model}-"
  widths = "-".join(map(str, options.hidden))
  floats = "".join(f"-{name}" for name in options.exclude)
  bare = "" if options.norm else "-bare"
  across = "-across" if options.across_layers else ""
  run = f"{options.data}-{net}{widths}{floats}{bare}{across}"
  place = options.root / run
  # What the names of directory and files do not tell.
  record = {
    "sparsities": list(options.sparsities),
    "seeds": options.seeds,
    "epochs": options.epochs,
    "batch_size": options.batch_size,
  }
  log.claim(place, record)
  table: dict[str, Any] = {}
  for name in options.racers:
    method, rates = RACERS[name]
    tried = {}
    for rate in options.rates or rates:
      program = Program(
        by="sparsity",
        values=options.sparsities,
        seeds=options.seeds,
        data=options.data,
        model=options.model,
        hidden=options.hidden,
        norm=options.norm,
        exclude=options.exclude,
        epochs=options.epochs,
        batch_size=options.batch_size,
        method=method,
        across_layers=options.across_layers,
        learning_rate=rate,
      )
      path = place / f"{method.__name__}-{rate:g}.json"
      if not path.exists():
        done = {"rows": alpha_sweep.sweep(program, dataset), **log.provenance()}
        path.write_text(json.dumps(done, indent=2) + "\n")
      tried[rate] = json.loads(path.read_text())
    table[name] = {str(s): chosen(tried, s) for s in options.sparsities}
    text = markdown(table, options.sparsities)
    (place / "table.md").write_text(text + "\n")
    (place / "table.json").write_text(json.dumps(table, indent=2) + "\n")
  print(text)


def chosen(tried: dict[float, Any], sparsity: float) -> dict[str, Any]:
  """Returns the runs of a sparsity at the rate of best validation.

  >>> def done(validation, test, commit):
  ...   row = {"sparsity": .9, "validation_rounded": validation,
  ...          "test_rounded": test, "zeros": .9}
  ...   return {"rows": [row], "command": "python", "commit": commit}
  >>> best = chosen({1e-3: done(.8, .7, "07"), 1e-2: done(.9, .6, "b5")}, .9)
  >>> best["rate"], best["test"], best["commit"]
  (0.01, [0.6], 'b5')
  """
  runs = {
    rate: [row for row in done["rows"] if row["sparsity"] == sparsity]
    for rate, done in tried.items()
  }

  def validation(rate: float) -> float:
    return statistics.fmean(row["validation_rounded"] for row in runs[rate])

  best = max(runs, key=validation)
  return {
    "rate": best,
    "validation": [row["validation_rounded"] for row in runs[best]],
    "test": [row["test_rounded"] for row in runs[best]],
    "zeros": [row["zeros"] for row in runs[best]],
    "command": tried[best]["command"],
    "commit": tried[best]["commit"],
  }


def markdown(table: dict[str, Any], sparsities: tuple[float, ...]) -> str:
  """Prints test accuracy as mean ± standard deviation, and the rate chosen.

  >>> cell = {"rate": .01, "test": [.91, .93], "zeros": [.9, .9]}
  >>> print(markdown({"SCA": {"0.9": cell}}, (.9,)).splitlines()[-1])
  | SCA | 92.00 ± 1.41 (0.01) |
  """
  titles = ("test %, zeros:", *(f"{s:g}" for s in sparsities))
  lines = [titles, ("---",) * len(titles)]
  for name, row in table.items():
    cells = []
    for sparsity in sparsities:
      found = row[str(sparsity)]
      test = [100 * value for value in found["test"]]
      spread = f" ± {statistics.stdev(test):.2f}" if len(test) > 1 else ""
      zeros = statistics.fmean(found["zeros"])
      missed = "" if abs(zeros - sparsity) < 5e-3 else f", zeros {zeros:.3f}"
      mean = statistics.fmean(test)
      cells.append(f"{mean:.2f}{spread} ({found['rate']:g}{missed})")
    lines.append((name, *cells))
  return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
  main(tyro.cli(Options, description=__doc__))
