"""What entropy coding takes: bytes over the entropy, and time.

    python -m experiments.benchmarks.codec

Weights are random. Rows are either alike, or their odds of a non-zero are
log-normal with a spread of 1. With H the entropy by the shares of -1, 0 and +1
in the tensor or in each row, whichever is less, the excess is

  (bits coded - 64 bytes) / H - 1.

H by row does not count what its shares cost. No code can know them, and those
of random rows are never quite alike: log2 C(n) bits, by the share of non-zeros
in each row of n weights, is what they must cost (see `tern_jax.codec`). Behind
the slash is the excess over H with that added, and with the share of signs in
the tensor; this is what is at most 0.5 %.

Speed is weights a second of CPU time, all threads together, that is, by core.
A machine that does other work slows it: so it is also given as a multiple of
the time in which NumPy copies the weights as int8.

With --checkpoint, coded sizes of what `save_packed` saved.

Last output, on 2 busy CPU cores of a shared machine (constriction 0.5.0):

  seed 0

  rows alike: excess in %, / with the price of shares
  zeros       100x100       250x400      250x4000     1000x1000     2500x4000
  0.3     -1.34/-2.29   -0.02/-0.24    0.00/-0.02    0.07/-0.02     0.03/0.00
  0.5     -1.62/-2.59   -0.01/-0.25    0.00/-0.03    0.07/-0.03     0.03/0.00
  0.7     -2.26/-3.29   -0.05/-0.32    0.00/-0.03    0.09/-0.03     0.03/0.00
  0.9     -3.90/-6.49   -0.04/-0.64    0.00/-0.06    0.19/-0.06     0.07/0.01
  0.95   -6.17/-10.22   -0.01/-1.13    0.01/-0.10    0.33/-0.11     0.12/0.01
  0.99  -28.20/-38.98    0.60/-3.99    0.03/-0.38    1.31/-0.40     0.44/0.05

  rows varying: excess in %, / with the price of shares
  zeros       100x100       250x400      250x4000     1000x1000     2500x4000
  0.3      0.42/-2.51    0.61/-0.30    0.10/-0.02    0.36/-0.05    0.12/-0.01
  0.5      0.82/-2.32    0.69/-0.30    0.11/-0.02    0.39/-0.06    0.13/-0.00
  0.7      0.86/-2.94    0.84/-0.37    0.13/-0.03    0.47/-0.07    0.15/-0.01
  0.9      0.99/-5.83    1.27/-0.84    0.20/-0.08    0.76/-0.23    0.25/-0.03
  0.95     0.40/-9.00    1.79/-1.54    0.29/-0.14    1.09/-0.47    0.36/-0.08
  0.99  -11.98/-25.21    4.00/-6.61    0.71/-0.73    2.82/-2.42    0.97/-0.49

  512x1024, bits a weight: entropy 1.271, by row 1.123; coded 1.129;
  NNCodec 2.1.3 at the same entropies 1.164

  speed           M weights/s a core: in, out; times a copy: in, out
  0.5  alike        200   133    15    22
  0.5  rows         202   125    16    25
  0.5  columns      171   111    15    23
  0.5  kernels      106    71    18    26
  0.9  alike        223   158    11    16
  0.9  rows         227   169    14    19
  0.9  columns      191   142    18    24
  0.9  kernels      122    86    22    31

  speed over that of a copy of the codes, of the weights
  pack   0.78
  unpack 1.10

and of a ResNet-8 that experiments.cifar10 trained by SCA(sparsity=0.9):

  bits a weight: entropy, coded
  params/stage0_block0/Conv_0/kernel      2304 0.5643 0.6250
  params/stage0_block0/Conv_1/kernel      2304 0.5548 0.6181
  params/stage1_block0/Conv_0/kernel      4608 0.5592 0.5503
  params/stage1_block0/Conv_1/kernel      9216 0.5653 0.5217
  params/stage2_block0/Conv_0/kernel     18432 0.5644 0.5056
  params/stage2_block0/Conv_1/kernel     36864 0.5687 0.4733
  all                                  73728 0.5682 0.5015

It is the taps of a kernel that resemble one another. By TWN, 1.5529, 1.3553.
"""

import dataclasses
import functools
import math
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from experiments.common import errors
from tern_jax import checkpoint, codec, metrics
from tern_jax.core.containers import Ternary
from tern_jax.storage.packed import PackedTernary, pack, unpack

SHAPES = ((100, 100), (250, 400), (250, 4000), (1000, 1000), (2500, 4000))
ZEROS = (0.3, 0.5, 0.7, 0.9, 0.95, 0.99)


@dataclasses.dataclass
class Options:
  """Command line of the benchmark.

  Attributes:
    seed: of the weights.
    rounds: turns, of which the median time is reported.
    checkpoint: path to packed weights, to code those instead.
  """

  seed: int = 0
  rounds: int = 9
  checkpoint: str = ""


def draw(
  shape: tuple[int, int], zeros: float, spread: float, seed: int
) -> np.ndarray:
  """Returns int8 codes, of a share of zeros if the spread of log-odds is 0."""
  rng = np.random.default_rng(seed)
  odds = (1 - zeros) / zeros * np.exp(spread * rng.normal(size=(shape[0], 1)))
  nonzero = rng.random(shape, dtype=np.float32) < odds / (1 + odds)
  return nonzero * (1 - 2 * rng.integers(0, 2, shape, dtype=np.int8))


def smooth(shape: tuple[int, ...], zeros: float, seed: int) -> np.ndarray:
  """Returns int8 codes of kernels [3, 3, ...], each with a mean of its own."""
  rng = np.random.default_rng(seed)
  w = rng.normal(size=shape) + rng.normal(size=(1, 1, *shape[2:]))
  threshold = np.quantile(np.abs(w), zeros)
  return np.where(np.abs(w) < threshold, 0, np.sign(w)).astype(np.int8)


def packed(codes: np.ndarray) -> PackedTernary:
  """Returns codes packed, with scales of 1."""
  one = jnp.ones(())
  return pack(Ternary(jnp.asarray(codes), one, one))


def entropy(rows: np.ndarray) -> float:
  """Returns the entropy in bits by the shares of codes in each row."""
  counts = np.stack([np.count_nonzero(rows == c, 1) for c in (-1, 0, 1)])
  shares = counts / rows.shape[1]
  return float(-(counts * np.log2(np.where(counts, shares, 1))).sum())


def excess(codes: np.ndarray) -> tuple[float, float]:
  """Returns the excess over H, and over H and the price of shares."""
  rows, n = codes.shape
  nonzero, signs = (codes != 0).astype(np.int8), codes[codes != 0]
  # C(n) is Q(n) + 1, of Ramanujan's Q.
  price = math.log2(1 + np.cumprod(1 - np.arange(n) / n).sum())
  priced = entropy(nonzero) + entropy(signs.reshape(1, -1)) + rows * price
  tensor = entropy(codes.reshape(1, -1))
  bits = 8 * len(codec.encode(packed(codes))) - 8 * 64
  bounds = min(tensor, entropy(codes)), min(tensor, priced)
  return bits / bounds[0] - 1, bits / bounds[1] - 1


def sizes(seed: int) -> None:
  """Prints the excess over the entropy for all shapes and shares of zeros."""
  for title, spread in (("alike", 0.0), ("varying", 1.0)):
    print(f"\nrows {title}: excess in %, / with the price of shares")
    print("zeros", *(f"{a}x{b}".rjust(13) for a, b in SHAPES))
    for zeros in ZEROS:
      cells = []
      for shape in SHAPES:
        plain, priced = excess(draw(shape, zeros, spread, seed))
        cells.append(f"{100 * plain:.2f}/{100 * priced:.2f}".rjust(13))
      print(f"{zeros:<5}", *cells)


def peer(seed: int) -> None:
  """Prints the size of rows of varying density, beside MPEG's NNCodec."""
  rng = np.random.default_rng(seed)
  density = 0.6985 * rng.permutation((np.arange(512) + 0.5) / 512) ** 1.035
  nonzero = rng.random((512, 1024)) < density[:, None]
  codes = nonzero * (1 - 2 * rng.integers(0, 2, (512, 1024), dtype=np.int8))
  coded = 8 * len(codec.encode(packed(codes))) / codes.size
  print(
    "\n512x1024, bits a weight:"
    f" entropy {entropy(codes.reshape(1, -1)) / codes.size:.3f},"
    f" by row {entropy(codes) / codes.size:.3f}; coded {coded:.3f};\n"
    "NNCodec 2.1.3 at the same entropies 1.164"
  )


def seconds(run: Callable[[], object], rounds: int) -> float:
  """Returns the median CPU time of a call."""
  times = []
  for _ in range(rounds):
    start = time.process_time()
    run()
    times.append(time.process_time() - start)
  return statistics.median(times)


def speed(seed: int, rounds: int) -> None:
  """Prints the time of coding and decoding."""
  print("\nspeed           M weights/s a core: in, out; times a copy: in, out")
  square, kernels = (2048, 2048), (3, 3, 512, 512)
  for zeros in (0.5, 0.9):
    rows = draw(square, zeros, 1.0, seed)
    for title, codes in (
      ("alike", draw(square, zeros, 0.0, seed)),
      ("rows", rows),
      ("columns", np.ascontiguousarray(rows.T)),
      ("kernels", smooth(kernels, zeros, seed)),
    ):
      weights, shape = packed(codes), codes.shape
      data = codec.encode(weights)
      times = [
        seconds(run, rounds)
        for run in (
          lambda w=weights: codec.encode(w),
          lambda d=data, s=shape: codec.decode(d, s),
          lambda c=codes: [c.copy() for _ in range(50)],
        )
      ]
      rates = (f"{codes.size / t / 1e6:5.0f}" for t in times[:2])
      ratios = (f"{50 * t / times[2]:5.0f}" for t in times[:2])
      print(f"{zeros:<4} {title:<10}", *rates, *ratios)


def packing(seed: int, rounds: int) -> None:
  """Prints the speed of packing and unpacking over that of a plain copy."""
  one = jnp.ones(())
  codes = jnp.asarray(draw((4096, 4096), 0.8, 0.0, seed))
  weights, dense = pack(Ternary(codes, one, one)), codes.astype(jnp.float32)
  copy = jax.jit(jnp.copy)
  ways: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
    "pack": (
      functools.partial(jax.jit(pack), Ternary(codes, one, one)),
      functools.partial(copy, codes),
    ),
    "unpack": (
      functools.partial(jax.jit(unpack), weights),
      functools.partial(copy, dense),
    ),
  }

  def clock(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - start

  print("\nspeed over that of a copy of the codes, of the weights")
  for name, (run, copied) in ways.items():
    turns = [(clock(run), clock(copied)) for _ in range(rounds + 1)]
    # The first one compiles.
    ratio = statistics.median(b / a for a, b in turns[1:])
    print(f"{name:<6} {ratio:.2f}")


def leaves(path: str) -> None:
  """Prints the coded size of packed weights in a file, leaf by leaf."""
  tree = checkpoint.load_packed(path)
  print("bits a weight: entropy, coded")
  total = size = 0
  codes = np.zeros(0, np.int8)
  for name, leaf in metrics.ternary_leaves(tree).items():
    bits = 8 * len(codec.encode(packed(np.asarray(leaf.codes))))
    total, size = total + bits, size + leaf.codes.size
    codes = np.append(codes, leaf.codes)
    alone = entropy(np.asarray(leaf.codes).reshape(1, -1))
    n = leaf.codes.size
    print(f"{name:<32} {n:>9} {alone / n:.4f} {bits / n:.4f}")
  whole = entropy(codes.reshape(1, -1))
  print(f"{'all':<32} {size:>9} {whole / size:.4f} {total / size:.4f}")


def main(options: Options) -> None:
  """Runs the benchmark."""
  if options.checkpoint:
    leaves(options.checkpoint)
    return
  print(f"seed {options.seed}")
  sizes(options.seed)
  peer(options.seed)
  speed(options.seed, options.rounds)
  packing(options.seed, options.rounds)


if __name__ == "__main__":
  with errors.explained():
    main(tyro.cli(Options))
