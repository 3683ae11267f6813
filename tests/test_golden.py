"""Files that an older version wrote load to the same values, and are rewritten.

`data/` was written by the first version of each format: a checkpoint of each
codec, a run of one step, a safetensors file of each codec, and a GGUF file.
They are never written anew: a file that people have must stay readable.
"""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tern_jax
from tern_jax import codec, export
from tests.helpers import assert_same

DATA = Path(__file__).parent / "data"
CODECS = ("planes", "entropy")


def noise(shape):
  """Numbers from 0 to 999 that no generator made, but x² mod p."""
  x = np.arange(np.prod(shape), dtype=np.int64).reshape(shape)
  return x * x % 65521 % 1000


def ternary(x, cuts, w_p, w_n, dtype="float32"):
  """Packs codes: not zero where x is below the cuts, of a third of them -1."""
  codes = np.where(x < cuts, np.where(x % 3 == 0, -1, 1), 0).astype(np.int8)
  w_p, w_n = (jnp.asarray(np.asarray(w).astype(dtype)) for w in (w_p, w_n))
  return tern_jax.pack(tern_jax.Ternary(jnp.asarray(codes), w_p, w_n))


def net():
  """Leaves of each kind, and weights for each model of the entropy codec."""
  rows, channels = np.arange(64)[:, None] * 15, np.arange(1, 41)[None] / 8
  dense = ternary(noise((64, 40)), rows, channels, channels / 2, jnp.bfloat16)
  taps = noise((3, 3, 8, 16)) + 3 * noise((8, 16))
  return {
    "Dense_0": {"kernel": dense, "bias": np.arange(40, dtype=np.float32) / 8},
    "Conv_0": {"kernel": ternary(taps, 1200, 0.5, 0.25)},
    "head": [ternary(noise((7, 5)), 400, 2, 3), np.arange(5, dtype=np.int32)],
  }


def rows():
  """Weights that fit ggml's blocks, and a bias."""
  return {
    "kernel": ternary(noise((256, 3)), 500, 0.5, 0.5),
    "bias": np.arange(3, dtype=np.float32),
  }


def state():
  """What a run of one step resumes from."""
  return {
    "w": jnp.arange(6.0).reshape(2, 3),
    "count": jnp.array(7, jnp.int32),
    "key": jax.random.wrap_key_data(jnp.array([1, 2], jnp.uint32)),
  }


def nested():
  """The net as it is loaded without its structure: sequences are dicts."""
  return net() | {"head": dict(zip("01", net()["head"], strict=True))}


@pytest.mark.parametrize("name", CODECS)
def test_old_checkpoints_load(name):
  assert_same(tern_jax.load_packed(DATA / name), nested())
  assert_same(tern_jax.load_packed(DATA / name, like=net()), net())
  spec = tern_jax.checkpoint.read_spec(DATA / name)
  assert (spec["format"], spec["codec"]) == (1, name)
  assert spec["method"] == "TWN()"
  for leaf in tern_jax.checkpoint.examine(DATA / name).values():
    assert not isinstance(leaf, tern_jax.CheckpointError)


def test_an_old_run_resumes():
  with tern_jax.checkpoint.Checkpointer(DATA / "run") as run:
    restored, extra, step = run.restore(like=state())
  assert_same(restored, state())
  assert (extra, step) == ({"epoch": 1}, 3)
  assert_same(tern_jax.load_packed(DATA / "run"), nested())


@pytest.mark.parametrize("name", CODECS)
def test_specs_are_written_as_before(name, tmp_path):
  tern_jax.save_packed(tmp_path / "net", net(), codec=name, method="TWN()")
  old, new = (
    tern_jax.checkpoint.read_spec(path)
    for path in (DATA / name, tmp_path / "net")
  )
  # What wrote it is all that may differ: the checksums are among the rest.
  assert old.keys() == new.keys()
  assert old.pop("versions").keys() == new.pop("versions").keys()
  assert new == old


def parts_of(path):
  """The header of a safetensors file, whose order is none, and the tensors."""
  data = path.read_bytes()
  size = int.from_bytes(data[:8], "little")
  return size, json.loads(data[8 : 8 + size]), data[8 + size :]


@pytest.mark.parametrize("name", CODECS)
def test_safetensors_are_read_and_written_as_before(
  name, tmp_path, monkeypatch
):
  old, new = DATA / f"{name}.safetensors", tmp_path / "new.safetensors"
  assert_same(export.from_safetensors(old), nested())
  facts = json.loads(parts_of(old)[1]["__metadata__"]["tern_jax"])
  monkeypatch.setattr(export.safetensors, "__version__", facts["version"])
  export.to_safetensors(new, net(), codec=name)
  assert parts_of(new) == parts_of(old)


def test_gguf_is_written_as_before(tmp_path, monkeypatch):
  gguf = pytest.importorskip("gguf")
  fields = gguf.GGUFReader(DATA / "net.gguf").fields
  version = fields["tern_jax.version"].contents()
  monkeypatch.setattr(export.gguf, "__version__", version)
  export.to_gguf(tmp_path / "net.gguf", rows())
  assert (tmp_path / "net.gguf").read_bytes() == (
    DATA / "net.gguf"
  ).read_bytes()


def test_coded_planes_are_those_of_before():
  safetensors = pytest.importorskip("safetensors")
  leaves = {
    ".".join(str(getattr(k, "key", getattr(k, "idx", k))) for k in path): x
    for path, x in jax.tree_util.tree_leaves_with_path(
      net(), is_leaf=lambda x: isinstance(x, tern_jax.PackedTernary)
    )
  }
  models = set()
  with safetensors.safe_open(DATA / "entropy.safetensors", "numpy") as file:
    for name in file.keys():  # noqa: SIM118 (it is no dict)
      if name.endswith(".coded"):
        data = file.get_tensor(name).tobytes()
        leaf = leaves[name.removesuffix(".coded")]
        assert codec.encode(leaf) == data
        planes = codec.decode(data, leaf.shape)
        assert_same(planes, (np.asarray(leaf.nonzero), np.asarray(leaf.sign)))
        models.add(data[1])
  # Levels of an axis, neighbors along two, and one probability for all.
  assert models == {128, 2, 0}
