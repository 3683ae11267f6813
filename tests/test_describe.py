"""The text of what a run is made of: one for the same, others for others."""

import dataclasses
import enum
import functools
import inspect
import itertools
import os
import subprocess
import sys
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

import tern_jax
from tern_jax import SCA, TTQ, TWN, ParamTransform
from tern_jax.storage.describe import (
  changes,
  difference,
  is_lasting,
  text_of,
)

#: Transformations that optax makes of one learning rate.
SIMPLE = [
  "adabelief",
  "adadelta",
  "adafactor",
  "adagrad",
  "adam",
  "adamax",
  "adamaxw",
  "adamw",
  "adan",
  "amsgrad",
  "fromage",
  "lamb",
  "lars",
  "lbfgs",
  "lion",
  "nadam",
  "nadamw",
  "noisy_sgd",
  "novograd",
  "optimistic_adam_v2",
  "optimistic_gradient_descent",
  "polyak_sgd",
  "radam",
  "rmsprop",
  "rprop",
  "sgd",
  "sign_sgd",
  "sm3",
  "yogi",
]


def made(name, **given):
  """Makes an optimizer of optax; a name that this optax lacks is skipped."""
  factory = getattr(optax, name, None)
  if factory is None:
    pytest.skip(f"this optax has no {name}")
  if name == "noisy_sgd":
    given |= {"key": jax.random.key(0)}
  return factory(**{rate_of(factory): 0.1} | given)


def rate_of(factory):
  """Returns what a factory calls its first argument."""
  return next(iter(inspect.signature(factory).parameters))


@pytest.mark.parametrize("name", SIMPLE)
def test_an_optimizer_made_twice_has_one_text(name):
  text = text_of(made(name))
  assert text == text_of(made(name))
  assert is_lasting(text)
  assert len(text) < 3000


def test_optimizers_have_texts_of_their_own():
  known = [name for name in SIMPLE if hasattr(optax, name)]
  texts = {name: text_of(made(name)) for name in known}
  same = [
    {a, b} for a, b in itertools.combinations(known, 2) if texts[a] == texts[b]
  ]
  assert same == []


def arguments(name):
  """Yields arguments of an optimizer, changed one by one."""
  factory = getattr(optax, name)
  for key, x in inspect.signature(factory).parameters.items():
    default = 0.1 if key == rate_of(factory) else x.default
    if isinstance(default, bool):
      yield key, not default
    elif isinstance(default, int | float):
      yield key, 2 * default + 1


# They matter only where there is a momentum.
UNUSED = {("rmsprop", "nesterov"), ("sgd", "nesterov")}


@pytest.mark.parametrize(
  "name", ["adam", "adamw", "lion", "rmsprop", "sgd", "lamb", "adafactor"]
)
def test_each_number_of_an_optimizer_is_told(name):
  text, missed = text_of(made(name)), []
  for key, value in arguments(name):
    if text_of(made(name, **{key: value})) == text:
      missed.append((name, key))
  assert {*missed} <= UNUSED


def schedules():
  return {
    "cosine": optax.cosine_decay_schedule(0.1, 10),
    "cosine twice": optax.cosine_decay_schedule(0.1, 20),
    "alpha": optax.cosine_decay_schedule(0.1, 10, alpha=0.5),
    "constant": optax.constant_schedule(0.1),
    "linear": optax.linear_schedule(0.1, 0.0, 10),
    "polynomial": optax.polynomial_schedule(0.1, 0.0, 2, 10),
    "exponential": optax.exponential_decay(0.1, 10, 0.5),
    "steps": optax.piecewise_constant_schedule(0.1, {5: 0.5}),
    "other steps": optax.piecewise_constant_schedule(0.1, {6: 0.5}),
    "warmup": optax.warmup_cosine_decay_schedule(0.0, 0.1, 2, 10),
    "joined": optax.join_schedules(
      [optax.constant_schedule(0.1), optax.constant_schedule(0.2)], [5]
    ),
    "restarts": optax.sgdr_schedule(
      [
        {
          "init_value": 0.0,
          "peak_value": 0.1,
          "decay_steps": 9,
          "warmup_steps": 2,
        }
      ]
    ),
    "partial": functools.partial(jnp.multiply, 0.1),
    "default": lambda step, rate=0.1: rate * step,
    "other default": lambda step, rate=0.2: rate * step,
  }


def combined():
  adam, sgd = optax.adam, optax.sgd
  labels = {"a": "x", "b": "y"}
  return {
    "chain": optax.chain(optax.clip(1.0), adam(0.1)),
    "other chain": optax.chain(optax.clip(2.0), adam(0.1)),
    "swapped": optax.chain(adam(0.1), optax.clip(1.0)),
    "named": optax.named_chain(("clip", optax.clip(1.0)), ("adam", adam(0.1))),
    "masked": optax.masked(adam(0.1), {"a": True, "b": False}),
    "other mask": optax.masked(adam(0.1), {"a": True, "b": True}),
    "partition": optax.partition({"x": adam(0.1), "y": sgd(0.1)}, labels),
    "other parts": optax.partition({"x": adam(0.1), "y": sgd(0.2)}, labels),
    "injected": optax.inject_hyperparams(adam)(learning_rate=0.1),
    "other rate": optax.inject_hyperparams(adam)(learning_rate=0.2),
    "scheduled": optax.inject_hyperparams(adam)(
      learning_rate=optax.linear_schedule(0.1, 0.0, 10)
    ),
    "steps": optax.MultiSteps(adam(0.1), 2),
    "more steps": optax.MultiSteps(adam(0.1), 4),
    "as transform": optax.MultiSteps(adam(0.1), 4).gradient_transformation(),
    "finite": optax.apply_if_finite(adam(0.1), 3),
    "lookahead": optax.lookahead(adam(0.1), 5, 0.5),
    "average": optax.ema(0.9),
    "noise": optax.add_noise(0.1, 0.5, jax.random.key(0)),
    "other noise": optax.add_noise(0.1, 0.5, jax.random.key(1)),
    "old noise": optax.add_noise(0.1, 0.5, 0),
    "trust": optax.scale_by_trust_ratio(),
    "decay": optax.add_decayed_weights(0.1, mask=lambda x: x),
    "flat": optax.flatten(adam(0.1)),
    "narrow": adam(0.1, mu_dtype=jnp.bfloat16),
    "array": adam(jnp.float32(0.1)),
    "arrays": optax.stateless(functools.partial(add, y=np.arange(3))),
    "other arrays": optax.stateless(functools.partial(add, y=np.arange(3) + 1)),
    "wrapped": tern_jax.wrap(adam(0.1), *tern_jax.recipe(0.8, 10)),
    "wrapped more": tern_jax.wrap(adam(0.1), *tern_jax.recipe(0.9, 10)),
    "wdr": tern_jax.recipe(0.8, 10)[1],
    "muon": optax.contrib.muon(0.1),
  }


def add(updates, params, y):
  return updates


def methods():
  return {
    "TWN": TWN(),
    "TTQ": TTQ(),
    "SCA": SCA(alpha=0.1),
    "SCA at": SCA(alpha=0.2),
    "scheduled": SCA(sparsity=optax.linear_schedule(0.0, 0.9, 10)),
    "longer": SCA(sparsity=optax.linear_schedule(0.0, 0.9, 20)),
    "trees": ParamTransform(TWN()),
    "groups": ParamTransform(TWN(), group_size=8),
    "where": ParamTransform(TWN(), tern_jax.kernels(include="emb")),
  }


class Color(enum.Enum):
  RED = 1
  BLUE = 2


class Pair(NamedTuple):
  a: object
  b: object


@dataclasses.dataclass
class Held:
  f: object
  n: int = 1


class Plain:
  def __call__(self, x):
    return x

  def method(self):
    return self


class Layer(eqx.Module):
  w: jax.Array


def values():
  return {
    "none": None,
    "true": True,
    "one": 1,
    "float": 1.5,
    "bytes": b"x",
    "complex": 1j,
    "list": [1, "a"],
    "dict": {"a": 1, "b": 2},
    "set": {"a", "b", "c", "d"},
    "enum": Color.RED,
    "other enum": Color.BLUE,
    "dtype": np.dtype("float32"),
    "type": jnp.float16,
    "pair": Pair(1, Plain()),
    "held": Held(Plain().__call__),
    "held more": Held(Plain().__call__, 2),
    "object": Plain(),
    "method": Plain().method,
    "function": add,
    "builtin": len,
    "compiled": jax.jit(add),
    "ufunc": jnp.add,
    "array": np.arange(6.0),
    "other array": np.arange(7.0),
    "key": jax.random.key(3),
    "model": nn.Dense(3),
    "other model": nn.Dense(4),
    "module": Layer(jnp.ones(3)),
    "partial": functools.partial(add, 1, y=2),
    "tree": jax.tree.structure({"a": 1}),
  }


KINDS = {
  "schedules": schedules,
  "combined": combined,
  "methods": methods,
  "values": values,
}
#: Of some things not all is told, which is never wrong.
SAME = (
  {"compiled", "function"},
  {"object", "method"},
  {"more steps", "as transform"},
)


@pytest.mark.parametrize("kind", KINDS)
def test_one_thing_has_one_text_and_another_has_another(kind):
  first, again = (
    {name: text_of(x) for name, x in KINDS[kind]().items()} for _ in range(2)
  )
  assert first == again
  assert all(map(is_lasting, first.values()))
  same = [
    {a, b} for a, b in itertools.combinations(first, 2) if first[a] == first[b]
  ]
  assert [x for x in same if x not in SAME] == []


ELSEWHERE = """
import json
from tests.test_describe import KINDS, text_of
told = {k: {n: text_of(x) for n, x in f().items()} for k, f in KINDS.items()}
print(json.dumps(told))
"""


@pytest.mark.long
def test_another_process_finds_the_same_texts():
  told = [
    subprocess.run(
      [sys.executable, "-c", ELSEWHERE],
      env=os.environ | {"PYTHONHASHSEED": str(seed)},
      check=True,
      capture_output=True,
      text=True,
    ).stdout
    for seed in (1, 2)
  ]
  assert told[0] == told[1]
  assert len(told[0]) > 5000


def test_what_lies_in_itself_ends():
  loop = [1]
  loop.append(loop)
  assert text_of(loop) == "(1, ...)"

  def again():
    return again

  assert text_of(again).endswith("again(again=...)")


def test_what_is_traced_is_left_out():
  texts = []
  jax.jit(lambda x: texts.append(text_of(optax.scale(x))) or x)(1.0)
  assert texts == ["scale(step_size=traced)"]


def test_a_cell_may_be_empty():
  def outer(bind):
    def inner():
      return late

    if bind:
      late = 1
    return inner

  assert text_of(outer(bind=True)).endswith("outer.inner(late=1)")
  assert text_of(outer(bind=False)).endswith("outer.inner")


def test_scalars_of_any_kind_are_the_number():
  for x in (
    0.5,
    np.float32(0.5),
    np.float64(0.5),
    jnp.array(0.5),
    np.array(0.5),
  ):
    assert text_of([x]) == "(0.5)"
  assert text_of(np.int64(3)) == text_of(3) == "3"
  assert text_of("a text") == "a text"


def test_a_difference_shows_its_call():
  adam, nadam = (
    text_of(optax.chain(*[optax.clip(1.0)] * 9, tx(0.1)))
    for tx in (optax.adam, optax.nadam)
  )
  assert difference(adam, nadam) == (
    "scale_by_adam(..., nesterov=False)",
    "scale_by_adam(..., nesterov=True)",
  )
  assert difference("TWN()", "TTQ()") == ("TWN()", "TTQ()")
  for a, b in (
    ("x" * 999, "x" * 998),
    ("(" * 999, ")" * 999),
    ("", "f(" * 500),
  ):
    assert all(len(x) < 200 for x in difference(a, b))


def test_changes_are_told_by_name():
  now = {"b": "2", "a": "1", "new": "3"}
  assert [*changes({"a": "0", "b": "1", "old": "2"}, now)] == [
    "the a of the restored step was 0, now it is 1.",
    "the b of the restored step was 1, now it is 2.",
  ]
  (told,) = changes({"a": "\033[2J\nall is well"}, now)
  assert told.isprintable()
  for was in (None, [], "a", {"a": 1}, {"a": None}, {}, now):
    assert [*changes(was, now)] == []
