"""The supernet of EC2T on CIFAR-100: train, make ternary, evaluate the file.

  python -m experiments.cifar100_micronet
  python -m experiments.cifar100_micronet method:ec2t --method.sparsity 0.95
  python -m experiments.cifar100_micronet --scaling 1.4 1.2 1  # smaller

CIFAR-100 must be prepared once, by `python -m experiments.prepare cifar100`;
the directory is $TFDS_DATA_DIR or --data-dir. The float net is trained once for
all runs, and kept in `runs/float`.

Claim: a residual net that is scaled to 8.06 million parameters, d=1.4, w=1.2,
phi=3.5, loses 1.3 points of accuracy when EC2T makes its 138 convolutions
ternary and nine tenths of them zero; the first convolution, the shortcuts and
the last layer stay float.

Expected, as published by Marban et al. (arXiv 2004.01077), not measured here:
test accuracy of the float net 81.47, of EC2T with gamma = .15 and s = .45 80.13
at 90.5 % zeros. The float figure is the mean of the five best epochs on the
test images, and theirs train on all 50,000 others; here 45,000 train, 5,000
choose, and the test images are read once.

Recipe: that of `cifar10_micronet`, with the numbers of epochs of the authors'
code for CIFAR-100: 250 of the float net, 20 of EC2T, and 20 with the codes of
the best of them. What differs from the paper is told there.

Time: not measured; for one accelerator with 16 GB, of which activations take 6.
The float net takes 8.4e16 operations, EC2T 1.3e16; a CPU core prepares a batch
in 13 ms meanwhile.
"""

import dataclasses

from experiments.common import command, configs, methods

DEFAULT = dataclasses.replace(
  configs.CIFAR10_MICRONET,
  method=methods.Ec2t(gamma=0.15, s=0.45, frozen=1 / 2),
  data="cifar100",
  epochs=40,
  float_epochs=250,
)


def main() -> None:
  """Runs the experiment."""
  command.main(DEFAULT, __doc__)


if __name__ == "__main__":
  main()
