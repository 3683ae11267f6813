"""What a run's packed checkpoint is worth, in a process that never trained it.

  python -m experiments.common.evaluate runs/digits-sca-sparsity0.7-seed0

Needs the run's config.json and packed checkpoint, and the data set.
"""

import contextlib
import functools
import itertools
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from flax import linen as nn

from experiments.common import (
  augment,
  cli,
  data,
  guard,
  log,
  models,
  processes,
  supernet,
  text,
)
from tern_jax import metrics, training
from tern_jax.checkpoint import (
  CheckpointError,
  Place,
  absolute,
  disk_bytes,
  load_packed,
  save_packed,
)
from tern_jax.storage.packed import pack, unpack
from tern_jax.targets.schedules import PerLayer

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
    sys.exit(guard.INTERRUPTED)


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
    return models.MLP(config.hidden, classes, axis_name, config.norm)
  if config.model == "convnet":
    return models.ConvNet(config.hidden, classes, axis_name)
  if config.model == "lenet5":
    return models.LeNet5(classes, axis_name)
  if config.model == "vgg_small":
    return models.VGGSmall(classes, axis_name)
  if config.model == "micronet":
    return supernet.MicroNet(*config.scaling, classes, axis_name)
  if config.model in models.IMAGENET:
    blocks, bottleneck = models.IMAGENET[config.model]
    return models.ImageNetResNet(blocks, bottleneck, classes, axis_name)
  if config.model == "transformer":
    return models.Transformer(
      config.layers, config.width, text.CONTEXT, classes, axis_name
    )
  depth = int(config.model.removeprefix("resnet"))
  return models.ResNet((depth - 2) // 6, classes, axis_name)


def load_dataset(config: cli.Config) -> data.Dataset:
  """Returns the data of a run.

  Raises:
    UsageError: the options do not fit its images.
    DataNotPreparedError: it is not there.
  """
  size = config.image_size
  try:
    dataset = data.load_dataset(config.data, config.data_dir, size)
  except ValueError as error:
    raise cli.UsageError(str(error)) from error
  streamed = isinstance(dataset.train["input"], data.Images)
  if streamed and config.augment not in ("none", "resized_crop"):
    raise cli.UsageError(
      f"augment={config.augment} keeps the sizes of images, in which those of"
      f" {config.data} differ: give --augment resized_crop."
    )
  return dataset


def augmentation(
  config: cli.Config, dataset: data.Dataset
) -> augment.Augment | None:
  """Returns what is done to training images."""
  if config.augment == "none":
    return None
  if config.augment == "flip_crop":
    return augment.flip_and_crop
  if config.augment == "resized_crop":
    size = dataset.input_shape[0]
    return functools.partial(augment.random_resized_crop, size=size)
  cutout = functools.partial(augment.cutout, fill=dataset.mean)
  return augment.chain(augment.flip_and_crop, augment.color_jitter, cutout)


def training_batches(
  config: cli.Config, dataset: data.Dataset, shared: bool = True
) -> Any:
  """Returns the iterator over training batches.

  Args:
    config: names what is done to images.
    dataset: its data.
    shared: give this process its part of each batch, not the whole.
  """
  return data.batches(
    dataset.train,
    config.batch_size,
    seed=config.seed,
    mean=dataset.mean,
    std=dataset.std,
    augment=augmentation(config, dataset),
    process_index=jax.process_index() if shared else 0,
    process_count=jax.process_count() if shared else 1,
  )


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
  dataset = load_dataset(config)
  score = make_scorer(make_model(config, dataset.num_classes), dataset)
  variables = unpack(load_packed(workdir / "packed"))
  found = score(variables, dataset.test)
  return {"accuracy": found.accuracy, **found._asdict()}


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
    The record of the run; accuracies and sparsities as shares, losses in nats.

  Raises:
    RuntimeError: the packed file does not give the rounded net's answers.
  """
  model = make_model(config, dataset.num_classes)
  score = make_scorer(model, dataset)
  packed = pack(reestimated(config, dataset, model, ternary))
  save_packed(
    config.directory / "packed", packed, method=method, overwrite=True
  )
  nets = {"float": floats, "unrounded": unrounded, "rounded": unpack(packed)}
  tested = {k: score(net, dataset.test) for k, net in nets.items()}
  seen = {k: score(net, dataset.validation) for k, net in nets.items()}
  correct = {k: found.correct for k, found in tested.items()}
  losses = {k: found.loss for k, found in tested.items()}
  packed_file = tested["rounded"]._asdict()
  if processes.leads():
    packed_file = in_fresh_process(config.directory)
  correct["packed"] = packed_file["correct"]
  if correct["packed"] != correct["rounded"]:
    raise RuntimeError(
      f"The packed file gives {correct['packed']} right answers in a fresh"
      f" process, the net that was saved {correct['rounded']}."
    )
  losses["packed"] = packed_file["loss"]
  total, asked = tested["float"].total, config.method.asked
  codes = metrics.ternary_leaves(packed["params"])
  layers = {
    path: {
      "asked": config.method.asked_of(path),
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
  return {
    **({"text_sha256": dataset.sha256} if dataset.sha256 else {}),
    "method": repr(method),
    "seed": config.seed,
    "float_accuracy": correct["float"] / total,
    "accuracy_unrounded": correct["unrounded"] / total,
    "accuracy": correct["packed"] / total,
    "correct": correct,
    "total": total,
    "loss": losses,
    "validation_accuracy": {k: found.accuracy for k, found in seen.items()},
    "validation_loss": {k: found.loss for k, found in seen.items()},
    "asked_sparsity": None if isinstance(asked, PerLayer) else asked,
    "predicted_sparsity": predicted,
    "sparsity": float(metrics.sparsity(packed)),
    "layers": layers,
    "bits_per_weight": metrics.bits_per_weight(packed),
    "entropy_bits_per_weight": float(metrics.entropy(packed)),
    # Both are whole models: planes and scales, biases, norms, statistics.
    "packed_bytes": sum(x.nbytes for x in jax.tree.leaves(packed)),
    "entropy_bytes": metrics.entropy_bytes(packed),
    "disk_bytes": disk_bytes(config.directory / "packed"),
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
      variables, batch["input"], train=True, mutable=collections
    )[1]

  weights = unpack(pack(ternary["params"]))
  # Training saw batches like these, but here every process takes whole ones,
  # so that all come to the same statistics.
  batches = training_batches(config, dataset, shared=False)
  batches = itertools.islice(batches, REESTIMATION_BATCHES)
  state = training.reestimate_model_state(update, weights, state, batches)
  return {"params": ternary["params"], **state}


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
  with explained_errors():
    print(json.dumps(evaluate(absolute(workdir))))


if __name__ == "__main__":
  tyro.cli(main)
