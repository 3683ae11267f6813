"""ParamTransform: a method and a predicate, lifted to a parameter tree.

The only module that walks trees: methods see one array at a time.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from tern_jax.base import Ternarizer, Ternary, TernParams, call_repr, path_str
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

  def init(self, tree: Any) -> tuple[TernParams, dict[str, Any]]:
    """Makes the trainable parameters and the state from initial weights.

    Args:
      tree: the user's parameters, of any structure, random or pretrained.

    Returns:
      (TernParams, state): `latent` has the structure of tree.

    Raises:
      ValueError: nothing is selected, a pattern matches nothing, two leaves
        print as the same path, or a selected weight is NaN or infinite.
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
      scales[path], state[path] = self._lift(path, self.method.init)(w)
      return self._lift(path, self.method.latent)(w)

    latent = self._map(start, tree)
    return TernParams(latent=latent, scales=scales), state

  def __call__(self, params: TernParams, state: dict[str, Any]) -> Any:
    """Returns the effective weights: the tree that the model is applied to.

    Differentiable in params. Leaves that are not selected pass unchanged.
    """
    return self._map(self._with(params, state, self.method), params.latent)

  def discretize(self, params: TernParams, state: dict[str, Any]) -> Any:
    """Returns the user's tree with a `Ternary` at each selected leaf."""
    fn = self._with(params, state, self.method.discretize)
    return self._map(lambda path, w: _align(fn(path, w)), params.latent)

  def after_step(
    self, params: TernParams, state: dict[str, Any]
  ) -> tuple[TernParams, dict[str, Any]]:
    """Returns (params, state) for the next step; call it after each update."""
    return self._update(self.method.after_step, params, state)

  def refresh(
    self, params: TernParams, state: dict[str, Any]
  ) -> tuple[TernParams, dict[str, Any]]:
    """Returns (params, state) that meet a target exactly, to discretize.

    Call it once when training is over, or after the latents were replaced, by
    their moving averages for example.
    """
    return self._update(self.method.refresh, params, state)

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
    self,
    method_fn: Callable[..., Any],
    params: TernParams,
    state: dict[str, Any],
  ) -> tuple[TernParams, dict[str, Any]]:
    """Applies a method's function from (scales, state) to (scales, state)."""
    scales, states = {}, {}
    fn = self._with(params, state, method_fn)

    def visit(path: str, w: Any) -> Any:
      scales[path], states[path] = fn(path, w)
      return w

    self._map(visit, params.latent)
    return params.replace(scales=scales), states

  def _with(
    self, params: TernParams, state: dict[str, Any], fn: Callable[..., Any]
  ) -> Callable[[str, Any], Any]:
    """Gives fn(w, scales, state) of a method the scales and state of a path."""
    if not isinstance(params, TernParams):
      raise TypeError(
        f"ParamTransform got params of type {type(params).__name__}, but it"
        " needs the TernParams that init returned: params, state ="
        " tern.init(tree)."
      )
    return lambda path, w: self._lift(path, fn)(
      w, params.scales[path], state[path]
    )

  def _lift(self, path: str, fn: Callable[..., Any]) -> Callable[..., Any]:
    """Maps a method's function over the layers of a stacked leaf."""
    is_stack = matches_any(self.stacked, path)
    return jax.vmap(fn) if is_stack else fn


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
