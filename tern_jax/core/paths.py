"""Paths of leaves: how they print, and patterns that match them."""

import fnmatch
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


def matches(pattern: str, path: str) -> bool:
  """Whether a pattern matches whole components anywhere in a path.

  >>> matches("Dense_*/kernel", "net/Dense_0/kernel"), matches("Den", "Dense")
  (True, False)
  """
  wanted, parts = pattern.split("/"), path.split("/")
  return any(
    all(
      fnmatch.fnmatchcase(part, w)
      for part, w in zip(parts[i:], wanted, strict=False)
    )
    for i in range(len(parts) - len(wanted) + 1)
  )


def matches_any(patterns: Sequence[str], path: str) -> bool:
  """Whether one of the patterns matches a path."""
  return any(matches(pattern, path) for pattern in patterns)


def check_patterns(patterns: Sequence[str], paths: Sequence[str]) -> None:
  """Raises a ValueError if a pattern matches none of the paths."""
  for pattern in patterns:
    if not any(matches(pattern, path) for path in paths):
      raise ValueError(
        f"The pattern {pattern!r} matches no leaf; a pattern is made of whole"
        f" path components. The leaves are: {', '.join(paths) or 'none'}."
      )


def lift(
  stacked: Sequence[str], path: str, fn: Callable, in_axes: PyTree = 0
) -> Callable:
  """Returns a function of one layer as one of the leaf at a path."""
  return jax.vmap(fn, in_axes) if matches_any(stacked, path) else fn
