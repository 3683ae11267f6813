"""Sparse ternary networks in JAX: exact sparsity, packed checkpoints."""

import importlib
from typing import TYPE_CHECKING

from tern_jax import inference as inference
from tern_jax.core.containers import LABELS as LABELS
from tern_jax.core.containers import Ternary as Ternary
from tern_jax.core.containers import TernParams as TernParams
from tern_jax.core.estimators import straight_through as straight_through
from tern_jax.core.method import Ternarizer as Ternarizer
from tern_jax.core.select import kernels as kernels
from tern_jax.methods.absmean import AbsMean as AbsMean
from tern_jax.methods.ec2t import EC2T as EC2T
from tern_jax.methods.ec2t import ec2t_zero as ec2t_zero
from tern_jax.methods.sca import SCA as SCA
from tern_jax.methods.tga import TGA as TGA
from tern_jax.methods.ttq import TTQ as TTQ
from tern_jax.methods.twn import TWN as TWN
from tern_jax.recipes import recipe as recipe
from tern_jax.regularizers.barriers import at_sparsity as at_sparsity
from tern_jax.regularizers.formulas import (
  alpha_for_sparsity as alpha_for_sparsity,
)
from tern_jax.regularizers.formulas import (
  predicted_sparsity as predicted_sparsity,
)
from tern_jax.regularizers.formulas import wdr as wdr
from tern_jax.regularizers.formulas import wdr_barrier as wdr_barrier
from tern_jax.regularizers.strengths import late_kappa as late_kappa
from tern_jax.regularizers.strengths import relative as relative
from tern_jax.regularizers.transform import wdr_transform as wdr_transform
from tern_jax.resume import from_packed as from_packed
from tern_jax.storage.packed import PackedTernary as PackedTernary
from tern_jax.storage.packed import pack as pack
from tern_jax.storage.packed import unpack as unpack
from tern_jax.storage.packed import validate as validate
from tern_jax.targets.budget import fit_budget as fit_budget
from tern_jax.targets.schedules import across_layers as across_layers
from tern_jax.targets.schedules import per_layer as per_layer
from tern_jax.targets.schedules import ramp as ramp
from tern_jax.targets.targeted import Targeted as Targeted
from tern_jax.trees.transform import ParamTransform as ParamTransform
from tern_jax.trees.wrap import wrap as wrap

if TYPE_CHECKING:
  from tern_jax import checkpoint as checkpoint
  from tern_jax import codec as codec
  from tern_jax import export as export
  from tern_jax import linen as linen
  from tern_jax import metrics as metrics
  from tern_jax import nnx as nnx
  from tern_jax import training as training
  from tern_jax.checkpoint import Checkpointer as Checkpointer
  from tern_jax.checkpoint import CheckpointError as CheckpointError
  from tern_jax.checkpoint import load_packed as load_packed
  from tern_jax.checkpoint import save_packed as save_packed
  from tern_jax.version import __version__ as __version__

# Modules that need Flax, orbax or an extra are loaded when they are used.
_MODULES = (
  *("checkpoint", "codec", "export", "keras", "linen", "metrics", "nnx"),
  "training",
)
_NAMES = {
  "CheckpointError": "checkpoint",
  "Checkpointer": "checkpoint",
  "__version__": "version",
  "load_packed": "checkpoint",
  "save_packed": "checkpoint",
}

# Type checkers would take any name for an attribute if they saw this.
if not TYPE_CHECKING:

  def __getattr__(name: str) -> object:
    """Loads what is not loaded yet, at its first use."""
    if name in _MODULES:
      return importlib.import_module(f"tern_jax.{name}")
    if name not in _NAMES:
      raise AttributeError(f"module 'tern_jax' has no attribute {name!r}")
    module = importlib.import_module(f"tern_jax.{_NAMES[name]}")
    globals()[name] = value = getattr(module, name)
    return value


def __dir__() -> list[str]:
  """Lists every public name, loaded or not."""
  return sorted({*globals(), *_MODULES, *_NAMES})
