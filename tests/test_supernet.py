import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tern_jax
from experiments.common.models import micronet
from tern_jax.core.paths import path_str

WHERE = tern_jax.kernels(exclude=("stem", "head", "shortcut"))
#: Two blocks a stage with 8, 16 and 32 channels.
TINY = (0.2, 0.5, 1)


def shapes(d, w, phi, classes=10):
  """Shapes of all variables, by path."""
  model = micronet.MicroNet(d, w, phi, classes)
  image = jnp.zeros((1, 32, 32, 3))
  init = functools.partial(model.init, train=False)
  tree = jax.eval_shape(init, jax.random.key(0), image)
  return {
    path_str(path): leaf.shape
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }


def parameters(*args):
  sizes = {k: int(np.prod(v)) for k, v in shapes(*args).items()}
  return sum(n for k, n in sizes.items() if k.startswith("params"))


@pytest.fixture(scope="module")
def tiny():
  model = micronet.MicroNet(*TINY, classes=3)
  rng = np.random.default_rng(0)
  images = jnp.asarray(rng.normal(size=(6, 8, 8, 3)), jnp.float32)
  init = functools.partial(model.init, train=False)

  def draw(path, leaf):
    # The initializers of Flax take longer to compile than all the tests.
    if "kernel" in path_str(path):
      fan_in = np.prod(leaf.shape[-4:-1])
      x = rng.normal(0, np.sqrt(2 / fan_in), leaf.shape)
    else:
      x = np.full(leaf.shape, path[-1].key in ("scale", "var"))
    return jnp.asarray(x, jnp.float32)

  shapes = jax.eval_shape(init, jax.random.key(0), images)
  return model, jax.tree_util.tree_map_with_path(draw, shapes), images


# The scaling.


@pytest.mark.parametrize(
  ("factors", "blocks", "widths"),
  [
    ((1.4, 1.2, 3.5), 23, (32, 64, 120)),  # The published micronet.
    ((1, 1, 1), 7, (16, 32, 64)),
    ((1.4, 1.2, 0), 7, (16, 32, 64)),
    # 19.2 and 38.4: to 16 would take a sixth away, to 40 is nearest.
    ((1.4, 1.2, 1), 10, (24, 40, 80)),
    # 12 and 20 are halfway.
    ((1, 0.75, 1), 7, (16, 24, 48)),
    ((0.01, 0.01, 1), 1, (8, 8, 8)),
  ],
)
def test_scale(factors, blocks, widths):
  assert micronet.scale(*factors) == (blocks, widths)


@given(st.floats(0.1, 2), st.floats(0.1, 2), st.floats(0, 4))
def test_scaled_channels_are_close_multiples_of_8(d, w, phi):
  blocks, widths = micronet.scale(d, w, phi)
  assert blocks - 1 < 7 * d**phi <= blocks
  for channels, width in zip((16, 32, 64), widths, strict=True):
    assert width % 8 == 0
    assert width >= max(8, 0.9 * channels * w**phi)
    assert width < max(8.1, channels * w**phi + 8)


def test_the_grid_doubles_the_operations():
  for d, w in micronet.GRID:
    assert d * w**2 == pytest.approx(2, abs=0.11)


@pytest.mark.parametrize("factors", [(0, 1, 1), (1, -1, 1), (1, 1, -0.5)])
def test_factors_must_be_positive(factors):
  with pytest.raises(ValueError, match=f"got d={factors[0]}, w={factors[1]}"):
    micronet.scale(*factors)


# The size of the net.


@pytest.mark.sample(3)
@pytest.mark.parametrize(
  ("d", "w", "c10", "c100"),
  [
    (1.0, 1.0, "0.66", "0.67"),
    (1.9, 1.0, "1.34", "1.35"),
    (1.7, 1.1, "1.38", "1.39"),
    (1.6, 1.1, "1.38", "1.39"),
    (1.4, 1.2, "1.52", "1.53"),
    (1.2, 1.3, "1.37", "1.38"),
    (1.0, 1.4, "1.31", "1.32"),
  ],
)
def test_the_grid_has_the_published_sizes(d, w, c10, c100):
  # Becking, master's thesis (2020), table 5.1, millions of parameters.
  assert f"{parameters(d, w, 1, 10) / 1e6:.2f}" == c10
  assert f"{parameters(d, w, 1, 100) / 1e6:.2f}" == c100


@pytest.mark.parametrize(
  ("phi", "c10", "c100"),
  [(1.5, 2.14, 2.15), (2, 3.26, 3.27), (3, 6.22, 6.23), (4, 11.71, 11.72)],
)
def test_other_published_sizes_are_those_of_another_grid_point(phi, c10, c100):
  # The same, table 5.2, which says d=1.4, w=1.2: up to 7 % fewer.
  assert parameters(1.2, 1.3, phi, 10) == pytest.approx(c10 * 1e6, rel=2e-3)
  assert parameters(1.2, 1.3, phi, 100) == pytest.approx(c100 * 1e6, rel=2e-3)


@pytest.mark.parametrize(
  ("classes", "trained", "folded"),
  # 8.06 M: Becking, write-up of the MicroNet challenge (2019), for C100.
  # 8.02 and 8.03 M: arXiv 2004.01077.
  [(10, 8_044_234, "8.02"), (100, 8_055_124, "8.03")],
)
def test_the_micronet_has_the_published_size(classes, trained, folded):
  found = shapes(1.4, 1.2, 3.5, classes)
  sizes = {k: int(np.prod(v)) for k, v in found.items() if "params/" in k}
  assert sum(sizes.values()) == trained
  norms = sum(n for k, n in sizes.items() if "norm" in k)
  # One 16-bit bias for each output channel of a convolution.
  biases = 32 + 2 * 23 * (32 + 64 + 120) + 64 + 120
  assert f"{(trained - norms + biases / 2) / 1e6:.2f}" == folded


def test_what_is_ternary_are_the_convolutions_of_the_blocks():
  found = shapes(1.4, 1.2, 3.5)
  kernels = {
    k: jax.ShapeDtypeStruct(v, np.float32)
    for k, v in found.items()
    if k.startswith("params") and k.endswith("kernel")
  }
  ternary = {path: found[path] for path in WHERE.paths(kernels)}
  assert ternary == {
    "params/stage0/blocks/conv1/kernel": (23, 3, 3, 32, 32),
    "params/stage0/blocks/conv2/kernel": (23, 3, 3, 32, 32),
    "params/stage1/first/conv1/kernel": (3, 3, 32, 64),
    "params/stage1/first/conv2/kernel": (3, 3, 64, 64),
    "params/stage1/blocks/conv1/kernel": (22, 3, 3, 64, 64),
    "params/stage1/blocks/conv2/kernel": (22, 3, 3, 64, 64),
    "params/stage2/first/conv1/kernel": (3, 3, 64, 120),
    "params/stage2/first/conv2/kernel": (3, 3, 120, 120),
    "params/stage2/blocks/conv1/kernel": (22, 3, 3, 120, 120),
    "params/stage2/blocks/conv2/kernel": (22, 3, 3, 120, 120),
  }
  assert sum(map(np.prod, ternary.values())) == 8_002_368
  assert sum(s[0] if len(s) == 5 else 1 for s in ternary.values()) == 138
  assert kernels.keys() - ternary.keys() == {
    "params/stem/kernel",
    "params/stage1/first/shortcut/kernel",
    "params/stage2/first/shortcut/kernel",
    "params/head/kernel",
  }


@pytest.mark.long
def test_layers_of_a_stack_are_ternarized_one_by_one(tiny):
  params = {"stage0": tiny[1]["params"]["stage0"]}
  tern = tern_jax.ParamTransform(
    tern_jax.EC2T(largest=9 * 32 * 32), stacked=micronet.STACKED
  )
  ternary = tern.discretize(*tern.init(params))
  stack = ternary["stage0"]["blocks"]["conv1"]["kernel"]
  assert stack.codes.shape == (2, 3, 3, 8, 8)
  assert stack.w_p.shape == (2, 1, 1, 1, 1)
  for n in range(2):
    alone = params["stage0"]["blocks"]["conv1"]["kernel"][n]
    expected = tern.method.discretize(alone, *tern.method.init(alone))
    np.testing.assert_array_equal(stack.codes[n], expected.codes)
    np.testing.assert_allclose(np.ravel(stack.w_n[n]), expected.w_n, rtol=1e-6)


# What it computes.


def norm(x, variables, name):
  """Batch norm by the running statistics, in NumPy."""
  x, p, s = jax.tree.map(
    np.asarray, (x, *(variables[k][name] for k in ("params", "batch_stats")))
  )
  x = (x - s["mean"]) / np.sqrt(s["var"] + 1e-5)
  return x * p["scale"] + p["bias"]


def conv(x, variables, name, stride=1):
  """Convolution with as much padding as keeps the size, in NumPy."""
  kernel = np.asarray(variables["params"][name]["kernel"], np.float64)
  size = kernel.shape[0]
  pad = ((0, 0), (size // 2,) * 2, (size // 2,) * 2, (0, 0))
  windows = np.lib.stride_tricks.sliding_window_view(
    np.pad(x, pad), (size, size), (1, 2)
  )
  return np.einsum("bhwiyx,yxio->bhwo", windows[:, ::stride, ::stride], kernel)


def block(x, variables, stride=1):
  y = conv(norm(x, variables, "norm1"), variables, "conv1", stride)
  y = np.maximum(norm(y, variables, "norm2"), 0)
  y = norm(conv(y, variables, "conv2"), variables, "norm3")
  if "shortcut" in variables["params"]:
    x = norm(conv(x, variables, "shortcut", stride), variables, "shortcut_norm")
  return x + y


def inside(variables, *names):
  """The variables of a submodule."""
  for name in names:
    variables = {k: v[name] for k, v in variables.items() if name in v}
  return variables


@pytest.mark.long
def test_the_forward_is_that_of_the_blocks_one_by_one(tiny):
  model, variables, images = tiny
  keys = iter(jax.random.split(jax.random.key(2), 1000))
  # Norms that do something.
  variables = jax.tree_util.tree_map_with_path(
    lambda path, x: (
      x
      if "kernel" in path_str(path)
      else jax.random.uniform(next(keys), x.shape, minval=0.5, maxval=1.5)
    ),
    variables,
  )
  x = conv(np.asarray(images, np.float64), variables, "stem")
  x = np.maximum(norm(x, variables, "stem_norm"), 0)
  for n in range(3):
    stage, stride = inside(variables, f"stage{n}"), 1 if n == 0 else 2
    stack = inside(stage, "blocks")
    if n:
      x = block(x, inside(stage, "first"), stride)
    for i in range(2 if n == 0 else 1):
      x = block(x, jax.tree.map(lambda leaf, i=i: leaf[i], stack))
  head = jax.tree.map(np.asarray, variables["params"]["head"])
  expected = np.maximum(x, 0).mean((1, 2)) @ head["kernel"] + head["bias"]
  assert x.shape == (6, 2, 2, 32)
  logits = model.apply(variables, images, train=False)
  assert logits.shape == (6, 3)
  np.testing.assert_allclose(logits, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.long
def test_all_weights_get_a_gradient_and_all_norms_new_statistics(tiny):
  model, variables, images = tiny

  def loss(params, state):
    logits, state = model.apply(
      {"params": params, **state},
      images,
      train=True,
      mutable=["batch_stats"],
      rngs={"dropout": jax.random.key(3)},
    )
    return jnp.mean(logits**2), state

  state = {"batch_stats": variables["batch_stats"]}
  grads, new = jax.jit(jax.grad(loss, has_aux=True))(variables["params"], state)
  for path, grad in jax.tree_util.tree_leaves_with_path(grads):
    assert np.isfinite(grad).all()
    if "kernel" in path_str(path):
      # In each layer of a stack.
      layers = grad if grad.ndim == 5 else grad[None]
      assert (np.abs(layers).max(tuple(range(1, layers.ndim))) > 0).all()
  for old, now in zip(
    jax.tree.leaves(state), jax.tree.leaves(new), strict=True
  ):
    assert old.shape == now.shape
    assert (np.abs(np.atleast_2d(old - now)).max(-1) > 0).all()


@pytest.mark.long
def test_dropout_acts_in_training_alone(tiny):
  model, variables, images = tiny

  @functools.partial(jax.jit, static_argnums=0)
  def logits(train, key=None):
    rngs = {} if key is None else {"dropout": jax.random.key(key)}
    collections = ["batch_stats"]
    return model.apply(variables, images, train, rngs=rngs, mutable=collections)

  def difference(one, other):
    return np.abs(logits(*one)[0] - logits(*other)[0]).max()

  assert difference((True, 0), (True, 1)) > 0.01
  assert difference((True, 0), (True, 0)) == 0
  assert difference((False, 0), (False, 1)) == 0
  assert difference((False, 0), (False,)) < 1e-5
  # Without a key batch statistics are still those of the batch.
  assert difference((True, 0), (True,)) > 0.01
  assert difference((False,), (True,)) > 0.01


@pytest.mark.long
def test_blocks_of_a_stack_drop_on_their_own():
  stage = micronet.ResidualStage(blocks=2, channels=1)
  x = jnp.zeros((50, 8, 8, 1))
  variables = stage.init(jax.random.key(0), x, train=False)
  block = variables["params"]["blocks"]
  # All ones reach the dropout, and what it leaves reaches the sum.
  block["conv1"]["kernel"] = jnp.zeros((2, 3, 3, 1, 1))
  block["norm2"]["bias"] = jnp.ones((2, 1))
  block["conv2"]["kernel"] = jnp.zeros((2, 3, 3, 1, 1)).at[:, 1, 1].set(1)
  y, _ = stage.apply(
    variables,
    x,
    train=True,
    mutable=["batch_stats"],
    rngs={"dropout": jax.random.key(0)},
  )
  _, counts = np.unique(np.round(y, 3), return_counts=True)
  expected = [0.2 * 0.2, 0.2 * 0.8, 0.2 * 0.8, 0.8 * 0.8]
  np.testing.assert_allclose(np.sort(counts) / y.size, expected, atol=0.03)


@pytest.mark.long
def test_statistics_are_shared_over_a_mapped_axis(tiny):
  _, variables, images = tiny
  model = micronet.MicroNet(*TINY, classes=3, axis_name="data")

  def update(images, key):
    return model.apply(
      variables,
      images,
      train=True,
      mutable=["batch_stats"],
      rngs={"dropout": key},
    )[1]

  keys = jax.random.split(jax.random.key(0), 2)
  parts = images.reshape(2, 3, 8, 8, 3)
  updated = jax.jit(jax.vmap(update, axis_name="data"))(parts, keys)
  for leaf in jax.tree.leaves(updated):
    np.testing.assert_allclose(leaf[0], leaf[1], rtol=1e-6)
