"""Which layout packed weights get, for products on the machine at hand."""

import math

import jax
import jax.numpy as jnp

from tern_jax.core.axes import Axes, attention
from tern_jax.core.checks import concrete
from tern_jax.core.containers import Ternary
from tern_jax.core.paths import path_str
from tern_jax.core.types import Array, KeyPath, PyTree
from tern_jax.inference import cpu
from tern_jax.inference.matrix import others, ranked, size_of
from tern_jax.inference.prepared import (
  ACTIVATIONS,
  Prepared,
  prepared_of,
  stack_of,
)
from tern_jax.storage.packed import (
  PackedTernary,
  check_is_ternary,
  pack,
  to_ternary,
)

_NODES = (Ternary, PackedTernary, Prepared)
#: Outputs from which lists pay for the patches that are gathered for them.
_MANY = 128


def prepare(
  tree: PyTree, activations: str = "float32", *, batch: int | None = None
) -> PyTree:
  """Lays packed weights out for fast products, once, when a model is loaded.

  `dot(x, w)` and `x @ w` then read the weights at some 2 bits each. Kernels
  [in, out] are prepared, attention's [in, heads, head_dim] and [heads,
  head_dim, out], and stacks of layers of these. Kernels of convolutions stay
  packed, which `apply_fn(fn).prepare` prepares, and all other leaves as they
  are. What is prepared stays as it is, unless it is
  for other activations.

  The layout is chosen by the platform, the share of zeros and the batch: on
  CPUs tiles of codes, or lists of the nonzero weights where about 90 % are zero
  and activations are floats; words of codes elsewhere, and on CPUs without the
  native code.

  Args:
    tree: any pytree with packed leaves, or one `PackedTernary` [in, ...].
    activations: "float32": products are exact up to the order of sums. "int8":
      the activations x of a row are rounded to int8,

        q = round(127 x / max |x|),  ties to even,

      and sums are exact integers: several times as fast. Its error is that of
      the rounding, at most max |x| / 254 in each activation.
    batch: rows of x in a usual product, if that is known.

  Returns:
    The tree with `Prepared` weights.

  Raises:
    TypeError: latents are given.
    ValueError: kernels are there, but none is ternary, or activations are
      unknown.

  >>> codes = jnp.array([[1, -1], [0, 1]], jnp.int8)
  >>> w = prepare(pack(Ternary(codes, jnp.array(2.0), jnp.array(0.5))))
  >>> (jnp.array([1.0, 10.0]) @ w).tolist()
  [2.0, 19.5]
  """
  if activations not in ACTIVATIONS:
    raise ValueError(
      f"activations must be 'float32' or 'int8', got {activations!r}."
    )
  found = jax.tree_util.tree_leaves_with_path(tree, is_leaf=_is_node)
  if not any(isinstance(x, Prepared) for _, x in found):
    check_is_ternary("prepare", tree)
  heads = attention(
    {path_str(path): x.shape for path, x in found if _is_packed(x)}
  )

  def leaf(path: KeyPath, x: PyTree) -> PyTree:
    if isinstance(x, Prepared):
      if x.activations == activations:
        return x
      return lay_out(x.ternary(), x.inputs, activations, batch, x.lead)
    if not _is_packed(x):
      return x
    packed: PackedTernary = pack(x)
    axes = _axes(packed, heads.get(path_str(path)), alone=not path)
    if axes is None or 0 in packed.shape:
      return packed
    inputs, lead = axes
    return lay_out(to_ternary(packed), inputs, activations, batch, lead)

  return jax.tree_util.tree_map_with_path(leaf, tree, is_leaf=_is_node)


def lay_out(
  x: Ternary,
  inputs: tuple[int, ...],
  activations: str,
  batch: int | None = None,
  lead: int = 0,
  *,
  native: bool | None = None,
  patches: bool = False,
) -> Prepared:
  """Prepares weights for sums over any of their axes.

  Args:
    x: codes and scales.
    inputs: axes of a layer that products sum over, ascending.
    activations: as in `prepare`.
    batch: as in `prepare`.
    lead: number of leading axes that are those of a stack.
    native: whether products are those of the native code; None if that depends
      on where the weights are.
    patches: whether x is a kernel whose rows are patches of images.
  """
  if native is None:
    native = _platform(x.codes) == "cpu" and cpu.isa() is not None
  layout = _layout(x, inputs, activations, batch, lead, native)
  if layout == "lists" and patches and _outputs(x, inputs, lead) < _MANY:
    layout = "tiles"
  return prepared_of(x, inputs, layout, activations, lead)


def _layout(
  x: Ternary,
  inputs: tuple[int, ...],
  activations: str,
  batch: int | None,
  lead: int,
  native: bool,
) -> str:
  int8 = activations == "int8"
  if not native:
    return "words" if int8 else "fields"
  if int8 or not concrete(x.codes):
    return "tiles"
  # Where both are as fast, by batch; 16 bits a nonzero weight of a list are
  # less than 2 bits a weight from 87.5 % zeros on.
  least = 0.9 if batch is None else 0.94 if batch == 1 else 0.875
  zeros = 1 - float(jnp.mean(x.codes != 0))
  shape = x.codes.shape
  layer, scales = shape[lead:], [ranked(w, shape, lead) for w in (x.w_p, x.w_n)]
  groups = size_of(layer, inputs, *(w.shape[lead:] for w in scales)).groups
  return "lists" if zeros >= least and groups == 1 else "tiles"


def _outputs(x: Ternary, inputs: tuple[int, ...], lead: int) -> int:
  layer = x.codes.shape[lead:]
  return math.prod(layer[i] for i in others(layer, inputs))


def _platform(x: Array) -> str:
  if isinstance(x, jax.Array) and concrete(x):
    return next(iter(x.devices())).platform
  return jax.default_backend()


def _axes(
  x: PackedTernary, heads: Axes | None, alone: bool
) -> tuple[tuple[int, ...], int] | None:
  """Returns the inputs of a layer and the number of axes of a stack."""
  ndim = len(x.shape)
  if heads is not None:
    lead = ndim - len(heads.inputs) - len(heads.outputs)
    return tuple(i - lead for i in heads.inputs), lead
  lead = stack_of(x)
  if ndim - lead == 2 or (alone and ndim > 1 and not lead):
    return (0,), lead
  return None


def _is_node(x: object) -> bool:
  return isinstance(x, _NODES)


def _is_packed(x: object) -> bool:
  return isinstance(x, Ternary | PackedTernary)
