"""What a user writes outside the clone: it runs and passes type checkers."""

import pathlib
import shutil
import sys
from typing import TYPE_CHECKING

import jax.numpy as jnp

import tern_jax
from tern_jax.checkpoint import Checkpointer

tern, wdr = tern_jax.recipe(0.75, steps=100)
params, state = tern.init({"kernel": jnp.arange(32.0).reshape(8, 4) - 15.5})
tern = tern_jax.ParamTransform(tern_jax.SCA(sparsity=0.75))
params, state = tern.init({"kernel": jnp.arange(32.0).reshape(8, 4) - 15.5})
packed = tern_jax.pack(tern.discretize(params, state))
tern_jax.save_packed("packed", packed)
kernel = tern_jax.unpack(tern_jax.load_packed("packed"))["kernel"]
assert int((kernel == 0).sum()) == 24
assert Checkpointer is tern_jax.checkpoint.Checkpointer

regularizer = tern_jax.wdr_transform(alpha=0.1, strength=1e-3)
adapters = (tern_jax.linen, tern_jax.nnx, tern_jax.training, tern_jax.metrics)
exports = (tern_jax.export.to_gguf, tern_jax.export.to_safetensors)

# The installed package is whole, and the only thing that was installed.
package = pathlib.Path(tern_jax.__file__).parent
if "--installed" in sys.argv:
  assert "site-packages" in str(package), package
  assert (package / "py.typed").exists()
  if shutil.which("c++"):
    assert (package / "inference" / "_kernels.so").exists()
  for other in ("tests", "experiments", "notebooks"):
    assert not (package.parent / other).exists(), other

if TYPE_CHECKING:
  # A name that is not there must be found out, too.
  print(tern_jax.no_such_name)  # type: ignore[attr-defined]
