"""The README's Python snippets run as they stand."""

import operator
import pathlib
import re

import pytest

import tern_jax

README = (pathlib.Path(__file__).parents[1] / "README.md").read_text()
SNIPPETS = re.findall(r"^```python\n(.*?)^```$", README, re.DOTALL | re.M)


def test_every_name_it_mentions_is_there():
  names = set(re.findall(r"`tern_jax((?:\.\w+)+)", README))
  assert "Checkpointer" in {name[1:] for name in names}
  for name in sorted(names):
    assert operator.attrgetter(name[1:])(tern_jax), name


@pytest.mark.parametrize("code", SNIPPETS, ids=range(len(SNIPPETS)))
def test_snippet(code, tmp_path, monkeypatch, standard_promotion):
  monkeypatch.chdir(tmp_path)
  namespace = {}
  exec(compile(code, "README.md", "exec"), namespace)
  if "dense" in namespace:
    kernel = namespace["dense"]["kernel"]
    assert int((kernel == 0).sum()) == 512
