"""What is seen of a stage on its way: its codes, and its best state."""

from typing import Any

import jax
import numpy as np

from experiments.common import cli
from experiments.common.plots.run import shown as shown_latents
from experiments.common.runner.stages import Stage
from tern_jax import metrics, training
from tern_jax.checkpoint import Checkpointer, Place


class Watch:
  """How the weights of a stage come to their codes, from look to look.

  Args:
    config: of the run.
    stage: what is watched; there is nothing to see in a float net.
  """

  def __init__(self, config: cli.Config, stage: Stage):
    def shown(state: training.TrainState) -> dict[str, Any]:
      latents = {} if stage.tern is None else stage.latents(state)
      return {p: shown_latents(config, p, w) for p, w in latents.items()}

    def judge(state: training.TrainState, before: Any, now: Any) -> Any:
      layers = metrics.diagnose(shown(state), now, before)
      return metrics.sparsity(now), layers

    # Apart, so that codes of one state are the same wherever a run resumes.
    self._packed, self._judge = jax.jit(stage.packed), jax.jit(judge)
    self._shown = jax.jit(shown)
    self._settings = jax.jit(stage.settings)

  def shown(self, state: training.TrainState) -> dict[str, np.ndarray]:
    """Returns {path: latents as histograms show them}; {} for a float net."""
    return jax.device_get(self._shown(state))

  def settings(self, state: training.TrainState) -> dict[str, float]:
    """Returns the learning rate and the strength of WDR of the last step."""
    found = jax.device_get(self._settings(state))
    return {name: float(value) for name, value in found.items()}

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
