"""Accuracy of a run's packed checkpoint, in a process that never trained it.

  python -m experiments.common.evaluate runs/digits-sca-sparsity0.7-seed0

Needs the run's config.json and packed checkpoint, and the data set.
"""

import contextlib
import functools
import itertools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import linen as nn

from experiments.common import (
  augment,
  cli,
  data,
  guard,
  log,
  models,
  supernet,
)
from tern_jax import metrics, training
from tern_jax.checkpoint import CheckpointError, load_packed, save_packed
from tern_jax.packed import pack, unpack
from tern_jax.sparsity import PerLayer, target_of

#: Batches after which batch-norm statistics have forgotten the old weights.
REESTIMATION_BATCHES = 50


@contextlib.contextmanager
def explained_errors() -> Iterator[None]:
  """Ends the process with a message, not a traceback, where a user can help."""
  try:
    yield
  except (
    cli.UsageError,
    data.DataNotPreparedError,
    CheckpointError,
    guard.DivergedError,
  ) as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)
  except guard.InterruptedRunError as interruption:
    print(interruption, file=sys.stderr)
    sys.exit(128 + signal.SIGTERM)


def make_model(
  config: cli.Config, classes: int, axis_name: str | None = None
) -> nn.Module:
  """Returns the network of a config.

  Args:
    config: names it.
    classes: outputs.
    axis_name: mapped axis over which batch statistics are shared.
  """
  if config.model == "mlp":
    return models.MLP(config.hidden, classes, axis_name)
  if config.model == "lenet5":
    return models.LeNet5(classes, axis_name)
  if config.model == "micronet":
    return supernet.MicroNet(*config.scaling, classes, axis_name)
  depth = int(config.model.removeprefix("resnet"))
  return models.ResNet((depth - 2) // 6, classes, axis_name)


def augmentation(
  config: cli.Config, dataset: data.Dataset
) -> augment.Augment | None:
  """Returns what is done to training images."""
  if config.augment == "none":
    return None
  if config.augment == "flip_crop":
    return augment.flip_and_crop
  cutout = functools.partial(augment.cutout, fill=dataset.mean)
  return augment.chain(augment.flip_and_crop, augment.color_jitter, cutout)


def make_counter(
  model: nn.Module, dataset: data.Dataset
) -> Callable[[Any, data.Arrays], int]:
  """Makes the function that counts right answers.

  Args:
    model: network.
    dataset: tells how images are standardized.

  Returns:
    `count(variables, split)`: correct answers among all images of a split.
  """

  @jax.jit
  def count_batch(variables: Any, batch: Any) -> jax.Array:
    logits: Any = model.apply(variables, batch["image"], train=False)
    answers = jnp.argmax(logits, -1)
    right = (answers == batch["label"]) & (batch["weight"] > 0)
    return jnp.sum(right, dtype=jnp.int32)

  def count(variables: Any, split: data.Arrays) -> int:
    # Every process counts the whole split: it is small, and none has to wait.
    batches = data.eval_batches(
      split,
      min(1000, len(split["label"])),
      mean=dataset.mean,
      std=dataset.std,
    )
    return sum(int(count_batch(variables, batch)) for batch in batches)

  return count


def evaluate(workdir: Path) -> dict[str, Any]:
  """Evaluates the packed checkpoint of a run on the test split.

  Args:
    workdir: directory of the run.

  Returns:
    "accuracy", a share, and the counts "correct" and "total".
  """
  config = log.read_config(workdir)
  dataset = data.load_dataset(config.data, config.data_dir)
  count = make_counter(make_model(config, dataset.num_classes), dataset)
  variables = unpack(load_packed(workdir / "packed"))
  correct, total = count(variables, dataset.test), len(dataset.test["label"])
  return {"accuracy": correct / total, "correct": correct, "total": total}


def judge(
  config: cli.Config,
  dataset: data.Dataset,
  *,
  floats: Any,
  unrounded: Any,
  ternary: Any,
  latents: dict[str, np.ndarray],
  method: Any,
) -> dict[str, Any]:
  """Rounds, packs and saves the ternary net, and tells what it is worth.

  Args:
    config: of the run.
    dataset: its data.
    floats: variables of the float net.
    unrounded: variables of the ternary net's training forward.
    ternary: the same with `Ternary` leaves.
    latents: {path: latents} from which the sparsity is predicted.
    method: what made the weights.

  Returns:
    The record of the run; accuracies and sparsities as shares.

  Raises:
    RuntimeError: the packed file does not give the rounded net's answers.
  """
  model = make_model(config, dataset.num_classes)
  count = make_counter(model, dataset)
  packed = pack(reestimated(config, dataset, model, ternary))
  save_packed(
    config.directory / "packed", packed, method=method, overwrite=True
  )
  nets = {"float": floats, "unrounded": unrounded, "rounded": unpack(packed)}
  correct = {k: count(net, dataset.test) for k, net in nets.items()}
  correct["packed"] = in_fresh_process(config.directory)["correct"]
  if correct["packed"] != correct["rounded"]:
    raise RuntimeError(
      f"The packed file gives {correct['packed']} right answers in a fresh"
      f" process, the net that was saved {correct['rounded']}."
    )
  total, asked = len(dataset.test["label"]), config.method.asked
  codes = metrics.ternary_leaves(packed["params"])
  layers = {
    path: {
      "asked": target_of(asked, path),
      "predicted": config.method.predict(path, jnp.asarray(latents[path])),
      "reached": float(metrics.sparsity(leaf)),
      "weights": leaf.codes.size,
    }
    for path, leaf in codes.items()
  }
  shares = [x["predicted"] for x in layers.values()]
  weights = [x["weights"] for x in layers.values()]
  predicted = None
  if None not in shares:
    predicted = float(np.average(np.array(shares), weights=weights))
  seen = {k: count(nets[k], dataset.validation) for k in nets}
  files = [f for f in (config.directory / "packed").rglob("*") if f.is_file()]
  return {
    "method": repr(method),
    "seed": config.seed,
    "float_accuracy": correct["float"] / total,
    "accuracy_unrounded": correct["unrounded"] / total,
    "accuracy": correct["packed"] / total,
    "correct": correct,
    "total": total,
    "validation_accuracy": {
      k: n / len(dataset.validation["label"]) for k, n in seen.items()
    },
    "asked_sparsity": None if isinstance(asked, PerLayer) else asked,
    "predicted_sparsity": predicted,
    "sparsity": float(metrics.sparsity(packed)),
    "layers": layers,
    "bits_per_weight": metrics.bits_per_weight(packed),
    "entropy_bits_per_weight": float(metrics.entropy(packed)),
    # Both are whole models: planes and scales, biases, norms, statistics.
    "packed_bytes": sum(x.nbytes for x in jax.tree.leaves(packed)),
    "entropy_bytes": metrics.entropy_bytes(packed),
    "disk_bytes": sum(f.stat().st_size for f in files),
    "float_bytes": sum(4 * x.size for x in jax.tree.leaves(floats)),
  }


def reestimated(
  config: cli.Config, dataset: data.Dataset, model: nn.Module, ternary: Any
) -> Any:
  """Returns ternary variables with batch-norm statistics of their own."""
  state = {k: v for k, v in ternary.items() if k != "params"}
  if not state:
    return ternary

  def update(weights: Any, state: Any, batch: Any) -> Any:
    variables = {"params": weights, **state}
    collections = list(state)
    return model.apply(
      variables, batch["image"], train=True, mutable=collections
    )[1]

  weights = unpack(pack(ternary["params"]))
  # Whole batches on every process, so that all come to the same statistics.
  batches = data.batches(
    dataset.train,
    config.batch_size,
    seed=config.seed,
    mean=dataset.mean,
    std=dataset.std,
    # Training saw batches like these, and so do its statistics.
    augment=augmentation(config, dataset),
  )
  batches = itertools.islice(batches, REESTIMATION_BATCHES)
  state = training.reestimate_model_state(update, weights, state, batches)
  return {"params": ternary["params"], **state}


def in_fresh_process(workdir: Path) -> dict[str, Any]:
  """Returns what `evaluate` finds in a process of its own."""
  paths = [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
  environment = {
    **os.environ,
    "PYTHONPATH": os.pathsep.join(filter(None, paths)),
    # This process may hold most of an accelerator's memory already.
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
  }
  command = [sys.executable, "-m", "experiments.common.evaluate", str(workdir)]
  done = subprocess.run(
    command, env=environment, capture_output=True, text=True, check=False
  )
  if done.returncode:
    raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
  return json.loads(done.stdout.splitlines()[-1])


def main(workdir: tyro.conf.Positional[Path]) -> None:
  """Prints the accuracy of a run's packed checkpoint as JSON.

  Args:
    workdir: directory of the run.
  """
  with explained_errors():
    print(json.dumps(evaluate(workdir)))


if __name__ == "__main__":
  tyro.cli(main)
