"""What signatures say is true: every call of a training is checked."""

import subprocess
import sys

import pytest

# In a process of its own: the hook must come before the package is imported,
# and tests of wrong types want the package's errors, not the checker's.
CODE = """
import functools, jax, jax.numpy as jnp, numpy as np, optax
from jaxtyping import install_import_hook

import tests.typecheck

# Not the containers, which hold whatever jax.tree puts into them.
core = (
  *("axes", "checks", "estimators", "method", "names", "numerics", "paths"),
  *("select", "selection"),
)
rooms = ("targets", "methods", "regularizers", "trees")
modules = [*(f"core.{module}" for module in core), *rooms]
with install_import_hook(
  [f"tern_jax.{module}" for module in modules], "tests.typecheck.checked"
):
  import tern_jax

target = tern_jax.ramp(0.8, 10, 0.25)
where, stacked = tern_jax.kernels(exclude="head"), ("stack",)
methods = [
  tern_jax.SCA(alpha=0.1),
  tern_jax.TWN(),
  tern_jax.AbsMean(channel_axis=-1),
  tern_jax.EC2T(),
  tern_jax.TGA(surrogate=0.5),
  *(
    method(sparsity=sparsity, channel_axis=-1)
    for method in (
      tern_jax.SCA, tern_jax.TWN, tern_jax.TTQ, tern_jax.TGA, tern_jax.EC2T
    )
    for sparsity in (target, tern_jax.across_layers(0.5))
  ),
]
rng = np.random.default_rng(0)
user = {
  "stack": {"kernel": jnp.asarray(rng.normal(size=(2, 8, 8)), jnp.float32)},
  "body": {"kernel": jnp.asarray(rng.normal(size=(8, 8)), jnp.float32)},
  "head": {"kernel": jnp.ones((8, 2)), "bias": jnp.zeros(2)},
}
chains = [
  tern_jax.wdr_transform(0.1, lambda count: 1e-3 * count, where, stacked),
  tern_jax.wdr_transform(
    tern_jax.at_sparsity(target),
    tern_jax.relative(tern_jax.late_kappa(1000)),
    where, stacked, sharp=True,
  ),
]


def train(method, wdr, user):
  group = 4 if method.channel_axis == -1 else None
  tern = tern_jax.ParamTransform(method, where, stacked, group)
  params, state = tern.init(user)
  tx = optax.chain(wdr, optax.sgd(0.1))

  def loss(params):
    return sum(jnp.sum(x**2) for x in jax.tree.leaves(tern(params, state)))

  updates, _ = tx.update(jax.grad(loss)(params), tx.init(params), params)
  params = optax.apply_updates(params, updates)
  params, state = tern.after_step(params, state)
  packed = tern_jax.pack(tern.discretize(*tern.refresh(params, state)))
  return packed if method.soft else tern_jax.from_packed(packed, tern, 1)


for i, method in enumerate(methods):
  # Traced only: types are checked there, and nothing is compiled.
  jax.eval_shape(functools.partial(train, method, chains[i % 2]), user)
assert 0 < float(tern_jax.predicted_sparsity(0.2, 0.1)) < 1
tern_jax.fit_budget(user, bytes=300)
try:
  tern_jax.SCA(alpha=0.1).latent(jnp.ones(2, jnp.int32))
except Exception as error:
  assert "type" in str(error).lower(), error
else:
  raise SystemExit("nothing is checked")
"""


@pytest.mark.long
def test_a_training_keeps_to_its_signatures():
  done = subprocess.run(
    [sys.executable, "-c", CODE], capture_output=True, text=True, check=False
  )
  assert done.returncode == 0, done.stderr[-3000:]
