"""CONTRIBUTING's tables of allowed imports are the truth; modules follow."""

import ast
import pathlib
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

import pytest

import tern_jax

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / "tern_jax"


def room_of_package(parts: Sequence[str]) -> str:
  return parts[0]


def room_of_experiments(parts: Sequence[str]) -> str:
  if parts[0] == "common":
    return parts[1]
  return "benchmarks" if parts[0] == "benchmarks" else "pages"


class House(NamedTuple):
  """A tree of modules with a table in CONTRIBUTING.md."""

  name: str
  heading: str
  #: From the parts of a module's name, without the house's, to its row.
  room: Callable[[Sequence[str]], str]

  @property
  def files(self) -> list[pathlib.Path]:
    paths = sorted((ROOT / self.name).rglob("*.py"))
    return [path for path in paths if path.name != "__init__.py"]

  def room_of(self, path: pathlib.Path) -> str:
    return self.room(path.relative_to(ROOT / self.name).with_suffix("").parts)

  def table(self) -> dict[str, set[str]]:
    """Reads {room: rooms it may import} from CONTRIBUTING.md."""
    rows = {}
    text = (ROOT / "CONTRIBUTING.md").read_text()
    lines = iter(text.split(f"\n## {self.heading}\n")[1].splitlines())
    for line in lines:
      if line.startswith("| module | may import |"):
        next(lines)
        break
    for line in lines:
      if not line.startswith("|"):
        break
      modules, allowed, *_ = (c.strip() for c in line.strip("|").split("|"))
      names = {a.strip("` ") for a in allowed.split(",")} - {"", "nothing"}
      for module in modules.split(","):
        rows[module.strip("` ")] = names
    return rows

  def imports(self, path: pathlib.Path) -> set[str]:
    """Rooms of the house that a file imports."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
      if isinstance(node, ast.ImportFrom):
        found += [f"{node.module}.{alias.name}" for alias in node.names]
      elif isinstance(node, ast.Import):
        found += [f"{alias.name}.__init__" for alias in node.names]
    names = [name.split(".") for name in found]
    return {self.room(parts) for root, *parts in names if root == self.name}


HOUSES = (
  House("tern_jax", "Which module may import which", room_of_package),
  House(
    "experiments",
    "Experiments: which module may import which",
    room_of_experiments,
  ),
)
FILES = HOUSES[0].files
#: Rooms of files that never import one another.
APART = ("pages", "benchmarks")


@pytest.mark.parametrize(
  ("house", "path"),
  [(house, path) for house in HOUSES for path in house.files],
  ids=lambda x: x.name if isinstance(x, House) else x.stem,
)
def test_a_module_imports_what_the_table_allows(house, path):
  allowed = house.table()
  room = house.room_of(path)
  assert room in allowed, f"{room} has no row in CONTRIBUTING's table"
  own = {room} - {*APART}
  assert house.imports(path) <= allowed[room] | own


@pytest.mark.parametrize("house", HOUSES, ids=lambda house: house.name)
def test_every_row_of_the_table_is_a_module(house):
  assert set(house.table()) == {house.room_of(path) for path in house.files}


def test_experiments_are_no_libraries():
  for rooms in HOUSES[1].table().values():
    assert not rooms & {*APART}
  for path in FILES:
    assert not HOUSES[1].imports(path)


def test_methods_never_import_one_another():
  for path in (PACKAGE / "methods").glob("*.py"):
    if path.name == "__init__.py":
      continue
    of_methods = {
      node.module
      for node in ast.walk(ast.parse(path.read_text()))
      if isinstance(node, ast.ImportFrom)
      and (node.module or "").startswith("tern_jax.methods")
    }
    # Its own formulas are no other method.
    assert of_methods <= {f"tern_jax.methods.{path.stem}_math"}


def test_flax_is_imported_by_its_adapters_only():
  for path in FILES:
    tree = ast.parse(path.read_text())
    uses_flax = any(
      (isinstance(n, ast.ImportFrom) and (n.module or "").startswith("flax"))
      or (isinstance(n, ast.Import) and n.names[0].name.startswith("flax"))
      for n in ast.walk(tree)
    )
    assert uses_flax == (path.name in ("linen.py", "nnx.py"))


def test_init_only_reexports():
  allowed = ast.Expr | ast.Import | ast.ImportFrom
  for path in (PACKAGE / "__init__.py", PACKAGE / "methods" / "__init__.py"):
    body = ast.parse(path.read_text()).body
    names = {node.name for node in body if isinstance(node, ast.FunctionDef)}
    assert names <= {"__getattr__", "__dir__"}
    rest = [n for n in body if not isinstance(n, allowed | ast.FunctionDef)]
    # What is loaded at its first use: two tables, and imports for checkers.
    assert all(isinstance(n, ast.Assign | ast.If) for n in rest)


def test_every_public_name_is_there_and_listed():
  code = """
import sys, tern_jax
late = {"flax", "orbax", "constriction", "gguf", "safetensors"} & {*sys.modules}
assert not late, late
public = [n for n in dir(tern_jax) if not n.startswith("_")]
missing = [n for n in (*public, "__version__") if not hasattr(tern_jax, n)]
assert not missing, missing
assert {"Checkpointer", "checkpoint", "linen", "straight_through"} <= {*public}
assert "flax" in sys.modules and "orbax" in sys.modules
"""
  subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_a_name_that_is_none():
  with pytest.raises(AttributeError, match="no attribute 'Chekpointer'"):
    tern_jax.Chekpointer  # noqa: B018


def test_no_test_module_imports_another():
  for path in (ROOT / "tests").glob("test_*.py"):
    for node in ast.walk(ast.parse(path.read_text())):
      if isinstance(node, ast.ImportFrom):
        names = {node.module or "", *(alias.name for alias in node.names)}
        of_tests = (node.module or "").startswith("tests")
        assert not of_tests or not any("test_" in name for name in names), path
