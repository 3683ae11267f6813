"""What a run's packed checkpoint is worth, in a process that never trained it.

And how fast its forward passes are, on packed weights and on unpacked ones.

  python -m experiments.common.evaluate runs/digits-sca-sparsity0.7-seed0

Needs the run's config.json and packed checkpoint, and the data set.
"""

import dataclasses
import functools
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
import tyro
from flax import linen as nn

from experiments.common import build, data, errors, log, timing
from tern_jax import inference, load_packed, unpack
from tern_jax.checkpoint import Place, absolute
from tern_jax.inference import cpu

#: Turns in which forward passes are timed.
_ROUNDS = 7
#: Activations of the forms that multiply by packed weights.
_PACKED = {"packed": "float32", "packed_int8": "int8"}


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


@dataclasses.dataclass(frozen=True)
class _OnPackedWeights:
  """A network that multiplies by packed weights as they are."""

  model: nn.Module

  def apply(self, variables: Any, x: jax.Array, *, train: bool) -> Any:
    return inference.apply_fn(self._forward)(variables, x, train)

  def prepare(self, variables: Any, x: jax.Array, activations: str) -> Any:
    net = inference.apply_fn(self._forward)
    return net.prepare(variables, x, False, activations=activations)

  def _forward(self, variables: Any, x: jax.Array, train: bool) -> Any:
    return self.model.apply(variables, x, train=train)


def make_scorer(
  model: nn.Module | _OnPackedWeights, dataset: data.Dataset
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
    batches = _batches(dataset, split)
    correct, loss, total = 0, 0.0, split["label"].size
    for batch in batches:
      right, losses = _score_batch(model, variables, batch)
      correct, loss = correct + int(right), loss + float(losses)
    return Score(correct, total, loss / total)

  return score


def _batches(
  dataset: data.Dataset, split: data.Arrays
) -> Iterator[data.Arrays]:
  # No more than 128 MB of inputs.
  fitting = max(1, 2**25 // math.prod(dataset.input_shape))
  size = min(1000, fitting, len(split["label"]))
  return data.eval_batches(split, size, mean=dataset.mean, std=dataset.std)


# Of the module, so that it is compiled once for all phases of a run.
@functools.partial(jax.jit, static_argnums=0)
def _score_batch(
  model: nn.Module | _OnPackedWeights, variables: Any, batch: Any
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
    nats, of the unpacked weights.
  """
  model, dataset, packed = _load(workdir)
  found = make_scorer(model, dataset)(unpack(packed), dataset.test)
  return {"accuracy": found.accuracy, **found._asdict()}


def forward_passes(workdir: Place) -> dict[str, Any]:
  """Tells what forward passes of a run's packed net are worth, and cost.

  A pass has its loss in it. Weights are prepared for each batch.

  Args:
    workdir: directory of the run.

  Returns:
    "device"; "native", the instruction set of the native code, or None;
    "forms": what unpacked weights, "float", are worth and cost, products by
    packed ones, "packed", and the same with int8 activations, "packed_int8".
    That is "correct" and "loss" on the test split, and of two "batches", of one
    example and as large as in the evaluation, the "size", the median "seconds"
    of a pass and the "bytes" of all weights in memory.
  """
  model, dataset, packed = _load(workdir)
  net = _OnPackedWeights(model)
  whole = next(_batches(dataset, dataset.test))
  forms: dict[str, dict[str, Any]] = {}
  for size in (1, len(whole["input"])):
    batch = {key: jax.device_put(x[:size]) for key, x in whole.items()}
    weights = {"float": unpack(packed)} | {
      name: net.prepare(packed, batch["input"], activations)
      for name, activations in _PACKED.items()
    }
    models = {name: net if name in _PACKED else model for name in weights}
    calls = {
      name: functools.partial(_score_batch, models[name], tree, batch)
      for name, tree in jax.device_put(weights).items()
    }
    seconds = timing.medians(calls, _ROUNDS, time.perf_counter)
    for name, tree in weights.items():
      form = forms.setdefault(name, {"batches": []})
      figures = {"size": size, "seconds": seconds[name], "bytes": _bytes(tree)}
      form["batches"].append(figures)
      if len(form["batches"]) == 2:
        score = make_scorer(models[name], dataset)(tree, dataset.test)
        form |= {"correct": score.correct, "loss": score.loss}
  device = jax.devices()[0].device_kind
  return {"device": device, "native": cpu.isa(), "forms": forms}


def _load(workdir: Place) -> tuple[nn.Module, data.Dataset, Any]:
  """Returns a run's network, its data and its packed weights."""
  config = log.read_config(workdir)
  dataset = build.load_dataset(config)
  model = build.make_model(config, dataset.num_classes)
  return model, dataset, load_packed(workdir / "packed")


def _bytes(tree: Any) -> int:
  return sum(x.nbytes for x in jax.tree.leaves(tree))


def in_fresh_process(workdir: Place) -> dict[str, Any]:
  """Returns what `evaluate` finds in a process of its own.

  With it comes "forward", what `forward_passes` finds there.
  """
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
  """Prints what a run's packed checkpoint is worth, and costs, as JSON.

  Args:
    workdir: directory of the run.
  """
  place = absolute(workdir)
  print(json.dumps({**evaluate(place), "forward": forward_passes(place)}))


if __name__ == "__main__":
  with errors.explained():
    tyro.cli(main)
