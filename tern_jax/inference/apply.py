"""Any model, unchanged, with packed weights."""

import collections
import functools
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Generic, ParamSpec, TypeVar

import jax
import numpy as np

from tern_jax.core.containers import Ternary, TernParams
from tern_jax.core.paths import key_str, path_str
from tern_jax.core.types import KeyPath, PyTree
from tern_jax.inference.explain import Explanation, explanation
from tern_jax.inference.preparation import lay_out
from tern_jax.inference.prepared import ACTIVATIONS, Prepared
from tern_jax.inference.rewrite import Found, Scope
from tern_jax.inference.rules import RULES
from tern_jax.inference.views import Packed, view_of
from tern_jax.storage.packed import to_ternary

_P = ParamSpec("_P")
_R = TypeVar("_R")
_ARRAYS = (jax.Array, np.ndarray, np.generic, jax.ShapeDtypeStruct)


def apply_fn(fn: Callable[_P, _R]) -> "PackedFunction[_P, _R]":
  """Returns the same function, for packed weights.

  Any leaf of any argument may then be `PackedTernary` or `Prepared`: models of
  Flax, Equinox, Haiku or any other framework run as they are. The function is
  traced with dense weights of the same shapes, and its program rewritten:

  - products, also of attention and of stacks of layers under `lax.scan`, read
    the packed weights, as `dot` does;
  - convolutions read a prepared kernel, with the native code for CPUs; without
    it, or if the kernel is not prepared, they multiply the patches of images by
    it where that is faster: where pixels are few. Those in groups are unpacked;
  - look-ups along the first axis, as of embeddings, unpack only the rows;
  - whatever else uses weights gets them unpacked. `explain` lists it.

  `prepare` lays the weights out for fast products, once, at load. The result is
  that of dense weights up to the order of sums, unless weights
  are prepared for int8 activations. It works under jit, vmap and grad.

  As under `jax.jit`, the function must be pure, and is compiled once for each
  set of shapes. Arguments that are no arrays are static, as they are with
  `equinox.filter_jit`: give numbers that change from call to call as arrays.

  Args:
    fn: pure function of arrays in any pytrees, such as `model.apply`.

  Raises:
    TypeError: when called with latents or unpacked ternary weights, or with an
      argument that is neither an array nor hashable.
    ValueError: when called without packed weights.

  >>> import jax.numpy as jnp
  >>> from tern_jax import Ternary, pack
  >>> def model(params, x):
  ...   return jax.nn.relu(x @ params["w"])
  >>> codes = jnp.array([[1, -1], [0, 1]], jnp.int8)
  >>> w = pack(Ternary(codes, jnp.array(2.0), jnp.array(0.5)))
  >>> params, x = {"w": w}, jnp.array([[1.0, 10.0]])
  >>> apply_fn(model)(params, x).tolist()
  [[2.0, 19.5]]
  >>> net = apply_fn(model)
  >>> net(net.prepare(params, x), x).tolist()
  [[2.0, 19.5]]
  >>> print(net.explain(params, x))
  weights  shape  used as         times
  w        2x2    packed product  1
  """
  return PackedFunction(fn)


class PackedFunction(Generic[_P, _R]):
  """What `apply_fn` returns."""

  def __init__(self, fn: Callable[_P, _R]):
    functools.update_wrapper(self, fn, updated=())
    self._fn: Callable[..., Any] = fn
    self._run = jax.jit(self._evaluate, static_argnums=0)

  def __call__(self, *args: _P.args, **kwargs: _P.kwargs) -> _R:
    """Returns fn of the arguments."""
    call, arrays = _Call.of(args, kwargs)
    return self._run(call, arrays)

  def explain(self, *args: Any, **kwargs: Any) -> Explanation:
    """Tells how the function uses each of the packed weights.

    Nothing is computed: arrays may be `jax.ShapeDtypeStruct`.

    Args:
      *args: those of the function.
      **kwargs: likewise.

    Returns:
      The uses, which print as a table.
    """
    call, arrays = _Call.of(args, kwargs)
    shapes = {
      name: x.shape
      for name, x in zip(call.names(arrays), arrays, strict=True)
      if isinstance(x, Packed)
    }
    return explanation(shapes, self._uses(call, arrays))

  def prepare(
    self,
    params: PyTree,
    *args: Any,
    activations: str = "float32",
    **kwargs: Any,
  ) -> PyTree:
    """Lays weights out for what the function does with them, at load.

    As `tern_jax.inference.prepare`, which goes by the names and shapes of
    weights; this goes by the products that the function computes. So it also
    prepares kernels [out, in], as Equinox has them, and those of convolutions
    where that makes them faster at the shapes given. What is looked up by rows,
    or multiplied in several ways, stays packed.

    Args:
      params: first argument of the function, with packed weights.
      *args: the others; arrays may be `jax.ShapeDtypeStruct`.
      activations: "float32" or "int8", as in `tern_jax.inference.prepare`.
      **kwargs: those of the function.

    Returns:
      The first argument with `Prepared` weights.

    Raises:
      ValueError: activations are unknown.
    """
    if activations not in ACTIVATIONS:
      raise ValueError(
        f"activations must be 'float32' or 'int8', got {activations!r}."
      )
    return self.laid_out((params, *args), kwargs, activations, None)[0]

  def laid_out(
    self,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    activations: str | None,
    native: bool | None,
  ) -> tuple[Any, ...]:
    """Lays the weights of all arguments out, as `prepare` those of the first.

    Args:
      args: of the function.
      kwargs: likewise.
      activations: as in `prepare`; None if what is prepared keeps its own, and
        all else gets "float32".
      native: as in `tern_jax.inference.preparation.lay_out`.

    Returns:
      The positional arguments.
    """
    call, arrays = _Call.of(args, kwargs)
    found = collections.defaultdict(list)
    for use in self._uses(call, arrays):
      found[use.name].append(use)
    arrays = [
      _prepared(x, found[name], activations, native)
      if isinstance(x, Packed)
      else x
      for x, name in zip(arrays, call.names(arrays), strict=True)
    ]
    return call.arguments(arrays)[0]

  def _uses(self, call: "_Call", arrays: list[Any]) -> set[Found]:
    scope = Scope(RULES, set())
    jax.eval_shape(lambda arrays: self._rewritten(call, arrays, scope), arrays)
    return scope.uses

  def _evaluate(self, call: "_Call", arrays: list[Any]) -> Any:
    return self._rewritten(call, arrays, Scope(RULES, set()))

  def _rewritten(self, call: "_Call", arrays: list[Any], scope: Scope) -> Any:
    def dense(*arrays: Any) -> Any:
      args, kwargs = call.arguments(arrays)
      return self._fn(*args, **kwargs)

    shapes = (
      jax.ShapeDtypeStruct(x.shape, x.dtype) if isinstance(x, Packed) else x
      for x in arrays
    )
    jaxpr, out = jax.make_jaxpr(dense, return_shape=True)(*shapes)
    values = [
      view_of(x, name) if isinstance(x, Packed) and x.size else _dense(x)
      for x, name in zip(arrays, call.names(arrays), strict=True)
    ]
    outputs = scope.arrays(jaxpr, values, "an output")
    return jax.tree.unflatten(jax.tree.structure(out), outputs)


class _Call:
  """Arguments without their arrays, hashable."""

  def __init__(
    self, treedef: Any, static: dict[int, Hashable], paths: list[KeyPath]
  ):
    self.treedef = treedef
    self.static = static
    self.paths = paths
    # 1, 1.0 and True are equal, but a program tells them apart; so are zeros.
    leaves = (
      (i, type(x), x, str(x) if isinstance(x, float) else "")
      for i, x in static.items()
    )
    self._key = treedef, tuple(leaves)

  @classmethod
  def of(cls, args: tuple, kwargs: dict[str, Any]) -> tuple["_Call", list[Any]]:
    """Returns the arguments of a call, and their arrays."""
    leaves, treedef = jax.tree_util.tree_flatten_with_path(
      (args, kwargs), is_leaf=_is_weights
    )
    static, arrays, paths = {}, [], []
    for i, (path, x) in enumerate(leaves):
      if isinstance(x, (*_ARRAYS, Packed)):
        arrays.append(x)
        paths.append(path)
      else:
        _check(path, x)
        static[i] = x
    if not any(isinstance(x, Packed) for x in arrays):
      raise ValueError(
        "apply_fn found no packed weights in the arguments: give it what"
        " tern_jax.pack, tern_jax.load_packed or tern_jax.inference.prepare"
        " returned, or call the function itself."
      )
    return cls(treedef, static, paths), arrays

  def names(self, arrays: Sequence[Any]) -> list[str]:
    """Returns the paths of the arrays as text."""
    pairs = zip(self.paths, arrays, strict=True)
    owners = {path[:2] for path, x in pairs if isinstance(x, Packed)}
    # Of weights in several arguments, the name says in which.
    skip = 2 if len(owners) == 1 else 1
    return [path_str(path[skip:]) or key_str(path[1]) for path in self.paths]

  def arguments(self, arrays: Sequence[Any]) -> tuple[tuple, dict[str, Any]]:
    """Returns (args, kwargs) with other arrays."""
    rest = iter(arrays)
    count = self.treedef.num_leaves
    leaves = (
      self.static[i] if i in self.static else next(rest) for i in range(count)
    )
    return jax.tree.unflatten(self.treedef, leaves)

  def __hash__(self) -> int:
    return hash(self._key)

  def __eq__(self, other: object) -> bool:
    return isinstance(other, _Call) and self._key == other._key


def _prepared(
  x: Packed, uses: Sequence[Found], activations: str | None, native: bool | None
) -> Packed:
  """Lays weights out if all of their products are of one kind."""
  sums = [use.sum for use in uses if use.sum]
  patches = any(sum.patches for sum in sums)
  if isinstance(x, Prepared):
    kept = activations in (None, x.activations)
    if kept and native is None:
      return x
    return lay_out(
      x.ternary(),
      x.inputs,
      activations or x.activations,
      lead=x.lead,
      native=native,
      patches=patches,
    )
  kinds = {(sum.inputs, sum.ndim) for sum in sums}
  if len(kinds) != 1 or any(use.how == "rows" for use in uses):
    return x
  ((inputs, ndim),) = kinds
  rows = [sum.rows for sum in sums]
  return lay_out(
    to_ternary(x),
    inputs,
    activations or "float32",
    # Not that of a batch of any size.
    max(rows) if all(isinstance(n, int) for n in rows) else None,
    lead=len(x.shape) - ndim,
    native=native,
    patches=patches,
  )


def _dense(x: Any) -> Any:
  return x.dequantize() if isinstance(x, Packed) else x


def _is_weights(x: object) -> bool:
  return isinstance(x, Packed | Ternary | TernParams)


def _check(path: tuple, x: object) -> None:
  """Raises if an argument is neither an array nor a static value."""
  if isinstance(x, TernParams):
    raise TypeError(
      "apply_fn got TernParams, which are latents: give it"
      " tern_jax.pack(tern.finalize(params, state))."
    )
  where = path_str(path[1:])
  if isinstance(x, Ternary):
    raise TypeError(
      f"apply_fn got a Ternary at {where}: call tern_jax.pack first."
    )
  try:
    hash(x)
  except TypeError:
    raise TypeError(
      f"the argument at {where} is a {type(x).__name__}, which is neither an"
      " array nor hashable: make it part of the function instead."
    ) from None
