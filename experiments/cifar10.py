"""Ternary residual networks on CIFAR-10: train, pack, evaluate the packed file.

  python -m experiments.cifar10 method:twn --method.sparsity 0.7
  python -m experiments.cifar10 method:ec2t --method.gamma 0.2
  python -m experiments.cifar10 --model resnet20 --epochs 200 method:twn
  python -m experiments.cifar10 --model vgg_small --float-epochs 160 \
    --epochs 160 --init scratch method:twn

CIFAR-10 must be prepared once, by `python -m experiments.prepare cifar10`; the
directory is $TFDS_DATA_DIR or --data-dir.

All methods continue the same float net, which is trained once and kept in
`runs/float`; the first convolution and the last layer stay float.

Claim: after a short training, ResNet-8 with ternary convolutions, two fifths to
two thirds of them zero, is within one point of the float net that it continues.

Expected for seed 0, which alone is too few to rank methods, with the options
and rates of `benchmarks.accuracy_table cifar10 --float-epochs 14 --epochs 6`:
test accuracy of the float net 79.1; of the ternary nets, from the packed file,
TWN 78.2 at 44 % zeros, TGA(surrogate=0.5) 78.3 at 45 %, the same with frozen
thresholds 78.6, EC2T 78.5, 78.6 and 77.5 at 40, 64 and 77 %, TTQ 77.6 at 14 %,
SCA 79.3, 78.8, 77.5 and 74.6 at 50, 65, 75 and 90 %. All 20 epochs with the
float net: 80.8.

Expected for VGG-small, as published for TWN by Li et al. (arXiv 1605.04711),
not measured here: test accuracy 92.56, of the float net 92.88; theirs is
trained by SGD with momentum, the ternary net here by Adam.

Time: 9 minutes for the float net and 6 for each method, on one CPU core.
VGG-small takes 3.7e9 operations an image and step, 50 times as many: it wants
an accelerator.
"""

from experiments.common import command, configs

DEFAULT = configs.CIFAR10


def main() -> None:
  """Runs the experiment."""
  command.main(DEFAULT, __doc__)


if __name__ == "__main__":
  main()
