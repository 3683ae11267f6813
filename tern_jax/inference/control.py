"""Follows packed weights into programs within a program: loops, branches."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.extend.core as jax_core

from tern_jax.core.types import Array
from tern_jax.inference.rewrite import (
  Jaxpr,
  Rule,
  Scope,
  Value,
  as_function,
  aval,
  variables,
)
from tern_jax.inference.views import View

Eqn = jax_core.JaxprEqn


def _call(eqn: Eqn, inputs: list, scope: Scope) -> list[Value]:
  """Evaluates a jitted function here; what it constrains stays constrained."""
  body = eqn.params["jaxpr" if "jaxpr" in eqn.params else "call_jaxpr"]
  given = eqn.params.get("in_shardings") or [None] * len(inputs)
  inputs = list(map(_constrained, inputs, given))
  outputs = scope.evaluate(body, inputs)
  given = eqn.params.get("out_shardings") or [None] * len(outputs)
  return list(map(_constrained, outputs, given))


def _constrained(x: Value, sharding: Any) -> Value:
  if isinstance(x, View) or not isinstance(sharding, jax.sharding.Sharding):
    return x
  return jax.lax.with_sharding_constraint(x, sharding)


def _checkpoint(eqn: Eqn, inputs: list, scope: Scope) -> list[Value]:
  def body(*inputs: Value) -> list[Array]:
    return scope.arrays(eqn.params["jaxpr"], inputs, "an output of checkpoint")

  policy = eqn.params["policy"]
  prevent_cse = eqn.params["prevent_cse"]
  remat = jax.checkpoint(body, prevent_cse=prevent_cse, policy=policy)
  return remat(*inputs)


def _custom_jvp(eqn: Eqn, inputs: list, scope: Scope) -> list[Value]:
  """Evaluates the function; its own rule differentiates it, unpacked."""
  call, original = _custom(eqn, scope)
  call = jax.custom_jvp(call)

  @call.defjvp
  def derivative(primals: tuple, tangents: tuple) -> tuple[Any, Any]:
    return call(*primals), jax.jvp(original, primals, tangents)[1]

  return call(*inputs)


def _custom_vjp(eqn: Eqn, inputs: list, scope: Scope) -> list[Value]:
  """Evaluates the function; its own rule differentiates it, unpacked."""
  call, original = _custom(eqn, scope)
  call = jax.custom_vjp(call)

  def forward(*inputs: Value) -> tuple[list[Array], tuple]:
    return call(*inputs), inputs

  def backward(inputs: tuple, gradient: list[Array]) -> tuple:
    return jax.vjp(original, *inputs)[1](gradient)

  call.defvjp(forward, backward)
  return call(*inputs)


def _custom(eqn: Eqn, scope: Scope) -> tuple[Callable, Callable]:
  body = eqn.params["call_jaxpr"]

  def call(*inputs: Value) -> list[Array]:
    return scope.arrays(body, inputs, f"an output of {eqn.primitive.name}")

  def original(*inputs: Value) -> list[Array]:
    dense = (x.dense() if isinstance(x, View) else x for x in inputs)
    values = dict(zip(eqn.invars, dense, strict=True))
    return as_function(body.jaxpr, eqn)(*(values[x] for x in variables(eqn)))

  return call, original


def _cond(eqn: Eqn, inputs: list, scope: Scope) -> list[Value]:
  def branch(index: int, body: Jaxpr) -> Callable[..., list[Array]]:
    within = scope.inside(index)
    return lambda *args: within.arrays(body, args, "an output of cond")

  index, *args = inputs
  if isinstance(index, View):
    index = scope.dense(index, "cond")
  bodies = eqn.params["branches"]
  branches = [branch(i, body) for i, body in enumerate(bodies)]
  return jax.lax.switch(index, branches, *args)


def _while(eqn: Eqn, inputs: list, scope: Scope) -> list[Value]:
  params = eqn.params
  cond, body = params["cond_jaxpr"], params["body_jaxpr"]
  split = params["cond_nconsts"]
  start = split + params["body_nconsts"]
  cond_consts, body_consts = inputs[:split], inputs[split:start]
  carry = _Carry(body, inputs[start:], len(body_consts), scope, "while")

  def proceeds(moving: Sequence[Array]) -> Array:
    args = [*cond_consts, *carry.all(moving)]
    return scope.inside(0).arrays(cond, args, "an output of while")[0]

  def step(moving: Sequence[Array]) -> list[Array]:
    args = [*body_consts, *carry.all(moving)]
    outputs = scope.inside(1).evaluate(body, args)
    return carry.moving(outputs)

  return carry.all(jax.lax.while_loop(proceeds, step, carry.start))


def _scan(eqn: Eqn, inputs: list, scope: Scope) -> list[Value]:
  params, body = eqn.params, eqn.params["jaxpr"]
  inner = body.jaxpr
  # What a step takes a slice of has an axis more outside.
  layered = [
    len(aval(x).shape) > len(aval(y).shape)
    for x, y in zip(eqn.invars, inner.invars, strict=True)
  ]
  outputs = zip(eqn.outvars, inner.outvars, strict=True)
  carried = sum(len(aval(x).shape) == len(aval(y).shape) for x, y in outputs)
  consts = len(inputs) - sum(layered) - carried
  first = consts + carried
  carry = _Carry(body, inputs[consts:first], consts, scope, "scan")
  xs = [
    x if isinstance(x, View) and x.is_stack else scope.dense(x, "scan")
    for x in inputs[first:]
  ]
  stacks = [x.stack() if isinstance(x, View) else x for x in xs]

  def step(moving: Sequence[Array], layers: list) -> tuple[list, list]:
    of_step = [
      x.layer(layer) if isinstance(x, View) else layer
      for x, layer in zip(xs, layers, strict=True)
    ]
    args = [*inputs[:consts], *carry.all(moving), *of_step]
    outputs = scope.evaluate(body, args)
    ys = [scope.dense(y, "an output of scan") for y in outputs[carried:]]
    return carry.moving(outputs[:carried]), ys

  end, ys = jax.lax.scan(
    step,
    carry.start,
    stacks,
    length=params["length"],
    reverse=params["reverse"],
    unroll=params["unroll"],
  )
  return [*carry.all(end), *ys]


class _Carry:
  """The carry of a loop, without the packed weights that it never changes."""

  def __init__(
    self, body: Any, start: list[Value], skip: int, scope: Scope, name: str
  ):
    inner = body.jaxpr
    pairs = zip(inner.invars[skip:], inner.outvars, strict=False)
    same = [x is y for x, y in pairs]
    self.fixed = [
      x if isinstance(x, View) and same[i] else None
      for i, x in enumerate(start)
    ]
    self.why = f"carried by {name}"
    self.scope = scope
    self.start = self.moving(start)

  def moving(self, values: Sequence[Value]) -> list[Array]:
    """Returns what of all values the loop carries."""
    pairs = zip(values, self.fixed, strict=True)
    return [self.scope.dense(x, self.why) for x, view in pairs if view is None]

  def all(self, moving: Sequence[Array]) -> list[Value]:
    """Returns all values, the inverse of `moving`."""
    arrays = iter(moving)
    return [next(arrays) if view is None else view for view in self.fixed]


#: By the name of the primitive.
RULES: dict[str, Rule] = {
  "checkpoint": _checkpoint,
  "closed_call": _call,
  "cond": _cond,
  "core_call": _call,
  "custom_jvp_call": _custom_jvp,
  "custom_vjp_call": _custom_vjp,
  "jit": _call,
  "pjit": _call,
  "remat2": _checkpoint,
  "scan": _scan,
  "while": _while,
}
