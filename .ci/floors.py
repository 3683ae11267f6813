"""Prints pip constraints that pin each dependency to its stated lower bound.

The bounds are those that pyproject.toml states for the package and for the
extras named as arguments: `python .ci/floors.py test > floors.txt`. Extras
that another extra includes are followed. What the dependencies need in turn is
left to pip.
"""

import pathlib
import re
import sys
import tomllib
from collections.abc import Iterable, Iterator
from typing import Any

REQUIREMENT = re.compile(
  r"(?P<name>[\w.-]+)"
  r"(\[(?P<extras>[\w,-]+)\])?"
  r"(>=(?P<bound>[\w.]+))?"
  r"(?P<marker>; .+)?"
)


def floors(project: Any, requirements: Iterable[str]) -> Iterator[str]:
  """Yields name==bound for each requirement, those of extras included."""
  for requirement in requirements:
    match = REQUIREMENT.fullmatch(requirement)
    if match and match["name"] == project["name"] and match["extras"]:
      for extra in match["extras"].split(","):
        yield from floors(project, project["optional-dependencies"][extra])
    elif match and match["bound"]:
      yield f"{match['name']}=={match['bound']}{match['marker'] or ''}"
    else:
      sys.exit(
        f"pyproject.toml: {requirement!r} states no lower bound. Write it as"
        " name>=bound, name[extra]>=bound or name>=bound; marker."
      )


root = pathlib.Path(__file__).resolve().parents[1]
project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
wanted = list(project["dependencies"])
for extra in sys.argv[1:]:
  wanted += project["optional-dependencies"][extra]
print(*dict.fromkeys(floors(project, wanted)), sep="\n")
