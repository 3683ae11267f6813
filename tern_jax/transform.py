"""ParamTransform: a method and a predicate, lifted to a parameter tree.

The only module that walks trees: methods see one array at a time.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax

from tern_jax.base import (
  Ternarizer,
  Ternary,
  TernParams,
  call_repr,
  check_range,
  path_str,
)
from tern_jax.select import Kernels, check_patterns, check_weights, matches_any


@dataclasses.dataclass(frozen=True, repr=False)
class ParamTransform:
  """A ternarizer for the selected leaves of any parameter tree.

  Works on Linen and Haiku dicts, NNX states and Equinox modules alike. The
  state is a dict of its own, `{path: {name: array}}`, to be carried beside
  the parameters; it is not trained.

  Args:
    method: how one weight array is made ternary.
    where: which leaves are.
    stacked: patterns of leaves whose first axis enumerates layers, as made by
      `nn.scan`: each layer is then ternarized on its own.
    group_size: None, or g for one scale for each g consecutive weights along
      the input axis of an output channel. It divides a channel of a method
      with `channel_axis=-1`, a leaf [..., in, out] (Flax, Haiku), or
      `channel_axis=0`, a leaf [out, in, ...] (Equinox). The method sees the
      view [..., in / g, g, out] or [out, in / g, g, ...], and what it trains
      has ones beside the groups there; a `Ternary` has scales [..., in / g,
      out] or [out, in / g, ...]. A sparsity is still that of the whole leaf.

  >>> import jax.numpy as jnp, tern_jax
  >>> tern = ParamTransform(tern_jax.TWN(), tern_jax.kernels(exclude="head"))
  >>> tern
  ParamTransform(method=TWN(), where=kernels(exclude=('head',)))
  >>> user = {"body": {"kernel": jnp.array([[.1, -.2], [.3, -.4]])},
  ...         "head": {"kernel": jnp.ones((2, 1))}}
  >>> params, state = tern.init(user)
  >>> tern(params, state)["body"]["kernel"] > 0
  Array([[False, False],
         [ True, False]], dtype=bool)
  """

  method: Ternarizer
  where: Kernels = dataclasses.field(default_factory=Kernels)
  stacked: tuple[str, ...] = ()
  group_size: int | None = None

  def __post_init__(self):
    check_range("group_size", self.group_size, 1, float("inf"), "try 64")

  def init(self, tree: Any) -> tuple[TernParams, dict[str, Any]]:
    """Makes the trainable parameters and the state from initial weights.

    Args:
      tree: the user's parameters, of any structure, random or pretrained.

    Returns:
      (TernParams, state): `latent` has the structure of tree.

    Raises:
      ValueError: nothing is selected, a pattern matches nothing, two leaves
        print as the same path, a selected weight is NaN or infinite, or a
        selected leaf cannot be divided into groups.
      TypeError: a selected leaf is not floating-point.
    """
    selected = self.where.paths(tree)
    if len(set(selected)) < len(selected):
      raise ValueError(
        "Two leaves print as the same path, so their scales cannot be told"
        f" apart: {', '.join(selected)}. Rename one of them."
      )
    check_patterns(self.stacked, selected)
    scales, state = {}, {}

    def start(path: str, w: Any) -> Any:
      check_weights(path, w)
      scales[path], state[path] = self._lift(path, "init")(w)
      return self._lift(path, "latent")(w)

    latent = self._map(start, tree)
    return TernParams(latent=latent, scales=scales), state

  def __call__(self, params: TernParams, state: dict[str, Any]) -> Any:
    """Returns the effective weights: the tree that the model is applied to.

    Differentiable in params. Leaves that are not selected pass unchanged.
    """
    return self._map(self._with(params, state, "__call__"), params.latent)

  def discretize(self, params: TernParams, state: dict[str, Any]) -> Any:
    """Returns the user's tree with a `Ternary` at each selected leaf."""
    fn = self._with(params, state, "discretize")
    return self._map(lambda path, w: _align(fn(path, w)), params.latent)

  def after_step(
    self, params: TernParams, state: dict[str, Any]
  ) -> tuple[TernParams, dict[str, Any]]:
    """Returns (params, state) for the next step; call it after each update."""
    return self._update("after_step", params, state)

  def refresh(
    self, params: TernParams, state: dict[str, Any]
  ) -> tuple[TernParams, dict[str, Any]]:
    """Returns (params, state) that meet a target exactly, to discretize.

    Call it once when training is over, or after the latents were replaced, by
    their moving averages for example.
    """
    return self._update("refresh", params, state)

  def __repr__(self) -> str:
    """Prints the call that made it."""
    return call_repr(self)

  def _map(self, fn: Callable[[str, Any], Any], tree: Any) -> Any:
    """Maps fn(path, leaf) over the selected leaves of a tree."""

    def visit(path: Any, leaf: Any) -> Any:
      printed = path_str(path)
      return fn(printed, leaf) if self.where.selects(printed, leaf) else leaf

    return jax.tree_util.tree_map_with_path(visit, tree)

  def _update(
    self, name: str, params: TernParams, state: dict[str, Any]
  ) -> tuple[TernParams, dict[str, Any]]:
    """Applies a method's function from (scales, state) to (scales, state)."""
    scales, states = {}, {}
    fn = self._with(params, state, name)

    def visit(path: str, w: Any) -> Any:
      scales[path], states[path] = fn(path, w)
      return w

    self._map(visit, params.latent)
    return params.replace(scales=scales), states

  def _with(
    self, params: TernParams, state: dict[str, Any], name: str
  ) -> Callable[[str, Any], Any]:
    """Gives a method's function the scales and state of a path."""
    if not isinstance(params, TernParams):
      raise TypeError(
        f"ParamTransform got params of type {type(params).__name__}, but it"
        " needs the TernParams that init returned: params, state ="
        " tern.init(tree)."
      )
    return lambda path, w: self._lift(path, name)(
      w, params.scales[path], state[path]
    )

  def _lift(self, path: str, name: str) -> Callable[..., Any]:
    """Maps a method's function over the layers of a stacked leaf."""
    if self.group_size is None:
      fn = getattr(self.method, name)
    else:
      fn = functools.partial(
        _in_groups, self.method, name, path, self.group_size
      )
    return jax.vmap(fn) if matches_any(self.stacked, path) else fn


def _in_groups(
  method: Any, name: str, path: str, g: int, w: Any, *args: Any
) -> Any:
  """Applies a method's function to one layer, with groups as its channels."""
  axis = _input_axis(method, path, g, w.shape)
  before, n, after = w.shape[:axis], w.shape[axis], w.shape[axis + 1 :]
  # The axis is split in place, not moved, and so keeps its sharding.
  view = w.reshape(*before, n // g, g, *after)
  groups = tuple(i for i in range(view.ndim) if i != axis + 1)
  grouped = dataclasses.replace(method, channel_axis=groups)
  out = getattr(grouped, name)(view, *args)
  if isinstance(out, Ternary):
    w_p, w_n = (
      scale.squeeze(axis + 1) if scale.ndim else scale
      for scale in (out.w_p, out.w_n)
    )
    return Ternary(out.codes.reshape(w.shape), w_p, w_n)
  return out.reshape(w.shape) if isinstance(out, jax.Array) else out


def _input_axis(method: Any, path: str, g: int, shape: tuple[int, ...]) -> int:
  """Returns the axis of a layer that is divided into groups of g."""
  axes = {-1: len(shape) - 2, 0: 1}
  channel = getattr(method, "channel_axis", None)
  if channel not in axes or len(shape) < 2:
    raise ValueError(
      f"{path}: group_size={g} divides the channels of a layer of two or more"
      " axes by a method with channel_axis=-1 (Flax, Haiku) or 0 (Equinox);"
      f" got shape {shape} and {method!r}."
    )
  axis = axes[channel]
  if shape[axis] % g:
    raise ValueError(
      f"{path}: group_size={g} does not divide the {shape[axis]} inputs, axis"
      f" {axis} of shape {shape}: choose a divisor, or exclude this leaf in"
      " kernels(exclude=...)."
    )
  return axis


def _align(ternary: Ternary) -> Ternary:
  """Gives the scales of stacked layers, [layers], the rank of the codes."""

  def align(scale: jax.Array) -> jax.Array:
    if scale.ndim in (0, ternary.codes.ndim):
      return scale
    missing = ternary.codes.ndim - scale.ndim
    return scale.reshape(scale.shape + (1,) * missing)

  return dataclasses.replace(
    ternary, w_p=align(ternary.w_p), w_n=align(ternary.w_n)
  )
