"""StableHLO: the whole computation, run by JAX without the model's code."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.export as jax_export
import jax.numpy as jnp

from tern_jax.core.containers import Ternary
from tern_jax.core.types import PyTree, Shaped
from tern_jax.export import files
from tern_jax.inference import apply_fn as packed_fn
from tern_jax.inference import cpu
from tern_jax.inference.prepared import Prepared
from tern_jax.inference.views import Packed
from tern_jax.storage.leaves import PathLike


def to_stablehlo(
  path: PathLike | None,
  apply_fn: Callable[..., PyTree],
  packed: PyTree,
  *inputs: PyTree,
  platforms: tuple[str, ...] = ("cpu", "cuda", "tpu"),
  native: bool = False,
  overwrite: bool = False,
) -> bytes:
  """Saves a network and its weights as one computation, for any batch size.

  The artefact has the weights packed, at 2 bits each. Products and look-ups
  read them as they are, as those of `tern_jax.inference.apply_fn` do; what else
  the network does with weights gets them unpacked. Neither the model's code nor
  this package is needed to run it, only `jax` and `flatbuffers`:

    with open(path, "rb") as file:
      net = jax.export.deserialize(bytearray(file.read()))
    outputs = net.call(*inputs)

  JAX reads it for at least six months; an older JAX may not read it.

  With `native`, CPUs run the native code of this package, and whoever reads the
  artefact must `import tern_jax` before; without that, XLA says that there is
  no implementation of custom call tern_jax_tiles. The machine that runs it
  chooses the instruction set, not the one that wrote it.

  Measured on one core with AVX-512, against artefacts that unpack all weights
  at each call: 13 times as fast for a matrix of 4096 x 4096 at batch 1, 1.4 at
  128, where unpacked weights do not fit caches; 1.7 and 1 for 1024 x 1024; with
  `native`, 14 and 17 times for a perceptron of 1024 units and a transformer of
  width 512 at batch 1. On other platforms, not measured, matrices
  of up to 2²⁴ weights are unpacked whole. Convolutions, except of few pixels of
  a batch of a given size, unpack their kernel.

  Args:
    path: file to write; its folder is made. None to only return its bytes.
    apply_fn: pure function of a tree with dense weights, and of the inputs.
    packed: any pytree of arrays with `PackedTernary` leaves, for example
      `{"params": ..., "batch_stats": ...}` of Linen. What is prepared for int8
      activations stays so.
    *inputs: examples, pytrees of arrays. The first axis of an array is the
      batch, of any one size; a `jax.ShapeDtypeStruct` is taken as it is.
    platforms: that can run the artefact.
    native: call the native code on CPUs, as described above.
    overwrite: replace the file at `path`, once the new one is written.

  Raises:
    TypeError: the tree has unpacked ternary weights.
    ValueError: native code is asked for, but is not here, or is not for these
      platforms.
    FileExistsError: the path is taken.

  >>> from tern_jax.storage.packed import pack
  >>> t = Ternary(jnp.eye(8, dtype=jnp.int8), jnp.array(2.0), jnp.array(2.0))
  >>> net = to_stablehlo(None, lambda w, x: x @ w, pack(t), jnp.ones((1, 8)))
  >>> jax.export.deserialize(bytearray(net)).call(jnp.ones((3, 8))).shape
  (3, 8)
  """
  files.require("flatbuffers", "to_stablehlo")

  if native:
    _check_native(platforms)
  leaves, treedef = jax.tree.flatten(packed, is_leaf=_is_whole)
  if any(isinstance(x, Ternary) for x in leaves):
    raise TypeError("the tree has a Ternary: call tern_jax.pack first.")
  weights = {i: x for i, x in enumerate(leaves) if isinstance(x, Packed)}

  def model(weights: dict[int, Any], *inputs: PyTree) -> PyTree:
    whole = [weights.get(i, x) for i, x in enumerate(leaves)]
    return apply_fn(jax.tree.unflatten(treedef, whole), *inputs)

  (batch,) = jax_export.symbolic_shape("batch")

  def shape_of(x: PyTree) -> Shaped:
    if isinstance(x, Shaped):
      return x
    x = jnp.asarray(x)
    return Shaped((batch, *x.shape[1:]) if x.ndim else (), x.dtype)

  shapes = jax.tree.map(shape_of, inputs)
  net = model
  if weights:
    net = packed_fn(model)
    weights = net.laid_out((weights, *shapes), {}, None, native)[0]

  def call(*inputs: PyTree) -> PyTree:
    # Otherwise the compiler would unpack constants itself, slowly.
    hidden = jax.tree.map(_behind_barrier, weights, is_leaf=_is_whole)
    return net(hidden, *inputs)

  checks = map(jax_export.DisabledSafetyCheck.custom_call, cpu.TARGETS)
  exported = jax_export.export(
    jax.jit(call),
    platforms=platforms,
    disabled_checks=list(checks) if native else (),
  )
  with _without_places():
    data = bytes(exported(*shapes).serialize())
  if path is not None:
    with files.fresh_file(path, overwrite) as fresh:
      fresh.write_bytes(data)
  return data


@contextlib.contextmanager
def _without_places() -> Iterator[None]:
  """Keeps names of files, and lines of code, out of what is lowered."""
  name = "jax_traceback_in_locations_limit"
  limit = getattr(jax.config, name)
  jax.config.update(name, 0)
  try:
    yield
  finally:
    jax.config.update(name, limit)


def _check_native(platforms: tuple[str, ...]) -> None:
  if "cpu" not in platforms:
    raise ValueError(
      f"the native code is for CPUs, got platforms={platforms!r}: give 'cpu',"
      " or native=False."
    )
  try:
    cpu.load()
  except cpu.UnavailableError as error:
    raise ValueError(
      f"native=True needs the native code of tern_jax: {error}"
    ) from None


def _is_whole(x: object) -> bool:
  return isinstance(x, Ternary | Packed)


def _behind_barrier(x: Packed) -> Packed:
  """Hides codes from the compiler, but not scales, which it may look at."""
  names = ("arrays",) if isinstance(x, Prepared) else ("nonzero", "sign")
  hidden = {
    name: jax.lax.optimization_barrier(getattr(x, name)) for name in names
  }
  return dataclasses.replace(x, **hidden)


_WHY = "a StableHLO artefact has the model in it, which no checkpoint holds"
_HINT = "call tern_jax.export.to_stablehlo in Python"
STABLEHLO = files.Writer(write=None, refusal=f"{_WHY}: {_HINT}.")
