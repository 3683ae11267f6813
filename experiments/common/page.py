"""Tables and pictures under headings, as Markdown and as one HTML page."""

import base64
import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jinja2
from markupsafe import Markup, escape

from experiments.common.tables import Table


class Picture(NamedTuple):
  """A picture in the directory of the page."""

  name: str
  alt: str
  caption: str


@dataclasses.dataclass
class Section:
  """Paragraphs, pictures and tables under a heading."""

  title: str
  text: list[str] = dataclasses.field(default_factory=list)
  tables: list[Table] = dataclasses.field(default_factory=list)
  pictures: list[Picture] = dataclasses.field(default_factory=list)


def markdown(title: str, introduction: str, sections: Sequence[Section]) -> str:
  """Prints sections as Markdown.

  >>> table = Table(("", "bytes"), [("a", "7")], "Sizes")
  >>> print(markdown("T", "I.", [Section("S", tables=[table])]))
  # T
  <BLANKLINE>
  I.
  <BLANKLINE>
  ## S
  <BLANKLINE>
  Sizes:
  <BLANKLINE>
  |  | bytes |
  | --- | --- |
  | a | 7 |
  <BLANKLINE>
  """
  parts = [f"# {title}", introduction]
  for section in sections:
    parts += [f"## {section.title}", *section.text]
    parts += [f"![{p.alt}]({p.name})\n\n{p.caption}" for p in section.pictures]
    parts += [f"{t.caption}:\n\n{t.markdown()}" for t in section.tables]
  return "\n\n".join(parts) + "\n"


def html_page(
  title: str, introduction: str, sections: Sequence[Section], directory: Path
) -> str:
  """Prints sections as an HTML page that needs no other file.

  Args:
    title: of the page.
    introduction: a paragraph under it.
    sections: what the page shows.
    directory: of the pictures.
  """

  def data_url(picture: Picture) -> str:
    content = base64.b64encode((directory / picture.name).read_bytes())
    kind = "svg+xml" if picture.name.endswith(".svg") else "png"
    return f"data:image/{kind};base64,{content.decode()}"

  environment = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    keep_trailing_newline=True,
  )
  environment.filters |= {
    "data_url": data_url,
    "columns_of_words": _columns_of_words,
    "unbroken": _unbroken,
  }
  return environment.get_template("page.html").render(
    title=title, introduction=introduction, sections=sections
  )


def _columns_of_words(table: Table) -> list[bool]:
  """Returns which columns hold words, and are set left."""
  columns = zip(*table.rows, strict=True)
  return [any(re.match("[a-z]{5}", c, re.I) for c in col) for col in columns]


def _unbroken(cell: str) -> Markup:
  # A head may be broken into lines, but not before its unit.
  return escape(cell).replace(" %", Markup("&nbsp;%"))
