"""A method at work on the selected leaves of a tree, all by their paths."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from tern_jax.core.checks import concrete
from tern_jax.core.containers import Ternary
from tern_jax.core.method import Ternarizer
from tern_jax.core.paths import matches_any
from tern_jax.core.types import Array, Arrays, PyTree, State
from tern_jax.targets.schedules import AcrossLayers, target_of
from tern_jax.targets.shares import shares_at, shares_if_due
from tern_jax.trees.leaf import Leaf, aligned

#: A function of layers, and of leaves, scales and state by path.
OfLeaves = Callable[..., tuple[State, State]]


@dataclasses.dataclass(frozen=True)
class Layers:
  """What a `ParamTransform` does to dicts of leaves, without their tree.

  The arguments are those of `ParamTransform`. Leaves are latents by path; what
  is made of them is returned by path.
  """

  method: Ternarizer
  stacked: tuple[str, ...]
  group_size: int | None

  def run(
    self, fn: OfLeaves, leaves: Arrays, scales: State, state: State
  ) -> tuple[State, State]:
    """Calls `after_step` or `refresh` of these layers.

    Outside of a program it is compiled as one, once: conditionals and loops
    would be compiled anew at each call.
    """
    # In the order that dicts have in a program, which ties depend on.
    args = dict(sorted(leaves.items())), scales, state
    if all(map(concrete, jax.tree.leaves(args))) and self._is_static():
      return _compiled(fn, self, *args)
    return fn(self, *args)

  def leaf(self, path: str) -> Leaf:
    """Returns how the method is applied to a leaf, with a target of its own."""
    method = self.method
    own = target_of(method.sparsity, path)
    if own is not method.sparsity:
      method = method.replace(sparsity=own)
    is_stack = matches_any(self.stacked, path)
    return Leaf(path, method, is_stack, self.group_size)

  def start(self, leaves: Arrays, weights: Arrays) -> tuple[State, State]:
    """Returns scales and state for latents and the weights that they are of."""
    shares = self._shares(
      dict(sorted(leaves.items())), jnp.zeros((), jnp.int32)
    )
    made = {
      path: self.leaf(path)(
        lambda method, w: method.init(w), w, share=shares.get(path)
      )
      for path, w in weights.items()
    }
    return _apart(made)

  def weights(self, leaves: Arrays, scales: State, state: State) -> Arrays:
    """Returns the effective weights."""
    return {
      path: self.leaf(path)(
        lambda method, *args: method(*args), w, scales[path], state[path]
      )
      for path, w in leaves.items()
    }

  def discretize(
    self, leaves: Arrays, scales: State, state: State
  ) -> dict[str, Ternary]:
    """Returns the ternary weights."""
    return {
      path: aligned(
        self.leaf(path)(
          lambda method, *args: method.discretize(*args),
          *(w, scales[path], state[path]),
        )
      )
      for path, w in leaves.items()
    }

  def after_step(
    self, leaves: Arrays, scales: State, state: State
  ) -> tuple[State, State]:
    """Returns (scales, state) for the next step."""
    shares, target = {}, self.method.sparsity
    if isinstance(target, AcrossLayers):
      every, count = self.method.every, _count(state) + 1
      shares = shares_if_due(target, leaves, self.stacked, count, every)
    return self._update(
      lambda method, *args: method.after_step(*args),
      *(leaves, scales, state, shares),
    )

  def refresh(
    self, leaves: Arrays, scales: State, state: State
  ) -> tuple[State, State]:
    """Returns (scales, state) that meet a target exactly."""
    return self._update(
      lambda method, *args: method.refresh(*args),
      *(leaves, scales, state, self._shares(leaves, _count(state))),
    )

  def _update(
    self,
    fn: Callable[..., tuple[Arrays, Arrays]],
    leaves: Arrays,
    scales: State,
    state: State,
    shares: Arrays,
  ) -> tuple[State, State]:
    made = {
      path: self.leaf(path)(
        fn, w, scales[path], state[path], share=shares.get(path)
      )
      for path, w in leaves.items()
    }
    return _apart(made)

  def _shares(self, leaves: Arrays, count: Array) -> Arrays:
    """Returns the exact shares of a target across layers, {} of another."""
    target = self.method.sparsity
    if not isinstance(target, AcrossLayers):
      return {}
    return shares_at(target, leaves, self.stacked, count)

  def _is_static(self) -> bool:
    """Whether no hyper-parameter is an array, which cannot be hashed."""
    try:
      hash(self)
    except TypeError:
      return False
    return True


@functools.partial(jax.jit, static_argnums=(0, 1))
def _compiled(
  fn: OfLeaves, layers: Layers, *args: PyTree
) -> tuple[State, State]:
  return fn(layers, *args)


def _apart(made: dict[str, tuple[Arrays, Arrays]]) -> tuple[State, State]:
  """Returns a dict of pairs as a pair of dicts."""
  return {k: x for k, (x, _) in made.items()}, {
    k: x for k, (_, x) in made.items()
  }


def _count(state: State) -> Array:
  """Returns the step at which the targets of a state are."""
  counts = (jnp.ravel(x["count"]) for x in state.values() if "count" in x)
  return next(counts, jnp.zeros(1, jnp.int32))[0]
