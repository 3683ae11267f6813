"""Containers inside those of other people: Flax, optax, Equinox, JAX itself."""

import copy
import dataclasses
import functools
import pickle
import subprocess
import sys

import equinox as eqx
import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx, serialization
from flax.training.train_state import TrainState
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import tern_jax
from tern_jax import (
  SCA,
  PackedTernary,
  ParamTransform,
  Ternary,
  TernParams,
  pack,
  unpack,
)
from tern_jax.trees.state import Dtypes
from tests.helpers import assert_same, long, weights


def ternary(shape=(16, 24), seed=0, layers=0):
  rng = np.random.default_rng(seed)
  scale = (layers, *(1 for _ in shape)) if layers else ()
  shape = (layers, *shape) if layers else shape
  return Ternary(
    jnp.asarray(rng.integers(-1, 2, shape).astype(np.int8)),
    *jnp.asarray(rng.uniform(0.5, 2.0, (2, *scale)).astype(np.float32)),
  )


CONTAINERS = {
  "params": TernParams(
    latent={"a": {"kernel": weights((8, 4)), "bias": jnp.ones(4)}},
    scales={"a/kernel": {"scale": jnp.float32(0.5)}},
  ),
  "ternary": ternary(),
  "packed": pack(ternary()),
  "stack": pack(ternary(layers=8)),
  "flat": pack(ternary((3, 5))),
  "flat_stack": pack(ternary((3, 5), layers=4)),
}
each = pytest.mark.parametrize(
  "x", CONTAINERS.values(), ids=CONTAINERS, scope="module"
)


def through_pickle(x):
  return pickle.loads(pickle.dumps(x))


def through_flatten(x):
  leaves, treedef = jax.tree.flatten(x)
  return jax.tree.unflatten(treedef, leaves)


def through_keys(x):
  keyed, treedef = jax.tree_util.tree_flatten_with_path(x)
  return jax.tree.unflatten(treedef, [leaf for _, leaf in keyed])


def through_partition(x):
  return eqx.combine(*eqx.partition({"x": x}, eqx.is_inexact_array))["x"]


def through_scan(x):
  return jax.lax.scan(lambda carry, _: (carry, None), x, length=2)[0]


def through_flax(x):
  return serialization.from_bytes(x, serialization.to_bytes(x))


def through_odd_leaves(x):
  """Names in place of arrays, and back; nothing static is lost."""
  leaves, treedef = jax.tree.flatten(x)
  table = {f"leaf {i}": leaf for i, leaf in enumerate(leaves)}
  return jax.tree.map(table.get, jax.tree.unflatten(treedef, table))


@each
@pytest.mark.parametrize(
  "through",
  [
    copy.copy,
    copy.deepcopy,
    dataclasses.replace,
    through_pickle,
    through_flatten,
    through_keys,
    through_partition,
    through_scan,
    through_flax,
    through_odd_leaves,
  ],
)
def test_containers_survive(x, through):
  assert_same(through(x), x)


@each
def test_containers_are_sharded_and_copied(x):
  mesh = jax.make_mesh((8,), ("d",), (AxisType.Auto,))
  everywhere = NamedSharding(mesh, PartitionSpec())
  shardings = jax.tree.map(lambda _: everywhere, x)
  for where in (everywhere, shardings):
    put = jax.device_put(x, where)
    assert_same(put, x)
    assert all(leaf.sharding == everywhere for leaf in jax.tree.leaves(put))
  repr(shardings)


def test_a_stack_is_sharded_by_layers():
  x = CONTAINERS["stack"]
  mesh = jax.make_mesh((8,), ("d",), (AxisType.Auto,))
  split = jax.device_put(x, NamedSharding(mesh, PartitionSpec("d")))
  assert split.nonzero.sharding.shard_shape(split.nonzero.shape) == (1, 2, 24)
  spec = PartitionSpec("d")
  per_layer = jax.shard_map(unpack, mesh=mesh, in_specs=spec, out_specs=spec)
  np.testing.assert_array_equal(jax.jit(per_layer)(split), unpack(x))


def test_plain_orbax_keeps_containers(tmp_path):
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(tmp_path / "net", CONTAINERS)
    checkpointer.wait_until_finished()
    shapes = jax.eval_shape(lambda: CONTAINERS)
    assert_same(checkpointer.restore(tmp_path / "net", shapes), CONTAINERS)


class Layer(eqx.Module):
  weight: PackedTernary

  def __call__(self, x):
    return x @ unpack(self.weight)


class NnxLayer(nnx.Module):
  def __init__(self, weight, keep):
    self.weight = keep(weight)

  def __call__(self, x):
    weight = self.weight
    weight = weight.get_value() if isinstance(weight, nnx.Param) else weight
    return x @ unpack(weight)


@pytest.mark.parametrize(
  ("module", "jit"),
  [
    (Layer, eqx.filter_jit),
    (lambda w: NnxLayer(w, nnx.Param), nnx.jit),
    (lambda w: NnxLayer(w, nnx.data), nnx.jit),
  ],
  ids=["Equinox", "Param", "data"],
)
def test_modules_hold_packed_weights(module, jit):
  packed, x = CONTAINERS["packed"], jnp.ones((1, 16))
  got = jit(lambda model, x: model(x))(module(packed), x)
  np.testing.assert_array_equal(got, x @ unpack(packed))


# flax.serialization.


def test_states_and_names_of_fields():
  state = serialization.to_state_dict(CONTAINERS)
  flat = state["flat"]
  assert list(flat) == ["nonzero", "sign", "w_p", "w_n", "shape", "axis"]
  assert flat["shape"] == {"0": 3, "1": 5}
  assert flat["axis"] is None
  raw = serialization.msgpack_restore(serialization.to_bytes(CONTAINERS))
  fields = raw["stack"] | {"shape": tuple(raw["stack"]["shape"].values())}
  assert_same(PackedTernary(**fields), CONTAINERS["stack"])
  assert raw["params"]["latent"]["a"]["bias"].tolist() == [1.0] * 4


def training(wrapped):
  """Parameters, an optimizer, and its state after an update."""
  tern = ParamTransform(SCA(sparsity=0.5))
  user = {"kernel": weights((16, 8), jnp.bfloat16), "bias": jnp.ones(8)}
  params, _ = tern.init(user)
  wdr = tern_jax.wdr_transform(
    tern_jax.at_sparsity(0.5),
    tern_jax.relative(tern_jax.late_kappa(10)),
    tern_jax.kernels(),
  )
  tx = optax.chain(wdr, optax.adam(1e-3))
  if wrapped:
    params, tx = user, tern_jax.wrap(optax.adam(1e-3), tern, wdr)
  opt_state = jax.jit(tx.update)(params, tx.init(params), params)[1]
  return params, tx, opt_state


@pytest.mark.long
@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("wrapped", [True, long(False)])
def test_states_of_optimizers_with_flax(wrapped):
  params, tx, opt_state = training(wrapped)
  wanted = {"params": params, "opt_state": opt_state}
  fresh = {"params": params, "opt_state": tx.init(params)}
  back = serialization.from_bytes(fresh, serialization.to_bytes(wanted))
  assert_same(back, wanted)


def test_the_dtypes_of_a_script_are_checked():
  def bytes_of(dtype):
    return serialization.to_bytes(Dtypes((("kernel", dtype),)))

  target = Dtypes((("kernel", "bfloat16"),))
  assert serialization.from_bytes(target, bytes_of("bfloat16")) == target
  with pytest.raises(ValueError, match=r"items .*float16.*, but .*bfloat16"):
    serialization.from_bytes(target, bytes_of("float16"))


@functools.cache
def register_optax():
  """Registers states of optax, which a user does for an export."""
  for cls in (
    *(optax.EmptyState, optax.ScaleByAdamState),
    *(optax.MaskedNode, optax.MaskedState),
  ):
    jax.export.register_namedtuple_serialization(
      cls, serialized_name=f"optax.{cls.__name__}"
    )


@pytest.mark.sample(2)
@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("wrapped", [False, True])
def test_a_step_is_exported(wrapped):
  register_optax()
  params, tx, opt_state = training(wrapped)

  @jax.jit
  def step(params, opt_state):
    updates, opt_state = tx.update(params, opt_state, params)
    return optax.apply_updates(params, updates), opt_state

  data = jax.export.export(step)(params, opt_state).serialize()
  got = jax.export.deserialize(data).call(params, opt_state)
  assert_same(got, step(params, opt_state))


@pytest.mark.parametrize(
  ("saved", "target", "match"),
  [
    (ternary((3, 5)), ternary((5, 3)), r"net.*shape \(3, 5\), .* \(5, 3\)"),
    (ternary((16, 24)), ternary((24, 16)), r"shape \(16, 24\), .* \(24, 16\)"),
    (ternary(layers=8), ternary((8, 16, 24)), "axis 1, but .* has 0"),
  ],
)
def test_packed_weights_of_another_shape_are_refused(saved, target, match):
  data = serialization.to_bytes({"net": pack(saved)})
  with pytest.raises(ValueError, match=match):
    serialization.from_bytes({"net": pack(target)}, data)


@pytest.mark.parametrize(
  ("change", "match"),
  [
    (lambda s: s.pop("scales"), "has the fields .*, got .'latent'."),
    (lambda s: s.update(other=1), "has the fields .*'other'"),
  ],
)
def test_state_dicts_of_other_fields_are_refused(change, match):
  params = CONTAINERS["params"]
  state = serialization.to_state_dict(params)
  change(state)
  with pytest.raises(ValueError, match=f"TernParams {match}"):
    serialization.from_state_dict(params, state)


# What a process knows that imports flax first, or last.
MAKE = """
import sys
import jax, jax.numpy as jnp
import tern_jax
codes, one = jnp.ones((8, 16, 3), jnp.int8), jnp.ones((8, 1, 1))
ternary = tern_jax.Ternary(codes, one, 2 * one)
params = tern_jax.TernParams({"w": jnp.arange(3.0)}, {"w": {"s": one}})
tree = {"params": params, "ternary": ternary, "packed": tern_jax.pack(ternary)}
def step(tree):
  return jax.tree.map(lambda x: x + x, tree), tern_jax.unpack(tree)["packed"]
"""
WRITE = f"""
{MAKE}
assert "flax" not in sys.modules
exported = jax.export.export(jax.jit(step))(tree).serialize()
from flax import serialization
print(bytes(exported).hex(), serialization.to_bytes(tree).hex())
"""
READ = f"""
from flax import serialization
{MAKE}
exported, data = map(bytes.fromhex, sys.stdin.read().split())
doubled, dense = jax.export.deserialize(bytearray(exported)).call(tree)
assert isinstance(doubled["params"], tern_jax.TernParams), doubled
assert doubled["params"].latent["w"].tolist() == [0, 2, 4]
assert doubled["packed"].shape == (8, 16, 3) and doubled["packed"].axis == 1
assert (dense == 1).all() and dense.shape == (8, 16, 3)
zeros = jax.tree.map(jnp.zeros_like, tree)
back = serialization.from_bytes(zeros, data)
assert jax.tree.structure(back) == jax.tree.structure(tree)
assert jax.tree.all(jax.tree.map(jnp.array_equal, back, tree))
"""


@pytest.mark.long
def test_exports_and_bytes_in_a_fresh_process():
  def run(program, given=None):
    command = [sys.executable, "-W", "error", "-c", program]
    done = subprocess.run(
      command, input=given, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout

  run(READ, run(WRITE))


# Flax's TrainState, by hand.


@pytest.mark.usefixtures("standard_promotion")
def test_a_train_state_by_hand():
  model, x = nn.Dense(4), jax.random.normal(jax.random.key(1), (8, 16))
  variables = model.init(jax.random.key(0), x)
  tern = ParamTransform(SCA(sparsity=0.5))
  params, state = tern.init(variables["params"])
  tx = optax.chain(
    tern_jax.wdr_transform(0.1, 1e-3, tern_jax.kernels()), optax.adam(1e-2)
  )

  def loss(params, state):
    return jnp.mean((model.apply({"params": tern(params, state)}, x) - 1) ** 2)

  @jax.jit
  def by_hand(params, state, opt_state):
    grads = jax.grad(loss)(params, state)
    updates, opt_state = tx.update(grads, opt_state, params)
    params = optax.apply_updates(params, updates)
    return *tern.after_step(params, state), opt_state

  @jax.jit
  def by_flax(ts, state):
    ts = ts.apply_gradients(grads=jax.grad(loss)(ts.params, state))
    params, state = tern.after_step(ts.params, state)
    return ts.replace(params=params), state

  ts = TrainState.create(apply_fn=model.apply, params=params, tx=tx)
  wanted, got = (params, state, tx.init(params)), (ts, state)
  for _ in range(3):
    wanted, got = by_hand(*wanted), by_flax(*got)
  assert_same((got[0].params, got[1], got[0].opt_state), wanted)


OVERWRITTEN = "_overwrite_with_gradient"


@pytest.mark.long
def test_what_flax_overwrites_with_its_gradient():
  user = {"params": {"kernel": weights((8, 8))}, OVERWRITTEN: jnp.ones(())}
  tern, make = ParamTransform(SCA(sparsity=0.5)), TrainState.create
  whole, _ = tern.init(user)
  assert OVERWRITTEN in whole
  assert OVERWRITTEN not in TernParams(latent=Layer(None), scales={})
  with pytest.raises(TypeError, match=r"tern.init\(variables\['params'\]\)"):
    make(apply_fn=None, params=whole, tx=optax.sgd(1.0))
  # What the message says.
  params, _ = tern.init(user["params"])
  ts = make(apply_fn=None, params=user | {"params": params}, tx=optax.sgd(1.0))
  ts = ts.apply_gradients(grads=ts.params)
  zeros = jax.tree.map(jnp.zeros_like, params)
  assert_same(ts.params, {"params": zeros, OVERWRITTEN: jnp.ones(())})


# Trees of labels and of bools.


LATENT = {"a": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}}
PARAMS = TernParams(latent=LATENT, scales={"a/kernel": {"s": jnp.ones(())}})


def tree_of(kernel, bias, scale):
  """Of the values that the leaves of PARAMS have."""
  latent = {"a": {"kernel": kernel, "bias": bias}}
  return TernParams(latent=latent, scales=scale)


def by_path(fn):
  """A tree of the latents' own, made by Flax."""
  return flax.traverse_util.path_aware_map(lambda path, _: fn(path[-1]), LATENT)


@pytest.mark.parametrize(
  "labels",
  [
    tree_of("slow", "fast", "fast"),
    TernParams(
      latent=by_path({"kernel": "slow", "bias": "fast"}.get), scales="fast"
    ),
    lambda params: TernParams(
      latent=by_path({"kernel": "slow", "bias": "fast"}.get), scales="fast"
    ),
    lambda params: jax.tree_util.tree_map_with_path(
      lambda path, _: "slow" if path[-1].key == "kernel" else "fast", params
    ),
  ],
  ids=["tree", "flax", "function", "tree_map_with_path"],
)
def test_labels_of_the_users_own_parameters(labels):
  rates = {"slow": optax.sgd(0.25), "fast": optax.sgd(1.0)}
  for make in (optax.multi_transform, optax.partition):
    tx = make(rates, labels)
    updates, _ = tx.update(PARAMS, tx.init(PARAMS), PARAMS)
    got = jax.tree.map(lambda x: float(jnp.ravel(x)[0]), updates)
    assert got == tree_of(-0.25, -1.0, {"a/kernel": {"s": -1.0}})


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize(
  "mask",
  [
    tree_of(True, False, False),
    lambda params: TernParams(
      latent=by_path(lambda name: name != "bias"), scales=False
    ),
    lambda params: jax.tree_util.tree_map_with_path(
      lambda path, _: path[-1].key == "kernel", params
    ),
    tern_jax.kernels(),
  ],
  ids=["tree", "flax", "tree_map_with_path", "kernels"],
)
def test_masks_of_the_users_own_parameters(mask):
  nothing = jax.tree.map(jnp.zeros_like, PARAMS)
  for tx, decay in (
    (optax.adamw(1.0, weight_decay=0.5, mask=mask), -0.5),
    (optax.masked(optax.add_decayed_weights(0.5), mask), 0.5),
  ):
    updates, _ = tx.update(nothing, tx.init(PARAMS), PARAMS)
    got = jax.tree.map(lambda x: float(jnp.ravel(x)[0]), updates)
    assert got == tree_of(decay, 0.0, {"a/kernel": {"s": 0.0}})


# How they print.


HALF = Ternary(
  jnp.array([[1, 0], [0, -1]], jnp.int8), jnp.float32(0.5), jnp.float32(2)
)
CHANNELS = Ternary(
  jnp.array([[1, 0, 1, 0]] * 8, jnp.int8),
  jnp.ones((1, 4), jnp.bfloat16),
  jnp.bfloat16(0.25),
)


def deleted(x):
  x = jax.tree.map(jnp.copy, x)
  for leaf in jax.tree.leaves(x):
    leaf.delete()
  return x


@pytest.mark.parametrize(
  ("x", "wanted"),
  [
    (HALF, "Ternary(float32[2, 2], sparsity=0.5, w_p=0.5, w_n=2)"),
    (pack(HALF), "PackedTernary(float32[2, 2], sparsity=0.5, w_p=0.5, w_n=2)"),
    (
      pack(CHANNELS),
      "PackedTernary(bfloat16[8, 4], sparsity=0.5, w_p=bfloat16[1, 4],"
      " w_n=0.25)",
    ),
    (
      jax.tree.map(np.asarray, HALF),
      "Ternary(float32[2, 2], sparsity=0.5, w_p=0.5, w_n=2)",
    ),
    (
      jax.eval_shape(pack, CHANNELS),
      "PackedTernary(bfloat16[8, 4], w_p=bfloat16[1, 4], w_n=bfloat16[])",
    ),
    (deleted(HALF), "Ternary(float32[2, 2], w_p=float32[], w_n=float32[])"),
    (
      Ternary(jnp.ones((0, 8), jnp.int8), jnp.ones(()), jnp.ones(())),
      "Ternary(float32[0, 8], w_p=1, w_n=1)",
    ),
    (
      jax.tree.map(lambda x: "one\ntwo", pack(HALF)),
      r"PackedTernary(nonzero='one\ntwo', sign='one\ntwo', w_p='one\ntwo',"
      r" w_n='one\ntwo')",
    ),
    (Ternary(None, 1, 2), "Ternary(codes=None, w_p=1, w_n=2)"),
    # Axes that do not fit, as after vmap(out_axes=1): not counted.
    (
      jax.tree.map(lambda x: x.T, pack(CHANNELS)),
      "PackedTernary(bfloat16[8, 4], w_p=bfloat16[4, 1], w_n=0.25)",
    ),
    (
      PARAMS,
      "TernParams(latent=<2 arrays, 6 values>, scales=<1 array, 1 values>)",
    ),
    (tern_jax.LABELS, "TernParams(latent='latent', scales='scales')"),
    (TernParams({}, None), "TernParams(latent={}, scales=None)"),
  ],
)  # fmt: skip
def test_containers_print_on_one_line(x, wanted):
  assert repr(x) == wanted


def test_containers_print_under_tracing():
  shown = []

  @jax.jit
  def look(x):
    shown.extend(map(repr, (x, pack(x), HALF, TernParams(x.codes, x.w_p))))
    return x

  look(HALF)
  dims = "float32[2, 2], w_p=float32[], w_n=float32[]"
  assert shown == [
    f"Ternary({dims})",
    f"PackedTernary({dims})",
    "Ternary(float32[2, 2], sparsity=0.5, w_p=0.5, w_n=2)",
    "TernParams(latent=<1 array, 4 values>, scales=<1 array, 1 values>)",
  ]
