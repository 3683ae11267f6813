"""How the planes of packed weights are stored: the codecs, by name.

A codec is one `Codec` and one line of `CODECS`: nothing else of it is asked by
checkpoints and exports. A codec of your own is added to `CODECS` under its name
before files of it are written or read.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from tern_jax.storage import entropy, layout, packed
from tern_jax.storage.leaves import Json
from tern_jax.storage.packed import PackedTernary

#: Named arrays on the host.
Arrays = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Codec:
  """Stores two bit-planes as named arrays.

  Args:
    name: what `save_packed(codec=)` and the spec of a checkpoint call it.
    arrays: names of the arrays that stand for the planes.
    encode: returns these arrays of valid weights on the host.
    decode: returns the planes (nonzero, sign), from the arrays and the shape of
      the weights, neither of which can be trusted; raises ValueError where it
      sees that they are damaged.
    kind: what the metadata of a safetensors file calls a leaf, "" for `name`.
    incompressible: the arrays are at their entropy, so that it would be of no
      use to compress a checkpoint once more.
  """

  name: str
  arrays: tuple[str, ...]
  encode: Callable[[PackedTernary], Arrays]
  decode: Callable[[Arrays, tuple[int, ...]], Iterable[Any]]
  kind: str = ""
  incompressible: bool = False


PLANES = Codec(
  "planes",
  ("nonzero", "sign"),
  encode=lambda x: {"nonzero": x.nonzero, "sign": x.sign},
  decode=lambda arrays, _: (arrays["nonzero"], arrays["sign"]),
  kind="ternary",
)
ENTROPY = Codec(
  "entropy",
  ("coded",),
  encode=lambda x: {"coded": np.frombuffer(entropy.encode(x), np.uint8)},
  decode=lambda arrays, shape: entropy.decode(arrays["coded"], shape),
  kind="coded",
  incompressible=True,
)

#: All codecs by name.
CODECS = {c.name: c for c in (PLANES, ENTROPY)}


def named(name: str) -> Codec:
  """Returns the codec of a name; raises ValueError if there is none."""
  if name not in CODECS:
    raise ValueError(f"codec must be one of {tuple(CODECS)}, got {name!r}.")
  return CODECS[name]


def by_kind() -> dict[str, Codec]:
  """Returns the codecs by what the metadata of a file calls a leaf."""
  return {c.kind or c.name: c for c in CODECS.values()}


def stored(x: PackedTernary) -> tuple[PackedTernary, Json]:
  """Returns weights on the host as files have them, and their layout.

  In files the planes are those of the whole array. The layout, for the entry,
  has the packed axis, and `lead` where `pack` would not say it: the number of
  leading axes that were not packed in memory.
  """
  whole = packed.stored(x)
  usual = layout.lead_of(x.shape, whole.w_p, whole.w_n)
  as_usual = layout.plane_shape(x.shape, usual) == x.nonzero.shape
  return whole, {"axis": whole.axis} | ({} if as_usual else {"lead": x.lead})


def restored(
  x: PackedTernary, entry: Json, like: object = None
) -> PackedTernary:
  """Returns weights of a file, on the host, packed as before they were stored.

  Or as `like`, if that is packed weights of this shape.
  """
  if isinstance(like, PackedTernary) and like.shape == x.shape:
    return packed.relaid(x, like.lead)
  lead = check_lead(entry)
  if lead is None:
    lead = layout.lead_of(x.shape, x.w_p, x.w_n)
  return packed.relaid(x, lead)


def check_lead(entry: Json) -> int | None:
  """Returns what an entry says of its leading axes, nothing taken on trust."""
  lead, ndim = entry.get("lead"), len(entry["shape"])
  if "lead" in entry and not (type(lead) is int and 0 <= lead <= ndim):
    raise ValueError(f"lead must be from 0 to {ndim}, got {lead!r}.")
  return lead


def decoded_bytes(codec: Codec, shape: tuple[int, ...]) -> int:
  """Returns the bytes of the planes that a codec makes of other arrays."""
  return 0 if codec is PLANES else 2 * math.prod(layout.plane_shape(shape))


def encode(codec: Codec, x: PackedTernary) -> Arrays:
  """Returns all arrays that stand for packed weights, scales included."""
  return codec.encode(x) | {"w_p": x.w_p, "w_n": x.w_n}


def decode(codec: Codec, arrays: Arrays, entry: Json) -> PackedTernary:
  """Returns the weights that `encode` made arrays, of an entry's shape."""
  shape = tuple(entry["shape"])
  nonzero, sign = codec.decode({k: arrays[k] for k in codec.arrays}, shape)
  scales = {k: layout.trailing(arrays[k], shape) for k in ("w_p", "w_n")}
  return PackedTernary(nonzero, sign, **scales, shape=shape, axis=entry["axis"])
