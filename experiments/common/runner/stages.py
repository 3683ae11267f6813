"""The stages of a training, and the two trainings of a run."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

import tern_jax
from experiments.common import cli, log, optimizers
from experiments.common.methods import Plan
from tern_jax import metrics, pack, training
from tern_jax.checkpoint import Place
from tern_jax.core.paths import path_str


@dataclasses.dataclass(frozen=True)
class Stage:
  """A part of a training, with a method and an optimizer of its own.

  Args:
    tern: None for the float net.
    tx: optimizer.
    last: last step.
    keep_best: end it with the state of the best validation accuracy.
    rate: learning rate of all that is trained, or of the latents, by the step
      of the run.
    strength: that of WDR, before it is held back; None without WDR.
  """

  tern: tern_jax.ParamTransform | None
  tx: optax.GradientTransformation
  last: int
  keep_best: bool = False
  _: dataclasses.KW_ONLY
  rate: optax.Schedule
  strength: Callable[[Any], Any] | None = None

  def settings(self, state: training.TrainState) -> dict[str, jax.Array]:
    """Returns the learning rate and the strength of WDR of the last step."""
    count = state.step - 1
    found = {"learning_rate": jnp.asarray(self.rate(count))}
    if self.strength is not None:
      # A late WDR is held back where codes still improve.
      share = optax.tree.get(state.opt_state, "share", 1.0)
      found["wdr_strength"] = share * jnp.asarray(self.strength(count))
    return found

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
    chosen = self.tern.where.paths(latent)
    return {
      path_str(path): leaf for path, leaf in leaves if path_str(path) in chosen
    }

  def refreshed(self, state: training.TrainState) -> training.TrainState:
    """Returns the outcome with thresholds that fit its latents exactly."""
    # Training follows them closely; what is packed or frozen meets them.
    state = self.outcome(state)
    if self.tern is None:
      return state
    params, tern_state = self.tern.refresh(state.params, state.tern_state)
    return dataclasses.replace(state, params=params, tern_state=tern_state)

  def handed_over(
    self, state: training.TrainState, following: "Stage"
  ) -> training.TrainState:
    """Returns the state that the following stage starts with."""
    state = self.refreshed(state)
    opt_state = following.tx.init(state.params)
    return dataclasses.replace(state, opt_state=opt_state)


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


def ternary_phase(
  config: cli.Config,
  steps: int,
  params: Any,
  model_state: Any,
  change: Callable[[Plan, int], Plan] | None = None,
) -> Phase:
  """Returns the training of the ternary net.

  Args:
    config: the options.
    steps: of the training.
    params: at which it starts.
    model_state: the other variables of the network.
    change: from the method's plan and the steps to the plan to follow; None
      for the method's own.
  """
  where = tern_jax.kernels(exclude=config.exclude)
  largest = where.largest(params, config.stacked)
  plan = config.method.plan(steps, largest, config.stacked)
  if change is not None:
    plan = change(plan, steps)
  labels = tern_jax.TernParams(
    # What stays float lies beside the latents, but wants a rate of its own.
    latent=jax.tree.map(lambda k: "latent" if k else "float", where(params)),
    scales="scale",
  )
  stages, first = [], 0
  for part in plan.stages:
    tern = tern_jax.ParamTransform(part.method, where, config.stacked)
    tx = optimizers.of_ternary_net(
      config, plan.regularizer, labels, steps, first
    )
    stages.append(
      Stage(
        tern,
        tx,
        part.last,
        part.keep_best,
        rate=optimizers.latent_rate(config, steps),
        strength=plan.strength,
      )
    )
    first = part.last
  state = training.init_state(
    params, stages[0].tx, stages[0].tern, model_state, config.seed
  )
  snapshots = (0, plan.onset, steps)
  return Phase("ternary", config.directory, state, tuple(stages), snapshots)
