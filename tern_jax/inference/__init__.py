"""Products of float arrays and packed ternary weights, without unpacking."""

from tern_jax.inference import cpu
from tern_jax.inference.apply import apply_fn as apply_fn
from tern_jax.inference.explain import Explanation as Explanation
from tern_jax.inference.explain import Use as Use
from tern_jax.inference.multiply import dot as dot
from tern_jax.inference.preparation import prepare as prepare
from tern_jax.inference.prepared import Prepared as Prepared

# Exported programs may call it.
cpu.register()
