"""Tables, pictures and one page of the results, from their records.

  python -m experiments.report
  python -m experiments.report --results runs/mine --out runs/my_report

Reads every *.json under --results, trains nothing and needs no data. --out gets
`report.md`, which is printed too, the pictures, and `index.html`, which has all
in it and needs no other file.
"""

import dataclasses
import json
import math
import re
import statistics
from pathlib import Path
from typing import Any

import tyro

from experiments.common import bench, errors, files, lock, page
from experiments.common.build import title_of
from experiments.common.plots import compare
from experiments.common.tables import Column, Table, summary

TITLE = "Results of tern_jax"
INTRODUCTION = (
  "Sparse ternary networks. Accuracy on the test split, which is read once a"
  " run, at its end: mean ± standard deviation over seeds."
)
#: Of single runs of images.
OF_IMAGES = (
  Column("float %", "float", 100),
  Column("ternary %", "unrounded", 100),
  Column("packed %", "packed", 100),
  Column("zeros %", "sparsity", 100, ".1f"),
)
#: The same of text, in bits a character, of both splits.
OF_TEXT = (
  Column("validation, float", "validation_float", form=".3f"),
  Column("validation, ternary", "validation_rounded", form=".3f"),
  Column("test, float", "float", form=".3f"),
  Column("test, ternary", "unrounded", form=".3f"),
  Column("test, packed", "packed", form=".3f"),
  Column("zeros %", "sparsity", 100, ".1f"),
)
SIZES = (
  Column("entropy, bit/weight", "entropy_bits_per_weight"),
  Column("packed, bit/weight", "bits_per_weight"),
  Column("float32, bytes", "float_bytes", form=",.0f"),
  Column("packed, bytes", "packed_bytes", form=",.0f"),
  Column("on disk, bytes", "disk_bytes", form=",.0f"),
)
#: What the parts of a record must have, by the first word of its file's name.
EXPECTED = {
  "accuracy_table": {column.key for column in bench.ACCURACY},
  "paper_table": {"published", *(column.key for column in bench.ACCURACY)},
  "equal_sparsity": {"rate", "test", "zeros"},
  "budget": {column.key for column in bench.BUDGET},
  "one_line": {column.key for column in bench.ONE_LINE},
}
#: The same of every other file.
OF_A_RUN = {"correct", "total", "sparsity", *(c.key for c in SIZES)}
#: What a record may tell of where it comes from.
PROVENANCE = (
  *("command", "commit", "date", "method"),
  *("seconds", "jax", "devices"),
)


@dataclasses.dataclass(frozen=True)
class ReportOptions:
  """Command line of the report."""

  results: Path = Path(__file__).parent / "results"
  """Where the records lie."""
  out: Path = Path("runs/report")
  """Directory to write to."""


def main(options: ReportOptions) -> None:
  """Writes the report, and prints its tables."""
  with errors.explained():
    records = read(options.results)
    # Pictures are written, read, and put into the page.
    with lock.held(options.out):
      sections = build(records, options.results, options.out)
      text = page.markdown(TITLE, INTRODUCTION, sections)
      whole = page.html_page(TITLE, INTRODUCTION, sections, options.out)
      files.write(options.out / "report.md", text)
      files.write(options.out / "index.html", whole)
    print(f"{text}\n{(options.out / 'index.html').resolve()}")


def read(results: Path) -> dict[str, Any]:
  """Reads {name of a file: its record}.

  Args:
    results: directory.

  Raises:
    UsageError: it has no records, or a file that is none of a known kind.
  """
  records = {}
  for path in sorted(results.glob("*.json")):
    kind = path.stem.split("-")[0]
    expected = EXPECTED.get(kind, OF_A_RUN)
    try:
      records[path.stem] = record = json.loads(path.read_text(encoding="utf-8"))
      parts = [record]
      if kind in EXPECTED:
        parts = [part for row in record.values() for part in row]
      if kind == "equal_sparsity":
        parts = [part for row in record.values() for part in row.values()]
      lacking = set().union(*(expected - part.keys() for part in parts))
    except (ValueError, AttributeError, TypeError):
      parts, lacking = [], set()
    if lacking or not parts:
      names = ", ".join(sorted(lacking or expected))
      raise errors.UsageError(
        f"{path} is no record that this report knows: it lacks {names}."
        f" Expected result.json of a run, or table.json of a benchmark under"
        f" the benchmark's name: {', '.join(EXPECTED)}."
      )
  if not records:
    raise errors.UsageError(f"{results} has no *.json: give --results.")
  return records


def build(
  records: dict[str, Any], results: Path, out: Path
) -> list[page.Section]:
  """Makes the sections, and draws their pictures.

  Args:
    records: {name: record}.
    results: directory of the records, which may hold histograms of runs too.
    out: where pictures go.
  """
  runs: dict[str, list[Any]] = {}
  sections = []
  for name, record in records.items():
    kind, *parts = name.split("-")
    if kind == "accuracy_table":
      sections.append(side_by_side(name, record, out))
    elif kind == "paper_table":
      sections.append(at_scale(name, record, out))
    elif kind == "equal_sparsity":
      sections.append(same_sparsity(name, record, out))
    elif kind == "budget":
      table = summary(record, bench.BUDGET, "Test accuracy")
      text = (
        "One sparsity in all layers, against the same bytes shared over them."
        " Sizes are those of whole models at the entropy of their weights."
      )
      title = f"The same bytes: {named(*parts)}"
      sections.append(page.Section(title, [text], [table]))
    elif kind == "one_line":
      text = (
        "A float script that becomes ternary by its optimizer alone. Weights"
        " are at their code when they are within 2 % of it."
      )
      table = summary(record, bench.ONE_LINE, "Accuracy, zeros of each layer")
      title = f"One line: {named(*parts)}"
      sections.append(page.Section(title, [text], [table]))
    else:
      runs.setdefault(re.sub(r"-seed\d+$", "", name), []).append(record)
  if runs:
    sections.insert(0, single_runs(runs, results, out))
  return [*sections, provenance(records)]


def single_runs(
  groups: dict[str, list[Any]], results: Path, out: Path
) -> page.Section:
  """Sets single runs side by side, the seeds of a configuration in one row."""
  images, texts = {}, {}
  for group, runs in groups.items():
    is_text = all("text_sha256" in run for run in runs)
    rows = [run | (bits(run) if is_text else shares(run)) for run in runs]
    (texts if is_text else images)[group] = rows
  tables = [
    summary(part, columns, title)
    for title, part, columns in (
      ("Test accuracy", images, OF_IMAGES),
      ("Text, bits a character", texts, OF_TEXT),
      ("Size", images | texts, SIZES),
    )
    if part
  ]
  section = page.Section(
    "Single runs",
    [
      "A float net, the ternary net as trained, and its packed file as a fresh"
      " process loads it. Sizes are those of whole models, biases included."
    ],
    tables,
  )
  for data in dict.fromkeys(group.split("-")[0] for group in groups):
    picture = f"{data}_histograms.png"
    if (results / picture).exists():
      files.write(out / picture, (results / picture).read_bytes())
      text = f"{data}: weights of each layer on their way to -1, 0 and 1."
      section.pictures.append(page.Picture(picture, text, text))
  return section


def shares(run: dict[str, Any]) -> dict[str, float]:
  """Returns the share of right answers of each net.

  >>> shares({"correct": {"float": 9}, "total": 10})
  {'float': 0.9}
  """
  return {key: hits / run["total"] for key, hits in run["correct"].items()}


def bits(run: dict[str, Any]) -> dict[str, float]:
  """Returns the loss of each net in bits, by its name and its split.

  >>> nats = {"float": math.log(8)}
  >>> found = bits({"loss": nats, "validation_loss": nats})
  >>> {key: round(value, 6) for key, value in found.items()}
  {'float': 3.0, 'validation_float': 3.0}
  """
  seen = {f"validation_{k}": x for k, x in run["validation_loss"].items()}
  nats = run["loss"] | seen
  return {key: value / math.log(2) for key, value in nats.items()}


def side_by_side(name: str, record: dict[str, Any], out: Path) -> page.Section:
  """Shows an accuracy_table, and what papers say of the same data."""
  _, data, *model = name.split("-")
  table = {label: runs for label, runs in record.items() if runs}
  section = page.Section(
    f"Methods side by side: {named(data, *model)}",
    [
      "Every method continues the float net of its seed, at its own sparsity."
      " The float row is trained for the epochs of both."
    ],
    [summary(table, bench.ACCURACY, "Measured")],
  )
  if data in bench.PUBLISHED:
    net, figures = bench.PUBLISHED[data]
    section.text.append(
      f"Published figures of {net} are context, not a comparison: the network"
      " is deeper and trained for longer (EC2T: 35 epochs from a converged"
      " float net, the checkpoint picked by test accuracy in its authors'"
      " code)."
    )
    section.tables.append(published(net, figures, "of another network"))
  section.pictures.append(over_bits(name, named(*model), data, table, out))
  return section


def at_scale(name: str, record: dict[str, Any], out: Path) -> page.Section:
  """Shows a paper_table, and what papers say of the same network."""
  _, data, model, *preset = name.split("-")
  table = bench.paper(record)
  table.caption = "Measured"
  floats, ternary = (
    " or ".join(told(record, key)) or "-" for key in ("float_epochs", "epochs")
  )
  section = page.Section(
    f"Paper scale: {named(data, model, *preset)}",
    [
      "Every method continues the float net of its seed. Epochs of the float"
      f" nets: {floats}; of each method after that: {ternary}."
    ],
    [table],
  )
  if data in bench.PUBLISHED:
    net, figures = bench.PUBLISHED[data]
    section.text.append(
      "Published figures are of the same network, trained otherwise (EC2T: 35"
      " epochs from a converged float net, the checkpoint picked by test"
      " accuracy in its authors' code)."
    )
    section.tables.append(published(net, figures, "trained otherwise"))
  section.pictures.append(over_bits(name, named(model), data, record, out))
  return section


def over_bits(
  name: str, net: str, data: str, table: dict[str, Any], out: Path
) -> page.Picture:
  """Draws accuracy over bits a weight, measured and published."""
  panels: dict[str, Any] = {
    f"{net}, measured": {
      label: [(run["entropy"], 100 * run["test"]) for run in runs]
      for label, runs in table.items()
    }
  }
  caption = "Higher is more accurate, further left is smaller."
  if data in bench.PUBLISHED:
    theirs, figures = bench.PUBLISHED[data]
    points = {f.label: [(most_entropy(f.zeros), f.test)] for f in figures}
    panels = {f"{theirs}, published": points} | panels
    caption += (
      f" Hollow: published, of {theirs}, at the most bits that its share of"
      " zeros can have; dotted where no such share is told."
    )
  compare.accuracy_over_bits(panels, out / f"{name}.svg")
  alt = f"Test accuracy over bits a weight: {'; '.join(table)}."
  return page.Picture(f"{name}.svg", alt, caption)


def published(net: str, figures: tuple[bench.Figure, ...], how: str) -> Table:
  """Returns a table of what papers say of a network.

  Args:
    net: its title.
    figures: what they say.
    how: it differs from ours.
  """
  table = Table(
    (net, "test %", "zeros %", "bit/weight", "source"),
    caption=f"Published, {how}",
  )
  for label, test, zeros, source in figures:
    most = most_entropy(zeros)
    shown = ("-", "-") if most is None else (f"{zeros}", f"≤ {most:.2f}")
    table.rows.append((label, f"{test:.2f}", *shown, source))
  return table


def same_sparsity(name: str, record: dict[str, Any], out: Path) -> page.Section:
  """Shows an equal_sparsity."""
  _, data, *net = name.split("-")
  asked = tuple(float(share) for share in next(iter(record.values())))
  # By the zeros that were reached: one shot misses what was asked for.
  lines = {
    label: {
      statistics.fmean(cell["zeros"]): [100 * x for x in cell["test"]]
      for cell in row.values()
    }
    for label, row in record.items()
  }
  compare.accuracy_over_sparsity(lines, out / f"{name}.svg")
  alt = f"Test accuracy over zeros: {'; '.join(record)}."
  caption = (
    "Mean and standard deviation over seeds. Both axes are logarithmic in what"
    " is left: weights, and errors."
  )
  table = bench.equal_sparsity(record, asked)
  table.caption = "Test accuracy"
  zeros = "all layers together" if "across" in net else "every layer"
  return page.Section(
    f"The same sparsity: {named(data)}, {network(*net)}",
    [
      "All methods from scratch, for the same epochs, with the same share of"
      f" zeros in {zeros}. Behind each figure is the learning rate, chosen"
      " by validation accuracy."
    ],
    [table],
    [page.Picture(f"{name}.svg", alt, caption)],
  )


def named(*parts: str) -> str:
  """Returns parts of a file's name as a title shows them.

  >>> named("cifar10", "resnet8")
  'CIFAR-10, ResNet-8'
  """
  return ", ".join(map(title_of, parts))


def network(*parts: str) -> str:
  """Returns a network of `equal_sparsity`, by parts of a file's name.

  >>> network("32", "32")
  'MLP 32-32'
  >>> network("convnet", "16", "32", "stem", "head")
  'ConvNet 16-32, stem and head float'
  >>> network("512", "512", "bare", "across")
  'MLP 512-512, without norm'
  """
  widths = "-".join(part for part in parts if part.isdigit())
  words = [part for part in parts if not part.isdigit()]
  model = "ConvNet" if "convnet" in words else "MLP"
  others = {"convnet", "bare", "across"}
  floats = " and ".join(word for word in words if word not in others)
  said = [f"{model} {widths}"]
  if floats:
    said.append(f"{floats} float")
  if "bare" in words:
    said.append("without norm")
  return ", ".join(said)


def most_entropy(zeros: float | None) -> float | None:
  """Returns the bits a weight where -1 and +1 are equally frequent.

  Args:
    zeros: in %, above 0 and below 100; None where not told, as is then what
      is returned.

  >>> most_entropy(50)
  1.5
  """
  if zeros is None:
    return None
  share, signs = zeros / 100, 1 - zeros / 100
  return signs - share * math.log2(share) - signs * math.log2(signs)


def provenance(records: dict[str, Any]) -> page.Section:
  """Tells of each record where it comes from, as far as it says."""
  table = []
  for name, record in records.items():
    row = {key: "; ".join(told(record, key)) for key in PROVENANCE}
    table.append({"record": name, **row})
  known = [key for key in table[0] if any(row[key] for row in table)]
  rows = [tuple(row[key] or "-" for key in known) for row in table]
  whole = Table(tuple(known), rows, "Of each file")
  return page.Section("Records", tables=[whole])


def told(record: Any, key: str) -> list[str]:
  """Returns what a record has under a key, at any depth, each value once.

  >>> told({"commit": "07", "runs": [{"commit": "b5"}] * 2}, "commit")
  ['07', 'b5']
  """
  found = []
  if isinstance(record, dict):
    found = [str(record[key])] if record.get(key) is not None else []
    record = list(record.values())
  if isinstance(record, list):
    found += [value for part in record for value in told(part, key)]
  return list(dict.fromkeys(found))


if __name__ == "__main__":
  with errors.explained():
    main(tyro.cli(ReportOptions, description=__doc__))
