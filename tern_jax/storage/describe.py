"""What a run was made of, as text: the same for the same in any process."""

import dataclasses
import enum
import functools
import re
import types
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from tern_jax.storage.leaves import printable

# The repr of a function, or of an object that has none of its own.
_ADDRESS = re.compile(r"\b0x[0-9a-fA-F]+")
# What is told as Python writes it.
_PLAIN = bool | int | float | complex | str | bytes | None
# The name of what is called.
_NAME = re.compile(r"[\w.<>+]*$")
# Characters of a text that is shown whole.
_SHORT = 160


def text_of(value: Any) -> str:
  """Returns the text by which a run tells that something is another.

  A string is its own text. An optax transformation is its functions by name,
  with what they hold: numbers, strings, functions, and arrays by shape, dtype
  and crc32. A dataclass is its repr. What has no text that is the same in
  every process, such as the attributes of other objects, is left out: two
  values may have one text, but one value never has two.

  >>> import optax
  >>> text_of(optax.scale(-0.1))
  'scale(step_size=-0.1)'
  >>> text_of(optax.scale_by_adam()) == text_of(optax.scale_by_adam(b1=0.8))
  False
  """
  return value if isinstance(value, str) else _text(value, ())


def is_lasting(text: str) -> bool:
  """Whether a repr is the same in every process: it has no address."""
  return not _ADDRESS.search(text)


def difference(was: str, now: str) -> tuple[str, str]:
  """Returns two texts, long ones only around where they differ."""
  first = _common(was, now)
  last = _common(was[first:][::-1], now[first:][::-1])
  a, b = (_shortened(x, first, len(x) - last) for x in (was, now))
  return a, b


def changes(was: object, now: Mapping[str, str]) -> Iterator[str]:
  """Yields what a step describes otherwise than the run does now, by name."""
  if not isinstance(was, dict):
    return  # An older version saved it, which described nothing.
  for name in sorted(now.keys() & was.keys()):
    if isinstance(was[name], str) and was[name] != now[name]:
      pair = difference(was[name], now[name])
      before, after = (printable(x, 2 * _SHORT) for x in pair)
      yield f"the {name} of the restored step was {before}, now it is {after}."


def _common(a: str, b: str) -> int:
  """Returns the length of the common beginning of two texts."""
  pairs = enumerate(zip(a, b, strict=False))
  return next((i for i, (x, y) in pairs if x != y), min(len(a), len(b)))


def _shortened(text: str, first: int, last: int) -> str:
  """Returns the arguments of a call from the first place to the last."""
  if len(text) <= _SHORT:
    return text
  depth, start = 0, 0
  for i in reversed(range(first)):
    depth += {")": 1, "(": -1}.get(text[i], 0)
    if depth < 0:
      start = i + 1
      break
  name = _NAME.search(text[: max(start - 1, 0)])
  begin = max(start, text.rfind(", ", start, first) + 2 if start else 0)
  ends = [i for i in (text.find(x, last) for x in ",)") if i >= 0]
  shown = text[begin : min(ends, default=len(text))]
  if len(shown) > _SHORT:
    shown = f"{shown[:_SHORT]}..."
  before = "..., " if begin > start else ""
  return f"{name[0] if name else ''}({before}{shown})" if start else shown


def _text(x: Any, above: tuple[int, ...]) -> str:
  """Returns the text of a value in others; `above` has what it lies in."""
  if isinstance(x, _PLAIN) and not isinstance(x, enum.Enum | np.generic):
    return repr(x)
  if id(x) in above:
    return "..."
  inside = functools.partial(_text, above=(*above, id(x)))
  for kind, told in _KINDS:
    if isinstance(x, kind):
      return told(x, inside)
  if dataclasses.is_dataclass(x) and not isinstance(x, type):
    return _of_dataclass(x, inside)
  # JAX hides a compiled function behind one of its own types.
  if callable(function := getattr(x, "__wrapped__", None)):
    return inside(function)
  if not isinstance(x, type) and hasattr(x, "init") and hasattr(x, "update"):
    return _call(
      type(x).__qualname__, {k: inside(v) for k, v in vars(x).items()}
    )
  return getattr(x, "__qualname__", type(x).__qualname__)


def _of_array(x: Any, _: Any) -> str:
  if isinstance(x, jax.core.Tracer):
    return "traced"
  if isinstance(x, jax.Array) and not x.is_fully_addressable:
    return f"{x.dtype}{list(x.shape)}"
  if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
    x = jax.random.key_data(x)
  array = np.asarray(x)
  if not array.ndim and array.dtype.kind in "biufc":
    return repr(array.item())
  crc = 0 if array.dtype == object else zlib.crc32(array.tobytes())
  return f"{array.dtype}{list(array.shape)}#{crc:08x}"


def _of_mapping(x: Any, inside: Any) -> str:
  items = sorted((inside(k), inside(v)) for k, v in x.items())
  return f"{{{', '.join(f'{k}: {v}' for k, v in items)}}}"


def _of_sequence(x: Any, inside: Any) -> str:
  if isinstance(x, tuple) and hasattr(x, "_fields"):
    return _of_fields(x, inside)
  return f"({', '.join(map(inside, x))})"


def _of_fields(x: Any, inside: Any) -> str:
  fields = x._asdict()
  if fields.keys() == {"init", "update"}:  # an optax transformation
    return _of_functions((x.init, x.update), inside)
  return _call(type(x).__qualname__, {k: inside(v) for k, v in fields.items()})


def _of_set(x: Any, inside: Any) -> str:
  return f"{{{', '.join(sorted(map(inside, x)))}}}"


def _of_dataclass(x: Any, inside: Any) -> str:
  if is_lasting(text := repr(x)):
    return text
  values = {f.name: getattr(x, f.name, None) for f in dataclasses.fields(x)}
  return _call(type(x).__qualname__, {k: inside(v) for k, v in values.items()})


def _of_partial(x: Any, inside: Any) -> str:
  args = {str(i): inside(y) for i, y in enumerate(x.args)}
  keywords = {k: inside(y) for k, y in sorted(x.keywords.items())}
  return f"partial({_call(inside(x.func), args | keywords)})"


def _of_method(x: Any, inside: Any) -> str:
  return f"{inside(x.__self__)}.{x.__func__.__name__}"


def _of_function(x: Any, inside: Any) -> str:
  return _of_functions((x,), inside)


def _of_functions(functions: Any, inside: Any) -> str:
  """Returns the text of functions that one factory has made, as one call."""
  functions = [*map(_unwrapped, functions)]
  owners = [getattr(f, "__self__", None) for f in functions]
  if owners[0] is not None and all(x is owners[0] for x in owners):
    return inside(owners[0])
  if not all(isinstance(f, types.FunctionType) for f in functions):
    return f"({', '.join(map(inside, functions))})"
  names = [f.__qualname__ for f in functions]
  if len(names) > 1:
    factories = [x.rpartition(".<locals>.")[0] for x in names]
    names = [x for x in factories if x] or names
  name = "+".join(dict.fromkeys(names)).replace(".<locals>", "")
  values = [_held(f) for f in functions]
  if [*map(list, values)] == [["init_fns"], ["update_fns"]]:  # optax.chain
    pairs = zip(values[0]["init_fns"], values[1]["update_fns"], strict=True)
    return f"{name}({', '.join(_of_functions(x, inside) for x in pairs)})"
  held: dict[str, str] = {}
  for f, own in zip(functions, values, strict=True):
    for key, value in own.items():
      text = inside(value)
      if held.setdefault(key, text) != text:
        held[f"{f.__name__}.{key}"] = text
  return _call(name, held) if held else name


def _unwrapped(function: Any) -> Any:
  """Returns what optax has wrapped to take more arguments."""
  name = getattr(function, "__qualname__", "")
  if name.startswith("with_extra_args_support.<locals>"):
    return getattr(_held(function).get("tx"), "update", function)
  return function


def _held(function: types.FunctionType) -> dict[str, Any]:
  """Returns what a function holds: what it closes over, and its defaults.

  The defaults of a function that stands in a module are part of its code.
  """
  code, held = function.__code__, {}
  if "<" in function.__qualname__:
    arguments = code.co_varnames[: code.co_argcount]
    defaults = function.__defaults__ or ()
    named = zip(reversed(arguments), reversed(defaults), strict=False)
    held |= {**dict(named), **(function.__kwdefaults__ or {})}
    held = {k: v for k, v in held.items() if v is not None}
  cells = function.__closure__ or ()
  for name, cell in zip(code.co_freevars, cells, strict=True):
    try:
      held[name] = cell.cell_contents
    except ValueError:  # It is empty.
      continue
  return held


def _call(name: str, arguments: dict[str, str]) -> str:
  return f"{name}({', '.join(f'{k}={v}' for k, v in arguments.items())})"


_KINDS = (
  (np.ndarray | np.generic | jax.Array, _of_array),
  (enum.Enum, lambda x, _: str(x)),
  (np.dtype, lambda x, _: x.name),
  (dict | types.MappingProxyType, _of_mapping),
  (list | tuple, _of_sequence),
  (set | frozenset, _of_set),
  (functools.partial, _of_partial),
  (types.MethodType, _of_method),
  (types.FunctionType, _of_function),
)
