"""Training batches that are made where the data lie: on the device.

The host only plans them. A plan tells which examples a batch takes, and what is
drawn to change them: the same ones as of `batches`, at the same steps. Pixels
are the same bits; standardized, they may differ in the last one.

```python
held = jax.device_put(hold(mnist.train, mnist.mean, mnist.std))
plans = Plans(len(mnist.train["label"]), 128, seed=0)
batch = jax.jit(make_batch)(held, next(plans))  # as next(batches(...))
```
"""

import collections
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from numpy.typing import ArrayLike

from experiments.common.data.augment import draw_flip_and_crop
from experiments.common.data.feed import random_steps, training_rows
from experiments.common.data.splits import Arrays

#: Arrays by name, those of a batch along their first axis.
Tree = Mapping[str, Any]


class Change(NamedTuple):
  """An augmentation in two parts, of which the device does the larger one."""

  draw: Callable[[np.random.Generator, int], Arrays] | None
  """From a generator and a number of images to all that is random, each [B];
  None where nothing is."""
  apply: Callable[[Array, Tree], Array]
  """From images, uint8 [B, H, W, C], and what was drawn to images."""


def flip_and_crop(images: Array, drawn: Tree, pad: int = 4) -> Array:
  """Does what `augment.flip_and_crop` does, on the device.

  Args:
    images: uint8 [B, H, W, C].
    drawn: What `augment.draw_flip_and_crop` draws.
    pad: Black pixels added on each side.

  Returns:
    uint8 [B, H, W, C].
  """
  shape = images.shape[1:]
  padded = jnp.pad(images, ((0, 0), (pad, pad), (pad, pad), (0, 0)))

  def crop(image: Array, top: Array, left: Array, step: Array) -> Array:
    part = jax.lax.dynamic_slice(image, (top, left, jnp.int32(0)), shape)
    return jnp.where(step < 0, part[:, ::-1], part)

  return jax.vmap(crop)(padded, drawn["top"], drawn["left"], drawn["step"])


UNCHANGED = Change(None, lambda images, _: images)
FLIP_AND_CROP = Change(draw_flip_and_crop, flip_and_crop)


def hold(split: Arrays, mean: np.ndarray, std: np.ndarray) -> Arrays:
  """Returns all that batches are made of, to be put on the device.

  Args:
    split: `{"input": uint8 [N, H, W, C], "label": int32 [N]}`, or of text.
    mean: See `standardize`, float32 [C].
    std: See `standardize`, float32 [C].
  """
  return {**split, "mean": mean, "std": std}


def standardize(images: Array, mean: ArrayLike, std: ArrayLike) -> Array:
  """Does what `feed.standardize` does, on the device.

  XLA multiplies by the inverse of std, so that results may differ in the last
  bit.
  """
  mean, std = jnp.asarray(mean), jnp.asarray(std)
  if not mean.size:
    return images
  axes = tuple(range(images.ndim - 1))
  mean, std = (jnp.expand_dims(x, axes) for x in (mean, std))
  return (images.astype(jnp.float32) - mean) / std


def make_batch(
  held: Tree,
  plan: Tree,
  apply: Callable[[Array, Tree], Array] = UNCHANGED.apply,
) -> dict[str, Array]:
  """Makes a training batch; pure, to be part of a program.

  Args:
    held: What `hold` returns.
    plan: The "rows" of a batch, int32 [B], and what was drawn.
    apply: See `Change`.

  Returns:
    `{"input": float32 [B, H, W, C], "label": int32 [B]}`, or as text is.
  """

  def pick(x: Any) -> Array:
    return jnp.asarray(x).at[plan["rows"]].get(mode="promise_in_bounds")

  images = apply(pick(held["input"]), plan)
  images = standardize(images, held["mean"], held["std"])
  return {"input": images, "label": pick(held["label"])}


class Plans:
  """The plans of all training batches, one after the other, forever.

  Args:
    count: Examples of the split.
    batch_size: Examples a batch.
    seed: Of shuffling and augmentation, as for `batches`.
    draw: See `Change`.
  """

  def __init__(
    self,
    count: int,
    batch_size: int,
    *,
    seed: int,
    draw: Callable[[np.random.Generator, int], Arrays] | None = None,
  ):
    rows_of = training_rows(count, batch_size, seed)

    def plan(step: int, drawn: Arrays) -> Arrays:
      whole = {"rows": rows_of(step), **drawn}
      return {name: x.astype(np.int32) for name, x in whole.items()}

    self._plan: Callable[[int], Any] = lambda step: plan(step, {})
    if draw is not None:
      self._plan = random_steps(
        lambda step, rng: plan(step, draw(rng, batch_size)), seed
      ).__getitem__
    self._next = 0
    self._ahead: collections.deque[Arrays] = collections.deque()

  def get_state(self) -> dict[str, int]:
    """Returns where they are, as the iterator of `batches` does."""
    return {"next_index": self._next}

  def set_state(self, state: dict[str, int]) -> None:
    """Goes on from a state, of the iterator of `batches` too."""
    self._next = state["next_index"]
    self._ahead.clear()

  def __iter__(self) -> "Plans":
    return self

  def __next__(self) -> Arrays:
    self.prepare(1)
    self._next += 1
    return self._ahead.popleft()

  def prepare(self, count: int) -> None:
    """Makes so many plans ahead, while the device is busy."""
    for step in range(self._next + len(self._ahead), self._next + count):
      self._ahead.append(self._plan(step))


def stack(plans: list[Arrays], length: int) -> Arrays:
  """Returns plans as arrays [length, B], the last one repeated at their end."""
  whole = [*plans, *plans[-1:] * (length - len(plans))]
  return {name: np.stack([x[name] for x in whole]) for name in plans[0]}
