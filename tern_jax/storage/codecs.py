"""How the planes of packed weights are stored: the codecs, by name.

A codec is one class and one line of `CODECS`. Checkpoints and exports ask for
nothing but what `Codec` has, and a codec of a user's own is added to `CODECS`
by its name, before files of it are written or read.
"""

import abc
from typing import Any

import numpy as np

from tern_jax.storage import entropy
from tern_jax.storage.leaves import FIELDS
from tern_jax.storage.packed import PackedTernary

#: Named arrays on the host.
Arrays = dict[str, Any]


class Codec(abc.ABC):
  """Stores two bit-planes as named arrays.

  Attributes:
    name: what `save_packed(codec=)` and the spec of a checkpoint call it.
    arrays: names of the arrays that `encode` returns; no scales.
    kind: what the metadata of a safetensors file calls a leaf; None: its name.
    incompressible: the arrays are at their entropy: that a checkpoint be
      compressed once more costs time and saves nothing.
  """

  name: str
  arrays: tuple[str, ...]
  kind: str | None = None
  incompressible: bool = False

  @abc.abstractmethod
  def encode(self, packed: PackedTernary) -> Arrays:
    """Returns the arrays that stand for the planes.

    Args:
      packed: valid weights, on the host.
    """

  @abc.abstractmethod
  def decode(
    self, arrays: Arrays, shape: tuple[int, ...]
  ) -> tuple[np.ndarray, np.ndarray]:
    """Returns the planes (nonzero, sign) of weights of a shape.

    Args:
      arrays: as `encode` returned them, or damaged: not to be trusted.
      shape: of the weights; not to be trusted either.

    Raises:
      ValueError: the arrays are damaged.
    """


class Planes(Codec):
  """The planes as they are: two bits a weight."""

  name = "planes"
  arrays = ("nonzero", "sign")
  kind = "ternary"

  def encode(self, packed: PackedTernary) -> Arrays:
    """Returns the planes."""
    return {k: getattr(packed, k) for k in self.arrays}

  def decode(
    self, arrays: Arrays, shape: tuple[int, ...]
  ) -> tuple[np.ndarray, np.ndarray]:
    """Returns the planes; `validate` checks them against the shape."""
    del shape
    return arrays["nonzero"], arrays["sign"]


class Entropy(Codec):
  """As few bits as `tern_jax.codec` makes of both planes; by constriction."""

  name = "entropy"
  arrays = ("coded",)
  kind = "coded"
  incompressible = True

  def encode(self, packed: PackedTernary) -> Arrays:
    """Returns the bytes of `tern_jax.codec.encode`."""
    return {"coded": np.frombuffer(entropy.encode(packed), np.uint8)}

  def decode(
    self, arrays: Arrays, shape: tuple[int, ...]
  ) -> tuple[np.ndarray, np.ndarray]:
    """Returns what `tern_jax.codec.decode` makes of the bytes."""
    return entropy.decode(arrays["coded"], shape)


#: All codecs by name.
CODECS: dict[str, Codec] = {c.name: c for c in (Planes(), Entropy())}


def codec_of(name: str) -> Codec:
  """Returns the codec of a name.

  Raises:
    ValueError: there is none.
  """
  if name not in CODECS:
    raise ValueError(f"codec must be one of {tuple(CODECS)}, got {name!r}.")
  return CODECS[name]


def kinds() -> dict[str, Codec]:
  """Returns the codecs by what the metadata of a file calls a leaf."""
  return {c.kind or c.name: c for c in CODECS.values()}


def encode(codec: Codec, x: PackedTernary) -> Arrays:
  """Returns all arrays that stand for packed weights, scales included."""
  return codec.encode(x) | {"w_p": x.w_p, "w_n": x.w_n}


def decode(codec: Codec, arrays: Arrays, shape: tuple[int, ...]) -> Arrays:
  """Returns the fields of `PackedTernary` that `encode` made arrays."""
  planes = codec.decode({k: arrays[k] for k in codec.arrays}, shape)
  scales = {k: x for k, x in arrays.items() if k not in codec.arrays}
  return dict(zip(FIELDS, planes, strict=False)) | scales
