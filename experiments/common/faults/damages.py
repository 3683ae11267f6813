"""Damage: files of checkpoints are changed, cut, exchanged or deleted."""

import functools
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.common.faults.trees import flat, net
from tern_jax.checkpoint import (
  Checkpointer,
  CheckpointError,
  examine,
  load_packed,
  save_packed,
)


def checkpoints(seed: int, folder: Path) -> dict[str, Callable[[], None]]:
  """Makes checkpoints; returns checks that raise CheckpointError or pass."""
  packed = net(seed)
  rng = np.random.default_rng(seed)
  state = {"w": rng.normal(size=(64, 24)), "n": np.arange(3)}
  state = jax.tree.map(lambda x: jnp.asarray(x.astype(np.float32)), state)
  save_packed(folder / "planes", packed)
  save_packed(folder / "entropy", packed, codec="entropy")
  run = Checkpointer(folder / "run")
  run.save(3, state, packed, extra={"epoch": 1})
  run.close()

  def check(name: str) -> None:
    path, errors = folder / name, []
    checks: list[tuple[Any, Any]] = [
      (lambda: load_packed(path), packed),
      (lambda: load_packed(path, packed), packed),
      (lambda: load_packed(path, {"bias": packed["bias"]}, partial=True), None),
    ]
    if name == "run":
      checks = [
        (lambda: load_packed(path), packed),
        (lambda: run.restore(state), (state, {"epoch": 1}, 3)),
      ]
    for load, wanted in checks:
      try:
        found = load()
      except CheckpointError as e:
        errors.append(e)
        continue
      if wanted is None:
        found, wanted = found["bias"], packed["bias"]
      assert flat(found) == flat(wanted), f"{path} is silently wrong"
    for part in ("packed", "state") if name == "run" else ("packed",):
      tree = packed if part == "packed" else state
      wanted = {
        tuple(map(lambda k: k.key, keys)): flat(x)
        for keys, x in jax.tree.flatten_with_path(
          tree, is_leaf=lambda x: hasattr(x, "nonzero") and hasattr(x, "sign")
        )[0]
      }
      try:
        found = examine(path, part)
      except CheckpointError as e:
        errors.append(e)
        continue
      assert found.keys() == wanted.keys()
      for keys, leaf in found.items():
        if isinstance(leaf, CheckpointError):
          errors.append(leaf)
        else:
          assert flat(leaf) == wanted[keys], f"{path} is silently wrong"
    if errors:
      raise errors[0]

  names = ("planes", "entropy", "run")
  return {name: functools.partial(check, name) for name in names}


def damage(
  rng: random.Random, data: bytes, other: bytes
) -> tuple[str, bytes | None]:
  """Returns a kind of damage, and a damaged file; None if it is deleted."""
  kind = rng.choice(("bit", "bit", "bytes", "cut", "longer", "other", "gone"))
  changed = bytearray(data)
  at = rng.randrange(max(len(data), 1))
  if kind == "bit" and data:
    changed[at] ^= 1 << rng.randrange(8)
  elif kind == "bytes":
    n = rng.randint(2, 64)
    changed[at : at + n] = rng.randbytes(len(changed[at : at + n]))
  elif kind == "cut":
    del changed[at:]
  elif kind == "longer":
    changed += rng.randbytes(rng.randint(1, 64))
  elif kind == "other":
    changed[:] = other
  return kind, None if kind == "gone" else bytes(changed)


def flips(times: int, seed: int, folder: Path) -> Counter[str]:
  """Damages files; returns how often it was noticed."""
  rng, counts = random.Random(seed), Counter()
  checks = checkpoints(seed, folder)
  for check in checks.values():
    check()
  for i in range(times):
    name = list(checks)[i % len(checks)]
    files = sorted(p for p in (folder / name).rglob("*") if p.is_file())
    sizes = [p.stat().st_size for p in files] if i % 2 else None
    (file,), other = rng.choices(files, sizes), rng.choice(files).read_bytes()
    data = file.read_bytes()
    kind, damaged = damage(rng, data, other)
    if damaged is None:
      file.unlink()
    else:
      file.write_bytes(damaged)
    try:
      checks[name]()
      outcome = "harmless"
    except CheckpointError:
      outcome = "noticed"
    file.write_bytes(data)
    counts[outcome] += 1
    counts[f"{kind} {outcome}"] += 1
  for check in checks.values():
    check()
  return counts
