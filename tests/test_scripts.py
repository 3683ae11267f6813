"""Scripts for float networks become ternary by at most three changed lines.

Each is written as its framework's users write it; what is asked of the ternary
one: exact zeros, and equal predictions live, packed and reloaded.
"""

import difflib

import jax
import jax.numpy as jnp
import pytest

import tern_jax

pytestmark = pytest.mark.usefixtures("standard_promotion")

DATA = """
import jax, jax.numpy as jnp, optax
x = jax.random.normal(jax.random.key(0), (64, 8))
y = jnp.argmax(x[:, :4], 1)
steps = 60
"""

LINEN = """
import flax.linen as nn
from flax.training.train_state import TrainState

class Net(nn.Module):
  @nn.compact
  def __call__(self, x):
    return nn.Dense(4)(nn.LayerNorm()(nn.relu(nn.Dense(32)(x))))

@jax.jit
def train_step(state, x, y):
  def loss_fn(params):
    logits = state.apply_fn({"params": params}, x)
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()
  loss, grads = jax.value_and_grad(loss_fn)(state.params)
  return state.apply_gradients(grads=grads), loss

net = Net()
params = net.init(jax.random.key(1), x)["params"]
tx = optax.adam(1e-3)
state = TrainState.create(apply_fn=net.apply, params=params, tx=tx)
for _ in range(steps):
  state, loss = train_step(state, x, y)
params = state.params

def predict(params):
  return net.apply({"params": params}, x)
"""

NNX = """
from flax import nnx

class Net(nnx.Module):
  def __init__(self, rngs):
    self.hidden = nnx.Linear(8, 32, rngs=rngs)
    self.norm = nnx.BatchNorm(32, rngs=rngs)
    self.out = nnx.Linear(32, 4, rngs=rngs)
  def __call__(self, x):
    return self.out(nnx.relu(self.norm(self.hidden(x))))

@nnx.jit
def train_step(model, optimizer, x, y):
  def loss_fn(model):
    logits = model(x)
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()
  loss, grads = nnx.value_and_grad(loss_fn)(model)
  optimizer.update(model, grads)
  return loss

model = Net(nnx.Rngs(1))
tx = optax.adam(1e-3)
optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
for _ in range(steps):
  train_step(model, optimizer, x, y)
model.eval()
params = nnx.to_pure_dict(nnx.state(model, nnx.Param))

def predict(params):
  state = nnx.state(model, nnx.Param)
  nnx.replace_by_pure_dict(state, params)
  nnx.update(model, state)
  return model(x)
"""

EQUINOX = """
import equinox as eqx

@eqx.filter_jit
def make_step(model, opt_state, x, y):
  def loss_fn(model):
    logits = jax.vmap(model)(x)
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()
  loss, grads = eqx.filter_value_and_grad(loss_fn)(model)
  updates, opt_state = tx.update(grads, opt_state, model)
  return eqx.apply_updates(model, updates), opt_state, loss

model = eqx.nn.MLP(8, 4, 32, 1, key=jax.random.key(1))
tx = optax.adam(1e-3)
opt_state = tx.init(eqx.filter(model, eqx.is_inexact_array))
for _ in range(steps):
  model, opt_state, loss = make_step(model, opt_state, x, y)
params, static = eqx.partition(model, eqx.is_inexact_array)

def predict(params):
  return jax.vmap(eqx.combine(params, static))(x)
"""

HAIKU = """
import haiku as hk

net = hk.without_apply_rng(hk.transform(lambda x: hk.nets.MLP([32, 4])(x)))

@jax.jit
def update(params, opt_state, x, y):
  def loss_fn(params):
    logits = net.apply(params, x)
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()
  grads = jax.grad(loss_fn)(params)
  updates, opt_state = tx.update(grads, opt_state, params)
  return optax.apply_updates(params, updates), opt_state

params = net.init(jax.random.key(1), x)
tx = optax.adam(1e-3)
opt_state = tx.init(params)
for _ in range(steps):
  params, opt_state = update(params, opt_state, x, y)

def predict(params):
  return net.apply(params, x)
"""

STATES = {
  LINEN: "state.opt_state",
  NNX: "optimizer",
  EQUINOX: "opt_state",
  HAIKU: "opt_state",
}


@pytest.mark.parametrize(
  "script",
  [
    pytest.param(LINEN, id="linen"),
    pytest.param(NNX, id="nnx"),
    pytest.param(EQUINOX, id="equinox", marks=pytest.mark.long),
    pytest.param(HAIKU, id="haiku", marks=pytest.mark.long),
  ],
)
def test_three_lines_make_a_script_ternary(script, tmp_path):
  ternary = "import tern_jax\n" + DATA + script
  ternary = ternary.replace(
    "tx = optax.adam(1e-3)", "tx = tern_jax.recipe(0.8, steps).optimizer()"
  )
  ternary += f"packed = tern_jax.pack(tx.tern.finalize({STATES[script]}))\n"
  changed = [
    line
    for line in difflib.ndiff(
      (DATA + script).splitlines(), ternary.splitlines()
    )
    if line.startswith("+")
  ]
  assert len(changed) == 3

  names = {}
  exec(compile(ternary, "script", "exec"), names)
  params, packed, predict = (names[k] for k in ("params", "packed", "predict"))
  live = predict(params)
  tern_jax.save_packed(tmp_path / "net", packed)
  reloaded = tern_jax.load_packed(tmp_path / "net", like=packed)
  for tree in packed, reloaded:
    dense = tern_jax.unpack(tree)
    as_live = jax.tree.unflatten(
      jax.tree.structure(params), jax.tree.leaves(dense)
    )
    assert jnp.array_equal(predict(as_live), live)
  matrices = [w for w in jax.tree.leaves(params) if w.ndim == 2]
  assert len(matrices) == 2
  zeros = sum(int(jnp.sum(w == 0)) for w in matrices)
  assert zeros == round(0.8 * sum(w.size for w in matrices))
  for w in matrices:
    assert jnp.unique(jnp.abs(w)).size == 2  # 0 and the scale
  # It has learned, too.
  assert jnp.mean(jnp.argmax(live, 1) == names["y"]) > 0.5
