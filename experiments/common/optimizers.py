"""Optimizers of the experiments."""

from typing import Any, NamedTuple

import jax.numpy as jnp
import optax

from experiments.common import cli


class AveragedState(NamedTuple):
  """State of `averaged`: updates done, the optimizer's state, the average."""

  count: Any
  inner: Any
  average: Any


def averaged(
  tx: optax.GradientTransformation, decay: float
) -> optax.GradientTransformation:
  """Keeps a moving average of the parameters beside an optimizer.

  Args:
    tx: the optimizer.
    decay: weight of the past; early on `(1 + n) / (10 + n)` after n updates,
      so that the start is soon forgotten.

  Returns:
    The optimizer, with an `AveragedState`.
  """

  def init(params: Any) -> AveragedState:
    return AveragedState(jnp.zeros((), jnp.int32), tx.init(params), params)

  def update(
    updates: Any, state: Any, params: Any = None
  ) -> tuple[Any, AveragedState]:
    updates, inner = tx.update(updates, state.inner, params)
    n = jnp.asarray(state.count, jnp.float32)
    weight = jnp.minimum(decay, (1 + n) / (10 + n))
    average = optax.incremental_update(
      optax.apply_updates(params, updates), state.average, 1 - weight
    )
    return updates, AveragedState(state.count + 1, inner, average)

  return optax.GradientTransformation(init, update)


def decayed(
  config: cli.Config,
  rate: float,
  steps: int,
  first: int = 0,
  last: float = 0.05,
) -> optax.Schedule:
  """Returns the schedule of a rate.

  Args:
    config: names it.
    rate: at step 0; of one cycle the largest.
    steps: over which it changes.
    first: step of the run at which the schedule starts to count.
    last: share of the rate to which a cosine decays.
  """
  if config.schedule == "cosine":
    decay = optax.cosine_decay_schedule(rate, steps, alpha=last)
  elif config.schedule == "one_cycle":
    decay = optax.cosine_onecycle_schedule(steps, rate)
  else:
    drops = {steps // 2: 0.1, 3 * steps // 4: 0.1}
    decay = optax.piecewise_constant_schedule(rate, drops)
  return lambda count: decay(count + first)


def float_rate(config: cli.Config, steps: int) -> optax.Schedule:
  """Returns the learning rate of the float net by its step."""
  last = 0.05 if config.float_optimizer == "adam" else 0.0
  return decayed(config, config.float_learning_rate, steps, last=last)


def latent_rate(
  config: cli.Config, steps: int, first: int = 0
) -> optax.Schedule:
  """Returns the learning rate of latents, as `decayed` does."""
  rate = config.learning_rate
  rate = config.method.rates.latent if rate is None else rate
  return decayed(config, rate, steps, first)


def of_float_net(
  config: cli.Config, steps: int
) -> optax.GradientTransformation:
  """Returns the optimizer of the float net."""
  rate = float_rate(config, steps)
  tx = _named(config.float_optimizer, rate)
  if config.float_weight_decay:
    decay = optax.add_decayed_weights(config.float_weight_decay)
    tx = optax.chain(decay, tx)
  return tx if config.ema is None else averaged(tx, config.ema)


def of_ternary_net(
  config: cli.Config,
  regularizer: optax.GradientTransformation,
  labels: Any,
  steps: int,
  first: int,
) -> optax.GradientTransformation:
  """Returns the optimizer of a stage of the ternary net.

  Args:
    config: names the rates, else they are the method's.
    regularizer: transform of the latents' gradients, before Adam.
    labels: "latent", "scale" or "float" for each parameter.
    steps: of all stages.
    first: step at which this one starts.
  """
  scale, rest = config.scale_learning_rate, config.rest_learning_rate
  scale = config.method.rates.scale if scale is None else scale
  rest = config.float_learning_rate if rest is None else rest

  latent = optax.adam(latent_rate(config, steps, first))
  of_scales = decayed(config, scale, steps, first)
  transforms: Any = {
    "latent": optax.chain(regularizer, latent),
    "scale": _named(config.scale_optimizer, of_scales),
    "float": optax.adam(decayed(config, rest, steps, first)),
  }
  tx = optax.partition(transforms, labels)
  return tx if config.ema is None else averaged(tx, config.ema)


def _named(name: str, rate: optax.Schedule) -> optax.GradientTransformation:
  if name == "adam":
    return optax.adam(rate)
  return optax.sgd(rate, momentum=0.9, nesterov=True)
