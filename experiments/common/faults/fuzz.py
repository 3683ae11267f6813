"""Fuzz: loaders are given what nobody wrote, changed at random."""

import contextlib
import copy
import json
import random
import resource
import struct
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from experiments.common.faults.damages import damage
from experiments.common.faults.trees import flat, net
from tern_jax import codec, export
from tern_jax.checkpoint import (
  CheckpointError,
  examine,
  load_packed,
  read_spec,
  save_packed,
)
from tern_jax.core.containers import Ternary
from tern_jax.storage.packed import pack

#: Most memory that a loader may take, in bytes, and most seconds.
MEMORY, SECONDS = 1 << 28, 1.0
# Values that a file could hold in place of any other.
HOSTILE = (
  *(None, True, False, 0, 1, -1, 2**31, 2**63, 2**64, 10**30, -(10**9)),
  *(0.5, 1e308, float("nan"), float("-inf")),
  *("", "x" * 10_000, "../../../evil", "/evil", "a\0b", "\ud800", "."),
  *("object", "float64", "complex128", "datetime64[s]", "V8", "S5", "int4"),
  *("ternary", "dense", "key", "coded", "entropy", "planes"),
  *([], {}, [0], [-1], [10**9, 10**9], [2**62, 2**62], [0, 10**30], [1] * 99),
  json.loads("[" * 99 + "]" * 99),
)


def nodes(tree: Any) -> Iterator[tuple[Any, Any]]:
  """Yields all places of a JSON value: a container and a key."""
  pairs = tree.items() if isinstance(tree, dict) else enumerate(tree)
  for key, x in list(pairs):
    yield tree, key
    if isinstance(x, dict | list):
      yield from nodes(x)


def mutate(rng: random.Random, tree: Any) -> Any:
  """Returns a JSON value with a few things changed."""
  tree = copy.deepcopy(tree)
  for _ in range(rng.choice((1, 1, 2, 5))):
    container, key = rng.choice(list(nodes(tree)))
    kind = rng.random()
    if kind < 0.1:
      del container[key]
    elif kind < 0.2:
      donor, of = rng.choice(list(nodes(tree)))
      container[key] = copy.deepcopy(donor[of])
    elif kind < 0.3 and isinstance(container, list):
      container.append(copy.deepcopy(container[key]))
    elif kind < 0.4 and isinstance(container, dict):
      container[rng.choice(("", "value", "coded", "../x"))] = container[key]
    else:
      container[key] = copy.deepcopy(rng.choice(HOSTILE))
    if not tree:
      break
  return tree


def dump(rng: random.Random, tree: Any) -> str:
  """Returns a JSON value as text, or a text that is too deep for a parser."""
  deep = rng.random() < 0.02
  return "[" * 100_000 + "]" * 100_000 if deep else json.dumps(tree)


@contextlib.contextmanager
def guarded(folder: Path, counts: Counter[str]) -> Iterator[None]:
  """Checks that nothing is written, and neither memory nor time is wasted."""
  before = {p: p.stat().st_mtime_ns for p in folder.rglob("*")}
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  start = time.perf_counter()
  yield
  seconds = time.perf_counter() - start
  grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak
  after = {p: p.stat().st_mtime_ns for p in folder.rglob("*")}
  assert before == after, "a loader has written something"
  assert 1024 * grown < MEMORY, f"a loader took {grown} kB"
  assert seconds < SECONDS, f"a loader took {seconds} s"
  counts["slowest in ms"] = max(counts["slowest in ms"], round(1000 * seconds))
  counts["memory in MB"] += grown // 1000


def fuzz(times: int, seed: int, folder: Path) -> Counter[str]:
  """Makes inputs up; returns how often they were refused."""
  counts: Counter[str] = Counter()
  soft, hard = resource.getrlimit(resource.RLIMIT_AS)
  pages = int(Path("/proc/self/statm").read_text().split()[0])
  most = pages * resource.getpagesize() + 8 * MEMORY
  resource.setrlimit(resource.RLIMIT_AS, (most, hard))  # spare the machine
  try:
    for name, share, cases in (
      ("specs", 3, specs),
      ("codec", 5, codec_bytes),
      ("safetensors", 2, safetensors),
    ):
      deep = folder / name / "a" / "b" / "c"
      deep.mkdir(parents=True)
      run = cases(random.Random(seed), deep)
      for _ in range(share * times // 10):
        load, allowed = next(run)
        with guarded(folder, counts):
          try:
            load()
          except allowed:
            counts[f"{name} refused"] += 1
          else:
            counts[f"{name} loaded"] += 1
  finally:
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
  return counts


Cases = Iterator[tuple[Callable[[], Any], tuple[type[Exception], ...]]]


def specs(rng: random.Random, folder: Path) -> Cases:
  """Yields loads of checkpoints with hostile specs."""
  tree = net(0)
  for name in ("planes", "entropy"):
    save_packed(folder / name, tree, codec=name)
  while True:
    path = folder / rng.choice(("planes", "entropy"))
    file = path / "spec" / "data.json"
    text = file.read_text()
    sealed = json.loads(text)
    right = rng.random() < 0.5
    if right:
      spec = mutate(rng, sealed["spec"])
      crc = zlib.crc32(json.dumps(spec, sort_keys=True).encode())
      changed: Any = {"crc32": crc, "spec": spec}
    else:
      changed = mutate(rng, sealed)
    file.write_text(dump(rng, changed))

    def load(path: Path = path, right: bool = right) -> None:
      kind = rng.randrange(3)
      if kind == 0:
        found = load_packed(path)
      elif kind == 1:
        found = load_packed(path, tree)
      else:
        read_spec(path)
        for leaf in examine(path).values():
          if isinstance(leaf, CheckpointError):
            raise leaf
        return
      assert right or flat(found) == flat(tree), "a false spec is believed"

    yield load, (CheckpointError,)
    file.write_text(text)


def codec_bytes(rng: random.Random, folder: Path) -> Cases:
  """Yields decodings of random and of changed bytes."""
  del folder
  whole = []
  for shape in ((64, 24), (3, 3, 8, 16), (7, 5), (4096,), (40, 100)):
    codes = np.random.default_rng(len(whole)).integers(-1, 2, shape, np.int8)
    x = pack(Ternary(jnp.asarray(codes), jnp.ones(()), jnp.ones(())))
    whole.append((codec.encode(x), shape, (x.nonzero, x.sign)))
  while True:
    data, shape, planes = rng.choice(whole)
    asked, kind = shape, rng.randrange(4)
    if kind == 0:
      data = bytes([1]) + rng.randbytes(rng.randrange(200))
    elif kind < 3:
      _, changed = damage(rng, data, rng.choice(whole)[0])
      data = changed or b""
    if rng.random() < 0.3:
      asked = tuple(
        rng.choice((n, n, 8 * n, 0, 1, 2**20, 2**40, 2**62)) for n in shape
      )
      asked = asked[: rng.choice((0, 1, 9, 9))]

    wanted = planes if asked == shape else None

    def load(
      data: bytes = data, asked: Any = asked, wanted: Any = wanted
    ) -> None:
      found = codec.decode(data, asked)
      assert not wanted or flat(found) == flat(wanted), "wrong weights"

    yield load, (ValueError,)


def safetensors(rng: random.Random, folder: Path) -> Cases:
  """Yields loads of changed safetensors files."""
  whole, tree, path = [], net(0), folder / "changed.safetensors"
  for name in export.CODECS:
    export.to_safetensors(folder / name, tree, codec=name)
    whole.append((folder / name).read_bytes())
  while True:
    data = rng.choice(whole)
    (n,) = struct.unpack("<Q", data[:8])
    header, tensors = json.loads(data[8 : 8 + n]), data[8 + n :]
    kind = rng.randrange(3)
    if kind == 0:
      changed = damage(rng, data, rng.choice(whole))[1] or b""
    else:
      facts = header["__metadata__"]
      if kind == 1:
        text = dump(rng, mutate(rng, json.loads(facts["tern_jax"])))
        facts |= {"tern_jax": text, "crc32": str(zlib.crc32(text.encode()))}
      else:
        header = mutate(rng, header)
      text = dump(rng, header).encode()
      size = rng.choice((len(text), len(text), len(text), 0, 2**63))
      changed = struct.pack("<Q", size) + text + tensors
    path.write_bytes(changed)

    def load(right: bool = kind == 0) -> None:
      found = export.from_safetensors(path)
      assert not right or flat(found) == flat(tree), "wrong weights are loaded"

    yield load, (ValueError, OSError)
