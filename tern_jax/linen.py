"""Flax Linen: apply a model with ternary weights.

What was saved is what `model.apply` takes, without this module:

  params = tern_jax.unpack(tern_jax.load_packed(path))
  model.apply({"params": params}, x)

It has no boxes; `nn.meta.replace_boxed(boxed, params)` puts it into those of a
model with partitioned parameters.
"""

from collections.abc import Callable
from typing import Any

from flax import linen as nn

from tern_jax.core.types import PyTree
from tern_jax.trees.transform import ParamTransform


def init(
  tern: ParamTransform, variables: dict[str, PyTree]
) -> dict[str, PyTree]:
  """Makes a model's variables ternary.

  Args:
    tern: method and predicate.
    variables: what `model.init` returned, "params" among the collections.

  Returns:
    The variables with `TernParams` at "params" and the state at "tern".
  """
  params, state = tern.init(variables["params"])
  return {**variables, "params": params, "tern": state}


def apply_fn(model: nn.Module, tern: ParamTransform) -> Callable[..., Any]:
  """Makes an apply function that ternarizes on the way, to replace the model's.

  Args:
    model: Linen module.
    tern: method and predicate.

  Returns:
    `apply(variables, *args, **kwargs)`, as `model.apply`, for the variables
    that `init` returned.

  >>> import jax, jax.numpy as jnp, tern_jax
  >>> model, x = nn.Dense(4), jnp.ones((1, 8))
  >>> tern = tern_jax.ParamTransform(tern_jax.TWN(), tern_jax.kernels())
  >>> variables = init(tern, model.init(jax.random.key(0), x))
  >>> apply_fn(model, tern)(variables, x).shape
  (1, 4)
  """

  def apply(variables: dict[str, PyTree], *args: Any, **kwargs: Any) -> Any:
    rest = {k: v for k, v in variables.items() if k not in ("params", "tern")}
    weights = tern(variables["params"], variables["tern"])
    return model.apply({"params": weights, **rest}, *args, **kwargs)

  return apply
