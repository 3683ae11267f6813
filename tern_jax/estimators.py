"""How gradients pass a discretization."""

import jax

from tern_jax.base import Array


@jax.custom_jvp
def straight_through(soft: Array, hard: Array) -> Array:
  """Returns `hard` exactly, with the gradient of `soft`.

  The usual `soft + stop_gradient(hard - soft)` rounds: in float32 it is not
  `hard` in some entries. Here the forward is `hard` bit for bit.

  Args:
    soft: float, any shape, what the gradient flows to unchanged.
    hard: same shape and dtype; no gradient flows to it.

  Returns:
    hard.

  >>> import jax.numpy as jnp
  >>> f = lambda w: straight_through(jnp.tanh(w), jnp.sign(w)).sum()
  >>> float(f(jnp.array(.5))), round(float(jax.grad(f)(jnp.array(.5))), 4)
  (1.0, 0.7864)

  Source: Bengio, Leonard & Courville, arXiv 1308.3432, section 4.
  """
  del soft
  return hard


@straight_through.defjvp
def _straight_through_jvp(primals, tangents):
  return primals[1], tangents[0]
