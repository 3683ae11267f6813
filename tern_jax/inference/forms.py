"""Arithmetic that layouts share, in XLA's own operations."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero

from tern_jax.core.types import Array
from tern_jax.inference.matrix import Size

_TINY = np.finfo(np.float32).tiny
#: Of the largest magnitude; XLA would make a division by 127 of it.
_STEP = np.float32(1 / 127)
_EXACT = jax.lax.Precision.HIGHEST


def padded(x: Array, axis: int, size: Size, to: int, fill: int = 0) -> Array:
  """Returns inputs with each group filled up to a multiple."""
  group = x.shape[axis] // size.groups
  x = x.reshape(*x.shape[:axis], size.groups, group, *x.shape[axis + 1 :])
  widths = [(0, 0)] * x.ndim
  widths[axis + 1] = (0, -group % to)
  x = jnp.pad(x, widths, constant_values=fill)
  return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])


def cut(x: Array, size: Size) -> Array:
  """Returns inputs, the first axis, without what `padded` added."""
  x = x.reshape(size.groups, -1, *x.shape[1:])[:, : size.group]
  return x.reshape(-1, *x.shape[2:])


def steps(n: int, step: int, axis: int, ndim: int) -> Array:
  """Returns uint32 0, step, 2 step, ... along an axis, of ndim axes in all."""
  shape = tuple(n if i == axis else 1 for i in range(ndim))
  return jnp.uint32(step) * jax.lax.broadcasted_iota(jnp.uint32, shape, axis)


def quantize(x: Array) -> tuple[Array, Array]:
  """Rounds rows to 127 steps to either side of zero.

    q = round(127 x / max |x|),  ties to even

  A row whose magnitudes are all below those of normal numbers counts as zero.
  One that holds NaN or infinity has a step of NaN.

  Args:
    x: float32 [rows, inputs].

  Returns:
    q, int32 [rows, inputs], and the steps max |x| / 127, float32 [rows, 1].
  """
  most = jnp.max(jnp.abs(x), 1, keepdims=True)
  finite = jnp.isfinite(most)
  used = finite & (most >= _TINY)
  ratio = x / jnp.where(used, most, 1.0)
  q = jnp.where(used, jnp.round(ratio * 127.0), 0.0).astype(jnp.int32)
  step = jnp.where(used, most * _STEP, jnp.where(finite, 0.0, jnp.nan))
  return q, step


def scaled(p: Array, n: Array, w_p: Array, w_n: Array, step: Array) -> Array:
  """Returns the product of integer sums, rounded as the native code rounds.

    step · Σ_g (w_p P − w_n N),  or  w (P − N)  where both magnitudes are w

  Args:
    p: int32 [groups, rows, outputs], sums at the positive weights.
    n: the same at the negative ones.
    w_p: float32 [groups or 1, outputs or 1].
    w_n: the same.
    step: float32 [rows, 1].
  """
  w_p, w_n = w_p[:, None], w_n[:, None]
  # Behind the barrier: else product and difference may be rounded only once.
  apart = jax.lax.optimization_barrier(
    (w_p * p.astype(jnp.float32), w_n * n.astype(jnp.float32))
  )
  once = w_p * (p - n).astype(jnp.float32)
  parts = jnp.where(w_p == w_n, once, apart[0] - apart[1])
  parts = jax.lax.optimization_barrier(parts)
  total, _ = jax.lax.scan(lambda y, part: (y + part, None), parts[0], parts[1:])
  return total * step


def is_sharded(*arrays: Array) -> bool:
  """Whether a sharding is part of a type, by whose rules JAX computes."""
  specs = (jax.typeof(x).sharding.spec for x in arrays)
  return any(axis is not None for spec in specs for axis in spec)


def of_codes(
  x: Array, codes: Array, w_p: Array, w_n: Array, size: Size, int8: bool
) -> Array:
  """Returns the product of unpacked codes, where a layout has no other."""
  if not int8:
    return jnp.matmul(x, dense(codes, w_p, w_n, size), precision=_EXACT)
  q, step = quantize(x)
  q = jnp.moveaxis(q.reshape(-1, size.groups, size.group), 1, 0)
  c = codes.astype(jnp.int32).reshape(size.groups, size.group, -1)

  def sums(c: Array) -> Array:
    return jnp.einsum("grk,gko->gro", q, c)

  return scaled(
    sums(jnp.maximum(c, 0)), sums(jnp.maximum(-c, 0)), w_p, w_n, step
  )


def dense(codes: Array, w_p: Array, w_n: Array, size: Size) -> Array:
  """Returns weights, float32 [inputs, outputs], of codes and scales."""

  def of_inputs(w: Array) -> Array:
    return w if w.shape[0] == 1 else jnp.repeat(w, size.group, 0)

  # Codes are compared in float: XLA:CPU miscompiles some fused int8 maths.
  c = codes.astype(jnp.float32)
  w_p, w_n = of_inputs(w_p), of_inputs(w_n)
  return jnp.where(c > 0, w_p, jnp.where(c < 0, -w_n, jnp.zeros((), w_p.dtype)))


def derivative(
  dense: Callable[..., Array], y: Array, primals: tuple, tangents: tuple
) -> Array:
  """Returns the tangent of y, linear in x and in the scales.

  Args:
    dense: the same function by unpacked weights, of (x, w_p, w_n, arrays).
    y: its value.
    primals: (x, w_p, w_n, arrays).
    tangents: of these, with symbolic zeros; that of the arrays is not used.
  """
  # What is kept for a gradient are packed weights: they are unpacked again.
  dense = jax.checkpoint(dense)
  x, w_p, w_n, arrays = primals
  dx, *dw, _ = tangents

  def zeros(t: Array | SymbolicZero, like: Array) -> Array:
    return jnp.zeros_like(like) if isinstance(t, SymbolicZero) else t

  dy = jnp.zeros_like(y)
  if not isinstance(dx, SymbolicZero):
    dy += dense(dx, w_p, w_n, arrays)
  if not all(isinstance(t, SymbolicZero) for t in dw):
    dw = (zeros(t, w) for t, w in zip(dw, (w_p, w_n), strict=True))
    dy += dense(x, *dw, arrays)
  return dy
