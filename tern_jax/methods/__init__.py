"""The methods, one file each behind the contract of `tern_jax.base`.

To add one: write `methods/<name>.py` with a frozen dataclass that subclasses
`Ternarizer`, export it below, and add a row to `tests/test_contract.py`.
Methods never import one another.
"""

from tern_jax.methods.absmean import AbsMean as AbsMean
from tern_jax.methods.sca import SCA as SCA
from tern_jax.methods.ttq import TTQ as TTQ
from tern_jax.methods.twn import TWN as TWN
