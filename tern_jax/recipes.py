"""How to train at an asked sparsity, as one call."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import optax

from tern_jax.core.containers import LABELS
from tern_jax.core.paths import as_patterns
from tern_jax.core.select import selector
from tern_jax.core.types import ChannelAxis, Scalar
from tern_jax.methods import SCA
from tern_jax.regularizers.barriers import at_sparsity
from tern_jax.regularizers.strengths import late_kappa, relative
from tern_jax.regularizers.transform import wdr_transform
from tern_jax.targets.schedules import AcrossLayers, PerLayer, ramp
from tern_jax.trees.transform import ParamTransform
from tern_jax.trees.wrap import Wrapped, wrap

#: Share of the run in which the barrier rises to its target.
UNTIL = 0.25
#: Adam's first rate, of latents and of scales.
RATE = 1e-3


class _Parts(NamedTuple):
  tern: ParamTransform
  wdr: optax.GradientTransformation


class Recipe(_Parts):
  """What `recipe` makes: a lifted method and its regularizer, `tern, wdr`."""

  steps: int

  def __new__(
    cls, tern: ParamTransform, wdr: optax.GradientTransformation, steps: int
  ) -> "Recipe":
    """Makes the pair, which knows the steps of the run."""
    self = super().__new__(cls, tern, wdr)
    self.steps = steps
    return self

  def optimizer(
    self,
    learning_rate: float | optax.Schedule = RATE,
    *,
    scale_rate: float | optax.Schedule = RATE,
    ema: float | None = None,
  ) -> Wrapped:
    """Returns all of it as one optimizer, for a script that stays as it is.

    WDR, then Adam with its rates, which a cosine decays to 5 % over the steps,
    within `wrap`. At the end, `tx.tern.finalize(opt_state)`.

    Args:
      learning_rate: of latents and of all leaves that stay float; a schedule
        is taken as it is.
      scale_rate: of the magnitudes of ternary weights.
      ema: decay of a moving average, as `wrap` has it.

    >>> import jax.numpy as jnp
    >>> tx = recipe(0.8, steps=100).optimizer()
    >>> state = tx.init({"kernel": jnp.ones((8, 8)), "bias": jnp.ones(8)})
    """

    def adam(rate: float | optax.Schedule) -> optax.GradientTransformation:
      if not callable(rate):
        rate = optax.cosine_decay_schedule(rate, self.steps, alpha=0.05)
      return optax.adam(rate)

    tx = optax.partition(
      {"latent": adam(learning_rate), "scales": adam(scale_rate)}, LABELS
    )
    return wrap(tx, self.tern, self.wdr, ema=ema)


def recipe(
  sparsity: Scalar | PerLayer | AcrossLayers,
  steps: int,
  where: Any = None,
  *,
  stacked: str | Sequence[str] = (),
  channel_axis: ChannelAxis = None,
) -> Recipe:
  """Makes SCA's training at an asked sparsity: all its schedules, agreed.

  `SCA(sparsity=target)` with `target = ramp(sparsity, steps, until=0.25)`, and
  `wdr_transform(at_sparsity(target), relative(late_kappa(steps)), sharp=True)`:
  the barrier rises to the target in the first quarter of the run, the loss
  chooses the codes there, and over the last 30 % WDR stops them from changing.

  It takes Adam at its usual rate of 1e-3, decayed to 5 % by a cosine, and no
  weight decay on the latents.

  Args:
    sparsity: share of zeros in [0, 1): of each layer as a number, or shares
      `per_layer`, or `across_layers`, which is the better choice from some 97 %
      on, where the smallest layers would be left with too few weights.
    steps: training steps of the whole run.
    where: which leaves are ternary, as `ParamTransform` takes it; `kernels()`
      by default.
    stacked: patterns of leaves whose first axis enumerates layers.
    channel_axis: None for one scale a tensor; -1 (Flax, Haiku) or 0 (Equinox)
      for one an output channel.

  Returns:
    (tern, wdr), to be taken apart: `wdr` is the first of the optax chain. Its
    `optimizer()` is all of it, for scripts that take any optax transformation.

  Raises:
    ValueError: a share outside [0, 1), or `steps` below 1.

  >>> tern, wdr = recipe(0.9, steps=1000)
  >>> tern.method
  SCA(sparsity=ramp(sparsity=0.9, steps=1000, until=0.25))
  >>> tx = optax.chain(
  ...     wdr, optax.adam(optax.cosine_decay_schedule(1e-3, 1000, 0.05)))
  """
  where, stacked = selector(where), as_patterns(stacked, "stacked")
  target = ramp(sparsity, steps, UNTIL)
  method = SCA(sparsity=target, channel_axis=channel_axis)
  kappa = relative(late_kappa(steps))
  wdr = wdr_transform(at_sparsity(target), kappa, where, stacked, sharp=True)
  return Recipe(ParamTransform(method, where, stacked), wdr, steps)
