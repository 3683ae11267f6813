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

Claim: a transformer whose blocks are ternary, 70 % of each layer zeros, is
ahead of the float model after as many steps, which has learned its text by
heart by then, and not behind what that was at its best.

Expected: validation and test, bits a character, seed 0, Python 3.11, after
3,504 steps: float 2.319 and 2.554; SCA 1.849 and 2.006; EC2T, 58 % zeros, 1.905
and 2.108; AbsMean, 31 % zeros, 1.975 and 2.130. The float model's best of four
looks at validation, after half of the steps, is 1.882. Where both still learn,
the ternary model is behind: after 8 epochs (--epochs 8) by 12 to 13 %, 2.19 to
1.945. One scale a channel is no help there (2.39).

Time: some 45 minutes of one CPU core for both models.
"""

from experiments.common import cli, command

DEFAULT = cli.Config(
  data="pydoc",
  model="transformer",
  width=96,
  exclude=("head",),
  epochs=24,
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
