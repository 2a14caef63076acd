"""Images in folders, a class a folder, with ImageNet's standard augmentation; for sets that do not fit a device.

<data_dir>/train/<class>/*.jpg and <data_dir>/val/<class>/*.jpg. Files are decoded, cropped to 224 x 224 and flipped by
worker processes; order, crops and flips of an epoch come from (seed, epoch) alone. utils/images.py has what becomes of
16-bit pixels and of EXIF orientations.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from utils.cli import UserError, first_line
from utils.data import step_sizes
from utils.distributed import ALONE, World
from utils.images import check_header, read_image
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
        image = read_image(path)
        # Crop and flip depend on (seed, epoch, image) alone, whichever process or worker draws them.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed((self.seed * 2**26 + index) % 2**63)  # a GPU's stays as it is
            return self.transform(image), label


class _Damaged(torch.utils.data.Dataset):
    """Whether each file cannot be read: whole, or its header alone."""

    def __init__(self, files: Sequence[tuple[str, int]], whole: bool) -> None:
        self.files, self.look = files, read_image if whole else check_header

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> bool:
        try:
            self.look(self.files[index][0])
        except UserError:
            return True
        return False


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

    def relabelled(self, numbers: Sequence[int]) -> "FolderSplit":
        """The same images, with numbers[label] for each label."""
        files = [(path, numbers[label]) for path, label in self.files]
        return FolderSplit(files, self.mean, self.std, self.device, self.workers)

    def batches(self, chosen: list[list[int]], augment: bool, seed: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Images float32 [B, 3, 224, 224] and labels int64 [B] on the device, for each list of indices."""
        loader = DataLoader(
            _Files(self.files, _transform(self.mean, self.std, augment), seed), batch_sampler=chosen,
            num_workers=self.workers, pin_memory=self.device.type == "cuda", generator=torch.Generator(),
            worker_init_fn=outlive_signals,
        )  # fmt: skip
        for images, labels in _read(loader):
            images = images.to(self.device, memory_format=torch.channels_last, non_blocking=True)
            yield images, labels.to(self.device, non_blocking=True)

    def check(self, whole: bool, world: World = ALONE) -> None:
        """Raises UserError, naming the first, if there are files that cannot be read.

        `whole` decodes each, as an evaluation does; else their headers alone are read. The files are shared out to the
        processes of `world`, and all of them raise.
        """
        own = range(world.rank, len(self), world.size)
        loader = DataLoader(
            _Damaged([self.files[index] for index in own], whole), 64, num_workers=self.workers,
            generator=torch.Generator(), worker_init_fn=outlive_signals,
        )  # fmt: skip
        found = torch.cat([torch.zeros(0, dtype=torch.bool), *_read(loader)])
        damaged = torch.zeros(len(self), dtype=torch.int32, device=self.device)
        damaged[own.start :: own.step] = found.to(damaged)
        indices = world.sum(damaged).nonzero().flatten().tolist()
        if indices:
            more = f" ({len(indices)} such files of {len(self)})" if len(indices) > 1 else ""
            try:
                read_image(self.files[indices[0]][0])
            except UserError as error:
                raise UserError(f"{error}{more}") from None


def _read(loader: DataLoader) -> Iterator:
    """The batches of `loader`, with a UserError in one line for what went wrong in a worker."""
    try:
        yield from loader
    except UserError as error:  # its message comes wrapped in the worker's traceback
        raise UserError(str(error).strip().splitlines()[-1].removeprefix("utils.cli.UserError: ")) from None


def usable_cores() -> int:
    """Number of cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


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

    Of `workers` no more are used than there are cores to use. Raises UserError for a folder without train/ and val/,
    without classes or images, and where their classes differ.
    """
    workers = min(workers, usable_cores())
    parts = []
    for name in ("train", "val"):
        try:
            parts.append(ImageFolder(Path(data_dir) / name))
        except (OSError, FileNotFoundError) as error:
            raise UserError(
                f"--data_dir {data_dir}: {name}/ must hold a folder of images for each class ({first_line(error)})"
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
