"""Files that no saver wrote: builders of checkpoints and safetensors files.

Each takes an empty folder and returns the path to load. None takes long, or
much memory or disk, whatever its file claims.
"""

import copy
import functools
import json
import os
import shutil
import socket
import struct
import tempfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import tensorstore
from safetensors.numpy import save_file

from tern_jax import codec
from tern_jax.checkpoint import save_packed
from tern_jax.core.containers import Ternary
from tern_jax.storage.packed import PackedTernary, pack

#: What changes a JSON value in place, or returns another.
Change = Callable[[Any], Any]

#: 10^12 weights.
HUGE = 10**6


@functools.cache
def ternary() -> PackedTernary:
  """Returns packed weights of shape [16, 8]."""
  codes = np.random.default_rng(0).integers(-1, 2, (16, 8)).astype(np.int8)
  return pack(Ternary(jnp.asarray(codes), jnp.float32(0.5), jnp.float32(0.3)))


@functools.cache
def _template() -> tempfile.TemporaryDirectory:
  folder = tempfile.TemporaryDirectory()
  save_packed(Path(folder.name) / "net", {"kernel": ternary()})
  return folder


def saved(folder: Path) -> Path:
  """Saves a kernel; its planes are 0000.nonzero and 0000.sign."""
  source = Path(_template().name) / "net"
  return shutil.copytree(source, folder / "net")


# What arrays claim.


def reseal(path: Path, change: Change) -> None:
  """Changes the spec of a checkpoint and makes its crc32 right again."""
  file = path / "spec" / "data.json"
  spec = json.loads(file.read_text())["spec"]
  change(spec)
  crc = zlib.crc32(json.dumps(spec, sort_keys=True).encode())
  file.write_text(json.dumps({"crc32": crc, "spec": spec}))


def store(path: Path) -> Any:
  """Opens the database of the packed weights."""
  base = {"driver": "file", "path": f"{path}/packed/"}
  spec = {"driver": "ocdbt", "base": base}
  return tensorstore.KvStore.open(spec).result()


def claim(
  path: Path,
  shape: Sequence[int],
  change: Change | None = None,
  names: Sequence[str] = ("nonzero", "sign"),
  **facts: Any,
) -> Path:
  """Makes arrays of the first leaf claim a shape, in zarr and in the spec."""
  shape = list(shape)

  def said(spec: Any) -> None:
    entry = spec["leaves"]["packed"][0]
    entry["shape"] = shape
    if entry["kind"] == "ternary":
      entry["shape"], entry["axis"] = [8 * shape[0], *shape[1:]], 0
    for name in names:
      entry["arrays"][name] |= {"shape": shape, **facts}

  reseal(path, said)
  arrays = store(path)
  for name in names:
    key = f"0000.{name}/zarr.json"
    zarr = json.loads(arrays.read(key).result().value)
    zarr["shape"] = shape
    zarr["chunk_grid"]["configuration"]["chunk_shape"] = shape
    zarr["codecs"][0]["configuration"]["chunk_shape"] = shape
    if change:
      change(zarr)
    arrays.write(key, json.dumps(zarr)).result()
  return path


def put_chunk(
  path: Path, data: bytes, names: Sequence[str] = ("nonzero", "sign")
) -> None:
  """Stores the one inner chunk of arrays of two axes."""
  index = struct.pack("<QQ", 0, len(data))
  crc = struct.pack("<I", crc32c(index))
  for name in names:
    store(path).write(f"0000.{name}/c/0/0", data + index + crc).result()


def crc32c(data: bytes) -> int:
  """Returns the CRC-32C of bytes."""
  crc = 0xFFFFFFFF
  for byte in data:
    crc ^= byte
    for _ in range(8):
      crc = crc >> 1 ^ 0x82F63B78 * (crc & 1)
  return crc ^ 0xFFFFFFFF


def zstd_zeros(blocks: int, window: bytes = b"\x38") -> bytes:
  """A Zstandard frame of `blocks` times 128 kB of zeros, in 4 bytes each."""
  rle, last = 1 << 1, 1
  head = ((1 << 17) << 3 | rle).to_bytes(3, "little") + b"\0"
  end = ((1 << 17) << 3 | rle | last).to_bytes(3, "little") + b"\0"
  return b"\x28\xb5\x2f\xfd\0" + window + head * (blocks - 1) + end


def trillion_weights(folder: Path) -> Path:
  """Makes 76 kB that claim 10^12 weights."""
  return claim(saved(folder), [HUGE // 8, HUGE])


def bomb_of_claimed_size(folder: Path) -> Path:
  """139 kB that are 4.5 GB of zeros, as claimed."""
  path = claim(saved(folder), [1 << 17, 17_000])
  put_chunk(path, zstd_zeros(17_000))
  return path


def bomb_larger_than_claimed(folder: Path) -> Path:
  """Makes 128 kB that are 4 GB of zeros, where 128 bytes are claimed."""
  path = claim(saved(folder), [16, 8])
  put_chunk(path, zstd_zeros(32_000))
  return path


def window_of_a_frame(folder: Path) -> Path:
  """A frame that asks its reader for a window of 2 GB."""
  path = claim(saved(folder), [1 << 10, 1 << 9])
  put_chunk(path, zstd_zeros(4, window=bytes([21 << 3])))
  return path


def inner_chunks_of_one(folder: Path) -> Path:
  """Makes shards of 16 million chunks."""

  def change(zarr: Any) -> None:
    zarr["codecs"][0]["configuration"]["chunk_shape"] = [1, 1]

  return claim(saved(folder), [1 << 12, 1 << 12], change)


def chunks_of_one(folder: Path) -> Path:
  """Makes an array of 16 million shards."""

  def change(zarr: Any) -> None:
    inner_one = zarr["codecs"][0]["configuration"]
    inner_one["chunk_shape"] = [1, 1]
    zarr["chunk_grid"]["configuration"]["chunk_shape"] = [1, 1]

  return claim(saved(folder), [1 << 12, 1 << 12], change)


def chunk_larger_than_array(folder: Path) -> Path:
  """Makes a shard of 10^12 bytes for an array of 16."""

  def change(zarr: Any) -> None:
    for facts in (zarr["chunk_grid"], zarr["codecs"][0]):
      facts["configuration"]["chunk_shape"] = [HUGE, HUGE]

  return claim(saved(folder), [2, 8], change)


def zeros_in_entropy_code(folder: Path) -> Path:
  """8.6 kB that are 10^9 weights, as claimed."""
  chunk = 1 << 20
  zeros = Ternary(jnp.zeros(chunk, jnp.int8), jnp.float32(1), jnp.float32(1))
  data, n = codec.encode(pack(zeros)), 1000
  # Version, two models of one probability, and the table of one chunk.
  head, entry, words = data[:7], data[7:15], data[15:]
  coded = np.frombuffer(head + entry * n + words * n, np.uint8)
  one = np.ones((), np.float32)
  tensors = {"x.coded": coded, "x.w_p": one, "x.w_n": one}
  return forge(folder / "net.safetensors", tensors, [n * chunk])


def forge(path: Path, tensors, shape, /, **more) -> Path:
  """A safetensors file of one coded leaf, its checksums right."""
  crc = 0
  for name in sorted(tensors):
    crc = zlib.crc32(tensors[name].tobytes(), crc)
  leaf: Any = {"path": ["x"], "name": "x", "kind": "coded", "crc32": crc}
  leaf["tensors"] = {
    k: {"dtype": x.dtype.name, "shape": list(x.shape)}
    for k, x in tensors.items()
  }
  leaf |= {"shape": shape, "axis": 0} | more
  text = json.dumps({"format": 1, "leaves": [leaf]})
  metadata = {"tern_jax": text, "crc32": str(zlib.crc32(text.encode()))}
  save_file(tensors, path, metadata)
  return path


# The database that arrays lie in: a manifest and a node, byte by byte.


def varint(*numbers: int) -> bytes:
  """Returns numbers in 7 bits a byte."""
  out = bytearray()
  for n in numbers:
    while n > 127:
      out.append(n & 127 | 128)
      n >>= 7
    out.append(n)
  return bytes(out)


def sealed(magic: int, body: bytes) -> bytes:
  """An uncompressed file of an OCDBT database."""
  size = 4 + 8 + 2 + len(body) + 4
  data = struct.pack(">I", magic) + struct.pack("<Q", size) + b"\0\0" + body
  return data + struct.pack("<I", crc32c(data))


def put_node(path: Path, node: bytes, keys: int) -> Path:
  """Makes a node the only one of a checkpoint's database."""
  name = b"d/node"
  (path / "packed" / "d" / "node").write_bytes(node := sealed(0x0CDB20DE, node))
  config = bytes(16) + varint(0, 1024, 100_000_000) + b"\x04\0"
  files = varint(1, len(name), 0) + name
  # One version: generation 1, height 0, file 0, offset 0, length; statistics.
  version = varint(1, 1) + b"\0" + varint(0, 0, len(node), keys, len(node), 0)
  manifest = sealed(0x0CDB3A2A, config + files + version + bytes(9))
  (path / "packed" / "manifest.ocdbt").write_bytes(manifest)
  return path


def long_keys(folder: Path) -> Path:
  """160 kB that are 20,000 keys of 65 kB."""
  n, prefix = 20_000, 65_000
  suffixes = (bytes([i >> 14, i >> 7 & 127, i & 127]) for i in range(n - 1))
  body = b"\0" + varint(0, n)
  body += varint(0) + varint(prefix) * (n - 2)
  body += varint(1, prefix + 3) + varint(3) * (n - 2)
  body += b"a" + b"b" * prefix + b"".join(suffixes)
  body += varint(0) * n + bytes(n)
  return put_node(saved(folder), body, n)


def put_reference(path: Path, name: bytes, offset: int, size: int) -> Path:
  """Says that a chunk of the first leaf lies somewhere else."""
  arrays, chunk = store(path), b"0000.nonzero/c/0/0"
  values = {k: arrays.read(k).result().value for k in arrays.list().result()}
  keys = sorted(values)
  body = b"\0" + varint(1, len(name), 0) + name + varint(len(keys))
  body += varint(*[0] * (len(keys) - 1), *map(len, keys)) + b"".join(keys)
  body += varint(*(size if k == chunk else len(values[k]) for k in keys))
  body += bytes(k == chunk for k in keys) + varint(0, offset)
  body += b"".join(values[k] for k in keys if k != chunk)
  return put_node(path, body, len(keys))


def value_of_a_terabyte(folder: Path) -> Path:
  """Makes an array whose one chunk is a terabyte of a sparse file."""
  path = saved(folder)
  with (path / "packed" / "d" / "sparse").open("wb") as file:
    file.truncate(1 << 40)
  return put_reference(path, b"d/sparse", 0, 1 << 40)


def value_beyond_its_file(folder: Path) -> Path:
  """Makes a chunk that lies behind the end of its file."""
  return put_reference(saved(folder), b"d/node", 2**62, 2**62)


def value_outside(folder: Path) -> Path:
  """Makes a chunk that lies in a file outside of the checkpoint."""
  (folder / "secret").write_bytes(bytes(100))
  return put_reference(saved(folder), b"../../secret", 0, 50)


def node_in_itself(folder: Path) -> Path:
  """Makes a tree of nodes that has no end."""
  path, name, key = saved(folder), b"d/node", b"0000.nonzero/zarr.json"
  body = b"\1" + varint(1, len(name), 0) + name + varint(1, len(key), 0) + key
  # The length of the node is known once it is written.
  for size in (0, 18 + len(body) + 6):
    put_node(path, body + varint(0, 0, size, 1, size, 0), 1)
  return path


# Other layouts.


def described(folder: Path, change: Change) -> Path:
  """What zarr says of an array of a valid checkpoint, changed."""
  path = saved(folder)
  key, arrays = "0000.nonzero/zarr.json", store(path)
  facts = json.loads(arrays.read(key).result().value)
  arrays.write(key, json.dumps(change(facts) or facts)).result()
  return path


LAYOUTS = {
  "gzip": lambda x: inner(x)["codecs"].append(
    {"name": "gzip", "configuration": {"level": 1}}
  ),
  "nested shards": lambda x: inner(x).update(codecs=copy.deepcopy(x["codecs"])),
  "no shard": lambda x: x.update(codecs=[{"name": "bytes"}]),
  "two shards": lambda x: x["codecs"].append(x["codecs"][0]),
  "a transformer": lambda x: x.update(storage_transformers=[{"name": "x"}]),
  "another grid": lambda x: x["chunk_grid"].update(name="rectangular"),
  "another rank": lambda x: inner(x).update(chunk_shape=[2]),
  "a negative chunk": lambda x: inner(x).update(chunk_shape=[-2, 8]),
  "an empty chunk": lambda x: inner(x).update(chunk_shape=[0, 8]),
  "a negative shape": lambda x: x.update(shape=[-2, 8]),
  "an endless shape": lambda x: x.update(shape=[2**63, 8]),
  "a shape of text": lambda x: x.update(shape=["2", 8]),
  "a shape that multiplies": lambda x: x.update(shape=[10**9, "a"]),
  "a wide dtype": lambda x: x.update(data_type="r8000000"),
  "an unknown dtype": lambda x: x.update(data_type="S1000000"),
  "a list for a dtype": lambda x: x.update(data_type=["uint8"]),
  "zarr 2": lambda x: x.update(zarr_format=2),
  "a list": lambda x: [x],
  "much text": lambda x: x.update(attributes={"x": "y" * 100_000}),
}


def inner(facts: Any) -> Any:
  """Returns what a shard is made of."""
  return facts["codecs"][0]["configuration"]


def trees(folder: Path, change: Change) -> Path:
  """What orbax says of the tree of a valid checkpoint, changed."""
  file = saved(folder) / "packed" / "_METADATA"
  tree = json.loads(file.read_text())
  file.write_text(json.dumps(change(tree) or tree))
  return folder / "net"


def first(tree: Any) -> Any:
  """Returns the first array of a tree."""
  return next(iter(tree["tree_metadata"].values()))


TREES = {
  "zarr 2": lambda x: x.update(use_zarr3=False),
  "no database": lambda x: x.update(use_ocdbt=False),
  "a flag of text": lambda x: x.update(use_ocdbt="yes"),
  "a string": lambda x: first(x)["value_metadata"].update(value_type="string"),
  "a jax.Array": lambda x: first(x)["value_metadata"].update(
    value_type="jax.Array"
  ),
  "one key": lambda x: first(x)["key_metadata"].pop(),
  "a key that is no text": lambda x: first(x)["key_metadata"][0].update(
    key=[1]
  ),
  "no tree": lambda x: x.update(tree_metadata=None),
  "a list": lambda x: [x],
}


# Specs.


def specs(folder: Path, change: Change) -> Path:
  """The spec of a valid checkpoint, changed, its checksum right."""
  path = saved(folder)
  reseal(path, change)
  return path


def leaf(spec: Any) -> Any:
  """Returns the first leaf of a spec."""
  return spec["leaves"]["packed"][0]


def arrays(spec: Any) -> Any:
  """Returns its first array."""
  return leaf(spec)["arrays"]["nonzero"]


SPECS = {
  "many leaves": lambda s: s["leaves"].update(
    packed=[leaf(s) | {"path": [str(i)]} for i in range(20_000)]
  ),
  "a shape that multiplies": lambda s: arrays(s).update(shape=[10**9, "a"]),
  "a shape of lists": lambda s: arrays(s).update(shape=[10**9, [0]]),
  "a long shape": lambda s: arrays(s).update(shape=[2] * 1000),
  "a wide dtype": lambda s: arrays(s).update(dtype="S1000000"),
  "a structured dtype": lambda s: arrays(s).update(dtype="f8,f8"),
  "objects": lambda s: arrays(s).update(dtype="object"),
  "dates": lambda s: arrays(s).update(dtype="datetime64[s]"),
  "an alias of a dtype": lambda s: arrays(s).update(dtype="u1"),
  "a dict for a dtype": lambda s: arrays(s).update(dtype={"names": []}),
  "a path of numbers": lambda s: leaf(s).update(path=[1]),
  "a path of lists": lambda s: leaf(s).update(path=[["x"]]),
  "no arrays": lambda s: leaf(s).update(arrays=None),
  "a codec that is no text": lambda s: s.update(codec=["planes"]),
  "a kind of key": lambda s: leaf(s).update(kind="key", impl="x\x1b\n"),
  "an axis of text": lambda s: leaf(s).update(axis="\x1b[31m\nfine"),
}


# Files that are none.


def _socket(path: Path) -> None:
  # The path of a socket is short.
  where = os.getcwd()
  os.chdir(path.parent)
  try:
    with socket.socket(socket.AF_UNIX) as s:
      s.bind(path.name)
  finally:
    os.chdir(where)


def _link_out(path: Path) -> None:
  outside = path.parents[1] / "outside"
  outside.write_text("{}")
  path.symlink_to(outside)


#: What they are, and how each is made.
KINDS = {
  "a FIFO": os.mkfifo,
  "a socket": _socket,
  "a symbolic link": _link_out,
}
LINKS = {
  "to a device": lambda path: path.symlink_to("/dev/zero"),
  "to nothing": lambda path: path.symlink_to("nothing"),
  "to itself": lambda path: path.symlink_to(path.name),
  "to a folder": lambda path: path.symlink_to("/", target_is_directory=True),
  "inside": lambda path: path.symlink_to(path.parent / "manifest.ocdbt"),
}
#: Where they lie.
PLACES = (
  "spec/data.json",
  "packed/_METADATA",
  "packed/manifest.ocdbt",
  "packed/d/more",
  "_CHECKPOINT_METADATA",
  "more",
)


def special(folder: Path, make, place: str) -> Path:
  """A checkpoint with something else in place of a file."""
  path = saved(folder)
  (path / place).unlink(missing_ok=True)
  make(path / place)
  return path


def files() -> dict[str, Callable[[Path], Path]]:
  """Returns what makes each file, from an empty folder, by a name."""
  found: dict[str, Callable[[Path], Path]] = {
    build.__name__: build
    for build in (
      trillion_weights,
      bomb_of_claimed_size,
      bomb_larger_than_claimed,
      window_of_a_frame,
      inner_chunks_of_one,
      chunks_of_one,
      chunk_larger_than_array,
      zeros_in_entropy_code,
      long_keys,
      value_of_a_terabyte,
      value_beyond_its_file,
      value_outside,
      node_in_itself,
    )
  }
  for build, changes in (
    (described, LAYOUTS),
    (trees, TREES),
    (specs, SPECS),
  ):
    for name, change in changes.items():
      make = functools.partial(build, change=change)
      found[f"{build.__name__}: {name}"] = make
  for name, make in (KINDS | LINKS).items():
    for place in PLACES:
      build = functools.partial(special, make=make, place=place)
      found[f"{name} as {place}"] = build
  return found
