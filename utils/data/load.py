"""Data sets by name."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from utils.cli import UserError
from utils.data.in_memory import InMemorySplit
from utils.data.sources import find_arrays
from utils.data.specs import DataSpec, spec_of
from utils.data.split import Split


@dataclass
class Dataset:
    name: str
    train: Split
    test: Split
    classes: list[str]

    @property
    def spec(self) -> DataSpec:
        return self.train.spec

    def splits(self, val_split: int = 0) -> tuple[Split, Split, str]:
        """The split to train on, the one to evaluate on, and the latter's name: the training and the test images, or
        with `val_split` N the training images without the last N, and these N ("validation"). Views, not copies.

        Raises UserError if no training image would be left, and without `val_split` if there are no test images.
        """
        if not val_split:
            if not len(self.test):
                raise UserError(f"there is no val/ beside {self.name}'s train/: evaluate on --val_split N images of it")
            return self.train, self.test, "test"
        if val_split >= len(self.train):
            raise UserError(f"--val_split {val_split} leaves none of the {len(self.train)} training images")
        border = len(self.train) - val_split
        return self.train.part(slice(border)), self.train.part(slice(border, None)), "validation"

    def in_order_of(self, classes: list[str]) -> "Dataset":
        """The same images, with labels that index `classes`: this set's own, in any order."""
        numbers = [classes.index(name) for name in self.classes]
        train, test = self.train.relabeled(numbers), self.test.relabeled(numbers)
        return replace(self, train=train, test=test, classes=list(classes))


def load_dataset(
    name: str, data_dir: str | Path, device: torch.device, workers: int = 0, image_size: int | None = None
) -> Dataset:
    """The data set `name` (a key of DATASETS), checked: as uint8 on `device`, or as file names for imagefolder.

    `workers` is the number of processes that read images of an imagefolder; 0: this one. `image_size` is the number of
    pixels per side that its images are cut to (default 224). Without a val/ folder its test split is empty. Raises
    UserError for a file that is not as utils/data/sources.py says, or if the set is not available.
    """
    spec = spec_of(name, image_size)
    if name == "imagefolder":
        from utils.data.folder import load_folder  # which imports torchvision

        return Dataset(name, *load_folder(data_dir, spec, device, workers))
    arrays = find_arrays(name, Path(data_dir))

    def split(part: str) -> InMemorySplit:
        images, labels = arrays[f"x_{part}"], arrays[f"y_{part}"].astype(np.int64)
        return InMemorySplit(torch.from_numpy(images).to(device), torch.from_numpy(labels).to(device), spec)

    return Dataset(name, split("train"), split("test"), [str(label) for label in arrays["classes"]])
