"""The methods, one file each behind the contract of `tern_jax.core.method`.

Methods never import one another; long formulas lie beside their method.
"""

from tern_jax.methods.absmean import AbsMean as AbsMean
from tern_jax.methods.ec2t import EC2T as EC2T
from tern_jax.methods.ec2t import ec2t_zero as ec2t_zero
from tern_jax.methods.sca import SCA as SCA
from tern_jax.methods.tga import TGA as TGA
from tern_jax.methods.ttq import TTQ as TTQ
from tern_jax.methods.twn import TWN as TWN
