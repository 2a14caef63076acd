"""Damaged image files: named before an epoch is spent, or replaced in training; never evaluated on in part."""

import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.helpers import ROOT
from utils import progress
from utils.checkpoint import load_checkpoint
from utils.cli import UserError
from utils.data import folder
from utils.data.folder import FolderSplit
from utils.data.load import load_dataset

CPU = torch.device("cpu")


def truncate(path):
    path.write_bytes(path.read_bytes()[:-300])


@pytest.mark.parametrize("workers", ["0", "2"])
def test_damaged_images_are_named_before_the_first_epoch(rejected, own_photographs, workers):
    images = own_photographs
    truncate(images / "val/red/1.jpg")
    flags = ["--dataset", "imagefolder", "--arch", "squeezenet1_1", "--data_dir", "d", "--workers", workers]
    message = rejected("train.py", *flags)
    assert "d/val/red/1.jpg cannot be read as an image (" in message and "such" not in message
    truncate(images / "val/blue/2.jpg")
    assert "d/val/blue/2.jpg cannot be read as an image (" in (message := rejected("train.py", *flags))
    assert "(2 such files of 6)" in message
    for number in (2, 4):
        (images / f"train/red/{number}.jpg").write_bytes(b"")
    message = rejected("train.py", *flags)
    assert re.search(r"d/train/red/[24].jpg cannot be read as an image \(it is not an image file\)", message)
    assert "(2 such files of 12)" in message


def test_the_images_that_a_run_holds_out_are_decoded(rejected, own_photographs):
    images = own_photographs
    held_out, _ = load_dataset("imagefolder", images, CPU).splits(1)[1].files[0]
    truncate(Path(held_out))
    flags = ["--dataset", "imagefolder", "--arch", "squeezenet1_1", "--data_dir", images, "--workers", "0"]
    assert f"{held_out} cannot be read as an image" in rejected("train.py", *flags, "--val_split", "1")


@pytest.mark.parametrize("workers", ["0", "1"])
def test_a_training_image_that_is_damaged_behind_its_header_costs_no_epoch(cli, tmp_path, own_photographs, workers):
    """It is named once, in however many epochs it is met."""
    truncate(own_photographs / "train/red/2.jpg")
    flags = ["--dataset", "imagefolder", "--data_dir", "d", "--load_pretrained", "", "--image_size", "32"]
    outcome = cli("train.py", *flags, "--epoch", "2", "--exp_name", "a", "--workers", workers, "--batch_size", "6")
    assert outcome.code == 0, outcome.err
    (line,) = outcome.err.splitlines()
    assert line.startswith("warning: d/train/red/2.jpg cannot be read as an image (")
    assert line.endswith("replace it, or leave it out; until then the next image takes its place in training")
    assert load_checkpoint(tmp_path / "runs/a/last.pth")["epoch"] == 2


def test_the_next_whole_image_takes_the_place_of_a_damaged_one(own_photographs, capfd):
    """Against a split that lists it in that place; in training only."""
    train = load_dataset("imagefolder", own_photographs, CPU, image_size=40).train
    files = list(train.files)
    for number in (4, 5, 11):
        truncate(Path(files[number][0]))
    files[4] = files[5] = files[6]
    files[11] = files[0]
    twin = FolderSplit(files, train.spec, CPU, 0)
    batches = zip(train.shuffled(5, seed=1).epoch(1), twin.shuffled(5, seed=1).epoch(1), strict=True)
    for (images, labels), (wanted, named) in batches:
        assert torch.equal(images, wanted) and torch.equal(labels, named)
    assert len(capfd.readouterr().err.splitlines()) == 3
    for batches in (train.batches(4), train.calibration(12, seed=1)):
        with pytest.raises(UserError, match="cannot be read as an image"):
            list(batches)


def test_a_folder_without_whole_images_is_refused(own_photographs, monkeypatch):
    for path in own_photographs.glob("train/*/*.jpg"):
        truncate(path)
    train = load_dataset("imagefolder", own_photographs, CPU).train
    with pytest.raises(UserError, match="cannot be read as an image"):
        list(train.shuffled(5, seed=1).epoch(1))


def test_a_long_check_shows_its_progress(photographs, monkeypatch, capfd):
    monkeypatch.setattr(progress, "INTERVAL", 0)
    monkeypatch.setattr(folder, "CHECKED_AT_ONCE", 4)
    dataset = load_dataset("imagefolder", photographs, CPU)
    dataset.train.check_files(whole=False)
    dataset.test.check_files(whole=True)
    first, second, third = capfd.readouterr().err.splitlines()
    assert first.startswith("checking 12 training images: step 1 of 3, ")
    assert second.startswith("checking 12 training images: step 2 of 3, ")
    assert third.startswith("checking 6 images to evaluate on: step 1 of 2, ")


KILLED = """
import os, signal, sys, torch, utils.data.folder
from utils.cli import run
from utils.data.load import load_dataset

def read_image(path):
    os.kill(os.getpid(), getattr(signal, sys.argv[2]))

utils.data.folder.read_image = read_image  # in the worker, which is forked
dataset = load_dataset("imagefolder", sys.argv[1], torch.device("cpu"), workers=1)
run(lambda: [*dataset.test.batches(2)])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="workers are forked on Linux")
def test_a_worker_that_is_killed_is_one_line(photographs):
    """As the kernel does where memory is short."""
    result = subprocess.run(
        [sys.executable, "-c", KILLED, photographs, signal.SIGKILL.name], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 2 and len(result.stderr.splitlines()) == 1, result.stderr
    assert "a process that reads images was killed (signal: Killed)" in result.stderr
    assert "fewer --workers or a smaller --batch_size" in result.stderr
