"""Which axes of a kernel are its inputs and its outputs, attention's too."""

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from tern_jax.core.names import role_of
from tern_jax.core.types import ChannelAxis

_END = "(_proj|_projection|_dense)?"
_TO_HEADS = re.compile(f"(to_)?(query|key|value|q|k|v|qkv|kv){_END}")
_QUERY = re.compile(f"(to_)?(query|q){_END}")
_FROM_HEADS = re.compile(f"(to_)?(out|output|attention_output|o){_END}")

Shape = tuple[int, ...]


class Axes(NamedTuple):
  """Axes of a kernel, counted from the front; others are spatial."""

  inputs: tuple[int, ...]
  outputs: tuple[int, ...]


def axes_of(path: str, shape: Shape, channel_axis: int) -> Axes:
  """Returns the axes of one layer of two or more axes.

  Of [..., in, out], channel_axis=-1, or [out, in, ...], channel_axis=0. But of
  -1 and three axes Flax and Keras have attention as well, which is told by the
  last name before that of the kernel: [in, heads, head_dim] where it is query,
  key or value, or begins so, and [heads, head_dim, out] where it is out,
  output or attention_output.

  >>> axes_of("attn/query/kernel", (64, 4, 16), -1)
  Axes(inputs=(0,), outputs=(1, 2))
  >>> axes_of("attn/out/kernel", (4, 16, 64), -1)
  Axes(inputs=(0, 1), outputs=(2,))
  >>> axes_of("conv/kernel", (3, 64, 16), -1)
  Axes(inputs=(1,), outputs=(2,))
  """
  n = len(shape)
  if channel_axis == 0:
    return Axes((1,), (0,))
  _, role = role_of(path)
  # With one input it is a convolution of width 1.
  if n == 3 and shape[0] > 1:
    if _TO_HEADS.fullmatch(role):
      return Axes((0,), (1, 2))
    if _FROM_HEADS.fullmatch(role):
      return Axes((0, 1), (2,))
  return Axes((n - 2,), (n - 1,))


def attention(shapes: Mapping[str, Shape]) -> dict[str, Axes]:
  """Returns the axes of attention kernels of three axes, or stacks of them.

  Those that `axes_of` tells, unless what lies beside them says otherwise: the
  heads of a query are those of the output. Without that, [layers, in, out]
  could not be told from [in, heads, head_dim].

  >>> attention({"query/kernel": (64, 4, 16), "out/kernel": (4, 16, 64)})
  ... # doctest: +NORMALIZE_WHITESPACE
  {'query/kernel': Axes(inputs=(0,), outputs=(1, 2)),
   'out/kernel': Axes(inputs=(0, 1), outputs=(2,))}
  >>> attention({"query/kernel": (6, 64, 64), "out/kernel": (6, 64, 64)})
  {}
  """
  modules: dict[tuple[str, ...], dict[str, Shape]] = {}
  for path, shape in shapes.items():
    module, role = role_of(path)
    modules.setdefault(module, {})[role] = shape
  made = {}
  for path, shape in shapes.items():
    stack = len(shape) - 3
    if stack not in (0, 1):
      continue
    axes = axes_of(path, shape[stack:], -1)
    if len(axes.inputs + axes.outputs) < 3:
      continue
    fits = _fit(modules[role_of(path)[0]], len(shape))
    alone = fits is None and not stack and len(axes.outputs) > 1
    if fits or alone:
      made[path] = Axes(*(tuple(stack + i for i in x) for x in axes))
  return made


def _fit(module: Mapping[str, Shape], rank: int) -> bool | None:
  """Whether queries have the heads of the output; None if one is missing."""
  to, out = (
    {k: x for k, x in module.items() if len(x) == rank and name.fullmatch(k)}
    for name in (_TO_HEADS, _FROM_HEADS)
  )
  if not to or not out:
    return None
  ends = [(*x[:-3], *x[-3:-1]) for x in out.values()]
  queries = [x for k, x in to.items() if _QUERY.fullmatch(k)]
  if queries:
    return any((*x[:-3], *x[-2:]) in ends for x in queries)
  # Keys may have fewer heads.
  return any(x[-1] == end[-1] for x in to.values() for end in ends)


def check_heads(
  shapes: Mapping[str, Shape],
  selected: Sequence[str],
  channel_axis: ChannelAxis,
) -> None:
  """Raises a ValueError if channels of an attention kernel make no sense.

  Args:
    shapes: of one layer of each leaf.
    selected: leaves that matter.
    channel_axis: of the method.
  """
  if channel_axis is None:
    return
  known = attention(shapes)
  for path in selected:
    shape = shapes[path]
    if channel_axis == -1:
      is_query = len(shape) == 3 and len(axes_of(path, shape, -1).outputs) > 1
      if is_query and path not in known:
        raise ValueError(
          f"{path} of shape {shape} has the name of a kernel [in, heads,"
          " head_dim], but no heads in common with the output beside it. If its"
          " first axis enumerates layers, name it in stacked=; if it is [...,"
          " in, out], give channel_axis=(-1,)."
        )
    elif path in known:
      kept = (
        channel_axis if isinstance(channel_axis, tuple) else (channel_axis,)
      )
      inputs = [i for i in known[path].inputs if i in kept or i - 3 in kept]
      if inputs:
        raise ValueError(
          f"{path} of shape {shape} is a kernel of attention, and"
          f" channel_axis={channel_axis} has a scale for each index of axis"
          f" {inputs[0]}, one of its inputs: take channel_axis=-1, which knows"
          " the outputs of all kernels of attention."
        )
