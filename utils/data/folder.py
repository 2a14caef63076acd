"""Images in folders, one folder per class, with ImageNet's standard augmentation; for sets too large for a device.

<data_dir>/train/<class>/*.jpg and <data_dir>/val/<class>/*.jpg. Files are decoded, cropped to 224 x 224 and flipped by
worker processes; order, crops and flips of an epoch depend only on (seed, epoch). utils/data/images.py converts 16-bit
pixels and applies EXIF orientations.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from utils.cli import UserError, first_line
from utils.data.images import check_header, read_image
from utils.data.specs import DataSpec
from utils.data.split import LabelledBatch, Split, TrainBatches
from utils.distributed import ALONE, World
from utils.signals import outlive_signals

RESIZED = 256  # pixels of the shorter side before the crop to spec.size
EVAL_BATCH_SIZE = 128


def _transform(spec: DataSpec, augment: bool) -> v2.Compose:
    """PIL image -> normalized float32 [3, spec.size, spec.size]."""
    crop: list[Any] = [v2.Resize(RESIZED), v2.CenterCrop(spec.size)]
    if augment:
        crop = [v2.RandomResizedCrop(spec.size), v2.RandomHorizontalFlip()]
    moments = [m / 255 for m in spec.mean], [s / 255 for s in spec.std]
    return v2.Compose([*crop, v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(*moments)])


class _Files(torch.utils.data.Dataset[Any]):
    def __init__(self, files: Sequence[tuple[str, int]], transform: v2.Compose, seed: int) -> None:
        self.files, self.transform, self.seed = files, transform, seed

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        path, label = self.files[index]
        image = read_image(path)
        # Crop and flip depend only on (seed, epoch, image), whichever process or worker draws them.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed((self.seed * 2**26 + index) % 2**63)  # the CPU's only
            return self.transform(image), label


class _Damaged(torch.utils.data.Dataset[Any]):
    """For each file, whether it cannot be read: as a whole, or only its header."""

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


class FolderSplit(Split):
    """(path, label) of each image; `workers` processes read the images, or this process if 0."""

    eval_batch_size = EVAL_BATCH_SIZE

    def __init__(self, files: Sequence[tuple[str, int]], spec: DataSpec, device: torch.device, workers: int) -> None:
        self.files, self.spec, self.device, self.workers = files, spec, device, workers

    def __len__(self) -> int:
        return len(self.files)

    def part(self, where: slice) -> "FolderSplit":
        return FolderSplit(self.files[where], self.spec, self.device, self.workers)

    def relabeled(self, numbers: Sequence[int]) -> "FolderSplit":
        files = [(path, numbers[label]) for path, label in self.files]
        return FolderSplit(files, self.spec, self.device, self.workers)

    def chosen(self, indices: Iterable[Tensor]) -> Iterator[LabelledBatch]:
        return self.read([part.tolist() for part in indices], augment=False)

    def shuffled(self, batch_size: int, seed: int, world: World = ALONE) -> "FolderBatches":
        return FolderBatches(self, batch_size, seed, world)

    def read(self, chosen: list[list[int]], augment: bool, seed: int = 0) -> Iterator[LabelledBatch]:
        """Images float32 [B, 3, S, S] and labels int64 [B] on the device, for each list of indices."""
        loader = DataLoader(
            _Files(self.files, _transform(self.spec, augment), seed), batch_sampler=chosen,
            num_workers=self.workers, pin_memory=self.device.type == "cuda", generator=torch.Generator(),
            worker_init_fn=outlive_signals,
        )  # fmt: skip
        for images, labels in _read(loader):
            images = images.to(self.device, memory_format=torch.channels_last, non_blocking=True)
            yield images, labels.to(self.device, non_blocking=True)

    def check_files(self, whole: bool, world: World = ALONE) -> None:
        # The files are divided among the processes of `world`, and all of them raise.
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


def _read(loader: DataLoader[Any]) -> Iterator[Any]:
    """The batches of `loader`; the UserError of a worker becomes one line."""
    try:
        yield from loader
    except UserError as error:  # its message comes wrapped in the worker's traceback
        raise UserError(str(error).strip().splitlines()[-1].removeprefix("utils.cli.UserError: ")) from None


def usable_cores() -> int:
    """Number of cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class FolderBatches(TrainBatches):
    """Random crops and mirror images of a split in folders."""

    def __init__(self, split: FolderSplit, batch_size: int, seed: int, world: World) -> None:
        super().__init__(split, batch_size, seed, world)
        self.split = split

    def epoch(self, epoch: int) -> Iterator[LabelledBatch]:
        generator = self.generator(epoch)
        order = torch.randperm(self.count, generator=generator)
        chosen = [self.world.share(step).tolist() for step in order.split(self.batch_size)]
        return self.split.read(chosen, augment=True, seed=generator.initial_seed())


def load_folder(
    data_dir: str | Path, spec: DataSpec, device: torch.device, workers: int
) -> tuple[FolderSplit, FolderSplit, list[str]]:
    """The training and the validation images in `data_dir`, and the class names.

    No more `workers` are used than there are usable cores. Raises UserError for a folder without train/ and val/, and
    if these lack classes or images or have different classes.
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
        raise UserError(f"--data_dir {data_dir}: train/ has one class, {train.classes[0]}: at least two are needed")
    training, validation = (FolderSplit(part.samples, spec, device, workers) for part in parts)
    return training, validation, train.classes
