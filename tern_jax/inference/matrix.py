"""Ternary weights as a matrix of codes and scales [groups, outputs].

The axes that a product sums over are the inputs, merged in their order; all
others are the outputs. A group is a run of inputs that have one scale for each
output.
"""

import math
from typing import NamedTuple

import jax.numpy as jnp

from tern_jax.core.containers import aligned
from tern_jax.core.types import Array

Shape = tuple[int, ...]


class Size(NamedTuple):
  """Of a matrix: inputs, outputs, and groups of as many inputs each."""

  inputs: int
  outputs: int
  groups: int

  @property
  def group(self) -> int:
    """Inputs of a group."""
    return self.inputs // self.groups


def others(shape: Shape, inputs: Shape) -> Shape:
  """Returns the axes of weights that are no inputs."""
  return tuple(i for i in range(len(shape)) if i not in inputs)


def size_of(shape: Shape, inputs: Shape, *scales: Shape) -> Size:
  """Returns the size of the matrix of weights whose scales have shapes.

  >>> size_of((4, 16, 8), (0, 1), (1, 2, 8), (1, 1, 1))
  Size(inputs=64, outputs=8, groups=8)
  """
  n = math.prod(shape[i] for i in inputs)
  runs = (_run(shape, inputs, scale) for scale in scales)
  run = math.gcd(n, *runs)
  outputs = math.prod(shape[i] for i in others(shape, inputs))
  return Size(n, outputs, n // run if run else 1)


def _run(shape: Shape, inputs: Shape, scale: Shape) -> int:
  """Returns how many consecutive inputs share a scale."""
  run = 1
  for i in reversed(inputs):
    if scale[i] > 1:
      return run * (shape[i] // scale[i])
    run *= shape[i]
  return run


def merged(x: Array, inputs: Shape) -> Array:
  """Returns weights, or their codes, as a matrix [inputs, outputs]."""
  rest = others(x.shape, inputs)
  x = jnp.transpose(x, (*inputs, *rest))
  n = math.prod(x.shape[: len(inputs)])
  return x.reshape(n, math.prod(x.shape[len(inputs) :]))


def parted(x: Array, shape: Shape, inputs: Shape) -> Array:
  """Returns the weights of a matrix, the inverse of `merged`."""
  order = (*inputs, *others(shape, inputs))
  x = x.reshape(tuple(shape[i] for i in order))
  return jnp.transpose(x, tuple(order.index(i) for i in range(len(shape))))


def scale_of(w: Array, shape: Shape, inputs: Shape, size: Size) -> Array:
  """Returns scales [groups or 1, outputs or 1] of a matrix.

  Args:
    w: scales of the rank of the weights.
    shape: of the weights.
    inputs: axes of them.
    size: of the matrix.
  """
  run = _run(shape, inputs, w.shape)
  rest = others(shape, inputs)
  if any(w.shape[i] > 1 for i in rest):
    w = _filled(w, shape, rest)
  if any(w.shape[i] > 1 for i in inputs):
    # Behind the axis that has groups, all inputs share a scale.
    axis = next(i for i in reversed(inputs) if w.shape[i] > 1)
    w = _filled(w, shape, inputs[: inputs.index(axis)])
  w = merged(w, inputs)
  if w.shape[0] > 1:
    w = jnp.repeat(w, run // size.group, 0)
  return w


def _filled(w: Array, shape: Shape, axes: Shape) -> Array:
  """Repeats scales until they are as long as the weights along axes."""
  for axis in axes:
    if w.shape[axis] != shape[axis]:
      w = jnp.repeat(w, shape[axis] // w.shape[axis], axis)
  return w


def ranked(w: Array, shape: Shape, lead: int) -> Array:
  """Gives scales the rank of a stack of weights, and its leading axes."""
  w = aligned(jnp.asarray(w), shape)
  w = w.reshape((1,) * (len(shape) - w.ndim) + w.shape)
  return jnp.broadcast_to(w, (*shape[:lead], *w.shape[lead:]))
