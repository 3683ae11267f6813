"""One file for deployment: safetensors, StableHLO or GGUF, weights packed.

  to_safetensors  planes and scales, checksummed, read by NumPy or by
                  `from_safetensors`; nothing is lost;
  to_stablehlo    the whole computation, run by JAX without the model's code;
  to_gguf         ggml's ternary types, for the tools of llama.cpp's family;
                  with `llama`, a language model that llama.cpp runs;
  to_transformers a folder that Hugging Face's transformers loads.

`import_llama` reads language models of the last two, and float ones. Each
writer writes beside the path, then moves the whole file there; a file that
exists is replaced only if asked. The packages that they need are those of
`pip install 'tern_jax[export]'`.

A format is one file with a `Writer`, and one line of `FORMATS`, from which the
command `python -m tern_jax export` has its choices and options.
"""

from tern_jax.export.decoder import Decoder as Decoder
from tern_jax.export.decoder import llama as llama
from tern_jax.export.files import FORMAT as FORMAT
from tern_jax.export.files import Writer as Writer
from tern_jax.export.gguf import GGUF
from tern_jax.export.gguf import GGUF_TYPES as GGUF_TYPES
from tern_jax.export.gguf import to_gguf as to_gguf
from tern_jax.export.loading import import_llama as import_llama
from tern_jax.export.safetensors import CODECS as CODECS
from tern_jax.export.safetensors import SAFETENSORS
from tern_jax.export.safetensors import from_safetensors as from_safetensors
from tern_jax.export.safetensors import sha256_of as sha256_of
from tern_jax.export.safetensors import to_safetensors as to_safetensors
from tern_jax.export.stablehlo import STABLEHLO
from tern_jax.export.stablehlo import to_stablehlo as to_stablehlo
from tern_jax.export.transformers import TRANSFORMERS
from tern_jax.export.transformers import to_transformers as to_transformers

#: The formats by name; a format of your own can be added.
FORMATS: dict[str, Writer] = {
  "safetensors": SAFETENSORS,
  "gguf": GGUF,
  "stablehlo": STABLEHLO,
  "transformers": TRANSFORMERS,
}
