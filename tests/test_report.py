"""The report: figures in its tables, nothing outside its page, no record lost.

Figures are computed by hand from records that are made up.
"""

import doctest
import html.parser
import json
import math
import re

import pytest

from experiments import report
from experiments.common import bench, build, errors, page, tables


def run(accuracy, seed):
  hits = {"float": 90, "unrounded": 80, "packed": round(100 * accuracy)}
  return {
    "method": "SCA<script>alert(1)</script>",
    "correct": hits,
    "total": 100,
    "sparsity": 0.7,
    "entropy_bits_per_weight": 1.25,
    "bits_per_weight": 2.0,
    "float_bytes": 4000,
    "packed_bytes": 250,
    "disk_bytes": 1000 + seed,
    "command": f"python -m experiments.digits --seed {seed} --x 'a & b'",
    "commit": f"c0ffee{seed}",
    "date": "2024-05-06",
    "versions": {"jax": "0.10.2"},
  }


def record(test, sparsity, entropy, **more):
  return {
    "validation": 0.5,
    "test": test,
    "sparsity": sparsity,
    "entropy": entropy,
  } | more


def cell(*test):
  return {"rate": 0.01, "test": test, "zeros": [0.5] * len(test)}


def of_text(seed):
  nats = {"float": math.log(4), "unrounded": math.log(8)}
  nats["packed"] = nats["rounded"] = math.log(8 + 8 * seed)
  seen = {"float": math.log(2), "rounded": math.log(16)}
  text = {"text_sha256": "ab", "loss": nats, "validation_loss": seen}
  return run(0.3, seed) | text


RECORDS = {
  "digits-sca-sparsity0.7-seed0": run(0.7, 0),
  "digits-sca-sparsity0.7-seed1": run(0.72, 1),
  "charlm-sca-sparsity0.7-seed0": of_text(0),
  "charlm-sca-sparsity0.7-seed1": of_text(1),
  "accuracy_table-cifar10-resnet8": {
    "float": [],
    "SCA, .5": [
      record(0.7, 0.5, 1.5, command="python -m x", commit="07"),
      record(0.74, 0.5, 1.5, command="python -m x", commit="b5"),
    ],
    "TWN <b>": [record(0.73, 0.4, 1.55)],
  },
  "paper_table-cifar10-resnet20-cpu": {
    "float": [record(0.9, None, None, published=0.9167, float_epochs=30)],
    "EC2T, .45": [
      record(test, 0.45, 1.54, published=0.9116, float_epochs=30, epochs=20)
      for test in (0.89, 0.91)
    ],
    "TWN": [record(0.88, 0.4, 1.55, published=None, epochs=20)],
  },
  "equal_sparsity-mnist-32-32": {
    "SCA": {"0.5": cell(0.9, 0.92), "0.9": cell(0.8, 0.8)},
    "TWN": {"0.5": cell(0.9, 0.9), "0.9": cell(0.7, 0.74)},
  },
  "budget-cifar10-resnet8": {
    "0.9 in all": [record(0.7, 0.9, 0.5, bytes=12_345.0)],
    "0.9, shared": [record(0.71, 0.85, 0.5, bytes=12_340.0)],
  },
}


def write(directory, records):
  directory.mkdir(exist_ok=True)
  for name, content in records.items():
    (directory / f"{name}.json").write_text(json.dumps(content))
  return directory


def made(results, out):
  report.main(report.ReportOptions(results=results, out=out))
  return tuple(
    (out / name).read_text(encoding="utf-8")
    for name in ("report.md", "index.html")
  )


@pytest.fixture(scope="module")
def invented(tmp_path_factory):
  place = tmp_path_factory.mktemp("invented")
  return made(write(place / "results", RECORDS), place / "out")


@pytest.fixture(scope="module")
def committed(tmp_path_factory):
  return made(
    report.ReportOptions().results, tmp_path_factory.mktemp("committed")
  )


class Page(html.parser.HTMLParser):
  """Tags, what they refer to, and the text of the cells of each row."""

  def __init__(self, text):
    super().__init__()
    self.tags, self.references, self.rows, self.open = [], [], [], []
    self.pictures = []
    self.feed(text)

  def handle_starttag(self, tag, attributes):
    self.tags.append(tag)
    named = dict(attributes)
    self.references += [named[k] for k in ("src", "href") if k in named]
    if tag not in ("meta", "img"):
      self.open.append(tag)
    if tag == "img":
      self.pictures.append(named)
    if tag == "tr":
      self.rows.append([])
    if tag in ("td", "th"):
      self.rows[-1].append("")

  def handle_endtag(self, tag):
    assert self.open.pop() == tag

  def handle_data(self, data):
    if self.open and self.open[-1] in ("td", "th"):
      self.rows[-1][-1] += data


def test_figures_of_single_runs_are_grouped_by_configuration(invented):
  lines = invented[0].splitlines()
  label = "| digits-sca-sparsity0.7 | 2 |"
  for row in (
    "90.00 ± 0.00 | 80.00 ± 0.00 | 71.00 ± 1.41 | 70.0 ± 0.0 |",
    "1.25 ± 0.00 | 2.00 ± 0.00 | 4,000 | 250 | 1,000 ± 1 |",
  ):
    assert f"{label} {row}" in lines


def test_text_is_measured_in_bits_a_character(invented):
  before, after = invented[0].split("Text, bits a character:")
  assert "charlm" not in before
  label = "| charlm-sca-sparsity0.7 | 2 |"
  cells = "1.000 ± 0.000 | 4.000 ± 0.000 | 2.000 ± 0.000 | 3.000 ± 0.000"
  row = f"{label} {cells} | 3.500 ± 0.707 | 70.0 ± 0.0 |"
  assert row in after.splitlines()


def test_figures_of_benchmarks(invented):
  lines = invented[0].splitlines()
  for row in (
    "| SCA, .5 | 2 | 50.00 ± 0.00 | 72.00 ± 2.83 | 50.0 ± 0.0 | 1.50 ± 0.00 |",
    "| TWN <b> | 1 | 50.00 | 73.00 | 40.0 | 1.55 |",
    "| SCA | 91.00 ± 1.41 (0.01) | 80.00 ± 0.00 (0.01, zeros 0.500) |",
    "| 0.9 in all | 1 | 12,345 | 90.0 | 50.00 | 70.00 |",
    "| 0.9, shared | 1 | 12,340 | 85.0 | 50.00 | 71.00 |",
    # arXiv 2004.01077; bits: -.452 log2 .452 - .548 log2 .548 + .548.
    "| EC2T-1 | 91.16 | 45.2 | ≤ 1.54 | arXiv 2004.01077 |",
  ):
    assert row in lines
  assert not any(line.startswith("| float | 0") for line in lines)


def test_published_figures_are_said_to_be_of_another_network(invented):
  assert "ResNet-20 are context, not a comparison" in invented[0]
  shown = Page(invented[1])
  alt = "Test accuracy over bits a weight: SCA, .5; TWN <b>."
  assert alt in [picture["alt"] for picture in shown.pictures]


def test_figures_at_paper_scale_lie_beside_published_ones(invented):
  text = invented[0].split("Paper scale: CIFAR-10, ResNet-20, cpu\n")[1]
  lines = text.split("\n## ")[0].splitlines()
  for row in (
    "| float | 1 | 50.00 | 90.00 | - | - | 91.67 |",
    "| EC2T, .45 | 2 | 50.00 ± 0.00 | 90.00 ± 1.41 | 45.0 ± 0.0 | 1.54 ± 0.00"
    " | 91.16 |",
    "| TWN | 1 | 50.00 | 88.00 | 40.0 | 1.55 | - |",
    "| EC2T-1 | 91.16 | 45.2 | ≤ 1.54 | arXiv 2004.01077 |",
  ):
    assert row in lines
  said = "Epochs of the float nets: 30; of each method after that: 20."
  assert any(line.endswith(said) for line in lines)
  assert "Published, trained otherwise:" in lines
  assert not any("not a comparison" in line for line in lines)


def test_records_tell_where_they_come_from(invented):
  rows = Page(invented[1]).rows
  heads = ["record", "command", "commit", "date", "method", "jax"]
  assert heads in rows
  assert [
    "digits-sca-sparsity0.7-seed1",
    "python -m experiments.digits --seed 1 --x 'a & b'",
    "c0ffee1",
    "2024-05-06",
    "SCA<script>alert(1)</script>",
    "0.10.2",
  ] in rows
  name = "accuracy_table-cifar10-resnet8"
  assert [name, "python -m x", "07; b5", "-", "-", "-"] in rows
  assert ["equal_sparsity-mnist-32-32", *["-"] * 5] in rows


@pytest.mark.parametrize("which", ["invented", "committed"])
def test_the_page_needs_nothing_else(which, request):
  text, whole = request.getfixturevalue(which)
  shown = Page(whole)
  assert shown.open == []
  assert not {"script", "link", "iframe", "object"} & set(shown.tags)
  for reference in shown.references:
    inside = reference[1:] in re.findall(r'id="(\w+)"', whole)
    assert reference.startswith("data:image/") or inside
  assert not re.search(r"https?:|url\(|@import", whole)
  assert shown.tags.count("h1") == 1
  assert all(picture["alt"] for picture in shown.pictures)
  # The same tables as in Markdown.
  lines = [line for line in text.splitlines() if line.startswith("|")]
  cells = [[c.strip() for c in line[1:-1].split("|")] for line in lines]
  ours = [[c.replace("\u00a0", " ") for c in row] for row in shown.rows]
  assert ours == [row for row in cells if set(row) != {"---"}]


def test_every_committed_record_is_in_the_report(committed):
  text, whole = committed
  rows = {row[0] for row in Page(whole).rows}
  results = sorted(report.ReportOptions().results.glob("*.json"))
  assert results
  for path in results:
    assert path.stem in rows
    found = json.loads(path.read_text())
    if path.stem.startswith("accuracy_table"):
      for label, runs in found.items():
        mean = sum(100 * r["test"] for r in runs) / max(len(runs), 1)
        assert not runs or re.search(
          rf"\| {re.escape(label)} \| {len(runs)} \|[^|]*\| {mean:.2f}", text
        )


@pytest.mark.parametrize(
  ("name", "content", "says"),
  [
    ("else", "{}", "lacks bits_per_weight"),
    ("else", "[1]", "lacks bits_per_weight"),
    ("else", "{", "lacks bits_per_weight"),
    (
      "accuracy_table-mnist",
      '{"a": [{"test": 1}]}',
      "lacks entropy, sparsity,",
    ),
    ("accuracy_table-mnist", '{"a": []}', "lacks entropy, sparsity, test"),
    ("equal_sparsity-mnist", '{"a": {"0.5": {}}}', "lacks rate, test, zeros"),
    ("budget-cifar10", '{"a": [{"test": 1}]}', "lacks bytes, sparsity"),
    ("paper_table-a", '{"a": [{"test": 1}]}', "lacks entropy, published"),
  ],
)
def test_an_unknown_file_is_named(tmp_path, name, content, says):
  (tmp_path / f"{name}.json").write_text(content)
  with pytest.raises(errors.UsageError) as error:
    report.read(tmp_path)
  assert f"{name}.json" in str(error.value)
  assert says in str(error.value)
  assert "Expected result.json of a run" in str(error.value)


def test_no_records(tmp_path, capsys):
  with pytest.raises(SystemExit):
    made(tmp_path, tmp_path / "out")
  assert f"{tmp_path} has no *.json: give --results." in capsys.readouterr().err
  assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("module", [report, page, tables, bench, build])
def test_doctests(module):
  failed, attempted = doctest.testmod(module)
  assert attempted
  assert not failed
