"""One run: a float net, a ternary net, its packed file, and the record.

Both nets get the same epochs. Each phase goes on at its last checkpoint where
a run was stopped, bit for bit, and a finished run only prints its table.
"""

import contextlib
import dataclasses
import fcntl
import json
import platform
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
from experiments.common import (
  cli,
  data,
  evaluate,
  guard,
  log,
  optimizers,
  plot,
  pretrained,
  processes,
)
from tern_jax import metrics, training
from tern_jax.checkpoint import Checkpointer, Place
from tern_jax.core.containers import Array
from tern_jax.core.paths import path_str
from tern_jax.storage.packed import pack


@dataclasses.dataclass(frozen=True)
class Stage:
  """A part of a training, with a method and an optimizer of its own.

  Args:
    tern: None for the float net.
    tx: optimizer.
    last: last step.
    keep_best: end it with the state of the best validation accuracy.
  """

  tern: tern_jax.ParamTransform | None
  tx: optax.GradientTransformation
  last: int
  keep_best: bool = False

  def outcome(self, state: training.TrainState) -> training.TrainState:
    """Returns the state with the averaged parameters, where there are any."""
    if not isinstance(state.opt_state, optimizers.AveragedState):
      return state
    return dataclasses.replace(state, params=state.opt_state.average)

  def variables(self, state: training.TrainState) -> Any:
    """Returns what the model is applied to, as in training."""
    outcome = self.outcome(state)
    if outcome is not state:
      # The thresholds followed other latents.
      outcome = self.refreshed(state)
    weights = training.effective_weights(outcome, self.tern)
    return {"params": weights, **state.model_state}

  def ternary(self, state: training.TrainState) -> Any:
    """Returns the variables with `Ternary` leaves; {} for the float net."""
    if self.tern is None:
      return {}
    state = self.refreshed(state)
    codes = self.tern.discretize(state.params, state.tern_state)
    return {"params": codes, **state.model_state}

  def packed(self, state: training.TrainState) -> dict[str, Any]:
    """Returns {path: packed weights}; {} for the float net."""
    if self.tern is None:
      return {}
    return pack(metrics.ternary_leaves(self.ternary(state)["params"]))

  def latents(self, state: training.TrainState) -> dict[str, Any]:
    """Returns {path: latents} of what is made ternary."""
    assert self.tern is not None
    latent = self.outcome(state).params.latent
    leaves = jax.tree_util.tree_leaves_with_path(latent)
    return {
      path_str(path): leaf
      for path, leaf in leaves
      if self.tern.where.selects(path_str(path), leaf)
    }

  def refreshed(self, state: training.TrainState) -> training.TrainState:
    """Returns the outcome with thresholds that fit its latents exactly."""
    # Training follows them closely; what is packed or frozen meets them.
    state = self.outcome(state)
    if self.tern is None:
      return state
    params, tern_state = self.tern.refresh(state.params, state.tern_state)
    return dataclasses.replace(state, params=params, tern_state=tern_state)


@dataclasses.dataclass(frozen=True)
class Phase:
  """One of the two trainings of a run.

  Args:
    name: "float" or "ternary".
    directory: where it writes.
    state: where it starts.
    stages: one after the other.
    snapshots: steps at which the latents are kept.
  """

  name: str
  directory: Place
  state: training.TrainState
  stages: tuple[Stage, ...]
  snapshots: tuple[int, ...] = ()

  @property
  def final(self) -> Stage:
    """The last stage."""
    return self.stages[-1]

  def keep_latents(self, state: training.TrainState) -> None:
    """Keeps the latents of a step for the prediction and the pictures."""
    latents = self.final.latents(state)
    log.save_latents(self.directory, int(state.step), latents)


def run(config: cli.Config) -> dict[str, Any]:
  """Trains, packs, evaluates in a fresh process, and writes the record.

  Returns:
    What result.json holds.

  Raises:
    UsageError: the options do not fit, or the directory is another run's.
    DataNotPreparedError: the data set is not there.
  """
  began = time.time()
  dataset = evaluate.load_dataset(config)
  devices = cli.device_count(config)
  params, model_state = initial_variables(config, dataset)
  images = len(dataset.train["label"])
  _, steps = cli.count_steps(config, images)
  cli.fit(config, params, model_state)
  floats = given_float(config, params, model_state)
  # Nothing is written before all options are known to fit.
  workdir = config.directory
  with processes.leader_first("claim"):
    log.claim(workdir, config.to_json())
  if (workdir / "result.json").exists():
    return json.loads((workdir / "result.json").read_text())

  if floats is None:
    floats = train_float(config, dataset)
  if (config.init or config.method.start) == "float":
    params, model_state = floats["params"], dict(floats)
    del model_state["params"]
  config = cli.fit(config, params, model_state)
  phase = ternary_phase(config, steps, params, model_state)
  state = train(config, dataset, phase)

  result = evaluate.judge(
    config,
    dataset,
    floats=floats,
    unrounded=phase.final.variables(state),
    ternary=phase.final.ternary(state),
    latents=log.load_latents(workdir, phase.snapshots[1]),
    method=phase.final.tern,
  )
  result |= {
    "steps": steps,
    "seconds": round(time.time() - began, 1),
    **log.provenance(),
    "versions": {"python": platform.python_version(), "jax": jax.__version__},
    "devices": f"{devices} x {jax.devices()[0].device_kind}",
  }
  if processes.leads():
    plot.draw(config, result, phase.snapshots)
    log.write_pictures(workdir, steps)
    text = json.dumps(result, indent=2) + "\n"
    (workdir / "result.json").write_text(text)
  processes.wait_for_all("the result")
  return result


def initial_variables(
  config: cli.Config, dataset: data.Dataset
) -> tuple[Any, dict[str, Any]]:
  """Returns random parameters, and the other variables of the model."""
  model = evaluate.make_model(config, dataset.num_classes)
  key = jax.random.key(config.seed)
  variables = model.init(key, dataset.blank, train=False)
  # On the host, because shard_map_step takes over the arrays it is given.
  model_state = jax.device_get(variables)
  return model_state.pop("params"), model_state


def given_float(
  config: cli.Config, params: Any, model_state: dict[str, Any]
) -> Any:
  """Returns the variables of a float net from elsewhere; None to train one.

  Args:
    config: the options.
    params: of the model, for their shapes.
    model_state: its other variables likewise.

  Raises:
    UsageError: there is no such net, or it is of another model.
    CheckpointError: likewise of a checkpoint.
  """
  if config.float_from is None:
    return None
  return pretrained.load(config.float_from, {"params": params, **model_state})


def train_float(config: cli.Config, dataset: data.Dataset) -> Any:
  """Returns the variables of the float net, trained once for all runs."""
  params, model_state = initial_variables(config, dataset)
  images = len(dataset.train["label"])
  steps, _ = cli.count_steps(config, images)
  tx = optimizers.of_float_net(config, steps)
  state = training.init_state(params, tx, None, model_state, config.seed)
  directory = config.float_directory
  stage = Stage(None, tx, steps)
  phase = Phase("float", directory, state, (stage,))
  with contextlib.ExitStack() as stack:
    if processes.leads() and isinstance(directory, Path):
      # Runs that start together share one training: the first one does it.
      directory.parent.mkdir(parents=True, exist_ok=True)
      lock = directory.with_suffix(".lock").open("w")
      fcntl.flock(stack.enter_context(lock), fcntl.LOCK_EX)
    with processes.leader_first("claim of the float net"):
      log.claim(directory, config.float_record())
    state = train(config, dataset, phase)
  return jax.device_get(stage.variables(state))


def ternary_phase(
  config: cli.Config, steps: int, params: Any, model_state: Any
) -> Phase:
  """Returns the training of the ternary net."""
  where = tern_jax.kernels(exclude=config.exclude)
  largest = where.largest(params, config.stacked)
  recipe = config.method.recipe(steps, largest, config.stacked)
  labels = tern_jax.TernParams(
    # What stays float lies beside the latents, but wants a rate of its own.
    latent=jax.tree.map(lambda k: "latent" if k else "float", where(params)),
    scales="scale",
  )
  stages, first = [], 0
  for part in recipe.stages:
    tern = tern_jax.ParamTransform(part.method, where, config.stacked)
    tx = optimizers.of_ternary_net(
      config, recipe.regularizer, labels, steps, first
    )
    stages.append(Stage(tern, tx, part.last, part.keep_best))
    first = part.last
  state = training.init_state(
    params, stages[0].tx, stages[0].tern, model_state, config.seed
  )
  snapshots = (0, recipe.onset, steps)
  return Phase("ternary", config.directory, state, tuple(stages), snapshots)


def make_step(
  config: cli.Config, stage: Stage, classes: int
) -> Callable[[training.TrainState, data.Arrays], Any]:
  """Makes the step of a stage, which takes this process's part of a batch."""
  axis = None if config.parallel == "jit" else "data"
  devices = cli.device_count(config)
  model = evaluate.make_model(config, classes, axis)

  def loss(weights: Any, model_state: Any, batch: Any, key: Array) -> Any:
    if axis is not None:
      # Devices must not drop alike.
      key = jax.random.fold_in(key, jax.lax.axis_index(axis))
    inputs = batch["input"]
    if config.compute == "bfloat16":
      # The latents stay float32, and so do batch statistics.
      weights, inputs = jax.tree.map(_bfloat16, (weights, inputs))
    logits, model_state = model.apply(
      {"params": weights, **model_state},
      inputs,
      train=True,
      mutable=list(model_state),
      rngs={"dropout": key},
    )
    losses = _cross_entropy(
      logits.astype(jnp.float32), batch["label"], config.label_smoothing
    )
    return jnp.mean(losses), (model_state, {})

  step = training.make_step(
    loss, stage.tx, stage.tern, axis, micro_batches=config.micro_batches
  )
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


def _bfloat16(x: Array) -> Array:
  is_float = jnp.issubdtype(x.dtype, jnp.floating)
  return x.astype(jnp.bfloat16) if is_float else x


def _cross_entropy(logits: Array, labels: Array, smoothing: float) -> Array:
  if not smoothing:
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels)
  smooth = jax.nn.one_hot(labels, logits.shape[-1])
  smooth = optax.smooth_labels(smooth, smoothing)
  return optax.softmax_cross_entropy(logits, smooth)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Progress:
  """What a checkpoint of a phase holds.

  Args:
    state: of the training.
    seen: packed weights at the last line of metrics, {} for the float net.
  """

  state: training.TrainState
  seen: Any


def train(
  config: cli.Config, dataset: data.Dataset, phase: Phase
) -> training.TrainState:
  """Runs a phase from its latest checkpoint to its last step.

  Raises:
    InterruptedRunError: SIGTERM came; where the run was is kept.
    DivergedError: the loss is not finite; the checkpoints before it are kept.
  """
  state, steps = phase.state, phase.final.last
  model = evaluate.make_model(config, dataset.num_classes)
  score = evaluate.make_scorer(model, dataset)
  batches = evaluate.training_batches(config, dataset)
  folder = phase.directory / "checkpoints"
  with contextlib.ExitStack() as stack:
    saved = stack.enter_context(Checkpointer(folder / phase.name, keep=2))

    def keep(n: int, stage: Stage) -> None:
      # All that is between two lines is kept too: a run may stop anywhere.
      extra = {"data": batches.get_state(), "losses": [*map(float, losses)]}
      packed = pack(stage.ternary(state))
      progress = Progress(state, seen)
      saved.save(n, progress, packed, extra=extra, method=stage.tern)

    losses, seen = [], jax.device_get(phase.stages[0].packed(state))
    if saved.latest_step() is None:
      keep(0, phase.stages[0])
    progress, extra, start = saved.restore(like=Progress(state, seen))
    state, seen = progress.state, progress.seen
    losses = [*map(np.float32, extra["losses"])]
    batches.set_state(extra["data"])
    asked = stack.enter_context(guard.termination())
    out = stack.enter_context(
      log.Log(phase.directory, phase.name, start, steps)
    )
    for i, stage in enumerate(phase.stages):
      if start >= stage.last:
        continue
      step = make_step(config, stage, dataset.num_classes)
      watch = Watch(config, stage)
      best = None
      if stage.keep_best:
        best = stack.enter_context(Best(folder / f"{phase.name}-best", state))
      for n in range(start + 1, stage.last + 1):
        if n - 1 in phase.snapshots:
          phase.keep_latents(state)
        state, measured = step(state, next(batches))
        losses.append(measured["loss"])
        ends, stops = n == stage.last, n < steps and asked(n)
        is_line = n % config.log_every == 0 or ends
        is_kept = n % config.checkpoint_every == 0 or ends or stops
        if is_line or is_kept:
          # The only place that waits for the devices.
          losses = jax.device_get(losses)
          if not np.isfinite(losses).all():
            like = Progress(state, seen)
            good, extra, last = saved.restore(like=like)
            batches.set_state(extra["data"])
            path, repeated = saved.directory / str(last), range(last + 1, n + 1)
            raise guard.DivergedError(
              guard.where_it_arose(step, good.state, batches, repeated, path)
            )
        if is_line:
          found = score(stage.variables(state), dataset.validation)
          line = {
            "loss": float(np.mean(losses)),
            "validation_loss": found.loss,
            "validation_accuracy": found.accuracy,
          }
          more, seen = watch(state, seen)
          out.write(n, line | more)
          losses = []
          if best is not None:
            best.offer(n, state, line["validation_accuracy"])
        if ends and best is not None:
          state = dataclasses.replace(best.state, step=state.step)
        if ends and n < steps:
          state = stage.refreshed(state)
          opt_state = phase.stages[i + 1].tx.init(state.params)
          state = dataclasses.replace(state, opt_state=opt_state)
          seen = watch.look(state)
        if is_kept:
          keep(n, stage)
          out.write_histograms(n, watch.shown(state))
        if stops:
          raise guard.InterruptedRunError(
            f"SIGTERM: stopped after step {n} of {steps} ({phase.name}); the"
            " same command goes on there."
          )
      start = stage.last
  if steps in phase.snapshots:
    phase.keep_latents(state)
  return state


class Watch:
  """How the weights of a stage come to their codes, from look to look.

  Args:
    config: of the run.
    stage: what is watched; there is nothing to see in a float net.
  """

  def __init__(self, config: cli.Config, stage: Stage):
    def shown(state: training.TrainState) -> dict[str, Any]:
      latents = {} if stage.tern is None else stage.latents(state)
      return {p: plot.shown(config, p, w) for p, w in latents.items()}

    def judge(state: training.TrainState, before: Any, now: Any) -> Any:
      layers = metrics.diagnose(shown(state), now, before)
      return metrics.sparsity(now), layers

    # Apart, so that codes of one state are the same wherever a run resumes.
    self._packed, self._judge = jax.jit(stage.packed), jax.jit(judge)
    self._shown = jax.jit(shown)

  def shown(self, state: training.TrainState) -> dict[str, np.ndarray]:
    """Returns {path: latents as histograms show them}; {} for a float net."""
    return jax.device_get(self._shown(state))

  def look(self, state: training.TrainState) -> Any:
    """Returns the packed weights, {} for a float net."""
    # On the host, because the next step may take over the arrays.
    return jax.device_get(self._packed(state))

  def __call__(
    self, state: training.TrainState, before: Any
  ) -> tuple[dict[str, float], Any]:
    """Returns the sparsity, and by layer the diagnostics as name/path.

    Args:
      state: of the training.
      before: what the last look returned; flips are counted from there.

    Returns:
      (metrics, the look that they are of)
    """
    now = self.look(state)
    if not now:
      return {}, now
    total, layers = jax.device_get(self._judge(state, before, now))
    values = {
      f"{name}/{path}": float(value)
      for path, layer in layers.items()
      for name, value in layer.items()
    }
    return {"sparsity": float(total), **values}, now


class Best:
  """The state of the best validation accuracy so far; a context manager.

  Args:
    directory: where it is kept, so that a run that resumes still has it.
    like: a state.
  """

  def __init__(self, directory: Place, like: training.TrainState):
    self.state, self._accuracy = like, -1.0
    self._saved = Checkpointer(directory, keep=1)
    if self._saved.latest_step() is not None:
      # It may come from a step that is now repeated, with the same outcome.
      self.state, self._accuracy, _ = self._saved.restore(like=like)

  def __enter__(self) -> "Best":
    return self

  def __exit__(self, *error: object) -> None:
    self._saved.__exit__(*error)

  def offer(
    self, step: int, state: training.TrainState, accuracy: float
  ) -> None:
    """Takes a state if it is better than all before."""
    if accuracy > self._accuracy:
      # On the host, because the next step may take over the arrays.
      self.state, self._accuracy = jax.device_get(state), accuracy
      self._saved.save(step, self.state, {}, extra=accuracy)
