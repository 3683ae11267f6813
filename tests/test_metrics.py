import hypothesis
import hypothesis.extra.numpy as hnp
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

import tern_jax
from tern_jax import metrics

SETTINGS = hypothesis.settings(
  max_examples=50, deadline=None, derandomize=True, database=None
)

# All that the score depends on, counted in the networks released with EC2T
# (arXiv 2004.01077): ResNet-20 for CIFAR-10, shortcuts without parameters. The
# widths of its 18 ternary 3x3 kernels; and for the three networks (zeros among
# all 269,722 parameters in %, "#P" of the paper in thousands, the same in full
# by the rules of the authors' code) the dead inputs, the dead outputs and the
# non-zeros of each kernel.
RESNET20_WIDTHS = [(16, 16)] * 6 + [(16, 32)] + [(32, 32)] * 5
RESNET20_WIDTHS += [(32, 64)] + [(64, 64)] * 5
RESNET20 = {
  (45.2, 13.4, 13441): [
    (2, 2, 628), (2, 2, 778), (1, 0, 960), (0, 0, 1114), (0, 2, 826),
    (2, 0, 989), (0, 0, 1621), (0, 1, 3376), (1, 2, 3978), (2, 0, 5881),
    (0, 1, 4884), (1, 0, 5317), (0, 2, 11882), (2, 1, 23749), (1, 3, 19908),
    (3, 0, 22041), (0, 1, 20153), (1, 0, 17387),
  ],
  (63.9, 11.8, 11810): [
    (3, 2, 555), (2, 2, 635), (2, 0, 857), (0, 0, 1014), (0, 2, 678),
    (2, 0, 886), (0, 0, 1254), (0, 1, 2336), (1, 2, 3071), (2, 0, 4463),
    (0, 1, 3884), (1, 0, 4430), (0, 2, 8728), (2, 1, 13827), (1, 3, 12909),
    (3, 0, 11984), (0, 1, 13186), (1, 3, 10245),
  ],
  (73.3, 11.0, 10990): [
    (3, 2, 398), (2, 2, 483), (2, 0, 680), (0, 0, 816), (1, 2, 492),
    (2, 1, 722), (0, 0, 873), (0, 1, 1694), (1, 2, 2306), (2, 0, 3518),
    (0, 1, 3051), (1, 0, 3473), (0, 2, 6805), (2, 1, 9986), (1, 3, 9558),
    (3, 0, 8588), (0, 1, 9608), (1, 4, 6662),
  ],
}  # fmt: skip


def tree(sizes=(1000, 24), sparsities=(0.9, 0.5)):
  rng = np.random.default_rng(0)
  one = jnp.ones(())
  leaves = {}
  for i, (size, s) in enumerate(zip(sizes, sparsities, strict=True)):
    codes = rng.choice([-1, 0, 1], size, p=[(1 - s) / 2, s, (1 - s) / 2])
    leaves[f"layer_{i}"] = tern_jax.Ternary(
      jnp.asarray(codes, jnp.int8), one, one
    )
  return leaves | {"bias": jnp.zeros(3)}


def entropy_of(codes):
  _, counts = np.unique(codes, return_counts=True)
  p = counts / counts.sum()
  return -np.sum(p * np.log2(p))


def test_sparsity_and_shares_count_every_weight_once():
  t = tree()
  codes = np.concatenate([t["layer_0"].codes, t["layer_1"].codes])
  assert float(metrics.sparsity(t)) == pytest.approx(np.mean(codes == 0))
  np.testing.assert_allclose(
    metrics.code_shares(t), [np.mean(codes == c) for c in (-1, 0, 1)], rtol=1e-6
  )
  packed = tern_jax.pack(t)
  assert float(metrics.sparsity(packed)) == float(metrics.sparsity(t))
  assert list(metrics.ternary_leaves(packed)) == ["layer_0", "layer_1"]


def test_entropy_is_the_mean_over_layers():
  t = tree()
  expected = (
    1000 * entropy_of(t["layer_0"].codes) + 24 * entropy_of(t["layer_1"].codes)
  ) / 1024
  assert float(metrics.entropy(t)) == pytest.approx(expected, rel=1e-5)
  one = jnp.ones(())
  same = tern_jax.Ternary(jnp.zeros(9, jnp.int8), one, one)
  assert float(metrics.entropy(same)) == 0.0


def test_bits_per_weight_of_packed_leaves():
  packed = tern_jax.pack(tree())
  # Two planes of 125 and 3 bytes, and two float32 scales each.
  assert metrics.bits_per_weight(packed) == 8 * (2 * 128 + 4 * 4) / 1024


def test_flip_rate():
  a, b = tree(), tree()
  assert float(metrics.flip_rate(a, b)) == 0.0
  flipped = a["layer_1"].codes.at[:6].set(-a["layer_1"].codes[:6] + 0)
  changed = int(jnp.sum(flipped != a["layer_1"].codes))
  one = jnp.ones(())
  b["layer_1"] = tern_jax.Ternary(flipped, one, one)
  assert changed > 0
  assert float(metrics.flip_rate(a, b)) == pytest.approx(changed / 1024)


def latents(dtype=jnp.float32):
  """Two layers of latents, and their codes by a threshold of .3."""
  rng = np.random.default_rng(1)
  theta, codes, one = {}, {}, jnp.ones(())
  for name, shape in (("a", (40, 30)), ("b", (30, 7))):
    w = rng.normal(size=shape).astype(np.float32)
    theta[name] = {"kernel": jnp.asarray(w, dtype), "bias": jnp.zeros(7)}
    w = np.asarray(theta[name]["kernel"], np.float32)
    hard = np.sign(w) * (np.abs(np.tanh(w)) > 0.3)
    leaf = tern_jax.Ternary(jnp.asarray(hard, jnp.int8), one, one)
    codes[name] = {"kernel": leaf, "bias": jnp.zeros(7)}
  return theta, codes


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_diagnostics_of_each_layer(dtype):
  theta, codes = latents(dtype)
  _, before = latents()
  flipped = before["b"]["kernel"].codes.at[:, 0].multiply(-1)
  one = jnp.ones(())
  before["b"]["kernel"] = tern_jax.Ternary(flipped, one, one)
  weights = jax.tree.map(jnp.tanh, theta)
  measured = jax.jit(metrics.diagnose)(weights, codes, before)
  assert list(measured) == ["a/kernel", "b/kernel"]
  for path, layer in measured.items():
    name = path[0]
    w = np.asarray(weights[name]["kernel"], np.float64)
    c = np.asarray(codes[name]["kernel"].codes)
    zeros = w[c == 0]
    expected = {
      "sparsity": np.mean(c == 0),
      "entropy": entropy_of(c),
      "barrier": np.abs(zeros).max(),
      "converged": np.mean(np.abs(w - c) <= 0.05),
      "zeros_rms": np.sqrt(np.mean(zeros**2)),
      "flip_rate": np.mean(c != np.asarray(before[name]["kernel"].codes)),
    }
    assert layer.keys() == expected.keys()
    assert {value.dtype.name for value in layer.values()} == {"float32"}
    for key, value in layer.items():
      assert float(value) == pytest.approx(expected[key], rel=1e-5), key
    assert layer["barrier"] <= 0.31
  if dtype == jnp.float32:
    assert float(measured["a/kernel"]["flip_rate"]) == 0.0


def test_diagnostics_at_their_limits():
  one = jnp.ones(())
  zeros = tern_jax.Ternary(jnp.zeros((3, 2), jnp.int8), one, one)
  ones = tern_jax.Ternary(jnp.ones((3, 2), jnp.int8), one, one)
  layer = metrics.diagnose({"w": jnp.zeros((3, 2))}, {"w": zeros}, {"w": ones})
  layer = {name: float(value) for name, value in layer["w"].items()}
  assert layer == {
    "sparsity": 1.0,
    "entropy": 0.0,
    "barrier": 0.0,
    "converged": 1.0,
    "zeros_rms": 0.0,
    "flip_rate": 1.0,
  }
  # Without zeros there is nothing below the barrier.
  layer = metrics.diagnose({"w": jnp.full((3, 2), 0.9)}, {"w": ones})["w"]
  assert "flip_rate" not in layer
  for name in ("sparsity", "barrier", "converged", "zeros_rms"):
    assert float(layer[name]) == 0.0
  # Shares, also of what lies as far as is allowed.
  half = jnp.full((3, 2), 0.5)
  assert float(metrics.converged(half, ones, within=0.5)) == 1.0


def test_bad_input():
  theta, codes = latents()
  with pytest.raises(ValueError, match="No continuous weights for b/kernel"):
    metrics.diagnose({"a": theta["a"]}, codes)
  with pytest.raises(ValueError, match="b/kernel are in one only"):
    metrics.diagnose(theta, codes, {"a": codes["a"]})
  with pytest.raises(ValueError, match="holds no ternary leaf"):
    metrics.sparsity({"w": jnp.ones(3)})
  with pytest.raises(ValueError, match="holds no packed leaf"):
    metrics.bits_per_weight(tree())
  other = tree()
  del other["layer_1"]
  with pytest.raises(ValueError, match="layer_1 are in one only"):
    metrics.flip_rate(tree(), other)


def ternary(codes):
  one = jnp.ones(())
  return tern_jax.Ternary(jnp.asarray(codes, jnp.int8), one, one)


def live(w, channel_axis=-1):
  """Drops all-zero outputs and inputs, one by one."""
  if w.ndim < 2:
    return w.reshape(-1, 1)
  w = np.moveaxis(w, channel_axis, -1)
  if channel_axis == 0:  # inputs are axis 1 there, and axis 0 after the move
    w = np.moveaxis(w, 0, -2)
  for axis in (-1, -2):
    dead = [
      i for i in range(w.shape[axis]) if not np.take(w, i, axis=axis).any()
    ]
    w = np.delete(w, dead, axis)
  return w


def formats(codes, channel_axis=-1, scales=2):
  """Bits in each of the five formats."""
  w = live(np.asarray(codes), channel_axis)
  n, nz, m = w.size, np.count_nonzero(w), w.shape[-1]
  return {
    "values": 16 * nz + n,
    "csr": 17 * nz + 16 * (m + 1) + 16 * scales,
    "cer": 16 * nz + 32 * (m + 1) + 16 * scales,
    "two masks": 2 * n + 16 * scales,
    "signs": n + nz + 16 * scales,
  }


def one_input_each(inputs, outputs):
  codes = np.zeros((inputs, outputs), np.int8)
  codes[np.arange(inputs), np.arange(inputs) % outputs] = -1
  return codes


@pytest.mark.long
@pytest.mark.parametrize(
  ("codes", "cheapest", "bits"),
  [
    (np.array([[0, 0], [0, -1]]), "values", 17),
    (one_input_each(64, 64), "csr", 17 * 64 + 16 * 65 + 32),
    (one_input_each(2000, 64), "cer", 16 * 2000 + 32 * 65 + 32),
    (np.array([[0, 1, -1, 1], [1, 0, 0, 0]]), "signs", 8 + 4 + 32),
  ],
)
def test_each_format_is_the_cheapest_somewhere(codes, cheapest, bits):
  expected = formats(codes)
  assert min(expected, key=expected.get) == cheapest
  assert expected[cheapest] == bits
  assert metrics.storage_bits(ternary(codes)) == bits
  assert metrics.storage_bits(tern_jax.pack(ternary(codes))) == bits


@SETTINGS
@hypothesis.given(
  codes=hnp.arrays(
    np.int8,
    hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=9),
    elements=st.sampled_from([0, 0, 0, 0, -1, 1]),
  ),
  channel_axis=st.sampled_from([-1, 0]),
)
def test_storage_is_the_least_of_five_formats(codes, channel_axis):
  def bits(codes):
    return metrics.storage_bits(ternary(codes), channel_axis)

  assert bits(codes) == min(formats(codes, channel_axis).values())
  assert bits(codes) <= codes.size + np.count_nonzero(codes) + 32
  assert bits(codes) == bits(-codes)
  if codes.ndim >= 2:
    inputs = 1 if channel_axis == 0 else -2
    wider = np.insert(np.insert(codes, 0, 0, channel_axis), 0, 0, inputs)
    assert bits(codes) == bits(wider)


@pytest.mark.parametrize("codes", [np.ones((9, 40)), one_input_each(64, 64)])
def test_each_magnitude_takes_16_bits(codes):
  scale = jnp.ones((1, codes.shape[-1]), jnp.bfloat16)
  t = tern_jax.Ternary(jnp.asarray(codes, jnp.int8), scale, scale)
  expected = formats(codes, scales=2 * codes.shape[-1])
  assert metrics.storage_bits(t) == min(expected.values())
  assert metrics.storage_bits(t) > metrics.storage_bits(ternary(codes))


def test_layouts_of_the_output_channels():
  rng = np.random.default_rng(0)
  codes = rng.choice([-1, 0, 1], (3, 3, 8, 16), p=[0.1, 0.8, 0.1])
  codes[..., :5] = 0
  codes[:, :, 2] = 0
  bits = 9 * 7 * 11 + np.count_nonzero(codes) + 32
  assert metrics.storage_bits(ternary(codes)) == bits
  assert metrics.storage_bits(ternary(codes), channel_axis=3) == bits
  equinox = ternary(codes.transpose(3, 2, 0, 1))
  assert metrics.storage_bits(equinox, channel_axis=0) == bits
  assert metrics.storage_score({"weight": equinox}, 0) == -(-bits // 32)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_floating_arrays_take_16_bits_a_number(dtype):
  w = np.ones((4, 40), np.float32)
  assert metrics.storage_bits(jnp.asarray(w, dtype)) == 16 * 160
  w[0, 0] = 0  # a bitmask for one zero would cost more
  assert metrics.storage_bits(jnp.asarray(w, dtype)) == 16 * 160
  w[:, 1:] *= np.arange(4)[:, None] == np.arange(39) % 4
  w[:, 30:] = 0
  nz = np.count_nonzero(w)
  assert metrics.storage_bits(jnp.asarray(w, dtype)) == 4 * 30 + 16 * nz
  assert metrics.storage_bits(jnp.asarray(w[0], dtype)) == 16 * 40


def test_score_of_a_tree_rounds_each_array_up():
  kernel = ternary([[1, -1], [0, 1]])  # 4 + 3 + 32 bits
  assert metrics.storage_score(kernel) == 2
  assert metrics.storage_score({"a": kernel, "b": [kernel]}) == 4
  tree = {"a": {"kernel": kernel, "bias": jnp.ones(5)}, "step": jnp.array(7)}
  assert metrics.storage_score(tree) == 2 + 3
  assert metrics.storage_score(tern_jax.pack(tree)) == 2 + 3
  assert metrics.storage_score({"name": "mlp", "w": np.ones((8, 8))}) == 32


@pytest.mark.parametrize(
  "names", [("scale", "bias"), ("scale", "offset"), ("weight", "bias")]
)
def test_a_normalization_costs_16_bits_a_channel(names):
  norm = {name: jnp.ones(64) for name in names}
  assert metrics.storage_score({"norm": norm}) == 32
  shift = {names[1]: jnp.zeros(64)}  # not zero any more once it is folded
  assert metrics.storage_score({"norm": norm | shift}) == 32
  assert metrics.storage_score(norm) == 32
  statistics = {"mean": jnp.ones(64), "var": jnp.ones(64)}
  assert metrics.storage_score({"norm": norm | statistics}) == 32
  # Without a shift, or beside one of another shape, nothing folds.
  assert metrics.storage_score({"norm": {"scale": jnp.ones(64)}}) == 32
  norm["scale"] = jnp.ones(32)
  assert metrics.storage_score({"norm": norm}) == 32 + 16


def resnet20(kernels):
  """ResNet-20 for CIFAR-10: the stem and the last layer stay floating."""

  def norm(channels):
    return {"scale": jnp.ones(channels), "bias": jnp.ones(channels)}

  blocks = [
    {"conv": {"kernel": ternary(k)}, "norm": norm(k.shape[-1])} for k in kernels
  ]
  return {
    "stem": {"conv": {"kernel": jnp.ones((3, 3, 3, 16))}, "norm": norm(16)},
    "blocks": blocks,
    "head": {"kernel": jnp.ones((64, 10)), "bias": jnp.ones(10)},
  }


def scattered(rng, widths, dead_in, dead_out, nz):
  """Random codes of so many non-zeros, in all but so many dead channels."""
  codes = np.zeros((9, *widths), np.int8)
  ins = rng.permutation(widths[0])[dead_in:]
  outs = rng.permutation(widths[1])[dead_out:]
  flat = np.zeros(9 * ins.size * outs.size, np.int8)
  flat[rng.permutation(flat.size)[:nz]] = rng.choice([-1, 1], nz)
  codes[:, ins[:, None], outs] = flat.reshape(9, ins.size, outs.size)
  return codes.reshape(3, 3, *widths)


@pytest.mark.parametrize(
  ("published", "expected"),
  list(zip(RESNET20, (13447, 11808, 10995), strict=True)),
)
def test_score_of_ec2t_resnet20_is_the_published_one(published, expected):
  percent, thousands, authors = published
  rng = np.random.default_rng(0)
  tree = resnet20(
    scattered(rng, widths, *counts)
    for widths, counts in zip(RESNET20_WIDTHS, RESNET20[published], strict=True)
  )
  # In half precision some zeros are added: norms of dead channels.
  zeros = 267_264 * float(metrics.sparsity(tree))
  assert 100 * zeros / 269_722 == pytest.approx(percent, abs=0.06)
  score = metrics.storage_score(tree)
  assert score == expected
  assert round(score / 1000, 1) == thousands == round(authors / 1000, 1)
  # There an input is dead if the layer before does not compute it, and the
  # biases of dead outputs are not counted.
  assert abs(score - authors) <= 6


@pytest.mark.parametrize(
  ("published", "expected"),
  list(zip(RESNET20, (13808, 12233, 11432), strict=True)),
)
def test_zeros_spread_evenly_score_a_few_percent_more(published, expected):
  """Published sparsity alone: no dead channels, every layer equally sparse."""
  rng = np.random.default_rng(0)
  zeros = published[0] / 100 * 269_722 / 267_264
  score = metrics.storage_score(
    resnet20(
      scattered(rng, (i, o), 0, 0, round(9 * i * o * (1 - zeros)))
      for i, o in RESNET20_WIDTHS
    )
  )
  # Bitmasks and signs; magnitudes; stem, norms, last layer.
  exact = 267_264 * (2 - zeros) / 32 + 18 + (216 + 8 + 336 + 325)
  assert exact <= score <= exact + 18
  assert score == expected


def test_storage_of_bad_input():
  with pytest.raises(ValueError, match="no ternary leaf and no floating array"):
    metrics.storage_score({"step": jnp.array(3), "name": "mlp"})
  with pytest.raises(TypeError, match="floating array, got int32: score"):
    metrics.storage_bits(jnp.arange(3))
  with pytest.raises(TypeError, match="got dict"):
    metrics.storage_bits({"w": jnp.ones(3)})
  with pytest.raises(ValueError, match="channel_axis=2 is no axis"):
    metrics.storage_score(ternary([[1, 0]]), channel_axis=2)
  with pytest.raises(jax.errors.TracerArrayConversionError):
    jax.jit(metrics.storage_score)(ternary([[1, 0]]))
