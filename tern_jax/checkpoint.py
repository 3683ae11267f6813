"""Checkpoints that notice damage: packed weights alone, or a training run.

A checkpoint is an orbax checkpoint of up to three parts:

  spec    `{"crc32": ..., "spec": {...}}`: JSON that describes every leaf;
  packed  the packed weights and the dense leaves beside them;
  state   what a training run resumes from; absent from `save_packed`.

The arrays of leaf 7 of a part are stored as `{"0007": {name: array}}`, so that
a path may hold any key. Orbax does not checksum data, hence the spec has the
crc32 of every leaf: over the bytes of its arrays, sorted by name, each in C
order and little-endian. The spec's own crc32 is over its JSON text with sorted
keys, ", " and ": " as separators.

With the codec "entropy", what `tern_jax.codec` makes of the planes of a leaf is
stored as the array `coded` in their place; the crc32 stays that of the planes.

A path may be a directory or, with `pip install '.[bucket]'`, a place in a
bucket, such as gs://bucket/net. Nothing there can be renamed: a checkpoint is
whole once orbax's `commit_success.txt` is in it, which is written last.
"""

import contextlib
import dataclasses
import functools
import importlib.metadata
import json
import math
import operator
import os
import shutil
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from orbax.checkpoint import v1

from tern_jax import codec as entropy_codec
from tern_jax.core.containers import Ternary
from tern_jax.core.paths import key_str
from tern_jax.storage.packed import PackedTernary, validate

try:
  import fcntl
except ImportError:  # not POSIX: nothing tells two writers apart
  fcntl = None

#: Version of the layout that this module writes, and the newest that it reads.
FORMAT = 1
#: How planes can be stored: "planes" is two bits a weight, "entropy" as few as
#: `tern_jax.codec` makes of them.
CODECS = ("planes", "entropy")

#: Where orbax puts the spec.
_SPEC = Path("spec", "data.json")
#: What orbax adds to the name of a folder until it is whole.
_UNFINISHED = ".orbax-checkpoint-tmp"
#: What it writes last in a bucket.
_COMMITTED = "commit_success.txt"
# Its own annotations refuse pathlib paths, and its own policies.
ocp: Any = v1
_number = "{:04d}".format
_TERNARY = ("nonzero", "sign", "w_p", "w_n")
# A deeper tree could overflow the stack of whoever walks it.
_DEPTH = 64


#: A folder, or a place in a bucket.
Place = Path | epath.Path


class CheckpointError(ValueError):
  """A checkpoint cannot be written, is damaged, or does not fit the request."""


def absolute(path: str | os.PathLike[str]) -> Place:
  """Returns a path that means the same in every working directory.

  >>> absolute("gs://bucket/runs/7")
  PosixGPath('gs://bucket/runs/7')
  >>> absolute("runs").is_absolute()
  True
  """
  name = os.fspath(path)
  if "://" not in name:
    return Path(name).resolve()
  # TensorStore and other hosts write there, too: nothing is as it was listed.
  fsspec.config.conf.setdefault("gcs", {})["use_listings_cache"] = False
  return epath.Path(name)


def save_packed(
  path: str | os.PathLike[str],
  tree: Any,
  *,
  codec: str = "planes",
  method: Any = None,
  overwrite: bool = False,
) -> None:
  """Saves packed weights, and the dense leaves beside them, to a directory.

  The directory appears whole or not at all. An old one that is overwritten
  stays until then: if the process is killed, loads find the one or the other.
  In a bucket nothing keeps another process from saving to the same path.

  Args:
    path: directory to make, parents included, or gs://bucket/path.
    tree: any pytree of arrays and `PackedTernary`.
    codec: how the planes are stored: "planes", two bits a weight; or "entropy",
      their entropy, for which constriction is needed, to load them too.
    method: what made the weights; its repr is kept in the spec.
    overwrite: replace the checkpoint at `path`, once the new one is written.

  Raises:
    ValueError: unknown codec, an invalid packed leaf, or a tree deeper than 64.
    TypeError: a leaf is neither packed nor an array.
    ImportError: codec="entropy" without constriction.
    CheckpointError: the path is taken, or another process is saving there, or
      it cannot be written.

  >>> import tempfile
  >>> from tern_jax.storage.packed import pack
  >>> t = Ternary(jnp.eye(8, dtype=jnp.int8), jnp.array(2.0), jnp.array(2.0))
  >>> with tempfile.TemporaryDirectory() as directory:
  ...   save_packed(directory + "/net", {"Dense_0": {"kernel": pack(t)}})
  ...   net = load_packed(directory + "/net")
  >>> net["Dense_0"]["kernel"].dequantize()[0].tolist()
  [2.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]
  """
  if codec not in CODECS:
    raise ValueError(f"codec must be one of {CODECS}, got {codec!r}.")
  path = absolute(path)
  parts = _parts({"packed": tree}, codec=codec, method=method)
  context = _context()
  context.array.saving.use_compression = _compressible(parts)
  with _explained("save", path), _staged(path, overwrite) as fresh, context:
    ocp.save_checkpointables(fresh, _lent(parts))


def load_packed(
  path: str | os.PathLike[str], like: Any = None, *, partial: bool = False
) -> Any:
  """Loads and verifies what `save_packed` or a `Checkpointer` saved.

  Args:
    path: a checkpoint, a step of a training run, or a run: its latest step.
    like: tree of arrays, or of their shapes, with the paths of the saved tree;
      its shardings are used too. None: nested dicts, no model code needed.
    partial: `like` has only some of the leaves, and no others are read.

  Returns:
    The saved tree, of the structure of `like`, with `PackedTernary` leaves
    where it was packed. Leaves of `like` that are not arrays stay as they are.

  Raises:
    CheckpointError: nothing there, damaged, from a newer version of the
      format, or of other paths, shapes or dtypes than `like`.
    ImportError: its codec is "entropy", and constriction is missing.
  """
  path = locate(path)
  return _load(path, "packed", read_spec(path), like, partial)


def examine(
  path: str | os.PathLike[str], part: str = "packed"
) -> dict[tuple[str, ...], Any]:
  """Loads and verifies each leaf alone, whatever is wrong with the others.

  Damage to the arrays of a leaf is that of this leaf. All leaves of a part have
  one index, which says where their arrays are: orbax's `_METADATA`, OCDBT's
  manifests and the nodes of its tree. If it cannot be read, no leaf can be; any
  of them may be damaged, or none, and this is what is said of each.

  Args:
    path: a checkpoint, a step of a training run, or a run: its latest step.
    part: "packed" or, of a training run, "state".

  Returns:
    {keys: the leaf, on the host, or the CheckpointError of what is wrong}.

  Raises:
    CheckpointError: nothing there, or its spec is damaged, or from a newer
      version, or there is no such part.
    ImportError: its codec is "entropy", and constriction is missing.
  """
  path = locate(path)
  spec = read_spec(path)
  with _explained("read", path):
    entries = _entries(path, part, spec)
  found: dict[tuple[str, ...], Any] = {}
  try:
    with _explained("read", path):
      index, groups = _index(path, part), list(_groups(entries))
  except CheckpointError as e:
    return dict.fromkeys(entries, e)
  for group in groups:
    try:
      with _explained("read", path):
        stored = _stored(path, part, group, index)
    except CheckpointError:
      stored = None  # One damaged chunk fails the read of them all.
    for keys, entry in group.items():
      try:
        with _explained("read", path):
          alone = stored
          if alone is None:
            alone = _stored(path, part, {keys: entry}, index)
          found[keys] = _leaf(path, entry, alone)
      except CheckpointError as e:
        found[keys] = e
  return found


def locate(path: str | os.PathLike[str]) -> Place:
  """Returns the folder of a checkpoint, which may be a run's latest step.

  Raises:
    CheckpointError: there is no checkpoint.
  """
  path = absolute(path)
  with _explained("look at", path):
    old = _stage(path) / "old"
    if not _taken(path) and _is_whole(old):
      return old  # A save was killed while it replaced the checkpoint.
    if not path.is_dir():
      what = "is a file" if path.exists() else "does not exist"
      raise CheckpointError(f"{path} {what}: give the folder of a checkpoint.")
    steps = [] if _is_whole(path) else _steps(path)
    if steps:
      path = path / str(max(steps))
    if not _is_whole(path):
      raise CheckpointError(f"{path} holds no checkpoint: its spec is missing.")
    return path


def disk_bytes(path: str | os.PathLike[str]) -> int:
  """Returns the bytes of all files of a checkpoint, orbax's own included.

  Args:
    path: a checkpoint, a step of a training run, or a run: its latest step.

  Raises:
    CheckpointError: nothing there.
  """
  files = _files(locate(path))
  return sum(epath.Path(file).stat().length for file in files)


def read_spec(path: str | os.PathLike[str]) -> dict[str, Any]:
  """Returns the verified spec of a checkpoint, without loading its arrays.

  Args:
    path: a checkpoint, a step of a training run, or a run: its latest step.

  Returns:
    The spec: "format", "versions", "codec", "method", "selected" (paths of the
    packed leaves), "extra", and "leaves", a list for each part.

  Raises:
    CheckpointError: nothing there, damaged, or from a newer version.
  """
  path = locate(path)
  with _explained("read the spec of", path):
    sealed = json.loads((path / _SPEC).read_text("utf-8"))
    spec = sealed["spec"]
    if sealed["crc32"] != zlib.crc32(_text(spec).encode()):
      raise CheckpointError(f"{path}: the spec is damaged: crc32 differs.")
    if type(spec["format"]) is not int or spec["format"] < 1:
      raise CheckpointError(
        f"{path} has format {spec['format']!r}, but formats are numbers from "
        f"1 to {FORMAT}: it was not written by tern_jax."
      )
    if spec["format"] > FORMAT:
      raise CheckpointError(
        f"{path} has format {spec['format']}, but this tern_jax reads up to "
        f"{FORMAT}: upgrade tern_jax."
      )
    if spec["codec"] not in CODECS:
      raise CheckpointError(
        f"{path} has codec {spec['codec']!r}, but this tern_jax reads "
        f"{CODECS}: upgrade tern_jax."
      )
    return spec


class Checkpointer(contextlib.AbstractContextManager["Checkpointer"]):
  """Saves a training run step by step, and resumes it bit for bit.

  Every step carries the resumable state and the packed weights, so that any
  step can be deployed by `load_packed` without the training code. A step
  appears whole or not at all; an interrupted save is ignored. From its first
  save until `close`, no other process can save to the directory; in a bucket
  nothing keeps it from that.

  Args:
    directory: of the run, made if it does not exist, or gs://bucket/path; a
      step is a folder in it.
    save_interval: steps between saves; `save` skips the others.
    keep: number of latest steps to keep, None for all.
    keep_every: steps that are multiples of it are kept as well, for ever.

  Raises:
    ValueError: `save_interval`, `keep` or `keep_every` below 1.
    CheckpointError: the directory cannot be made or read.

  >>> import tempfile
  >>> state = {"w": jnp.arange(3.0)}
  >>> with (
  ...   tempfile.TemporaryDirectory() as directory,
  ...   Checkpointer(directory, save_interval=10) as run,
  ... ):
  ...   saved = [i for i in range(25) if run.save(i, state, {})]
  ...   restored, extra, step = run.restore(like=state)
  >>> saved, restored["w"].tolist(), step
  ([0, 10, 20], [0.0, 1.0, 2.0], 20)
  """

  def __init__(
    self,
    directory: str | os.PathLike[str],
    *,
    save_interval: int = 1,
    keep: int | None = None,
    keep_every: int | None = None,
  ):
    for name, value in (
      ("save_interval", save_interval),
      ("keep", keep),
      ("keep_every", keep_every),
    ):
      if value is not None and value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}.")
    policies = ocp.training.preservation_policies
    keeping = [policies.LatestN(keep)]
    if keep_every is not None:
      keeping.append(policies.EveryNSteps(keep_every))
    self.directory = absolute(directory)
    self._interval = save_interval
    self._open = functools.partial(
      ocp.training.Checkpointer,
      self.directory,
      context=_context(),
      preservation_policy=policies.AnyPreservationPolicy(keeping),
    )
    with _explained("open", self.directory):
      self._run = self._open()
    #: The step that is being saved, and what waits for it.
    self._saving: tuple[Place, Any] | None = None
    self._lock = contextlib.ExitStack()
    self._locked = False

  def save(
    self,
    step: int,
    state: Any,
    packed: Any,
    *,
    extra: Any = None,
    method: Any = None,
    force: bool = False,
    wait: bool = True,
  ) -> bool:
    """Saves one step, if it is due.

    Args:
      step: number of the step, not below that of a saved step.
      state: pytree of arrays to resume from; typed PRNG keys are welcome.
      packed: pytree with `PackedTernary` leaves, as for `save_packed`.
      extra: JSON value, such as the position of the data iterator. It comes
        back as JSON has it: tuples as lists, keys as strings.
      method: what made the packed weights; its repr is kept in the spec.
      force: save although the step is not a multiple of the interval.
      wait: return once the step is on disk. False: once all arrays are copied,
        so that they can be donated or changed; what goes wrong after that is
        raised by the next save that is due, `wait`, `restore` or `close`.

    Returns:
      Whether the step is saved now: it was due and not saved already.

    Raises:
      TypeError: a leaf is no array, or `extra` is no JSON value.
      CheckpointError: a later step exists, or another process saves to this
        directory, or the step cannot be written, or the one before could not.
    """
    step = operator.index(step)
    due = force or step % self._interval == 0
    if due:
      self.wait()
    path, latest = self.directory / str(step), self.latest_step()
    if latest is not None and step < latest:
      raise CheckpointError(
        f"{path}: step {latest} is saved already: save later steps, or go on "
        "from an older step in another directory."
      )
    if step == latest or not due:
      return False
    trees = {"state": state, "packed": packed}
    parts = _parts(trees, codec="planes", method=method, extra=extra)
    with _explained("save", path):
      _lead(lambda: self._prepare(path))
      if _in_bucket(path):
        self._run.reload()  # It had counted the half of a step, now removed.
    with self._cleaned(path):
      saving = self._run.save_checkpointables_async(
        step, _lent(parts) if wait else parts, force=True
      )
    self._saving = path, saving
    if wait:
      self.wait()
    return True

  def wait(self) -> None:
    """Returns once the last save is on disk.

    Raises:
      CheckpointError: it could not be written.
    """
    if self._saving:
      (path, saving), self._saving = self._saving, None
      with self._cleaned(path):
        saving.result()

  def close(self) -> None:
    """Finishes the last save; then other processes can save.

    Raises:
      CheckpointError: it could not be written.
    """
    with self._lock:
      self._locked = False
      try:
        self.wait()
      finally:
        self._run.close()

  def restore(
    self, like: Any, step: int | None = None, *, partial: bool = False
  ) -> tuple[Any, Any, int]:
    """Restores the state of a step, or a part of it.

    Args:
      like: state, or its shapes, of the structure, shapes, dtypes and
        shardings to restore; any number of devices, whatever it was saved on.
      step: number of the step, None for the latest.
      partial: `like` has only some of the leaves, at their paths in the state,
        such as `{"params": params}`; no others are read.

    Returns:
      (state, extra, step).

    Raises:
      CheckpointError: no such step, damaged, or of other paths, shapes or
        dtypes than `like`; or the last save could not be written.
    """
    self.wait()
    step = self.latest_step() if step is None else step
    if step is None:
      raise CheckpointError(f"{self.directory} holds no checkpoint: save one.")
    path = locate(self.directory / str(step))
    spec = read_spec(path)
    return _load(path, "state", spec, like, partial), spec["extra"], step

  def latest_step(self) -> int | None:
    """Returns the number of the latest saved step, None if there is none."""
    return max(_steps(self.directory), default=None)

  def __exit__(self, *_: object) -> None:
    self.close()

  def _prepare(self, path: Place) -> None:
    """Makes sure that this is the only writer, and that it can write."""
    if not self._locked:
      self._lock.enter_context(_locked(self.directory, self.directory))
      self._locked = True
      for leftover in self.directory.glob("*"):
        if _is_unfinished(leftover):
          _remove(leftover)
    _probe(path)

  @contextlib.contextmanager
  def _cleaned(self, path: Place) -> Iterator[None]:
    """Leaves nothing of a save that fails inside."""
    try:
      with _explained("save", path):
        yield
    except CheckpointError:
      # The old one would report the same error for ever.
      with contextlib.suppress(Exception):
        self._run.close()
      for leftover in (path, path.with_name(f"{path.name}{_UNFINISHED}")):
        if _is_unfinished(leftover):
          _remove(leftover)
      with _explained("open", self.directory):
        self._run = self._open()
      raise


# Trees to parts.


def _parts(
  trees: dict[str, Any], *, codec: str, method: Any, **facts: Any
) -> Any:
  """Returns the parts of a checkpoint: arrays by number, and the spec."""
  parts: dict[str, Any] = {}
  leaves: dict[str, list] = {}
  for part, tree in trees.items():
    leaves[part], arrays = [], {}
    for i, (path, x) in enumerate(_flatten(tree)[0].items()):
      entry, found = _encode(path, x, codec)
      leaves[part].append(entry)
      arrays[_number(i)] = {k: a for k, a in found.items() if a.size}
    # Orbax cannot store what has no elements; the spec knows all about it.
    if arrays := {k: x for k, x in arrays.items() if x}:
      parts[part] = arrays
  packages = ("tern_jax", "jax", "orbax-checkpoint")
  selected = (e["path"] for e in leaves["packed"] if e["kind"] == "ternary")
  spec = {
    "format": FORMAT,
    "versions": {name: _version(name) for name in packages},
    "codec": codec,
    "method": method if isinstance(method, str | None) else repr(method),
    "selected": list(map(_name, selected)),
    "extra": None,
    "leaves": leaves,
    **facts,
  }
  try:
    # As text and back, the spec is what a reader will see.
    spec = json.loads(_text(spec))
  except TypeError as e:
    raise TypeError(f"extra must be a JSON value: {e}.") from e
  sealed = {"crc32": zlib.crc32(_text(spec).encode()), "spec": spec}
  return parts | {"spec": sealed}


def _flatten(tree: Any) -> tuple[dict[tuple[str, ...], Any], Any]:
  """Returns the leaves by path, weights whole, and the tree's structure."""
  flat, treedef = jax.tree_util.tree_flatten_with_path(
    tree, is_leaf=lambda x: isinstance(x, Ternary | PackedTernary)
  )
  leaves = {}
  for keys, x in flat:
    path = tuple(map(key_str, keys))
    if path in leaves:
      raise ValueError(f"two leaves have the path {_name(path)}.")
    if len(path) > _DEPTH:
      raise ValueError(f"a path is at most {_DEPTH} keys, got {_name(path)}.")
    # A plain number is the array that JAX takes it for.
    leaves[path] = jnp.asarray(x) if isinstance(x, bool | int | float) else x
  return leaves, treedef


def _encode(path: tuple[str, ...], x: Any, codec: str) -> tuple[dict, dict]:
  """Returns a leaf's entry in the spec, and its arrays on the host."""
  name, extra = _name(path), {}
  if isinstance(x, Ternary):
    raise TypeError(f"{name} is a Ternary: call tern_jax.pack first.")
  if not isinstance(x, PackedTernary | jax.Array | np.ndarray | np.generic):
    raise TypeError(
      f"{name}: leaves must be arrays or PackedTernary, got "
      f"{type(x).__name__}: leave it out of the tree."
    )
  arrays: dict[str, Any]
  if isinstance(x, PackedTernary):
    kind, extra = "ternary", {"axis": x.axis}
    x = jax.tree.map(_host, x)
    validate({name: x})
    arrays = {k: getattr(x, k) for k in _TERNARY}
  elif isinstance(x, jax.Array) and jnp.issubdtype(
    x.dtype, jax.dtypes.prng_key
  ):
    kind, extra = "key", {"impl": str(jax.random.key_impl(x))}
    arrays = {"value": _host(jax.random.key_data(x))}
  elif x.dtype == bool or jnp.issubdtype(x.dtype, jnp.number):
    kind, arrays = "dense", {"value": _host(x)}
  else:
    raise TypeError(f"{name}: cannot save an array of dtype {x.dtype}.")
  crc = _crc_of(arrays)
  if isinstance(x, PackedTernary) and codec == "entropy":
    coded = np.frombuffer(entropy_codec.encode(x), np.uint8)
    arrays = {"coded": coded, "w_p": x.w_p, "w_n": x.w_n}
  entry = {
    "path": path,
    "kind": kind,
    "shape": x.shape,
    "dtype": x.dtype.name,
    "crc32": crc,
    "arrays": _describe(arrays),
  }
  return entry | extra, arrays


def _host(x: Any) -> np.ndarray:
  """Returns an array of any device or process, whole, on this host."""
  if isinstance(x, jax.Array) and not (
    x.is_fully_addressable or x.is_fully_replicated
  ):
    x = multihost_utils.process_allgather(x, tiled=True)
  x = np.asarray(x)
  return x if x.dtype.isnative else x.astype(x.dtype.newbyteorder("="))


class _Lent(np.ndarray):
  """An array that nobody changes while it is saved: orbax need not copy it."""

  def __deepcopy__(self, memo: Any) -> "_Lent":
    return self


def _lent(parts: Any) -> Any:
  """Returns the parts of a checkpoint, for a save that is waited for."""
  return jax.tree.map(
    lambda x: x.view(_Lent) if isinstance(x, np.ndarray) else x, parts
  )


def _compressible(parts: Any) -> bool:
  """Says whether most bytes are not at their entropy, only to be copied."""
  leaves = parts.get("packed", {}).values()
  sizes = [(name, x.nbytes) for leaf in leaves for name, x in leaf.items()]
  coded = sum(size for name, size in sizes if name == "coded")
  return 2 * coded <= sum(size for _, size in sizes)


# Parts to trees.


def _load(
  path: Place, part: str, spec: dict[str, Any], like: Any, partial: bool
) -> Any:
  """Returns a part of a checkpoint, verified, in the structure of `like`."""
  with _explained("read", path):
    entries = _entries(path, part, spec)
    if like is None:
      return _nest(_read(path, part, entries, {}))
    wanted, treedef = _flatten(like)
    if partial:
      entries = {k: e for k, e in entries.items() if k in wanted}
    _check_fit(path, entries, wanted)
    found = wanted | _read(path, part, entries, wanted)
    return jax.tree.unflatten(treedef, found.values())


def _entries(
  path: Place, part: str, spec: dict[str, Any]
) -> dict[tuple[str, ...], Any]:
  """Returns the leaves of a part, as the spec describes them, numbered."""
  if part not in spec["leaves"]:
    raise CheckpointError(f"{path} has packed weights only, no {part}.")
  leaves = spec["leaves"][part]
  for e in leaves:
    keys = e["path"]
    if not isinstance(keys, list) or len(keys) > _DEPTH:
      raise CheckpointError(f"{path}: a path is a list of up to {_DEPTH} keys.")
  entries = {
    tuple(e["path"]): e | {"number": _number(i)} for i, e in enumerate(leaves)
  }
  above = {keys[:i] for keys in entries for i in range(len(keys))}
  if len(entries) < len(leaves) or entries.keys() & above:
    raise CheckpointError(f"{path}: two leaves have one path.")
  return entries


def _check_fit(path: Place, entries: dict, wanted: dict) -> None:
  """Raises unless the wanted leaves are the stored ones, shapes and all."""
  arrays = {k: x for k, x in wanted.items() if hasattr(x, "dtype")}
  wrong = [f"{_name(k)} is not stored" for k in arrays if k not in entries]
  for k, e in entries.items():
    x = arrays.get(k)
    if x is None:
      wrong.append(f"{_name(k)} is stored, but not in the tree")
      continue
    has = e["kind"], e["dtype"], e["shape"]
    # Packed weights may take the place of the dense ones that they stand for.
    kind = "ternary" if isinstance(x, Ternary | PackedTernary) else e["kind"]
    wants = kind, x.dtype.name, list(x.shape)
    if has != wants:
      wrong.append(
        "{} is stored as {} {}{}".format(_name(k), *has)
        + ", but in the tree it is {} {}{}".format(*wants)
      )
  if wrong:
    raise CheckpointError(f"{path} does not fit the tree: {'; '.join(wrong)}.")


# Bytes that are worth a read of their own, and how many reads at most.
_WORTH_A_READ = 1 << 22
_READS = 8


def _read(path: Place, part: str, entries: dict, like: dict) -> dict[Any, Any]:
  """Returns the verified leaves of a part, on the devices of others."""
  index, leaves = _index(path, part), {}
  # In some reads, so that there is never a second copy of all leaves: memory
  # that threads of a read have freed is for such threads, not for this one.
  for group in _groups(entries):
    stored = _stored(path, part, group, index)
    for keys, e in group.items():
      leaves[keys] = _place(_leaf(path, e, stored), like.get(keys))
  return leaves


def _groups(entries: dict) -> Iterator[dict]:
  """Divides leaves into groups of about as many bytes."""
  sizes = {keys: stored_bytes(e) for keys, e in entries.items()}
  enough = max(_WORTH_A_READ, sum(sizes.values()) / _READS)
  group, size = {}, 0
  for keys, e in entries.items():
    group[keys] = e
    size += sizes[keys]
    if size >= enough:
      yield group
      group, size = {}, 0
  if group:
    yield group


def stored_bytes(entry: dict[str, Any]) -> int:
  """Returns the bytes of the arrays of a leaf, by its entry in a spec."""
  return sum(
    math.prod(a["shape"]) * jnp.dtype(a["dtype"]).itemsize
    for a in entry["arrays"].values()
  )


def _index(path: Place, part: str) -> Any:
  """Returns what orbax knows of the arrays of a part, by their numbers."""
  if not (path / part).exists():
    return {}
  # Of what it cannot read, orbax warns, and returns None.
  index = ocp.metadata(path, part).metadata
  if index is None:
    raise CheckpointError(
      f"{path}: the index of {part} cannot be read: any of its leaves may be "
      "damaged."
    )
  return index


def _stored(
  path: Place, part: str, entries: dict, index: Any
) -> dict[str, Any]:
  """Returns the arrays of leaves, by their numbers."""
  # The index must agree with the spec before any array is allocated.
  wanted = {}
  for e in entries.values():
    described = {k: a for k, a in e["arrays"].items() if math.prod(a["shape"])}
    if _describe(index.get(e["number"], {})) != described:
      raise CheckpointError(
        f"{path}: {_name(e['path'])} is damaged: its arrays are not those of "
        f"the spec, {described}."
      )
    if described:
      wanted[e["number"]] = index[e["number"]]
  if not wanted:
    return {}
  context = _context()
  context.pytree.loading.partial_load = True
  # All arrays are read to the host, which no other process has to wait for.
  here = jax.process_index()
  context.multiprocessing.active_processes = {here}
  context.multiprocessing.primary_host = here
  with context:
    return ocp.load(path, wanted, checkpointable_name=part)


def _leaf(path: Place, entry: dict, stored: dict[str, Any]) -> Any:
  """Returns a verified leaf, on the host."""
  name, data = _name(entry["path"]), stored.pop(entry["number"], {})
  arrays = {
    k: data[k] if k in data else np.zeros(a["shape"], a["dtype"])
    for k, a in entry["arrays"].items()
  }
  if entry["kind"] == "ternary" and "coded" in arrays:
    arrays = _planes(path, entry, arrays)
  if _crc_of(arrays) != entry["crc32"]:
    raise CheckpointError(f"{path}: {name} is damaged: its crc32 differs.")
  leaf = _decode(entry, arrays)
  validate({name: leaf})
  return leaf


def _planes(path: Place, entry: dict, arrays: dict[str, Any]) -> dict[str, Any]:
  """Returns the arrays of a leaf with its planes in place of the coded ones."""
  scales = {k: arrays[k] for k in arrays if k != "coded"}
  try:
    planes = entropy_codec.decode(
      np.asarray(arrays["coded"]), tuple(entry["shape"])
    )
  except ValueError as e:
    raise CheckpointError(
      f"{path}: {_name(entry['path'])} is damaged: {e}"
    ) from e
  return dict(zip(("nonzero", "sign"), planes, strict=True)) | scales


def _decode(entry: dict, arrays: dict[str, Any]) -> Any:
  """Returns the leaf that `_encode` turned into an entry and arrays."""
  if entry["kind"] == "ternary":
    shape, axis = tuple(entry["shape"]), entry["axis"]
    return PackedTernary(**arrays, shape=shape, axis=axis)
  if entry["kind"] == "key":
    return jax.random.wrap_key_data(arrays["value"], impl=entry["impl"])
  return arrays["value"]


def _place(x: Any, like: Any) -> Any:
  """Puts a loaded leaf on the devices of `like`, else on the default device."""
  if isinstance(x, PackedTernary):
    fields = {
      k: _place(getattr(x, k), getattr(like, k, None)) for k in _TERNARY
    }
    return dataclasses.replace(x, **fields)
  # What was free to move to another device stays free to.
  if getattr(like, "sharding", None) and getattr(like, "committed", True):
    placed = jax.device_put(x, like.sharding)
  else:
    placed = jnp.asarray(x)
  if placed.dtype != x.dtype:
    raise CheckpointError(
      f"the checkpoint has {x.dtype} arrays: set jax_enable_x64 to load them."
    )
  return placed


def _nest(leaves: dict[tuple[str, ...], Any]) -> Any:
  """Returns nested dicts of leaves; a leaf without a path is the whole tree."""
  tree: dict[str, Any] = {}
  for path, x in leaves.items():
    if not path:
      return x
    *parents, last = path
    node = tree
    for key in parents:
      node = node.setdefault(key, {})
    node[last] = x
  return tree


# Files.


def _context() -> Any:
  """Returns an orbax context that stores the spec as JSON."""
  context = ocp.Context()
  context.checkpointables.registry = ocp.handlers.local_registry().add(
    ocp.handlers.JsonHandler, checkpointable_name="spec"
  )
  return context


@contextlib.contextmanager
def _explained(task: str, path: Place) -> Iterator[None]:
  """Turns whatever fails inside into a CheckpointError that names the path."""
  try:
    yield
  except (CheckpointError, ImportError):
    raise
  except Exception as e:  # orbax and TensorStore raise errors of many kinds
    reason = str(e).partition("\n")[0]
    raise CheckpointError(
      f"cannot {task} {path}: {type(e).__name__}: {reason}"
    ) from e


def _lead(task: Callable[[], None]) -> None:
  """Runs a task on the first of all processes; if it fails, all of them do."""
  error: Exception | None = None
  if jax.process_index() == 0:
    try:
      task()
    except Exception as e:
      error = e
  failed = multihost_utils.broadcast_one_to_all(np.array(error is not None))
  if failed:
    raise error or CheckpointError("the first process says what is wrong.")


def _probe(path: Place) -> None:
  """Raises an OSError if no folder can be made there."""
  # A save that fails inside orbax leaves threads that wait for five minutes.
  probe = path.with_name(f".{path.name}.probe")
  if _in_bucket(path):
    # Folders are but parts of names there.
    probe.write_text("")
    probe.unlink()
  else:
    probe.mkdir(exist_ok=True)
    probe.rmdir()


@contextlib.contextmanager
def _locked(folder: Place, path: Place) -> Iterator[None]:
  """Makes this the only writer of a path, by a lock on a folder.

  The system releases the lock when the process ends, in whatever way.
  """
  busy = CheckpointError(
    f"{path}: another process is saving there, or a Checkpointer that was not "
    "closed: save to another directory."
  )
  if fcntl is None or _in_bucket(folder):
    yield
    return
  try:
    file = os.open(folder, os.O_RDONLY)
  except FileNotFoundError:
    raise busy from None  # removed by the writer that has just finished
  try:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      raise busy from None
    except OSError:
      pass  # a file system without locks
    if not os.path.exists(folder) or not os.path.samestat(
      os.fstat(file), os.stat(folder)
    ):
      raise busy
    yield
  finally:
    os.close(file)


def _in_bucket(path: Place) -> bool:
  return isinstance(path, epath.Path)


def _is_whole(path: Place) -> bool:
  """Says whether there is a checkpoint, written to its end."""
  ended = not _in_bucket(path) or (path / _COMMITTED).exists()
  return ended and (path / _SPEC).exists()


def _is_unfinished(path: Place) -> bool:
  """Says whether it is a step whose save did not come to its end."""
  if not _in_bucket(path):
    return path.name.endswith(_UNFINISHED)
  parts = "packed", "state", _SPEC.parts[0]
  begun = path.name.isdecimal() and any((path / x).exists() for x in parts)
  return begun and not _is_whole(path)


def _taken(path: Place) -> bool:
  """Says whether anything is at a path but the half of a checkpoint."""
  if _in_bucket(path):
    return path.exists() and (_is_whole(path) or not (path / _SPEC).exists())
  return os.path.lexists(path)


def _remove(path: Place) -> None:
  """Deletes a folder; in a bucket a checkpoint is none before it is gone."""
  if isinstance(path, epath.Path):
    (path / _COMMITTED).unlink(missing_ok=True)
    path.rmtree(missing_ok=True)
  else:
    shutil.rmtree(path, ignore_errors=True)


def _files(folder: Any) -> Iterator[Any]:
  # The walk of epath returns names without a scheme.
  for path in folder.iterdir():
    yield from _files(path) if path.is_dir() else [path]


def _move(path: Place, target: Place) -> None:
  """Moves a checkpoint, which appears there whole or not at all."""
  if not isinstance(path, epath.Path):
    # This fails if something else has appeared there.
    path.rename(target)
    return
  if _taken(target):
    raise FileExistsError(f"{target} exists")
  _remove(target)
  # By its spec the half of a copy is known as that.
  first, last = path / _SPEC, path / _COMMITTED
  between = [file for file in _files(path) if file not in (first, last)]
  for file in (first, *between, last):
    file.copy(target / file.relative_to(path), overwrite=True)
  _remove(path)


def _stage(path: Place) -> Place:
  """Returns the folder of what is saved to a path before it is whole."""
  return path.with_name(f".{path.name}.new")


@contextlib.contextmanager
def _staged(path: Place, overwrite: bool) -> Iterator[Place]:
  """Yields where to save a checkpoint, which then appears at its path."""
  stage = _stage(path)
  with contextlib.ExitStack() as stack:

    def prepare() -> None:
      stage.mkdir(parents=True, exist_ok=True)
      stack.enter_context(_locked(stage, path))
      stack.callback(_settle, stage, path, done=True)
      _settle(stage, path)
      if _taken(path):
        if not overwrite:
          raise CheckpointError(f"{path} already exists: pass overwrite=True.")
        if not _is_whole(path):
          raise CheckpointError(
            f"{path} exists and is not a checkpoint: choose another path."
          )
      _probe(stage / "new")

    def publish() -> None:
      if overwrite and _taken(path):
        _move(path, stage / "old")
      _move(stage / "new", path)

    _lead(prepare)
    yield stage / "new"
    _lead(publish)


def _settle(stage: Place, path: Place, done: bool = False) -> None:
  """Undoes the half of a replacement, and deletes what is left over."""
  old = stage / "old"
  if _is_whole(old) and not _taken(path):
    _move(old, path)
  leftovers = stage.iterdir() if stage.exists() else ()
  for leftover in leftovers:
    # Something else may have appeared at the path: then the old one stays.
    if leftover != old or _is_whole(path):
      _remove(leftover)
  if done and not _in_bucket(stage):
    with contextlib.suppress(OSError):
      stage.rmdir()


def _steps(directory: Place) -> list[int]:
  return [
    int(path.name)
    for path in directory.glob("*")
    if path.name.isdecimal() and (not _in_bucket(path) or _is_whole(path))
  ]


def _version(package: str) -> str:
  try:
    return importlib.metadata.version(package)
  except importlib.metadata.PackageNotFoundError:
    return "not installed"


def _text(spec: Any) -> str:
  return json.dumps(spec, sort_keys=True)


def _crc_of(arrays: dict[str, np.ndarray]) -> int:
  crc = 0
  for name in sorted(arrays):
    flat = np.ascontiguousarray(arrays[name]).reshape(-1)
    crc = zlib.crc32(flat.view(np.uint8).data, crc)
  return crc


def _name(path: Iterable[str]) -> str:
  return "/".join(path) or "the leaf"


def _describe(arrays: dict[str, Any]) -> dict[str, Any]:
  return {
    k: {"shape": list(a.shape), "dtype": a.dtype.name}
    for k, a in arrays.items()
  }
