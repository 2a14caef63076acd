"""Opens a trained network with its data set, and puts the set's labels in the order of the network's outputs."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from utils.checkpoint import DEFAULT_ARCH, dataset_name, image_size, load_checkpoint, model_from_checkpoint
from utils.cli import RANK, UserError, warn
from utils.data.load import Dataset, load_dataset
from utils.data.specs import DataSpec, at_hand, spec_of
from utils.training.checks import check_takes

DATA_DIR = "data"
NAMED = 10  # classes that a line names


def matched(dataset: Dataset, checkpoint: dict[str, Any], path: str | Path | None, transfer: bool = False) -> Dataset:
    """`dataset` with its classes in the order of the checkpoint that was read from `path`.

    A file that does not name its classes is taken to have the data set's. Raises UserError, naming the first
    difference, if the classes differ. With `transfer`, for further training, a warning is enough if their number is
    the same, and the data set's order is kept.
    """
    classes, own = checkpoint.get("classes"), dataset.classes
    if classes is None or classes == own:
        return dataset
    if sorted(classes) == sorted(own) and len(set(own)) == len(own):
        return dataset.in_order_of(classes)
    odd = difference(classes, own)
    if len(classes) != len(own):
        raise UserError(f"{path} has {len(classes)} classes, but the data set has {len(own)}: {odd}")
    told = f"{path} is for other classes than the data set: {odd}"
    if not transfer:
        raise UserError(f"{told}; give the classes the names that they had in training")
    if RANK == "0":
        warn(f"{told}; training continues with those of the data set")
    return dataset


def difference(classes: list[str], own: list[str]) -> str:
    """The first difference between the classes of a file and those of a data set, in words."""
    lost, new = ([name for name in one if name not in other] for one, other in ((classes, own), (own, classes)))
    found = [f"its {lost[0]!r} is not in the data set"] if lost else []
    found += [f"{new[0]!r} of the data set is not in the file"] if new else []
    place = next((n for n, pair in enumerate(zip(classes, own)) if pair[0] != pair[1]), min(len(classes), len(own)))
    return ", ".join(found) or f"they differ at number {place}"


def listed(classes: list[str]) -> str:
    """How many classes there are, and the names of the first ones."""
    more = ", ..." if len(classes) > NAMED else ""
    return f"{len(classes)} classes: {', '.join(classes[:NAMED])}{more}"


class Datasets:
    """The data sets of checkpoints, each loaded once.

    They are looked for in `data_dir`; None stands for the folder that a checkpoint was trained with, and for DATA_DIR
    if the data set is not there and is not an imagefolder. Images of folders are cut to `size` x `size` pixels, or as
    in training for None.
    """

    def __init__(self, data_dir: str | None, device: torch.device, workers: int = 0, size: int | None = None) -> None:
        self.data_dir, self.device, self.workers, self.size = data_dir, device, workers, size
        self._loaded: dict[tuple[str, str, int], Dataset] = {}

    def folder(self, checkpoint: dict[str, Any], name: str) -> str:
        """Where to look for the data set `name` of a checkpoint."""
        if self.data_dir is not None:
            return self.data_dir
        saved = checkpoint.get("args", {}).get("data_dir")
        own = name == dataset_name(checkpoint) == "imagefolder"  # no other folder has these images
        return saved if isinstance(saved, str) and (own or at_hand(name, saved)) else DATA_DIR

    def of(self, checkpoint: dict[str, Any], path: str | Path, name: str | None = None) -> Dataset:
        """The data set `name`, or the checkpoint's own for None, with labels in the checkpoint's order (`matched`).

        Raises UserError if it cannot be loaded, or has other classes.
        """
        name = name or dataset_name(checkpoint)
        key = name, self.folder(checkpoint, name), self.spec(checkpoint, name).size
        if key not in self._loaded:
            self._loaded[key] = self._load(*key, checkpoint, path)
        return matched(self._loaded[key], checkpoint, path)

    def spec(self, checkpoint: dict[str, Any], name: str) -> DataSpec:
        """The facts of the data set `name`, with images of the size that the network of a checkpoint gets."""
        return spec_of(name, self.size or image_size(checkpoint, name))

    def _load(self, name: str, folder: str, size: int, checkpoint: dict[str, Any], path: str | Path) -> Dataset:
        saved = checkpoint.get("args", {}).get("data_dir")
        if self.data_dir is None and name == "imagefolder" and not at_hand(name, folder):
            own = ", the folder of its training," if folder == saved else ""
            raise UserError(f"{path} needs images, but {folder}{own} has no train/: name another --data_dir")
        try:
            return load_dataset(name, folder, self.device, self.workers, size)
        except UserError as error:
            if self.data_dir is not None or saved in (None, folder):
                raise
            raise UserError(f"{error} ({path} was trained with --data_dir {saved}, which no longer has it)") from None


@dataclass
class OpenedNetwork:
    """The network of the file `path`, in eval mode on its device, with its data set, or None if that is not at hand."""

    path: str
    checkpoint: dict[str, Any]
    arch: str
    model: nn.Module
    dataset_name: str
    dataset: Dataset | None
    folder: str  # where the data set was looked for
    spec: DataSpec  # of the images that it takes

    @property
    def classes(self) -> list[str] | None:
        """The names of the classes, of the file or else of the data set; None if there are none."""
        return self.checkpoint.get("classes") or (self.dataset.classes if self.dataset else None)

    @property
    def val_split(self) -> int:
        """How many training images to evaluate on if the user does not say: none if there are test images, else as
        many as in training."""
        return 0 if len(self.data.test) else self.checkpoint.get("args", {}).get("val_split") or 0

    @property
    def data(self) -> Dataset:
        """The data set. Raises UserError if there is none."""
        if self.dataset is None:
            raise UserError(f"{self.path} needs images, and there is no {self.dataset_name} in {self.folder}")
        return self.dataset


def open_network(
    path: str | Path,
    datasets: Datasets,
    dataset: str | None = None,
    arch: str | None = None,
    data: str = "download",
    sizes: tuple[int, ...] = (),
) -> OpenedNetwork:
    """The network of the checkpoint `path` with its data set, or the one called `dataset`.

    `arch`: the architecture that it must have. `sizes`: the image sizes that are accepted, all if empty. `data`:
    "download" loads the data set, "at hand" leaves it out if that needs a download, "none" does not look for it. Raises
    UserError for what `load_checkpoint`, `model_from_checkpoint` and `Datasets.of` refuse, and for images of a size
    that is not accepted or that the network cannot take.
    """
    checkpoint = load_checkpoint(path)
    name = dataset or dataset_name(checkpoint)
    spec = datasets.spec(checkpoint, name)
    if sizes and spec.size not in sizes:
        told = " or ".join(f"{size} x {size}" for size in sizes)
        raise UserError(f"{path} is for {name}; this command takes networks for images of {told}")
    folder = datasets.folder(checkpoint, name)
    there = data == "download" or (data == "at hand" and at_hand(name, folder))
    found = datasets.of(checkpoint, path, name) if there else None
    model = model_from_checkpoint(checkpoint, path, arch, len(found.classes) if found else spec.classes)
    model.to(datasets.device)
    arch = checkpoint.get("arch") or arch or DEFAULT_ARCH
    if dataset or datasets.size:  # other images than it was trained on
        check_takes(model, f"--arch {arch}", spec.size)
    return OpenedNetwork(str(path), checkpoint, arch, model.eval(), name, found, folder, spec)
