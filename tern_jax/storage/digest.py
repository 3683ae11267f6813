"""A digest over the content of a tree: the same however it is stored.

A leaf is its header and its arrays. The header is JSON in ASCII, with sorted
keys, ", " and ": " as separators, and backslash escapes for all other
characters:

  "arrays"  {name: {"dtype": as NumPy calls it, "shape": [...]}}: value of a
            dense leaf or a key; nonzero, sign, w_n and w_p of a ternary one;
  "impl"    only of a key: what `jax.random.key_impl` calls it;
  "kind"    "dense", "ternary" or "key";
  "path"    list of strings: the keys that lead to the leaf, without the fields
            of boxes, as `load_packed(path)` returns it;
  "shape"   of the weights, the array or the keys.

The arrays are the bytes of each, in the order of their names, in C order and
little-endian; `int4` takes a byte. The planes are those of the whole array, as
files have them: nonzero and sign are `np.packbits(bits, axis,
bitorder="little")` along the first axis whose size is a positive multiple of 8,
or of all weights in C order if there is none.

  leaf     SHA-256 of: u64, the bytes of the header, little-endian; the header;
           the arrays;
  content  SHA-256 of: "tern_jax content 1" and a newline; the digests of all
           leaves, 32 bytes each, sorted.

Versions, method, codec, compression and the order of leaves are no part of it.
"""

import hashlib
import json
import string
import struct
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from tern_jax.storage import codecs, leaves
from tern_jax.storage.leaves import CheckpointError, Json, Leaf, Path
from tern_jax.storage.packed import PackedTernary

_HEAD = b"tern_jax content 1\n"


class Digest:
  """Collects leaves, in any order, one after the other.

  Args:
    entries: of all leaves, by their paths, as files describe them.
  """

  def __init__(self, entries: Mapping[Path, Json]):
    self._paths = leaves.unboxed(entries)
    self._leaves: list[bytes] = []

  def add(self, path: Path, leaf: Leaf) -> None:
    """Adds a leaf on the host, packed in any way."""
    extra = {}
    if isinstance(leaf, PackedTernary):
      kind, (whole, _) = "ternary", codecs.stored(leaf)
      arrays: dict[str, Any] = {k: getattr(whole, k) for k in leaves.FIELDS}
    elif jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
      kind, extra = "key", {"impl": str(jax.random.key_impl(leaf))}
      arrays = {"value": np.asarray(jax.random.key_data(leaf))}
    else:
      kind, arrays = "dense", {"value": np.asarray(leaf)}
    arrays = {k: np.asarray(arrays[k]) for k in sorted(arrays)}
    header = {
      "arrays": leaves.describe(arrays),
      "kind": kind,
      "path": self._paths[path],
      "shape": leaf.shape,
    }
    text = json.dumps(header | extra, sort_keys=True).encode()
    digest = hashlib.sha256(struct.pack("<Q", len(text)) + text)
    for x in arrays.values():
      digest.update(leaves.bytes_of(x))
    self._leaves.append(digest.digest())

  def hexdigest(self) -> str:
    """Returns the digest of what was added."""
    return hashlib.sha256(b"".join([_HEAD, *sorted(self._leaves)])).hexdigest()

  def check(self, name: object, sha256: str | None) -> None:
    """Raises a CheckpointError if another digest is given than this."""
    if sha256 is not None and self.hexdigest() != sha256.lower():
      found = f"content of SHA-256 {self.hexdigest()}, and not {sha256}"
      hint = "it is not what was published"
      raise CheckpointError(f"{name} has {found}: {hint}.")


def checked(sha256: str | None) -> str | None:
  """Returns a digest that is one, or None."""
  if sha256 is None:
    return None
  digits = isinstance(sha256, str) and {*sha256} <= {*string.hexdigits}
  if not digits or len(sha256) != 64:
    raise ValueError(f"sha256 must be 64 hexadecimal digits, got {sha256!r}.")
  return sha256
