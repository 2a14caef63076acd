"""Images in folders, one folder per class, with ImageNet's standard augmentation; for sets too large for a device.

<data_dir>/train/<class>/*.jpg and <data_dir>/val/<class>/*.jpg. Files are decoded, cropped to the spec's size and
flipped by worker processes; order, crops and flips of an epoch depend only on (seed, epoch). utils/data/images.py
converts 16-bit pixels and applies EXIF orientations.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from utils.cli import SPEAKER, UserError, first_line, warn
from utils.data.images import check_header, read_image
from utils.data.specs import DataSpec
from utils.data.split import LabelledBatch, Split, TrainBatches
from utils.distributed import ALONE, World
from utils.progress import shown
from utils.signals import outlive_signals

EVAL_BATCH_SIZE = 128
CHECKED_AT_ONCE = 64  # files
STAND_INS = 10  # damaged images one after the other, after which the folder is taken to be damaged


def middle(spec: DataSpec) -> v2.Compose:
    """PIL image -> uint8 [3, spec.size, spec.size]: what a network sees of an image in evaluation."""
    return v2.Compose([v2.Resize(spec.resized), v2.CenterCrop(spec.size), v2.ToImage()])


def pixels(paths: Sequence[str], spec: DataSpec) -> Tensor:
    """The image files as a network for `spec` gets them, before normalization: uint8 [N, S, S, 3]."""
    look = middle(spec)
    return torch.stack([look(read_image(path)).permute(1, 2, 0) for path in paths])


def _transform(spec: DataSpec, augment: bool) -> v2.Compose:
    """PIL image -> normalized float32 [3, spec.size, spec.size]."""
    cut: Any = middle(spec)
    if augment:
        cut = v2.Compose([v2.RandomResizedCrop(spec.size), v2.RandomHorizontalFlip(), v2.ToImage()])
    moments = [m / 255 for m in spec.mean], [s / 255 for s in spec.std]
    return v2.Compose([cut, v2.ToDtype(torch.float32, scale=True), v2.Normalize(*moments)])


class _Files(torch.utils.data.Dataset[Any]):
    """Images and labels, augmented with `seed`, or as they are for None; each with the number of the file it is from.

    In training the next whole image takes the place of a damaged one, so that it costs no epoch.
    """

    def __init__(self, files: Sequence[tuple[str, int]], spec: DataSpec, seed: int | None) -> None:
        self.files, self.seed, self.transform = files, seed, _transform(spec, augment=seed is not None)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int, int]:
        if self.seed is None:
            return self.transform(read_image(self.files[index][0])), self.files[index][1], index
        image, source = self.whole_image(index)
        # Crop and flip depend only on (seed, epoch, image), whichever process or worker draws them.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed((self.seed * 2**26 + index) % 2**63)  # the CPU's only
            return self.transform(image), self.files[source][1], source

    def whole_image(self, index: int) -> tuple[Image.Image, int]:
        """The image of file `index`, or of the first one behind it that can be read, and its number."""
        for step in range(STAND_INS):
            source = (index + step) % len(self.files)
            try:
                return read_image(self.files[source][0]), source
            except UserError as error:
                last = error
        raise last


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
        self.damaged: set[int] = set()  # training images that have been named

    def __len__(self) -> int:
        return len(self.files)

    def part(self, where: slice) -> "FolderSplit":
        return FolderSplit(self.files[where], self.spec, self.device, self.workers)

    def relabeled(self, numbers: Sequence[int]) -> "FolderSplit":
        files = [(path, numbers[label]) for path, label in self.files]
        return FolderSplit(files, self.spec, self.device, self.workers)

    def chosen(self, indices: Iterable[Tensor]) -> Iterator[LabelledBatch]:
        return self.read([part.tolist() for part in indices])

    def pixels(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        chosen = [self.files[index] for index in indices.tolist()]
        images, labels = pixels([path for path, _ in chosen], self.spec), torch.tensor([label for _, label in chosen])
        return images.to(self.device), labels.to(self.device)

    def shuffled(self, batch_size: int, seed: int, world: World = ALONE) -> "FolderBatches":
        return FolderBatches(self, batch_size, seed, world)

    def read(self, chosen: list[list[int]], seed: int | None = None) -> Iterator[LabelledBatch]:
        """Images float32 [B, 3, S, S] and labels int64 [B] on the device, for each list of indices.

        With `seed` they are augmented, for training, and whole images take the place of damaged ones, with a warning.
        """
        loader = DataLoader(
            _Files(self.files, self.spec, seed), batch_sampler=chosen,
            num_workers=self.workers, pin_memory=self.device.type == "cuda", generator=torch.Generator(),
            worker_init_fn=outlive_signals,
        )  # fmt: skip
        for (images, labels, sources), wanted in zip(_read(loader), chosen):  # the loader first, so that it ends
            for index in set(wanted) - set(sources.tolist()) - self.damaged:
                self.damaged.add(index)
                warn(f"{self.trouble(index)}; until then the next image takes its place in training", SPEAKER)
            images = images.to(self.device, memory_format=torch.channels_last, non_blocking=True)
            yield images, labels.to(self.device, non_blocking=True)

    def trouble(self, index: int) -> str:
        """Why the file of this index cannot be read."""
        try:
            read_image(self.files[index][0])
        except UserError as error:
            return str(error)
        return f"{self.files[index][0]} could not be read for a while"

    def check_files(self, whole: bool, world: World = ALONE) -> None:
        # The files are divided among the processes of `world`, and all of them raise.
        own = range(world.rank, len(self), world.size)
        loader = DataLoader(
            _Damaged([self.files[index] for index in own], whole), CHECKED_AT_ONCE, num_workers=self.workers,
            generator=torch.Generator(), worker_init_fn=outlive_signals,
        )  # fmt: skip
        title = f"checking {len(self)} {'images to evaluate on' if whole else 'training images'}"
        parts = shown(_read(loader), title, len(loader), silent=not world.is_main)
        found = torch.cat([torch.zeros(0, dtype=torch.bool), *parts])
        damaged = torch.zeros(len(self), dtype=torch.int32, device=self.device)
        damaged[own.start :: own.step] = found.to(damaged)
        indices = world.sum(damaged).nonzero().flatten().tolist()
        if indices:
            more = f" ({len(indices)} such files of {len(self)})" if len(indices) > 1 else ""
            raise UserError(f"{self.trouble(indices[0])}{more}")


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
        return self.split.read(chosen, seed=generator.initial_seed())


def load_folder(
    data_dir: str | Path, spec: DataSpec, device: torch.device, workers: int
) -> tuple[FolderSplit, FolderSplit, list[str]]:
    """The training and the validation images in `data_dir`, none of the latter without val/, and the class names.

    No more `workers` are used than there are usable cores. Raises UserError for a folder without train/, and if train/
    or val/ lacks classes or images or they have different classes.
    """
    workers = min(workers, usable_cores())
    files, classes = _images_in(data_dir, "train")
    # In a fixed shuffle, not class by class: --val_split takes the last images.
    shuffled = torch.randperm(len(files), generator=torch.Generator().manual_seed(0)).tolist()
    held, held_classes = _images_in(data_dir, "val") if (Path(data_dir) / "val").exists() else ([], classes)
    if classes != held_classes:
        odd = sorted(set(classes) ^ set(held_classes))
        raise UserError(f"--data_dir {data_dir}: train/ and val/ have different classes: {', '.join(odd[:5])}")
    if len(classes) < 2:
        raise UserError(f"--data_dir {data_dir}: train/ has one class, {classes[0]}: at least two are needed")
    training, validation = (
        FolderSplit(part, spec, device, workers) for part in ([files[index] for index in shuffled], held)
    )
    return training, validation, classes


def _images_in(data_dir: str | Path, part: str) -> tuple[list[tuple[str, int]], list[str]]:
    """The (path, label) of the images in a folder for each class, and the class names."""
    try:
        found = ImageFolder(Path(data_dir) / part)
    except OSError as error:
        raise UserError(
            f"--data_dir {data_dir}: {part}/ must hold a folder of images for each class ({first_line(error)})"
        ) from None
    return found.samples, found.classes
