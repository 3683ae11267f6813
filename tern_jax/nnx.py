"""Flax NNX: split a model into ternary parameters and the rest, and merge.

What was saved goes back into any model of the same structure by Flax alone:

  state = nnx.state(model, nnx.Param)
  nnx.replace_by_pure_dict(state, tern_jax.unpack(tern_jax.load_packed(path)))
  nnx.update(model, state)
"""

from typing import Any

from flax import nnx

from tern_jax.core.containers import TernParams
from tern_jax.core.types import PyTree
from tern_jax.trees.transform import ParamTransform


def split(
  tern: ParamTransform, model: nnx.Module
) -> tuple[nnx.GraphDef, TernParams, dict[str, PyTree], Any]:
  """Splits a model for training with ternary weights.

  Args:
    tern: method and predicate.
    model: NNX module; it is not changed.

  Returns:
    (graphdef, params, state, rest): `TernParams` over the model's `nnx.Param`
    variables, the state of the ternarizer, and all other variables, batch
    statistics among them.

  >>> import jax.numpy as jnp, tern_jax
  >>> model = nnx.Linear(8, 4, rngs=nnx.Rngs(0))
  >>> tern = tern_jax.ParamTransform(tern_jax.TWN(), tern_jax.kernels())
  >>> graphdef, params, state, rest = split(tern, model)
  >>> ternary = merge(tern, graphdef, params, state, rest)
  >>> ternary(jnp.ones((1, 8))).shape
  (1, 4)
  """
  graphdef, tree, rest = nnx.split(model, nnx.Param, ...)
  params, state = tern.init(tree)
  return graphdef, params, state, rest


def merge(
  tern: ParamTransform,
  graphdef: nnx.GraphDef,
  params: TernParams,
  state: dict[str, PyTree],
  rest: PyTree,
) -> Any:
  """Merges what `split` returned into a model with ternary weights.

  Args:
    tern: as given to `split`.
    graphdef: as returned by `split`.
    params: trained parameters; gradients flow to them through the model.
    state: state of the ternarizer.
    rest: all other variables.

  Returns:
    A new module, safe to make inside `jax.grad` and `jax.jit`; read its batch
    statistics after the forward with `nnx.state(model, nnx.BatchStat)`.
  """
  # Copied variables belong to the trace in which they are made; without it
  # batch statistics could not be written inside a plain jax.grad.
  return nnx.merge(graphdef, tern(params, state), rest, copy=True)
