"""Data sets that live on the device as uint8, and batches cut, flipped and normalised there.

utils/sources.py finds them. `imagefolder` is read image by image (utils/imagefolder.py) and has the same kinds of
batches.
"""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from utils.cli import Default, UserError
from utils.distributed import ALONE, World
from utils.sources import IMAGE_SIZE, find_arrays

if TYPE_CHECKING:
    from utils.imagefolder import FolderBatches, FolderSplit  # which imports torchvision

CROP_PADDING = 4


@dataclass(frozen=True)
class DataSpec:
    """Per-channel mean and std of the training images, in units of 0..255, whether a mirrored image is valid, and the
    pixels on a side of what a network is given."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    flip: bool
    size: int = 32


DATASETS = {
    "cifar100": DataSpec((129.3, 124.1, 112.4), (68.2, 65.4, 70.4), flip=True),
    "cifar10": DataSpec((125.3, 123.0, 113.9), (63.0, 62.1, 66.7), flip=True),
    "digits": DataSpec((77.9, 77.9, 77.9), (87.3, 87.3, 87.3), flip=False),
    "imagefolder": DataSpec((123.675, 116.28, 103.53), (58.395, 57.12, 57.375), flip=True, size=224),
}


@dataclass
class Split:
    """Images uint8 [N, 32, 32, 3] and labels int64 [N], on one device."""

    images: Tensor
    labels: Tensor

    @property
    def device(self) -> torch.device:
        return self.images.device

    def __len__(self) -> int:
        return len(self.labels)

    def part(self, where: slice) -> "Split":
        return Split(self.images[where], self.labels[where])

    def relabelled(self, numbers: Sequence[int]) -> "Split":
        """The same images, with numbers[label] for each label."""
        return Split(self.images, torch.tensor(numbers, device=self.labels.device)[self.labels])


@dataclass
class Dataset:
    name: str
    train: "Split | FolderSplit"
    test: "Split | FolderSplit"
    classes: list[str]

    @property
    def spec(self) -> DataSpec:
        return DATASETS[self.name]

    def splits(self, val_split: int = 0) -> "tuple[Split | FolderSplit, Split | FolderSplit, str]":
        """What to train and to evaluate on, and the latter's name: the training and the test images, or with
        `val_split` N the training images without the last N, and those ("validation"): views, no copy.

        Raises UserError if no training image would be left.
        """
        if not val_split:
            return self.train, self.test, "test"
        if val_split >= len(self.train):
            raise UserError(f"--val_split {val_split} leaves nothing of the {len(self.train)} training images")
        border = len(self.train) - val_split
        return self.train.part(slice(border)), self.train.part(slice(border, None)), "validation"

    def in_order_of(self, classes: list[str]) -> "Dataset":
        """The same images, with labels that count in `classes`, which are this set's own in any order."""
        numbers = [classes.index(name) for name in self.classes]
        train, test = self.train.relabelled(numbers), self.test.relabelled(numbers)
        return replace(self, train=train, test=test, classes=list(classes))


def load_dataset(name: str, data_dir: str | Path, device: torch.device, workers: int = 0) -> Dataset:
    """The data set `name` (a key of DATASETS), checked, as uint8 on `device`; of imagefolder the file names.

    `workers` is the number of processes that read images of an imagefolder; 0: this one. Raises UserError for a file
    that is not what the module's docstring says, or if the set cannot be had.
    """
    if name not in DATASETS:
        raise UserError(f"unknown data set {name!r}: --dataset is one of {', '.join(DATASETS)}")
    if name == "imagefolder":
        from utils.imagefolder import load_folder

        spec = DATASETS[name]
        return Dataset(name, *load_folder(data_dir, spec.mean, spec.std, device, workers))
    arrays = find_arrays(name, Path(data_dir))

    def split(part: str) -> Split:
        images, labels = arrays[f"x_{part}"], arrays[f"y_{part}"].astype(np.int64)
        return Split(torch.from_numpy(images).to(device), torch.from_numpy(labels).to(device))

    return Dataset(name, split("train"), split("test"), [str(label) for label in arrays["classes"]])


@lru_cache
def _moments(spec: DataSpec, device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean and std on `device`, made once: in a CUDA graph nothing can be copied there."""
    return torch.tensor(spec.mean, device=device), torch.tensor(spec.std, device=device)


def normalize(images: Tensor, spec: DataSpec) -> Tensor:
    """uint8 [N, H, W, 3] -> float32 [N, 3, H, W], normalised per channel, in channels_last layout."""
    mean, std = _moments(spec, images.device)
    return images.float().sub_(mean).div_(std).permute(0, 3, 1, 2)


def eval_batches(split: "Split | FolderSplit", spec: DataSpec, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Normalised images and labels of `split` in order, without augmentation."""
    if not isinstance(split, Split):
        chosen = torch.arange(len(split)).split(batch_size)
        yield from split.batches([part.tolist() for part in chosen], augment=False)
        return
    for start in range(0, len(split), batch_size):
        part = split.part(slice(start, start + batch_size))
        yield normalize(part.images, spec), part.labels


def check_files(train: "Split | FolderSplit", test: "Split | FolderSplit", world: World = ALONE) -> None:
    """Raises UserError, naming the first, if image files are damaged, before an epoch is spent on the others.

    Those to evaluate on are decoded, which costs an evaluation at most: they are first needed when an epoch of training
    is done. Of those to train on the headers alone are read, which is cheap, as decoding costs an epoch.
    """
    if not isinstance(train, Split):
        train.check(whole=False, world=world)
        test.check(whole=True, world=world)


def calib_images(count: int, split: "Split | FolderSplit", flag: str = "--calib_images") -> int:
    """How many images of `split` to take, `count`: look before the work that comes before calibration.

    If there are fewer, they are all taken, with a warning, where `count` is a flag's default (cli.Default); where it
    was asked for, that is a UserError.
    """
    if count <= len(split):
        return count
    if not isinstance(count, Default):
        raise UserError(f"{flag} {count} is more than the {len(split)} training images")
    print(f"warning: all {len(split)} training images are taken: {flag} {count} would be more", file=sys.stderr)
    return len(split)


def calibration_batches(
    split: "Split | FolderSplit", spec: DataSpec, count: int, seed: int, batch_size: int = 256
) -> Iterator[tuple[Tensor, Tensor]]:
    """Normalised images, no augmentation, and labels of `count` examples of `split` drawn with `seed`."""
    chosen = torch.randperm(len(split), generator=torch.Generator().manual_seed(seed))[:count]
    # In parts of nearly equal size: batch-norm statistics average over batches.
    parts = chosen.tensor_split(-(-len(chosen) // batch_size))
    if not isinstance(split, Split):
        yield from split.batches([part.tolist() for part in parts], augment=False)
        return
    for where in parts:
        where = where.to(split.images.device)
        yield normalize(split.images[where], spec), split.labels[where]


def step_sizes(images: int, batch_size: int) -> list[int]:
    """Number of images of each step of an epoch; the last may have fewer than batch_size."""
    return [min(batch_size, images - start) for start in range(0, images, batch_size)]


class TrainBatches:
    """Shuffled, augmented, normalised batches of a split: reflect-padded crops and, where valid, mirror images.

    Order and augmentation of an epoch come from (seed, epoch) alone and are the same on every device, so a resumed
    run sees the same batches. The last batch of an epoch may be short. Batches are shared out to the processes of
    `world`.
    """

    def __init__(self, split: Split, spec: DataSpec, batch_size: int, seed: int, world: World = ALONE) -> None:
        self.split, self.spec, self.batch_size, self.seed, self.world = split, spec, batch_size, seed, world
        device = split.images.device
        # Row (or column) of the source image that lies at each position of the reflect-padded one.
        self.source = torch.nn.functional.pad(
            torch.arange(IMAGE_SIZE, dtype=torch.float32)[None], (CROP_PADDING, CROP_PADDING), mode="reflect"
        )[0].long().to(device)  # fmt: skip
        self.window = torch.arange(IMAGE_SIZE, device=device)

    def __len__(self) -> int:
        return -(-len(self.split) // self.batch_size)

    @property
    def sizes(self) -> list[int]:
        """Number of images of each step, of all processes."""
        return step_sizes(len(self.split), self.batch_size)

    def plan(self, epoch: int) -> tuple[Tensor, Tensor, Tensor]:
        """Of one epoch: the order of the images int64 [N], their (row, column) shifts in 0..8 int64 [2, N], and which
        are mirrored, bool [N].
        """
        device = self.split.images.device
        generator = torch.Generator().manual_seed(self.seed * 2**20 + epoch)
        order = torch.randperm(len(self.split), generator=generator)
        shifts = torch.randint(2 * CROP_PADDING + 1, (2, len(order)), generator=generator)
        mirrored = (torch.randint(2, (len(order),), generator=generator) == 1) & self.spec.flip
        return order.to(device), shifts.to(device), mirrored.to(device)

    def batch(self, chosen: Tensor, shifts: Tensor, mirrored: Tensor) -> tuple[Tensor, Tensor]:
        """Images float32 [B, 3, 32, 32] channels_last and labels int64 [B] of a part of a plan."""
        return normalize(self.crop(chosen, shifts, mirrored), self.spec), self.split.labels[chosen]

    def epoch(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of one epoch, or this process's part of them."""
        order, shifts, mirrored = self.plan(epoch)
        for where in torch.arange(len(order), device=order.device).split(self.batch_size):
            where = self.world.share(where)
            yield self.batch(order[where], shifts[:, where], mirrored[where])

    def crop(self, chosen: Tensor, shifts: Tensor, mirrored: Tensor) -> Tensor:
        """uint8 crops [B, 32, 32, 3] of the images `chosen` [B] at the (row, column) `shifts` [2, B] in 0..8."""
        rows = self.source[shifts[0][:, None] + self.window]
        across = torch.where(mirrored[:, None], self.window.flip(0), self.window)
        columns = self.source[shifts[1][:, None] + across]
        return self.split.images[chosen[:, None, None], rows[:, :, None], columns[:, None, :]]


def train_batches(
    split: "Split | FolderSplit", spec: DataSpec, batch_size: int, seed: int, world: World = ALONE
) -> "TrainBatches | FolderBatches":
    """Shuffled, augmented batches of either kind of split: `len`, `sizes`, and images and labels of `epoch(number)`."""
    if isinstance(split, Split):
        return TrainBatches(split, spec, batch_size, seed, world)
    from utils.imagefolder import FolderBatches

    return FolderBatches(split, batch_size, seed, world)
