"""A ternary language model of characters: train, pack, evaluate the file.

  python -m experiments.charlm
  python -m experiments.charlm method:absmean
  python -m experiments.charlm method:ec2t --method.gamma 0.2
  python -m experiments.charlm --data book.txt --width 128  # any text

The text is what Python's own `help()` says of the language, each paragraph
once: nothing is downloaded, but it differs a little from version to version of
Python, so that the record tells its SHA-256. Its first 80 % train, the next
10 % choose, the last 10 % are the test. A transformer of 4 blocks, 96 channels
and 3 heads sees windows of 128 bytes and guesses the next one at each
position. The kernels of attention and perceptron, 442,368 of 504,928
parameters, are ternary, each layer of the stack with a scale of its own;
embeddings, norms and the head stay float.

Claim: a transformer whose blocks are ternary, 70 % of each layer zeros, comes
near the float model in as many steps, but not yet to within 5 % of its loss.

Expected: validation, bits a character, seed 0, Python 3.11: float 1.964,
ternary as trained 2.194, 12 % more; the float model has 2.14 after 735 of the
1,176 steps. In 2,044 steps of batch 8, SCA's latents at 2e-3 and 3e-4: 20 and
17 % more than the float model's 1.921. AbsMean and EC2T: not measured.

Time: some 13 minutes of one CPU core for both models.
"""

from experiments.common import cli, command

DEFAULT = cli.Config(
  data="pydoc",
  model="transformer",
  width=96,
  exclude=("head",),
  epochs=8,
  batch_size=16,
  float_learning_rate=3e-3,
  log_every=147,
  checkpoint_every=588,
)


def main() -> None:
  """Runs the experiment."""
  command.main(DEFAULT, __doc__)


if __name__ == "__main__":
  main()
