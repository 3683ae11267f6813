"""A sparse ternary LeNet-5 on MNIST: train, pack, evaluate the packed file.

  python -m experiments.mnist --data-dir DIRECTORY
  python -m experiments.mnist method:twn

Claim: LeNet-5 with all its kernels ternary and 70 % of the weights zero is as
accurate as the float net, to .2 points.

Expected: seed 0, test accuracy: float 99.18 %, ternary as trained, rounded and
from the packed file 99.15 %, at a sparsity of .699 and 16,352 bytes against
246,824.

Time: 7 minutes on 2 CPU cores shared with other work.
"""

from experiments.common import cli, run

DEFAULT = cli.Config(data="mnist", model="lenet5", epochs=10, batch_size=128)


def main() -> None:
  """Runs the experiment."""
  run.main(DEFAULT, __doc__)


if __name__ == "__main__":
  main()
