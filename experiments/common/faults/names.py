"""Names: folders whose names mean something to programs that expand them."""

from collections import Counter
from pathlib import Path

from experiments.common.faults.trees import flat, net
from tern_jax.checkpoint import (
  Checkpointer,
  CheckpointError,
  load_packed,
  save_packed,
)

NAMES = (
  *("lr[0.1]", "[a-z]", "[!a]", "[", "]", "*", "?", "a?b", "**", "{a,b}"),
  *("$HOME", "~", "a b", "-rf", "%d", "a\nb", "\u03b1", "#", "a;b", "'", '"'),
)


def names(times: int, seed: int, folder: Path) -> Counter[str]:
  """Saves, replaces and resumes below each name; returns what came of it."""
  del seed
  counts: Counter[str] = Counter()
  old, new = net(0), net(1)
  for name in NAMES[:times]:
    for i, place in enumerate((Path(name), Path(name, "net"))):
      path = folder / str(i) / place
      try:
        save_packed(path, old)
        save_packed(path, new, overwrite=True)
        with Checkpointer(f"{path}-run") as run:
          run.save(1, {"w": new["bias"]}, new)
      except CheckpointError:
        assert not path.exists(), f"{name} is refused after something is saved"
        counts["refused"] += 1
        continue
      assert flat(load_packed(path)) == flat(new), f"{name} is not replaced"
      with Checkpointer(f"{path}-run") as run:
        state, _, step = run.restore({"w": old["bias"]})
      assert step == 1
      assert flat(state) == flat({"w": new["bias"]})
      counts["right"] += 1
  return counts
