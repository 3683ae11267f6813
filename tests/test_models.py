"""Sizes and shapes of the networks that the experiments name."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import tern_jax
from experiments import cifar10, imagenet
from experiments.common import build, cli, errors, models
from experiments.common.models import layers
from experiments.common.models.small import PatchConv
from experiments.common.runner import pretrained
from tern_jax.core.paths import path_str


def shapes(config, classes, size):
  """{path of a parameter: its shape}, without memory for it."""
  model = build.make_model(config, classes)
  init = functools.partial(model.init, train=False)
  image = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
  tree = jax.eval_shape(init, jax.random.key(0), image)["params"]
  return {
    path_str(path): leaf
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }


@pytest.mark.parametrize(
  ("model", "parameters", "ternary"),
  [
    ("resnet8", 75_290, 73_728),
    ("resnet20", 269_722, 267_264),
    # 128, 256 and 512 channels in pairs, and 4 * 4 * 512 inputs of 1024.
    ("vgg_small", 12_979_082, 12_959_744),
  ],
)
def test_networks_for_cifar10(model, parameters, ternary):
  config = dataclasses.replace(cifar10.DEFAULT, model=model)
  found = shapes(config, 10, 32)
  assert sum(leaf.size for leaf in found.values()) == parameters
  where = tern_jax.kernels(exclude=config.exclude)
  assert sum(found[path].size for path in where.paths(found)) == ternary


@pytest.mark.parametrize("size", [7, 8])
def test_a_product_with_patches_is_a_convolution(size):
  keys = jax.random.split(jax.random.key(0))
  images = jax.random.normal(keys[0], (2, size, size, 3))
  patch = PatchConv(5)
  variables = patch.init(keys[1], images)
  conv = nn.Conv(5, (3, 3), 2, padding=1, use_bias=False)
  np.testing.assert_allclose(
    patch.apply(variables, images), conv.apply(variables, images), atol=2e-6
  )


@pytest.mark.long
@pytest.mark.sample(2)
@pytest.mark.parametrize(
  ("batch", "size", "stride", "dtype"),
  [
    (1, 5, 1, "float32"),
    (37, 32, 2, "float32"),  # parts that are not all as large
    (20, 96, 1, "bfloat16"),  # an image exceeds the cache
  ],
)
def test_the_gradient_in_parts_is_that_of_a_convolution(
  batch, size, stride, dtype
):
  key = jax.random.split(jax.random.key(0), 3)
  x = jax.random.normal(key[0], (batch, size, size, 16), dtype)
  kernel = jax.random.normal(key[1], (3, 3, 16, 4), dtype)

  def convolved(convolve, x, kernel):
    numbers = ("NHWC", "HWIO", "NHWC")
    return convolve(
      x, kernel, (stride, stride), ((1, 1), (1, 1)), dimension_numbers=numbers
    )

  found, expected = (
    jax.vjp(functools.partial(convolved, convolve), x, kernel)
    for convolve in (layers.convolve, jax.lax.conv_general_dilated)
  )
  np.testing.assert_array_equal(found[0], expected[0])
  g = jax.random.normal(key[2], found[0].shape, dtype)
  tolerance = {"float32": 2e-6, "bfloat16": 2e-2}[dtype]
  for a, b in zip(found[1](g), expected[1](g), strict=True):
    assert a.dtype == dtype
    a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
    assert np.abs(a - b).max() <= tolerance * np.abs(b).max()


def test_vgg_small_layer_by_layer():
  config = dataclasses.replace(cifar10.DEFAULT, model="vgg_small")
  found = shapes(config, 10, 32)
  kernels = {k: v.shape for k, v in found.items() if k.endswith("kernel")}
  assert kernels == {
    "stem/kernel": (3, 3, 3, 128),
    "stage0_conv1/kernel": (3, 3, 128, 128),
    "stage1_conv0/kernel": (3, 3, 128, 256),
    "stage1_conv1/kernel": (3, 3, 256, 256),
    "stage2_conv0/kernel": (3, 3, 256, 512),
    "stage2_conv1/kernel": (3, 3, 512, 512),
    "dense/kernel": (8192, 1024),
    "head/kernel": (1024, 10),
  }


@pytest.mark.parametrize(
  ("model", "parameters", "shortcuts", "float"),
  [
    # 64 * 128 + 128 * 256 + 256 * 512; and norms, biases, stem and head.
    ("resnet18", 11_689_512, 172_032, 9_600 + 9_408 + 513_000),
    ("resnet34", 21_797_672, 172_032, 17_024 + 9_408 + 513_000),
    ("resnet50", 25_557_032, 2_768_896, 53_120 + 9_408 + 2_049_000),
  ],
)
def test_networks_for_imagenet(model, parameters, shortcuts, float):
  config = dataclasses.replace(imagenet.DEFAULT, model=model)
  found = shapes(config, 1000, 224)
  sizes = {path: leaf.size for path, leaf in found.items()}
  assert sum(sizes.values()) == parameters
  where = tern_jax.kernels(exclude=config.exclude)
  ternary = sum(sizes[path] for path in where.paths(found))
  assert ternary == parameters - shortcuts - float
  where = tern_jax.kernels(exclude=("stem", "head"))
  ternary = sum(sizes[path] for path in where.paths(found))
  assert ternary == parameters - float


# The residual nets for ImageNet, by another implementation in the layout and by
# the names of torchvision.

CLASSES, WIDTH = 5, 4
Net = dict[str, np.ndarray]


def drawn(blocks, bottleneck, rng) -> Net:
  """Draws the tensors of a net by torchvision's names."""
  net = {}

  def conv(name, outputs, inputs, size):
    shape = (outputs, inputs, size, size)
    net[f"{name}.weight"] = rng.normal(0, 0.3, shape)

  def norm(name, channels):
    net[f"{name}.weight"] = rng.uniform(0.5, 2, channels)
    net[f"{name}.bias"] = rng.normal(0, 0.5, channels)
    net[f"{name}.running_mean"] = rng.normal(0, 0.5, channels)
    net[f"{name}.running_var"] = rng.uniform(0.5, 2, channels)
    net[f"{name}.num_batches_tracked"] = np.array(7)

  conv("conv1", WIDTH, 3, 7)
  norm("bn1", WIDTH)
  inputs = WIDTH
  for layer, count in enumerate(blocks):
    width = WIDTH * 2**layer
    outputs = 4 * width if bottleneck else width
    for block in range(count):
      at = f"layer{layer + 1}.{block}"
      sizes = [(inputs, width, 3), (width, width, 3)]
      if bottleneck:
        sizes = [(inputs, width, 1), (width, width, 3), (width, outputs, 1)]
      for n, (i, o, size) in enumerate(sizes, 1):
        conv(f"{at}.conv{n}", o, i, size)
        norm(f"{at}.bn{n}", o)
      if inputs != outputs:
        conv(f"{at}.downsample.0", outputs, inputs, 1)
        norm(f"{at}.downsample.1", outputs)
      inputs = outputs
  net["fc.weight"] = rng.normal(0, 0.3, (CLASSES, inputs))
  net["fc.bias"] = rng.normal(0, 0.3, CLASSES)
  return net


def windows(x, size, stride, padding, fill):
  edges = ((0, 0), (0, 0), (padding, padding), (padding, padding))
  x = np.pad(x, edges, constant_values=fill)
  found = np.lib.stride_tricks.sliding_window_view(x, (size, size), (2, 3))
  return found[:, :, ::stride, ::stride]


def answer(net: Net, blocks, bottleneck, x):
  """Logits of images [B, C, H, W]."""

  def conv(name, x, stride):
    w = net[f"{name}.weight"]
    size = w.shape[-1]
    found = windows(x, size, stride, size // 2, 0)
    return np.einsum("bihwyx,oiyx->bohw", found, w)

  def norm(name, x):
    scale, bias, mean, var = (
      net[f"{name}.{part}"][:, None, None]
      for part in ("weight", "bias", "running_mean", "running_var")
    )
    return (x - mean) / np.sqrt(var + 1e-5) * scale + bias

  def relu(x):
    return np.maximum(x, 0)

  x = relu(norm("bn1", conv("conv1", x, 2)))
  x = windows(x, 3, 2, 1, -np.inf).max((-1, -2))
  for layer, count in enumerate(blocks):
    for block in range(count):
      at = f"layer{layer + 1}.{block}"
      stride = 2 if layer and not block else 1
      strides = (1, stride, 1) if bottleneck else (stride, 1)
      y = x
      for n, s in enumerate(strides, 1):
        y = relu(y) if n > 1 else y
        y = norm(f"{at}.bn{n}", conv(f"{at}.conv{n}", y, s))
      if f"{at}.downsample.0.weight" in net:
        x = norm(f"{at}.downsample.1", conv(f"{at}.downsample.0", x, stride))
      x = relu(x + y)
  return x.mean((2, 3)) @ net["fc.weight"].T + net["fc.bias"]


def variables(blocks, bottleneck, classes=CLASSES):
  model = models.ImageNetResNet(blocks, bottleneck, classes, width=WIDTH)
  init = functools.partial(model.init, train=False)
  image = jnp.zeros((1, 32, 32, 3))
  return model, jax.eval_shape(init, jax.random.key(0), image)


@pytest.mark.parametrize("bottleneck", [False, True])
@pytest.mark.parametrize("size", [32, 45])
def test_weights_of_torchvision_give_its_answers(bottleneck, size):
  blocks, rng = (1, 2), np.random.default_rng(0)
  net = drawn(blocks, bottleneck, rng)
  model, like = variables(blocks, bottleneck)
  converted = pretrained.from_torchvision(net, like)
  assert jax.tree.structure(converted) == jax.tree.structure(like)
  assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(converted))
  images = rng.normal(size=(2, 3, size, size))
  given = jnp.asarray(np.moveaxis(images, 1, -1), jnp.float32)
  logits = jax.jit(functools.partial(model.apply, train=False))(
    converted, given
  )
  expected = answer(net, blocks, bottleneck, images)
  np.testing.assert_allclose(logits, expected, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"fc.bias": None}, "fc.bias is missing, not \\(5,\\)"),
    (
      {"conv1.weight": np.zeros((4, 1, 7, 7))},
      r"conv1.weight is \(7, 7, 1, 4\), not \(7, 7, 3, 4\)",
    ),
    ({"layer9.0.conv1.weight": np.zeros(3)}, "layer9.0.conv1.weight has no"),
    (
      {f"layer1.0.bn1.{k}": None for k in ("weight", "bias")}
      | {f"layer1.0.bn2.{k}": None for k in ("weight", "bias")},
      "; .*; .*, and 1 more. Give those of the same --model",
    ),
  ],
)
def test_tensors_that_are_not_those_of_the_network(changes, message):
  net = drawn((1, 1), False, np.random.default_rng(0)) | changes
  net = {name: tensor for name, tensor in net.items() if tensor is not None}
  with pytest.raises(errors.UsageError, match=message):
    pretrained.from_torchvision(net, variables((1, 1), False)[1])


@pytest.mark.parametrize("layer", [True, False])
@pytest.mark.parametrize("model", [models.MLP, models.ConvNet])
def test_layer_norm_takes_the_place_of_batch_norm(model, layer):
  net = model((5, 4), 3, layer_norm=layer)
  variables = variable_shapes(net)
  norms = {k for k in variables["params"] if "Norm" in k}
  kind = "LayerNorm" if layer else "BatchNorm"
  assert norms == {f"{kind}_0", f"{kind}_1"}
  assert ("batch_stats" in variables) == (not layer)


def test_without_a_norm_convolutions_have_biases():
  params = variable_shapes(models.ConvNet((5, 4), 3, norm=False))["params"]
  assert {k: params[k].keys() for k in params} == {
    name: {"kernel", "bias"} for name in ("stem", "conv1", "head")
  }
  x = np.arange(32, dtype=np.float32).reshape(1, 4, 4, 2)
  kernel = np.zeros((3, 3, 2, 5), np.float32)
  kernel[1, 1, 0] = 1  # each output is the first channel, at every other pixel
  bias = np.arange(5, dtype=np.float32)
  conv = PatchConv(5, use_bias=True)
  found = jax.jit(conv.apply)({"params": {"kernel": kernel, "bias": bias}}, x)
  np.testing.assert_allclose(found, x[:, ::2, ::2, :1] + bias)


def variable_shapes(net):
  """The variables of a net, as shapes."""
  x = jax.ShapeDtypeStruct((2, 4, 4, 2), jnp.float32)
  key = jax.random.key(0)
  return jax.eval_shape(lambda x: net.init(key, x, train=False), x)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"norm": False}, "layer_norm is given with no norm: give one of them"),
    ({"model": "resnet8"}, "with model=resnet8, but only mlp, convnet take it"),
  ],
)
def test_a_layer_norm_that_nothing_takes(changes, message):
  with pytest.raises(errors.UsageError, match=message):
    cli.Config(layer_norm=True, **changes)


@pytest.mark.parametrize("norm", [True, False])
def test_the_mlp_has_a_norm_or_biases(norm):
  model = models.MLP((5,), 3, norm=norm)
  variables = model.init(jax.random.key(0), jnp.ones((1, 2, 2, 1)), train=False)
  hidden = variables["params"]["Dense_0"]
  assert ("bias" in hidden) == (not norm)
  assert ("batch_stats" in variables) == norm
  x = jnp.ones((2, 2, 2, 1))
  out = model.apply(variables, x, train=False)
  assert out.shape == (2, 3)
