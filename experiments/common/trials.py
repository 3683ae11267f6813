"""The runs of tables that set methods side by side, and their records.

A run of a row lies in a directory of its own, named by its method and seed.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from experiments.common import (
  build,
  cli,
  errors,
  evaluate,
  files,
  log,
  methods,
)
from experiments.common.runner import checks, float_net, run

Record = dict[str, Any]
#: {label: (method, options that differ from the experiment's)}
Rows = dict[str, tuple[methods.Method, dict[str, Any]]]

#: TGA without a surrogate, and as He and Fan have it. Their thresholds learn
#: through the scale alone, by SGD at the rate of the weights.
PLAIN_TGA = methods.Tga(surrogate=None)
PUBLISHED_TGA = methods.Tga(surrogate=None, published=True)


def by_sgd(rate: float) -> dict[str, Any]:
  """Returns the options of those two at a rate of the latents."""
  return {
    "learning_rate": rate,
    "scale_optimizer": "sgd",
    "scale_learning_rate": rate,
  }


def chosen(asked: Sequence[str], known: Sequence[str]) -> list[str]:
  """Returns the asked rows in the order of the table; all where none is asked.

  Raises:
    UsageError: there is no such row.

  >>> chosen(["TWN", "float"], ["float", "SCA", "TWN"])
  ['float', 'TWN']
  """
  if unknown := [label for label in asked if label not in known]:
    raise errors.UsageError(
      f"rows={'; '.join(unknown)}, but there are: {'; '.join(known)}."
    )
  return [label for label in known if label in (asked or known)]


def ternary(
  config: cli.Config,
  place: Path,
  method: methods.Method,
  changes: Mapping[str, Any],
) -> Record:
  """Trains a ternary net, if that is not done yet.

  Args:
    config: options of the experiment and the seed.
    place: where its directory and that of its float net lie.
    method: of the row.
    changes: options of the row.

  Returns:
    The record of the run.
  """
  own = dataclasses.replace(config, method=method, workdir=None, **changes)
  workdir = str(place / own.directory.name)
  return run.run(dataclasses.replace(own, workdir=workdir))


def float_only(config: cli.Config, place: Path) -> Record:
  """Trains and evaluates a float net, if that is not done yet.

  Args:
    config: its options, with the seed.
    place: where it lies in a directory `float`.

  Returns:
    Its record, with what `bench.ACCURACY` shows.
  """
  # The directory is that of no run: it only tells where the float net lies.
  config = dataclasses.replace(config, workdir=str(place / "none"))
  path = config.float_directory / "record.json"
  if record := log.read_object(path):
    return record
  dataset = build.load_dataset(config)
  variables: Any = float_net.train(config, dataset)
  model = build.make_model(config, dataset.num_classes)
  score = evaluate.make_scorer(model, dataset)
  kind = jax.devices()[0].device_kind
  record = {
    "validation": score(variables, dataset.validation).accuracy,
    "test": score(variables, dataset.test).accuracy,
    "sparsity": None,
    "entropy": None,
    "seed": config.seed,
    "devices": f"{checks.device_count(config)} x {kind}",
    **log.provenance(),
  }
  files.write(path, json.dumps(record, indent=2) + "\n")
  return record
