"""The loop of a training, which goes on where it was stopped."""

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments.common import build, cli, data, evaluate, guard, log
from experiments.common.errors import DivergedError
from experiments.common.runner.advance import Feed, Resident, Streamed
from experiments.common.runner.stages import Phase, Stage
from experiments.common.runner.watch import Best, Watch
from tern_jax import pack, training
from tern_jax.checkpoint import Checkpointer


def train(
  config: cli.Config, dataset: data.Dataset, phase: Phase
) -> training.TrainState:
  """Runs a phase from its latest checkpoint to its last step.

  Raises:
    InterruptedRunError: a signal came; where the run was is kept.
    DivergedError: the loss is not finite; the checkpoints before it are kept.
  """
  folder, steps = phase.directory / "checkpoints", phase.final.last
  with contextlib.ExitStack() as stack:
    saved = stack.enter_context(Checkpointer(folder / phase.name, keep=2))
    going = Training(config, dataset, phase, saved)
    going.resume()
    asked = stack.enter_context(guard.termination())
    out = stack.enter_context(
      log.Log(phase.directory, phase.name, going.step, steps)
    )
    later = (*phase.stages[1:], None)
    for stage, following in zip(phase.stages, later, strict=True):
      if going.step >= stage.last:
        continue
      best = None
      if stage.keep_best:
        kept = folder / f"{phase.name}-best"
        best = stack.enter_context(Best(kept, going.state))
      going.run_stage(stage, following, best, asked, out)
  if steps in phase.snapshots:
    phase.keep_latents(going.state)
  return going.state


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


class Due(NamedTuple):
  """What is to be done after a step."""

  line: bool
  """Write a line of metrics."""
  checkpoint: bool
  """Keep a checkpoint."""
  leave: bool
  """End the stage."""
  stop: int
  """End the process, which got this signal; 0 for none."""


class Training:
  """A phase on its way: its state, and all else that a resumed run needs.

  Args:
    config: the options.
    dataset: the data.
    phase: what is trained.
    saved: its checkpoints.
  """

  def __init__(
    self,
    config: cli.Config,
    dataset: data.Dataset,
    phase: Phase,
    saved: Checkpointer,
  ):
    self._config, self._phase, self._saved = config, phase, saved
    self._dataset = dataset
    model = build.make_model(config, dataset.num_classes)
    self._score = evaluate.make_scorer(model, dataset)
    self._feed = Feed(config, dataset)
    self._batches = self._feed.batches
    self.state, self.step = phase.state, 0
    # Since the last line of metrics.
    self._losses: list[Any] = []
    self._seen = jax.device_get(phase.stages[0].packed(phase.state))

  def resume(self) -> None:
    """Goes to the latest checkpoint; the first one is of the start."""
    if self._saved.latest_step() is None:
      self._keep(self._phase.stages[0])
    progress, losses, self.step = self._restore()
    self.state, self._seen = progress.state, progress.seen
    self._losses = [*map(np.float32, losses)]

  def run_stage(
    self,
    stage: Stage,
    following: Stage | None,
    best: Best | None,
    asked: Callable[[int], int],
    out: log.Log,
  ) -> None:
    """Trains to the last step of a stage, from wherever in it the phase is.

    Args:
      stage: to run.
      following: the one after it; None for the last.
      best: where its best state is kept; None for a stage that ends with its
        last state.
      asked: from a step to the signal for which the process ends after it.
      out: takes the metrics.
    """
    advance = self._feed.make_advance(stage)
    watch = Watch(self._config, stage)
    while self.step < stage.last:
      measured = self._advance(advance, stage)
      due = self._due(stage, asked)
      if due.line or due.checkpoint:
        self._check_losses(advance.step)
      if due.line:
        norm = float(measured["gradient_norm"])
        accuracy = self._write_line(stage, watch, out, norm)
        if best is not None:
          best.offer(self.step, self.state, accuracy)
      else:
        out.tick(self.step, measured["loss"])
      if due.leave:
        self._leave(stage, following, best, watch)
      if due.checkpoint:
        out.sync()
        self._keep(stage)
        out.write_histograms(self.step, watch.shown(self.state))
      if due.stop:
        last, name = self._phase.final.last, self._phase.name
        where = f"after step {self.step} of {last} ({name})"
        raise guard.stopped(where, due.stop)

  def _advance(
    self, advance: Streamed | Resident, stage: Stage
  ) -> dict[str, Any]:
    """Takes steps; returns what the last one measured."""
    if self.step in self._phase.snapshots:
      self._phase.keep_latents(self.state)
    self.state, measured = advance(self.state, self._undisturbed(stage))
    self._losses += [found["loss"] for found in measured]
    self.step += len(measured)
    return measured[-1]

  def _undisturbed(self, stage: Stage) -> int:
    """Returns the number of steps up to the next that is followed by more."""
    every = self._config.log_every, self._config.checkpoint_every
    later = [n - self.step for n in self._phase.snapshots if n > self.step]
    return min(
      stage.last - self.step, *(n - self.step % n for n in every), *later
    )

  def _due(self, stage: Stage, asked: Callable[[int], int]) -> Due:
    n, config = self.step, self._config
    leave = n == stage.last
    stop = asked(n) if n < self._phase.final.last else 0
    return Due(
      line=n % config.log_every == 0 or leave,
      checkpoint=n % config.checkpoint_every == 0 or leave or stop > 0,
      leave=leave,
      stop=stop,
    )

  def _check_losses(self, step: Callable[[Any, Any], Any]) -> None:
    """Raises a DivergedError that tells the first step that is not finite."""
    # The only place that waits for the devices.
    self._losses = jax.device_get(self._losses)
    if np.isfinite(self._losses).all():
      return
    good, _, last = self._restore()
    repeated = range(last + 1, self.step + 1)
    path = self._saved.directory / str(last)
    raise DivergedError(
      guard.where_it_arose(step, good.state, self._batches, repeated, path)
    )

  def _write_line(
    self, stage: Stage, watch: Watch, out: log.Log, norm: float
  ) -> float:
    """Writes a line of metrics; returns the validation accuracy."""
    variables = stage.variables(self.state)
    found = self._score(variables, self._dataset.validation)
    line = {
      "loss": float(np.mean(self._losses)),
      "validation_loss": found.loss,
      "validation_accuracy": found.accuracy,
      **watch.settings(self.state),
      "gradient_norm": norm,
    }
    more, self._seen = watch(self.state, self._seen)
    out.write(self.step, line | more)
    self._losses = []
    return found.accuracy

  def _leave(
    self,
    stage: Stage,
    following: Stage | None,
    best: Best | None,
    watch: Watch,
  ) -> None:
    """Makes the state that the following stage starts with."""
    state = self.state
    if best is not None:
      state = dataclasses.replace(best.state, step=state.step)
    if following is not None:
      state = stage.handed_over(state, following)
      self._seen = watch.look(state)
    self.state = state

  def _keep(self, stage: Stage) -> None:
    # All that is between two lines is kept too: a run may stop anywhere.
    extra = {
      "data": self._batches.get_state(),
      "losses": [*map(float, self._losses)],
    }
    packed = pack(stage.ternary(self.state))
    progress = Progress(self.state, self._seen)
    self._saved.save(
      self.step, progress, packed, extra=extra, method=stage.tern
    )

  def _restore(self) -> tuple[Progress, list[float], int]:
    """Returns progress, losses and step of the latest checkpoint.

    The batches go on from there, too.
    """
    like = Progress(self.state, self._seen)
    progress, extra, step = self._saved.restore(like=like)
    self._batches.set_state(extra["data"])
    return progress, extra["losses"], step
