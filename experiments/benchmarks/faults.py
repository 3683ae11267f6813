"""What checkpoints survive: kills, damage and hostile files.

    python -m experiments.benchmarks.faults

kills: a process trains, saves each step, every other one in the background, and
replaces a packed checkpoint beside; it is killed at a random moment, and the
next one resumes. After each kill all steps on disk must be those of a run that
was never killed, bit for bit, and none may be missing that was reported saved.

flips: files of checkpoints are damaged: bits and runs of bytes are changed,
files are cut, extended, exchanged or deleted. Each load must raise
CheckpointError or return exactly what was saved.

fuzz: loaders are given what nobody wrote: specs with hostile values, half of
them with a right checksum; bytes for the codec; safetensors files. They may
raise the errors that they document, or return something; they may not write,
take a gigabyte, or ten seconds.

A line says how many cases there were and what came of them; the first case that
breaks a rule is an AssertionError.

Last output, with seed 0, on a busy machine:

  kills 100: 6 during a deletion, 53 during a replacement, 52 during a step,
    100 kills, 405 last step, 100 replacements right, 2,238 steps right
  flips 1,000: 170 bit harmless, 108 bit noticed, 84 bytes harmless, 81 bytes
    noticed, 61 cut harmless, 83 cut noticed, 76 gone harmless, 63 gone noticed,
    573 harmless, 102 longer harmless, 39 longer noticed, 427 noticed, 80 other
    harmless, 53 other noticed
  fuzz 10,000: 914 codec loaded, 4,086 codec refused, 2 memory in MB, 150
    safetensors loaded, 1,850 safetensors refused, 793 slowest in ms, 271 specs
    loaded, 2,729 specs refused

Orbax keeps files that no load reads, hence damage that is harmless.
"""

import contextlib
import copy
import dataclasses
import functools
import json
import logging
import multiprocessing
import random
import resource
import struct
import sys
import tempfile
import time
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from tern_jax import codec, export
from tern_jax.checkpoint import (
  Checkpointer,
  CheckpointError,
  examine,
  load_packed,
  read_spec,
  save_packed,
)
from tern_jax.core.containers import Ternary
from tern_jax.storage.packed import pack

#: Most memory that a loader may take, in bytes, and most seconds.
MEMORY, SECONDS = 1 << 30, 10.0
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


@dataclasses.dataclass
class Options:
  """Command line of the benchmark.

  Attributes:
    kills: how many processes are killed.
    flips: how many damages are done.
    fuzz: how many inputs are made up.
    seed: of all that is random.
  """

  kills: int = 100
  flips: int = 1000
  fuzz: int = 10_000
  seed: int = 0


def flat(tree: Any) -> list[tuple[str, tuple[int, ...], bytes]]:
  """Returns all there is to know about the arrays of a tree."""
  leaves = map(np.asarray, jax.tree.leaves(tree))
  return [(x.dtype.name, x.shape, x.tobytes()) for x in leaves]


# Kills.


@jax.jit
def advance(state: dict[str, jax.Array]) -> dict[str, jax.Array]:
  """Does a step of training."""
  x = jax.random.normal(jax.random.key(state["step"]), (16, 64))
  w = state["w"]
  m = 0.9 * state["m"] + x.T @ (jnp.tanh(x @ w) - x[:, :8])
  return {"step": state["step"] + 1, "w": w - 0.01 * m, "m": m}


def begin() -> dict[str, jax.Array]:
  """Returns the state of step 0."""
  w = jax.random.normal(jax.random.key(0), (64, 8))
  return {"step": jnp.array(0, jnp.int32), "w": w, "m": jnp.zeros_like(w)}


def packed_of(state: dict[str, jax.Array]) -> dict[str, Any]:
  """Returns the packed weights of a state."""
  one = jnp.ones(())
  codes = jnp.sign(jnp.round(state["w"])).astype(jnp.int8)
  return {"w": pack(Ternary(codes, one, one)), "step": state["step"]}


def train(folder: str, reports: Any) -> None:
  """Trains until killed; reports the steps that are on disk."""
  hush()
  state = begin()
  with Checkpointer(f"{folder}/run", keep=2, keep_every=10) as run:
    if run.latest_step() is not None:
      state = run.restore(state)[0]
    packed_of(advance(state))  # compiles
    reports.send(0)
    while True:
      state = advance(state)
      step, packed = int(state["step"]), packed_of(state)
      run.save(step, state, packed, extra=step, wait=step % 2 == 0)
      save_packed(f"{folder}/net", packed, overwrite=True)
      if step % 2 == 0:
        reports.send(step)


def kills(times: int, seed: int, folder: Path) -> Counter[str]:
  """Kills trainings; returns what they were doing, and the steps checked."""
  # Processes are forked from one that has imported JAX, but not started it.
  context = multiprocessing.get_context("forkserver")
  context.set_forkserver_preload(["tern_jax.checkpoint"])
  rng, counts, states = random.Random(seed), Counter(), [begin()]
  saved = 0
  for _ in range(times):
    reports, theirs = context.Pipe(duplex=False)
    process = context.Process(target=train, args=(str(folder), theirs))
    process.start()
    theirs.close()
    assert reports.poll(300), "the training does not start"
    time.sleep(rng.uniform(0, 1))
    process.kill()
    process.join()
    with contextlib.suppress(EOFError):
      while True:
        saved = max(saved, reports.recv())
    counts["kills"] += 1
    counts["during a step"] += any(folder.glob("run/*-tmp"))
    counts["during a replacement"] += (folder / ".net.new").exists()
    steps = [int(x.name) for x in folder.glob("run/*") if x.name.isdecimal()]
    assert max(steps, default=0) >= saved, f"step {saved} is lost"
    if not steps:
      continue
    while len(states) <= max(steps):
      states.append(advance(states[-1]))
    run, last = Checkpointer(folder / "run", keep=2, keep_every=10), max(steps)
    assert run.restore(begin())[2] == last
    for step in steps:
      try:
        state, extra, found = run.restore(begin(), step)
        packed = load_packed(folder / "run" / str(step))
      except CheckpointError:
        # Only what was being deleted may be there in part.
        deleted = step < last - 1 and step % 10
        assert deleted, f"step {step} is damaged"
        counts["during a deletion"] += 1
        continue
      assert found == extra == step
      assert flat(state) == flat(states[step]), f"step {step} is another"
      assert flat(packed) == flat(packed_of(states[step]))
      counts["steps right"] += 1
    run.close()
    if saved:
      packed = load_packed(folder / "net")
      step = int(packed["step"])
      # A step that is saved in the background may be lost.
      assert saved <= step <= last + 1, f"step {step} of {saved} to {last}"
      if step == len(states):
        states.append(advance(states[-1]))
      assert flat(packed) == flat(packed_of(states[step]))
      counts["replacements right"] += 1
  counts["last step"] = len(states) - 1
  return counts


# Damage.


def net(seed: int) -> dict[str, Any]:
  """Returns a small packed net."""
  rng = np.random.default_rng(seed)
  codes = jnp.asarray(rng.integers(-1, 2, (64, 24), np.int8))
  scales = jnp.asarray(rng.uniform(0.5, 1, (2, 1, 24)).astype(np.float32))
  return {
    "dense": {"kernel": pack(Ternary(codes, *scales))},
    "bias": jnp.asarray(rng.normal(size=24).astype(np.float32)),
    "empty": jnp.zeros((0, 3)),
  }


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


# Hostile files.


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


def hush() -> None:
  """Orbax reports each damage at length, and abandons coroutines."""
  logging.disable(logging.ERROR)
  warnings.filterwarnings("ignore", "coroutine", RuntimeWarning)
  sys.unraisablehook = lambda _: None


def main(options: Options) -> None:
  """Runs the benchmark."""
  hush()
  print(f"seed {options.seed}")
  for task in (kills, flips, fuzz):
    times = getattr(options, task.__name__)
    with tempfile.TemporaryDirectory() as folder:
      counts = task(times, options.seed, Path(folder)) if times else {}
    parts = (f"{n:,} {name}" for name, n in sorted(counts.items()))
    print(f"{task.__name__} {times:,}: {', '.join(parts)}", flush=True)


if __name__ == "__main__":
  jax.config.update("jax_platforms", "cpu")
  main(tyro.cli(Options))
