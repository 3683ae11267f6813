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
"""

import contextlib
import dataclasses
import importlib.metadata
import json
import math
import operator
import os
import shutil
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from orbax.checkpoint import v1

from tern_jax import codec as entropy_codec
from tern_jax.base import Ternary, key_str
from tern_jax.packed import PackedTernary, validate

#: Version of the layout that this module writes, and the newest that it reads.
FORMAT = 1
#: How planes can be stored: "planes" is two bits a weight, "entropy" as few as
#: `tern_jax.codec` makes of them.
CODECS = ("planes", "entropy")

#: Where orbax puts the spec.
_SPEC = Path("spec", "data.json")
# Its own annotations refuse pathlib paths, and its own policies.
ocp: Any = v1
_number = "{:04d}".format
_TERNARY = ("nonzero", "sign", "w_p", "w_n")


class CheckpointError(ValueError):
  """A checkpoint cannot be written, is damaged, or does not fit the request."""


def save_packed(
  path: str | os.PathLike[str],
  tree: Any,
  *,
  codec: str = "planes",
  method: Any = None,
  overwrite: bool = False,
) -> None:
  """Saves packed weights, and the dense leaves beside them, to a directory.

  The directory appears whole or not at all.

  Args:
    path: directory to make, parents included.
    tree: any pytree of arrays and `PackedTernary`.
    codec: how the planes are stored: "planes", two bits a weight; or "entropy",
      their entropy, for which constriction is needed, to load them too.
    method: what made the weights; its repr is kept in the spec.
    overwrite: replace the checkpoint at `path`, once the new one is written.

  Raises:
    ValueError: unknown codec, or an invalid packed leaf.
    TypeError: a leaf is neither packed nor an array.
    ImportError: codec="entropy" without constriction.
    CheckpointError: the path is taken or cannot be written.

  >>> import tempfile
  >>> from tern_jax.packed import pack
  >>> t = Ternary(jnp.eye(8, dtype=jnp.int8), jnp.array(2.0), jnp.array(2.0))
  >>> with tempfile.TemporaryDirectory() as directory:
  ...   save_packed(directory + "/net", {"Dense_0": {"kernel": pack(t)}})
  ...   net = load_packed(directory + "/net")
  >>> net["Dense_0"]["kernel"].dequantize()[0].tolist()
  [2.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]
  """
  if codec not in CODECS:
    raise ValueError(f"codec must be one of {CODECS}, got {codec!r}.")
  path = Path(path).absolute()
  parts = _parts({"packed": tree}, codec=codec, method=method)
  with _explained("save", path):
    if os.path.lexists(path):
      if not overwrite:
        raise CheckpointError(f"{path} already exists: pass overwrite=True.")
      if not (path / _SPEC).exists():
        raise CheckpointError(
          f"{path} exists and is not a checkpoint: choose another path."
        )
    fresh = path.with_name(f".{path.name}.new") if overwrite else path
    _probe(fresh)
    try:
      with _context():
        ocp.save_checkpointables(fresh, parts, overwrite=overwrite)
    except BaseException:
      shutil.rmtree(f"{fresh}.orbax-checkpoint-tmp", ignore_errors=True)
      raise
    if overwrite:
      _swap(fresh, path)


def load_packed(path: str | os.PathLike[str], like: Any = None) -> Any:
  """Loads and verifies what `save_packed` or a `Checkpointer` saved.

  Args:
    path: a checkpoint, a step of a training run, or a run: its latest step.
    like: tree of arrays, or of their shapes, with the paths of the saved tree;
      its shardings are used too. None: nested dicts, no model code needed.

  Returns:
    The saved tree, of the structure of `like`, with `PackedTernary` leaves
    where it was packed. Leaves of `like` that are not arrays stay as they are.

  Raises:
    CheckpointError: nothing there, damaged, from a newer version of the
      format, or of other paths, shapes or dtypes than `like`.
    ImportError: its codec is "entropy", and constriction is missing.
  """
  path = locate(path)
  return _load(path, "packed", read_spec(path), like)


def examine(
  path: str | os.PathLike[str], part: str = "packed"
) -> dict[tuple[str, ...], Any]:
  """Loads and verifies each leaf alone, whatever is wrong with the others.

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
      stored = _stored(path, part, entries)
  except CheckpointError as e:
    return dict.fromkeys(entries, e)
  for i, (keys, entry) in enumerate(entries.items()):
    try:
      with _explained("read", path):
        found[keys] = _leaf(path, entry, stored.get(_number(i), {}))
    except CheckpointError as e:
      found[keys] = e
  return found


def locate(path: str | os.PathLike[str]) -> Path:
  """Returns the folder of a checkpoint, which may be a run's latest step.

  Raises:
    CheckpointError: there is no checkpoint.
  """
  path = Path(path).absolute()
  if not path.is_dir():
    what = "is a file" if path.exists() else "does not exist"
    raise CheckpointError(f"{path} {what}: give the folder of a checkpoint.")
  steps = [] if (path / _SPEC).exists() else _steps(path)
  if steps:
    path = path / str(max(steps))
  if not (path / _SPEC).exists():
    raise CheckpointError(f"{path} holds no checkpoint: its spec is missing.")
  return path


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
  appears whole or not at all; an interrupted save is ignored.

  Args:
    directory: of the run, made if it does not exist; a step is a folder in it.
    save_interval: steps between saves; `save` skips the others.
    keep: number of latest steps to keep, None for all.

  Raises:
    ValueError: `save_interval` or `keep` below 1.
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
  ):
    for name, value in (("save_interval", save_interval), ("keep", keep)):
      if value is not None and value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}.")
    saving = ocp.training.save_decision_policies
    keeping = ocp.training.preservation_policies
    self.directory = Path(directory).absolute()
    with _explained("open", self.directory):
      self._run = ocp.training.Checkpointer(
        self.directory,
        context=_context(),
        save_decision_policy=saving.FixedIntervalPolicy(save_interval),
        preservation_policy=keeping.LatestN(keep),
      )

  def save(
    self,
    step: int,
    state: Any,
    packed: Any,
    *,
    extra: Any = None,
    method: Any = None,
    force: bool = False,
  ) -> bool:
    """Saves one step, if it is due; returns once it is on disk.

    Args:
      step: number of the step, not below that of a saved step.
      state: pytree of arrays to resume from; typed PRNG keys are welcome.
      packed: pytree with `PackedTernary` leaves, as for `save_packed`.
      extra: JSON value, such as the position of the data iterator. It comes
        back as JSON has it: tuples as lists, keys as strings.
      method: what made the packed weights; its repr is kept in the spec.
      force: save although the step is not a multiple of the interval.

    Returns:
      Whether the step was saved now: it was due and not saved already.

    Raises:
      TypeError: a leaf is no array, or `extra` is no JSON value.
      CheckpointError: a later step exists, or the step cannot be written.
    """
    step, latest = operator.index(step), self.latest_step()
    path = self.directory / str(step)
    if latest is not None and step < latest:
      raise CheckpointError(
        f"{path}: step {latest} is saved already: save later steps, or go on "
        "from an older step in another directory."
      )
    if step == latest or not (force or self._run.should_save(step)):
      return False
    trees = {"state": state, "packed": packed}
    parts = _parts(trees, codec="planes", method=method, extra=extra)
    with _explained("save", path):
      _probe(path)
      return self._run.save_checkpointables(step, parts, force=True)

  def restore(self, like: Any, step: int | None = None) -> tuple[Any, Any, int]:
    """Restores the state of a step.

    Args:
      like: state, or its shapes, of the structure, shapes, dtypes and
        shardings to restore; any number of devices, whatever it was saved on.
      step: number of the step, None for the latest.

    Returns:
      (state, extra, step).

    Raises:
      CheckpointError: no such step, damaged, or of other paths, shapes or
        dtypes than `like`.
    """
    path = self.directory if step is None else self.directory / str(step)
    path = locate(path)
    spec = read_spec(path)
    return _load(path, "state", spec, like), spec["extra"], int(path.name)

  def latest_step(self) -> int | None:
    """Returns the number of the latest saved step, None if there is none."""
    return max(_steps(self.directory), default=None)

  def __exit__(self, *_: object) -> None:
    self._run.close()


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


# Parts to trees.


def _load(path: Path, part: str, spec: dict[str, Any], like: Any) -> Any:
  """Returns a part of a checkpoint, verified, in the structure of `like`."""
  with _explained("read", path):
    entries = _entries(path, part, spec)
    if like is None:
      found = _read(path, part, entries)
      return _nest({k: _place(x, None) for k, x in found.items()})
    wanted, treedef = _flatten(like)
    _check_fit(path, entries, wanted)
    found = _read(path, part, entries)
    leaves = [
      _place(found[k], x) if k in found else x for k, x in wanted.items()
    ]
    return jax.tree.unflatten(treedef, leaves)


def _entries(
  path: Path, part: str, spec: dict[str, Any]
) -> dict[tuple[str, ...], Any]:
  """Returns the leaves of a part, as the spec describes them."""
  if part not in spec["leaves"]:
    raise CheckpointError(f"{path} has packed weights only, no {part}.")
  return {tuple(e["path"]): e for e in spec["leaves"][part]}


def _check_fit(path: Path, entries: dict, wanted: dict) -> None:
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


def _read(path: Path, part: str, entries: dict) -> dict[Any, Any]:
  """Returns the verified leaves of a part, on the host."""
  stored = _stored(path, part, entries)
  return {
    keys: _leaf(path, e, stored.get(_number(i), {}))
    for i, (keys, e) in enumerate(entries.items())
  }


def _stored(path: Path, part: str, entries: dict) -> dict[str, Any]:
  """Returns the arrays of a part, by the numbers of their leaves."""
  on_disk = (path / part).exists()
  # The index must agree with the spec before any array is allocated.
  index = ocp.metadata(path, part).metadata if on_disk else {}
  for i, e in enumerate(entries.values()):
    described = {k: a for k, a in e["arrays"].items() if math.prod(a["shape"])}
    if _describe(index.get(_number(i), {})) != described:
      raise CheckpointError(
        f"{path}: {_name(e['path'])} is damaged: its arrays are not those of "
        f"the spec, {described}."
      )
  return ocp.load(path, checkpointable_name=part) if on_disk else {}


def _leaf(path: Path, entry: dict, data: dict[str, Any]) -> Any:
  """Returns a verified leaf, on the host."""
  name = _name(entry["path"])
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


def _planes(path: Path, entry: dict, arrays: dict[str, Any]) -> dict[str, Any]:
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
def _explained(task: str, path: Path) -> Iterator[None]:
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


def _probe(path: Path) -> None:
  """Raises an OSError if no folder can be made there; makes its parents."""
  # A save that fails inside orbax leaves threads that wait for five minutes.
  if jax.process_index() == 0:
    probe = path.with_name(f".{path.name}.probe")
    probe.mkdir(parents=True, exist_ok=True)
    probe.rmdir()


def _steps(directory: Path) -> list[int]:
  return [int(p.name) for p in directory.glob("*") if p.name.isdecimal()]


def _swap(fresh: Path, path: Path) -> None:
  """Puts a whole checkpoint in the place of another, then deletes the other."""
  if jax.process_index() == 0:
    old = path.with_name(f".{path.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if path.exists():
      path.rename(old)
    try:
      fresh.rename(path)
    except OSError:
      old.rename(path)
      raise
    shutil.rmtree(old, ignore_errors=True)
  multihost_utils.sync_global_devices(f"tern_jax swapped {path}")


def _version(package: str) -> str:
  try:
    return importlib.metadata.version(package)
  except importlib.metadata.PackageNotFoundError:
    return "not installed"


def _text(spec: Any) -> str:
  return json.dumps(spec, sort_keys=True)


def _crc_of(arrays: dict[str, np.ndarray]) -> int:
  return zlib.crc32(b"".join(arrays[k].tobytes() for k in sorted(arrays)))


def _name(path: Iterable[str]) -> str:
  return "/".join(path) or "the leaf"


def _describe(arrays: dict[str, Any]) -> dict[str, Any]:
  return {
    k: {"shape": list(a.shape), "dtype": a.dtype.name}
    for k, a in arrays.items()
  }
