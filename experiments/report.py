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

from experiments.benchmarks import accuracy_table, budget, equal_sparsity
from experiments.common import cli, evaluate, page, plot

TITLE = "Results of tern_jax"
INTRODUCTION = (
  "Sparse ternary networks. Accuracy on the test split, which is read once a"
  " run, at its end: mean ± standard deviation over seeds."
)
NAMES = {"mnist": "MNIST", "cifar10": "CIFAR-10", "cifar100": "CIFAR-100"}
NAMES |= {"fashion_mnist": "Fashion-MNIST"}
NAMES |= {"lenet5": "LeNet-5", "vgg_small": "VGG-small"}
NAMES |= {"imagenet2012": "ImageNet", "micronet": "MicroNet"}
NAMES |= {
  f"resnet{depth}": f"ResNet-{depth}" for depth in (8, 18, 20, 32, 44, 50, 56)
}
#: Columns of the tables of single runs, as those of `accuracy_table`.
COLUMNS = (
  ("float %", "float", 100, ".2f"),
  ("ternary %", "unrounded", 100, ".2f"),
  ("packed %", "packed", 100, ".2f"),
  ("zeros %", "sparsity", 100, ".1f"),
)
#: The same of text, in bits a character, of both splits.
OF_TEXT = (
  ("validation, float", "validation_float", 1, ".3f"),
  ("validation, ternary", "validation_rounded", 1, ".3f"),
  ("test, float", "float", 1, ".3f"),
  ("test, ternary", "unrounded", 1, ".3f"),
  ("test, packed", "packed", 1, ".3f"),
  ("zeros %", "sparsity", 100, ".1f"),
)
SIZES = (
  ("entropy, bit/weight", "entropy_bits_per_weight", 1, ".2f"),
  ("packed, bit/weight", "bits_per_weight", 1, ".2f"),
  ("float32, bytes", "float_bytes", 1, ",.0f"),
  ("packed, bytes", "packed_bytes", 1, ",.0f"),
  ("on disk, bytes", "disk_bytes", 1, ",.0f"),
)
#: What the parts of a record must have, by the first word of its file's name.
EXPECTED = {
  "accuracy_table": {key for _, key, *_ in accuracy_table.COLUMNS},
  "equal_sparsity": {"rate", "test", "zeros"},
  "budget": {key for _, key, *_ in budget.COLUMNS},
}
#: The same of every other file.
OF_A_RUN = {"correct", "total", "sparsity", *(key for _, key, *_ in SIZES)}
#: What a record may tell of where it comes from.
PROVENANCE = (
  *("command", "commit", "date", "method"),
  *("seconds", "jax", "devices"),
)
#: {data set: (network, how it differs from ours, (label, test accuracy and
#: zeros in %, None where not told, source))}
PUBLISHED: dict[str, tuple[str, str, tuple[Any, ...]]] = {
  "cifar10": (
    "ResNet-20",
    "Published figures of ResNet-20 are context, not a comparison: the network"
    " is deeper and trained for longer (EC2T: 35 epochs from a converged float"
    " net, the checkpoint picked by test accuracy in its authors' code).",
    (
      ("float", 91.67, None, "arXiv 2004.01077"),
      ("TTQ", 91.13, None, "arXiv 1612.01064"),
      ("EC2T-1", 91.16, 45.2, "arXiv 2004.01077"),
      ("EC2T-2", 91.01, 63.9, "arXiv 2004.01077"),
      ("EC2T-3", 90.76, 73.3, "arXiv 2004.01077"),
      ("TGA", 90.39, None, "arXiv 1810.01018, cited by arXiv 2004.01077"),
    ),
  )
}


@dataclasses.dataclass(frozen=True)
class Options:
  """Command line of the report."""

  results: Path = Path(__file__).parent / "results"
  """Where the records lie."""
  out: Path = Path("runs/report")
  """Directory to write to."""


def main(options: Options) -> None:
  """Writes the report, and prints its tables."""
  with evaluate.explained_errors():
    records = read(options.results)
  options.out.mkdir(parents=True, exist_ok=True)
  sections = build(records, options.results, options.out)
  text = page.markdown(TITLE, INTRODUCTION, sections)
  whole = page.html_page(TITLE, INTRODUCTION, sections, options.out)
  (options.out / "report.md").write_text(text, encoding="utf-8")
  (options.out / "index.html").write_text(whole, encoding="utf-8")
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
      raise cli.UsageError(
        f"{path} is no record that this report knows: it lacks {names}."
        f" Expected result.json of a run, or table.json of a benchmark under"
        f" the benchmark's name: {', '.join(EXPECTED)}."
      )
  if not records:
    raise cli.UsageError(f"{results} has no *.json: give --results.")
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
    elif kind == "equal_sparsity":
      sections.append(same_sparsity(name, record, out))
    elif kind == "budget":
      rows = page.cells(accuracy_table.markdown(record, budget.COLUMNS))
      text = (
        "One sparsity in all layers, against the same bytes shared over them."
        " Sizes are those of whole models at the entropy of their weights."
      )
      title = f"The same bytes: {named(*parts)}"
      sections.append(page.Section(title, [text], [("Test accuracy", rows)]))
    else:
      runs.setdefault(re.sub(r"-seed\d+$", "", name), []).append(record)
  if runs:
    sections.insert(0, single_runs(runs, results, out))
  return [*sections, provenance(records)]


def single_runs(
  groups: dict[str, list[Any]], results: Path, out: Path
) -> page.Section:
  """Sets single runs side by side, the seeds of a configuration in one row."""
  images, texts, table = {}, {}, {}
  for group, runs in groups.items():
    is_text = all("text_sha256" in run for run in runs)
    rows = [run | (bits(run) if is_text else shares(run)) for run in runs]
    (texts if is_text else images)[group] = table[group] = rows
  tables = [
    (title, page.cells(accuracy_table.markdown(part, columns)))
    for title, part, columns in (
      ("Test accuracy", images, COLUMNS),
      ("Text, bits a character", texts, OF_TEXT),
      ("Size", table, SIZES),
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
      (out / picture).write_bytes((results / picture).read_bytes())
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
    [("Measured", page.cells(accuracy_table.markdown(table)))],
  )
  panels: dict[str, Any] = {
    f"{named(*model)}, measured": {
      label: [(run["entropy"], 100 * run["test"]) for run in runs]
      for label, runs in table.items()
    }
  }
  caption = "Higher is more accurate, further left is smaller."
  if data in PUBLISHED:
    net, note, figures = PUBLISHED[data]
    head = (net, "test %", "zeros %", "bit/weight", "source")
    rows: page.Rows = [head]
    points = {}
    for label, test, zeros, source in figures:
      bits = None if zeros is None else most_entropy(zeros / 100)
      shown = ("-", "-") if bits is None else (f"{zeros}", f"≤ {bits:.2f}")
      rows.append((label, f"{test:.2f}", *shown, source))
      points[label] = [(bits, test)]
    section.text.append(note)
    section.tables.append(("Published, of another network", rows))
    panels = {f"{net}, published": points} | panels
    caption += (
      f" Hollow: published, of {net}, at the most bits that its share of zeros"
      " can have; dotted where no such share is told."
    )
  plot.accuracy_over_bits(panels, out / f"{name}.svg")
  alt = f"Test accuracy over bits a weight: {'; '.join(table)}."
  section.pictures.append(page.Picture(f"{name}.svg", alt, caption))
  return section


def same_sparsity(name: str, record: dict[str, Any], out: Path) -> page.Section:
  """Shows an equal_sparsity."""
  _, data, *net = name.split("-")
  shares = tuple(float(share) for share in next(iter(record.values())))
  # By the zeros that were reached: one shot misses what was asked for.
  lines = {
    label: {
      statistics.fmean(cell["zeros"]): [100 * x for x in cell["test"]]
      for cell in row.values()
    }
    for label, row in record.items()
  }
  plot.accuracy_over_sparsity(lines, out / f"{name}.svg")
  alt = f"Test accuracy over zeros: {'; '.join(record)}."
  caption = (
    "Mean and standard deviation over seeds. Both axes are logarithmic in what"
    " is left: weights, and errors."
  )
  rows = page.cells(equal_sparsity.markdown(record, shares))
  zeros = "all layers together" if "across" in net else "every layer"
  return page.Section(
    f"The same sparsity: {named(data)}, {network(*net)}",
    [
      "All methods from scratch, for the same epochs, with the same share of"
      f" zeros in {zeros}. Behind each figure is the learning rate, chosen"
      " by validation accuracy."
    ],
    [("Test accuracy", rows)],
    [page.Picture(f"{name}.svg", alt, caption)],
  )


def named(*parts: str) -> str:
  """Returns parts of a file's name for people.

  >>> named("cifar10", "resnet8")
  'CIFAR-10, ResNet-8'
  """
  return ", ".join(NAMES.get(part, part) for part in parts)


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
  told = [f"{model} {widths}"]
  if floats:
    told.append(f"{floats} float")
  if "bare" in words:
    told.append("without norm")
  return ", ".join(told)


def most_entropy(zeros: float) -> float:
  """Returns the bits a weight where -1 and +1 are equally frequent.

  Args:
    zeros: share, above 0 and below 1.

  >>> most_entropy(0.5)
  1.5
  """
  signs = 1 - zeros
  return signs - zeros * math.log2(zeros) - signs * math.log2(signs)


def provenance(records: dict[str, Any]) -> page.Section:
  """Tells of each record where it comes from, as far as it says."""
  table = []
  for name, record in records.items():
    row = {key: "; ".join(told(record, key)) for key in PROVENANCE}
    table.append({"record": name, **row})
  known = [key for key in table[0] if any(row[key] for row in table)]
  rows = [tuple(row[key] or "-" for key in known) for row in table]
  return page.Section(
    "Records", tables=[("Of each file", [tuple(known), *rows])]
  )


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
  main(tyro.cli(Options, description=__doc__))
