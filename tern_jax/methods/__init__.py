"""The methods, one file each behind the contract of `tern_jax.core.method`.

To add one: write `methods/<name>.py` with a frozen dataclass that subclasses
`Ternarizer`, export it below, and add a row to `tests/test_contract.py`.
Methods never import one another.
"""

from tern_jax.methods.absmean import AbsMean as AbsMean
from tern_jax.methods.ec2t import EC2T as EC2T
from tern_jax.methods.ec2t import ec2t_assign as ec2t_assign
from tern_jax.methods.ec2t import ec2t_lambda_max as ec2t_lambda_max
from tern_jax.methods.ec2t import ec2t_thresholds as ec2t_thresholds
from tern_jax.methods.ec2t import ec2t_zero as ec2t_zero
from tern_jax.methods.sca import SCA as SCA
from tern_jax.methods.tga import TGA as TGA
from tern_jax.methods.tga import inverse_mills as inverse_mills
from tern_jax.methods.tga import (
  truncated_gaussian_scale as truncated_gaussian_scale,
)
from tern_jax.methods.ttq import TTQ as TTQ
from tern_jax.methods.twn import TWN as TWN
