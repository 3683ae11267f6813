"""Text as a data set: windows of bytes, each of which is to be guessed.

`"pydoc"` is the prose that comes with every Python: the topics of its `help()`,
some 380 kB of English, which differ a little from version to version. Any other
text is read from a file, named by a path that ends in `.txt`.
"""

from pathlib import Path
from pydoc_data import topics

import numpy as np

#: Positions of a window: an answer is made from so many bytes at most.
CONTEXT = 128

#: Values of a byte; the classes.
VOCABULARY = 256

#: Share of the text of each split, in the order in which the parts lie.
SHARES = {"train": 0.8, "validation": 0.1, "test": 0.1}


def is_text(name: str) -> bool:
  """Whether a data set is text."""
  return name == "pydoc" or name.endswith(".txt")


def read(name: str) -> bytes:
  """Reads a whole text.

  Args:
    name: `"pydoc"`, or the path of a file.

  Raises:
    FileNotFoundError: There is no such file.
  """
  if name != "pydoc":
    return Path(name).read_bytes()
  # Topics quote one another. What is learned by heart in one part must not
  # come again in another: each paragraph is taken once.
  paragraphs = dict.fromkeys(
    paragraph.strip("\n")
    for topic in topics.topics.values()
    for paragraph in topic.split("\n\n")
  )
  return "\n\n".join(paragraphs).encode()


def splits(text: bytes) -> dict[str, dict[str, np.ndarray]]:
  """Cuts a text into contiguous parts, and each part into windows.

  The parts have no byte in common. Each byte of a part but the first is the
  label of one position; what does not fill a window at its end is dropped.

  Args:
    text: at least some 1,300 bytes.

  Returns:
    {split: `{"input": int32 [N, T], "label": int32 [N, T]}`}, with T =
    `CONTEXT`; a label is the byte that follows its input.

  Raises:
    ValueError: The text is too short to have a window in each split.
  """
  tokens = np.frombuffer(text, np.uint8).astype(np.int32)
  ends = np.round(len(tokens) * np.cumsum([*SHARES.values()])).astype(int)
  parts = np.split(tokens, ends[:-1])
  if min(map(len, parts)) <= CONTEXT:
    raise ValueError(
      f"A text of {len(tokens)} bytes is too short: each split must have more"
      f" than {CONTEXT} of them, and the shares are {SHARES}."
    )
  return {
    split: _windows(part) for split, part in zip(SHARES, parts, strict=True)
  }


def _windows(tokens: np.ndarray) -> dict[str, np.ndarray]:
  size = (len(tokens) - 1) // CONTEXT * CONTEXT
  return {
    "input": tokens[:size].reshape(-1, CONTEXT),
    "label": tokens[1 : size + 1].reshape(-1, CONTEXT),
  }
