"""WDR, the weight discretization regularizer.

A latent Theta stands for the weight W = tanh(Theta). WDR is
`R(Theta) = sum (alpha - W^2) W^2`. Its only minima are W = 0 and W = +-1; the
barrier between them lies at |W| = sqrt(alpha / 2), so alpha controls which
weights end at zero. Its force fades towards the barrier, where a hard forward
wants it most: there, weights that the loss pulls to and fro flip their codes
again and again. The sharp WDR, half the squared distance to the codes, has
the same minima and the same barrier, and its full force beside it.
"""

import jax
import jax.numpy as jnp
import numpy as np

from tern_jax.core.checks import check_range
from tern_jax.core.numerics import widen
from tern_jax.core.types import Array
from tern_jax.targets.quantile import magnitude_threshold
from tern_jax.targets.schedules import check_sparsity


def wdr(theta: Array, alpha: Array | float, sharp: bool = False) -> Array:
  """Weight discretization regularizer of one array.

  `R(Theta) = sum_i (alpha - W_i^2) W_i^2` with `W = tanh(Theta)`; if sharp,
  `R(Theta) = sum_i (|W_i| - 1[|W_i| > barrier])^2 / 2`.

  Args:
    theta: float, any shape, latents.
    alpha: broadcastable to theta; ternary for 0 < alpha < 2.
    sharp: whether the barrier is a kink.

  Returns:
    0-d, float32 (float64 for float64 latents).

  Raises:
    TypeError: theta is not floating-point.

  >>> latents = jnp.array([0., 20., -20.])
  >>> [float(wdr(latents, 0.5, sharp)) for sharp in (False, True)]
  [-1.0, 0.0]

  Source: Deng & Zhang, arXiv 2011.00580; the sharp form is, for two codes, the
  W-shaped regularizer of Bai, Wang & Liberty, arXiv 1810.00861, squared.
  """
  w = jnp.tanh(_wide(theta))
  alpha = jnp.asarray(alpha, w.dtype)
  if sharp:
    return jnp.sum(jnp.square(_off(w, alpha))) / 2
  s = jnp.square(w)
  return jnp.sum((alpha - s) * s)


def wdr_grad(theta: Array, alpha: Array | float, sharp: bool = False) -> Array:
  """Gradient of WDR: `dR/dTheta = 2 W (1 - W^2) (alpha - 2 W^2)`.

  If sharp, `(W - sign(W) 1[|W| > barrier]) (1 - W^2)`. Arguments are those of
  `wdr`; of the shape of theta.

  >>> at_barrier = jnp.arctanh(wdr_barrier(0.5))
  >>> abs(float(wdr_grad(at_barrier, alpha=0.5))) < 1e-6
  True
  """
  w = jnp.tanh(_wide(theta))
  alpha = jnp.asarray(alpha, w.dtype)
  s = jnp.square(w)
  slope = _off(w, alpha) if sharp else 2 * w * (alpha - 2 * s)
  return slope * (1 - s)


def _off(w: Array, alpha: Array) -> Array:
  """Returns by how much W is off the code on its side of the barrier."""
  return w - jnp.where(jnp.abs(w) > wdr_barrier(alpha), jnp.sign(w), 0)


def wdr_barrier(alpha: Array | float) -> Array:
  """Magnitude |W| that separates the basin of 0 from those of -1 and +1.

  `|W| = sqrt(alpha / 2)`, 0 for a negative alpha (binary weights). Alpha may
  have any shape.

  >>> float(wdr_barrier(0.5))
  0.5
  """
  alpha = jnp.asarray(alpha)
  if not jnp.issubdtype(alpha.dtype, jnp.floating):
    alpha = alpha.astype(jnp.float32)
  return jnp.sqrt(jnp.maximum(alpha, 0) / 2)


def predicted_sparsity(theta: Array | float, alpha: Array | float) -> Array:
  """Share of zeros that WDR alone drives latents to.

  For an array the share of |tanh(Theta)| below the barrier; for a 0-d sigma,
  of latents N(0, sigma^2), `erf(arctanh(sqrt(alpha / 2)) / (sigma sqrt 2))`.

  Args:
    theta: latents of any shape, or a 0-d standard deviation sigma > 0.
    alpha: 0-d, in [0, 2).

  Returns:
    0-d, float32 (float64 for float64 input).

  Raises:
    ValueError: alpha lies outside [0, 2), or sigma is not positive.

  >>> round(float(predicted_sparsity(0.5, alpha=0.1)), 3)
  0.351
  """
  check_alpha(alpha)
  x = _wide(jnp.asarray(theta))
  limit = jnp.arctanh(wdr_barrier(jnp.asarray(alpha, x.dtype)))
  if x.ndim:
    return jnp.mean(jnp.abs(x) <= limit, dtype=x.dtype)
  check_range("sigma", theta, 1e-30, jnp.inf, "it is a standard deviation")
  return jax.scipy.special.erf(limit / (x * jnp.sqrt(2.0).astype(x.dtype)))


def alpha_for_sparsity(theta: Array | float, sparsity: Array | float) -> Array:
  """The alpha whose barrier leaves the asked share of weights in the 0 basin.

  For an array `2 q^2`, with q the quantile of |tanh(Theta)| at the sparsity;
  for a 0-d sigma, `2 tanh(sigma sqrt(2) erfinv(sparsity))^2`. It inverts
  `predicted_sparsity`.

  Args:
    theta: latents of any shape, or a 0-d standard deviation sigma > 0.
    sparsity: 0-d, share of zeros in [0, 1).

  Returns:
    0-d, float32 (float64 for a float64 sigma).

  Raises:
    ValueError: sparsity lies outside [0, 1), or sigma is not positive.

  >>> round(float(alpha_for_sparsity(0.5, sparsity=0.351)), 3)
  0.1
  """
  check_sparsity(sparsity)
  x = _wide(jnp.asarray(theta))
  if x.ndim:
    limit = magnitude_threshold(x, sparsity)
  else:
    check_range("sigma", theta, 1e-30, jnp.inf, "it is a standard deviation")
    share = jnp.asarray(sparsity, x.dtype)
    limit = x * jnp.sqrt(2.0).astype(x.dtype) * jax.scipy.special.erfinv(share)
  return 2 * jnp.square(jnp.tanh(limit))


def check_alpha(alpha: object) -> None:
  """Raises a ValueError unless a concrete alpha lies in [0, 2)."""
  check_range(
    "alpha",
    alpha,
    0,
    2,
    "0 gives binary weights, from 2 on every weight goes to 0; try 0.1",
  )


def _wide(theta: Array) -> Array:
  """Returns latents in the precision in which WDR is computed."""
  theta = jnp.asarray(theta)
  check_floating("theta", theta)
  return widen(theta)


def check_floating(name: str, theta: Array) -> None:
  """Raises a TypeError unless latents are floating-point."""
  if not jnp.issubdtype(theta.dtype, jnp.floating):
    raise TypeError(
      f"{name} is {theta.dtype}, but WDR is defined for floating-point"
      " latents: convert it, or leave it out by mask=."
    )


def is_scalar_or_schedule(x: object) -> bool:
  """Whether something is a number, a numeric array or a function.

  >>> is_scalar_or_schedule(0.1), is_scalar_or_schedule("0.1")
  (True, False)
  """
  if isinstance(x, jax.Array | np.ndarray | np.generic):
    return bool(jnp.issubdtype(x.dtype, jnp.number))
  if isinstance(x, bool | type):
    return False
  return callable(x) or isinstance(x, int | float)
