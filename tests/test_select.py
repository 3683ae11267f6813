import equinox as eqx
import haiku as hk
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from hypothesis import strategies as st

import tern_jax
from tern_jax.core.checks import check_weights
from tern_jax.core.paths import exact, matches, path_str
from tern_jax.core.select import selector
from tests import helpers
from tests.helpers import NnxNet

NNX_PATHS = ["layers/0/kernel", "layers/1/kernel"]


class _Block(nn.Module):
  @nn.compact
  def __call__(self, x):
    x = nn.Conv(4, (3, 3))(x)
    x = nn.BatchNorm(use_running_average=True)(x)
    return nn.Dense(3, name="head")(x.mean((1, 2)))


def linen():
  x = jnp.ones((1, 8, 8, 1))
  return jax.jit(_Block().init)(jax.random.key(0), x)["params"]


def linen_boxed():
  init = nn.with_partitioning(nn.initializers.ones, (None, "model"))
  layer = nn.Dense(3, kernel_init=init)
  return jax.jit(layer.init)(jax.random.key(0), jnp.ones((1, 2)))["params"]


def equinox():
  return eqx.nn.MLP(2, 3, 4, 1, key=jax.random.key(0))


def haiku():
  net = hk.transform(lambda x: hk.nets.MLP([4, 3])(x))
  return jax.jit(net.init)(jax.random.key(0), jnp.ones((1, 2)))


@pytest.mark.parametrize(
  ("make", "paths"),
  [
    (linen, ["Conv_0/kernel", "head/kernel"]),
    (linen_boxed, ["kernel"]),
    (lambda: nnx.state(NnxNet(nnx.Rngs(0))), NNX_PATHS),
    (equinox, ["layers/0/weight", "layers/1/weight"]),
    (haiku, ["mlp/~/linear_0/w", "mlp/~/linear_1/w"]),
  ],
)
def test_kernels_of_every_library(make, paths):
  tree = make()
  where = tern_jax.kernels()
  assert where.paths(tree) == paths
  mask = where(tree)
  assert jax.tree.structure(mask) == jax.tree.structure(tree)
  assert sum(jax.tree.leaves(mask)) == len(paths)


def test_patterns_match_whole_components_anywhere():
  assert matches("a/b", "x/a/b/c")
  assert matches("layer_*", "net/layer_12/kernel")
  assert not matches("a", "ab/kernel")
  assert not matches("a/c", "a/b/c")
  assert not matches("a/b/c/d", "a/b")


def test_include_and_exclude():
  tree = linen()
  assert tern_jax.kernels(include="Conv_*").paths(tree) == ["Conv_0/kernel"]
  assert tern_jax.kernels(exclude=["head"]).paths(tree) == ["Conv_0/kernel"]
  where = tern_jax.kernels(exclude=("head",))
  assert repr(where) == "kernels(exclude=('head',))"
  assert where == tern_jax.kernels(exclude="head")
  assert hash(where) == hash(tern_jax.kernels(exclude="head"))


def test_selecting_nothing_lists_the_leaves():
  tree = {"a": {"kernel": jnp.ones(3)}, "b": {"scale": jnp.ones((2, 2))}}
  with pytest.raises(ValueError, match=r"selects no leaf.*a/kernel, b/scale"):
    tern_jax.kernels()(tree)
  tx = tern_jax.wdr_transform(0.1, 1.0, mask=tern_jax.kernels())
  with pytest.raises(ValueError, match="selects no leaf"):
    tx.init(tree)
  with pytest.raises(ValueError, match="The leaves are: none"):
    tern_jax.kernels()({})


def test_a_pattern_without_a_match_is_an_error():
  with pytest.raises(ValueError, match=r"'Head' matches no leaf.*head/kernel"):
    tern_jax.kernels(exclude="Head")(linen())


def test_hidden_parts_of_a_tree_are_no_error():
  tree = {
    "a": {"kernel": jnp.ones((2, 2))},
    "head": {"kernel": optax.MaskedNode()},
  }
  assert tern_jax.kernels(exclude="head")(tree) == {
    "a": {"kernel": True},
    "head": {"kernel": optax.MaskedNode()},
  }


def test_scales_of_tern_params_are_never_selected():
  tern = tern_jax.ParamTransform(tern_jax.SCA(sparsity=0.5, channel_axis=-1))
  params, _ = tern.init({"a": {"kernel": jnp.ones((4, 4))}})
  mask = tern_jax.kernels()(params)
  assert mask.latent == {"a": {"kernel": True}}
  assert mask.scales == {"a/kernel": {"a": False}}


def test_size_of_the_largest_layer():
  tree = {
    "blocks": {"kernel": jnp.ones((12, 4, 8)), "bias": jnp.ones((12, 80))},
    "conv": {"kernel": jnp.ones((3, 3, 2, 5))},
    "head": {"kernel": jnp.ones((8, 7))},
  }
  where = tern_jax.kernels()
  assert where.largest(tree) == 12 * 32
  assert where.largest(tree, stacked=("blocks",)) == 90
  assert tern_jax.kernels(exclude="conv").largest(tree, ["blocks"]) == 56
  shapes = jax.eval_shape(lambda: tree)
  assert where.largest(shapes, stacked=("blocks", "conv")) == 56
  with pytest.raises(ValueError, match="'layers' matches no leaf"):
    where.largest(tree, stacked=("layers",))
  with pytest.raises(ValueError, match="selects no leaf"):
    where.largest({"bias": jnp.ones(3)})


@pytest.mark.parametrize("stacked", [(), ("blocks",)])
def test_the_largest_layer_is_the_one_ec2t_spares_nothing(stacked):
  rng = np.random.default_rng(0)
  tree = {
    "blocks": {"kernel": jnp.asarray(rng.normal(size=(3, 8, 8)), jnp.float32)},
    "head": {"kernel": jnp.asarray(rng.normal(size=(8, 4)), jnp.float32)},
  }
  where = tern_jax.kernels()

  def codes(largest):
    method = tern_jax.EC2T(gamma=0.5, largest=largest)
    tern = tern_jax.ParamTransform(method, where, stacked)
    moment = helpers.init(tern, tree)
    return helpers.discretize(tern, *moment)["blocks"]["kernel"].codes

  largest = where.largest(tree, stacked)
  np.testing.assert_array_equal(codes(largest), codes(None))
  with pytest.raises(ValueError, match=f"largest={largest - 1} and a layer of"):
    codes(largest - 1)


def test_check_weights():
  with pytest.raises(TypeError, match="a/w is int8, but only floating"):
    check_weights("a/w", jnp.ones((2, 2), jnp.int8))
  with pytest.raises(
    ValueError, match="a/w holds 2 NaN or infinite values of 4"
  ):
    check_weights("a/w", jnp.array([[1.0, jnp.nan], [jnp.inf, 0]]))
  jax.eval_shape(lambda w: check_weights("a/w", w), jnp.ones((2, 2)))


# What is a kernel, and what is not.


def ones(**shapes):
  return {k: jnp.ones(shape) for k, shape in shapes.items()}


class _Bare(eqx.Module):
  """Layers whose names say nothing, or something else."""

  first: list
  embed_out: eqx.nn.Linear
  table: eqx.nn.Embedding
  cell: eqx.nn.LSTMCell
  conv: eqx.nn.Conv2d
  wrapped: eqx.nn.WeightNorm

  def __init__(self, key):
    self.first = [eqx.nn.LayerNorm(4), eqx.nn.RMSNorm(4, use_bias=False)]
    self.embed_out = eqx.nn.Linear(4, 4, use_bias=False, key=key)
    self.table = eqx.nn.Embedding(5, 4, key=key)
    self.cell = eqx.nn.LSTMCell(3, 4, key=key)
    self.conv = eqx.nn.Conv2d(2, 3, 3, key=key)
    self.wrapped = eqx.nn.WeightNorm(eqx.nn.Linear(3, 4, key=key))


BARE = [
  "embed_out/weight",
  "cell/weight_ih",
  "cell/weight_hh",
  "conv/weight",
  "wrapped/layer/weight",
]


@pytest.mark.parametrize("stacked", [False, True])
def test_equinox_is_told_by_its_classes_and_biases(stacked):
  make = _Bare
  if stacked:
    keys = jax.random.split(jax.random.key(0), 2)
    net = eqx.filter_eval_shape(eqx.filter_vmap(make), keys)
  else:
    net = eqx.filter_eval_shape(make, jax.random.key(0))
  assert tern_jax.kernels().paths(net) == BARE
  grads = eqx.filter(net, lambda x: hasattr(x, "shape"))
  assert tern_jax.kernels().paths(grads) == BARE


class _Attention(nnx.Module):
  def __init__(self, rngs):
    self.embed = nnx.Embed(5, 8, rngs=rngs)
    self.norm = nnx.RMSNorm(8, rngs=rngs)
    self.attn = nnx.MultiHeadAttention(2, 8, rngs=rngs, decode=False)
    self.gru = nnx.GRUCell(8, 8, rngs=rngs)


def test_nnx_transformers_and_cells():
  state = nnx.eval_shape(lambda: nnx.state(_Attention(nnx.Rngs(0)), nnx.Param))
  assert tern_jax.kernels().paths(state) == [
    *(f"attn/{k}/kernel" for k in ("key", "out", "query", "value")),
    *(f"gru/dense_{k}/kernel" for k in "hi"),
  ]


def test_linen_cells_scans_and_embeddings():
  class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
      x = nn.RNN(nn.GRUCell(4))(nn.Embed(5, 4)(x))
      layers = nn.scan(
        lambda layer, x, _: (layer(x), None),
        variable_axes={"params": 0},
        split_rngs={"params": True},
        length=3,
      )
      return layers(nn.LayerNorm(name="norm"), x, None)[0]

  tree = jax.eval_shape(Net().init, jax.random.key(0), jnp.ones((1, 2), int))
  assert tern_jax.kernels().paths(tree["params"]) == [
    f"GRUCell_0/{k}/kernel" for k in ("hn", "hr", "hz", "in", "ir", "iz")
  ]


def test_haiku_cells_norms_and_embeddings():
  def net(x):
    x = hk.LayerNorm(-1, True, True)(hk.Embed(5, 4)(x))
    for cell in (hk.GRU(4), hk.LSTM(4)):
      x, _ = hk.dynamic_unroll(cell, x, cell.initial_state(6))
    return hk.Conv1D(4, 3)(x)

  init = hk.transform(net).init
  with jax.numpy_rank_promotion("allow"):
    tree = jax.eval_shape(init, jax.random.key(0), jnp.ones((1, 6), int))
  assert tern_jax.kernels().paths(tree) == [
    *("conv1_d/w", "gru/w_h", "gru/w_i", "lstm/linear/w")
  ]


KERAS = {
  "embedding/embeddings": (9, 4),
  "conv2d/kernel": (3, 3, 1, 4),
  "dense/bias": (4,),
  "dense/kernel": (4, 4),
  "layer_normalization/gamma": (4,),
  "lstm/lstm_cell/bias": (16,),
  "lstm/lstm_cell/kernel": (4, 16),
  "lstm/lstm_cell/recurrent_kernel": (4, 16),
  "multi_head_attention/attention_output/kernel": (2, 4, 8),
  "multi_head_attention/query/bias": (2, 4),
  "multi_head_attention/query/kernel": (8, 2, 4),
  "separable_conv2d/depthwise_kernel": (3, 3, 4, 1),
  "separable_conv2d/pointwise_kernel": (1, 1, 4, 8),
  "sequential/dense_1/kernel": (4, 2),
}
TORCH = {
  "bn1.bias": (2, 4),
  "bn1.weight": (2, 4),
  "encoder.0.attn.in_proj_weight": (12, 4),
  "encoder.0.attn.query.weight": (4, 4),
  "encoder.0.downsample.1.bias": (2, 4),
  "encoder.0.downsample.1.weight": (2, 4),
  "ln_f.weight": (2, 4),
  "model.embed_tokens.weight": (9, 4),
  "patch_embed.weight": (4, 3, 2, 2),
  "rnn.weight_hh_l1_reverse": (8, 4),
  "rnn.weight_ih_l0": (8, 4),
  "transformer.wpe.weight": (9, 4),
  "transformer.wte.weight": (9, 4),
}


@pytest.mark.parametrize(
  ("shapes", "floats"),
  [
    (
      KERAS,
      {
        "dense/bias",
        "embedding/embeddings",
        "layer_normalization/gamma",
        "lstm/lstm_cell/bias",
        "multi_head_attention/query/bias",
      },
    ),
    (
      TORCH,
      {
        *(f"bn1.{k}" for k in ("bias", "weight")),
        *(f"encoder.0.downsample.1.{k}" for k in ("bias", "weight")),
        "ln_f.weight",
        "model.embed_tokens.weight",
        "transformer.wpe.weight",
        "transformer.wte.weight",
      },
    ),
  ],
  ids=["keras", "torch"],
)
def test_flat_names(shapes, floats):
  tree = ones(**shapes)
  assert {*tern_jax.kernels().paths(tree)} == {*shapes} - floats
  # The same as nested dicts.
  nested = {}
  for path, x in tree.items():
    *modules, name = path.replace(".", "/").split("/")
    node = nested
    for key in modules:
      node = node.setdefault(key, {})
    node[name] = x
  assert {*tern_jax.kernels().paths(nested)} == {
    path.replace(".", "/") for path in {*shapes} - floats
  }


HAND = [
  (ones(wte=(5, 4), w=(4, 4), W=(4, 2)), ["W", "w"]),
  ({"ln1": ones(w=(2, 4), b=(2, 4)), "l": ones(w=(4, 4), b=(4,))}, ["l/w"]),
  ({"attn_norm": ones(w=(2, 4)), "l": ones(w=(4, 4))}, ["l/w"]),
  # A bias beside it counts more than a name.
  ({"embed_state": ones(kernel=(5, 4), bias=(4,))}, ["embed_state/kernel"]),
  ({"norm_proj": ones(w=(2, 4, 4), b=(2, 4))}, ["norm_proj/w"]),
  ({"tok_emb": ones(w=(5, 4)), "out": ones(w=(4, 5))}, ["out/w"]),
  ({"embed": ones(kernel=(5, 4)), "out": ones(w=(4, 5))}, ["out/w"]),
  # Under a norm, but not its own.
  ({"PreNorm_0": {"fn": {"to_q": ones(kernel=(4, 4))}}}, None),
  ({"norm1": {"linear": ones(w=(4, 8))}}, None),
  ({"layers": [ones(kernel=(4, 4)), ones(kernel=(4, 2))]}, None),
  ({"kernel": [jnp.ones((4, 4)), jnp.ones((4, 2))]}, None),
  # Pairs of a weight and a bias.
  (
    [(jnp.ones((4, 3)), jnp.ones(3)), (), (jnp.ones((3, 4)), jnp.ones(3))],
    ["0/0", "2/0"],
  ),
  (((jnp.ones((3, 3, 2, 5)), jnp.ones((1, 1, 1, 5))),), ["0/0"]),
  ({"a": (jnp.ones((2, 4, 3)), jnp.ones((2, 3)))}, ["a/0"]),
  ([(jnp.ones((2, 4)), jnp.ones((2, 4))), ones(w=(4, 4))], ["1/w"]),
]


@pytest.mark.parametrize(("tree", "paths"), HAND, ids=range(len(HAND)))
def test_trees_of_one_s_own(tree, paths):
  if paths is None:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    paths = [path_str(keys) for keys, _ in leaves]
  where = tern_jax.kernels()
  assert where.paths(tree) == paths
  assert sum(jax.tree.leaves(where(tree))) == len(paths)
  assert where.chosen(tree) == {*paths}


def test_variables_without_names_are_no_kernels():
  tree = [jnp.ones((9, 4)), jnp.ones((4, 4)), jnp.ones(4)]
  with pytest.raises(ValueError, match=r"function of \(path, leaf\).* 0, 1, 2"):
    tern_jax.kernels().paths(tree)
  assert tern_jax.kernels(include="1").paths(tree) == ["1"]
  assert selector([False, True, False]).paths(tree) == ["1"]


def test_gains_of_stacked_norms_stay_one():
  tree = {"norm": ones(weight=(3, 8), bias=(3, 8)), "lin": {"weight": None}}
  tree["lin"]["weight"] = helpers.weights((3, 8, 8))
  tern, wdr = tern_jax.recipe(0.8, 100, stacked=("norm", "lin"))
  params, state = tern.init(tree)
  wdr.init(params)
  weights = tern(params, state)
  np.testing.assert_array_equal(weights["norm"]["weight"], 1)
  assert float(jnp.mean(weights["lin"]["weight"] != 0)) > 0.9


# include and exclude.


INCLUDED = {
  "embed": ones(embedding=(9, 4)),
  "blocks": {
    "norm": ones(scale=(2, 4), bias=(2, 4)),
    "attn": ones(wq=(2, 4, 4), kernel=(2, 4, 4), bias=(2, 4)),
  },
  "d": ones(kernel=(4, 2), bias=(2,)),
}


@pytest.mark.parametrize(
  ("include", "paths"),
  [
    (["embed/embedding", "d"], ["d/kernel", "embed/embedding"]),
    ("embed", ["embed/embedding"]),
    ("embedding", ["embed/embedding"]),
    ("emb*", ["embed/embedding"]),
    ("blocks", ["blocks/attn/kernel", "blocks/attn/wq"]),
    ("b*", ["blocks/attn/kernel", "blocks/attn/wq"]),
    ("wq", ["blocks/attn/wq"]),
    ("norm/scale", ["blocks/norm/scale"]),
    ("/blocks/norm/bias", ["blocks/norm/bias"]),
    (
      "*",
      [
        *("blocks/attn/kernel", "blocks/attn/wq"),
        *("d/kernel", "embed/embedding"),
      ],
    ),
  ],
  ids=str,
)
def test_include_takes_what_it_names(include, paths):
  where = tern_jax.kernels(include=include)
  assert where.paths(INCLUDED) == paths
  assert where.chosen(INCLUDED) == {*paths}


@pytest.mark.parametrize(
  ("include", "match"),
  [
    ("d/bias", r"'.*d/bias' in include .* matches d/bias \(fewer .*: \[2\]\)"),
    ("norm", r"'norm' in include selects nothing: .*norm/scale \(norm: \[2, 4"),
    (["embed", "d/b*"], r"'d/b\*' in include selects nothing"),
    ("Embed", "'Embed' matches no leaf"),
  ],
)
def test_include_of_nothing_is_an_error(include, match):
  with pytest.raises(ValueError, match=match):
    tern_jax.kernels(include=include).paths(INCLUDED)


def test_include_of_what_exclude_hides_is_an_error():
  where = tern_jax.kernels(include=["d", "embed"], exclude="embedding")
  with pytest.raises(ValueError, match=r"'embed' .* \(excluded: \[9, 4\]\)"):
    where.paths(INCLUDED)


# Patterns.


def test_patterns_that_begin_at_the_top():
  assert matches("/a", "a/b")
  assert matches("/a/b", "a/b")
  assert not matches("/b", "a/b")
  assert not matches("/a/b/c", "a/b")
  assert matches("/*/b", "a/b/c")
  assert not matches("/", "a")
  same = {
    "Dense_0": ones(kernel=(4, 4)),
    "head": {"Dense_0": ones(kernel=(4, 4))},
  }
  both = ["Dense_0/kernel", "head/Dense_0/kernel"]
  for top in ("/Dense_0", "/Dense_0/kernel", "Dense_0/kernel"):
    assert tern_jax.kernels(exclude=top).paths(same) == both[1:]
    assert tern_jax.kernels(include=top).paths(same) == both[:1]
  assert tern_jax.kernels(include="Dense_0").paths(same) == both
  hidden = {**same, "Dense_0": {"kernel": optax.MaskedNode()}}
  where = tern_jax.kernels(exclude="Dense_0/kernel")
  assert where.chosen(hidden) == {both[1]}


@pytest.mark.parametrize("name", ["block[0]", "a*b", "a?", "[ab]", "]["])
def test_any_characters_in_a_name(name):
  tree = {name: ones(kernel=(4, 4)), "block0": ones(kernel=(4, 4))}
  tree |= {"axb": ones(kernel=(4, 4)), "a": ones(kernel=(4, 4))}
  path = f"{name}/kernel"
  assert matches(path, path)
  assert tern_jax.kernels(include=path).paths(tree) == [path]
  assert matches(exact(path), path)
  others = [k for k in ("block0", "axb", "a") if k != name]
  assert not any(matches(exact(path), f"{k}/kernel") for k in others)


PATHS = st.lists(st.text("ab*?[]!-.", min_size=1), min_size=1, max_size=3)


@hypothesis.given(PATHS, PATHS)
def test_an_exact_pattern_matches_its_own_path_only(one, other):
  path, second = "/".join(one), "/".join(other)
  assert matches(exact(path), path)
  assert matches(path, path)
  below = second == path or second.startswith(f"{path}/")
  assert matches(exact(path), second) == below
  assert not matches(exact(path), f"x/{path}")
  target = tern_jax.per_layer({exact(path): 0.5, "*": 0.25})
  assert target.of(path) == 0.5


def test_a_path_of_a_leaf_that_is_a_pattern_of_others_too():
  tree = {"a": ones(kernel=(4, 4)), "b": {"a": ones(kernel=(4, 4))}}
  shares = tern_jax.per_layer({"a/kernel": 0.5, "*": 0.25})
  tern = tern_jax.ParamTransform(tern_jax.TWN(sparsity=shares))
  with pytest.raises(
    ValueError, match="matches b/a/kernel as well: '/a/kernel"
  ):
    tern.init(tree)
  shares = tern_jax.per_layer({"/a/kernel": 0.5, "*": 0.25})
  assert [shares.of(k) for k in ("a/kernel", "b/a/kernel")] == [0.5, 0.25]


def test_stacked_is_a_pattern_or_several():
  tree = {"layers": {"kernel": helpers.weights((3, 4, 4))}}
  made = [
    tern_jax.ParamTransform(tern_jax.TWN(), stacked=stacked)
    for stacked in ("layers", ["layers"], ("layers",))
  ]
  assert len({*made}) == 1
  assert made[0].stacked == ("layers",)
  assert (
    made[0].discretize(*made[0].init(tree))["layers"]["kernel"].w_p.size == 3
  )
  assert tern_jax.recipe(0.5, 10, stacked="layers").tern.stacked == ("layers",)
  assert tern_jax.kernels().largest(tree, stacked="layers") == 16
  for wrong in (3, [3], None):
    with pytest.raises(TypeError, match=r"stacked=.*give a pattern"):
      tern_jax.ParamTransform(tern_jax.TWN(), stacked=wrong)
  with pytest.raises(TypeError, match="exclude=3: give a pattern of paths"):
    tern_jax.kernels(exclude=3)


# Functions and trees of bools.


TREE = {"a": ones(kernel=(4, 4), bias=(4,)), "b": ones(kernel=(4, 2), g=(2, 2))}


def wide(path, leaf):
  return path.startswith("a/") and leaf.ndim == 2


@pytest.mark.parametrize(
  ("where", "paths", "text"),
  [
    (None, ["a/kernel", "b/kernel"], "kernels()"),
    (tern_jax.kernels(exclude="b"), ["a/kernel"], "kernels(exclude=('b',))"),
    (wide, ["a/kernel"], "wide"),
    (
      {"a": {"kernel": True, "bias": False}, "b": {"kernel": False, "g": True}},
      ["a/kernel", "b/g"],
      "bools(a/kernel, b/g)",
    ),
    ({"a": True, "b": jnp.array(False)}, ["a/kernel"], "bools(a)"),
    (lambda tree: jax.tree.map(lambda x: x.ndim == 1, tree), ["a/bias"], None),
    (np.bool_(True), None, None),
  ],
)
def test_whatever_selects(where, paths, text):
  if paths is None:
    with pytest.raises(TypeError, match="selects nothing: give kernels"):
      selector(where)
    return
  chosen = selector(where)
  assert text is None or repr(chosen) == text
  assert chosen.paths(TREE) == paths
  mask = chosen(TREE)
  assert jax.tree.structure(mask) == jax.tree.structure(TREE)
  assert sum(jax.tree.leaves(mask)) == len(paths)
  tern = tern_jax.ParamTransform(tern_jax.AbsMean(), where)
  assert hash(tern) == hash(tern_jax.ParamTransform(tern_jax.AbsMean(), where))
  params, state = tern.init(TREE)
  assert sorted(state) == sorted(paths)
  assert chosen(params).latent == mask
  assert not any(jax.tree.leaves(chosen(params).scales))
  assert chosen.paths(params) == paths
  recipe = tern_jax.recipe(0.5, 10, where)
  assert recipe.tern.where == chosen
  assert recipe.wdr.init(params)
  assert chosen.largest(TREE) == max(
    leaf.size
    for keys, leaf in jax.tree_util.tree_leaves_with_path(TREE)
    if path_str(keys) in paths
  )


def test_bools_of_an_equinox_model_that_can_be_called():
  net = equinox()
  bools = jax.tree.map(lambda _: False, net)
  bools = eqx.tree_at(lambda n: n.layers[1].weight, bools, replace=True)
  assert selector(bools).paths(net) == ["layers/1/weight"]


def test_bools_of_a_part_that_is_hidden():
  bools = {"a": {"kernel": True, "bias": False}, "b": True}
  tree = {"a": optax.MaskedNode(), "b": TREE["b"]}
  assert selector(bools)(tree) == {
    "a": optax.MaskedNode(),
    "b": {"kernel": True, "g": False},
  }


def test_bools_of_an_nnx_state():
  state = nnx.state(NnxNet(nnx.Rngs(0)), nnx.Param)
  bools = jax.tree.map(lambda x: x.shape == (8, 2), state)
  tern = tern_jax.ParamTransform(tern_jax.TWN(), bools)
  _, of_method = tern.init(state)
  assert [*of_method] == ["layers/1/kernel"]


@pytest.mark.parametrize("where", [None, wide, {"a": True, "b": False}])
def test_tern_params_of_which_a_part_is_hidden(where):
  params, _ = tern_jax.ParamTransform(tern_jax.TTQ(), where).init(TREE)
  hidden = optax.MaskedNode()
  chosen = selector(where)
  for latent in (hidden, {**params.latent, "a": hidden}):
    mask = chosen(params.replace(latent=latent))
    assert jax.tree.structure(mask) == jax.tree.structure(
      params.replace(latent=latent)
    )
    assert not any(jax.tree.leaves(mask.latent)) or where is None
  assert not any(jax.tree.leaves(chosen(params).scales))


class _Net(eqx.Module):
  weight: jax.Array

  def __call__(self, x):
    return x


@pytest.mark.parametrize(
  ("where", "match"),
  [
    (tern_jax.kernels, r"where=kernels is a class: call it, kernels\(\)"),
    ("kernel", "where='kernel' selects nothing: give kernels"),
    (("a", "b"), r"where=\('a', 'b'\) selects nothing"),
    (True, "where=True selects nothing"),
    ({}, r"where=\{\} selects nothing"),
    ({"a": {"kernel": 1}}, "selects nothing"),
    (_Net(jnp.ones(2)), "where=_Net"),
    (lambda a, b, c: True, "takes 3 arguments"),
  ],
)
def test_what_selects_nothing(where, match):
  for take in (
    selector,
    lambda where: tern_jax.ParamTransform(tern_jax.TWN(), where),
    lambda where: tern_jax.recipe(0.5, 10, where),
    lambda where: tern_jax.fit_budget(TREE, bytes=500, where=where),
  ):
    with pytest.raises(TypeError, match=match):
      take(where)


def test_selections_that_do_not_fit_the_tree():
  with pytest.raises(ValueError, match=r"has True at 'c', but .* no such leaf"):
    selector({"a": False, "b": False, "c": True}).paths(TREE)
  with pytest.raises(ValueError, match="no bool for b/g"):
    selector({"a": True, "b": {"kernel": True}}).paths(TREE)
  with pytest.raises(ValueError, match=r"bools\(\) selects no leaf"):
    selector({"a": False, "b": False}).paths(TREE)
  with pytest.raises(ValueError, match="<lambda> selects no leaf"):
    selector(lambda path, leaf: False).paths(TREE)
  with pytest.raises(TypeError, match="<lambda> returned None for a/bias"):
    selector(lambda path, leaf: None).paths(TREE)
  with pytest.raises(TypeError, match="takes a tree, and this is one leaf"):
    selector(lambda tree: tree).selects("a", jnp.ones(2))


def test_one_leaf_alone():
  where = tern_jax.kernels(exclude="head")
  assert where.selects("a/kernel", jnp.ones((2, 2)))
  assert not where.selects("head/kernel", jnp.ones((2, 2)))
  assert not where.selects("norm/weight", jnp.ones((2, 2)))
  assert not where.selects("a/kernel", jax.nn.relu)


# What becomes of each matrix.


def test_what_stays_float_is_told_by_name():
  tree = {
    "embed": ones(embedding=(100, 16)),
    "body": ones(kernel=(16, 8), bias=(8,)),
    "norm": ones(weight=(2, 8), bias=(2, 8)),
    "head": ones(kernel=(8, 3)),
    "attn": ones(wq=(8, 8)),
  }
  assert tern_jax.kernels(exclude="head").describe(tree).splitlines() == [
    "kernels(exclude=('head',)) makes 1 leaf ternary, 128 of 1,856 weights:",
    "  body/kernel      [16, 8]",
    "5 leaves of two or more axes stay float:",
    "  attn/wq          [8, 8]     name unknown",
    "  embed/embedding  [100, 16]  embedding",
    "  head/kernel      [8, 3]     excluded",
    "  norm/bias        [2, 8]     bias",
    "  norm/weight      [2, 8]     norm",
  ]
  lines = tern_jax.kernels(include="head").describe(tree).splitlines()
  assert "  body/kernel      [16, 8]    not included" in lines
  lines = selector(lambda path, _: path == "head/kernel").describe(tree)
  assert "  body/kernel      [16, 8]    not chosen" in lines.splitlines()
  nothing = tern_jax.kernels(include="head").describe(
    {"a": ones(kernel=(2, 2))}
  )
  assert "makes 0 leaves ternary, 0 of 4 weights." in nothing
  assert nothing.endswith("a/kernel  [2, 2]  not included")
