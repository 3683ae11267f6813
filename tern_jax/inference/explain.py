"""How a rewritten function uses packed weights."""

import collections
import dataclasses
from collections.abc import Iterable

from tern_jax.inference.rewrite import Found


@dataclasses.dataclass(frozen=True)
class Use:
  """One way in which weights are used.

  Args:
    path: of the weights, in the argument that has them.
    shape: of the weights.
    how: "packed product", "packed convolution", "rows" for a look-up that
      unpacks rows alone, "dense: " and what needs unpacked weights, or
      "not used".
    count: operations of the program that use the weights so. The body of a loop
      counts once.
  """

  path: str
  shape: tuple[int, ...]
  how: str
  count: int


@dataclasses.dataclass(frozen=True, repr=False)
class Explanation:
  """How a function uses packed weights; prints as a table.

  Args:
    uses: in the order of the weights.
  """

  uses: tuple[Use, ...]

  @property
  def dense(self) -> tuple[Use, ...]:
    """Uses that unpack all weights."""
    return tuple(use for use in self.uses if use.how.startswith("dense"))

  def __str__(self) -> str:
    """Returns a line for each use, under a head."""
    rows = [("weights", "shape", "used as", "times")]
    for use in self.uses:
      shape = "x".join(map(str, use.shape))
      rows.append((use.path, shape, use.how, str(use.count)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = (
      "  ".join(x.ljust(n) for x, n in zip(row, widths, strict=True))
      for row in rows
    )
    return "\n".join(line.rstrip() for line in lines)

  __repr__ = __str__


def explanation(
  weights: dict[str, tuple[int, ...]], uses: Iterable[Found]
) -> Explanation:
  """Returns the uses of weights.

  Args:
    weights: {path: shape}.
    uses: of all of them.
  """
  ways = sorted({(use.where, use.name, use.how) for use in uses})
  counts = collections.Counter((path, how) for _, path, how in ways)
  rows = []
  for path, shape in weights.items():
    found = [(how, n) for (name, how), n in counts.items() if name == path]
    for how, count in found or [("not used", 0)]:
      rows.append(Use(path, shape, how, count))
  return Explanation(tuple(rows))
