"""Makes containers known to `flax.serialization` and `jax.export`."""

import dataclasses
import importlib.abc
import importlib.machinery
import json
import sys
import types
from collections.abc import Hashable, Sequence
from typing import Any, TypeVar

import jax.export as jax_export

_FLAX = "flax.serialization"
_CLASSES: list[type] = []
_Class = TypeVar("_Class", bound=type)


def serializable(cls: _Class) -> _Class:
  """Lets a container into other people's files.

  `jax.export` then serializes functions that take or return it, and
  `flax.serialization` its instances. Flax itself is not imported: the container
  is registered when somebody else imports it, be that before or after this.

  Args:
    cls: a dataclass that is a pytree node, its static part JSON, or a
      NamedTuple.
  """
  if issubclass(cls, tuple):  # Flax knows all of them.
    jax_export.register_namedtuple_serialization(
      cls, serialized_name=f"tern_jax.{cls.__name__}"
    )
    return cls
  jax_export.register_pytree_node_serialization(
    cls,
    serialized_name=f"tern_jax.{cls.__name__}",
    serialize_auxdata=lambda static: json.dumps(static).encode(),
    deserialize_auxdata=lambda data: _hashable(json.loads(bytes(data))),
  )
  _CLASSES.append(cls)
  if _FLAX in sys.modules:
    _register(cls, sys.modules[_FLAX])
  return cls


def _hashable(x: Any) -> Hashable:
  """Returns JSON with tuples for its lists, as it was before it was JSON."""
  return tuple(map(_hashable, x)) if isinstance(x, list) else x


class _Finder(importlib.abc.MetaPathFinder):
  """Finds Flax's module as others find it, and registers once it has run."""

  def find_spec(
    self,
    name: str,
    path: Sequence[str] | None = None,
    target: types.ModuleType | None = None,
  ) -> importlib.machinery.ModuleSpec | None:
    if name != _FLAX:
      return None
    others = (finder for finder in sys.meta_path if finder is not self)
    found = (finder.find_spec(name, path, target) for finder in others)
    spec = next(filter(None, found), None)
    if spec is None or spec.loader is None:
      return spec
    run = spec.loader.exec_module

    def exec_module(module: types.ModuleType) -> None:
      run(module)
      for cls in _CLASSES:
        _register(cls, module)

    spec.loader.exec_module = exec_module  # pyrefly: ignore
    return spec


sys.meta_path.insert(0, _Finder())


def _register(cls: type, flax: Any) -> None:
  """Registers a dataclass; static fields are stored, and checked on restore."""
  fields = dataclasses.fields(cls)
  static = {f.name for f in fields if f.metadata.get("static")}

  def to_state(x: Any) -> dict[str, Any]:
    return {f.name: flax.to_state_dict(getattr(x, f.name)) for f in fields}

  def from_state(target: Any, state: Any) -> Any:
    wanted = to_state(target)
    if not isinstance(state, dict) or state.keys() != wanted.keys():
      got = list(state) if isinstance(state, dict) else type(state).__name__
      raise ValueError(
        f"{flax.current_path()}: a state dict of {cls.__name__} has the fields"
        f" {list(wanted)}, got {got}."
      )
    for name in static:
      if state[name] != wanted[name]:
        raise ValueError(
          f"{flax.current_path()}: the {cls.__name__} to restore has {name}"
          f" {_plain(state[name])}, but the target has {_plain(wanted[name])}:"
          " give a target of the same weights."
        )
    return dataclasses.replace(
      target,
      **{
        name: flax.from_state_dict(getattr(target, name), x, name=name)
        for name, x in state.items()
        if name not in static
      },
    )

  flax.register_serialization_state(cls, to_state, from_state, override=True)


def _plain(x: Any) -> Any:
  """Returns a tuple for the state dict that Flax makes of it."""
  return tuple(x.values()) if isinstance(x, dict) else x
