"""Splits that live on the device as uint8; batches are cut, flipped and normalized there."""

from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from utils.data.specs import DataSpec
from utils.data.split import LabelledBatch, Split, TrainBatches
from utils.distributed import ALONE, World

CROP_PADDING = 4
# Small batches stay in a CPU's caches; a GPU needs large ones.
EVAL_BATCH_SIZE = {"cpu": 100, "cuda": 1000}


@lru_cache
def _moments(spec: DataSpec, device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean and std on `device`, made once: nothing can be copied there inside a CUDA graph."""
    return torch.tensor(spec.mean, device=device), torch.tensor(spec.std, device=device)


def normalize(images: Tensor, spec: DataSpec) -> Tensor:
    """uint8 [N, H, W, 3] -> float32 [N, 3, H, W], normalized for each channel, in channels_last layout."""
    mean, std = _moments(spec, images.device)
    return images.float().sub_(mean).div_(std).permute(0, 3, 1, 2)


class InMemorySplit(Split):
    """Images uint8 [N, S, S, 3] and labels int64 [N], on one device."""

    def __init__(self, images: Tensor, labels: Tensor, spec: DataSpec) -> None:
        self.images, self.labels, self.spec = images, labels, spec
        self.device = images.device
        self.eval_batch_size = EVAL_BATCH_SIZE.get(self.device.type, 500)

    def __len__(self) -> int:
        return len(self.labels)

    def part(self, where: slice) -> "InMemorySplit":
        return InMemorySplit(self.images[where], self.labels[where], self.spec)

    def relabeled(self, numbers: Sequence[int]) -> "InMemorySplit":
        return InMemorySplit(self.images, torch.tensor(numbers, device=self.device)[self.labels], self.spec)

    def chosen(self, indices: Iterable[Tensor]) -> Iterator[LabelledBatch]:
        for where in indices:
            where = where.to(self.device)
            yield normalize(self.images[where], self.spec), self.labels[where]

    def pixels(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        return self.images[indices], self.labels[indices]

    def shuffled(self, batch_size: int, seed: int, world: World = ALONE) -> "CroppedBatches":
        return CroppedBatches(self, batch_size, seed, world)


class CroppedBatches(TrainBatches):
    """Reflect-padded crops and, where valid, mirror images of a split in memory."""

    def __init__(self, split: InMemorySplit, batch_size: int, seed: int, world: World = ALONE) -> None:
        super().__init__(split, batch_size, seed, world)
        self.split = split
        device, size = split.device, split.images.shape[1]
        # Row (or column) of the source image that lies at each position of the reflect-padded one.
        self.source = torch.nn.functional.pad(
            torch.arange(size, dtype=torch.float32)[None], (CROP_PADDING, CROP_PADDING), mode="reflect"
        )[0].long().to(device)  # fmt: skip
        self.window = torch.arange(size, device=device)

    def plan(self, epoch: int) -> tuple[Tensor, Tensor, Tensor]:
        """For one epoch: the order of the images, int64 [N]; their (row, column) shifts in 0..8, int64 [2, N]; and
        which are mirrored, bool [N].
        """
        generator, device = self.generator(epoch), self.split.device
        order = torch.randperm(self.count, generator=generator)
        shifts = torch.randint(2 * CROP_PADDING + 1, (2, len(order)), generator=generator)
        mirrored = (torch.randint(2, (len(order),), generator=generator) == 1) & self.split.spec.flip
        return order.to(device), shifts.to(device), mirrored.to(device)

    def batch(self, chosen: Tensor, shifts: Tensor, mirrored: Tensor) -> LabelledBatch:
        """Images float32 [B, 3, S, S] channels_last and labels int64 [B] of a part of a plan."""
        return normalize(self.crop(chosen, shifts, mirrored), self.split.spec), self.split.labels[chosen]

    def epoch(self, epoch: int) -> Iterator[LabelledBatch]:
        order, shifts, mirrored = self.plan(epoch)
        for where in torch.arange(len(order), device=order.device).split(self.batch_size):
            where = self.world.share(where)
            yield self.batch(order[where], shifts[:, where], mirrored[where])

    def crop(self, chosen: Tensor, shifts: Tensor, mirrored: Tensor) -> Tensor:
        """uint8 crops [B, S, S, 3] of the images `chosen` [B] at the (row, column) `shifts` [2, B] in 0..8."""
        rows = self.source[shifts[0][:, None] + self.window]
        across = torch.where(mirrored[:, None], self.window.flip(0), self.window)
        columns = self.source[shifts[1][:, None] + across]
        return self.split.images[chosen[:, None, None], rows[:, :, None], columns[:, None, :]]
