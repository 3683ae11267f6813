"""Sizes shared over layers, and the targets that come of it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import tern_jax
from tern_jax import (
  EC2T,
  SCA,
  TGA,
  TTQ,
  TWN,
  ParamTransform,
  across_layers,
  at_sparsity,
  codec,
  fit_budget,
  from_packed,
  per_layer,
  ramp,
  relative,
  wdr_transform,
)
from tern_jax.core.paths import exact
from tern_jax.training import data_mesh
from tests import helpers

SHAPES = {"a": (64, 96), "b": (3, 3, 16, 32), "c": (48, 10)}


def net(seed=0):
  rng = np.random.default_rng(seed)
  sigma = {"a": 0.05, "b": 0.1, "c": 0.3}
  return {
    k: {
      "kernel": jnp.asarray(sigma[k] * rng.normal(size=shape), jnp.float32),
      "bias": jnp.zeros(shape[-1]),
    }
    for k, shape in SHAPES.items()
  }


def zeros(tern, params, state):
  ternary = helpers.discretize(tern, params, state)
  return {
    k: float(jnp.mean(v["kernel"].codes == 0)) for k, v in ternary.items()
  }


def size(tern, params, state):
  """Bytes of codes at the entropy of both signs alike, scales and biases."""
  total = 0.0
  for layer in tern.discretize(params, state).values():
    codes = np.asarray(layer["kernel"].codes)
    s = np.mean(codes == 0)
    bits = -s * np.log2(s) - (1 - s) * np.log2((1 - s) / 2)
    total += codes.size * bits / 8 + 8 + 4 * layer["bias"].size
  return total


# Targets of a tree.


def test_per_layer_targets_are_met():
  tern = ParamTransform(SCA(sparsity=per_layer({"a": 0.9, "*/kernel": 0.5})))
  assert zeros(tern, *helpers.init(tern, net())) == pytest.approx(
    {"a": 0.9, "b": 0.5, "c": 0.5}, abs=1e-4
  )
  assert per_layer(0.9) == per_layer({"*": 0.9})


@pytest.mark.parametrize(
  "target",
  [per_layer({"a": 0.5, "head/w": 0.25}), across_layers(0.8, floor=0.5)],
  ids=["per_layer", "across_layers"],
)
def test_targets_print_hash_and_rise(target):
  names = {"per_layer": per_layer, "across_layers": across_layers}
  assert eval(repr(target), names) == target
  assert hash(target) == hash(eval(repr(target), names))
  risen = ramp(target, steps=100)
  assert eval(repr(risen), {**names, "ramp": ramp}) == risen
  method = SCA(sparsity=risen)
  assert eval(repr(method), {**names, "ramp": ramp, "SCA": SCA}) == method


def test_bad_targets():
  tree = net()
  with pytest.raises(ValueError, match=r"sparsity must lie in \[0, 1\)"):
    per_layer({"a": 1.5})
  with pytest.raises(ValueError, match=r"give tern_jax\.per_layer"):
    SCA(sparsity={"a": 0.5})
  with pytest.raises(ValueError, match="'head' matches no leaf"):
    ParamTransform(SCA(sparsity=per_layer({"head": 0.5, "*": 0.5}))).init(tree)
  with pytest.raises(ValueError, match="no target for b/kernel: add one"):
    ParamTransform(SCA(sparsity=per_layer({"a": 0.5}))).init(tree)
  with pytest.raises(ValueError, match=r"floor must lie in \[0, 1\), got 1.5"):
    across_layers(0.5, floor=1.5)
  for target in (per_layer({"a": 0.5}), across_layers(0.5)):
    with pytest.raises(TypeError, match="use ParamTransform"):
      TWN(sparsity=target).init(tree["a"]["kernel"])


def test_across_layers_has_one_threshold():
  tree = net()
  tern = ParamTransform(TWN(sparsity=across_layers(0.8)))
  got = zeros(tern, *helpers.init(tern, tree))
  every = np.concatenate([np.ravel(v["kernel"]) for v in tree.values()])
  limit = np.sort(np.abs(every))[round(0.8 * every.size) - 1]
  want = {k: np.mean(np.abs(v["kernel"]) <= limit) for k, v in tree.items()}
  assert got == pytest.approx(want, abs=1e-6)
  assert got["a"] > 0.9 > got["c"]


def kept(shapes, nonzeros):
  """Returns the nonzeros of the layers of a random network of so many."""
  sizes = np.array([np.prod(shape) for shape in shapes], float)
  weight = np.array([sum(shape) for shape in shapes], float)
  found, low, high = sizes, 0.0, (sizes / weight).max()
  for _ in range(100):
    middle = (low + high) / 2
    found = np.minimum(sizes, middle * weight)
    low, high = (low, middle) if found.sum() > nonzeros else (middle, high)
  return found


@pytest.mark.parametrize("floor", [0.5, helpers.long(0.75), 1.0])
@pytest.mark.parametrize("share", [0.3, helpers.long(0.8), 0.95])
def test_across_layers_each_keeps_its_floor(share, floor):
  r = np.random.default_rng(0)
  shapes = {"big": (60, 40), "head": (40, 4), "stack": (30, 20)}
  # Latents of the head and of one layer of the stack are small.
  tree = {k: r.normal(size=shape) for k, shape in shapes.items()}
  tree["head"] *= 0.01
  tree["stack"] = np.stack([tree["stack"], 0.01 * tree["stack"]])
  tree = jax.tree.map(jnp.float32, {k: {"kernel": v} for k, v in tree.items()})
  tern = ParamTransform(
    TWN(sparsity=across_layers(share, floor)), None, "stack"
  )
  codes = helpers.discretize(tern, *helpers.init(tern, tree))
  found = jax.tree.map(
    lambda x: np.sum(x.codes != 0, axis=(-2, -1)),
    codes,
    is_leaf=lambda x: isinstance(x, tern_jax.Ternary),
  )
  got = [
    found["big"]["kernel"],
    found["head"]["kernel"],
    *found["stack"]["kernel"],
  ]
  total = 2400 + 160 + 2 * 600
  nonzeros = total - round(share * total)
  assert sum(got) == nonzeros
  floors = floor * kept([*shapes.values(), (30, 20)], nonzeros)
  assert (np.array(got) >= np.floor(floors * (1 - 1e-5))).all()
  if share > 0.5:  # else more of the others than there are would be left
    small = np.array(got)[[1, 3]]
    np.testing.assert_allclose(
      small, floors[[1, 3]], atol=1 + 0.01 * nonzeros * (floor == 1)
    )
  # WDR has the same barriers.
  barrier = tern_jax.at_sparsity(across_layers(share, floor), gain=1.0)
  plain = {k: v["kernel"] for k, v in tree.items()}
  thresholds = jax.jit(lambda x: barrier.init(x, ("stack",)))(plain)
  for k, layer in thresholds.items():
    beyond = np.abs(plain[k]) > np.reshape(
      layer, (-1, 1, 1)[-plain[k].ndim :] if layer.ndim else ()
    )
    np.testing.assert_array_equal(beyond, codes[k]["kernel"].codes != 0)


@pytest.mark.long
@pytest.mark.parametrize("where", ["vmap", "sharded"])
def test_across_layers_everywhere(where):
  tree = net()
  tern = ParamTransform(SCA(sparsity=across_layers(0.7)))
  want = tern.discretize(*tern.init(tree))

  def codes(tree):
    made = tern.discretize(*tern.refresh(*tern.init(tree)))
    return {k: v["kernel"].codes for k, v in made.items()}

  if where == "vmap":
    two = jax.tree.map(lambda *x: jnp.stack(x), tree, net(1))
    got = jax.tree.map(lambda x: x[0], jax.jit(jax.vmap(codes))(two))
  else:
    sharding = NamedSharding(data_mesh(), P("data"))
    spread = jax.tree.map(
      lambda x: jax.device_put(x, sharding) if x.shape[0] % 8 == 0 else x, tree
    )
    got = jax.jit(codes)(spread)
  for k in tree:
    np.testing.assert_array_equal(got[k], want[k]["kernel"].codes)


@pytest.mark.long
def test_stacked_layers_share_a_target_across():
  tree = net()
  layers = [0.5, 1.0, 2.0]
  kernel = tree["a"]["kernel"]
  stack = {"s": {"kernel": jnp.stack([k * kernel for k in layers])}}
  single = {str(k): {"kernel": k * kernel} for k in layers}
  method = TWN(sparsity=across_layers(0.75))
  tern = ParamTransform(method, stacked=("s",))
  got = helpers.discretize(tern, *helpers.init(tern, stack))["s"]["kernel"]
  alone = ParamTransform(method)
  want = helpers.discretize(alone, *helpers.init(alone, single))
  for i, k in enumerate(layers):
    np.testing.assert_array_equal(got.codes[i], want[str(k)]["kernel"].codes)


@pytest.mark.long
@pytest.mark.sample(3)
@pytest.mark.parametrize(
  ("target", "layers"),
  [
    (per_layer({"a": 0.8, "c": 0.4}), "ac"),
    (across_layers(0.7), "ac"),
    helpers.long(per_layer({"a": 0.8, "b": 0.6, "c": 0.4}), "abc"),
    helpers.long(across_layers(0.7), "abc"),
  ],
)
def test_targets_are_followed_in_training(target, layers, standard_promotion):
  tree = {k: layer for k, layer in net().items() if k in layers}
  steps = 60
  risen = ramp(target, steps)
  tern = ParamTransform(SCA(sparsity=risen))
  params, state = helpers.init(tern, tree)
  tx = optax.chain(
    wdr_transform(at_sparsity(risen), relative(0.5), mask=tern_jax.kernels()),
    optax.adam(1e-2),
  )

  def loss(params):
    weights = jax.tree.leaves(tern(params, state))
    return sum(jnp.sum(jnp.square(w - 0.1)) for w in weights)

  @jax.jit
  def step(params, state, opt_state):
    grads = jax.grad(loss)(params)
    updates, opt_state = tx.update(grads, opt_state, params)
    params = optax.apply_updates(params, updates)
    return *tern.after_step(params, state), opt_state

  opt_state = tx.init(params)
  for _ in range(steps):
    params, state, opt_state = step(params, state, opt_state)
  sizes = {k: v["kernel"].size for k, v in tree.items()}

  def total(share):
    return sum(share[k] * n for k, n in sizes.items()) / sum(sizes.values())

  followed = zeros(tern, params, state)
  met = zeros(tern, *helpers.refresh(tern, params, state))
  want = (
    {k: v for k, v in target.targets}
    if isinstance(target, tern_jax.targets.schedules.PerLayer)
    else None
  )
  if want:
    assert followed == pytest.approx(want, abs=2e-3)
    assert met == pytest.approx(want, abs=3e-3)
  assert total(followed) == pytest.approx(
    total(want) if want else 0.7, abs=2e-3
  )
  assert total(met) == pytest.approx(total(want) if want else 0.7, abs=1e-3)


@pytest.mark.long
@pytest.mark.sample(3)
@pytest.mark.parametrize(
  ("method_class", "target", "layers"),
  [
    (SCA, per_layer({"a": 0.5, "*": 0.8}), "ab"),
    (TWN, across_layers(0.8), "ac"),
    (TTQ, 0.8, "a"),
    (TGA, 0.8, "b"),
    (EC2T, 0.8, "c"),
    helpers.long(SCA, 0.8, "abc"),
    helpers.long(SCA, per_layer({"a": 0.5, "*": 0.8}), "abc"),
    *(helpers.long(m, across_layers(0.8), "abc") for m in (SCA, TWN)),
    *(helpers.long(m, 0.8, "abc") for m in (TWN, TTQ, TGA, EC2T)),
  ],
)
def test_the_last_steps_of_a_ramp_meet_it_to_the_weight(
  method_class, target, layers
):
  tern = ParamTransform(method_class(sparsity=ramp(target, 60)))

  def step(carry, key):
    params, state = carry

    def moved(x):
      return x + 0.1 * jnp.std(x) * jax.random.normal(key, x.shape)

    latent = jax.tree.map(moved, params.latent)
    carry = tern.after_step(params.replace(latent=latent), state)
    codes = tern.discretize(*carry)
    return carry, {k: jnp.sum(v["kernel"].codes == 0) for k, v in codes.items()}

  keys = jax.random.split(jax.random.key(0), 60)
  tree = {k: layer for k, layer in net().items() if k in layers}
  _, counts = jax.jit(lambda t: jax.lax.scan(step, tern.init(t), keys))(tree)
  sizes = {k: np.prod(SHAPES[k]) for k in layers}
  missed = {k: counts[k] - round(0.8 * sizes[k]) for k in layers}
  if target == across_layers(0.8):
    missed = {"all": sum(counts.values()) - round(0.8 * sum(sizes.values()))}
  elif target != 0.8:
    missed["a"] = counts["a"] - round(0.5 * sizes["a"])
  for name, off in missed.items():
    assert np.all(off[56:] == 0), name  # steps 57 to 60
    assert np.any(off[50:56] != 0), name


def test_wdr_has_the_barrier_of_all_layers():
  tree = net()
  target = across_layers(0.6)
  tx = wdr_transform(
    at_sparsity(target), relative(1.0), mask=tern_jax.kernels()
  )
  state = tx.init(tree).inner_state
  every = np.concatenate([np.ravel(v["kernel"]) for v in tree.values()])
  for limit in jax.tree.leaves(state.threshold):
    assert np.sum(np.abs(every) <= limit) == round(0.6 * every.size)


@pytest.mark.long
def test_a_file_goes_on_with_a_target_across_layers():
  tern = ParamTransform(SCA(sparsity=across_layers(0.7)))
  packed = tern_jax.pack(tern.discretize(*tern.init(net())))
  params, state = from_packed(packed, tern)
  for moment in ((params, state), tern.refresh(params, state)):
    again = tern_jax.pack(tern.discretize(*moment))
    jax.tree.map(np.testing.assert_array_equal, again, packed)


# Budgets.


@pytest.mark.parametrize(("asked", "seed"), [(700, 0), (1300, 1), (1900, 0)])
def test_a_budget_is_met_from_below(asked, seed):
  tree = net(seed)
  targets = fit_budget(tree, bytes=asked + 700)
  tern = ParamTransform(SCA(sparsity=targets))
  got = size(tern, *tern.init(tree))
  assert 0.99 * (asked + 700) <= got <= 1.001 * (asked + 700)


def test_the_budget_is_what_a_codec_stores():
  tree = net()
  asked = 2500
  tern = ParamTransform(TWN(sparsity=fit_budget(tree, bytes=asked)))
  packed = tern_jax.pack(tern.discretize(*tern.init(tree)))
  stored = sum(
    len(codec.encode(layer["kernel"])) + 8 + 4 * layer["bias"].size
    for layer in packed.values()
  )
  assert 0.97 * asked < stored < 1.03 * asked + 64 * len(tree)


def test_no_other_shares_of_one_size_are_better():
  tree = net()

  def loss(shares):
    total = 0.0
    for k, s in shares.items():
      w = np.sort(np.abs(np.ravel(tree[k]["kernel"])).astype(np.float64))
      kept = w[round(s * w.size) :]
      cosine = np.sum(kept) / np.sqrt(kept.size * np.sum(w * w))
      total -= 2 * SHAPES[k][-1] * np.log(cosine)
    return total

  def cost(shares):
    total = 0.0
    for k, s in shares.items():
      n = tree[k]["kernel"].size
      total += n / 8 * (-s * np.log2(s) - (1 - s) * np.log2((1 - s) / 2))
    return total

  fixed = sum(8 + 4 * v["bias"].size for v in tree.values())
  targets = fit_budget(tree, bytes=1200 + fixed)
  best = {k: float(targets.of(f"{k}/kernel")) for k in tree}
  assert cost(best) == pytest.approx(1200, rel=1e-3)
  rng = np.random.default_rng(0)
  tried = 0
  while tried < 200:
    other = {k: float(rng.uniform(0.4, 0.999)) for k in tree}
    if cost(other) <= 1200:
      tried += 1
      assert loss(other) > loss(best) - 1e-2


def test_more_than_enough_room_asks_for_the_least_distortion():
  targets = fit_budget(net(), bytes=1e9)
  # Of normal weights: Delta = .612 sigma, erf(.612 / sqrt 2) = .459.
  for _, share in targets.targets:
    assert share == pytest.approx(0.459, abs=0.03)


def test_too_small_a_budget():
  with pytest.raises(ValueError, match="576 are taken by scales"):
    fit_budget(net(), bytes=500)
  with pytest.raises(ValueError, match="give at least"):
    fit_budget(net(), bytes=580)
  with pytest.raises(ValueError, match="selects no leaf"):
    fit_budget({"bias": jnp.zeros(3)}, bytes=500)


@pytest.mark.long
def test_a_budget_names_its_own_leaves_only():
  w = net()["a"]["kernel"]
  same = {
    "Dense_0": {"kernel": w},
    "head": {"Dense_0": {"kernel": 0.1 * w[:8]}},
    "block[0]": {"kernel": w[:, :8]},
    "block0": {"kernel": w[:16, :16]},
    "a*": {"kernel": w[:8, :8]},
    "ab": {"kernel": w[:, :16]},
    # One path is the beginning of another.
    "x/kernel": w[:8],
    "x": {"kernel/w": w[:, :32]},
  }
  targets = fit_budget(same, bytes=3000)
  shares = {path: share for path, share in targets.targets}
  assert len(shares) == len(targets.targets) == 8
  for path in tern_jax.kernels().paths(same):
    assert targets.of(path) == shares[exact(path)]
  tern = ParamTransform(TWN(sparsity=targets))
  made = helpers.discretize(tern, *helpers.init(tern, same))
  for path, ternary in tern_jax.metrics.ternary_leaves(made).items():
    zeros = float(jnp.mean(ternary.codes == 0))
    assert zeros == pytest.approx(float(targets.of(path)), abs=1 / 64)
  assert len({round(share, 3) for share in shares.values()}) > 4


def test_heads_are_output_channels_in_a_budget():
  rng = np.random.default_rng(0)
  shapes = {"query": (16, 8, 16), "out": (8, 16, 24), "up": (24, 64)}
  tree = {
    k: {"kernel": jnp.asarray(rng.normal(size=x), jnp.float32)}
    for k, x in shapes.items()
  }
  matrix = {k: {"kernel": v["kernel"]} for k, v in tree.items()}
  matrix["query"] = {"kernel": tree["query"]["kernel"].reshape(16, 128)}
  matrix["out"] = {"kernel": tree["out"]["kernel"].reshape(128, 24)}
  got, want = (fit_budget(x, bytes=700) for x in (tree, matrix))
  assert got == want
  pair = {"query": tree["query"]}
  assert fit_budget(pair, bytes=200) == fit_budget(
    pair, bytes=200, channel_axis=(-2, -1)
  )


def test_a_budget_takes_any_selection():
  tree = net()
  chosen = {k: {"kernel": k != "b", "bias": False} for k in tree}
  assert fit_budget(tree, bytes=30_000, where=chosen) == fit_budget(
    tree, bytes=30_000, where=tern_jax.kernels(exclude="b")
  )


@pytest.mark.long
def test_a_budget_is_that_of_a_recipe(standard_promotion):
  # WDR sees latents beside their scales, and the budget the user's own paths.
  keys = jax.random.split(jax.random.key(0))
  tree = {
    "a": {"kernel": jax.random.normal(keys[0], (32, 32))},
    "b": {"a": {"kernel": jax.random.normal(keys[1], (32, 32))}},
  }
  targets = fit_budget(tree, bytes=300)
  recipe = tern_jax.recipe(targets, steps=10)
  tx = recipe.optimizer()
  _, state = jax.jit(tx.update)(tree, jax.jit(tx.init)(tree), tree)
  final = recipe.tern.finalize(state, early=True)
  for path, t in (("a/kernel", final["a"]), ("b/a/kernel", final["b"]["a"])):
    zeros = int(jnp.sum(t["kernel"].codes == 0))
    assert zeros == round(float(targets.of(path)) * 1024)
