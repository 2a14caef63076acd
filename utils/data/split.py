"""Labeled images that give their own batches: what splits in memory and in folders have in common."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from utils.cli import Default, UserError, warn
from utils.data.specs import DataSpec
from utils.distributed import ALONE, World

LabelledBatch = tuple[Tensor, Tensor]  # float32 [B, 3, S, S], normalized, channels_last; int64 [B]


class Split(ABC):
    """The training or the test images of a data set."""

    spec: DataSpec
    device: torch.device
    eval_batch_size: int  # images at a time in evaluation

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def part(self, where: slice) -> "Split":
        """The images at `where`: a view, not a copy."""

    @abstractmethod
    def relabeled(self, numbers: Sequence[int]) -> "Split":
        """The same images, with numbers[label] for each label."""

    @abstractmethod
    def chosen(self, indices: Iterable[Tensor]) -> Iterator[LabelledBatch]:
        """A batch for each tensor of indices int64 [B] (CPU), without augmentation."""

    @abstractmethod
    def pixels(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """The images of these indices int64 [N] before normalization, uint8 [N, S, S, 3], and their labels."""

    @abstractmethod
    def shuffled(self, batch_size: int, seed: int, world: World = ALONE) -> "TrainBatches":
        """Shuffled, augmented batches for training, of which each process of `world` takes its part."""

    def check_files(self, whole: bool, world: World = ALONE) -> None:  # noqa: B027 - images in memory have no files
        """Raises UserError, which names the first one, if there are image files that cannot be read.

        `whole` decodes each, as an evaluation does. Otherwise only their headers are read.
        """

    def batches(self, batch_size: int) -> Iterator[LabelledBatch]:
        """All images in order, without augmentation."""
        return self.chosen(torch.arange(len(self)).split(batch_size))

    def calibration(self, count: int, seed: int, batch_size: int = 256) -> Iterator[LabelledBatch]:
        """`count` images drawn with `seed`, without augmentation, in batches of nearly equal size, because
        batch-norm statistics average over batches."""
        drawn = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))[:count]
        return self.chosen(drawn.tensor_split(-(-len(drawn) // batch_size)))

    def count_for(self, count: int, flag: str = "--calib_images") -> int:
        """How many images to calibrate with, if `flag` asks for `count`.

        If there are fewer, and `count` is the flag's default (cli.Default), all are taken, with a warning. Raises
        UserError if there are fewer and the user gave `count`.
        """
        if count <= len(self):
            return count
        if not isinstance(count, Default):
            raise UserError(f"{flag} {count} is more than the {len(self)} training images")
        warn(f"all {len(self)} training images are taken: there are fewer than {flag} {count}")
        return len(self)


class TrainBatches(ABC):
    """Shuffled, augmented, normalized batches of a split.

    Order and augmentation of an epoch depend only on (seed, epoch) and are the same on every device, so that a resumed
    run sees the same batches. The last batch of an epoch may be short.
    """

    def __init__(self, split: Split, batch_size: int, seed: int, world: World = ALONE) -> None:
        self.count, self.batch_size, self.seed, self.world = len(split), batch_size, seed, world

    def __len__(self) -> int:
        return len(self.sizes)

    @property
    def sizes(self) -> list[int]:
        """Number of images of each step, of all processes together."""
        return [min(self.batch_size, self.count - start) for start in range(0, self.count, self.batch_size)]

    def generator(self, epoch: int) -> torch.Generator:
        """The source of an epoch's order and augmentation."""
        return torch.Generator().manual_seed(self.seed * 2**20 + epoch)

    @abstractmethod
    def epoch(self, epoch: int) -> Iterator[LabelledBatch]:
        """The batches of one epoch, or this process's part of them."""
