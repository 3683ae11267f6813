"""What a run's packed checkpoint is worth, in a process that never trained it.

  python -m experiments.common.evaluate runs/digits-sca-sparsity0.7-seed0

Needs the run's config.json and packed checkpoint, and the data set.
"""

import functools
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
import tyro
from flax import linen as nn

from experiments.common import build, data, errors, log
from tern_jax import load_packed, unpack
from tern_jax.checkpoint import Place, absolute


class Score(NamedTuple):
  """What a net is worth on a split."""

  correct: int
  """Right answers."""
  total: int
  """Answers."""
  loss: float
  """Mean cross entropy of an answer, in nats."""

  @property
  def accuracy(self) -> float:
    """Share of right answers."""
    return self.correct / self.total


def make_scorer(
  model: nn.Module, dataset: data.Dataset
) -> Callable[[Any, data.Arrays], Score]:
  """Makes the function that judges a net.

  Args:
    model: network.
    dataset: tells how images are standardized.

  Returns:
    `score(variables, split)`: what the net answers to a whole split.
  """

  def score(variables: Any, split: data.Arrays) -> Score:
    # Every process judges the whole split: it is small, and none has to wait.
    # No more than 128 MB of inputs.
    fitting = max(1, 2**25 // math.prod(dataset.input_shape))
    batches = data.eval_batches(
      split,
      min(1000, fitting, len(split["label"])),
      mean=dataset.mean,
      std=dataset.std,
    )
    correct, loss, total = 0, 0.0, split["label"].size
    for batch in batches:
      right, losses = _score_batch(model, variables, batch)
      correct, loss = correct + int(right), loss + float(losses)
    return Score(correct, total, loss / total)

  return score


# Of the module, so that it is compiled once for all phases of a run.
@functools.partial(jax.jit, static_argnums=0)
def _score_batch(
  model: nn.Module, variables: Any, batch: Any
) -> tuple[jax.Array, jax.Array]:
  logits: Any = model.apply(variables, batch["input"], train=False)
  label = batch["label"]
  right = jnp.argmax(logits, -1) == label
  losses = optax.softmax_cross_entropy_with_integer_labels(logits, label)
  # An example may have several labels; what fills up a batch has weight 0.
  axes = tuple(range(1, label.ndim))
  counts = jnp.expand_dims(batch["weight"], axes) > 0
  return (
    jnp.sum(right & counts, dtype=jnp.int32),
    jnp.sum(jnp.where(counts, losses, 0)),
  )


def evaluate(workdir: Place) -> dict[str, Any]:
  """Evaluates the packed checkpoint of a run on the test split.

  Args:
    workdir: directory of the run.

  Returns:
    "accuracy", a share, the counts "correct" and "total", and the "loss", in
    nats.
  """
  config = log.read_config(workdir)
  dataset = build.load_dataset(config)
  score = make_scorer(build.make_model(config, dataset.num_classes), dataset)
  variables = unpack(load_packed(workdir / "packed"))
  found = score(variables, dataset.test)
  return {"accuracy": found.accuracy, **found._asdict()}


def in_fresh_process(workdir: Place) -> dict[str, Any]:
  """Returns what `evaluate` finds in a process of its own."""
  paths = [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
  environment = {
    **os.environ,
    "PYTHONPATH": os.pathsep.join(filter(None, paths)),
    # This process may hold most of an accelerator's memory already.
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
  }
  if jax.default_backend() == "tpu":
    # And a TPU belongs to one process.
    environment["JAX_PLATFORMS"] = "cpu"
  command = [sys.executable, "-m", "experiments.common.evaluate", str(workdir)]
  done = subprocess.run(
    command, env=environment, capture_output=True, text=True, check=False
  )
  if done.returncode:
    raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
  return json.loads(done.stdout.splitlines()[-1])


def main(workdir: tyro.conf.Positional[str]) -> None:
  """Prints what a run's packed checkpoint is worth as JSON.

  Args:
    workdir: directory of the run.
  """
  print(json.dumps(evaluate(absolute(workdir))))


if __name__ == "__main__":
  with errors.explained():
    tyro.cli(main)
