"""A codec and a format of a user's own, without a change to the package."""

import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tern_jax
from tern_jax import __main__, export
from tern_jax.storage.codecs import CODECS, Codec
from tern_jax.storage.packed import plane_shape
from tests.helpers import assert_same


class Deflate:
  """Both planes by zlib."""

  def encode(self, packed):
    planes = b"".join(np.asarray(x) for x in (packed.nonzero, packed.sign))
    return {"deflated": np.frombuffer(zlib.compress(planes), np.uint8)}

  def decode(self, arrays, shape):
    try:
      both = np.frombuffer(zlib.decompress(arrays["deflated"]), np.uint8)
    except zlib.error as e:
      raise ValueError(f"{e}.") from e
    return both.reshape(2, *plane_shape(shape))


def codec_of(coder):
  return Codec("deflate", ("deflated",), coder.encode, coder.decode)


@pytest.fixture
def codec(monkeypatch):
  added = codec_of(Deflate())
  monkeypatch.setitem(CODECS, added.name, added)
  return added.name


def net():
  codes = np.random.default_rng(0).integers(-1, 2, (2, 64, 48)).astype(np.int8)
  codes[:, 8:] = 0
  w_p, w_n = jnp.full((1, 48), 0.5), jnp.full((1, 48), 0.25)
  square, odd = jnp.asarray(codes[0]), jnp.asarray(codes[1, :7, :5])
  return {
    "kernel": tern_jax.pack(tern_jax.Ternary(square, w_p, w_n)),
    "odd": tern_jax.pack(tern_jax.Ternary(odd, w_p[0, 0], w_n[0, 0])),
    "bias": jnp.arange(48.0),
  }


def test_a_codec_stores_checkpoints(codec, tmp_path, monkeypatch):
  tern_jax.save_packed(tmp_path / "net", net(), codec=codec)
  assert_same(tern_jax.load_packed(tmp_path / "net"), net())
  assert_same(tern_jax.load_packed(tmp_path / "net", like=net()), net())
  spec = tern_jax.checkpoint.read_spec(tmp_path / "net")
  assert spec["codec"] == "deflate"
  kernel = spec["leaves"]["packed"][1]
  assert sorted(kernel["arrays"]) == ["deflated", "w_n", "w_p"]
  stored = tern_jax.checkpoint.stored_bytes(kernel)
  assert stored < net()["kernel"].nbytes / 2
  # Who does not know the codec is told so.
  monkeypatch.delitem(CODECS, codec)
  with pytest.raises(
    tern_jax.CheckpointError, match=r"has codec 'deflate'.*planes.*upgrade"
  ):
    tern_jax.load_packed(tmp_path / "net")


def test_a_codec_stores_exports(codec, tmp_path, monkeypatch):
  path = tmp_path / "net.safetensors"
  export.to_safetensors(path, net(), codec=codec)
  assert_same(export.from_safetensors(path), net())
  data = path.read_bytes()
  assert b'\\"kind\\": \\"deflate\\"' in data
  monkeypatch.delitem(CODECS, codec)
  with pytest.raises(ValueError, match="cannot load"):
    export.from_safetensors(path)


def test_damage_is_noticed_whatever_the_codec(codec, tmp_path, monkeypatch):
  class Wrong(Deflate):
    def decode(self, arrays, shape):
      nonzero, sign = super().decode(arrays, shape)
      return nonzero ^ 1, sign

  tern_jax.save_packed(tmp_path / "net", net(), codec=codec)
  monkeypatch.setitem(CODECS, codec, codec_of(Wrong()))
  with pytest.raises(tern_jax.CheckpointError, match="crc32 differs"):
    tern_jax.load_packed(tmp_path / "net")


def test_the_command_line_offers_a_codec(codec, tmp_path):
  source, out = str(tmp_path / "net"), str(tmp_path / "net.safetensors")
  tern_jax.save_packed(source, net())
  command = ["export", source, out, "--to", "safetensors", "--codec", codec]
  assert __main__.main(command) == 0
  assert_same(export.from_safetensors(out), net())


def write_npz(path, tree, *, dtype="float32", overwrite=False):
  """Dense weights, for whoever has NumPy alone."""
  if not overwrite and path.exists():
    raise FileExistsError(path)
  dense = jax.tree.map(lambda x: np.asarray(x, dtype), tern_jax.unpack(tree))
  np.savez(path, **dense)
  return dict.fromkeys(dense, 0.0)


def test_a_format_is_offered_by_the_command_line(tmp_path, monkeypatch, capsys):
  monkeypatch.setitem(
    export.FORMATS,
    "npz",
    export.Writer(
      lambda path, tree, **kw: write_npz(tmp_path / path, tree, **kw),
      {"dtype": {"choices": ("float16", "float32")}},
    ),
  )
  tern_jax.save_packed(tmp_path / "net", net())
  out = tmp_path / "net.npz"
  command = ["export", str(tmp_path / "net"), str(out), "--to", "npz"]
  assert __main__.main(command) == 0
  assert capsys.readouterr().out.splitlines() == [
    f"{name}: relative RMS error 0.0e+00" for name in ("bias", "kernel", "odd")
  ]
  dense = tern_jax.unpack(net())
  with np.load(out) as found:
    assert_same(dict(found), jax.tree.map(np.asarray, dense))
  assert __main__.main(command) == 2
  assert __main__.main([*command, "--overwrite", "--dtype", "float16"]) == 0
  with np.load(out) as found:
    assert {x.dtype.name for x in found.values()} == {"float16"}
  with pytest.raises(SystemExit):
    __main__.main([*command, "--dtype", "int8"])
