"""The README's Python snippets run as they stand."""

import pathlib
import re

import pytest

README = (pathlib.Path(__file__).parents[1] / "README.md").read_text()
SNIPPETS = re.findall(r"^```python\n(.*?)^```$", README, re.DOTALL | re.M)


@pytest.mark.parametrize("code", SNIPPETS, ids=range(len(SNIPPETS)))
def test_snippet(code, tmp_path, monkeypatch, standard_promotion):
  monkeypatch.chdir(tmp_path)
  namespace = {}
  exec(compile(code, "README.md", "exec"), namespace)
  if "dense" in namespace:
    kernel = namespace["dense"]["kernel"]
    assert int((kernel == 0).sum()) == 512
