"""One pure training step, and its wrappers for many devices.

The step is written once. Given an axis name it averages gradients, metrics
and model state over that axis; `pmap_step` and `shard_map_step` only say how
the batch is spread. The state has no leading device axis in either, so it is
saved, restored and looked at as on one device.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from tern_jax.core.interop import serializable
from tern_jax.core.types import Array, PyTree
from tern_jax.trees.transform import ParamTransform

#: loss_fn(weights, model_state, batch, key) -> (loss, (model_state, metrics)).
LossFn = Callable[
  [PyTree, PyTree, PyTree, Array],
  tuple[Array, tuple[PyTree, dict[str, Array]]],
]
Step = Callable[["TrainState", PyTree], tuple["TrainState", dict[str, Array]]]


@serializable
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
  """All that a run needs to go on exactly where it stopped.

  Args:
    step: int32, 0-d, updates done.
    params: `TernParams`, or the user's tree itself for a float run.
    tern_state: state of the `ParamTransform`, {} for a float run.
    opt_state: state of the optax chain.
    model_state: what the model carries beside parameters, such as
      batch-norm statistics; {} for none.
    key: PRNG key; the key of a step is `fold_in(key, step)`.
  """

  step: Array
  params: Any
  tern_state: Any
  opt_state: Any
  model_state: PyTree
  key: Array


def init_state(
  tree: PyTree,
  tx: optax.GradientTransformation,
  tern: ParamTransform | None = None,
  model_state: PyTree = None,
  seed: int = 0,
) -> TrainState:
  """Makes the state of a run from the user's initial parameters.

  Args:
    tree: the user's parameters.
    tx: optax transform, over `TernParams` where tern is given.
    tern: what makes weights ternary; None for a float run.
    model_state: for example batch-norm statistics.
    seed: seed of the run's PRNG key.

  >>> float_run = init_state({"w": jnp.ones(2)}, optax.sgd(0.1))
  >>> int(float_run.step), float_run.tern_state
  (0, {})
  """
  params, tern_state = cast(Any, tree), {}
  if tern is not None:
    params, tern_state = tern.init(tree)
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    params=params,
    tern_state=tern_state,
    opt_state=tx.init(params),
    model_state={} if model_state is None else model_state,
    key=jax.random.key_data(jax.random.key(seed)),
  )


def make_step(
  loss_fn: LossFn,
  tx: optax.GradientTransformation,
  tern: ParamTransform | None = None,
  axis_name: str | None = None,
  scales_first: bool = False,
  micro_batches: int = 1,
) -> Step:
  """Makes the pure training step, to be wrapped by jit, pmap or shard_map.

  Args:
    loss_fn: `loss_fn(weights, model_state, batch, key)` returns
      `(loss, (model_state, metrics))`; weights are the effective ones, the
      loss a mean over the batch, metrics a dict of 0-d means.
    tx: optax transform over the state's params.
    tern: the same as given to `init_state`.
    axis_name: mapped axis over which gradients, metrics and model state are
      averaged; None on one device.
    scales_first: update the scales first, and take the gradient of the
      latents at the new scales on the same batch, as TGA's authors do (arXiv
      1810.01018): two forwards and backwards a step. The transform must treat
      latents and scales apart, as `optax.partition` by `LABELS` does.
    micro_batches: parts of a batch that are taken one after the other, for a
      batch that does not fit into memory; gradients, loss and metrics are the
      means over them, the model state goes from one to the next. Unlike in
      `optax.MultiSteps`, schedules and targets count whole batches.

  Returns:
    `step(state, batch) -> (state, metrics)`, metrics with "loss" among them.

  Raises:
    ValueError: scales_first without tern: there are no scales; or, by the step,
      a batch that cannot be divided into micro_batches.
  """
  if scales_first and tern is None:
    raise ValueError(
      "scales_first=True needs tern: a float run has no scales to update."
    )

  def average(tree: PyTree) -> PyTree:
    return tree if axis_name is None else _pmean(tree, axis_name)

  def step(state: TrainState, batch: PyTree) -> tuple[TrainState, dict]:
    key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)

    def loss(
      params: PyTree, model_state: PyTree, batch: PyTree, key: Array
    ) -> PyTree:
      weights = params if tern is None else tern(params, state.tern_state)
      return loss_fn(weights, model_state, batch, key)

    def value_and_grad(params: PyTree) -> PyTree:
      fn = jax.value_and_grad(loss, has_aux=True)
      if micro_batches == 1:
        return fn(params, state.model_state, batch, key)
      return _mean_over_parts(
        functools.partial(fn, params),
        state.model_state,
        split_batch(batch, micro_batches, "micro-batches"),
        jax.random.split(key, micro_batches),
      )

    (value, (model_state, metrics)), grads = value_and_grad(state.params)
    # Differentiate first, average then: averaging inside the loss would sum
    # gradients under shard_map, silently, by the number of devices.
    grads = average(grads)
    if scales_first:
      # A look ahead: the optimizer's state moves only below, where the scales
      # get the same update once more.
      ahead, _ = tx.update(grads, state.opt_state, state.params)
      moved: Any = optax.apply_updates(state.params, ahead)
      (value, (model_state, metrics)), second = value_and_grad(
        state.params.replace(scales=moved.scales)
      )
      grads = grads.replace(latent=average(second).latent)
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params: Any = optax.apply_updates(state.params, updates)
    tern_state = state.tern_state
    if tern is not None:
      params, tern_state = tern.after_step(params, tern_state)
    state = dataclasses.replace(
      state,
      step=state.step + 1,
      params=params,
      tern_state=tern_state,
      opt_state=opt_state,
      model_state=average(model_state),
    )
    return state, average({"loss": value, **metrics})

  return step


def pmap_step(
  step: Step,
  axis_name: str = "data",
  devices: Sequence[jax.Device] | None = None,
) -> Step:
  """Spreads a step over the local devices with `jax.pmap`.

  Args:
    step: made with this `axis_name`.
    axis_name: name of the mapped axis.
    devices: the devices to use; None takes all.

  Returns:
    A step whose batch has a leading axis of devices (see `split_batch`).
  """
  mapped = jax.pmap(
    step, axis_name=axis_name, in_axes=(None, 0), out_axes=None, devices=devices
  )
  if jax.process_count() > 1:
    return mapped  # It places the state of each process by itself.
  these = jax.local_devices() if devices is None else list(devices)

  def spread(state: TrainState, batch: PyTree) -> tuple[TrainState, dict]:
    count = jax.tree.leaves(batch)[0].shape[0]
    mesh = Mesh(np.array(these[:count]), (axis_name,))
    return mapped(_replicated(state, mesh), batch)

  return spread


def shard_map_step(
  step: Step, mesh: Mesh | None = None, axis_name: str = "data"
) -> Step:
  """Spreads a step over a mesh with `jax.shard_map`, on global arrays.

  Args:
    step: made with this `axis_name`.
    mesh: one axis of this name; None takes all devices.
    axis_name: mesh axis over which the batch is sharded.

  Returns:
    A jitted step; the batch's first axis is the global batch, divisible by
    the number of devices. The state given is donated.
  """
  mesh = data_mesh(axis_name) if mesh is None else mesh
  mapped = jax.shard_map(
    step,
    mesh=mesh,
    in_specs=(P(), P(axis_name)),
    out_specs=(P(), P()),
    # With the check, autodiff would insert its own sum over devices and the
    # averaged gradient would be too large by their number.
    check_vma=False,
  )
  compiled = jax.jit(mapped, donate_argnums=0)

  def spread(state: TrainState, batch: PyTree) -> tuple[TrainState, dict]:
    return compiled(_replicated(state, mesh), batch)

  return spread


def data_mesh(
  axis_name: str = "data", devices: Sequence[jax.Device] | None = None
) -> Mesh:
  """Returns a mesh of the given devices, or of all, along one axis."""
  devices = jax.devices() if devices is None else devices
  types = (AxisType.Auto,)
  return jax.make_mesh((len(devices),), (axis_name,), types, devices=devices)


def split_batch(batch: PyTree, devices: int, parts: str = "devices") -> PyTree:
  """Adds the leading axis of devices that `pmap_step` maps over.

  Arrays [batch, ...] become [devices, batch / devices, ...]. If a batch cannot
  be shared evenly, the ValueError calls the devices parts.

  >>> import numpy as np
  >>> split_batch(np.zeros((8, 3)), 4).shape
  (4, 2, 3)
  """

  def split(x: Array) -> PyTree:
    if x.shape[0] % devices:
      raise ValueError(
        f"A batch of {x.shape[0]} cannot be shared evenly by {devices}"
        f" {parts}: make the batch size a multiple of their number."
      )
    return x.reshape((devices, x.shape[0] // devices, *x.shape[1:]))

  return jax.tree.map(split, batch)


def effective_weights(state: TrainState, tern: ParamTransform | None) -> PyTree:
  """Returns the weights that the model is applied to in training."""
  return state.params if tern is None else tern(state.params, state.tern_state)


def reestimate_model_state(
  update_fn: Callable[[PyTree, PyTree, PyTree], PyTree],
  weights: PyTree,
  model_state: PyTree,
  batches: Iterable[PyTree],
) -> PyTree:
  """Re-estimates batch-norm statistics for weights that changed, by rounding.

  Args:
    update_fn: `update_fn(weights, model_state, batch) -> model_state`: one
      forward in training mode; its moving average forgets the old statistics,
      so give about `5 / (1 - momentum)` batches.
    weights: the rounded weights.
    model_state: the statistics of the unrounded ones.
    batches: training batches.
  """
  fn = jax.jit(update_fn)
  for batch in batches:
    model_state = fn(weights, model_state, batch)
  return model_state


def _mean_over_parts(
  value_and_grad: Callable[[PyTree, PyTree, Array], PyTree],
  model_state: PyTree,
  parts: PyTree,
  keys: Array,
) -> PyTree:
  """Calls a function of parts of a batch, and returns what it would of all."""

  def add(carry: PyTree, part: PyTree) -> PyTree:
    model_state, total = carry
    (value, (model_state, metrics)), grads = value_and_grad(model_state, *part)
    total = jax.tree.map(jnp.add, total, (value, metrics, grads))
    return (model_state, total), None

  first = jax.tree.map(lambda x: x[0], (parts, keys))
  shapes = jax.eval_shape(value_and_grad, model_state, *first)
  (value, (_, metrics)), grads = jax.tree.map(jnp.zeros_like, shapes)
  carry = model_state, (value, metrics, grads)
  (model_state, total), _ = jax.lax.scan(add, carry, (parts, keys))
  count = keys.shape[0]
  value, metrics, grads = jax.tree.map(lambda x: x / count, total)
  return (value, (model_state, metrics)), grads


def _replicated(state: TrainState, mesh: Mesh) -> TrainState:
  """Returns a state that lies on all devices, as mapped steps return it.

  For one that lies elsewhere a step would be compiled twice: for its first call
  and for those that follow.
  """
  whole = NamedSharding(mesh, P())
  leaves = jax.tree.leaves(state)
  if all(getattr(leaf, "sharding", None) == whole for leaf in leaves):
    return state
  return jax.device_put(state, whole)


def _pmean(tree: PyTree, axis_name: str) -> PyTree:
  # Masks and counts are equal on all devices; a mean would make them floats.
  def mean(x: Array) -> Array:
    is_float = jnp.issubdtype(x.dtype, jnp.floating)
    return jax.lax.pmean(x, axis_name) if is_float else x

  return jax.tree.map(mean, tree)
