"""What a run comes to: its packed file, its record, and the tables of that."""

import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from experiments.common import build, cli, data, evaluate, processes
from experiments.common.evaluate import Score
from experiments.common.tables import Table
from tern_jax import metrics, pack, save_packed, training, unpack
from tern_jax.checkpoint import disk_bytes

#: Batches after which batch-norm statistics have forgotten the old weights.
REESTIMATION_BATCHES = 50


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
  model = build.make_model(config, dataset.num_classes)
  score = evaluate.make_scorer(model, dataset)
  packed = pack(reestimated(config, dataset, model, ternary))
  save_packed(
    config.directory / "packed", packed, method=method, overwrite=True
  )
  nets = {"float": floats, "unrounded": unrounded, "rounded": unpack(packed)}
  tested = {k: score(net, dataset.test) for k, net in nets.items()}
  seen = {k: score(net, dataset.validation) for k, net in nets.items()}
  tested["packed"], forward = _score_of_file(config, tested["rounded"])
  return {
    **({"text_sha256": dataset.sha256} if dataset.sha256 else {}),
    "method": repr(method),
    "seed": config.seed,
    **_answers(tested, seen),
    **_sparsities(config, packed, latents),
    **_sizes(config, packed, floats),
    **({"forward": forward} if forward else {}),
  }


def _score_of_file(
  config: cli.Config, rounded: Score
) -> tuple[Score, dict[str, Any]]:
  """Returns what the packed file is worth, and costs, in a fresh process.

  Raises:
    RuntimeError: it does not give the answers of the net that was saved.
  """
  if not processes.leads():
    return rounded, {}
  found = evaluate.in_fresh_process(config.directory)
  if found["correct"] != rounded.correct:
    raise RuntimeError(
      f"The packed file gives {found['correct']} right answers in a fresh"
      f" process, the net that was saved {rounded.correct}."
    )
  if not (forward := found.get("forward", {})):
    return rounded._replace(loss=found["loss"]), {}
  packed = forward["forms"]["packed"]
  # The order of sums decides where two answers are as good.
  if abs(packed["correct"] - rounded.correct) > max(1, rounded.total // 1000):
    raise RuntimeError(
      f"Products by packed weights give {packed['correct']} right answers, the"
      f" same weights unpacked {rounded.correct}: tern_jax.inference is wrong."
    )
  score = rounded._replace(correct=packed["correct"], loss=packed["loss"])
  return score, forward


def _answers(
  tested: dict[str, Score], seen: dict[str, Score]
) -> dict[str, Any]:
  """Returns the part of the record about the answers of each net."""
  correct = {k: found.correct for k, found in tested.items()}
  total = tested["float"].total
  return {
    "float_accuracy": correct["float"] / total,
    "accuracy_unrounded": correct["unrounded"] / total,
    "accuracy": correct["packed"] / total,
    "correct": correct,
    "total": total,
    "loss": {k: found.loss for k, found in tested.items()},
    "validation_accuracy": {k: found.accuracy for k, found in seen.items()},
    "validation_loss": {k: found.loss for k, found in seen.items()},
  }


def _sparsities(
  config: cli.Config, packed: Any, latents: dict[str, np.ndarray]
) -> dict[str, Any]:
  """Returns the part of the record about zeros, asked for and reached."""
  asked = config.method.asked
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
    # One number only: a target of each layer is told there.
    "asked_sparsity": asked if isinstance(asked, int | float) else None,
    "predicted_sparsity": predicted,
    "sparsity": float(metrics.sparsity(packed)),
    "layers": layers,
  }


def _sizes(config: cli.Config, packed: Any, floats: Any) -> dict[str, Any]:
  """Returns the part of the record about bits and bytes."""
  return {
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
  batches = build.training_batches(config, dataset, shared=False)
  batches = itertools.islice(batches, REESTIMATION_BATCHES)
  state = training.reestimate_model_state(update, weights, state, batches)
  return {"params": ternary["params"], **state}


def tables(result: dict[str, Any]) -> list[Table]:
  """Returns accuracy, sparsity by layer, sizes and times of a run.

  Args:
    result: what result.json holds.
  """
  found = [_accuracies(result), _layers(result), _bytes(result)]
  # Records of earlier versions have none, nor do other processes' own.
  return [*found, _forward(result["forward"])] if "forward" in result else found


def text(result: dict[str, Any]) -> str:
  """Returns the tables of a run in lines of at most 80 columns."""
  return "\n\n".join(table.text() for table in tables(result))


def _accuracies(result: dict[str, Any]) -> Table:
  # A text is measured by what a guess at its next character costs.
  is_text = "text_sha256" in result
  units = ("bits/character",) if is_text else ()
  table = Table(("test accuracy", "%", "correct", *units))
  for name, key in (
    ("float", "float"),
    ("ternary, as trained", "unrounded"),
    ("ternary, rounded", "rounded"),
    ("packed, fresh process", "packed"),
  ):
    correct, total = result["correct"][key], result["total"]
    row = (name, f"{100 * correct / total:.2f}", f"{correct}/{total}")
    if is_text:
      row += (f"{result['loss'][key] / math.log(2):.4f}",)
    table.rows.append(row)
  return table


def _layers(result: dict[str, Any]) -> Table:
  table = Table(("sparsity", "asked", "predicted", "reached", "weights"))
  whole = {
    "asked": result["asked_sparsity"],
    "predicted": result["predicted_sparsity"],
    "reached": result["sparsity"],
    "weights": sum(x["weights"] for x in result["layers"].values()),
  }
  for name, layer in {**result["layers"], "all layers": whole}.items():
    shares = [
      "-" if layer[key] is None else f"{layer[key]:.4f}"
      for key in ("asked", "predicted", "reached")
    ]
    table.rows.append((name, *shares, f"{layer['weights']:,}"))
  return table


def _bytes(result: dict[str, Any]) -> Table:
  bits, entropy = result["bits_per_weight"], result["entropy_bits_per_weight"]
  return Table(
    ("size", "", ""),
    [
      ("packed planes and scales", f"{bits:.3f}", "bit/w"),
      ("entropy", f"{entropy:.3f}", "bit/w"),
      ("packed model in memory", f"{result['packed_bytes']:,}", "bytes"),
      ("packed model on disk", f"{result['disk_bytes']:,}", "bytes"),
      ("float32 model", f"{result['float_bytes']:,}", "bytes"),
    ],
  )


def _forward(found: dict[str, Any]) -> Table:
  first = next(iter(found["forms"].values()))
  sizes = [str(batch["size"]) for batch in first["batches"]]
  table = Table(
    ("forward pass", *(f"batch {n}, ms" for n in sizes), "weights", "correct")
  )
  for key, name in (
    ("float", "float weights"),
    ("packed", "packed weights"),
    ("packed_int8", "packed, int8 activations"),
  ):
    form = found["forms"][key]
    times = (f"{1e3 * batch['seconds']:.3f}" for batch in form["batches"])
    size = f"{form['batches'][-1]['bytes']:,} bytes"
    table.rows.append((name, *times, size, str(form["correct"])))
  return table
