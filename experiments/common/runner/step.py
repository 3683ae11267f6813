"""The step of a stage, over the devices of all processes."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from experiments.common import build, cli, data
from experiments.common.runner import checks
from experiments.common.runner.stages import Stage
from tern_jax import training


def make_step(
  config: cli.Config, stage: Stage, classes: int
) -> Callable[[training.TrainState, data.Arrays], Any]:
  """Makes the step of a stage, which takes this process's part of a batch.

  It measures what that of `pure_step` does.
  """
  return _spread(config, pure_step(config, stage, classes))


def pure_step(
  config: cli.Config, stage: Stage, classes: int
) -> Callable[[training.TrainState, Any], Any]:
  """Makes the step of a stage, to be compiled and spread over devices.

  It measures the "loss", and the "gradient_norm" of all that is trained, before
  WDR and the optimizer.
  """
  axis = None if config.parallel == "jit" else "data"
  model = build.make_model(config, classes, axis)

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

  norms: list[Array] = []

  def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
    # Of the very gradient that is used: another pass would cost a step.
    norms.append(optax.tree.norm(updates))
    return stage.tx.update(updates, state, params)

  plain = training.make_step(
    loss,
    optax.GradientTransformation(stage.tx.init, update),
    stage.tern,
    axis,
    micro_batches=config.micro_batches,
  )

  def step(state: training.TrainState, batch: Any) -> Any:
    state, measured = plain(state, batch)
    return state, {**measured, "gradient_norm": norms.pop()}

  return step


def _spread(
  config: cli.Config, step: Callable[[training.TrainState, Any], Any]
) -> Callable[[training.TrainState, data.Arrays], Any]:
  """Compiles a step, and spreads it over devices as the options say."""
  if config.parallel == "jit":
    return jax.jit(step)
  devices = checks.device_count(config)
  if config.parallel == "pmap":
    mapped = training.pmap_step(step)
    return lambda s, batch: mapped(s, training.split_batch(batch, devices))
  mesh = data_mesh(config)
  mapped = training.shard_map_step(step, mesh)
  spread = NamedSharding(mesh, P("data"))
  whole = jax.make_array_from_process_local_data
  return lambda s, batch: mapped(s, whole(spread, batch))


def data_mesh(config: cli.Config) -> Mesh:
  """Returns the devices that share a batch."""
  devices = checks.device_count(config) * jax.process_count()
  return Mesh(np.array(jax.devices()[:devices]), ("data",))


def _bfloat16(x: Array) -> Array:
  is_float = jnp.issubdtype(x.dtype, jnp.floating)
  return x.astype(jnp.bfloat16) if is_float else x


def _cross_entropy(logits: Array, labels: Array, smoothing: float) -> Array:
  if not smoothing:
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels)
  smooth = jax.nn.one_hot(labels, logits.shape[-1])
  smooth = optax.smooth_labels(smooth, smoothing)
  return optax.softmax_cross_entropy(logits, smooth)
