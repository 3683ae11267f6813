"""Sparse ternary networks in JAX: exact sparsity, packed checkpoints."""

from tern_jax.base import LABELS as LABELS
from tern_jax.base import Ternarizer as Ternarizer
from tern_jax.base import Ternary as Ternary
from tern_jax.base import TernParams as TernParams
from tern_jax.methods import SCA as SCA
from tern_jax.methods import TWN as TWN
from tern_jax.regularizers import alpha_for_sparsity as alpha_for_sparsity
from tern_jax.regularizers import at_sparsity as at_sparsity
from tern_jax.regularizers import late_kappa as late_kappa
from tern_jax.regularizers import predicted_sparsity as predicted_sparsity
from tern_jax.regularizers import relative as relative
from tern_jax.regularizers import wdr as wdr
from tern_jax.regularizers import wdr_barrier as wdr_barrier
from tern_jax.regularizers import wdr_grad as wdr_grad
from tern_jax.regularizers import wdr_transform as wdr_transform
from tern_jax.select import kernels as kernels
from tern_jax.sparsity import ramp as ramp
from tern_jax.transform import ParamTransform as ParamTransform
