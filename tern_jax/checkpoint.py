"""Checkpoints that notice damage; see `tern_jax.storage.checkpoint`."""

from tern_jax.storage import codecs
from tern_jax.storage.checkpoint import examine as examine
from tern_jax.storage.checkpoint import load_packed as load_packed
from tern_jax.storage.checkpoint import read_spec as read_spec
from tern_jax.storage.checkpoint import save_packed as save_packed
from tern_jax.storage.checkpoint import sha256_of as sha256_of
from tern_jax.storage.leaves import CheckpointError as CheckpointError
from tern_jax.storage.places import Place as Place
from tern_jax.storage.places import absolute as absolute
from tern_jax.storage.places import disk_bytes as disk_bytes
from tern_jax.storage.places import locate as locate
from tern_jax.storage.run import Checkpointer as Checkpointer
from tern_jax.storage.spec import FORMAT as FORMAT
from tern_jax.storage.tensors import stored_bytes as stored_bytes

#: Names of the codecs that come with the package.
CODECS = tuple(codecs.CODECS)
