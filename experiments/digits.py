"""Sparse ternary digits in a minute: train, pack, evaluate the packed file.

  python -m experiments.digits
  python -m experiments.digits method:sca --method.sparsity 0.9
  python -m experiments.digits method:sca --method.alpha 0.1
  python -m experiments.digits method:twn

Claim: an MLP 64-64-64-10 with all its kernels ternary and 70 % of the weights
zero is as accurate as the float net, rounding costs nothing, and the packed
file gives exactly the answers of the rounded net.

Expected: test accuracy, mean and standard deviation of seeds 0 to 4: float
97.67 +- .50, ternary as trained 98.17 +- .64, rounded and from the packed file
98.33 +- .59, every layer at .700. The test split has 360 images: one is .28.

Time: 35 s on 2 CPU cores.
"""

from experiments.common import cli, command

DEFAULT = cli.Config(epochs=150, batch_size=64)


def main() -> None:
  """Runs the experiment."""
  command.main(DEFAULT, __doc__)


if __name__ == "__main__":
  main()
