"""All layouts, by the names that `Prepared` keeps."""

from tern_jax.inference.layout import Layout
from tern_jax.inference.native import Lists, Tiles
from tern_jax.inference.words import Fields, Words

LAYOUTS: dict[str, Layout] = {
  "fields": Fields(),
  "words": Words(),
  "tiles": Tiles(),
  "lists": Lists(),
}
