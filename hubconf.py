"""The shipped CIFAR-100 networks by torch.hub, which needs a clone's path, or the repository's name on GitHub:

torch.hub.load("path/to/the/clone", "resnet32", source="local", bits=4, quantized=True)
"""

from pathlib import Path

from torch import nn

from models import ResNet32
from quant import Grid, quantize_weights
from utils.checkpoint import load_checkpoint

dependencies = ["torch"]

MODELS = Path(__file__).resolve().parent / "models"


def resnet32(bits: int = 4, granularity: str = "tensor", quantized: bool = False, clipped: bool = False) -> nn.Module:
    """ResNet-32 for CIFAR-100, trained by PSGD for the grid of `bits` bits, in eval mode.

    Args:
        bits: 2, 3, 4, 5, 6 or 8; or 32 for the network that SGD trained.
        granularity: "tensor", or "channel" for a grid for each output channel (2, 3 and 4 bits).
        quantized: whether to return the quantized copy, with its batch norm re-estimated (models/*_bn.pth), instead of
            the float network.
        clipped: whether the weights were clipped at the start of the stage (2 bits, "channel"), which is better there.

    It takes float32 images [N, 3, 32, 32], normalized by the data set's mean and standard deviation
    (utils/data/specs.py), and returns logits [N, 100]. Raises ValueError, naming the files, where there is no such
    network.
    """
    kind = ("_channel" if granularity == "channel" else "") + ("_clipped" if clipped else "")
    renewed = "_bn" if quantized else ""
    path = MODELS / ("ResNet150.pth" if bits == 32 and not kind else f"W{bits}{kind}_ResNet{renewed}.pth")
    if granularity not in ("tensor", "channel") or not path.is_file():
        found = ", ".join(sorted(file.name for file in MODELS.glob("W*_ResNet.pth")))
        asked = f"bits={bits!r}, granularity={granularity!r}, clipped={clipped}"
        raise ValueError(f"no network of {asked}; there are {found}")
    model = ResNet32(100)
    model.load_state_dict(load_checkpoint(path)["state_dict"])
    model.eval()
    grid = Grid(bits, per_channel=granularity == "channel")
    return quantize_weights(model, grid) if quantized and bits != 32 else model
