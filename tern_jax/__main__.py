"""The command `python -m tern_jax`: looks at checkpoints, compares, exports.

Exit status: 0 if all is well; 1 if leaves are damaged (inspect, verify) or
differ (diff); 2 if the command could not do its work, with one line that says
why.
"""

import argparse
import itertools
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from tern_jax import checkpoint, export, metrics
from tern_jax.checkpoint import CheckpointError
from tern_jax.storage.leaves import Json, Leaf
from tern_jax.storage.packed import PackedTernary, to_ternary

Options = argparse.Namespace
PATH = "a checkpoint, a step of a training run, or a run: its latest step"
LAYER = ("layer", "shape", "zeros", "bits", "entropy", "scales", "crc32")
DIFFERS = ("only_a", "only_b", "kinds", "others")
FLIPS = ("layer", "weights", "flips", "share", "+zeros", "-zeros", "signs", "")
VERIFY = (
  "Checks every array of a checkpoint. Damage to the arrays of a leaf is"
  " reported for this leaf; damage to the index that all leaves of a part"
  " share, for each of them, since any may be damaged."
)


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command of `argv`, or of the process; returns its exit status."""
  options = _parser().parse_args(argv)
  try:
    return options.run(options)
  except Exception as error:  # whatever a file holds: no traceback
    reason = " ".join(str(error).split())
    if not isinstance(error, ValueError | OSError | ImportError):
      reason = f"{type(error).__name__}: {reason}"
    print(f"tern_jax {options.command}: {reason}", file=sys.stderr)
    return 2


def _parser() -> argparse.ArgumentParser:
  about = "Looks at checkpoints of tern_jax."
  parser = argparse.ArgumentParser("python -m tern_jax", description=about)
  commands = parser.add_subparsers(dest="command", required=True)

  def add(task: Callable, text: str, *paths: str) -> Any:
    name = task.__name__.lstrip("_")
    command = commands.add_parser(name, help=text, description=text)
    command.set_defaults(run=task)
    for path in paths:
      command.add_argument(path, help=PATH)
    if task is not _export:
      command.add_argument("--json", action="store_true", help="for machines")
    return command

  add(_inspect, "Shows what a checkpoint holds, by layer.", "path")
  add(_verify, VERIFY, "path")
  add(_diff, "Counts the codes that flipped, by layer.", "a", "b")
  command = add(_export, "Writes a file for other runtimes.", "path")
  command.add_argument("out", help="file to write")
  command.add_argument("--to", choices=export.FORMATS, required=True)
  chain = (w.options.items() for w in export.FORMATS.values())
  for name, facts in dict(itertools.chain.from_iterable(chain)).items():
    flag = f"--{name.replace('_', '-')}"
    command.add_argument(flag, **{"default": argparse.SUPPRESS, **facts})
  command.add_argument("--overwrite", action="store_true")
  return parser


def _print(options: Options, report: Json, lines: Iterable[str]) -> None:
  """Prints the report as JSON, or the lines that say it as text."""
  print(json.dumps(report, indent=2) if options.json else "\n".join(lines))


def _table(*rows: tuple[str, ...]) -> Iterator[str]:
  """Yields columns as wide as they need; all but the first to the right."""
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  for first, *rest in rows:
    cells = map(str.rjust, rest, widths[1:])
    yield "  ".join([first.ljust(widths[0]), *cells]).rstrip()


def _inspect(options: Options) -> int:
  path = checkpoint.locate(options.path)
  spec, leaves = checkpoint.read_spec(path), checkpoint.examine(path)
  layers, others = [], []
  for entry in spec["leaves"]["packed"]:
    rows = layers if entry["kind"] == "ternary" else others
    rows.append(_row(entry, leaves[tuple(entry["path"])]))
  total = _total([x for x in layers if x["crc32"] == "ok"])
  report = {
    "path": str(path),
    **{k: spec[k] for k in ("format", "codec", "method", "versions")},
    "layers": layers,
    "others": others,
    "total": total,
  }
  lines = (
    f"{path}: {spec['method'] or 'no method'}, {spec['codec']}",
    *_table(LAYER, *map(_cells, layers)),
    *_total_lines(total),
    f"{len(others)} other arrays of {sum(x['bytes'] for x in others):,} bytes",
    *(f"  {x['path']}: {x['crc32']}" for x in others if x["crc32"] != "ok"),
  )
  _print(options, report, lines)
  return int(any(x["crc32"] != "ok" for x in layers + others))


def _row(entry: Json, leaf: Leaf | CheckpointError) -> Json:
  """Returns what there is to say about a leaf."""
  row = {
    "path": "/".join(entry["path"]),
    "shape": entry["shape"],
    "dtype": entry["dtype"],
    "bytes": checkpoint.stored_bytes(entry),
    "crc32": "damaged" if isinstance(leaf, CheckpointError) else "ok",
  }
  if not isinstance(leaf, PackedTernary):
    return row
  both = np.concatenate([np.ravel(leaf.w_p), np.ravel(leaf.w_n)])
  scales = both.astype(np.float64)
  return row | {
    "weights": leaf.size,
    "sparsity": float(metrics.sparsity(leaf)),
    "bits_per_weight": 8 * row["bytes"] / max(leaf.size, 1),
    "entropy": float(metrics.entropy(leaf)),
    "scales": {
      "shape": list(leaf.w_p.shape),
      "equal": bool(np.array_equal(leaf.w_p, leaf.w_n)),
      "min": float(scales.min()) if scales.size else None,
      "max": float(scales.max()) if scales.size else None,
    },
  }


def _total(layers: list[Json]) -> Json:
  """Returns the sums over layers that are whole."""
  n, stored = (sum(x[k] for x in layers) for k in ("weights", "bytes"))
  bound = sum(x["weights"] * x["entropy"] for x in layers) / 8
  return {
    "weights": n,
    "sparsity": sum(x["weights"] * x["sparsity"] for x in layers) / max(n, 1),
    "bytes": stored,
    "float32_bytes": 4 * n,
    "entropy_bytes": bound,
    "float32_ratio": 4 * n / max(stored, 1),
    "entropy_ratio": stored / bound if bound else None,
  }


def _cells(row: Json) -> tuple[str, ...]:
  facts = [""] * 4
  if x := row.get("scales"):
    ends = [f"{x[k]:.4g}" for k in ("min", "max") if x[k] is not None]
    scales = f"{_by(x['shape'], 'tensor')} {' to '.join(dict.fromkeys(ends))}"
    numbers = (row[k] for k in ("sparsity", "bits_per_weight", "entropy"))
    facts = [*(f"{x:.3f}" for x in numbers), scales]
  return row["path"], _by(row["shape"]), *facts, row["crc32"]


def _by(shape: Iterable[int], scalar: str = "") -> str:
  return "x".join(map(str, shape)) or scalar


def _total_lines(total: Json) -> Iterator[str]:
  n = max(total["weights"], 1)
  yield f"{total['weights']:,} weights, {total['sparsity']:.3f} of them zero"
  for name in ("float32", "stored", "entropy"):
    size = total["bytes" if name == "stored" else f"{name}_bytes"]
    yield f"  {name:8}{size:>16,.0f} bytes {8 * size / n:8.3f} bits a weight"
  if ratio := total["entropy_ratio"]:
    share = f"1 / {total['float32_ratio']:.2f} of float32"
    yield f"  stored is {share}, and {ratio:.3f} times the entropy"


def _verify(options: Options) -> int:
  path = checkpoint.locate(options.path)
  try:
    parts = checkpoint.read_spec(path)["leaves"]
    found = {part: checkpoint.examine(path, part) for part in parts}
  except CheckpointError as error:
    found = {"spec": {(): error}}
  faults = {
    "/".join((part, *keys)): str(leaf)
    for part, leaves in found.items()
    for keys, leaf in leaves.items()
    if isinstance(leaf, CheckpointError)
  }
  arrays = {part: len(leaves) for part, leaves in found.items()}
  counts = ", ".join(f"{n} of {part}" for part, n in arrays.items())
  whole = f"{path}: all leaves are as they were saved, {counts}"
  report = {"path": str(path), "leaves": arrays, "damaged": faults}
  _print(options, report, map(": ".join, faults.items()) if faults else [whole])
  return int(bool(faults))


def _diff(options: Options) -> int:
  a, b = (_whole(path) for path in (options.a, options.b))
  layers, changed, kinds = [], [], {}
  for keys in (k for k in a if k in b):
    name, x, y = "/".join(keys), a[keys], b[keys]
    if _kind(x) != _kind(y):
      kinds[name] = [_kind(x), _kind(y)]
    elif isinstance(x, PackedTernary):
      layers.append({"path": name, **_flips(x, y)})
    elif np.asarray(x).tobytes() != np.asarray(y).tobytes():
      changed.append(name)
  n, flips = (sum(x[k] for x in layers) for k in ("weights", "flips"))
  report = {
    "a": str(checkpoint.locate(options.a)),
    "b": str(checkpoint.locate(options.b)),
    "layers": layers,
    "flips": flips,
    "share": flips / max(n, 1),
    "only_a": ["/".join(k) for k in a if k not in b],
    "only_b": ["/".join(k) for k in b if k not in a],
    "kinds": kinds,
    "others": changed,
  }
  _print(options, report, _diff_lines(report))
  flipped = any(x["flips"] or x["magnitudes"] for x in layers)
  return int(flipped or any(map(report.get, DIFFERS)))


def _whole(path: str) -> dict[tuple[str, ...], Any]:
  """Returns the leaves of a checkpoint, none of them damaged."""
  leaves = checkpoint.examine(path)
  for leaf in leaves.values():
    if isinstance(leaf, CheckpointError):
      raise leaf
  return leaves


def _kind(leaf: Leaf) -> str:
  kind = "ternary " if isinstance(leaf, PackedTernary) else ""
  return f"{kind}{leaf.dtype} {_by(leaf.shape, '0-d')}"


def _flips(x: PackedTernary, y: PackedTernary) -> Json:
  """Counts what changed from one to the other."""
  old, new = (np.asarray(to_ternary(leaf).codes) for leaf in (x, y))
  flips = int(np.sum(old != new))
  same = all(np.array_equal(p, q) for p, q in ((x.w_p, y.w_p), (x.w_n, y.w_n)))
  return {
    "weights": old.size,
    "flips": flips,
    "share": flips / max(old.size, 1),
    "zeros_added": int(np.sum((old != 0) & (new == 0))),
    "zeros_removed": int(np.sum((old == 0) & (new != 0))),
    "signs": int(np.sum(old * new == -1)),
    "magnitudes": not same,
  }


def _diff_lines(report: Json) -> Iterator[str]:
  def cells(x: Json) -> tuple[str, ...]:
    signed = (f"{x[k]:,}" for k in ("zeros_added", "zeros_removed", "signs"))
    other = "other magnitudes" if x["magnitudes"] else ""
    counts = f"{x['weights']:,}", f"{x['flips']:,}", f"{x['share']:.4%}"
    return x["path"], *counts, *signed, other

  yield from _table(FLIPS, *map(cells, report["layers"]))
  yield f"{report['flips']:,} codes flipped, {report['share']:.4%}"
  for side in ("a", "b"):
    yield from (f"{x}: only in {report[side]}" for x in report[f"only_{side}"])
  for name, kinds in report["kinds"].items():
    yield f"{name}: {' became '.join(kinds)}"
  yield from (f"{name}: other values" for name in report["others"])


def _export(options: Options) -> int:
  writer = export.FORMATS[options.to]
  if writer.write is None:
    raise ValueError(writer.refusal)
  given = {k: v for k, v in vars(options).items() if k in writer.options}
  tree = checkpoint.load_packed(options.path)
  errors = writer.write(options.out, tree, overwrite=options.overwrite, **given)
  for name, error in (errors or {}).items():
    print(f"{name}: relative RMS error {error:.1e}")
  return 0


def run() -> int:
  """Runs the command for a process of its own, and returns its exit status."""
  # Looking at a file must not take the accelerator of a training beside it.
  jax.config.update("jax_platforms", "cpu")
  return main()


if __name__ == "__main__":
  sys.exit(run())
