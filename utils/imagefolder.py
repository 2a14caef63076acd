"""Images in folders, a class a folder, with ImageNet's standard augmentation; for sets that do not fit a device.

<data_dir>/train/<class>/*.jpg and <data_dir>/val/<class>/*.jpg. Files are decoded, cropped to 224 x 224 and flipped by
worker processes; order, crops and flips of an epoch come from (seed, epoch) alone.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import default_loader
from torchvision.transforms import v2

from utils.cli import UserError
from utils.data import step_sizes
from utils.distributed import World
from utils.signals import outlive_signals

SIZE, RESIZED = 224, 256


def _transform(mean: Sequence[float], std: Sequence[float], augment: bool) -> v2.Compose:
    """PIL image -> normalised float32 [3, SIZE, SIZE]; mean and std in units of 0..255."""
    crop: list = [v2.Resize(RESIZED), v2.CenterCrop(SIZE)]
    if augment:
        crop = [v2.RandomResizedCrop(SIZE), v2.RandomHorizontalFlip()]
    moments = [m / 255 for m in mean], [s / 255 for s in std]
    return v2.Compose([*crop, v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(*moments)])


class _Files(torch.utils.data.Dataset):
    def __init__(self, files: Sequence[tuple[str, int]], transform: v2.Compose, seed: int) -> None:
        self.files, self.transform, self.seed = files, transform, seed

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        path, label = self.files[index]
        try:
            image = default_loader(path)
        except Exception as error:  # the bytes of a foreign file can raise anything
            raise UserError(f"{path} cannot be read as an image ({str(error).splitlines()[0]})") from None
        # Crop and flip depend on (seed, epoch, image) alone, whichever process or worker draws them.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed((self.seed * 2**26 + index) % 2**63)  # a GPU's stays as it is
            return self.transform(image), label


@dataclass
class FolderSplit:
    """(path, label) of each image, and how to read them."""

    files: Sequence[tuple[str, int]]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    device: torch.device
    workers: int

    def __len__(self) -> int:
        return len(self.files)

    def part(self, where: slice) -> "FolderSplit":
        return FolderSplit(self.files[where], self.mean, self.std, self.device, self.workers)

    def batches(self, chosen: list[list[int]], augment: bool, seed: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Images float32 [B, 3, 224, 224] and labels int64 [B] on the device, for each list of indices."""
        loader = DataLoader(
            _Files(self.files, _transform(self.mean, self.std, augment), seed), batch_sampler=chosen,
            num_workers=self.workers, pin_memory=self.device.type == "cuda", generator=torch.Generator(),
            worker_init_fn=outlive_signals,
        )  # fmt: skip
        try:
            for images, labels in loader:
                images = images.to(self.device, memory_format=torch.channels_last, non_blocking=True)
                yield images, labels.to(self.device, non_blocking=True)
        except UserError as error:  # of a worker: its message comes wrapped in the worker's traceback
            raise UserError(str(error).strip().splitlines()[-1].removeprefix("utils.cli.UserError: ")) from None


class FolderBatches:
    """Shuffled, augmented batches of a split; the images of a step are shared out to the processes of `world`."""

    def __init__(self, split: FolderSplit, batch_size: int, seed: int, world: World) -> None:
        self.split, self.batch_size, self.seed, self.world = split, batch_size, seed, world

    def __len__(self) -> int:
        return -(-len(self.split) // self.batch_size)

    @property
    def sizes(self) -> list[int]:
        """Number of images of each step, of all processes."""
        return step_sizes(len(self.split), self.batch_size)

    def epoch(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """This process's part of the batches of one epoch."""
        number = self.seed * 2**20 + epoch
        order = torch.randperm(len(self.split), generator=torch.Generator().manual_seed(number))
        chosen = [self.world.share(step).tolist() for step in order.split(self.batch_size)]
        yield from self.split.batches(chosen, augment=True, seed=number)


def load_folder(
    data_dir: str | Path, mean: Sequence[float], std: Sequence[float], device: torch.device, workers: int
) -> tuple[FolderSplit, FolderSplit, list[str]]:
    """The training and the validation images in `data_dir`, and the class names.

    Raises UserError for a folder without train/ and val/, without classes or images, and where their classes differ.
    """
    parts = []
    for name in ("train", "val"):
        try:
            parts.append(ImageFolder(Path(data_dir) / name))
        except (OSError, FileNotFoundError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(
                f"--data_dir {data_dir}: {name}/ must hold a folder of images for each class ({reason})"
            ) from None
    train, val = parts
    # In a fixed shuffle, not class by class: --val_split takes the last images.
    shuffled = torch.randperm(len(train.samples), generator=torch.Generator().manual_seed(0)).tolist()
    train.samples = [train.samples[index] for index in shuffled]
    if train.classes != val.classes:
        odd = sorted(set(train.classes) ^ set(val.classes))
        raise UserError(f"--data_dir {data_dir}: train/ and val/ have different classes: {', '.join(odd[:5])}")
    if len(train.classes) < 2:
        raise UserError(f"--data_dir {data_dir}: train/ has one class, {train.classes[0]}: two are needed at least")
    splits = (FolderSplit(part.samples, tuple(mean), tuple(std), device, workers) for part in parts)
    return *splits, train.classes
