"""Tables and pictures under headings, as Markdown and as one HTML page."""

import base64
import dataclasses
import html
import re
from collections.abc import Sequence
from pathlib import Path
from string import Template
from typing import NamedTuple

Rows = list[tuple[str, ...]]

PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>$title</title>
<style>
:root { --ink: #1d2126; --soft: #5c6570; --line: #dfe3e8; --paper: #fbfbfa;
  --link: #0b62a4; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e8ea; --soft: #9aa4af; --line: #333a42; --paper: #15181c;
    --link: #7cb8ea; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2.5rem 1rem 4rem; max-width: 56rem;
  color: var(--ink); background: var(--paper);
  font: 1rem/1.55 system-ui, sans-serif; overflow-wrap: break-word; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .5rem; }
h2 { font-size: 1.3rem; line-height: 1.3; margin: 0 0 .75rem; }
section { border-top: 1px solid var(--line); margin-top: 2.5rem;
  padding-top: 1.75rem; }
p, figcaption { max-width: 40rem; margin: .6rem 0; }
nav ul { padding-left: 1.1rem; margin: 1rem 0; }
a { color: var(--link); }
figure { margin: 1.5rem 0; }
figcaption { color: var(--soft); font-size: .875rem; margin: .5rem 0; }
img { display: block; width: 100%; max-width: 36rem; height: auto;
  padding: .5rem; background: #fff; border: 1px solid var(--line);
  border-radius: .5rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .875rem; line-height: 1.4;
  font-variant-numeric: tabular-nums; }
th, td { padding: .35rem 0 .35rem 1.25rem; text-align: right;
  white-space: nowrap; border-bottom: 1px solid var(--line); }
thead th { color: var(--soft); font-weight: 600; white-space: normal;
  vertical-align: bottom; }
thead th:first-child { white-space: nowrap; }
tbody th { font-weight: 500; }
th:first-child { padding-left: 0; }
th:first-child, .words { text-align: left; }
</style>
</head>
<body>
<header><h1>$title</h1><p>$introduction</p></header>
<nav aria-label="Sections"><ul>
$links
</ul></nav>
<main>
$body
</main>
</body>
</html>
""")


class Picture(NamedTuple):
  """A picture in the directory of the page."""

  name: str
  alt: str
  caption: str


@dataclasses.dataclass
class Section:
  """Paragraphs, (caption, rows) of tables, the head first, and pictures."""

  title: str
  text: list[str] = dataclasses.field(default_factory=list)
  tables: list[tuple[str, Rows]] = dataclasses.field(default_factory=list)
  pictures: list[Picture] = dataclasses.field(default_factory=list)


def cells(table: str) -> Rows:
  r"""Returns the cells of a Markdown table; whole numbers lose a ± of 0.

  >>> cells("| | bytes |\n| --- | --- |\n| a | 7 ± 0 |")
  [('', 'bytes'), ('a', '7')]
  """
  head, _, *lines = table.replace(" ± 0 |", " |").splitlines()
  return [
    tuple(cell.strip() for cell in line.strip()[1:-1].split("|"))
    for line in (head, *lines)
  ]


def markdown(title: str, introduction: str, sections: Sequence[Section]) -> str:
  """Prints sections as Markdown.

  >>> table = ("Sizes", [("", "bytes"), ("a", "7")])
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
    for caption, (head, *rows) in section.tables:
      lines = (head, ("---",) * len(head), *rows)
      text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
      parts.append(f"{caption}:\n\n{text}")
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
  links, body = [], []
  for number, section in enumerate(sections):
    heading = html.escape(section.title)
    links.append(f'<li><a href="#s{number}">{heading}</a></li>')
    body.append(f'<section id="s{number}"><h2>{heading}</h2>')
    body += [f"<p>{html.escape(text)}</p>" for text in section.text]
    body += [_picture(picture, directory) for picture in section.pictures]
    body += [_table(*table) for table in section.tables]
    body.append("</section>")
  return PAGE.substitute(
    title=html.escape(title),
    introduction=html.escape(introduction),
    links="\n".join(links),
    body="\n".join(body),
  )


def _picture(picture: Picture, directory: Path) -> str:
  content = base64.b64encode((directory / picture.name).read_bytes()).decode()
  kind = "svg+xml" if picture.name.endswith(".svg") else "png"
  return (
    f'<figure><img alt="{html.escape(picture.alt)}"'
    f' src="data:image/{kind};base64,{content}">'
    f"<figcaption>{html.escape(picture.caption)}</figcaption></figure>"
  )


def _table(caption: str, rows: Rows) -> str:
  """Returns a table in a box that scrolls by itself; words are set left."""
  columns = list(zip(*rows[1:], strict=True))
  words = [any(re.match("[a-z]{5}", c, re.I) for c in col) for col in columns]
  lines = []
  for number, row in enumerate(rows):
    lines.append("<tr>")
    for column, cell in enumerate(row):
      tag = "th" if 0 in (number, column) else "td"
      scope = "row" if number else "col"
      attributes = f' scope="{scope}"' if tag == "th" else ""
      attributes += ' class="words"' if words[column] else ""
      lines.append(f"<{tag}{attributes}>{_unbroken(cell)}</{tag}>")
    lines.append("</tr></thead><tbody>" if number == 0 else "</tr>")
  label = html.escape(caption)
  return (
    f"<figure><figcaption>{label}</figcaption>"
    f'<div class="scroll" role="region" tabindex="0" aria-label="{label}">'
    f"<table><thead>{''.join(lines)}</tbody></table></div></figure>"
  )


def _unbroken(cell: str) -> str:
  # A head may be broken into lines, but not before its unit.
  return html.escape(cell).replace(" %", "&nbsp;%")
