"""One run: a float net, a ternary net, its packed file, and the record.

Both nets get the same epochs. Each phase goes on at its last checkpoint where
a run was stopped, bit for bit, and a finished run only prints its table.
"""

import dataclasses
import json
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import tern_jax
from experiments.common import cli, data, evaluate, log, plot
from tern_jax import metrics, training
from tern_jax.base import Array, path_str
from tern_jax.checkpoint import Checkpointer
from tern_jax.packed import pack


@dataclasses.dataclass(frozen=True)
class Phase:
  """One of the two trainings of a run.

  Args:
    name: "float" or "ternary".
    tx: optimizer.
    state: where it starts.
    tern: None for the float net.
    snapshots: steps at which the latents are kept.
  """

  name: str
  tx: optax.GradientTransformation
  state: training.TrainState
  tern: tern_jax.ParamTransform | None = None
  snapshots: tuple[int, ...] = ()

  def variables(self, state: training.TrainState) -> Any:
    """Returns what the model is applied to in training."""
    weights = training.effective_weights(state, self.tern)
    return {"params": weights, **state.model_state}

  def ternary(self, state: training.TrainState) -> Any:
    """Returns the variables with `Ternary` leaves; {} for the float net."""
    if self.tern is None:
      return {}
    # Training follows a target closely; what is packed meets it exactly.
    params, tern_state = self.tern.refresh(state.params, state.tern_state)
    codes = self.tern.discretize(params, tern_state)
    return {"params": codes, **state.model_state}

  def keep_latents(self, workdir: Path, state: training.TrainState) -> None:
    """Keeps the latents of a step for the prediction and the pictures."""
    assert self.tern is not None
    leaves = jax.tree_util.tree_leaves_with_path(state.params.latent)
    log.save_latents(
      workdir,
      int(state.step),
      {
        path_str(path): leaf
        for path, leaf in leaves
        if self.tern.where.selects(path_str(path), leaf)
      },
    )


def run(config: cli.Config) -> dict[str, Any]:
  """Trains, packs, evaluates in a fresh process, and writes the record.

  Returns:
    What result.json holds.

  Raises:
    UsageError: the options do not fit, or the directory is another run's.
    DataNotPreparedError: the data set is not there.
  """
  began = time.time()
  dataset = data.load_dataset(config.data, config.data_dir)
  devices = cli.device_count(config)
  model = evaluate.make_model(config, dataset.num_classes)
  image = jnp.zeros((1, *dataset.image_shape))
  key = jax.random.key(config.seed)
  # On the host, because shard_map_step takes over the arrays it is given.
  model_state = jax.device_get(model.init(key, image, train=False))
  params = model_state.pop("params")
  steps = cli.count_steps(config, params, len(dataset.train["label"]))
  # Nothing is written before all options are known to fit.
  workdir = log.claim_workdir(config)
  if (workdir / "result.json").exists():
    return json.loads((workdir / "result.json").read_text())

  tx = adam(config.float_learning_rate, steps)
  start = training.init_state(params, tx, None, model_state, config.seed)
  first = Phase("float", tx, start)
  floats = train(config, dataset, first, steps)
  if config.init == "float":
    params = jax.device_get(floats.params)
  second = ternary_phase(config, steps, params, model_state)
  state = train(config, dataset, second, steps)

  result = evaluate.judge(
    config,
    dataset,
    floats=first.variables(floats),
    unrounded=second.variables(state),
    ternary=second.ternary(state),
    latents=log.load_latents(workdir, second.snapshots[1]),
    method=second.tern,
  )
  result |= {
    "steps": steps,
    "seconds": round(time.time() - began, 1),
    "command": " ".join(["python", *sys.orig_argv[1:]]),
    "versions": {"python": platform.python_version(), "jax": jax.__version__},
    "devices": f"{devices} x {jax.devices()[0].device_kind}",
  }
  if jax.process_index() == 0:
    plot.draw(config, result, second.snapshots)
    text = json.dumps(result, indent=2) + "\n"
    (workdir / "result.json").write_text(text)
  return result


def ternary_phase(
  config: cli.Config, steps: int, params: Any, model_state: Any
) -> Phase:
  """Returns the training of the ternary net."""
  recipe = config.method.recipe(steps)
  where = tern_jax.kernels(exclude=config.exclude)
  tern = tern_jax.ParamTransform(recipe.method, where)
  latent = adam(config.learning_rate, steps)
  tx = optax.partition(
    {
      "latent": optax.chain(recipe.regularizer, latent),
      "scale": adam(config.scale_learning_rate, steps),
      "float": adam(config.float_learning_rate, steps),
    },
    tern_jax.TernParams(
      # Biases and norms lie beside the latents, but want a float net's rate.
      latent=jax.tree.map(lambda k: "latent" if k else "float", where(params)),
      scales="scale",
    ),
  )
  state = training.init_state(params, tx, tern, model_state, config.seed)
  return Phase("ternary", tx, state, tern, (0, recipe.onset, steps))


def adam(rate: float, steps: int) -> optax.GradientTransformation:
  """Adam, its rate decayed to 5 % by a cosine."""
  return optax.adam(optax.cosine_decay_schedule(rate, steps, alpha=0.05))


def make_step(
  config: cli.Config, phase: Phase, classes: int
) -> Callable[[training.TrainState, data.Arrays], Any]:
  """Makes the step of a phase, which takes this process's part of a batch."""
  axis = None if config.parallel == "jit" else "data"
  devices = cli.device_count(config)
  model = evaluate.make_model(config, classes, axis)

  def loss(weights: Any, model_state: Any, batch: Any, key: Array) -> Any:
    del key
    logits, model_state = model.apply(
      {"params": weights, **model_state},
      batch["image"],
      train=True,
      mutable=list(model_state),
    )
    label = batch["label"]
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, label)
    return jnp.mean(losses), (model_state, {})

  step = training.make_step(loss, phase.tx, phase.tern, axis)
  if config.parallel == "jit":
    return jax.jit(step)
  if config.parallel == "pmap":
    mapped = training.pmap_step(step)
    return lambda s, batch: mapped(s, training.split_batch(batch, devices))
  chosen = jax.devices()[: devices * jax.process_count()]
  mesh = Mesh(np.array(chosen), ("data",))
  mapped = training.shard_map_step(step, mesh)
  spread = NamedSharding(mesh, P("data"))
  whole = jax.make_array_from_process_local_data
  return lambda s, batch: mapped(s, whole(spread, batch))


def train(
  config: cli.Config, dataset: data.Dataset, phase: Phase, steps: int
) -> training.TrainState:
  """Runs a phase from its latest checkpoint to its last step."""
  workdir, state, start, losses = config.directory, phase.state, 0, []
  model = evaluate.make_model(config, dataset.num_classes)
  count = evaluate.make_counter(model, dataset)
  step = make_step(config, phase, dataset.num_classes)
  batches = data.batches(
    dataset.train,
    config.batch_size,
    seed=config.seed,
    mean=dataset.mean,
    std=dataset.std,
    process_index=jax.process_index(),
    process_count=jax.process_count(),
  )
  with Checkpointer(workdir / "checkpoints" / phase.name, keep=2) as saved:
    if saved.latest_step() is not None:
      state, position, start = saved.restore(like=state)
      batches.set_state(position)
    with log.Log(workdir, phase.name, start, steps) as out:
      for n in range(start + 1, steps + 1):
        if n - 1 in phase.snapshots:
          phase.keep_latents(workdir, state)
        state, measured = step(state, next(batches))
        losses.append(measured["loss"])
        if n % config.log_every == 0 or n == steps:
          # The only place that waits for the devices.
          right = count(phase.variables(state), dataset.validation)
          line = {
            "loss": float(np.mean(jax.device_get(losses))),
            "validation_accuracy": right / len(dataset.validation["label"]),
          }
          if ternary := phase.ternary(state):
            line["sparsity"] = float(metrics.sparsity(ternary))
          out.write(n, line)
          losses.clear()
        if n % config.checkpoint_every == 0 or n == steps:
          packed, position = pack(phase.ternary(state)), batches.get_state()
          saved.save(n, state, packed, extra=position, method=phase.tern)
  if steps in phase.snapshots:
    phase.keep_latents(workdir, state)
  return state


def main(default: cli.Config, description: str) -> None:
  """Runs what the command line asks for, and prints the table."""
  with evaluate.explained_errors():
    config = cli.parse(default, description)
    result = run(config)
  if jax.process_index() == 0:
    print(f"\n{log.table(result)}\n\n{result['method']}\n{config.directory}")
