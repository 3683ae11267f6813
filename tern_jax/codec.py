"""Bit-planes at the entropy of the weights; see `tern_jax.storage.entropy`."""

from tern_jax.storage.entropy import VERSION as VERSION
from tern_jax.storage.entropy import decode as decode
from tern_jax.storage.entropy import encode as encode
