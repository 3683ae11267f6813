"""CONTRIBUTING's table of allowed imports is the truth; modules follow it."""

import ast
import pathlib
import subprocess
import sys

import pytest

import tern_jax

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / "tern_jax"


def table() -> dict[str, set[str]]:
  """Reads {module: modules it may import} from CONTRIBUTING.md."""
  rows = {}
  lines = iter((ROOT / "CONTRIBUTING.md").read_text().splitlines())
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


def module_of(path: pathlib.Path) -> str:
  parts = path.relative_to(PACKAGE).with_suffix("").parts
  return parts[0]


def imports(path: pathlib.Path) -> set[str]:
  """Modules of the package that a file imports."""
  found = set()
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.ImportFrom) and node.module == "tern_jax":
      found |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      names = (node.module or "").split(".")
      if names[0] == "tern_jax":
        found.add(names[1])
    elif isinstance(node, ast.Import):
      for alias in node.names:
        names = alias.name.split(".")
        if names[0] == "tern_jax":
          found.add(names[1] if len(names) > 1 else "__init__")
  return found


FILES = sorted(
  path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py"
)


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_a_module_imports_what_the_table_allows(path):
  allowed = table()
  module = module_of(path)
  assert module in allowed, f"{module} has no row in CONTRIBUTING's table"
  assert imports(path) <= allowed[module] | {module}


def test_every_row_of_the_table_is_a_module():
  modules = {module_of(path) for path in FILES}
  assert set(table()) == modules


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
