"""Paths of leaves: how they print, and patterns that match them."""

import fnmatch
import re
from collections.abc import Callable, Hashable, Iterable, Sequence

import jax

from tern_jax.core.types import PyTree


def path_str(path: Iterable[Hashable]) -> str:
  """Prints a key path of `jax.tree_util` as components joined by slashes.

  The trailing `value` under which NNX states and boxed Linen parameters hold
  their array is no component.

  >>> tree = {"Dense_0": {"kernel": 1.0}}
  >>> [path_str(p) for p, _ in jax.tree_util.tree_leaves_with_path(tree)]
  ['Dense_0/kernel']
  """
  names = [key_str(key) for key in path]
  if len(names) > 1 and names[-1] == "value":
    names.pop()
  return "/".join(names)


def key_str(key: Hashable) -> str:
  """Prints one key of a `jax.tree_util` key path.

  >>> key_str(jax.tree_util.SequenceKey(2)), key_str("kernel")
  ('2', 'kernel')
  """
  for attribute in ("key", "name", "idx"):
    if hasattr(key, attribute):
      return str(getattr(key, attribute))
  return str(key)


def as_patterns(given: str | Sequence[str], name: str) -> tuple[str, ...]:
  """Returns patterns as a tuple; a string is one of them.

  >>> as_patterns("layers", "stacked"), as_patterns(["a", "b"], "stacked")
  (('layers',), ('a', 'b'))
  """
  patterns = (given,) if isinstance(given, str) else given
  if not isinstance(patterns, Sequence) or not all(
    isinstance(pattern, str) for pattern in patterns
  ):
    raise TypeError(
      f"{name}={given!r}: give a pattern of paths or a list of them, such as"
      f' {name}=("Dense_0", "head/kernel").'
    )
  return tuple(patterns)


def matches(pattern: str, path: str) -> bool:
  """Whether a pattern matches whole components of a path.

  Anywhere in it, or from its top where the pattern begins with a slash. A
  component matches itself, whatever characters it has.

  >>> matches("Dense_*/kernel", "net/Dense_0/kernel"), matches("Den", "Dense")
  (True, False)
  >>> matches("/Dense_0", "Dense_0/kernel"), matches("/Dense_0", "a/Dense_0")
  (True, False)
  """
  wanted, parts = pattern.split("/"), path.split("/")
  starts = range(len(parts) - len(wanted) + 1)
  if pattern.startswith("/"):
    wanted, starts = wanted[1:], range(len(parts) - len(wanted) + 2 > 0)
  return any(
    all(
      part == w or fnmatch.fnmatchcase(part, w)
      for part, w in zip(parts[i:], wanted, strict=False)
    )
    for i in starts
  )


def names_leaf(pattern: str, path: str) -> bool:
  """Whether a pattern ends with the name of the leaf at a path, literally.

  >>> names_leaf("norm/scale", "a/norm/scale"), names_leaf("norm", "norm/scale")
  (True, False)
  """
  if pattern == exact(path):
    return True
  wanted, parts = pattern.lstrip("/").split("/"), path.split("/")
  tail = "/".join(parts[-len(wanted) :])
  return wanted[-1] == parts[-1] and matches("/" + "/".join(wanted), tail)


def exact(path: str) -> str:
  """Returns the pattern that matches the leaf at a path, and no other one.

  >>> exact("block[0]/kernel")
  '/block[[]0]/kernel'
  """
  return "/" + re.sub(r"([*?[])", r"[\1]", path)


def matches_any(patterns: str | Sequence[str], path: str) -> bool:
  """Whether one of the patterns matches a path."""
  patterns = (patterns,) if isinstance(patterns, str) else patterns
  return any(matches(pattern, path) for pattern in patterns)


def check_patterns(patterns: str | Sequence[str], paths: Sequence[str]) -> None:
  """Raises a ValueError if a pattern matches none of the paths.

  Or if it is the path of one leaf, of more than a name, and matches others.
  """
  for pattern in (patterns,) if isinstance(patterns, str) else patterns:
    matched = [path for path in paths if matches(pattern, path)]
    others = [path for path in matched if path != pattern]
    if "/" in pattern and pattern in matched and others:
      raise ValueError(
        f"The pattern {pattern!r} is the path of a leaf, but matches"
        f" {', '.join(others)} as well: {'/' + pattern!r} is that leaf alone;"
        " name the others by patterns of their own."
      )
    if not matched:
      raise ValueError(
        f"The pattern {pattern!r} matches no leaf; a pattern is made of whole"
        f" path components. The leaves are: {', '.join(paths) or 'none'}."
      )


def lift(
  stacked: str | Sequence[str], path: str, fn: Callable, in_axes: PyTree = 0
) -> Callable:
  """Returns a function of one layer as one of the leaf at a path."""
  return jax.vmap(fn, in_axes) if matches_any(stacked, path) else fn
