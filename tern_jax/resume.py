"""Back into training: a deployed file becomes latents, scales and state."""

import jax

from tern_jax.core.containers import TernParams
from tern_jax.core.method import Ternarizer
from tern_jax.core.types import Count, PyTree
from tern_jax.storage.packed import PackedTernary, to_ternary
from tern_jax.trees.transform import ParamTransform


def from_packed(
  packed: PyTree, tern: ParamTransform | Ternarizer, step: Count = 0
) -> tuple[TernParams, dict[str, PyTree]]:
  """Makes trainable parameters of packed weights: the inverse of deployment.

  `pack(tern.discretize(*from_packed(packed, tern)))` has the codes of packed,
  and its magnitudes: bit for bit where the method stores them (SCA, TWN, TTQ,
  EC2T), to rounding where it derives them from latents (TGA, AbsMean; TWN from
  its next update of them on). Magnitudes that no weight has may differ.

  Latents lie well inside their basins, zeros at 0, so that `after_step` and
  `refresh` change no code. Those of one code are equal, or nearly so: the file
  says no more, and what moves first is for the loss to say. The forward is that
  of the file; of `SCA(alpha=...)`, which is soft, .99 times its weights.

  Args:
    packed: what `load_packed` or `pack` returned.
    tern: what the training goes on with, not necessarily the file's method; a
      method alone stands for `ParamTransform(method)`. A sparsity must be that
      of every leaf. Scales may be finer than the file's, not coarser.
    step: number of the step at which the method's schedules stand, such as
      the last of `ramp` to keep its sparsity.

  Returns:
    (TernParams, state), as `ParamTransform.init` returns them: latents have
    the dtype of the file's scales, other leaves pass through unchanged.

  Raises:
    ValueError: the packed leaves are not those that `tern` selects; the file
      has two magnitudes and the method one; or another sparsity, or scales of
      another shape, or weights that the method cannot make.

  >>> import jax.numpy as jnp, tern_jax
  >>> codes = jnp.array([[1, 0], [0, -1]], jnp.int8)
  >>> scale = jnp.array(0.5)
  >>> packed = tern_jax.pack({"w": tern_jax.Ternary(codes, scale, scale)})
  >>> tern = ParamTransform(tern_jax.SCA(sparsity=0.5))
  >>> params, state = from_packed(packed, tern)
  >>> tern(params, state)["w"].tolist()
  [[0.5, 0.0], [0.0, -0.5]]
  """
  if isinstance(tern, Ternarizer):
    tern = ParamTransform(tern)
  ternary = jax.tree.map(
    lambda x: to_ternary(x) if isinstance(x, PackedTernary) else x,
    packed,
    is_leaf=lambda x: isinstance(x, PackedTernary),
  )
  return tern.from_ternary(ternary, step)
