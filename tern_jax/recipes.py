"""How to train at an asked sparsity, as one call."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import optax

from tern_jax.core.checks import check_range
from tern_jax.core.containers import TernParams
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
#: Of its nonzeros in a random network, what each layer keeps at least.
FLOOR = 0.75
#: Share of zeros at which training from a float net begins: it is where ternary
#: weights are nearest to normal ones.
WARM_START = 0.4


class Rates(NamedTuple):
  """Adam's first rates."""

  latent: float
  """Of latents."""
  rest: float
  """Of all else: scales, and leaves that stay float."""


def rates(steps: int) -> Rates:
  """Returns Adam's first rates for a run of so many steps.

  `0.1 / sqrt(steps)` for latents, and ten times as much for all else, 1e-2 at
  most: in a short run codes must change soon, in a long one slower latents find
  better ones.

  Args:
    steps: training steps of the whole run.

  Raises:
    ValueError: `steps` is below 1.

  >>> rates(10_000)
  Rates(latent=0.001, rest=0.01)
  """
  check_range("steps", steps, 1, float("inf"), "count training steps")
  latent = 0.1 / steps**0.5
  return Rates(min(latent, 1e-2), min(10 * latent, 1e-2))


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
    learning_rate: float | optax.Schedule | None = None,
    *,
    rest_rate: float | optax.Schedule | None = None,
    ema: float | None = None,
  ) -> Wrapped:
    """Returns all of it as one optimizer, for a script that stays as it is.

    WDR, then Adam with its rates, which a cosine decays to 5 % over the steps,
    within `wrap`. At the end, `tx.tern.finalize(opt_state)`.

    Args:
      learning_rate: of latents; a schedule is taken as it is. None: that of
        `tern_jax.recipes.rates(steps)`.
      rest_rate: likewise, of all else: the magnitudes of ternary weights, and
        leaves that stay float.
      ema: decay of a moving average, as `wrap` has it.

    >>> import jax.numpy as jnp
    >>> tx = recipe(0.8, steps=100).optimizer()
    >>> state = tx.init({"kernel": jnp.ones((8, 8)), "bias": jnp.ones(8)})
    """

    def adam(rate: float | optax.Schedule) -> optax.GradientTransformation:
      if not callable(rate):
        rate = optax.cosine_decay_schedule(rate, self.steps, alpha=0.05)
      return optax.adam(rate)

    def labels(params: TernParams) -> TernParams:
      """Tells latents from leaves that stay float, which lie beside them."""
      selected = dict.fromkeys(self.tern.selected(params.latent), "latent")
      rest = jax.tree.map(lambda _: "rest", params.latent)
      latent = self.tern.replaced(rest, selected)
      return params.replace(latent=latent, scales="rest")

    latent, rest = rates(self.steps)
    given = {
      "latent": latent if learning_rate is None else learning_rate,
      "rest": rest if rest_rate is None else rest_rate,
    }
    tx = optax.partition({k: adam(rate) for k, rate in given.items()}, labels)
    return wrap(tx, self.tern, self.wdr, ema=ema)


def recipe(
  sparsity: Scalar | PerLayer | AcrossLayers,
  steps: int,
  where: Any = None,
  *,
  warm: bool = False,
  stacked: str | Sequence[str] = (),
  channel_axis: ChannelAxis = None,
) -> Recipe:
  """Makes SCA's training at an asked sparsity: all its schedules, agreed.

  `SCA(sparsity=target)` with
  `target = ramp(across_layers(sparsity, floor=0.75), steps, until=0.25)`, and
  `wdr_transform(at_sparsity(target), relative(late_kappa(steps)), sharp=True)`:
  the barrier rises to the target in the first quarter of the run, the loss
  chooses the codes there, and over the last 30 % WDR stops them from changing;
  in nets whose codes change at random, over the last 70 %.

  It takes Adam at `rates(steps)`, which its `optimizer` knows, decayed to 5 %
  by a cosine, and no weight decay on the latents.

  Args:
    sparsity: share of zeros in [0, 1): of all layers together as a number,
      which layers share by their magnitudes, but none loses too many weights.
      Or `per_layer(0.9)` for each layer, shares by pattern, or `across_layers`.
    steps: training steps of the whole run, from here on.
    where: which leaves are ternary, as `ParamTransform` takes it; `kernels()`
      by default.
    warm: whether the parameters are those of a trained float net. The target
      then rises from 0.4, where ternary weights are nearest to float ones,
      instead of 0, where all are nonzero.
    stacked: patterns of leaves whose first axis enumerates layers.
    channel_axis: None for one scale a tensor; -1 (Flax, Haiku) or 0 (Equinox)
      for one an output channel.

  Returns:
    (tern, wdr), to be taken apart: `wdr` is the first of the optax chain. Its
    `optimizer()` is all of it, for scripts that take any optax transformation.

  Raises:
    ValueError: a share outside [0, 1), or `steps` below 1.

  >>> tern, wdr = recipe(0.9, steps=10_000)
  >>> tern.method.sparsity.sparsity
  ramp(sparsity=0.9, steps=10000, until=0.25)
  >>> tx = optax.chain(
  ...     wdr, optax.adam(optax.cosine_decay_schedule(1e-3, 10_000, 0.05)))
  """
  where, stacked = selector(where), as_patterns(stacked, "stacked")
  if not isinstance(sparsity, PerLayer | AcrossLayers):
    sparsity = AcrossLayers(sparsity, FLOOR)
  target = ramp(sparsity, steps, UNTIL, WARM_START if warm else 0.0)
  method = SCA(sparsity=target, channel_axis=channel_axis)
  kappa = relative(late_kappa(steps))
  wdr = wdr_transform(at_sparsity(target), kappa, where, stacked, sharp=True)
  tern = ParamTransform(method, where, stacked)
  return Recipe(tern, wdr, steps)
