"""The truncated Gaussian of TGA: what a threshold says of the scale."""

import jax
import jax.numpy as jnp

from tern_jax.core.numerics import widen
from tern_jax.core.types import Array


def inverse_mills(t: Array | float) -> Array:
  """Inverse Mills ratio, `lambda(t) = phi(t) / (1 - Phi(t))`.

  The mean of a standard normal variable beyond t. Its derivative is
  `lambda (lambda - t)`, from 2 / pi at 0 to 1.

  Args:
    t: float, any shape; made for t >= 0. Computed in float32 or wider.

  Returns:
    Shape and dtype of t.

  >>> round(float(inverse_mills(0.0)), 4), float(inverse_mills(1e4))
  (0.7979, 10000.0)
  """
  t = jnp.asarray(t)
  return _mills(widen(t)).astype(t.dtype)


def truncated_gaussian_scale(
  delta: Array | float, sigma: Array | float, mu: Array | float = 0.0
) -> Array:
  """Mean of normal weights beyond a threshold, `E[w | w > mu + Delta]`.

  `S = mu + sigma lambda(Delta / sigma)` for w ~ N(mu, sigma^2); with mu = 0
  the scale of least squared error for the weights with |w| > Delta.

  Args:
    delta: float, any shape, threshold >= 0 as a distance from mu.
    sigma: broadcastable to delta, >= 0; at 0 the limit `mu + delta`.
    mu: broadcastable to delta.

  Returns:
    Shape and dtype of delta. Computed in float32 or wider.

  >>> round(float(truncated_gaussian_scale(0.612, 1.0)), 3)
  1.224

  Source: He & Fan, arXiv 1810.01018.
  """
  delta = jnp.asarray(delta)
  d = widen(delta)
  s, m = (jnp.asarray(x).astype(d.dtype) for x in (sigma, mu))
  # So far out lambda(t) is t to the last bit, and Delta / sigma may overflow.
  limit = d >= 1e6 * s
  mills = inverse_mills(d / jnp.where(limit, 1, s))
  return (m + jnp.where(limit, d, s * mills)).astype(delta.dtype)


@jax.custom_jvp
def _mills(t: Array) -> Array:
  # phi / (1 - Phi) as written is 0 / 0 from t = 5.15 in float32. JAX 0.10's
  # erfcx fails beyond an argument of 9.1, so a series takes over before.
  near, far = jnp.minimum(t, 8), jnp.maximum(t, 8)
  ratio = (2 / jnp.pi) ** 0.5 / jax.scipy.special.erfcx(near * 0.5**0.5)
  u = 1 / far
  v = u * u
  tail = u * (1 + v * (-2 + v * (10 + v * (-74 + v * 706))))
  return jnp.where(t < 8, ratio, far + tail)


@_mills.defjvp
def _mills_jvp(primals, tangents):
  (t,), (dt,) = primals, tangents
  ratio = _mills(t)
  v = 1 / jnp.square(jnp.maximum(t, 8))
  # lambda - t cancels for large t.
  tail = 1 + v * (-1 + v * (6 + v * (-50 + v * (518 - 6354 * v))))
  return ratio, jnp.where(t < 8, ratio * (ratio - t), tail) * dt
