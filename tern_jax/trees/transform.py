"""ParamTransform: a method and a predicate, lifted to a parameter tree.

The only module that walks trees: methods see one array at a time.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from tern_jax.core.checks import call_repr, check_range, check_weights, concrete
from tern_jax.core.containers import Ternary, TernParams
from tern_jax.core.method import Ternarizer
from tern_jax.core.paths import check_patterns, matches_any, path_str
from tern_jax.core.select import Kernels
from tern_jax.targets.quantile import magnitude_threshold
from tern_jax.targets.schedules import (
  AcrossLayers,
  at,
  check_targets,
  every_at,
  look_at,
  target_of,
)


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
    self._check_paths(tree)
    scales, state = {}, {}

    def latent_of(path: str, w: Any) -> Any:
      check_weights(path, w)
      return self._lift(path, "latent")(w)

    latent = self._map(latent_of, tree)
    shares = self._shares(latent, jnp.zeros((), jnp.int32))

    def start(path: str, w: Any) -> None:
      init = self._lift(path, "init", shares)
      scales[path], state[path] = init(w)

    self._map(start, tree)
    return TernParams(latent=latent, scales=scales), state

  def from_ternary(
    self, tree: Any, step: Any = 0
  ) -> tuple[TernParams, dict[str, Any]]:
    """Makes parameters and state that `discretize` turns into a given tree.

    The inverse of `discretize`, for `from_packed`; see there.

    Args:
      tree: the user's parameters with a `Ternary` at each selected leaf, and
        nowhere else.
      step: number of the step at which the method's schedules stand.

    Returns:
      (TernParams, state), as of `init`; latents have the dtype of the scales.

    Raises:
      ValueError: a selected leaf is not ternary, or another one is; its scales
        are finer than the method's; or the method cannot make its weights.
    """
    self._check_paths(jax.tree.map(_shape, tree, is_leaf=_is_ternary))
    count = jnp.asarray(step, jnp.int32)
    scales, state = {}, {}

    def start(path: Any, leaf: Any) -> Any:
      printed = path_str(path)
      kinds = "dense", "ternary"
      selected = self.where.selects(printed, _shape(leaf))
      if selected != _is_ternary(leaf):
        raise ValueError(
          f"{printed} is {kinds[not selected]}, but {kinds[selected]} by"
          f" {self.where!r}: select exactly the leaves that are ternary."
        )
      if not _is_ternary(leaf):
        return leaf
      w, scales[printed], state[printed] = self._invert(printed, leaf, count)
      return w

    latent = jax.tree_util.tree_map_with_path(start, tree, is_leaf=_is_ternary)
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
    _check_params(params)
    tern, shares = self, {}
    if isinstance(self._target, AcrossLayers):
      # Layers get their shares as numbers, which tell nothing of the run.
      method: Any = self.method
      count = _count(state) + 1
      every = every_at(method.every, self._target.sparsity, count)
      method = dataclasses.replace(method, every=every)
      tern = dataclasses.replace(self, method=method)
      shares = tern._due_shares(params.latent, count)
    return tern._update("after_step", params, state, shares)

  def refresh(
    self, params: TernParams, state: dict[str, Any]
  ) -> tuple[TernParams, dict[str, Any]]:
    """Returns (params, state) that meet a target exactly, to discretize.

    Call it once when training is over, or after the latents were replaced, by
    their moving averages for example.
    """
    _check_params(params)
    shares = self._shares(params.latent, _count(state))
    return self._update("refresh", params, state, shares)

  def __repr__(self) -> str:
    """Prints the call that made it."""
    return call_repr(self)

  def _check_paths(self, tree: Any) -> None:
    """Raises a ValueError unless selected leaves can be told by their paths."""
    selected = self.where.paths(tree)
    if len(set(selected)) < len(selected):
      raise ValueError(
        "Two leaves print as the same path, so their scales cannot be told"
        f" apart: {', '.join(selected)}. Rename one of them."
      )
    check_patterns(self.stacked, selected)
    check_targets(self._target, selected)

  @property
  def _target(self) -> Any:
    """The sparsity that the method is asked for, None if it is not."""
    return getattr(self.method, "sparsity", None)

  def _method(self, path: str, share: Any = None) -> Ternarizer:
    """Returns the method of one layer, with a target of its own.

    Args:
      path: of the leaf.
      share: its part of a target across layers; not given where the method
        does not look at its target.
    """
    if isinstance(self._target, AcrossLayers):
      own = 0.0 if share is None else share
    else:
      own = target_of(self._target, path)
    method: Any = self.method
    return (
      method
      if own is self._target
      else dataclasses.replace(method, sparsity=own)
    )

  def _shares(
    self, latent: Any, count: jax.Array, tolerance: jax.Array | float = 0.0
  ) -> dict[str, jax.Array]:
    """Divides a target across layers: {path: share of zeros of each layer}."""
    if not isinstance(self._target, AcrossLayers):
      return {}
    leaves: dict[str, Any] = {}
    self._map(leaves.__setitem__, latent)
    threshold = magnitude_threshold(
      leaves.values(), at(self._target.sparsity, count), tolerance=tolerance
    )

    def share(path: str, w: Any) -> jax.Array:
      axes = tuple(range(matches_any(self.stacked, path), w.ndim))
      under = jnp.abs(w.astype(jnp.float32)) <= threshold
      return jnp.mean(under, axes, jnp.float32)

    return {path: share(path, w) for path, w in leaves.items()}

  def _due_shares(self, latent: Any, count: jax.Array) -> dict[str, jax.Array]:
    """Returns the shares of a step, zeros if nobody looks at them."""
    method: Any = self.method
    due, tolerance = look_at(method.every, self._target.sparsity, count)

    def divide() -> dict[str, jax.Array]:
      return self._shares(latent, count, tolerance)

    def zeros() -> dict[str, jax.Array]:
      return jax.tree.map(jnp.zeros_like, jax.eval_shape(divide))

    return jax.lax.cond(due, divide, zeros)

  def _invert(
    self, path: str, ternary: Ternary, count: jax.Array
  ) -> tuple[Any, Any, Any]:
    """Returns latents, scales and state of a leaf."""
    w = ternary.dequantize()
    check_weights(path, w)
    if concrete(w) and jnp.any(jnp.sign(w).astype(jnp.int8) != ternary.codes):
      raise ValueError(
        f"{path}: magnitudes must be positive where weights have them, got"
        f" {jnp.min(ternary.w_p):.6g} and {jnp.min(ternary.w_n):.6g} at the"
        " least: such weights can be deployed, but not trained."
      )
    fit = self._fit(path, ternary)
    axes = tuple(range(matches_any(self.stacked, path), w.ndim))
    shares = {path: jnp.mean(ternary.codes == 0, axes, jnp.float32)}

    def one(layer: Ternary) -> tuple[Any, Any, Any]:
      method = self._method(path, jnp.mean(layer.codes == 0))
      try:
        if self.group_size is None:
          return method.invert(layer, count)
        return _invert_groups(method, path, self.group_size, layer, count)
      except ValueError as error:
        raise ValueError(f"{path}: {error}") from error

    if matches_any(self.stacked, path):
      # A loop and no vmap, as methods look at the values.
      layers = [
        one(jax.tree.map(lambda x: x[i], fit))  # noqa: B023
        for i in range(w.shape[0])
      ]
      latent, scales, state = jax.tree.map(lambda *x: jnp.stack(x), *layers)
    else:
      latent, scales, state = one(fit)
    fresh = self._lift(path, "refresh", shares)(latent, scales, state)
    codes = self._lift(path, "discretize")(latent, *fresh).codes
    if concrete(codes) and jnp.any(codes != ternary.codes):
      raise ValueError(
        f"{path}: {self.method!r} has no latents for these codes, of which"
        f" {jnp.sum(ternary.codes == 0)} of {codes.size} are zero: take other"
        " hyper-parameters, or another method."
      )
    return latent, scales, state

  def _fit(self, path: str, ternary: Ternary) -> Ternary:
    """Gives the scales the shape in which the method makes them."""

    def blank(w: jax.Array) -> Ternary:
      latent, (scales, state) = (
        self._lift(path, name)(w) for name in ("latent", "init")
      )
      return self._lift(path, "discretize")(latent, scales, state)

    made = jax.eval_shape(blank, _shape(ternary)).w_p.shape
    ones = (1,) * (len(ternary.shape) - len(made)) if made else ()

    def fit(scale: jax.Array) -> jax.Array:
      if scale.size == 1:
        scale = scale.reshape(())
      try:
        return jnp.broadcast_to(scale, made + ones).reshape(made)
      except ValueError as error:
        raise ValueError(
          f"{path}: scales of shape {scale.shape} do not fit those of {self!r},"
          f" which are of shape {made + ones}: set channel_axis, group_size and"
          " stacked as in the training."
        ) from error

    return Ternary(ternary.codes, fit(ternary.w_p), fit(ternary.w_n))

  def _map(self, fn: Callable[[str, Any], Any], tree: Any) -> Any:
    """Maps fn(path, leaf) over the selected leaves of a tree."""

    def visit(path: Any, leaf: Any) -> Any:
      printed = path_str(path)
      return fn(printed, leaf) if self.where.selects(printed, leaf) else leaf

    return jax.tree_util.tree_map_with_path(visit, tree)

  def _update(
    self, name: str, params: TernParams, state: dict[str, Any], shares: Any
  ) -> tuple[TernParams, dict[str, Any]]:
    """Applies a method's function from (scales, state) to (scales, state)."""
    scales, states = {}, {}
    fn = self._with(params, state, name, shares)

    def visit(path: str, w: Any) -> None:
      scales[path], states[path] = fn(path, w)

    self._map(visit, params.latent)
    return params.replace(scales=scales), states

  def _with(
    self,
    params: TernParams,
    state: dict[str, Any],
    name: str,
    shares: dict[str, Any] | None = None,
  ) -> Callable[[str, Any], Any]:
    """Gives a method's function the scales and state of a path."""
    _check_params(params)
    return lambda path, w: self._lift(path, name, shares)(
      w, params.scales[path], state[path]
    )

  def _lift(
    self, path: str, name: str, shares: dict[str, Any] | None = None
  ) -> Callable[..., Any]:
    """Maps a method's function over the layers of a stacked leaf."""

    def fn(share: Any, *args: Any) -> Any:
      method = self._method(path, share)
      if self.group_size is None:
        return getattr(method, name)(*args)
      return _in_groups(method, name, path, self.group_size, *args)

    share = (shares or {}).get(path)
    is_stack = matches_any(self.stacked, path)
    return functools.partial(jax.vmap(fn) if is_stack else fn, share)


def _count(state: dict[str, Any]) -> jax.Array:
  """Returns the step at which the targets of a state are."""
  counts = (jnp.ravel(x["count"]) for x in state.values() if "count" in x)
  return next(counts, jnp.zeros(1, jnp.int32))[0]


def _check_params(params: Any) -> None:
  if not isinstance(params, TernParams):
    raise TypeError(
      f"ParamTransform got params of type {type(params).__name__}, but it"
      " needs the TernParams that init returned: params, state ="
      " tern.init(tree)."
    )


def _in_groups(
  method: Any, name: str, path: str, g: int, w: Any, *args: Any
) -> Any:
  """Applies a method's function to one layer, with groups as its channels."""
  grouped, axis, view = _grouped(method, path, g, w.shape)
  out = getattr(grouped, name)(w.reshape(view), *args)
  if isinstance(out, Ternary):
    w_p, w_n = (
      scale.squeeze(axis + 1) if scale.ndim else scale
      for scale in (out.w_p, out.w_n)
    )
    return Ternary(out.codes.reshape(w.shape), w_p, w_n)
  return out.reshape(w.shape) if isinstance(out, jax.Array) else out


def _invert_groups(
  method: Any, path: str, g: int, ternary: Ternary, count: jax.Array
) -> tuple[Any, Any, Any]:
  """Inverts one layer, with groups as its channels."""
  grouped, axis, view = _grouped(method, path, g, ternary.shape)
  w_p, w_n = (
    jnp.expand_dims(scale, axis + 1) if scale.ndim else scale
    for scale in (ternary.w_p, ternary.w_n)
  )
  viewed = Ternary(ternary.codes.reshape(view), w_p, w_n)
  w, scales, state = grouped.invert(viewed, count)
  return w.reshape(ternary.shape), scales, state


def _grouped(
  method: Any, path: str, g: int, shape: tuple[int, ...]
) -> tuple[Any, int, tuple[int, ...]]:
  """Returns the method of a layer's groups, their axis, and their view."""
  axis = _input_axis(method, path, g, shape)
  # The axis is split in place, not moved, and so keeps its sharding.
  view = (*shape[:axis], shape[axis] // g, g, *shape[axis + 1 :])
  groups = tuple(i for i in range(len(view)) if i != axis + 1)
  return dataclasses.replace(method, channel_axis=groups), axis, view


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


def _is_ternary(node: Any) -> bool:
  return isinstance(node, Ternary)


def _shape(leaf: Any) -> Any:
  """Returns the shape and dtype of the dense weights that a leaf stands for."""
  if _is_ternary(leaf):
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
  return leaf
