"""The paper's two networks, a vision transformer, and torchvision's by name; the shipped checkpoints are here."""

import difflib
from collections.abc import Callable

from torch import nn

from .resnet import ResNet32
from .vgg import vgg16_bn
from .vit import vit_tiny

# For 32 x 32 images; they precede torchvision's names.
ARCHITECTURES: dict[str, Callable[[int], nn.Module]]
ARCHITECTURES = {"ResNet32": ResNet32, "vgg16_bn": vgg16_bn, "vit_tiny": vit_tiny}
AUXILIARY = {"googlenet", "inception_v3"}  # left out: they have a second output in training


def architectures() -> list[str]:
    """Names that `build_model` knows: ours, then torchvision's classification networks."""
    from torchvision import models

    return [*ARCHITECTURES, *(n for n in models.list_models(module=models) if n not in {*ARCHITECTURES, *AUXILIARY})]


def check_arch(arch: str) -> str:
    """`arch`, if `build_model` knows it; else ValueError, which names the nearest."""
    if arch in ARCHITECTURES:  # needs no import of torchvision
        return arch
    known = architectures()
    if arch not in known:
        near = difflib.get_close_matches(arch, known, 1) or ["resnet18"]
        raise ValueError(
            f"unknown architecture {arch!r}: {', '.join(ARCHITECTURES)} or a classification network of torchvision, "
            f"such as {near[0]}"
        )
    return arch


def build_model(arch: str, num_classes: int, weights: str | None = None) -> nn.Module:
    """A network for float32 images [N, 3, H, W], freshly initialized, or with `weights` of torchvision.

    `weights` is a name that torchvision has for this `arch`, such as DEFAULT or IMAGENET1K_V1. They may be downloaded.
    If their number of classes is another, the head stays freshly initialized. Raises ValueError for an unknown `arch`
    or `weights` and for weights of another image size, and OSError if a download fails.
    """
    if check_arch(arch) in ARCHITECTURES:
        if weights:
            raise ValueError(f"there are no torchvision weights for {arch}")
        return ARCHITECTURES[arch](num_classes)
    from torchvision import models

    model = models.get_model(arch, num_classes=num_classes)
    if weights:
        known = models.get_model_weights(arch)
        try:
            chosen = known[weights]
        except KeyError:
            raise ValueError(f"unknown weights {weights!r} for {arch}: it has {', '.join(known.__members__)}") from None
        state = model.state_dict()
        # Torchvision's own builder reads them, because it knows the names in its old files.
        for name, value in models.get_model(arch, weights=chosen).state_dict().items():
            if value.shape == state[name].shape:
                state[name] = value
            elif value.shape[1:] != state[name].shape[1:]:  # not the head, whose number of classes may differ
                raise ValueError(f"weights {weights!r} of {arch} are for images of another size: {name} does not fit")
        model.load_state_dict(state)
    return model
