"""What inspect, verify and diff find out, as JSON and as text."""

import argparse
import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from tern_jax.checkpoint import CheckpointError
from tern_jax.cli import sources
from tern_jax.cli.output import by, show, table
from tern_jax.cli.sources import Item, Source
from tern_jax.storage.leaves import Json, Leaf
from tern_jax.storage.packed import PackedTernary, to_ternary

Options = argparse.Namespace
_LAYER = ("layer", "shape", "zeros", "bits", "entropy", "scales")
_DIFFERS = ("only_a", "only_b", "kinds", "others")
_FLIPS = ("layer", "weights", "flips", "share", "+zeros", "-zeros", "signs", "")


def inspect(options: Options) -> int:
  """Shows what there is, by layer; returns 1 if a leaf is damaged."""
  source = sources.read(sources.find(options.path))
  # A GGUF file has no checksums.
  check = "values" if source.kind == "gguf" else "crc32"
  layers, others = [], []
  for item in source.items:
    rows = layers if item.is_ternary else others
    rows.append(_row(item, check))
  total = _total([x for x in layers if x[check] == "ok"])
  report = {
    "kind": source.kind,
    "path": str(source.path),
    **source.facts,
    "layers": layers,
    "others": others,
    "total": total,
  }
  lines = (
    f"{source.path}: {source.title}",
    *table((*_LAYER, check), *(_cells(x, check) for x in layers)),
    *_total_lines(total),
    f"{len(others)} other arrays of {sum(x['bytes'] for x in others):,} bytes",
    *(f"  {x['path']}: {x[check]}" for x in others if x[check] != "ok"),
  )
  show(report, lines, options.json)
  return int(any(x[check] != "ok" for x in layers + others))


def _row(item: Item, check: str) -> Json:
  """Returns what there is to say about a leaf."""
  leaf = item.leaf
  row: Json = {
    "path": item.name,
    "shape": item.shape,
    "dtype": item.dtype,
    "bytes": item.nbytes,
    check: "damaged" if isinstance(leaf, CheckpointError) else "ok",
  }
  if item.type:
    row["type"] = item.type
  if not isinstance(leaf, PackedTernary):
    return row
  both = np.concatenate([np.ravel(leaf.w_p), np.ravel(leaf.w_n)])
  scales = both.astype(np.float64)
  sparsity, entropy = _sparsity_and_entropy(leaf)
  return row | {
    "weights": leaf.size,
    "sparsity": sparsity,
    "bits_per_weight": 8 * item.nbytes / max(leaf.size, 1),
    "entropy": entropy,
    "scales": {
      "shape": list(leaf.w_p.shape),
      "equal": bool(np.array_equal(leaf.w_p, leaf.w_n)),
      "min": _number(scales.min()) if scales.size else None,
      "max": _number(scales.max()) if scales.size else None,
    },
  }


def _sparsity_and_entropy(x: PackedTernary) -> tuple[float, float]:
  """Returns both by counting bits: codes would take eight times the memory."""
  nonzero, negative = (
    int(np.bitwise_count(plane).sum(dtype=np.int64))
    for plane in (np.asarray(x.nonzero), np.asarray(x.sign))
  )
  counts = x.size - nonzero, nonzero - negative, negative
  shares = [n / max(x.size, 1) for n in counts]
  return shares[0], sum(p * -math.log2(p) for p in shares if p > 0)


def _number(x: np.floating) -> float | str:
  """Returns a number, or its name where JSON has none."""
  return float(x) if math.isfinite(x) else str(x)


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


def _cells(row: Json, check: str) -> tuple[str, ...]:
  facts = [""] * 4
  if x := row.get("scales"):
    ends = [f"{float(x[k]):.4g}" for k in ("min", "max") if x[k] is not None]
    scales = f"{by(x['shape'], 'tensor')} {' to '.join(dict.fromkeys(ends))}"
    numbers = (row[k] for k in ("sparsity", "bits_per_weight", "entropy"))
    facts = [*(f"{x:.3f}" for x in numbers), scales]
  return row["path"], by(row["shape"]), *facts, row[check]


def _total_lines(total: Json) -> Iterator[str]:
  n = max(total["weights"], 1)
  yield f"{total['weights']:,} weights, {total['sparsity']:.3f} of them zero"
  for name in ("float32", "stored", "entropy"):
    size = total["bytes" if name == "stored" else f"{name}_bytes"]
    yield f"  {name:8}{size:>16,.0f} bytes {8 * size / n:8.3f} bits a weight"
  if ratio := total["entropy_ratio"]:
    share = f"1 / {total['float32_ratio']:.2f} of float32"
    yield f"  stored is {share}, and {ratio:.3f} times the entropy"


def verify(options: Options) -> int:
  """Checks all arrays; returns 1 if something is damaged."""
  found = sources.find(options.path)
  if options.sha256 and found.kind == "gguf":
    raise ValueError(
      f"{found.path} is a GGUF file, which is no content that --sha256 knows:"
      " give what it was exported from."
    )
  try:
    parts = sources.parts(found)
  except ValueError as error:
    name = "spec" if found.kind == "checkpoint" else "header"
    parts = {name: {(): CheckpointError(error)}}
  faults = {
    "/".join((part, *keys)): str(leaf)
    for part, leaves in parts.items()
    for keys, leaf in leaves.items()
    if isinstance(leaf, CheckpointError)
  }
  arrays = {part: len(leaves) for part, leaves in parts.items()}
  report: Json = {"kind": found.kind, "path": str(found.path)}
  report |= {"leaves": arrays, "damaged": faults}
  lines = [": ".join(fault) for fault in faults.items()]
  if not faults:
    lines = [_whole_line(found, arrays)]
    if options.sha256:
      report["sha256"] = sources.sha256_of(found)
      lines.append(f"sha256 {report['sha256']}")
  show(report, lines, options.json)
  return int(bool(faults))


def _whole_line(found: sources.Found, arrays: dict[str, int]) -> str:
  if found.kind == "gguf":
    whole = f"{arrays['packed']} tensors are complete, and all values finite"
    return f"{found.path}: {whole}; a GGUF file has no checksums"
  counts = ", ".join(f"{n} of {part}" for part, n in arrays.items())
  return f"{found.path}: all leaves are as they were saved, {counts}"


def diff(options: Options) -> int:
  """Counts the codes that flipped; returns 1 if anything differs."""
  old, new = (sources.read(sources.find(x)) for x in (options.a, options.b))
  if old.kind != new.kind and "gguf" in (old.kind, new.kind):
    raise ValueError(
      "a GGUF file has names and axes of its own: compare it with another"
      f" GGUF file, got {old.path} and {new.path}."
    )
  a, b = _whole(old), _whole(new)
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
    "kind": {"a": old.kind, "b": new.kind},
    "a": str(old.path),
    "b": str(new.path),
    "layers": layers,
    "flips": flips,
    "share": flips / max(n, 1),
    "only_a": ["/".join(k) for k in a if k not in b],
    "only_b": ["/".join(k) for k in b if k not in a],
    "kinds": kinds,
    "others": changed,
  }
  show(report, _diff_lines(report), options.json)
  flipped = any(x["flips"] or x["magnitudes"] for x in layers)
  return int(flipped or any(map(report.get, _DIFFERS)))


def _whole(source: Source) -> dict[tuple[str, ...], Any]:
  """Returns the leaves, none of them damaged."""
  leaves = {}
  for item in source.items:
    if isinstance(item.leaf, CheckpointError):
      raise item.leaf
    leaves[item.keys] = item.leaf
  return leaves


def _kind(leaf: Leaf) -> str:
  kind = "ternary " if isinstance(leaf, PackedTernary) else ""
  return f"{kind}{leaf.dtype} {by(leaf.shape, '0-d')}"


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

  yield from table(_FLIPS, *map(cells, report["layers"]))
  yield f"{report['flips']:,} codes flipped, {report['share']:.4%}"
  for side in ("a", "b"):
    yield from (f"{x}: only in {report[side]}" for x in report[f"only_{side}"])
  for name, kinds in report["kinds"].items():
    yield f"{name}: {' became '.join(kinds)}"
  yield from (f"{name}: other values" for name in report["others"])
