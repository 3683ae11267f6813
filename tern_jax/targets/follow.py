"""State that follows a target: step count and threshold."""

import jax
import jax.numpy as jnp

from tern_jax.core.checks import concrete
from tern_jax.core.containers import Array, Arrays
from tern_jax.targets.quantile import count_of, magnitude_threshold
from tern_jax.targets.schedules import Schedulable, at, look_at


def init_target(w: Array, sparsity: Schedulable) -> Arrays:
  """Returns the state that follows a sparsity: step count and threshold.

  Args:
    w: float, any shape, the latents at step 0.
    sparsity: share of zeros, or a schedule of it.

  Returns:
    {"count": int32 0-d, "threshold": float32 0-d}.
  """
  count = jnp.zeros((), jnp.int32)
  return {
    "count": count,
    "threshold": magnitude_threshold(w, at(sparsity, count)),
  }


def follow_target(
  state: Arrays, w: Array, sparsity: Schedulable, every: int
) -> Arrays:
  """Returns the state of the next step, from the latents after this one.

  Args:
    state: what `init_target` returned, or this function.
    w: float, any shape, the latents after the update.
    sparsity: share of zeros, or a schedule of it.
    every: steps between two looks at the quantile.

  Returns:
    The same kind of state, one step on.
  """
  count = state["count"] + 1
  due, tolerance = look_at(every, sparsity, count)
  threshold = jax.lax.cond(
    due,
    lambda guess: magnitude_threshold(
      w, at(sparsity, count), guess=guess, tolerance=tolerance
    ),
    lambda held: held,
    state["threshold"],
  )
  return {"count": count, "threshold": threshold}


def meet_target(state: Arrays, w: Array, sparsity: Schedulable) -> Arrays:
  """Returns the state with the threshold that fits the latents now.

  Args:
    state: what `init_target` or `follow_target` returned.
    w: float, any shape, latents.
    sparsity: share of zeros, or a schedule of it.

  Returns:
    The same kind of state, at the same step.
  """
  threshold = magnitude_threshold(
    w, at(sparsity, state["count"]), guess=state["threshold"]
  )
  return {**state, "threshold": threshold}


def check_zeros(codes: Array, sparsity: Schedulable, count: Array) -> None:
  """Raises a ValueError unless codes have the zeros of a target.

  They may have up to 1 % more, as ties among coarse latents leave.

  Args:
    codes: any shape, in {-1, 0, 1}.
    sparsity: share of zeros, or a schedule of it; traced ones pass.
    count: int32, 0-d, step.

  >>> check_zeros(jnp.array([0, 1, -1, 1]), 0.5, jnp.array(0))
  Traceback (most recent call last):
  ValueError: 1 of 4 weights are zero, but 2 are asked for by sparsity=0.5: \
give sparsity=0.25, or a method without a target.
  """
  asked, n = at(sparsity, count), codes.size
  if not (concrete(codes) and concrete(asked)):
    return
  zeros, wanted = int(jnp.sum(codes == 0)), int(count_of(n, asked))
  if not wanted <= zeros <= wanted + 0.01 * n:
    moment = f" at step {count}" if callable(sparsity) else ""
    raise ValueError(
      f"{zeros} of {n} weights are zero, but {wanted} are asked for by"
      f" sparsity={sparsity}{moment}: give sparsity={zeros / n}, or a"
      " method without a target."
    )
