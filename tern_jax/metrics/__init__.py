"""What a run is judged by: sparsity, entropy, storage, flips, convergence."""

from tern_jax.metrics.codes import bits_per_weight as bits_per_weight
from tern_jax.metrics.codes import code_shares as code_shares
from tern_jax.metrics.codes import entropy as entropy
from tern_jax.metrics.codes import entropy_bytes as entropy_bytes
from tern_jax.metrics.codes import flip_rate as flip_rate
from tern_jax.metrics.codes import sparsity as sparsity
from tern_jax.metrics.codes import ternary_leaves as ternary_leaves
from tern_jax.metrics.convergence import barrier as barrier
from tern_jax.metrics.convergence import converged as converged
from tern_jax.metrics.convergence import diagnose as diagnose
from tern_jax.metrics.convergence import zeros_rms as zeros_rms
from tern_jax.metrics.score import storage_bits as storage_bits
from tern_jax.metrics.score import storage_score as storage_score
