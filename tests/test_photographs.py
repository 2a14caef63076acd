"""The way of a folder of photographs through the scripts: image size, held-out images, where the folder is, classes."""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from models import build_model
from tests.helpers import read_csv
from utils.checkpoint import load_checkpoint, save_checkpoint
from utils.cli import UserError
from utils.data.load import load_dataset
from utils.data.specs import DATASETS, spec_of

CPU = torch.device("cpu")
TRAIN = ["--dataset", "imagefolder", "--data_dir", "d", "--load_pretrained", "", "--batch_size", "6", "--workers", "0"]


def by_hand(path, size, resized):
    """An image as a network gets it in evaluation, normalized."""
    image = Image.open(path).convert("RGB")
    width, height = image.size
    scale = resized / min(width, height)
    image = image.resize((int(width * scale), int(height * scale)), Image.Resampling.BILINEAR)
    left, top = (round((side - size) / 2) for side in image.size)
    pixels = np.asarray(image.crop((left, top, left + size, top + size))).astype(np.float32)
    spec = DATASETS["imagefolder"]
    return torch.from_numpy((pixels - np.array(spec.mean)) / np.array(spec.std)).permute(2, 0, 1).float()


@pytest.mark.parametrize("size, resized", [(None, 256), (112, 128), (56, 64)])
def test_images_of_any_size(photographs, size, resized):
    """The margin around the middle is in proportion to ImageNet's."""
    dataset = load_dataset("imagefolder", photographs, CPU, image_size=size)
    size = size or 224
    assert dataset.spec.size == size and dataset.spec.resized == resized
    images, _ = next(dataset.test.batches(6))
    for image, (path, _) in zip(images, dataset.test.files, strict=True):
        assert torch.allclose(image, by_hand(path, size, resized), atol=0.03)  # one step of 255 is 0.018
    images, _ = next(dataset.train.shuffled(5, seed=1).epoch(1))
    assert images.shape == (5, 3, size, size)


def test_data_sets_of_one_size_have_no_other():
    assert spec_of("digits", 32) is spec_of("digits") and spec_of("digits").resized == 32
    with pytest.raises(UserError, match="--image_size 64: the images of cifar10 are 32 x 32; leave it out"):
        spec_of("cifar10", 64)


def test_the_image_size_is_kept(cli, tmp_path, own_photographs):
    """By a checkpoint, and by what starts from it or evaluates it, unless another one is given."""
    assert cli("train.py", *TRAIN, "--image_size", "40", "--epoch", "1", "--exp_name", "a").code == 0
    assert load_checkpoint(tmp_path / "runs/a/last.pth")["args"]["image_size"] == 40
    started = [*TRAIN[:4], "--load_pretrained", "runs/a/last.pth", "--epoch", "2", "--exp_name", "b"]
    outcome = cli("train.py", *started, "--workers", "0")
    assert outcome.code == 0 and "2 classes: blue, red\n" in outcome.out
    again = load_checkpoint(tmp_path / "runs/b/last.pth")
    assert again["args"]["image_size"] == 40 and again["classes"] == ["blue", "red"]
    for flags, out in (([], "c"), (["--image_size", "96"], "d96")):
        assert cli("eval.py", "--model_path", "runs/b/last.pth", "--workers", "0", "--out", out, *flags).code == 0
    losses = [float(read_csv(tmp_path / out / "results.csv")[0]["loss"]) for out in ("c", "d96")]
    assert losses[0] == pytest.approx(again["metrics"]["fp_loss"], rel=1e-4) and losses[1] != losses[0]


def test_a_size_that_a_network_cannot_take(rejected, own_photographs, tmp_path):
    message = "--arch alexnet cannot take 16 x 16 images ("
    assert message in rejected("train.py", *TRAIN, "--arch", "alexnet", "--image_size", "16")
    network = build_model("squeezenet1_1", 2)
    facts = {"arch": "squeezenet1_1", "num_classes": 2, "args": {"dataset": "imagefolder", "data_dir": "d"}}
    save_checkpoint(tmp_path / "s.pth", facts | {"state_dict": network.state_dict()})
    for script in ("eval.py", "export.py"):
        message = "--arch squeezenet1_1 cannot take 8 x 8 images ("
        assert message in rejected(script, "--model_path", "s.pth", "--image_size", "8")
    message = "--image_size 64: the images of digits are 32 x 32"
    assert message in rejected("train.py", "--dataset", "digits", "--load_pretrained", "", "--image_size", "64")


def test_images_are_held_out_without_a_val_folder(cli, rejected, tmp_path, own_photographs):
    shutil.rmtree(own_photographs / "val")
    message = "there is no val/ beside imagefolder's train/: evaluate on --val_split N images of it"
    assert message in rejected("train.py", *TRAIN, "--image_size", "32")
    flags = ["--image_size", "32", "--val_split", "4", "--epoch", "1", "--exp_name", "a"]
    outcome = cli("train.py", *TRAIN, *flags)
    assert outcome.code == 0 and "accuracy is on the 4 validation images" in outcome.out
    metrics = load_checkpoint(tmp_path / "runs/a/last.pth")["metrics"]
    evaluate = ["--model_path", "runs/a/last.pth", "--workers", "0", "--out"]
    assert cli("eval.py", *evaluate, "b").err == ""
    row = read_csv(tmp_path / "b/results.csv")[0]
    assert row["split"] == "validation" and float(row["loss"]) == pytest.approx(metrics["fp_loss"], rel=1e-4)
    outcome = cli("eval.py", *evaluate, "c", "--val_split", "6")
    message = "it was trained with --val_split 4, on some of the images that it is evaluated on"
    assert outcome.code == 0 and outcome.err == f"warning: runs/a/last.pth: {message}\n"


def test_the_folder_of_training_is_the_default(cli, rejected, own_photographs, photograph_network):
    flags = ["--model_path", photograph_network, "--workers", "0"]
    assert cli("eval.py", *flags).code == 0
    own_photographs.rename(own_photographs.with_name("e"))
    message = f"p.pth needs images, but {own_photographs}, the folder of its training, has no train/: name another"
    assert message in rejected("eval.py", *flags)
    assert cli("eval.py", *flags, "--data_dir", "e").code == 0
    for part in ("train", "val"):
        (own_photographs.with_name("e") / part / "red").rename(own_photographs.with_name("e") / part / "green")
    message = "its 'red' is not in the data set, 'green' of the data set is not in the file"
    assert message in rejected("eval.py", *flags, "--data_dir", "e")


@pytest.mark.parametrize("part", ["train", "val"])
def test_classes_without_images_are_named(rejected, own_photographs, part):
    for path in (own_photographs / part / "red").iterdir():
        path.unlink()
    assert f"{part}/ must hold a folder of images for each class (Found no valid file for the classes red" in rejected(
        "train.py", *TRAIN, "--image_size", "32"
    )


def test_calibration_on_fewer_images_than_the_default(cli, rejected, photograph_network):
    flags = ["--model_path", photograph_network, "--workers", "0", "--a_bit", "8"]
    outcome = cli("eval.py", *flags)
    assert outcome.code == 0 and "all 12 training images are taken: there are fewer than --calib" in outcome.err
    message = "--calib_images 13 is more than the 12 training images"
    assert message in rejected("eval.py", *flags, "--calib_images", "13")
