"""ParamTransform: a method and a predicate, lifted to a parameter tree."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from tern_jax.core.axes import check_heads
from tern_jax.core.checks import (
  call_repr,
  check_range,
  check_weights,
)
from tern_jax.core.containers import TernParams
from tern_jax.core.method import Ternarizer
from tern_jax.core.names import found
from tern_jax.core.paths import (
  as_patterns,
  check_patterns,
  matches_any,
  path_str,
)
from tern_jax.core.select import selector
from tern_jax.core.types import Array, Count, KeyPath, PyTree, State
from tern_jax.targets.schedules import check_targets
from tern_jax.trees.finalize import check_finite, finalize
from tern_jax.trees.invert import dense_shape, invert, is_ternary
from tern_jax.trees.layers import Layers, OfLeaves
from tern_jax.trees.start import checked_start


@dataclasses.dataclass(frozen=True, repr=False)
class ParamTransform:
  """A ternarizer for the selected leaves of any parameter tree.

  Works on Linen and Haiku dicts, NNX states and Equinox modules alike. The
  state is a dict of its own, `{path: {name: array}}`, to be carried beside
  the parameters; it is not trained.

  Args:
    method: how one weight array is made ternary.
    where: which leaves are: `kernels(...)`; a function of (path, leaf) that
      returns a bool; a tree of bools of the user's parameters; None for
      `kernels()`.
    stacked: patterns of leaves whose first axis enumerates layers, as made by
      `nn.scan`: each layer is then ternarized on its own.
    group_size: None, or g for one scale for each g consecutive weights along
      the input axis of an output channel. It divides a channel of a method
      with `channel_axis=-1`, a leaf [..., in, out] (Flax, Haiku), or
      `channel_axis=0`, a leaf [out, in, ...] (Equinox). The method sees the
      view [..., in / g, g, out] or [out, in / g, g, ...], and what it trains
      has ones beside the groups there; a `Ternary` has scales [..., in / g,
      out] or [out, in / g, ...]. A sparsity is still that of the whole leaf.

  A method's `channel_axis=-1` is right for a whole Flax or Keras transformer.
  A layer of three axes is taken for attention if its name, before `kernel`, is
  query, key or value (or q, k, v, qkv, kv), maybe with _proj, _projection or
  _dense: [in, heads, head_dim] has one scale for each pair of the last two, and
  `group_size` divides the inputs. If it is out, output, attention_output or o,
  [heads, head_dim, out] has one scale for each output, and the inputs that
  `group_size` divides are heads times head_dim: g is a divisor of head_dim, or
  several whole heads. All other layers are [..., in, out]. A tuple, such as
  `channel_axis=(-2, -1)`, is taken as it is, in every leaf, and must
  name no input of attention.

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
  where: Any = None
  stacked: tuple[str, ...] = ()
  group_size: int | None = None

  def __post_init__(self):
    check_range("group_size", self.group_size, 1, float("inf"), "try 64")
    object.__setattr__(self, "where", selector(self.where))
    stacked = as_patterns(self.stacked, "stacked")
    object.__setattr__(self, "stacked", stacked)

  def init(self, tree: PyTree) -> tuple[TernParams, State]:
    """Makes the trainable parameters and the state from initial weights.

    Args:
      tree: the user's parameters, of any structure, random or pretrained.

    Returns:
      (TernParams, state): `latent` has the structure of tree.

    Raises:
      ValueError: nothing is selected, a pattern matches nothing, two leaves
        print as the same path, a selected weight is NaN or infinite, or so
        large that a scale is, or a selected leaf cannot be divided into groups.
      TypeError: a selected leaf is not floating-point.
    """
    self._check_paths(tree)

    def latent_of(path: str, w: Array) -> Array:
      check_weights(path, w)
      return self.layers.leaf(path)(lambda method, w: method.latent(w), w)

    latent = self.map(latent_of, tree)
    scales, state = self.layers.start(
      self.selected(latent), self.selected(tree)
    )
    return checked_start(self, tree, TernParams(latent, scales), state)

  def from_ternary(
    self, tree: PyTree, step: Count = 0
  ) -> tuple[TernParams, State]:
    """Makes parameters and state that `discretize` turns into a given tree.

    The inverse of `discretize`, for `from_packed`; see there.

    Args:
      tree: the user's parameters with a `Ternary` at each selected leaf, and
        nowhere else.
      step: number of the step at which the method's schedules stand.

    Returns:
      (TernParams, state), as of `init`; latents have the dtype of the scales.
    """
    dense = jax.tree.map(dense_shape, tree, is_leaf=is_ternary)
    self._check_paths(dense)
    chosen = self.where.chosen(dense)
    count = jnp.asarray(step, jnp.int32)
    scales, state = {}, {}

    def start(path: KeyPath, leaf: PyTree) -> PyTree:
      printed = path_str(path)
      kinds = "dense", "ternary"
      selected = printed in chosen
      if selected != is_ternary(leaf):
        raise ValueError(
          f"{printed} is {kinds[not selected]}, but {kinds[selected]} by"
          f" {self.where!r}: select exactly the leaves that are ternary."
        )
      if not is_ternary(leaf):
        return leaf
      made = invert(self.layers.leaf(printed), leaf, count, self)
      w, scales[printed], state[printed] = made
      return w

    latent = jax.tree_util.tree_map_with_path(start, tree, is_leaf=is_ternary)
    return TernParams(latent=latent, scales=scales), state

  def __call__(self, params: TernParams, state: State) -> PyTree:
    """Returns the effective weights: the tree that the model is applied to.

    Differentiable in params. Leaves that are not selected pass unchanged.
    """
    _check_params(params)
    leaves = self.selected(params.latent)
    made = self.layers.weights(leaves, params.scales, state)
    return self.replaced(params.latent, made)

  def discretize(self, params: TernParams, state: State) -> PyTree:
    """Returns the user's tree with a `Ternary` at each selected leaf.

    `finalize` also meets the target.

    Raises:
      ValueError: a leaf holds NaN or infinity; traced ones pass.
    """
    _check_params(params)
    check_finite(params)
    leaves = self.selected(params.latent)
    made = self.layers.discretize(leaves, params.scales, state)
    return self.replaced(params.latent, made)

  def after_step(
    self, params: TernParams, state: State
  ) -> tuple[TernParams, State]:
    """Returns (params, state) for the next step; call it after each update."""
    scales, state = self._updated(Layers.after_step, params, state)
    return params.replace(scales=scales), state

  def refresh(
    self, params: TernParams, state: State
  ) -> tuple[TernParams, State]:
    """Returns (params, state) that meet a target exactly, to go on training.

    Call it after the latents were replaced, by their moving averages for
    example. `finalize` does it by itself.
    """
    scales, state = self._updated(Layers.refresh, params, state)
    return params.replace(scales=scales), state

  def finalize(
    self, trained: PyTree, rest: PyTree = None, *, early: bool = False
  ) -> PyTree:
    """Returns the ternary weights of a finished training, to be packed.

    Meets the target exactly and discretizes, `discretize(*refresh(...))`, after
    a look at what it is given. Under `jax.vmap` and `jax.jit` it cannot look.

    Args:
      trained: the `TernParams` that were trained; or the state of an optimizer
        made by `tern_jax.wrap`, wherever it is in: a chain, a train state, an
        `nnx.Optimizer`. With `ema`, the averages are what is taken.
      rest: with `TernParams` the state beside them. With an optimizer's state
        the script's parameters, needed only if a mask hides some of them from
        the optimizer.
      early: whether a target may be met before its schedule has got there: at
        the end of a `ramp`, then, or at where another schedule is.

    Returns:
      The user's tree with a `Ternary` at each selected leaf; of the dtypes of
      the script.

    Raises:
      ValueError: a leaf holds NaN or infinity; the schedule of the sparsity has
        not reached its end; latents of a soft method are not near their codes.
      TypeError: no `TernParams`, and no state made by `tern_jax.wrap`.

    >>> import jax.numpy as jnp, tern_jax
    >>> tern = ParamTransform(tern_jax.TWN(sparsity=0.5))
    >>> params, state = tern.init({"kernel": jnp.array([[.1, -.2], [.3, -.4]])})
    >>> tern.finalize(params, state)["kernel"].codes.tolist()
    [[0, 0], [1, -1]]
    """
    return finalize(self, trained, rest, early)

  def __repr__(self) -> str:
    """Prints the call that made it."""
    return call_repr(self)

  def _check_paths(self, tree: PyTree) -> None:
    """Raises a ValueError unless selected leaves can be told by their paths."""
    selected = self.where.paths(tree)
    if len(set(selected)) < len(selected):
      raise ValueError(
        "Two leaves print as the same path, so their scales cannot be told"
        f" apart: {', '.join(selected)}. Rename one of them."
      )
    # A pattern of stacked layers may be one of their norms, which stay float.
    leaves = found(tree)
    check_patterns(self.stacked, [x.path for x in leaves])
    check_heads(
      {x.path: self._layer_shape(x.path, x.leaf) for x in leaves},
      *(selected, self.method.channel_axis),
    )
    check_targets(self.method.sparsity, selected)

  def _layer_shape(self, path: str, leaf: Any) -> tuple[int, ...]:
    return leaf.shape[matches_any(self.stacked, path) :]

  def selected(self, tree: PyTree) -> dict[str, Any]:
    """Returns the selected leaves of a tree by their paths."""
    leaves: dict[str, Any] = {}
    self.map(leaves.__setitem__, tree)
    return leaves

  def replaced(self, tree: PyTree, made: dict[str, Any]) -> PyTree:
    """Returns the tree with others in place of its selected leaves."""
    return jax.tree_util.tree_map_with_path(
      lambda path, leaf: made.get(path_str(path), leaf), tree
    )

  def map(self, fn: Callable[[str, Any], object], tree: PyTree) -> PyTree:
    """Maps fn(path, leaf) over the selected leaves of a tree."""
    chosen = self.where.chosen(tree)

    def visit(path: KeyPath, leaf: PyTree) -> object:
      printed = path_str(path)
      return fn(printed, leaf) if printed in chosen else leaf

    return jax.tree_util.tree_map_with_path(visit, tree)

  @property
  def layers(self) -> Layers:
    """What is done to leaves by path."""
    return Layers(self.method, self.stacked, self.group_size)

  def _updated(
    self, fn: OfLeaves, params: TernParams, state: State
  ) -> tuple[State, State]:
    """Returns (scales, state) that a function of layers makes."""
    _check_params(params)
    leaves = self.selected(params.latent)
    return self.layers.run(fn, leaves, params.scales, state)


def _check_params(params: object) -> None:
  if not isinstance(params, TernParams):
    raise TypeError(
      f"ParamTransform got params of type {type(params).__name__}, but it"
      " needs the TernParams that init returned: params, state ="
      " tern.init(tree)."
    )
