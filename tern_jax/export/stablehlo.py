"""StableHLO: the whole computation, run by JAX without the model's code."""

from collections.abc import Callable

import jax
import jax.export as jax_export
import jax.numpy as jnp

from tern_jax.core.containers import Ternary
from tern_jax.core.types import PyTree, Shaped
from tern_jax.export import files
from tern_jax.storage.leaves import PathLike, is_whole
from tern_jax.storage.packed import PackedTernary


def to_stablehlo(
  path: PathLike | None,
  apply_fn: Callable[..., PyTree],
  packed: PyTree,
  *inputs: PyTree,
  platforms: tuple[str, ...] = ("cpu", "cuda", "tpu"),
  overwrite: bool = False,
) -> bytes:
  """Saves a network and its weights as one computation, for any batch size.

  The artefact has the weights packed, at 2 bits each, and unpacks them when it
  runs. Neither the model's code nor this package is needed to run it, only
  `jax` and `flatbuffers`:

    with open(path, "rb") as file:
      net = jax.export.deserialize(bytearray(file.read()))
    outputs = net.call(*inputs)

  JAX reads it for at least six months; an older JAX may not read it.

  Args:
    path: file to write; its folder is made. None to only return its bytes.
    apply_fn: pure function of a tree with dense weights, and of the inputs.
    packed: any pytree of arrays with `PackedTernary` leaves, for example
      `{"params": ..., "batch_stats": ...}` of Linen.
    *inputs: examples, pytrees of arrays. The first axis of an array is the
      batch, of any one size; a `jax.ShapeDtypeStruct` is taken as it is.
    platforms: that can run the artefact.
    overwrite: replace the file at `path`, once the new one is written.

  Raises:
    TypeError: the tree has unpacked ternary weights.
    FileExistsError: the path is taken.

  >>> from tern_jax.storage.packed import pack
  >>> t = Ternary(jnp.eye(8, dtype=jnp.int8), jnp.array(2.0), jnp.array(2.0))
  >>> net = to_stablehlo(None, lambda w, x: x @ w, pack(t), jnp.ones((1, 8)))
  >>> jax.export.deserialize(bytearray(net)).call(jnp.ones((3, 8))).shape
  (3, 8)
  """
  files.require("flatbuffers", "to_stablehlo")

  def dense_weights(x: PyTree) -> PyTree:
    if isinstance(x, Ternary):
      raise TypeError("the tree has a Ternary: call tern_jax.pack first.")
    if not isinstance(x, PackedTernary):
      return x
    # Otherwise the compiler would unpack constants itself, slowly, and could
    # fuse the unpacking into the model, which then rounds in another order.
    planes = jax.lax.optimization_barrier(x)
    return jax.lax.optimization_barrier(planes.dequantize())

  def call(*inputs: PyTree) -> PyTree:
    weights = jax.tree.map(dense_weights, packed, is_leaf=is_whole)
    return apply_fn(weights, *inputs)

  (batch,) = jax_export.symbolic_shape("batch")

  def shape_of(x: PyTree) -> Shaped:
    if isinstance(x, Shaped):
      return x
    x = jnp.asarray(x)
    return Shaped((batch, *x.shape[1:]) if x.ndim else (), x.dtype)

  exported = jax_export.export(jax.jit(call), platforms=platforms)
  data = bytes(exported(*jax.tree.map(shape_of, inputs)).serialize())
  if path is not None:
    with files.fresh_file(path, overwrite) as fresh:
      fresh.write_bytes(data)
  return data


_WHY = "a StableHLO artefact has the model in it, which no checkpoint holds"
_HINT = "call tern_jax.export.to_stablehlo in Python"
STABLEHLO = files.Writer(write=None, refusal=f"{_WHY}: {_HINT}.")
