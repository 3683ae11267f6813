"""What several test modules share; none of them imports another."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import tern_jax
from tern_jax import EC2T, SCA, TGA, TTQ, TWN, AbsMean, Ternarizer, Ternary
from tern_jax.core.estimators import straight_through

#: Those that the contract is checked for. A new method is one row.
METHODS = [
  SCA(alpha=0.1),
  SCA(alpha=0.5, sigma=None, scaled=False),
  SCA(sparsity=0.7),
  SCA(sparsity=tern_jax.ramp(0.9, 1000), every=5),
  TWN(),
  TWN(threshold=1.2),
  TWN(sparsity=0.6),
  TTQ(),
  TTQ(threshold=0.3, start="one"),
  TTQ(sparsity=0.6),
  AbsMean(),
  EC2T(),
  EC2T(gamma=0.6, s=0.4, largest=10_000),
  EC2T(sparsity=0.7),
  TGA(),
  TGA(surrogate=0.5),
  TGA(delta=0.05, of_max=True, detach=False),
  TGA(sparsity=0.6),
]
DTYPES = [jnp.float32, jnp.bfloat16]

#: A row of `parametrize` that only `pytest -m long` runs.
long = functools.partial(pytest.param, marks=pytest.mark.long)


@dataclasses.dataclass(frozen=True, repr=False)
class Halves(Ternarizer):
  """A method that the package does not know.

  Codes round(w / scale) of a trained scale, clipped to -1, 0, 1.
  """

  start: float = 0.5

  def init(self, w):
    return {"scale": jnp.asarray(self.start, w.dtype)}, {}

  def __call__(self, w, scales, state):
    ternary = self.discretize(w, scales, state)
    return straight_through(w, ternary.dequantize())

  def discretize(self, w, scales, state):
    scale = scales["scale"]
    codes = jnp.clip(jnp.round(w / scale), -1, 1).astype(jnp.int8)
    return Ternary(codes, scale, scale)


class NnxNet(nnx.Module):
  """Two linear layers in a list, and a norm between them."""

  def __init__(self, rngs):
    self.layers = nnx.List(
      [nnx.Linear(4, 8, rngs=rngs), nnx.Linear(8, 2, rngs=rngs)]
    )
    self.norm = nnx.BatchNorm(8, rngs=rngs)

  def __call__(self, x):
    return self.layers[1](self.norm(self.layers[0](x)))


def _compiled(name):
  """A method of a `Ternarizer` or `ParamTransform`, compiled once a process.

  Most of the suite's time is compilation: operations that run one by one are
  compiled one by one.
  """

  @functools.partial(jax.jit, static_argnums=0)
  def call(owner, *args):
    return getattr(owner, name)(*args)

  return call


init = _compiled("init")
forward = _compiled("__call__")
discretize = _compiled("discretize")
after_step = _compiled("after_step")
refresh = _compiled("refresh")


def weights(shape=(48, 32), dtype=jnp.float32, seed=0, mu=0.0):
  """Normal weights of standard deviation 0.1."""
  w = np.random.default_rng(seed).normal(mu, 0.1, shape)
  return jnp.asarray(w, jnp.float32).astype(dtype)


def f64(x):
  """Any floating array in NumPy's float64."""
  return np.asarray(x).astype(np.float64)


def raw(x):
  """The dtype, shape and bytes of a leaf, random keys included."""
  if jnp.issubdtype(getattr(x, "dtype", int), jax.dtypes.prng_key):
    x = jax.random.key_data(x)
  return np.asarray(x).dtype.name, np.shape(x), np.asarray(x).tobytes()


def assert_same(a, b):
  """Same structure, static fields included, and the same bits."""
  assert jax.tree.structure(a) == jax.tree.structure(b)
  assert [raw(x) for x in jax.tree.leaves(a)] == [
    raw(x) for x in jax.tree.leaves(b)
  ]
