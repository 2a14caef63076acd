"""What is known about each data set without its images. Imports no torch, so that the scripts' --help is quick."""

from dataclasses import dataclass, replace
from pathlib import Path

from utils.cli import UserError


@dataclass(frozen=True)
class DataSpec:
    """Facts of a data set.

    `mean` and `std` are those of the training images for each channel, in units of 0..255. `flip` says whether a
    mirrored image is valid. `size` is the number of pixels per side of the images that a network gets. `classes` is
    the number of classes, None if folders of image files determine it. `archives` are the names of the file that
    torchvision downloads and of the folder that it unpacks.
    """

    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    flip: bool
    size: int = 32
    classes: int | None = None
    archives: tuple[str, ...] = ()

    @property
    def resized(self) -> int:
        """Pixels of the shorter side of an image file before the middle of it is cut out: ImageNet's 256 for 224, and
        no margin for data sets whose images are used whole."""
        return round(self.size * 256 / 224) if self.classes is None else self.size


DATASETS = {
    "cifar100": DataSpec(
        (129.3, 124.1, 112.4), (68.2, 65.4, 70.4), flip=True, classes=100,
        archives=("cifar-100-python.tar.gz", "cifar-100-python"),
    ),
    "cifar10": DataSpec(
        (125.3, 123.0, 113.9), (63.0, 62.1, 66.7), flip=True, classes=10,
        archives=("cifar-10-python.tar.gz", "cifar-10-batches-py"),
    ),
    "digits": DataSpec((77.9, 77.9, 77.9), (87.3, 87.3, 87.3), flip=False, classes=10),
    "imagefolder": DataSpec((123.675, 116.28, 103.53), (58.395, 57.12, 57.375), flip=True, size=224),
}  # fmt: skip
DEFAULT = "cifar100"  # of networks whose file does not name their data set, such as the published files


def spec_of(name: str, image_size: int | None = None) -> DataSpec:
    """The facts of the data set `name`, with images of image_size x image_size; None stands for its usual size.

    Raises UserError for an unknown name, and for another size than that of a data set whose images have one.
    """
    if name not in DATASETS:
        raise UserError(f"unknown data set {name!r}: --dataset is one of {', '.join(DATASETS)}")
    spec = DATASETS[name]
    if image_size in (None, spec.size):
        return spec
    if spec.classes is not None:
        raise UserError(f"--image_size {image_size}: the images of {name} are {spec.size} x {spec.size}; leave it out")
    return replace(spec, size=image_size)


def at_hand(name: str, data_dir: str | Path) -> bool:
    """Whether the training images of the data set `name` are there without a download."""
    if name == "digits":
        return True
    if name == "imagefolder":
        return (Path(data_dir) / "train").is_dir()
    return any((Path(data_dir) / file).exists() for file in (f"{name}.npz", *DATASETS[name].archives))
