"""Options of experiments that a benchmark or another experiment starts from."""

from experiments.common import cli, methods

MNIST = cli.Config(data="mnist", model="lenet5", epochs=10, batch_size=128)

CIFAR10 = cli.Config(
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

CIFAR10_MICRONET = cli.Config(
  method=methods.Ec2t(gamma=0.15, s=0.45, frozen=15 / 35),
  data="cifar10",
  augment="flip_crop_jitter_cutout",
  model="micronet",
  scaling=(1.4, 1.2, 3.5),
  exclude=("stem", "head", "shortcut"),
  epochs=35,
  float_epochs=200,
  batch_size=128,
  learning_rate=1e-4,
  scale_learning_rate=1e-5,
  rest_learning_rate=1e-4,
  float_learning_rate=0.1,
  float_optimizer="sgd",
  float_weight_decay=5e-4,
  log_every=351,
  checkpoint_every=3510,
)

#: Scales that continue a float net want less than SCA's own rate.
SLOW_SCA = {"scale_learning_rate": 1e-4}
