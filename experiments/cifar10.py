"""Ternary residual networks on CIFAR-10: train, pack, evaluate the packed file.

  python -m experiments.cifar10 method:sca --method.sparsity 0.8
  python -m experiments.cifar10 method:ec2t --method.gamma 0.2
  python -m experiments.cifar10 --model resnet20 --epochs 200 method:twn

CIFAR-10 must be prepared once, by `python -m experiments.prepare cifar10`; the
directory is $TFDS_DATA_DIR or --data-dir.

All methods continue the same float net, which is trained once and kept in
`runs/float`; the first convolution and the last layer stay float.
"""

from experiments.common import cli, run

DEFAULT = cli.Config(
  data="cifar10",
  model="resnet8",
  augment="flip_crop",
  exclude=("stem", "head"),
  init="float",
  epochs=3,
  float_epochs=6,
  batch_size=128,
  float_learning_rate=3e-3,
  log_every=117,
  checkpoint_every=351,
)


def main() -> None:
  """Runs the experiment."""
  run.main(DEFAULT, __doc__)


if __name__ == "__main__":
  main()
