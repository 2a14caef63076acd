"""Finds the arrays of a data set and checks them.

A set is looked for as `<data_dir>/<name>.npz` (keys x_train, y_train, x_test, y_test, classes; uint8 NHWC images), then
as torchvision's archive in data_dir, then downloaded by torchvision. `digits` comes with scikit-learn.
"""

import shutil
import tempfile
from http.client import HTTPException
from pathlib import Path

import numpy as np
import torch

from utils.cli import UserError, first_line
from utils.data.specs import at_hand

IMAGE_SIZE = 32  # of every data set here, also in its .npz file
TRAIN_DIGITS = 1437  # four fifths of scikit-learn's 1,797


def find_arrays(name: str, data_dir: Path) -> dict[str, np.ndarray]:
    """x_train, y_train, x_test, y_test and classes of the data set `name`, one of 32 x 32 images, checked.

    Raises UserError for a file that is not as the module's docstring says, or if the set is not available.
    """
    if name == "digits":
        arrays, source = _digits(), "scikit-learn's digits"
    else:
        path = data_dir / f"{name}.npz"
        arrays = _read_npz(path) if path.exists() else _torchvision(name, data_dir, path)
        source = str(path)
    _check(arrays, source)
    return arrays


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
            f"{path} is not a readable .npz of plain arrays ({first_line(error)}): recreate or delete it"
        ) from None


def _torchvision(name: str, data_dir: Path, npz: Path) -> dict[str, np.ndarray]:
    from torchvision.datasets import CIFAR10, CIFAR100

    cls = {"cifar10": CIFAR10, "cifar100": CIFAR100}[name]
    try:
        if not at_hand(name, data_dir):
            _download(cls, data_dir)
        train, test = (cls(data_dir, train=part, download=True) for part in (True, False))
    except (OSError, RuntimeError, HTTPException) as error:
        raise UserError(
            f"no {name} data: {npz} is not there and the download failed ({first_line(error)}); "
            "put the file there, or try --dataset digits, which needs no download"
        ) from None
    return {
        "x_train": train.data, "y_train": np.array(train.targets),
        "x_test": test.data, "y_test": np.array(test.targets),
        "classes": np.array(train.classes),
    }  # fmt: skip


def _download(cls: type, data_dir: Path) -> None:
    """Downloads the archive of `cls` into `data_dir`, which is made only once the archive is whole."""
    near = next(folder for folder in (data_dir, *data_dir.absolute().parents) if folder.is_dir())
    with tempfile.TemporaryDirectory(prefix=".download-", dir=near) as temporary:
        cls(temporary, download=True)
        shutil.copytree(temporary, data_dir, dirs_exist_ok=True)


def _digits() -> dict[str, np.ndarray]:
    """scikit-learn's 8x8 digits in a fixed shuffle, scaled to 0..255 and resized to 32x32x3."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    pixels = torch.from_numpy(bunch.images).float()[:, None] * (255 / 16)
    pixels = torch.nn.functional.interpolate(pixels, size=(IMAGE_SIZE, IMAGE_SIZE), mode="bilinear")
    images = pixels.round().to(torch.uint8).permute(0, 2, 3, 1).expand(-1, -1, -1, 3).contiguous().numpy()
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
        raise UserError(f"{source}: classes must list at least two names, but has shape {classes.shape}")
    for part in ("train", "test"):
        images, labels = arrays[f"x_{part}"], arrays[f"y_{part}"]
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1:] != (IMAGE_SIZE, IMAGE_SIZE, 3):
            raise UserError(
                f"{source}: x_{part} must be uint8 [N, {IMAGE_SIZE}, {IMAGE_SIZE}, 3], "
                f"but is {images.dtype} {list(images.shape)}"
            )
        if labels.ndim != 1 or len(labels) != len(images) or not len(labels):
            raise UserError(f"{source}: y_{part} {list(labels.shape)} does not match {len(images)} images of x_{part}")
        if not np.issubdtype(labels.dtype, np.integer):
            raise UserError(f"{source}: y_{part} must hold whole numbers, but is {labels.dtype}")
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high >= len(classes):
            raise UserError(f"{source}: labels of y_{part} run from {low} to {high}, outside 0..{len(classes) - 1}")
