"""A float script made ternary by its optimizer alone: by one line, by `wrap`.

  python -m experiments.benchmarks.one_line
  python -m experiments.benchmarks.one_line --seeds 20 --onset 0.4 \
    --rows line --root runs/onset

Digits, an MLP 64-64-10 without norm that uses its weights as they are, Adam
with a cosine to 5 %. The rows: the float script; README's line, `wdr_transform`
on weights after the optimizer; the same before it, relative to the gradient;
and `tern_jax.wrap` with a recipe. At the end, weights are rounded to the codes
and scales of `TWN(sparsity=...)`, which for `wrap` changes nothing. The test
split is read once a run, at its end.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

import tern_jax
from experiments.common import bench, data, errors, files, lock, log
from experiments.common.errors import UsageError
from experiments.common.tables import summary


@dataclasses.dataclass(frozen=True)
class LineOptions:
  """Command line of the benchmark."""

  rows: tuple[str, ...] = ("float", "line", "before", "wrap")
  """What to train."""
  sparsities: tuple[float, ...] = (0.5, 0.8)
  """Shares of zeros, of each layer."""
  seeds: int = 5
  """Runs of each."""
  steps: int = 2000
  """Training steps of a run."""
  batch_size: int = 64
  """Images a step."""
  rate: float = 1e-2
  """Adam's first rate."""
  wrap_rate: float = 1e-3
  """The same on the latents of wrap."""
  onset: float = 0.2
  """Share of the run at which the line sets in."""
  full: float = 0.8
  """Share of the run from which on it holds weights at their codes."""
  root: Path = Path("runs/one_line")
  """Where the table goes."""

  def schedule(self, rate: float) -> optax.Schedule:
    """Returns the schedule of a rate."""
    return optax.cosine_decay_schedule(rate, self.steps, 0.05)

  def wdr(self, sparsity: float, strength: Any, **place: Any) -> Any:
    """Returns WDR on weights."""
    return tern_jax.wdr_transform(
      tern_jax.at_sparsity(sparsity),
      strength,
      tern_jax.kernels(),
      space="weights",
      **place,
    )

  def optimizer(self, row: str, sparsity: float) -> Any:
    """Returns the optimizer of a row."""
    adam = optax.adam(self.schedule(self.rate))
    if row == "float":
      return adam
    if row == "line":
      first, last = (round(x * self.steps) for x in (self.onset, self.full))
      share = optax.linear_schedule(0.0, 1.0, last - first, first)
      line = self.wdr(sparsity, share, after_optimizer=True)
      return optax.chain(adam, line)
    if row == "before":
      kappa = tern_jax.relative(tern_jax.late_kappa(self.steps, onset=0.3))
      return optax.chain(self.wdr(sparsity, kappa), adam)
    if row == "wrap":
      tern, wdr = tern_jax.recipe(sparsity, self.steps)
      return tern_jax.wrap(optax.adam(self.schedule(self.wrap_rate)), tern, wdr)
    raise UsageError(f"rows={row}, but there are float, line, before, wrap.")


class MLP(nn.Module):
  """One hidden layer, biases, no norm."""

  @nn.compact
  def __call__(self, x: Any) -> Any:
    """Returns logits."""
    return nn.Dense(10)(nn.relu(nn.Dense(64)(x)))


NET: Any = MLP()


def main(options: LineOptions) -> None:
  """Trains all rows, and prints the table."""
  digits = data.load_dataset("digits")
  splits = {
    name: (pixels(digits, split), jnp.asarray(split["label"]))
    for name, split in (
      ("train", digits.train),
      ("validation", digits.validation),
      ("test", digits.test),
    )
  }
  table: dict[str, list[Any]] = {}
  with lock.held(options.root):
    for row in options.rows:
      for sparsity in options.sparsities:
        tx = options.optimizer(row, sparsity)
        train = jax.jit(trainer(options, tx, *splits["train"]))
        for seed in range(options.seeds):
          params, opt_state = train(seed)
          record = judged(params, opt_state, tx, sparsity, splits)
          table.setdefault(f"{row}, {sparsity:g}", []).append(record)
    shown = summary(table, bench.ONE_LINE).markdown()
    files.write_table(options.root, shown, table)
  print(shown)


def pixels(digits: data.Dataset, split: Any) -> Any:
  """Returns the standardized images of a split, flat."""
  images = data.standardize(split["input"], digits.mean, digits.std)
  return jnp.asarray(images.reshape(len(images), -1))


def trainer(
  options: LineOptions, tx: Any, x: Any, y: Any
) -> Callable[[Any], tuple[Any, Any]]:
  """Returns a script that knows nothing of ternary weights.

  A function from the seed to the parameters and the optimizer's state at the
  end.
  """

  def train(seed: Any) -> tuple[Any, Any]:
    start, order = jax.random.split(jax.random.key(seed))
    shape = options.steps, options.batch_size
    rows = jax.random.randint(order, shape, 0, len(x))
    params = NET.init(start, x[:1])["params"]

    def step(carry: Any, i: Any) -> tuple[Any, None]:
      params, opt_state = carry

      def loss(params: Any) -> Any:
        logits = NET.apply({"params": params}, x[i])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, y[i])
        return losses.mean()

      updates, opt_state = tx.update(jax.grad(loss)(params), opt_state, params)
      return (optax.apply_updates(params, updates), opt_state), None

    return jax.lax.scan(step, (params, tx.init(params)), rows)[0]

  return train


def judged(
  params: Any, opt_state: Any, tx: Any, sparsity: float, splits: Any
) -> dict[str, Any]:
  """Returns the record of a run: before and after rounding."""
  if hasattr(tx, "tern"):
    ternary = tx.tern.finalize(opt_state)
  else:
    tern = tern_jax.ParamTransform(tern_jax.TWN(sparsity=sparsity))
    ternary = tern.discretize(*tern.init(params))
  rounded = tern_jax.unpack(tern_jax.pack(ternary))
  leaves = tern_jax.metrics.ternary_leaves(ternary).values()
  codes = np.concatenate([np.ravel(leaf.codes) for leaf in leaves])
  near = [
    np.ravel(abs(x - r) <= 0.02 * abs(r).max())
    for x, r in zip(kernels(params), kernels(rounded), strict=True)
  ]
  record = {"near": float(np.concatenate(near).mean())}
  for name in ("validation", "test"):
    record[name] = accuracy(params, *splits[name])
    record[f"{name}_rounded"] = accuracy(rounded, *splits[name])
  return {**record, "sparsity": float(np.mean(codes == 0)), **log.provenance()}


def kernels(params: Any) -> list[Any]:
  """Returns the kernels of a net."""
  chosen = tern_jax.kernels()(params)
  pairs = zip(jax.tree.leaves(chosen), jax.tree.leaves(params), strict=True)
  return [np.asarray(leaf) for selected, leaf in pairs if selected]


@jax.jit
def accuracy_of(params: Any, x: Any, y: Any) -> Any:
  """Returns the share of right answers."""
  return jnp.mean(jnp.argmax(NET.apply({"params": params}, x), -1) == y)


def accuracy(params: Any, x: Any, y: Any) -> float:
  """Returns the share of right answers, as a number."""
  return float(accuracy_of(params, x, y))


if __name__ == "__main__":
  with errors.explained():
    main(tyro.cli(LineOptions, description=__doc__))
