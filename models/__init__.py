"""The paper's two networks as plain torch.nn modules; the shipped checkpoints lie beside this file."""

from torch import nn

from .resnet import ResNet32
from .vgg import vgg16_bn

ARCHITECTURES = {"ResNet32": ResNet32, "vgg16_bn": vgg16_bn}


def build_model(arch: str, num_classes: int) -> nn.Module:
    """A freshly initialised network for float32 images [N, 3, 32, 32].

    Raises ValueError for an `arch` that is not in ARCHITECTURES.
    """
    if arch not in ARCHITECTURES:
        raise ValueError(f"unknown architecture {arch!r}: choose one of {', '.join(ARCHITECTURES)}")
    return ARCHITECTURES[arch](num_classes)
