"""What a file or folder of another origin is, told by its bytes and names.

Nothing is loaded: a pickle, for instance, could run code.
"""

import codecs
import json
import os
import re
import zipfile
from collections.abc import Callable
from pathlib import Path

from tern_jax.storage import limits

#: What a file is of which nothing tells anything.
UNKNOWN = "data of an unknown format"

# As much of a file as is looked at.
_HEAD = 1 << 16
# At the start of a file, and what it is then.
_MAGIC = {
  b"\x93NUMPY": "a NumPy array (.npy)",
  b"\x89HDF\r\n\x1a\n": "an HDF5 file, as Keras writes weights",
  b"GGUF": "a GGUF file",
  b"version https://git-lfs": "a pointer of Git LFS: run `git lfs pull` first",
  b"\x1f\x8b": "data compressed by gzip",
  b"\x28\xb5\x2f\xfd": "data compressed by Zstandard",
  b"\xfd7zXZ\0": "data compressed by xz",
}
_TORCH = "a PyTorch checkpoint"
# The number that PyTorch wrote first before it used ZIP archives.
_OLD_TORCH = bytes.fromhex("8a0a6cfc9c46f920 6aa85019")
# Names in a ZIP archive, by their ends, and what it is then.
_IN_ZIP = {
  "data.pkl": _TORCH,
  ".npy": "NumPy arrays (.npz)",
  "model.weights.h5": "a Keras model (.keras)",
}
# Names in a folder, and what it is then.
_IN_FOLDER = {
  "saved_model.pb": "a TensorFlow SavedModel",
  "manifest.ocdbt": "an Orbax checkpoint, not written by tern_jax",
  "_METADATA": "an Orbax checkpoint, not written by tern_jax",
  "_CHECKPOINT_METADATA": "an Orbax checkpoint, not written by tern_jax",
  "checkpoint": "a checkpoint of Flax or TensorFlow",
  "pytorch_model.bin": _TORCH,
}


def of_file(path: Path) -> str:
  """Returns what a file is, as a noun.

  Raises:
    OSError: it cannot be read.
  """
  with path.open("rb") as file:
    head = file.read(_HEAD)
    if not head:
      return "an empty file"
    if head.startswith(b"PK\x03\x04"):
      return _of_zip(path)
    file.seek(-1, os.SEEK_END)
    last = file.read(1)
  for magic, what in _MAGIC.items():
    if head.startswith(magic):
      return what
  if header := safetensors_header(path):
    tensors = len(header.keys() - {"__metadata__"})
    return f"a safetensors file of {tensors} tensors"
  if head[:1] == b"\x80" and head[1:2] in b"\2\3\4\5" and last == b".":
    what = _TORCH if _OLD_TORCH in head[:20] else "a Python pickle"
    return f"{what}, which could run code and is not loaded"
  tests: dict[str, Callable[[bytes], bool]] = {
    "a TFLite model": lambda x: x[4:8] == b"TFL3",
    "a StableHLO artefact": lambda x: b"ML\xefR" in x and b"StableHLO" in x,
    "a tar archive": lambda x: x[257:262] == b"ustar",
    "msgpack, as Flax writes it": _is_msgpack,
    "probably an ONNX model": _is_onnx,
    "JSON": lambda x: x.lstrip()[:1] in (b"{", b"[") and _is_text(x),
    "text": _is_text,
  }
  found = (what for what, test in tests.items() if test(head))
  return next(found, UNKNOWN)


def of_folder(path: Path) -> str:
  """Returns what a folder is, as a noun, or "" if nothing tells it.

  Raises:
    OSError: it cannot be read.
  """
  names = set(os.listdir(path))
  if not names:
    return "an empty folder"
  if "_CHECKPOINT_METADATA" in names and "packed" in names:
    return "what is left of a checkpoint of tern_jax"
  return next((what for name, what in _IN_FOLDER.items() if name in names), "")


def safetensors_header(path: Path) -> dict[str, dict]:
  """Returns the header of a safetensors file, {} if it has none."""
  size = path.stat().st_size
  with path.open("rb") as file:
    n = int.from_bytes(file.read(8), "little")
    if n > min(size - 8, limits.JSON_BYTES):
      return {}
    try:
      header = json.loads(file.read(n))
    except (ValueError, RecursionError):
      return {}
  entries = header.values() if isinstance(header, dict) else [None]
  return header if all(isinstance(x, dict) for x in entries) else {}


def _of_zip(path: Path) -> str:
  try:
    with zipfile.ZipFile(path) as archive:
      names = archive.namelist()
  except (zipfile.BadZipFile, ValueError, NotImplementedError):
    return "a ZIP archive, incomplete: as PyTorch, NumPy and Keras write them"
  for end, what in _IN_ZIP.items():
    if any(name.endswith(end) for name in names):
      return what
  return "a ZIP archive"


def _is_msgpack(head: bytes) -> bool:
  """Whether it is a map whose first key is a short name."""
  sizes = {0xDE: 3, 0xDF: 5}
  start = sizes.get(head[0], 1 if 0x80 < head[0] <= 0x8F else 0)
  if not start or len(head) <= start:
    return False
  n = head[start] - 0xA0
  name = head[start + 1 : start + 1 + n]
  return 0 < n < 32 and len(name) == n and name.isascii()


def _is_onnx(head: bytes) -> bool:
  """Whether it is a protobuf of a small ir_version and a field after it."""
  return (
    re.match(rb"\x08[\x01-\x1f][\x12\x1a\x22\x28\x32\x3a\x42]", head)
    is not None
  )


def _is_text(head: bytes) -> bool:
  try:
    # The last character may be cut off.
    text = codecs.getincrementaldecoder("utf-8")().decode(head)
  except UnicodeDecodeError:
    return False
  return all(c.isprintable() or c.isspace() for c in text)
