"""Where runs and float nets are written, and the records that tell them apart.

A run is named by its options, a float net by a hash of those that it depends
on, so that all runs that start from the same one share it.
"""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

from tern_jax.checkpoint import Place, absolute

#: Options that do not change what a run comes to.
_NOT_OF_RUN = ("workdir", "distributed", "dry_run")

#: Options on which the float net depends, beside its epochs.
_OF_FLOAT = (
  "data",
  "augment",
  "model",
  "hidden",
  "batch_size",
  "float_learning_rate",
  "seed",
)

#: Likewise, but recorded only where not at their defaults: a float net from
#: before there were these options is still found.
_LATER_OF_FLOAT = (
  "norm",
  "layer_norm",
  "scaling",
  "float_optimizer",
  "float_weight_decay",
  "image_size",
  "schedule",
  "label_smoothing",
  "ema",
  "compute",
  "micro_batches",
  "layers",
  "width",
)


def run_directory(config: Any) -> Place:
  """Returns where a run writes, absolute.

  Args:
    config: the options of the run, a `cli.Config`.
  """
  if config.workdir is not None:
    return absolute(config.workdir)
  method = config.method
  fields = {
    field.name: getattr(method, field.name)
    for field in dataclasses.fields(method)
    if getattr(method, field.name) != field.default
  }
  if method.asked is not None:
    fields["sparsity"] = method.asked
  given = [_named(name, value) for name, value in fields.items()]
  name = type(method).__name__.lower()
  parts = [Path(config.data).name, config.model, name, *given]
  return absolute(Path("runs", "-".join([*parts, f"seed{config.seed}"])))


def _named(name: str, value: Any) -> str:
  """Returns an option of a method as part of a directory's name."""
  if value is None:
    return f"no_{name}"
  return name if value is True else f"{name}{round(value, 4):.10g}"


def run_record(config: Any) -> dict[str, Any]:
  """Returns all that a run depends on, as JSON holds it."""
  record = dataclasses.asdict(config)
  for name in _NOT_OF_RUN:
    del record[name]
  record["method"]["name"] = type(config.method).__name__
  return json.loads(json.dumps(record))


def float_directory(config: Any) -> Place:
  """Returns where the float net of a run is kept, absolute."""
  record = json.dumps(float_record(config), sort_keys=True)
  digest = hashlib.sha256(record.encode()).hexdigest()[:8]
  name = f"{Path(config.data).name}-{config.model}-seed{config.seed}-{digest}"
  return run_directory(config).parent / "float" / name


def float_record(config: Any) -> dict[str, Any]:
  """Returns all that the float net of a run depends on, as JSON holds it."""
  record = {name: getattr(config, name) for name in _OF_FLOAT}
  record["epochs"] = config.float_epochs or config.epochs
  defaults = {field.name: field.default for field in dataclasses.fields(config)}
  for name in _LATER_OF_FLOAT:
    if getattr(config, name) != defaults[name]:
      record[name] = getattr(config, name)
  return json.loads(json.dumps(record))
