"""Data sets that live on the device as uint8, and batches cut, flipped and normalised there.

A set is looked for as `<data_dir>/<name>.npz` (keys x_train, y_train, x_test, y_test, classes; uint8 NHWC images), then
as torchvision's archive in data_dir, then downloaded by torchvision. `digits` comes with scikit-learn.
`imagefolder` is read image by image (utils/imagefolder.py) and has the same kinds of batches.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from utils.cli import UserError, first_line
from utils.distributed import ALONE, World

if TYPE_CHECKING:
    from utils.imagefolder import FolderBatches, FolderSplit  # which imports torchvision

IMAGE_SIZE = 32
CROP_PADDING = 4
TRAIN_DIGITS = 1437  # four fifths of scikit-learn's 1,797


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
    if name == "digits":
        arrays = _digits()
        source = "scikit-learn's digits"
    else:
        path = Path(data_dir) / f"{name}.npz"
        arrays = _read_npz(path) if path.exists() else _torchvision(name, Path(data_dir), path)
        source = str(path)
    _check(arrays, source)

    def split(part: str) -> Split:
        images, labels = arrays[f"x_{part}"], arrays[f"y_{part}"].astype(np.int64)
        return Split(torch.from_numpy(images).to(device), torch.from_numpy(labels).to(device))

    return Dataset(name, split("train"), split("test"), [str(label) for label in arrays["classes"]])


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    keys = ("x_train", "y_train", "x_test", "y_test", "classes")
    try:
        with np.load(path, allow_pickle=False) as archive:
            missing = [key for key in keys if key not in archive]
            if missing:
                raise UserError(f"{path} lacks {', '.join(missing)}: it needs the keys {', '.join(keys)}")
            return {key: archive[key] for key in keys}
    except UserError:
        raise
    except Exception as error:  # the bytes of a foreign file can raise anything
        raise UserError(
            f"{path} is not a readable .npz of plain arrays ({first_line(error)}): make it again or delete it"
        ) from None


def _torchvision(name: str, data_dir: Path, npz: Path) -> dict[str, np.ndarray]:
    from torchvision.datasets import CIFAR10, CIFAR100

    cls = {"cifar10": CIFAR10, "cifar100": CIFAR100}[name]
    try:
        train, test = (cls(data_dir, train=part, download=True) for part in (True, False))
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"no {name} data: {npz} is not there and the download failed ({first_line(error)}); "
            "put the file there, or try --dataset digits, which needs none"
        ) from None
    return {
        "x_train": train.data, "y_train": np.array(train.targets),
        "x_test": test.data, "y_test": np.array(test.targets),
        "classes": np.array(train.classes),
    }  # fmt: skip


def _digits() -> dict[str, np.ndarray]:
    """scikit-learn's 8x8 digits in a fixed shuffle, scaled to 0..255 and resized to 32x32x3."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = torch.from_numpy(bunch.images).float()[:, None] * (255 / 16)
    images = torch.nn.functional.interpolate(images, size=(IMAGE_SIZE, IMAGE_SIZE), mode="bilinear")
    images = images.round().to(torch.uint8).permute(0, 2, 3, 1).expand(-1, -1, -1, 3).contiguous().numpy()
    order = np.random.default_rng(0).permutation(len(images))
    train, test = order[:TRAIN_DIGITS], order[TRAIN_DIGITS:]
    labels = bunch.target
    return {
        "x_train": images[train], "y_train": labels[train], "x_test": images[test], "y_test": labels[test],
        "classes": bunch.target_names,
    }  # fmt: skip


def _check(arrays: dict[str, np.ndarray], source: str) -> None:
    classes = arrays["classes"]
    if classes.ndim != 1 or len(classes) < 2:
        raise UserError(f"{source}: classes must list at least two names, has shape {classes.shape}")
    for part in ("train", "test"):
        images, labels = arrays[f"x_{part}"], arrays[f"y_{part}"]
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1:] != (IMAGE_SIZE, IMAGE_SIZE, 3):
            raise UserError(
                f"{source}: x_{part} must be uint8 [N, {IMAGE_SIZE}, {IMAGE_SIZE}, 3], "
                f"is {images.dtype} {list(images.shape)}"
            )
        if labels.ndim != 1 or len(labels) != len(images) or not len(labels):
            raise UserError(f"{source}: y_{part} {list(labels.shape)} does not match {len(images)} images of x_{part}")
        if not np.issubdtype(labels.dtype, np.integer):
            raise UserError(f"{source}: y_{part} must hold whole numbers, is {labels.dtype}")
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high >= len(classes):
            raise UserError(f"{source}: labels of y_{part} run from {low} to {high}, outside 0..{len(classes) - 1}")


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


def check_calib_images(count: int, split: "Split | FolderSplit", flag: str = "--calib_images") -> None:
    """Raises UserError if `split` has fewer than `count` images: look before the work that comes before calibration."""
    if count > len(split):
        raise UserError(f"{flag} {count} is more than the {len(split)} training images")


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
