"""A sparse ternary LeNet-5 on MNIST: train, pack, evaluate the packed file.

  python -m experiments.mnist method:sca --method.sparsity 0.8
  python -m experiments.mnist method:twn

MNIST must be prepared once, by `python -m experiments.prepare mnist`; the
directory is $TFDS_DATA_DIR or --data-dir.

Claim: LeNet-5 with all its kernels ternary and 80 % of the weights zero is
within .3 points of the float net.

Expected: test accuracy, mean and standard deviation of seeds 0 to 2: float
99.13 +- .07, ternary, as trained and from the packed file alike, 99.01 +- .10,
every layer at .800, and 16,352 bytes against 246,824.

Time: 6 minutes on 2 CPU cores.
"""

from experiments.common import command, configs

DEFAULT = configs.MNIST


def main() -> None:
  """Runs the experiment."""
  command.main(DEFAULT, __doc__)


if __name__ == "__main__":
  main()
