"""Any model runs on packed weights as it runs on dense ones."""

import dataclasses

import equinox as eqx
import haiku as hk
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import tern_jax
from experiments.common.models import LeNet5, ResNet, Transformer
from tern_jax import inference
from tests.helpers import long

KEY = jax.random.key(0)


def ternary(shape, *, stacked=0, dtype=jnp.float32, seed=0):
  """Ternary weights with two scales an output, w_p ≠ w_n, in NumPy."""
  rng = np.random.default_rng([seed, *shape])
  scales = (*shape[:stacked], *(1 for _ in shape[stacked:-1]), shape[-1])
  w_p, w_n = rng.uniform(0.05, 0.15, (2, *scales)).astype(dtype)
  codes = rng.integers(-1, 2, shape).astype(np.int8)
  return tern_jax.Ternary(codes, w_p, w_n)


def is_ternary(x):
  return isinstance(x, tern_jax.Ternary)


def dense(tree):
  """Unpacked weights of a tree with `Ternary` leaves."""

  def leaf(x):
    if not is_ternary(x):
      return x
    zero = np.zeros((), x.w_p.dtype)
    return np.where(x.codes > 0, x.w_p, np.where(x.codes < 0, -x.w_n, zero))

  return jax.tree.map(leaf, tree, is_leaf=is_ternary)


def pack(tree):
  """Packs in one program."""
  leaves, treedef = jax.tree.flatten(tree, is_leaf=is_ternary)
  weights = jax.jit(tern_jax.pack)([x for x in leaves if is_ternary(x)])
  rest = iter(weights)
  leaves = [next(rest) if is_ternary(x) else x for x in leaves]
  return jax.tree.unflatten(treedef, leaves)


def ternary_tree(shapes, stacked=("blocks",)):
  """Ternary matrices and random vectors, of the shapes that a model has."""

  def leaf(path, x):
    if not hasattr(x, "shape"):
      return x
    name = jax.tree_util.keystr(path)
    lead = sum(f"'{part}'" in name for part in stacked)
    if len(x.shape) > 1:
      return ternary(x.shape, stacked=lead, dtype=x.dtype, seed=len(name))
    rng = np.random.default_rng(len(name))
    return rng.uniform(0.5, 1.5, x.shape).astype(x.dtype)

  return jax.tree_util.tree_map_with_path(leaf, shapes)


def shapes_of(net, x):
  return jax.eval_shape(lambda x: net.init(KEY, x, train=False), x)


def assert_close(a, b, tolerance=1e-6):
  """Within a part of the largest magnitude."""
  assert jax.tree.structure(a) == jax.tree.structure(b)
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    assert x.shape == y.shape
    assert x.dtype == y.dtype
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    assert np.max(np.abs(x - y), initial=0) <= tolerance * np.max(
      np.abs(y), initial=0
    )


def check(fn, tree, *args, **kwargs):
  """Compares with dense weights; returns the one use of each of the weights."""
  uses = compare(fn, tree, *args, **kwargs).uses
  assert len({use.path for use in uses}) == len(uses)
  return {use.path: (use.how, use.count) for use in uses}


def compare(fn, tree, *args, tolerance=1e-6, tolerances=None, **kwargs):
  """Compares with dense weights; returns how the weights are used.

  Args:
    fn: function of the tree and of what follows.
    tree: with `Ternary` leaves.
    *args: of the function.
    tolerance: of what it returns.
    tolerances: of some of its outputs, by name.
    **kwargs: of the function.
  """
  packed, params = inference.apply_fn(fn), pack(tree)

  @eqx.filter_jit
  def both(params, weights):
    return packed(params, *args, **kwargs), fn(weights, *args, **kwargs)

  found, wanted = both(params, dense(tree))
  for name, x in (tolerances or {}).items():
    assert_close(found.pop(name), wanted.pop(name), x)
  assert_close(found, wanted, tolerance)
  return packed.explain(params, *args, **kwargs)


def normal(*shape, seed=1, dtype=jnp.float32):
  x = np.random.default_rng(seed).normal(size=shape)
  return jnp.asarray(x, jnp.float32).astype(dtype)


# Models, each of its framework.


def test_linen_mlp():
  net = nn.Sequential([nn.Dense(24), nn.relu, nn.Dense(7)])
  x = normal(3, 16)
  variables = ternary_tree(jax.eval_shape(net.init, KEY, x))
  assert check(net.apply, variables, x) == {
    "params/layers_0/kernel": ("packed product", 1),
    "params/layers_2/kernel": ("packed product", 1),
  }


@pytest.mark.long
def test_lenet5():
  net, x = LeNet5(classes=10), normal(2, 28, 28, 1)
  variables = ternary_tree(shapes_of(net, x))
  uses = check(net.apply, variables, x, train=False)
  assert uses == {
    "params/Conv_0/kernel": ("dense: conv_general_dilated", 1),
    "params/Conv_1/kernel": ("dense: conv_general_dilated", 1),
    "params/Dense_0/kernel": ("packed product", 1),
    "params/Dense_1/kernel": ("packed product", 1),
    "params/Dense_2/kernel": ("packed product", 1),
  }


def test_resnet_with_batch_norm():
  net, x = ResNet(blocks=1, classes=10), normal(2, 16, 16, 3)
  variables = ternary_tree(shapes_of(net, x))
  uses = check(net.apply, variables, x, train=False)
  head = uses.pop("params/head/kernel")
  assert head == ("packed product", 1)
  # Many pixels share a kernel of few channels.
  assert list(uses.values()) == 7 * [("dense: conv_general_dilated", 1)]


def test_transformer_of_stacked_blocks():
  net = Transformer(layers=2, width=32, context=8, classes=11)
  tokens = jnp.arange(10).reshape(2, 5)
  params = ternary_tree(shapes_of(net, tokens))
  uses = check(net.apply, params, tokens, train=False, tolerance=3e-6)
  blocks = "params/blocks"
  assert uses == {
    **{
      f"{blocks}/{name}/kernel": ("packed product", 1)
      for name in ("down", "key", "out", "query", "up", "value")
    },
    # Their scales are matrices as a stack, and the layers of it vectors.
    f"{blocks}/norm1/scale": ("dense: mul", 1),
    f"{blocks}/norm2/scale": ("dense: mul", 1),
    "params/head/kernel": ("packed product", 1),
    "params/positions/embedding": ("rows", 1),
    "params/tokens/embedding": ("rows", 1),
  }


def test_linen_attention():
  net = nn.MultiHeadDotProductAttention(num_heads=2, qkv_features=8)
  x = normal(2, 5, 12)
  variables = ternary_tree(jax.eval_shape(net.init, KEY, x))
  uses = check(net.apply, variables, x, tolerance=3e-6)
  for name in "query", "key", "value", "out":
    assert uses[f"params/{name}/kernel"] == ("packed product", 1)
  # The biases are matrices, too.
  assert uses["params/query/bias"] == ("dense: add", 1)


def test_nnx_mlp():
  class Net(nnx.Module):
    def __init__(self, rngs):
      self.hidden = nnx.Linear(16, 24, rngs=rngs)
      self.norm = nnx.BatchNorm(24, rngs=rngs)
      self.out = nnx.Linear(24, 7, rngs=rngs)

    def __call__(self, x):
      return self.out(nnx.relu(self.norm(self.hidden(x))))

  model = nnx.eval_shape(lambda: Net(nnx.Rngs(0)))
  model.eval()
  graphdef, params, rest = nnx.split(model, nnx.Param, ...)
  params = ternary_tree(params)
  rest = jax.tree.map(lambda x: np.full(x.shape, 0.5, x.dtype), rest)

  def fn(params, graphdef, x):
    return nnx.merge(graphdef, params, rest)(x)

  assert check(fn, params, graphdef, normal(3, 16)) == {
    "hidden/kernel": ("packed product", 1),
    "out/kernel": ("packed product", 1),
  }


def test_equinox_mlp_and_convolution_under_vmap():
  class Net(eqx.Module):
    conv: eqx.nn.Conv2d
    mlp: eqx.nn.MLP

    def __call__(self, x):
      return self.mlp(self.conv(x).reshape(-1))

  def init(key):
    return Net(
      eqx.nn.Conv2d(2, 64, 3, key=key), eqx.nn.MLP(256, 5, 16, 2, key=key)
    )

  net = ternary_tree(eqx.filter_eval_shape(init, KEY))
  uses = check(lambda net, x: jax.vmap(net)(x), net, normal(4, 2, 4, 4))
  assert uses == {
    "conv/weight": ("packed convolution", 1),
    # The bias [channels, 1, 1] is an array of rank 3.
    "conv/bias": ("dense: add", 1),
    **{f"mlp/layers/{i}/weight": ("packed product", 1) for i in range(3)},
  }


def test_haiku_mlp():
  net = hk.without_apply_rng(hk.transform(lambda x: hk.nets.MLP([24, 7])(x)))
  x = normal(3, 16)
  params = ternary_tree(jax.eval_shape(net.init, KEY, x))
  assert check(net.apply, params, x) == {
    "mlp/~/linear_0/w": ("packed product", 1),
    "mlp/~/linear_1/w": ("packed product", 1),
  }


# What weights go through on their way to a product.

W = ternary((24, 16), seed=3)
PRODUCT = {"w": ("packed product", 1)}


@jax.custom_jvp
def times(x, w):
  return x @ w


@times.defjvp
def _(primals, tangents):
  # Not the derivative: tells whether the rule is obeyed.
  return times(*primals), 3 * times(tangents[0], primals[1])


@jax.custom_vjp
def product(x, w):
  return x @ w


product.defvjp(
  lambda x, w: (x @ w, w), lambda w, g: (5 * (g @ w.T), jnp.zeros_like(w))
)


WAYS = {
  "left": lambda w, x: w.T @ x.T,
  "transposed": lambda w, x: x[:, :16] @ w.T,
  "vector": lambda w, x: x[0] @ w,
  "cast": lambda w, x: x.astype(jnp.bfloat16) @ w.astype(jnp.bfloat16),
  "wider": lambda w, x: jax.lax.dot_general(
    x.astype(jnp.bfloat16),
    w.astype(jnp.bfloat16),
    (((1,), (0,)), ((), ())),
    preferred_element_type=jnp.float32,
  ),
  "heads": lambda w, x: jnp.einsum("bi,iho->bho", x, w.reshape(24, 4, 4)),
  "merged": lambda w, x: (
    x.reshape(-1, 4, 6).swapaxes(1, 2).reshape(-1, 24)
    @ w.reshape(4, 6, 16).swapaxes(0, 1).reshape(24, 16)
  ),
  "unit axes": lambda w, x: jnp.einsum(
    "abi,bio->abo", x[:, None], w[None, None].squeeze(0)
  )[:, 0],
  "jit": lambda w, x: jax.jit(lambda w: w.T)(w).T.__rmatmul__(x),
  "checkpoint": lambda w, x: jax.checkpoint(lambda x: jnp.sin(x @ w))(x),
  "custom_jvp": lambda w, x: times(x, w),
  "custom_vjp": lambda w, x: product(x, w),
  "stop_gradient": lambda w, x: x @ jax.lax.stop_gradient(w),
  "barrier": lambda w, x: jnp.matmul(*jax.lax.optimization_barrier((x, w))),
  "cond": lambda w, x: jax.lax.cond(
    x[0, 0] > 9, lambda x: x[:, :16], lambda x: x @ w, x
  ),
  "while": lambda w, x: jax.lax.while_loop(
    lambda c: c[0] < 2,
    lambda c: (c[0] + 1, c[1], jnp.tile(c[2] @ c[1], 2)[:, :24]),
    (0, w, x),
  )[2],
  "fori": lambda w, x: jax.lax.fori_loop(
    0, x.shape[0], lambda i, c: c + x[i] @ w, jnp.zeros(16)
  ),
  "scan, a constant": lambda w, x: jax.lax.scan(lambda c, x: (c, x @ w), (), x)[
    1
  ],
  "scan, carried": lambda w, x: jax.lax.scan(lambda w, x: (w, x @ w), w, x)[1],
  "vmap": lambda w, x: jax.vmap(lambda x: x @ w)(x),
}


def check_all(functions, weights, x, tolerances=None):
  """Compares functions of weights and x in one program; returns the uses."""
  tree = dict.fromkeys(functions, weights)

  def fn(tree, x):
    return {name: functions[name](w, x) for name, w in tree.items()}

  return check(fn, tree, x, tolerances=tolerances or {})


def test_ways_to_the_product():
  uses = check_all(WAYS, W, normal(3, 24), {"cast": 2**-8})
  assert uses == dict.fromkeys(WAYS, ("packed product", 1))


# Stacks of layers.

STACKS = {
  "static index": lambda w, x: x @ w[1] + x @ w[-1],
  "dynamic index": lambda w, x: x @ w[jnp.argmax(x[0, :2])],
  "some layers": lambda w, x: jax.lax.scan(
    lambda c, w: (c + x @ w, None), jnp.zeros((3, 24)), w[1:]
  )[0],
  "experts": lambda w, x: jnp.einsum("bi,eio->ebo", x, w),
  "their own rows": lambda w, x: jnp.einsum("ei,eio->eo", x, w),
  "vmap": lambda w, x: jax.vmap(lambda w, x: w.T @ x)(w, x),
  "reshaped": lambda w, x: jax.lax.scan(
    lambda c, w: (c, jnp.einsum("bi,iho->bho", x, w)),
    (),
    w.reshape(3, 24, 4, 6),
  )[1],
  "in reverse": lambda w, x: jax.lax.scan(
    lambda c, w: (jnp.tanh(c @ w), c), x, w, reverse=True, unroll=2
  ),
}


@pytest.mark.parametrize(
  "stacked", [pytest.param(1, id="own"), long(0, id="shared")]
)
def test_layers_of_a_stack(stacked):
  # Without scales of their own, 3 layers come apart because of their number.
  stack = ternary((3, 24, 24), stacked=stacked)
  uses = check_all(STACKS, stack, normal(3, 24))
  wanted = dict.fromkeys(STACKS, ("packed product", 1))
  assert uses == {**wanted, "static index": ("packed product", 2)}


def test_a_stack_packed_along_its_layers_is_unpacked():
  def fn(w, x):
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]

  uses = check(fn, ternary((8, 4, 4)), normal(3, 4))
  assert uses == {"0": ("dense: scan", 1)}


# Convolutions.

NHWC = ("NHWC", "HWIO", "NHWC")
CONVOLUTIONS = {
  "1x1": ((1, 1, 4, 640), {}),
  "strides": ((3, 2, 4, 640), {"window_strides": (2, 3)}),
  "same": ((3, 3, 4, 640), {"padding": "SAME", "window_strides": (2, 1)}),
  "cropped": ((3, 3, 4, 640), {"padding": [(-1, 2), (0, -2)]}),
  "dilated": ((3, 3, 4, 640), {"rhs_dilation": (2, 1), "padding": "SAME"}),
  "transposed": (
    (3, 3, 4, 1100),
    {"lhs_dilation": (2, 1), "padding": [(2, 2), (1, 0)]},
  ),
  "whole": ((9, 8, 4, 640), {}),
  "out of reach": ((11, 3, 4, 640), {}),
}


def test_convolutions():
  def fn(kernels, x):
    return {
      name: jax.lax.conv_general_dilated(
        x, kernel, **settings_of(name), dimension_numbers=NHWC
      )
      for name, kernel in kernels.items()
    }

  def settings_of(name):
    defaults = {"window_strides": (1, 1), "padding": "VALID"}
    return {**defaults, **CONVOLUTIONS[name][1]}

  kernels = {name: ternary(shape) for name, (shape, _) in CONVOLUTIONS.items()}
  uses = check(fn, kernels, normal(2, 9, 8, 4), tolerance=2e-6)
  assert uses == dict.fromkeys(CONVOLUTIONS, ("packed convolution", 1))


@pytest.mark.parametrize(
  ("numbers", "image", "kernel"),
  [
    (("HWNC", "IHOW", "CWNH"), (4, 5, 2, 4), (4, 3, 160, 2)),
    long(("NCH", "OIH", "NCH"), (2, 4, 9), (80, 4, 3)),
    long(("NHWDC", "HWDIO", "NHWDC"), (1, 3, 3, 4, 3), (2, 3, 2, 3, 144)),
  ],
)
def test_axes_of_convolutions(numbers, image, kernel):
  def fn(kernel, x):
    strides = (1,) * (x.ndim - 2)
    return jax.lax.conv_general_dilated(
      x, kernel, strides, "SAME", dimension_numbers=numbers
    )

  uses = check(fn, ternary(kernel), normal(*image))
  assert uses == {"0": ("packed convolution", 1)}


def test_convolutions_in_groups_are_dense():
  net, x = nn.Conv(8, (3, 3), feature_group_count=4), normal(2, 6, 6, 8)
  tree = ternary_tree(jax.eval_shape(net.init, KEY, x))
  uses = check(net.apply, tree, x)
  assert uses == {"params/kernel": ("dense: conv_general_dilated", 1)}


def test_a_packed_image_is_unpacked():
  def fn(x, kernel):
    return jax.lax.conv(x, kernel, (1, 1), "SAME")

  uses = check(fn, ternary((2, 4, 8, 8)), normal(3, 4, 3, 3))
  assert uses == {"0": ("dense: conv_general_dilated", 1)}


@pytest.mark.long
def test_a_pixel_more_than_pays_is_unpacked():
  net = inference.apply_fn(
    lambda kernel, x: jax.lax.conv(x, kernel, (1, 1), "VALID")
  )

  def how(params, pixels):
    shape = (pixels, 8, 3, 3)
    (use,) = net.explain(params, jax.ShapeDtypeStruct(shape, "float32")).uses
    return use.how

  packed, dense = "packed convolution", "dense: conv_general_dilated"
  params = pack(ternary((16, 8, 3, 3)))
  assert (how(params, 4), how(params, 5)) == (packed, dense)
  x = normal(2, 8, 3, 3)
  prepared = net.prepare(params, x)
  assert prepared.inputs == (1, 2, 3)
  # The native code needs no copies of patches.
  more = dense if inference.cpu.isa() is None else packed
  assert (how(prepared, 32), how(prepared, 33)) == (packed, more)
  for images in x, normal(33, 8, 3, 3):
    wanted = jax.lax.conv(images, tern_jax.unpack(params), (1, 1), "VALID")
    assert_close(net(prepared, images), wanted, 2e-6)
  # Patches of one pixel need no copies.
  pointwise = net.prepare(pack(ternary((16, 8, 1, 1))), normal(99, 8, 3, 3))
  assert how(pointwise, 99) == packed


# Look-ups.

INDEX = np.array([[3, 0, 11], [5, 5, 2]])
LOOKUPS = {
  "take": lambda t: jnp.take(t, INDEX, axis=0),
  "item": lambda t: t[INDEX],
  "row": lambda t: t[jnp.asarray(INDEX)[0, 2]],
  "bytes": lambda t: t[jnp.asarray(INDEX, jnp.uint8)],
  "negative": lambda t: t[jnp.array([-1, -12])],
  "beyond": lambda t: jnp.take(
    t, jnp.array([40, -30, 1]), axis=0, mode="fill", fill_value=7.0
  ),
  "beyond, NaN": lambda t: jnp.isnan(
    jnp.take(t, jnp.array([40, 1]), axis=0, mode="fill")
  ),
  "clipped": lambda t: jnp.take(
    t, jnp.array([40, -30, 1]), axis=0, mode="clip"
  ),
  "in front": lambda t: jax.vmap(lambda i: t[i], out_axes=1)(INDEX[0]),
}


@pytest.mark.parametrize(
  "shape",
  [(12, 16), (13, 5), long((16, 5)), long((12, 8, 3)), long((12, 3, 2))],
  ids=str,
)
def test_lookups(shape):
  # In one program: what differs between shapes is where the bits are.
  tree = {name: ternary(shape) for name in LOOKUPS}

  def fn(tables):
    return {name: LOOKUPS[name](t) for name, t in tables.items()}

  wanted = dict.fromkeys(LOOKUPS, ("rows", 1))
  if shape == (12, 8, 3):
    # What comes off a stack are packed weights again.
    wanted["row"] = ("dense: an output", 1)
  assert check(fn, tree) == wanted


def test_tied_embeddings():
  def fn(table, tokens):
    return jnp.tanh(table[tokens] * 0.5) @ table.T

  table = ternary((16, 24))
  # A scale for each token.
  table = tern_jax.Ternary(
    table.codes,
    *np.random.default_rng(0).uniform(0.5, 1, (2, 16, 1)).astype("f"),
  )
  uses = compare(fn, table, jnp.arange(6).reshape(2, 3)).uses
  assert {use.how for use in uses} == {"rows", "packed product"}


# Whatever else uses weights.

OTHERS = {
  "mul": lambda w, x: x @ (w * 2.0),
  "reduce_sum": lambda w, x: x * jnp.sum(w),
  "concatenate": lambda w, x: x @ jnp.concatenate([w, w], 1),
  "convert_element_type": lambda w, x: (
    x @ (w > 0).astype(jnp.float32)
    + x @ w.astype(jnp.int32).astype(jnp.float32)
  ),
  "broadcast_in_dim": lambda w, x: jnp.broadcast_to(w, (3, 24, 24)) + x[0, 0],
  "reshape": lambda w, x: x[:, :18] @ w.reshape(18, 32),
  "dot_general": lambda w, x: jnp.einsum("bi,io->ibo", x, w),
  "dynamic_slice": lambda w, x: jax.lax.dynamic_slice(
    w, (jnp.argmax(x[0]), 3), (5, 7)
  ),
  "gather": lambda w, x: (
    w[jnp.array([3, 4]), jnp.array([5, 0])]
    + jnp.take(w, jnp.array([3, 4]), axis=1)[:2, 0]
  ),
  "sort": lambda w, x: jnp.sort(w, 0),
  "svd": lambda w, x: jnp.linalg.norm(w, 2),
  "a product of two packed weights": lambda w, x: w @ w.T,
  "carried by scan": lambda w, x: jax.lax.scan(
    lambda w, x: (w + 1, x @ w), w, x
  )[1],
  "carried by while": lambda w, x: jax.lax.fori_loop(
    0, jnp.argmax(x[0, :2]), lambda i, w: w.T, w
  ),
  "an output of cond": lambda w, x: jax.lax.cond(
    x[0, 0] > 0, lambda w: w, lambda w: w.T, w
  ),
  "an output": lambda w, x: {"w": w, "x": x, "none": None},
}


def test_whatever_else_uses_weights_gets_them_unpacked():
  tree = dict.fromkeys(OTHERS, ternary((24, 24)))

  def fn(tree, x):
    return {name: OTHERS[name](w, x) for name, w in tree.items()}

  found = compare(fn, tree, normal(3, 24)).dense
  for name in OTHERS:
    hows = {use.how for use in found if use.path == name}
    assert f"dense: {name}" in hows


# The function that is made.


def layer(params, x, scale=1.0, *, squash=False):
  y = x @ params["w"] * scale
  y += params["b"].reshape((1,) * (x.ndim - 1) + (16,))
  return jnp.tanh(y) if squash else y


TREE = {"w": ternary((24, 16)), "b": np.ones(16, np.float32)}


def test_arguments_by_name_and_static_ones():
  packed, params, x = inference.apply_fn(layer), pack(TREE), normal(3, 24)
  wanted = layer(dense(TREE), x, 2, squash=True)
  assert_close(packed(params, x, 2, squash=True), wanted)
  assert_close(packed(params=params, x=x, scale=2, squash=True), wanted)
  jitted = jax.jit(packed, static_argnames="squash")
  assert_close(jitted(params, x, jnp.float32(2), squash=True), wanted)
  assert packed.__name__ == "layer"
  assert packed.__wrapped__ is layer


def test_it_is_traced_once():
  calls = []

  def fn(params, x, static):
    calls.append(static)
    return x @ params["w"] if static == 1 else x

  packed, params, x = inference.apply_fn(fn), pack(TREE), normal(3, 24)
  for _ in range(3):
    packed(params, x, 1)
  assert calls == [1]
  # 1 == 1.0 == True, and 0.0 == -0.0.
  for static in (1.0, True, 0.0, -0.0, 1, "a", None):
    packed(params, x, static)
  assert [str(x) for x in calls[1:]] == [
    "1.0",
    "True",
    "0.0",
    "-0.0",
    "a",
    "None",
  ]
  packed(params, x[:2], 1)
  packed(params, np.asarray(x), 1)
  assert len(calls) == 8


def test_gradients_and_vmap():
  packed, params = inference.apply_fn(layer), pack(TREE)
  weights, x = dense(TREE), normal(3, 24)

  def loss(fn, w):
    def of(x, b):
      return jnp.sum(fn({"w": w, "b": b}, x, squash=True) ** 2)

    return jax.jit(jax.value_and_grad(of, (0, 1)))(x, jnp.asarray(TREE["b"]))

  assert_close(loss(packed, params["w"]), loss(layer, weights["w"]), 2e-6)
  over_rows = jax.jit(jax.vmap(packed, (None, 0)))
  assert_close(over_rows(params, x), layer(weights, x))
  # Networks of an ensemble, each with its own scales.
  many = {"w": ternary((2, 24, 16), stacked=1), "b": np.zeros((2, 16), "f")}
  both = jax.jit(jax.vmap(packed, (0, None)))(pack(many), x)
  assert_close(both, jax.vmap(layer, (0, None))(dense(many), x))


@pytest.mark.long
def test_gradients_of_scales():
  tree = {"w": W, "b": TREE["b"]}
  params, x = pack(tree), normal(3, 24)

  def grads(fn):
    def of(w_p, w_n):
      w = dataclasses.replace(params["w"], w_p=w_p, w_n=w_n)
      return jnp.sum(fn({**params, "w": w}, x) ** 2)

    return jax.jit(jax.grad(of, (0, 1)))(W.w_p, W.w_n)

  unpacked = grads(lambda params, x: layer(tern_jax.unpack(params), x))
  assert_close(grads(inference.apply_fn(layer)), unpacked, 2e-6)


@pytest.mark.parametrize("fn", [times, product], ids=["jvp", "vjp"])
def test_rules_of_derivatives_are_obeyed(fn):
  packed, x = inference.apply_fn(lambda w, x: jnp.sin(fn(x, w))), normal(3, 24)

  def grad(fn, w):
    return jax.jit(jax.grad(lambda x: jnp.sum(fn(w, x))))(x)

  wanted = grad(lambda w, x: jnp.sin(fn(x, w)), dense(W))
  assert_close(grad(packed, pack(W)), wanted, 2e-6)
  if fn is times:
    tangent = jax.jvp(lambda x: packed(pack(W), x), (x,), (x,))[1]
    wanted = jnp.cos(x @ dense(W)) * 3 * (x @ dense(W))
    assert_close(tangent, wanted, 2e-6)


def test_prepared_weights():
  def fn(params, x):
    y = x @ params["w"]
    heads = jnp.einsum("bi,iho->bho", x, params["heads"])
    z = jnp.einsum("bho,hoi->bi", heads, params["out"])
    # The other way round there are no sums of prepared weights.
    return y, z, (x[:, :16] * 2) @ params["w"].T

  tree = {
    "w": ternary((24, 16)),
    "heads": ternary((24, 2, 8)),
    "out": ternary((2, 8, 24)),
  }
  params = inference.prepare({"query": {"kernel": pack(tree["heads"])}})
  params = {
    "w": inference.prepare(pack(tree["w"])),
    "heads": params["query"]["kernel"],
    "out": pack(tree["out"]),
  }
  packed, x = inference.apply_fn(fn), normal(3, 24)
  assert_close(packed(params, x), jax.jit(fn)(dense(tree), x))
  uses = [(use.path, use.how) for use in packed.explain(params, x).uses]
  assert uses == [
    ("heads", "packed product"),
    ("out", "packed product"),
    ("w", "packed product"),
    ("w", "dense: dot_general"),
  ]


def test_lists_of_weights_are_prepared():
  # Whose second one has the name that x has among the arguments.
  def model(weights, x):
    return x @ weights[0] @ weights[1]

  tree = [ternary((8, 16)), ternary((16, 4))]
  x = np.ones((2, 8), np.float32)
  net = inference.apply_fn(model)
  made = net.prepare(pack(tree), x)
  assert [w.shape for w in made] == [(8, 16), (16, 4)]
  assert all(isinstance(w, inference.Prepared) for w in made)
  assert_close(net(made, x), model(dense(tree), x))


def test_a_stack_of_prepared_weights_with_int8_activations():
  tree = ternary((3, 32, 32), stacked=1)

  def fn(w, x):
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]

  params, x = inference.prepare(pack(tree), "int8"), normal(3, 32)

  def by_hand(w, x):
    return jax.lax.scan(
      lambda x, w: (jnp.tanh(inference.dot(x, w)), None), x, w
    )[0]

  packed = inference.apply_fn(fn)
  assert_close(packed(params, x), jax.jit(by_hand)(params, x))
  (use,) = packed.explain(params, x).uses
  assert (use.how, use.count) == ("packed product", 1)


def test_explain_prints_a_table():
  def fn(params, x):
    return (x @ params["w"] + x @ params["w"]) * jnp.sum(params["v"])

  params = pack({name: ternary((24, 24)) for name in "vwz"})
  shapes = jax.eval_shape(lambda: (params, normal(3, 24)))
  found = inference.apply_fn(fn).explain(*shapes)
  assert str(found).splitlines() == [
    "weights  shape  used as            times",
    "v        24x24  dense: reduce_sum  1",
    "w        24x24  packed product     2",
    "z        24x24  not used           0",
  ]
  assert found.dense == (inference.Use("v", (24, 24), "dense: reduce_sum", 1),)
  assert repr(found) == str(found)


def test_weights_of_several_arguments():
  packed = inference.apply_fn(lambda a, b, *, c: a["w"] @ b @ c)
  w, x = pack(ternary((24, 24))), normal(24, 24)
  found = packed.explain({"w": w}, x, c=w)
  assert [use.path for use in found.uses] == ["0/w", "c"]


def test_a_batch_of_any_size():
  kernel, x = pack(ternary((3, 3, 4, 8))), normal(2, 6, 6, 4)
  weights = {"kernel": kernel, "w": pack(ternary((8, 16)))}

  def fn(params, x):
    y = jax.lax.conv_general_dilated(
      x, params["kernel"], (1, 1), "SAME", dimension_numbers=NHWC
    )
    return y @ params["w"]

  (batch,) = jax.export.symbolic_shape("batch")
  shape = jax.ShapeDtypeStruct((batch, 6, 6, 4), x.dtype)
  net = inference.apply_fn(fn)
  exported = jax.export.export(jax.jit(lambda x: net(weights, x)))(shape)
  assert_close(exported.call(x), net(weights, x))
  uses = net.explain(weights, shape).uses
  assert [use.how for use in uses] == [
    "dense: conv_general_dilated",
    "packed product",
  ]


def test_sharding_in_types_is_left_to_jax():
  kind = jax.sharding.AxisType.Explicit
  with jax.set_mesh(jax.make_mesh((2,), ("rows",), axis_types=(kind,))):
    x = jax.device_put(normal(4, 24), jax.P("rows"))
    net = inference.apply_fn(lambda w, x: x @ w)
    y = net(pack(W), x)
    assert jax.typeof(y).sharding.spec[0] == "rows"
    (use,) = net.explain(pack(W), x).uses
  assert_close(np.asarray(y), np.asarray(x) @ dense(W))
  assert use.how == "dense: dot_general"


def test_float64_is_not_rounded():
  with jax.enable_x64(True):
    w = tern_jax.Ternary(W.codes, *(s.astype("f8") for s in (W.w_p, W.w_n)))
    x = np.random.default_rng(0).normal(size=(3, 24))
    assert check(lambda w, x: x @ w, w, x, tolerance=1e-15) == {
      "0": ("dense: dot_general", 1)
    }


def test_a_vector_is_unpacked():
  assert check(lambda w, x: x @ w, ternary((24,)), normal(3, 24)) == {
    "0": ("dense: dot_general", 1)
  }


def test_empty_weights():
  tree = ternary((24, 0))
  packed = inference.apply_fn(lambda w, x: x @ w)
  assert packed(pack(tree), normal(3, 24)).shape == (3, 0)
  (use,) = packed.explain(pack(tree), normal(3, 24)).uses
  assert use.how == "not used"


def test_what_cannot_be_given():
  packed, x = inference.apply_fn(layer), normal(3, 24)
  with pytest.raises(ValueError, match=r"no packed weights.*tern_jax\.pack"):
    packed(dense(TREE), x)
  latents = tern_jax.TernParams(latent=dense(TREE), scales={})
  with pytest.raises(
    TypeError, match=r"TernParams, which are latents.*finalize"
  ):
    packed(latents, x)
  with pytest.raises(TypeError, match=r"Ternary at 0/w: call tern_jax\.pack"):
    packed(TREE, x)
  with pytest.raises(TypeError, match=r"at squash is a bytearray"):
    packed(pack(TREE), x, squash=bytearray())
  with pytest.raises(TypeError, match=r"dot_general requires contracting"):
    packed(pack(TREE), normal(3, 23))
