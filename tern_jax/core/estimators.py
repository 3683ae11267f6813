"""How gradients pass a discretization."""

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from tern_jax.core.containers import dense
from tern_jax.core.types import Array, Floats


@jax.custom_jvp
def straight_through(soft: Floats, hard: Floats) -> Floats:
  """Returns `hard` exactly, with the gradient of `soft`.

  The usual `soft + stop_gradient(hard - soft)` rounds: in float32 it is not
  `hard` in some entries. Here the forward is `hard` bit for bit.

  Args:
    soft: float, any shape, what the gradient flows to unchanged.
    hard: same shape and dtype; no gradient flows to it.

  Returns:
    hard.

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
def trained_scale(soft: Array, codes: Array, a: Array, factor: Array) -> Array:
  """Returns `a * codes`, with the true gradient of a.

  `d(out) = codes * d(a) + factor * d(soft)`.

  All are of one dtype and broadcastable to soft, the latents or a function of
  them; a is not 0, and codes are in {-1, 0, 1}.

  >>> f = lambda w, a: trained_scale(w, jnp.sign(w), a, 2.0)
  >>> [float(g) for g in jax.grad(f, (0, 1))(jnp.array(-.5), jnp.array(3.))]
  [2.0, -1.0]
  """
  del soft, factor
  return dense(codes, a, a)


@trained_scale.defjvp
def _trained_scale_jvp(primals, tangents):
  _, codes, a, factor = primals
  d_soft, _, d_a, _ = tangents
  out = dense(codes, a, a)
  # The output is in memory anyway, and a sum of its products with gradients
  # needs no pass of its own to put the codes there.
  return out, out * (d_a / a) + factor * d_soft


@jax.custom_jvp
def trained_scales(
  soft: Array, codes: Array, w_p: Array, w_n: Array, factor: Array
) -> Array:
  """Returns the dense weights, with true gradients of their magnitudes.

  `d(out) = d(w_p)` where the code is +1, `-d(w_n)` where it is -1, and
  `factor * d(soft)` in addition everywhere.

  Arguments are as in `trained_scale`; w_p and w_n are positive.

  >>> f = lambda w, w_p, w_n: trained_scales(w, jnp.sign(w), w_p, w_n, 2.0)
  >>> args = jnp.array(-.5), jnp.array(1.), jnp.array(3.)
  >>> [float(g) for g in jax.grad(f, (0, 1, 2))(*args)]
  [2.0, 0.0, -1.0]

  Source: Zhu et al., arXiv 1612.01064, equations 7 and 8.
  """
  del soft, factor
  return dense(codes, w_p, w_n)


@trained_scales.defjvp
def _trained_scales_jvp(primals, tangents):
  _, codes, w_p, w_n, factor = primals
  d_soft, _, d_p, d_n, _ = tangents
  out = dense(codes, w_p, w_n)
  # The parabola through (-w_n, -d_n), (0, 0) and (w_p, d_p), for the same
  # reason as above.
  bend = (d_p / w_p - d_n / w_n) / (w_p + w_n)
  slope = d_p / w_p - w_p * bend
  return out, out * slope + jnp.square(out) * bend + factor * d_soft


def clamp_gradient(x: Array, limit: Array) -> Array:
  """Returns x, with its gradient clipped to [-limit, limit].

  What a `jax.custom_vjp` would do, but in forward mode, too, where it is x.
  A clip has no tangent that it would be the transpose of; hence a primitive.

  Args:
    x: float, any shape.
    limit: >= 0, of x's dtype, broadcastable to x; no gradient flows to it.

  >>> f = lambda x: 5 * clamp_gradient(x, jnp.array(2.0))
  >>> float(jax.grad(f)(1.0)), float(jax.jvp(f, (1.0,), (1.0,))[1])
  (2.0, 5.0)
  """
  return _clamp.bind(x, jax.lax.stop_gradient(jnp.broadcast_to(limit, x.shape)))


def _clamp_jvp(primals, tangents):
  x, limit = primals
  out, dx = _clamp.bind(x, limit), tangents[0]
  return out, dx if type(dx) is ad.Zero else _clamp.bind(dx, limit)


def _clamp_transpose(g, x, limit):
  del x
  return g if type(g) is ad.Zero else jnp.clip(g, -limit, limit), None


def _clamp_batch(args, dims):
  size = next(
    x.shape[d] for x, d in zip(args, dims, strict=True) if d is not None
  )
  moved = (
    batching.bdim_at_front(x, d, size) for x, d in zip(args, dims, strict=True)
  )
  return _clamp.bind(*moved), 0


_clamp = Primitive("clamp_gradient")
_clamp.def_impl(lambda x, limit: x)
_clamp.def_abstract_eval(lambda x, limit: x)
ad.primitive_jvps[_clamp] = _clamp_jvp
ad.primitive_transposes[_clamp] = _clamp_transpose
batching.primitive_batchers[_clamp] = _clamp_batch
mlir.register_lowering(
  _clamp, mlir.lower_fun(lambda x, limit: x, multiple_results=False)
)
