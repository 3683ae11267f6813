"""The models of the experiments, in Flax Linen."""

from experiments.common.models.cifar import ResNet as ResNet
from experiments.common.models.cifar import VGGSmall as VGGSmall
from experiments.common.models.imagenet import ImageNetResNet as ImageNetResNet
from experiments.common.models.micronet import MicroNet as MicroNet
from experiments.common.models.small import MLP as MLP
from experiments.common.models.small import ConvNet as ConvNet
from experiments.common.models.small import LeNet5 as LeNet5
from experiments.common.models.transformer import Transformer as Transformer
