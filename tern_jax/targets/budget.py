"""Budgets: a size in bytes, shared over the layers of a network."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from tern_jax.core.axes import attention
from tern_jax.core.checks import check_weights
from tern_jax.core.paths import exact, path_str
from tern_jax.core.select import selector
from tern_jax.core.types import PyTree
from tern_jax.targets.schedules import PerLayer

#: Sparsities that are tried: denser towards 1, where bits change fastest.
_GRID = 1 - np.geomspace(1, 1e-3, 2001)


class _Layer(NamedTuple):
  """What a sparsity costs in a layer, on the grid."""

  path: str
  loss: np.ndarray
  bytes: np.ndarray


def fit_budget(
  params: PyTree,
  *,
  bytes: float,
  where: Any = None,
  scales: int = 2,
  channel_axis: int | tuple[int, ...] = -1,
) -> PerLayer:
  """Shares a size in bytes over layers: the sparsity of each.

  Maximizes what the outputs of all layers keep of their weights, as a product:
  minimizes `sum_l L_l(s)` with `L_l = -c_l log(1 - D_l)`, c_l the output
  channels and `D_l(s) = |W - a code|^2 / |W|^2` for zeros at the smallest
  magnitudes and the best scale a, under `sum_l R_l(s) <= bytes` with
  `R_l(s) = n_l (h(s) + 1 - s) / 8`, the entropy of codes of both signs alike.
  One Lagrange multiplier: each layer minimizes `L_l + lambda R_l`.

  The logarithm keeps any layer from dying: the sum of the errors D_l itself
  gives the largest layer of a ResNet-8 less than 1 % of its weights, and is
  worse than one sparsity for all (`experiments.benchmarks.budget`).

  `R` is what `save_packed(codec="entropy")` stores, or less where a layer's
  signs or rows are uneven; the container around it, an orbax checkpoint or
  JSON, comes on top.

  Args:
    params: the user's parameters, random or, better, trained: layers that a
      few large weights make up can then give more. Concrete arrays.
    bytes: of everything: codes, scales, and all other leaves as they are.
    where: which leaves are ternary, as `ParamTransform` takes it; `kernels()`
      by default.
    scales: magnitudes stored for each ternary leaf, of its dtype: 2 for a
      tensor, `2 * channels` for channels.
    channel_axis: the axis of output channels, -1 for Flax and Haiku, 0 for
      Equinox, or a tuple of axes; -1 knows attention, as in `ParamTransform`.

  Returns:
    The targets, each by the exact path of its leaf, for `sparsity=` of any
    method, `at_sparsity` and `ramp`. Their size lies at `bytes`, below it by
    1 % at most, unless the least distortion, at some 45 % zeros, is smaller; no
    layer has fewer zeros than that.

  Raises:
    ValueError: no room for the leaves that stay, or 99.9 % zeros are too
      large; nothing is selected.
    TypeError: a selected leaf is not floating-point.

  >>> import jax.numpy as jnp
  >>> w = jnp.linspace(-1.0, 1.0, 4000)
  >>> params = {"a": {"kernel": w.reshape(40, 100)},
  ...           "b": {"kernel": w[::10].reshape(10, 40)}}
  >>> targets = fit_budget(params, bytes=500)
  >>> [round(float(targets.of(k + "/kernel")), 2) for k in "ab"]
  [0.84, 0.33]
  """
  chosen = set(selector(where).paths(params))
  fixed, layers = 0, []
  leaves = jax.tree_util.tree_leaves_with_path(params)
  heads = {}
  if channel_axis == -1:
    heads = attention({path_str(keys): leaf.shape for keys, leaf in leaves})
  for keys, leaf in leaves:
    path, itemsize = path_str(keys), np.dtype(leaf.dtype).itemsize
    if path in chosen:
      check_weights(path, leaf)
      fixed += scales * itemsize
      axes = heads[path].outputs if path in heads else channel_axis
      layers.append(_measure(path, leaf, axes))
    else:
      fixed += leaf.size * itemsize
  chosen = _share(layers, bytes - fixed, bytes, fixed)
  shares = np.interp(chosen, np.arange(_GRID.size), _GRID)
  return PerLayer(
    tuple(
      (exact(x.path), float(s)) for x, s in zip(layers, shares, strict=True)
    )
  )


def _measure(path: str, w: Any, outputs: int | tuple[int, ...]) -> _Layer:
  """Returns loss and bytes of a layer over the grid."""
  magnitude = np.sort(np.abs(np.asarray(w, np.float64)).ravel())
  n = magnitude.size
  if not n:
    return _Layer(path, np.zeros_like(_GRID), np.zeros_like(_GRID))
  zeros = np.minimum(np.round(_GRID * n).astype(np.int64), n - 1)
  above = np.cumsum(magnitude[::-1])[::-1][zeros]
  energy = float(np.sum(np.square(magnitude))) or 1.0
  kept = np.square(above) / (n - zeros) / energy
  axes = outputs if isinstance(outputs, tuple) else (outputs,)
  channels = math.prod(w.shape[axis] for axis in axes)
  loss = -channels * np.log(np.maximum(kept, 1e-12))
  # With fewer zeros codes are worse, though binary ones may be smaller.
  loss[: np.argmin(loss)] = np.inf
  s, used = _GRID, 1 - _GRID
  with np.errstate(divide="ignore", invalid="ignore"):
    entropy = used - used * np.log2(used) - np.where(s > 0, s * np.log2(s), 0)
  return _Layer(path, loss, n * entropy / 8)


def _share(
  layers: list[_Layer], room: float, asked: float, fixed: int
) -> np.ndarray:
  """Returns the positions on the grid, between two points, of each layer."""

  def cheapest(exponent: float) -> np.ndarray:
    lam = 2.0**exponent
    return np.array([np.argmin(x.loss + lam * x.bytes) for x in layers])

  def size(chosen: np.ndarray) -> float:
    grid = np.arange(_GRID.size)
    pairs = zip(chosen, layers, strict=True)
    return sum(float(np.interp(i, grid, x.bytes)) for i, x in pairs)

  least = sum(float(x.bytes[-1]) for x in layers)
  if room < least:
    raise ValueError(
      f"{asked:,.0f} bytes are too few: {fixed:,} are taken by scales and"
      f" leaves that are not ternary, {math.ceil(least):,} by ternary ones of"
      f" {_GRID[-1]:.1%} zeros: give at least {math.ceil(fixed + least):,}."
    )
  # Lambda from nothing to more than any loss is worth.
  low, high = -100.0, 100.0
  if size(cheapest(low)) <= room:
    return cheapest(low)
  low, high = _bisect(lambda x: size(cheapest(x)) > room, low, high)
  ends = cheapest(low), cheapest(high)
  # Between these two a layer or some leap from one sparsity to another.
  _, part = _bisect(lambda t: size(_mix(ends, t)) > room, 0.0, 1.0)
  return _mix(ends, part)


def _bisect(
  is_low: Callable[[float], bool], low: float, high: float
) -> tuple[float, float]:
  """Returns two neighbors of which one is low, the other is not."""
  for _ in range(60):
    middle = 0.5 * (low + high)
    low, high = (middle, high) if is_low(middle) else (low, middle)
  return low, high


def _mix(ends: tuple[np.ndarray, np.ndarray], part: float) -> np.ndarray:
  return (1 - part) * ends[0] + part * ends[1]
