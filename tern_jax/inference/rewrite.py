"""Evaluates a jaxpr of which some arguments are packed weights.

Operations that no rule knows, and those that a rule cannot do, get unpacked
weights: the result is that of the jaxpr whatever it holds.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax.extend.core as jax_core
import jax.numpy as jnp

from tern_jax.core.types import Array
from tern_jax.inference.views import View

Jaxpr = jax_core.Jaxpr | jax_core.ClosedJaxpr
#: An array or packed weights.
Value = Array | View


class Sum(NamedTuple):
  """A product by weights.

  Args:
    inputs: axes of a layer that it sums over.
    ndim: number of axes of a layer.
    rows: products with each output.
    patches: whether it is a convolution, which gathers its rows from images.
  """

  inputs: tuple[int, ...]
  ndim: int
  rows: int
  patches: bool = False


class Found(NamedTuple):
  """A use of weights in a program.

  Args:
    where: the equations around it.
    name: of the weights.
    how: they are used.
    sum: for which they could be laid out.
  """

  where: tuple[int, ...]
  name: str
  how: str
  sum: Sum | None


#: Returns what an equation returns, or None if it needs unpacked weights.
Rule = Callable[[jax_core.JaxprEqn, "list[Any]", "Scope"], "list[Value] | None"]


@dataclasses.dataclass(frozen=True)
class Scope:
  """A jaxpr within others, as rules see it.

  Args:
    rules: by the name of the primitive.
    uses: how weights are used, which grows as jaxprs are evaluated.
    where: the equations around this jaxpr. Those that are traced twice, such as
      the body of a loop, count once.
  """

  rules: Mapping[str, Rule]
  uses: set[Found]
  where: tuple[int, ...] = ()

  def note(self, view: View, how: str, sum: Sum | None = None) -> None:
    """Notes how weights are used."""
    self.uses.add(Found(self.where, view.name, how, sum))

  def dense(self, x: Value, why: str) -> Array:
    """Returns unpacked weights, and notes why; arrays as they are."""
    if not isinstance(x, View):
      return x
    self.note(x, f"dense: {why}")
    return x.dense()

  def inside(self, index: int) -> "Scope":
    """Returns the scope of a part of this one."""
    return dataclasses.replace(self, where=(*self.where, index))

  def evaluate(self, jaxpr: Jaxpr, args: Sequence[Value]) -> list[Value]:
    """Returns what a jaxpr returns; outputs may be packed weights."""
    consts: Sequence[Any] = ()
    if isinstance(jaxpr, jax_core.ClosedJaxpr):
      jaxpr, consts = jaxpr.jaxpr, jaxpr.consts
    values: dict[jax_core.Var, Value] = {}
    unpacked: dict[jax_core.Var, Array] = {}

    def read(x: Any) -> Any:
      if isinstance(x, jax_core.Literal):
        return jnp.asarray(x.val, aval(x).dtype)
      return values[x]

    def read_dense(x: Any, why: str, scope: "Scope") -> Array:
      value = read(x)
      if not isinstance(value, View):
        return value
      scope.note(value, f"dense: {why}")
      if x not in unpacked:
        unpacked[x] = value.dense()
      return unpacked[x]

    values.update(zip(jaxpr.constvars, consts, strict=True))
    values.update(zip(jaxpr.invars, args, strict=True))
    for index, eqn in enumerate(jaxpr.eqns):
      scope, name = self.inside(index), eqn.primitive.name
      outputs = None
      packed = any(isinstance(values.get(x), View) for x in variables(eqn))
      if packed and name in self.rules:
        inputs = [read(x) for x in eqn.invars]
        outputs = self.rules[name](eqn, inputs, scope)
      if outputs is None:
        inputs = [read_dense(x, name, scope) for x in variables(eqn)]
        outputs = as_function(jaxpr, eqn)(*inputs)
      values.update(zip(eqn.outvars, outputs, strict=True))
    return [read(x) for x in jaxpr.outvars]

  def arrays(
    self, jaxpr: Jaxpr, args: Sequence[Value], why: str
  ) -> list[Array]:
    """Returns what a jaxpr returns, unpacked."""
    return [self.dense(x, why) for x in self.evaluate(jaxpr, args)]


def aval(x: Any) -> Any:
  """Returns what is known of a variable or literal: its shape and dtype."""
  return x.aval


def variables(eqn: jax_core.JaxprEqn) -> list[jax_core.Var]:
  """Returns the inputs of an equation that are no literals, each once."""
  inputs = (x for x in eqn.invars if not isinstance(x, jax_core.Literal))
  return list(dict.fromkeys(inputs))


def as_function(
  jaxpr: jax_core.Jaxpr, eqn: jax_core.JaxprEqn
) -> Callable[..., list[Array]]:
  """Returns an equation of a jaxpr as a function of its variables.

  JAX evaluates it, with the derivatives and contexts that belong to it.
  """
  one = jaxpr.replace(
    constvars=[],
    invars=variables(eqn),
    outvars=eqn.outvars,
    eqns=[eqn],
    effects=eqn.effects,
  )
  return jax_core.jaxpr_as_fun(jax_core.ClosedJaxpr(one, ()))
