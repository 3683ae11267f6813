"""Language models: windows of text, the transformer, and whole runs."""

import dataclasses
import hashlib
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tern_jax
from experiments import charlm
from experiments.common import build, data, errors, evaluate, log
from experiments.common.data import text
from experiments.common.runner import record, run, stages
from tern_jax.core.paths import path_str

TOKENS = jax.random.randint(jax.random.key(0), (2, text.CONTEXT), 0, 256)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
  """A file of 20,000 bytes, half of them predictable."""
  letters = np.random.default_rng(0).integers(97, 123, 10_000, np.uint8)
  path = tmp_path_factory.mktemp("text") / "letters.txt"
  path.write_bytes(np.repeat(letters, 2).tobytes())
  return path


@pytest.fixture(scope="module")
def config(path):
  return dataclasses.replace(
    charlm.DEFAULT,
    data=str(path),
    layers=2,
    width=32,
    epochs=4,
    batch_size=25,
    parallel="jit",
    log_every=10,
    workdir=str(path.parent / "sca"),
  )


@pytest.fixture(scope="module")
def net(config):
  model = build.make_model(config, text.VOCABULARY)
  variables = jax.jit(model.init, static_argnames="train")(
    jax.random.key(1), TOKENS, train=False
  )
  return model, variables["params"]


def test_each_byte_is_the_label_of_the_one_before_it_in_its_own_part():
  whole = bytes(range(256)) * 20
  found = text.splits(whole)
  ends = {"train": (0, 4096), "validation": (4096, 4608), "test": (4608, 5120)}
  for split, (first, last) in ends.items():
    windows, labels = found[split]["input"], found[split]["label"]
    assert windows.dtype == labels.dtype == np.int32
    count = (last - first - 1) // text.CONTEXT
    assert windows.shape == labels.shape == (count, text.CONTEXT)
    part = list(whole[first:last])
    size = count * text.CONTEXT
    assert windows.ravel().tolist() == part[:size]
    assert labels.ravel().tolist() == part[1 : size + 1]


def test_no_paragraph_of_pydoc_comes_twice():
  whole = text.read("pydoc")
  assert len(whole) > 200_000
  paragraphs = whole.split(b"\n\n")
  assert len(set(paragraphs)) == len(paragraphs)


def test_a_text_as_a_data_set(path):
  found = data.load_dataset(str(path))
  assert (found.input_shape, found.num_classes) == ((text.CONTEXT,), 256)
  assert found.blank.shape == (1, text.CONTEXT)
  assert found.blank.dtype == np.int32
  assert found.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_batches_of_text_are_its_windows_shared_and_resumed_bit_for_bit(path):
  found = data.load_dataset(str(path))

  def start(**kwargs):
    return data.batches(
      found.train, 10, seed=3, mean=found.mean, std=found.std, **kwargs
    )

  whole = start()
  state, expected = None, []
  for n in range(15):  # 12 of them are an epoch
    if n == 10:
      state = json.loads(json.dumps(whole.get_state()))
    expected.append(next(whole))
  fresh = start()
  fresh.set_state(state)
  parts = [start(process_index=i, process_count=2) for i in range(2)]
  rows = {row.tobytes() for row in found.train["input"]}
  for n, batch in enumerate(expected):
    assert batch["input"].dtype == np.int32
    assert {row.tobytes() for row in batch["input"]} <= rows
    np.testing.assert_array_equal(batch["input"][:, 1:], batch["label"][:, :-1])
    shared = [next(part) for part in parts]
    again = next(fresh) if n >= 10 else batch
    for key, value in batch.items():
      np.testing.assert_array_equal(again[key], value)
      joined = np.concatenate([part[key] for part in shared])
      np.testing.assert_array_equal(joined, value)


def test_a_score_counts_every_position_once(path):
  found = data.load_dataset(str(path))

  class Same:
    """Guesses that each byte is repeated, e to 1 against all others."""

    def apply(self, variables, x, train):
      return variables * jax.nn.one_hot(x, 256)

  labels = found.test["label"]
  right = int((labels == found.test["input"]).sum())
  score = evaluate.make_scorer(Same(), found)(jnp.float32(1), found.test)
  assert (score.correct, score.total) == (right, labels.size)
  expected = np.log(255 + np.e) - right / labels.size
  assert score.loss == pytest.approx(expected, rel=1e-5)


def test_later_tokens_change_no_earlier_logits(net):
  model, params = net

  @jax.jit
  def logits(tokens):
    return model.apply({"params": params}, tokens, train=False)

  before, place = logits(TOKENS), 70
  assert before.shape == (2, text.CONTEXT, text.VOCABULARY)
  assert before.dtype == jnp.float32
  after = logits(TOKENS.at[:, place:].set(7))
  np.testing.assert_array_equal(after[:, :place], before[:, :place])
  assert (after[:, place:] != before[:, place:]).any(-1).all()
  # And every token reaches the last answer.
  early = logits(TOKENS.at[:, 0].add(1) % 256)
  assert (early[:, -1] != before[:, -1]).any()


@pytest.mark.long
def test_each_layer_of_a_stack_has_a_scale_and_a_threshold(config, net):
  _, params = net
  where = tern_jax.kernels(exclude=config.exclude)
  names = ("down", "key", "out", "query", "up", "value")
  assert where.paths(params) == [f"blocks/{name}/kernel" for name in names]
  assert where.largest(params, config.stacked) == 4 * 32 * 32
  # Four times as large in the second layer.
  kernels = {
    name: {"kernel": params["blocks"][name]["kernel"].at[1].multiply(4)}
    for name in names
  }
  params = params | {"blocks": params["blocks"] | kernels}
  for method in (tern_jax.TWN(), tern_jax.SCA(sparsity=0.7)):
    tern = tern_jax.ParamTransform(method, where, config.stacked)
    codes = jax.jit(lambda p, t=tern: t.discretize(*t.init(p)))(params)
    for name in names:
      leaf = codes["blocks"][name]["kernel"]
      for layer in range(2):
        zeros = float(jnp.mean(leaf.codes[layer] == 0))
        asked = 0.7 if isinstance(method, tern_jax.SCA) else 0.41
        assert zeros == pytest.approx(asked, abs=0.04)
      assert leaf.w_p.size == 2
      first, second = leaf.w_p.ravel().tolist()
      if isinstance(method, tern_jax.TWN):
        assert second == pytest.approx(4 * first, rel=0.1)


def test_wdr_has_a_threshold_for_each_layer(config, net):
  _, params = net
  opt_state = jax.eval_shape(
    lambda p: stages.ternary_phase(config, 40, p, {}).state.opt_state, params
  )
  leaves = jax.tree_util.tree_leaves_with_path(opt_state)
  shapes = [
    leaf.shape for keys, leaf in leaves if "threshold" in path_str(keys)
  ]
  assert shapes == 6 * [(2,)]


@pytest.mark.long
@pytest.mark.usefixtures("standard_promotion")
def test_a_run_end_to_end(config, path, monkeypatch):
  # The pictures, and that a fresh process reads the file, are those of every
  # run.
  monkeypatch.setattr(run.pictures, "draw", lambda *_: None)
  monkeypatch.setattr(evaluate, "in_fresh_process", evaluate.evaluate)
  sca = run.run(config)
  found = data.load_dataset(str(path))
  answers = found.test["label"].size
  assert sca["total"] == answers == 15 * text.CONTEXT
  assert sca["text_sha256"] == found.sha256
  for key in ("loss", "validation_loss"):
    # Of 256 bytes, 26 letters occur.
    assert all(3 < loss < np.log(200) for loss in sca[key].values())
  for layer in sca["layers"].values():
    assert layer["reached"] == pytest.approx(0.7, abs=0.005)
    assert layer["asked"] == 0.7
  table = record.text(sca)
  assert f"  {sca['loss']['packed'] / np.log(2):.4f}\n" in table
  assert max(map(len, table.splitlines())) <= 80
  records = log.read_metrics(config.directory)
  assert records[-1]["validation_loss"] < records[0]["validation_loss"]


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"data": "digits"}, "transformer does not go with data=digits"),
    ({"model": "mlp"}, "mlp does not go with data=pydoc"),
    ({"augment": "flip_crop"}, "augment=flip_crop is for images"),
    ({"width": 48}, "width=48, but it must be a multiple of 32"),
    ({"layers": 0}, "layers=0, but it must be at least 1"),
  ],
)
def test_options_that_do_not_go_together(changes, message):
  with pytest.raises(errors.UsageError, match=message):
    dataclasses.replace(charlm.DEFAULT, **changes)


def test_a_text_that_cannot_be_used_is_named(tmp_path):
  path = tmp_path / "short.txt"
  with pytest.raises(data.DataNotPreparedError, match=r"No such file.*short"):
    data.load_dataset(str(path))
  path.write_bytes(b"x" * 1200)
  with pytest.raises(
    data.DataNotPreparedError, match="1200 bytes is too short"
  ):
    data.load_dataset(str(path))


def test_a_directory_is_named_by_the_file_alone(path):
  config = dataclasses.replace(charlm.DEFAULT, data=str(path))
  name = "letters.txt-transformer-sca-sparsity0.7-seed0"
  assert config.directory.name == name
  assert config.directory.parent.name == "runs"
  place = config.float_directory
  assert place.name.startswith("letters.txt-transformer-seed0-")
  assert place.parent == config.directory.parent / "float"
  wider = dataclasses.replace(config, width=256)
  assert wider.float_directory != place
