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


@jax.custom_jvp
def scaled_straight_through(soft: Array, hard: Array, factor: Array) -> Array:
  """Returns `hard` exactly, with its own gradient and a multiple of `soft`'s.

  `d(out) = d(hard) + factor * d(soft)`: scales inside `hard` learn by their
  true gradient, and the latents get the factor of their cluster.

  Args:
    soft: float, any shape, the latents.
    hard: same shape and dtype, differentiable in its scales only.
    factor: broadcastable to soft, same dtype; no gradient flows to it.

  Returns:
    hard.

  >>> import jax.numpy as jnp
  >>> f = lambda w, a: scaled_straight_through(w, a * jnp.sign(w), 2.0 * a)
  >>> [float(g) for g in jax.grad(f, (0, 1))(jnp.array(-.5), jnp.array(3.))]
  [6.0, -1.0]

  Source: Zhu et al., arXiv 1612.01064, equations 7 and 8.
  """
  del soft, factor
  return hard


@scaled_straight_through.defjvp
def _scaled_straight_through_jvp(primals, tangents):
  _, hard, factor = primals
  d_soft, d_hard, _ = tangents
  return hard, d_hard + factor * d_soft
