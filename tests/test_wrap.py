"""`wrap` in everybody's chain, and `finalize`, which ends a training."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import linen as nn
from flax import serialization
from jax import monitoring
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import tern_jax
from tern_jax import SCA, TGA, TTQ, TWN, ParamTransform, Ternary, TernParams
from tests.helpers import long

pytestmark = pytest.mark.usefixtures("standard_promotion_throughout")

STEPS = 20
RECIPE = tern_jax.recipe(tern_jax.per_layer(0.5), STEPS)
ADAM = optax.adam(1e-3)
X = jax.random.normal(jax.random.key(0), (16, 8))


def start():
  """Parameters of two layers."""
  keys = jax.random.split(jax.random.key(1))
  return {
    "a": {
      "kernel": jax.random.normal(keys[0], (8, 12)) / 3,
      "bias": jnp.zeros(12),
    },
    "b": {"kernel": jax.random.normal(keys[1], (12, 4)) / 4},
  }


def loss(params):
  """A loss that has a minimum nowhere near the start."""
  h = jax.nn.relu(X @ params["a"]["kernel"] + params["a"]["bias"][None])
  out = h @ params["b"]["kernel"]
  return jnp.mean(jnp.square(out - jnp.sin(X[:, :4])).astype(jnp.float32))


def train(tx, steps=STEPS, params=None, loss=loss, donate=False, **extra):
  """Runs a script that knows nothing of ternary weights."""
  params = start() if params is None else params

  def step(carry, _):
    params, state = carry
    updates, state = tx.update(jax.grad(loss)(params), state, params, **extra)
    return (optax.apply_updates(params, updates), state), None

  def run(params, state):
    return jax.lax.scan(step, (params, state), None, length=steps)[0]

  donated = (0, 1) if donate else ()
  return jax.jit(run, donate_argnums=donated)(params, tx.init(params))


def assert_close(tree, wanted):
  """Two trees are equal but for their last digits."""
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, 1e-5, 1e-6), tree, wanted
  )


def assert_live(tern, state, params, rest=None):
  """What a script holds is what `finalize` returns, with exact zeros."""
  final = tern.finalize(state, rest)
  dense = tern_jax.unpack(tern_jax.pack(final))
  jax.tree.map(np.testing.assert_array_equal, dense, params)
  for t in jax.tree.leaves(final, is_leaf=lambda x: isinstance(x, Ternary)):
    if isinstance(t, Ternary):
      assert jnp.sum(t.codes == 0) == t.codes.size // 2


WRAPPED = tern_jax.wrap(ADAM, *RECIPE)


def of_rate(learning_rate):
  """A wrapped optimizer, as a function of its rate."""
  return tern_jax.wrap(optax.adam(learning_rate), *RECIPE)


CHAINS = {
  "itself": WRAPPED,
  "recipe": RECIPE.optimizer(),
  "MultiSteps": optax.MultiSteps(WRAPPED, 2),
  "apply_if_finite": optax.apply_if_finite(WRAPPED, 3),
  "inject_hyperparams around": optax.inject_hyperparams(of_rate)(
    learning_rate=optax.cosine_decay_schedule(1e-3, STEPS)
  ),
  "inject_hyperparams inside": tern_jax.wrap(
    optax.inject_hyperparams(optax.adam)(1e-3), *RECIPE
  ),
  "schedule_free": tern_jax.wrap(
    optax.contrib.schedule_free(optax.adam(1e-3, b1=0.0), 1e-3), *RECIPE
  ),
  "clipping around": optax.chain(optax.clip_by_global_norm(0.1), WRAPPED),
  "clipping inside": tern_jax.wrap(
    optax.chain(optax.clip_by_global_norm(0.1), ADAM), *RECIPE
  ),
  "masked decay": tern_jax.wrap(
    optax.adamw(1e-3, mask=lambda p: jax.tree.map(lambda x: x.ndim > 1, p)),
    *RECIPE,
  ),
  "static mask": tern_jax.wrap(
    optax.adamw(
      1e-3,
      mask=TernParams(
        {"a": {"kernel": True, "bias": False}, "b": {"kernel": True}}, False
      ),
    ),
    *RECIPE,
  ),
  "rate of scales": tern_jax.wrap(
    optax.partition(
      {"latent": ADAM, "scales": optax.sgd(0.01)}, tern_jax.LABELS
    ),
    *RECIPE,
  ),
  "lion": tern_jax.wrap(optax.lion(1e-3), *RECIPE),
  "SAM around": optax.contrib.sam(WRAPPED, optax.sgd(0.01), opaque_mode=True),
  "EC2T": tern_jax.wrap(ADAM, ParamTransform(tern_jax.EC2T(sparsity=0.5))),
  "TTQ, one scale a channel": tern_jax.wrap(
    ADAM, ParamTransform(TTQ(sparsity=0.5, channel_axis=-1))
  ),
}


# What differs from the others in more than an optimizer; the rest is long.
_QUICK = "itself", "MultiSteps", "masked decay"


@pytest.mark.sample(4)
@pytest.mark.parametrize(
  "name", [name if name in _QUICK else long(name) for name in CHAINS]
)
def test_any_chain_holds_the_ternary_weights(name):
  steps = 2 * STEPS if name == "MultiSteps" else STEPS
  extra = {}
  if name == "SAM around":
    extra["grad_fn"] = lambda params, _: jax.grad(loss)(params)
  params, state = train(CHAINS[name], steps, **extra)
  (own,) = tern_jax.trees.state.find(state)
  assert int(own.count) == STEPS
  assert int(own.strayed) == 0
  tern = CHAINS[name].tern if hasattr(CHAINS[name], "tern") else RECIPE.tern
  assert_live(tern, state, params)


def test_it_is_the_training_by_hand():
  tern, wdr = RECIPE
  tx = optax.chain(wdr, ADAM)

  def step(carry, _):
    params, state, opt_state = carry
    grads = jax.grad(lambda p: loss(tern(p, state)))(params)
    updates, opt_state = tx.update(grads, opt_state, params)
    params = optax.apply_updates(params, updates)
    return (*tern.after_step(params, state), opt_state), None

  params, state = tern.init(start())
  carry = params, state, tx.init(params)
  (by_hand, by_hand_state, _), _ = jax.jit(
    lambda c: jax.lax.scan(step, c, None, length=STEPS)
  )(carry)

  # From the ternary weights, as the first forward is float otherwise.
  first = WRAPPED.init(start())
  held = tern(first.params, first.state)

  def wrapped(carry, _):
    held, opt_state = carry
    grads = jax.grad(loss)(held)
    updates, opt_state = WRAPPED.update(grads, opt_state, held)
    return (optax.apply_updates(held, updates), opt_state), None

  (_, own), _ = jax.jit(lambda c: jax.lax.scan(wrapped, c, None, length=STEPS))(
    (held, first)
  )
  assert_close(own.params, by_hand)
  assert_close(own.state, by_hand_state)


def test_there_is_one_clock_under_accumulated_gradients():
  tern, wdr = tern_jax.recipe(tern_jax.per_layer(0.8), steps=100)
  tx = optax.MultiSteps(tern_jax.wrap(ADAM, tern, wdr), 4)
  params, state = train(tx, 40)
  (own,) = tern_jax.trees.state.find(state)
  counts = {"wrap": own.count, "wdr": own.inner[0].inner_state.count}
  counts |= {path: kept["count"] for path, kept in own.state.items()}
  assert {int(x) for x in counts.values()} == {10}
  asked = float(tern.method.sparsity.of("a/kernel")(10))
  assert abs(float(jnp.mean(params["a"]["kernel"] == 0)) - asked) <= 1 / 96


@pytest.mark.parametrize("around", ["multi_transform", "masked"])
def test_a_part_of_the_parameters(around):
  if around == "masked":
    tx = optax.masked(WRAPPED, {"a": True, "b": False})
  else:
    # A static tree of labels of the script's own parameters.
    labels = {"a": {"kernel": "tern", "bias": "tern"}, "b": {"kernel": "rest"}}
    tx = optax.multi_transform({"tern": WRAPPED, "rest": ADAM}, labels)
  params, state = train(tx)
  assert jnp.sum(params["a"]["kernel"] == 0) == 48
  assert not jnp.any(params["b"]["kernel"] == 0)
  assert_live(RECIPE.tern, state, params, params)
  with pytest.raises(ValueError, match=r"does not see b.*params"):
    RECIPE.tern.finalize(state)


def test_buffers_may_be_donated():
  tx = RECIPE.optimizer(ema=0.9)
  params, _ = train(tx, donate=True)
  assert jnp.sum(params["a"]["kernel"] == 0) == 48


@pytest.mark.long
def test_narrow_parameters_have_wide_latents():
  params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), start())
  params, state = train(WRAPPED, params=params)
  dtypes = {str(x.dtype) for x in jax.tree.leaves(params)}
  assert dtypes == {"bfloat16"}
  latent = state.params.latent
  assert latent["a"]["kernel"].dtype == jnp.float32
  assert latent["a"]["bias"].dtype == jnp.bfloat16
  final = RECIPE.tern.finalize(state)
  assert final["a"]["kernel"].dtype == jnp.bfloat16
  assert_live(RECIPE.tern, state, params)


@pytest.mark.long
def test_seeds_are_mapped_over():
  def run(key):
    params = jax.tree.map(
      lambda x: x + 0.1 * jax.random.normal(key, x.shape), start()
    )
    return train(WRAPPED, params=params)

  params, state = jax.vmap(run)(jax.random.split(jax.random.key(2), 3))
  packed = jax.vmap(lambda s: tern_jax.pack(RECIPE.tern.finalize(s)))(state)
  dense = jax.vmap(tern_jax.unpack)(packed)
  jax.tree.map(np.testing.assert_array_equal, dense, params)
  assert jnp.sum(params["a"]["kernel"] == 0, (1, 2)).tolist() == [48] * 3


@pytest.mark.long
def test_rematerialized_losses_train_the_same():
  plain, _ = train(WRAPPED)
  again, _ = train(WRAPPED, loss=jax.checkpoint(loss))
  assert_close(again, plain)


def test_the_average_is_one_of_latents():
  tern = ParamTransform(TWN(sparsity=0.5))
  tx = tern_jax.wrap(optax.sgd(0.5), tern, ema=0.5)
  params = start()
  state = tx.init(params)
  update = jax.jit(lambda p, s: tx.update(jax.grad(loss)(p), s, p))
  average = np.asarray(state.params.latent["a"]["kernel"])
  for n in range(6):
    updates, state = update(params, state)
    params = optax.apply_updates(params, updates)
    latent = np.asarray(state.params.latent["a"]["kernel"])
    rate = min(0.5, (1 + n) / (10 + n))
    average = rate * average + (1 - rate) * latent
  mean = state.average.latent["a"]["kernel"]
  np.testing.assert_allclose(mean, average, 1e-5, 1e-7)
  # The half of the smallest magnitudes of the average is zero.
  codes = tern.finalize(state)["a"]["kernel"].codes
  wanted = np.abs(average) > np.median(np.abs(average))
  np.testing.assert_array_equal(codes != 0, wanted)


MESHES = {"auto": AxisType.Auto, "explicit": AxisType.Explicit}


@pytest.mark.long
@pytest.mark.parametrize(
  ("kind", "spec"),
  [
    ("explicit", P("x", None)),
    long("explicit", P(None, "x")),
    long("auto", P("x", None)),
    long("auto", P(None, "x")),
  ],
)
def test_parameters_may_be_sharded(kind, spec):
  mesh = jax.make_mesh((4,), ("x",), (MESHES[kind],))
  placed = jax.tree.map(
    lambda w: jax.device_put(
      w, NamedSharding(mesh, spec if w.ndim == 2 else P(None))
    ),
    start(),
  )

  def gathered(params):
    if kind == "explicit":
      params = jax.tree.map(
        lambda w: jax.sharding.reshard(w, P(*[None] * w.ndim)), params
      )
    return loss(params)

  with jax.set_mesh(mesh):
    params, state = train(WRAPPED, params=placed, loss=gathered)
    for tree in params, state.params.latent:
      assert tree["a"]["kernel"].sharding.is_equivalent_to(
        NamedSharding(mesh, spec), 2
      )
    assert_live(RECIPE.tern, state, params)
  assert_close(params, train(WRAPPED)[0])


@pytest.mark.long
@pytest.mark.parametrize("names", [("x", None), long((None, "x"))], ids=str)
def test_partitioned_parameters_of_linen(names):
  # Flax's own way: boxes name the axes, and the state is sharded as they say.
  mesh = jax.make_mesh((4,), ("x",), (AxisType.Auto,))
  initializer = nn.initializers.lecun_normal()
  net = nn.Dense(
    4, use_bias=False, kernel_init=nn.with_partitioning(initializer, names)
  )
  x, y = X, jnp.sin(X[:, :4])

  def init(key):
    params = net.init(key, x)["params"]
    return params, WRAPPED.init(params)

  key = jax.random.key(0)
  shardings = nn.get_sharding(jax.eval_shape(init, key), mesh)

  @functools.partial(jax.jit, out_shardings=shardings)
  def step(params, state):
    grads = jax.grad(
      lambda p: jnp.mean(jnp.square(net.apply({"params": p}, x) - y))
    )(params)
    updates, state = WRAPPED.update(grads, state, params)
    return optax.apply_updates(params, updates), state

  params, state = jax.jit(init, out_shardings=shardings)(key)
  for _ in range(STEPS):
    params, state = step(params, state)
  assert_live(RECIPE.tern, state, params)
  final = nn.unbox(RECIPE.tern.finalize(state))["kernel"]
  assert jnp.sum(final.codes == 0) == 16


@pytest.mark.parametrize("by", ["Checkpointer", "orbax", "flax"])
def test_a_run_is_stored_and_goes_on(by, tmp_path):
  tx = RECIPE.optimizer(ema=0.9)
  half = train(tx, STEPS // 2)
  if by == "Checkpointer":
    with tern_jax.Checkpointer(tmp_path) as run:
      run.save(1, half, {})
      again, _, _ = run.restore(half)
  elif by == "orbax":
    with ocp.StandardCheckpointer() as checkpointer:
      checkpointer.save(tmp_path / "run", half)
      checkpointer.wait_until_finished()
      again = checkpointer.restore(tmp_path / "run", half)
  else:
    again = serialization.from_bytes(half, serialization.to_bytes(half))
  assert jax.tree.structure(again) == jax.tree.structure(half)
  jax.tree.map(np.testing.assert_array_equal, again, half)


def around(tx):
  """Transforms that change the parameters behind the back of `wrap`."""
  return {
    "weight decay": optax.chain(tx, optax.add_decayed_weights(-0.01)),
    "schedule_free": optax.contrib.schedule_free(tx, 1e-3),
    "halved": optax.chain(tx, optax.scale(0.5)),
  }


@pytest.mark.parametrize(
  "name", ["weight decay", long("schedule_free"), long("halved")]
)
def test_parameters_that_something_else_changes_are_noticed(name):
  _, state = train(around(WRAPPED)[name])
  with pytest.raises(ValueError, match=r"weight decay, averaging.*Put such"):
    RECIPE.tern.finalize(state)


def test_what_cannot_be_wrapped_says_so():
  params = start()
  state = WRAPPED.init(params)
  with pytest.raises(ValueError, match=r"update\(grads, opt_state, params\)"):
    WRAPPED.update(params, state)
  lbfgs = tern_jax.wrap(optax.lbfgs(), *RECIPE)
  with pytest.raises(TypeError, match="value_fn=: line searches, L-BFGS"):
    lbfgs.update(
      *(params, lbfgs.init(params), params),
      value=1.0,
      grad=params,
      value_fn=loss,
    )
  sam = tern_jax.wrap(optax.contrib.sam(ADAM, ADAM, opaque_mode=True), *RECIPE)
  with pytest.raises(TypeError, match=r"grad_fn=: .*SAM"):
    sam.update(
      *(params, sam.init(params), params),
      grad_fn=lambda p, _: jax.grad(loss)(p),
    )
  frozen = {"a": {"kernel": None, "bias": None}, "b": params["b"]}
  with pytest.raises(ValueError, match=r"a/kernel has no gradient.*exclude"):
    WRAPPED.update(frozen, state, params)
  with pytest.raises(TypeError, match=r"got SCA as tern, .*ParamTransform"):
    tern_jax.wrap(ADAM, SCA(sparsity=0.5))
  with pytest.raises(ValueError, match=r"ema must lie in \[.*, got 1.0"):
    tern_jax.wrap(ADAM, *RECIPE, ema=1.0)
  mask = {"a": {"kernel": True, "bias": False}, "b": {"kernel": True}}
  tx = tern_jax.wrap(optax.adamw(1e-3, mask=mask), *RECIPE)
  with pytest.raises(ValueError, match=r"TernParams\(latent=tree, scales="):
    tx.init(params)


def by_hand(steps):
  """A training by hand, of a ramp over 40 steps."""
  tern, _ = tern_jax.recipe(tern_jax.per_layer(0.75), 40)
  params, state = tern.init(start())
  for _ in range(steps):
    params, state = tern.after_step(params, state)
  return tern, params, state


def zeros(tree):
  return int(jnp.sum(tree["a"]["kernel"].codes == 0))


def test_finalize_meets_the_target_at_the_end():
  tern, params, state = by_hand(10)
  assert zeros(tern.finalize(params, state)) == 72


@pytest.mark.parametrize("steps", [0, 4])
def test_finalize_says_where_the_schedule_stands(steps):
  tern, params, state = by_hand(steps)
  message = (
    rf"a/kernel: at step {steps} of 40 its schedule asks for .* of zeros, and"
    r" for 0.75 from 10 on: call tern.after_step"
  )
  with pytest.raises(ValueError, match=message):
    tern.finalize(params, state)
  assert zeros(tern.finalize(params, state, early=True)) == 72


def test_finalize_knows_the_start_of_any_schedule():
  tern = ParamTransform(TWN(sparsity=lambda n: 0.01 * n))
  params, state = tern.init(start())
  with pytest.raises(ValueError, match="at step 0 its schedule asks for 0 of"):
    tern.finalize(params, state)
  params, state = tern.after_step(params, state)
  assert zeros(tern.finalize(params, state)) == 1


@pytest.mark.parametrize(
  "target",
  [
    tern_jax.ramp(tern_jax.across_layers(0.5), 40),
    tern_jax.ramp(tern_jax.per_layer({"a": 0.5, "b": 0.25}), 40),
  ],
  ids=["across layers", "per layer"],
)
def test_finalize_knows_the_schedules_of_layers(target):
  tern = ParamTransform(TTQ(sparsity=target))
  params, state = tern.init(start())
  with pytest.raises(ValueError, match=r"at step 0 of 40 .* 0\.5 from 20 on"):
    tern.finalize(params, state)
  early = tern.finalize(params, state, early=True)
  total = zeros(early) + int(jnp.sum(early["b"]["kernel"].codes == 0))
  assert total == (72 if isinstance(target, tern_jax.across_layers) else 60)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize(
  "method", [TWN(), TWN(sparsity=0.5), SCA(sparsity=0.5), TTQ(), TGA()]
)
def test_finalize_refuses_what_is_not_finite(method, value):
  tern = ParamTransform(method)
  params, state = tern.init(start())
  latent = params.latent["a"]["kernel"].at[0, :3].set(value)
  bad = {**params.latent, "a": {**params.latent["a"], "kernel": latent}}
  with pytest.raises(ValueError, match="a/kernel holds 3 NaN or infinite"):
    tern.finalize(params.replace(latent=bad), state)
  bias = {**params.latent, "a": {**params.latent["a"], "bias": X[0] * value}}
  with pytest.raises(ValueError, match="a/bias holds 8 NaN or infinite"):
    tern.finalize(params.replace(latent=bias), state)
  for path, scales in params.scales.items():
    for name, scale in scales.items():
      wrong = {**params.scales, path: {**scales, name: scale * value}}
      with pytest.raises(ValueError, match=f"{path}/{name} holds 1 NaN or"):
        tern.finalize(params.replace(scales=wrong), state)


def test_finalize_says_what_it_takes():
  params, _ = RECIPE.tern.init(start())
  with pytest.raises(TypeError, match=r"not the state .*finalize\(params, st"):
    RECIPE.tern.finalize(params)
  with pytest.raises(TypeError, match=r"found no states of tern_jax.wrap"):
    RECIPE.tern.finalize(ADAM.init(start()))
  both = [WRAPPED.init(start()) for _ in range(2)]
  with pytest.raises(TypeError, match=r"found 2 states of tern_jax.wrap"):
    RECIPE.tern.finalize(both)


def test_soft_weights_must_be_near_their_codes():
  tern = ParamTransform(SCA(alpha=0.1))
  params, state = tern.init(start())
  with pytest.raises(ValueError, match=r"a/kernel: .*% of the weights are far"):
    tern.finalize(params, state)
  settled = params.replace(
    latent=jax.tree.map(
      lambda x: jnp.where(jnp.abs(x) > 0.23, 20 * jnp.sign(x), 0), params.latent
    )
  )
  final = tern.finalize(settled, state)
  np.testing.assert_array_equal(
    final["a"]["kernel"].codes, jnp.sign(settled.latent["a"]["kernel"])
  )


@pytest.mark.sample(3)
@pytest.mark.parametrize(
  "method",
  [
    TGA(),
    long(SCA(sparsity=0.5)),
    TWN(sparsity=tern_jax.across_layers(0.5)),
    TWN(sparsity=jnp.array(0.5)),  # cannot be hashed
  ],
)
def test_eager_calls_compile_once(method):
  compiled = []

  def listen(name, *_, **__):
    if "backend_compile" in name:
      compiled.append(name)

  tree = {
    str(i): {"kernel": jax.random.normal(jax.random.key(i), (6, 4 + i % 2))}
    for i in range(4)
  }
  tern = ParamTransform(dataclasses.replace(method))
  params, state = tern.init(tree)
  made = []
  monitoring.register_event_duration_secs_listener(listen)
  try:
    for _ in range(12):
      compiled.clear()
      params, state = tern.after_step(params, state)
      tern(params, state)
      tern.finalize(params, state)
      made.append(len(compiled))
  finally:
    monitoring.unregister_event_duration_listener(listen)
  assert made[1:] == [0] * 11


def forgotten():
  """Each call of the training by hand, and what comes of a script without it.

  (call, function of tern, params, state; error): None for the right weights.
  """
  tree, chain = start(), optax.chain(RECIPE.wdr, ADAM)
  return {
    "init": (lambda tern, p, s: tern(tree, s), "needs the TernParams"),
    "tern(params, state)": (lambda tern, p, s: loss(p), "has no item 'a'"),
    "params of update": (
      lambda tern, p, s: chain.update(p, chain.init(p)),
      r"call tx\.update\(grads, opt_state, params\)",
    ),
    "after_step": (
      lambda tern, p, s: tern.finalize(*tern.init(tree)),
      "call tern.after_step after each update",
    ),
    "state of finalize": (
      lambda tern, p, s: tern.finalize(p),
      r"finalize\(params, state\)",
    ),
    "finalize, latents packed": (
      lambda tern, p, s: tern_jax.pack(p),
      r"tern\.finalize\(params, state\)",
    ),
    "finalize, weights packed": (
      lambda tern, p, s: tern_jax.pack(tern(p, s)),
      r"tern\.finalize\(params, state\)",
    ),
    "finalize, discretized": (
      lambda tern, p, s: tern_jax.pack(tern.discretize(p, s)),
      None,
    ),
    "pack": (
      lambda tern, p, s: tern_jax.save_packed("net", tern.finalize(p, s)),
      r"call tern_jax\.pack",
    ),
  }


@pytest.mark.parametrize("call", forgotten())
def test_a_forgotten_call_is_an_error_or_does_no_harm(call):
  tern, params, state = by_hand(40)
  fn, error = forgotten()[call]
  if error is None:
    right = tern_jax.pack(tern.finalize(params, state))
    jax.tree.map(np.testing.assert_array_equal, fn(tern, params, state), right)
  else:
    with pytest.raises((TypeError, ValueError), match=error):
      fn(tern, params, state)


def test_a_forgotten_after_step_of_a_number_does_no_harm():
  tern = ParamTransform(SCA(sparsity=0.75))
  params, state = tern.init(start())
  moved = params.replace(
    latent=jax.tree.map(lambda x: x + 0.01 * jnp.sin(50 * x), params.latent)
  )
  assert zeros(tern.finalize(moved, state)) == 72
