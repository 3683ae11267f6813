"""Rows under a head: as text, as Markdown, and, by `page`, as HTML."""

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import tabulate

Row = tuple[str, ...]

#: Cells as wide as what is in them.
_MARKDOWN = tabulate.TableFormat(
  lineabove=None,
  linebelowheader=lambda widths, _: f"| {' | '.join(['---'] * len(widths))} |",
  linebetweenrows=None,
  linebelow=None,
  headerrow=tabulate.DataRow("| ", " | ", " |"),
  datarow=tabulate.DataRow("| ", " | ", " |"),
  padding=0,
  with_header_hide=None,
)


@dataclasses.dataclass
class Table:
  """Rows of cells under a head.

  Attributes:
    head: titles of the columns.
    rows: as many cells each.
    caption: what a page says above it.
  """

  head: Row
  rows: list[Row] = dataclasses.field(default_factory=list)
  caption: str = ""

  def text(self) -> str:
    """Aligns columns: the first to the left, the others to the right.

    >>> print(Table(("size", "bytes"), [("a", "12"), ("bc", "7")]).text())
    size  bytes
    -----------
    a        12
    bc        7
    """
    # As rows all of them, because a head would get wider columns.
    whole = tabulate.tabulate(
      [self.head, *self.rows],
      tablefmt="plain",
      colalign=["left", *["right"] * (len(self.head) - 1)],
      disable_numparse=True,
    )
    head, *rows = (line.rstrip() for line in whole.splitlines())
    rule = "-" * max(map(len, (head, *rows)))
    return "\n".join((head, rule, *rows))

  def markdown(self) -> str:
    """Returns the lines of a Markdown table.

    >>> print(Table(("", "bytes"), [("a", "12")]).markdown())
    |  | bytes |
    | --- | --- |
    | a | 12 |
    """
    return tabulate.tabulate(
      self.rows,
      self.head,
      tablefmt=_MARKDOWN,
      stralign=None,
      disable_numparse=True,
    )


class Column(NamedTuple):
  """A figure of each record.

  Attributes:
    title: of the column.
    key: of the record.
    factor: from the record to the table.
    form: how it is printed.
  """

  title: str
  key: str
  factor: float = 1
  form: str = ".2f"


def mean_and_deviation(values: Sequence[float], form: str) -> str:
  """Returns mean ± standard deviation, without one that is printed as 0.

  >>> mean_and_deviation([1.0, 3.0], ".1f"), mean_and_deviation([7, 7], ".0f")
  ('2.0 ± 1.4', '7')
  """
  mean = f"{statistics.mean(values):{form}}"
  if len(values) < 2:
    return mean
  deviation = f"{statistics.stdev(values):{form}}"
  return mean if deviation == "0" else f"{mean} ± {deviation}"


def summary(
  groups: Mapping[str, Sequence[Mapping[str, Any]]],
  columns: Sequence[Column],
  caption: str = "",
) -> Table:
  """Sets groups of records side by side, such as the seeds of a method.

  Args:
    groups: {label: records}; a figure that is None is left out.
    columns: what to show.
    caption: of the table.

  >>> columns = [Column("test %", "test", 100)]
  >>> summary({"float": [{"test": 0.9}]}, columns).rows
  [('float', '1', '90.00')]
  """
  table = Table(("", "seeds", *(c.title for c in columns)), caption=caption)
  for label, records in groups.items():
    cells = []
    for column in columns:
      values = [record[column.key] for record in records]
      known = [column.factor * v for v in values if v is not None]
      cells.append(mean_and_deviation(known, column.form) if known else "-")
    table.rows.append((label, str(len(records)), *cells))
  return table
