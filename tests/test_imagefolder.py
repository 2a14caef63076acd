"""torchvision's networks, and images in folders: trained, resumed, evaluated and exported by the scripts."""

import csv
import os
import re
import warnings

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from models import architectures, build_model
from quant import load_packed, quantize_weights
from quant.deploy import save_packed
from utils.checkpoint import load_checkpoint, model_from_checkpoint, save_checkpoint
from utils.cli import UserError
from utils.data.folder import FolderSplit
from utils.data.images import TURNS, read_image
from utils.data.load import load_dataset
from utils.data.specs import DATASETS
from utils.distributed import World

CPU = torch.device("cpu")


def test_batches(photographs):
    dataset = load_dataset("imagefolder", photographs, CPU, workers=2)
    assert dataset.classes == ["blue", "red"] and len(dataset.train) == 12 and len(dataset.test) == 6
    ((images, labels),) = dataset.test.batches(8)
    assert images.shape == (6, 3, 224, 224) and labels.tolist() == [0, 0, 0, 1, 1, 1]
    # Normalised: a blue image of 180 to 240 lies above zero in the last channel alone.
    assert images[0, 2].mean() > 1 > 0 > images[0, 0].mean()
    batches = dataset.train.shuffled(5, seed=1)
    assert len(batches) == 3 and batches.sizes == [5, 5, 2]
    first, again, other = ([*batches.epoch(number)] for number in (1, 1, 2))
    assert all(torch.equal(a, b) and torch.equal(c, d) for (a, c), (b, d) in zip(first, again))
    assert not torch.equal(first[0][1], other[0][1])
    assert sorted(torch.cat([labels for _, labels in first]).tolist()) == [0] * 6 + [1] * 6
    order = [label for _, label in dataset.train.files]
    assert order != sorted(order)  # --val_split takes the last, not a whole class
    chosen = [*dataset.train.calibration(7, seed=3, batch_size=4)]
    assert [len(labels) for _, labels in chosen] == [4, 3]


def test_crops_and_flips(photographs):
    """Other ones in each epoch, the same for any number of processes and workers, and none outside of training."""
    dataset, again = (load_dataset("imagefolder", photographs, CPU, workers=workers) for workers in (0, 2))
    one = dataset.train.part(slice(1))
    (first,), (second,) = (one.shuffled(1, seed=1).epoch(number) for number in (1, 2))
    (seen,), (seen_again,) = (one.batches(1) for _ in range(2))
    assert not torch.equal(first[0], second[0]) and torch.equal(seen[0], seen_again[0])
    alone = [*dataset.train.shuffled(5, seed=1).epoch(1)]
    parts = [again.train.shuffled(5, seed=1, world=World(rank, 2)).epoch(1) for rank in (0, 1)]
    for (images, labels), *shared in zip(alone, *parts, strict=True):
        together, named = map(torch.cat, zip(*shared))
        assert sorted(named.tolist()) == sorted(labels.tolist())
        assert all(any(torch.equal(image, other) for other in together) for image in images)


def test_only_training_images_are_augmented(photographs, monkeypatch):
    dataset, augmented = load_dataset("imagefolder", photographs, CPU), []
    monkeypatch.setattr(FolderSplit, "read", lambda self, chosen, seed=None: augmented.append(seed is not None) or [])
    for batches in (
        dataset.train.shuffled(4, seed=1).epoch(1),
        dataset.test.batches(4),
        dataset.train.calibration(4, seed=1),
    ):
        list(batches)
    assert augmented == [True, False, False]


def test_train_resume_and_evaluate(cli, tmp_path, photographs):
    common = ["--dataset", "imagefolder", "--data_dir", photographs, "--arch", "mobilenet_v3_small", "--workers", "0"]
    flags = [*common, "--batch_size", "6", "--lambda_s", "50", "--w_bit", "8", "--exp_name", "a", "--val_split", "0"]
    assert cli("train.py", *flags, "--epoch", "1").code == 0
    assert cli("train.py", "--exp_name", "a", "--resume", "--epoch", "2").code == 0
    checkpoint = load_checkpoint(tmp_path / "runs/a/last.pth")
    assert checkpoint["arch"] == "mobilenet_v3_small" and checkpoint["num_classes"] == 2 and checkpoint["epoch"] == 2
    flags = ["--model_path", "runs/a/last.pth", "--w_bit", "8", "--post", "none", "bn_reestimate"]
    outcome = cli("eval.py", *flags, "--calib_images", "12", "--workers", "0", "--out", "b")
    assert outcome.code == 0, outcome.err
    with open(tmp_path / "b/results.csv", newline="") as file:
        written = list(csv.DictReader(file))
    assert float(written[0]["top1"]) == pytest.approx(checkpoint["metrics"]["fp_top1"])
    assert written[0]["arch"] == "mobilenet_v3_small" and written[0]["dataset"] == "imagefolder"


@pytest.fixture
def default_weights(tmp_path, monkeypatch):
    """A function that gives the file in torch's cache where a download would put an architecture's default weights."""
    from torchvision.models import get_model_weights

    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "cache/hub/checkpoints"
    folder.mkdir(parents=True)
    return lambda arch: folder / get_model_weights(arch).DEFAULT.url.rpartition("/")[2]


def test_weights_of_torchvision(cli, default_weights):
    """A head of another size stays as it was made."""
    torch.manual_seed(5)
    pretrained = build_model("squeezenet1_1", 1000)
    torch.save(pretrained.state_dict(), default_weights("squeezenet1_1"))
    model = build_model("squeezenet1_1", 10, "DEFAULT")
    assert torch.equal(model.features[0].weight, pretrained.features[0].weight)
    assert model.classifier[1].weight.shape[0] == 10
    flags = ["--dataset", "digits", "--arch", "squeezenet1_1", "--weights", "IMAGENET1K_V1", "--epoch", "1"]
    outcome = cli("train.py", *flags, "--lr", "1e-4")
    assert outcome.code == 0 and "from torchvision's weights IMAGENET1K_V1" in outcome.out


def densenet_of_old(state: dict) -> dict:
    """With dots in the names, and from before batch norm counted its batches."""
    return {
        re.sub(r"(layer\d+\.(?:norm|conv))(\d)", r"\1.\2", name): value
        for name, value in state.items()
        if not name.endswith("num_batches_tracked")
    }


@pytest.mark.parametrize("arch, aged", [("densenet121", densenet_of_old), ("mnasnet0_5", lambda state: state)])
def test_weights_in_torchvisions_old_files(tmp_path, default_weights, arch, aged):
    """densenet's have other names, mnasnet asks for the version of its layers; checkpoints and packed files too."""
    state = build_model(arch, 1000).state_dict()
    torch.save(aged(state), default_weights(arch))
    model = build_model(arch, 10, "DEFAULT")
    head = [name for name, value in model.state_dict().items() if not torch.equal(value, state[name])]
    assert head in (["classifier.weight", "classifier.bias"], ["classifier.1.weight", "classifier.1.bias"])

    save_checkpoint(tmp_path / "a.pth", {"arch": arch, "num_classes": 10, "state_dict": model.state_dict()})
    again = model_from_checkpoint(load_checkpoint(tmp_path / "a.pth"), "a.pth").state_dict()
    assert all(torch.equal(again[name], value) for name, value in model.state_dict().items())
    save_packed(tmp_path / "a.safetensors", model, 4)
    packed = load_packed(tmp_path / "a.safetensors", build_model(arch, 10)).state_dict()
    assert all(torch.equal(packed[k], value) for k, value in quantize_weights(model, 4).state_dict().items())


def test_a_state_dict_alone_has_the_classes_of_the_data(tmp_path):
    network = build_model("resnet18", 10)
    torch.save(network.state_dict(), tmp_path / "a.pth")
    model = model_from_checkpoint(load_checkpoint(tmp_path / "a.pth"), "a.pth", "resnet18", 10)
    assert torch.equal(model.fc.weight, network.fc.weight)
    with pytest.raises(UserError, match=r"a.pth does not fit ResNet: fc.weight is \[10, 512\] instead of \[7, 512\]"):
        model_from_checkpoint(load_checkpoint(tmp_path / "a.pth"), "a.pth", "resnet18", 7)


def test_damaged_weights_of_torchvision(rejected, default_weights):
    default_weights("squeezenet1_1").write_bytes(b"half a file")
    flags = ["--dataset", "digits", "--arch", "squeezenet1_1", "--weights", "DEFAULT"]
    assert "--weights DEFAULT of squeezenet1_1 cannot be read" in rejected("train.py", *flags)


def test_weights_that_cannot_be_downloaded(rejected, default_weights, monkeypatch):
    for name in ("https_proxy", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # where nobody listens
    monkeypatch.delenv("no_proxy", raising=False)
    flags = ["--dataset", "digits", "--arch", "squeezenet1_1", "--weights", "DEFAULT"]
    message = rejected("train.py", *flags)
    assert "the weights DEFAULT of squeezenet1_1 could not be downloaded (<urlopen error" in message
    assert f"put torchvision's file into {default_weights('squeezenet1_1').parent}" in message


def test_architectures():
    names = architectures()
    assert names[:2] == ["ResNet32", "vgg16_bn"] and {"resnet18", "mobilenet_v2", "vit_b_16"} <= set(names)
    assert len(set(names)) == len(names) and "inception_v3" not in names
    assert len(build_model("resnet18", 7).fc.bias) == 7


def test_bad_networks(rejected, tmp_path):
    digits = ["--dataset", "digits"]
    message = rejected("train.py", *digits, "--arch", "resnet19")
    assert "unknown architecture 'resnet19': ResNet32, vgg16_bn" in message
    assert "or a classification network of torchvision, such as" in message
    flags = [*digits, "--arch", "resnet18", "--weights", "BEST"]
    assert "unknown weights 'BEST' for resnet18: it has IMAGENET1K_V1" in rejected("train.py", *flags)
    assert "no torchvision weights for ResNet32" in rejected("train.py", *digits, "--weights", "DEFAULT")
    both = [*digits, "--arch", "resnet18", "--weights", "DEFAULT", "--load_pretrained", "a.pth"]
    assert "--weights DEFAULT and --load_pretrained a.pth: choose one" in rejected("train.py", *both)
    for claim in (None, True, 0, 10**9, "ten"):
        torch.save({"arch": "resnet18", "num_classes": claim, "state_dict": {"a": torch.zeros(1)}}, tmp_path / "x.pth")
        assert "does not say how many classes it has" in rejected("eval.py", "--model_path", "x.pth", *digits)


def test_bad_folders(rejected, cli, tmp_path, photographs):
    flags = ["--dataset", "imagefolder", "--arch", "squeezenet1_1", "--workers", "0", "--data_dir"]
    assert "train/ must hold a folder of images for each class" in rejected("train.py", *flags, "nowhere")
    for part, name in (("train", "a"), ("train", "b"), ("val", "a"), ("val", "c")):
        (tmp_path / "d" / part / name).mkdir(parents=True)
        (tmp_path / "d" / part / name / "0.jpg").write_bytes((photographs / "val/red/0.jpg").read_bytes())
    assert "train/ and val/ have different classes: b, c" in rejected("train.py", *flags, "d")
    (tmp_path / "d/val/c").rename(tmp_path / "d/val/b")
    (tmp_path / "d/train/b/0.jpg").write_bytes(b"no image")
    for workers in ("0", "1"):
        outcome = cli("train.py", *flags, "d", "--epoch", "1", "--workers", workers, "--batch_size", "1")
        assert outcome.code == 2 and "d/train/b/0.jpg cannot be read as an image" in outcome.err
        assert len(outcome.err.strip().splitlines()) == 1


def test_imagefolder_statistics_are_imagenets():
    spec = DATASETS["imagefolder"]
    assert [round(m / 255, 3) for m in spec.mean] == [0.485, 0.456, 0.406]
    assert [round(s / 255, 3) for s in spec.std] == [0.229, 0.224, 0.225]


def test_any_seed_will_do(photographs):
    """The largest that --seed takes, at a late epoch."""
    dataset = load_dataset("imagefolder", photographs, CPU)
    images, _ = next(iter(dataset.train.shuffled(2, seed=2**31 - 1).epoch(300)))
    assert images.shape == (2, 3, 224, 224)


GRAY = np.linspace(0, 255, 64).reshape(8, 8).round().astype(np.uint8)
COLOURS = np.stack([GRAY, GRAY.T, GRAY[::-1]], 2)


def saved(path, pixels, mode=None):
    """An image file of `pixels`, converted to `mode`; returns its path."""
    image = Image.fromarray(pixels)
    if mode == "LAB":
        profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
        image = ImageCms.profileToProfile(image, *profiles, outputMode="LAB")
    elif mode:
        image = image.convert(mode)
    image.save(path)
    return str(path)


@pytest.mark.parametrize("kind, suffix", [
    (np.uint16, "png"), (np.uint16, "tif"), (np.uint16, "pgm"), (">u2", "tif"),
])  # fmt: skip
def test_images_of_16_bits_are_scaled(tmp_path, kind, suffix):
    path = saved(tmp_path / f"a.{suffix}", (GRAY.astype(np.int64) * 257 + 100).clip(0, 65535).astype(kind))
    found = np.asarray(read_image(path))
    assert found.shape == (8, 8, 3) and np.array_equal(found, np.stack([GRAY] * 3, 2))
    white = np.full((8, 8), 65535, kind)
    assert np.asarray(read_image(saved(tmp_path / f"b.{suffix}", white))).min() == 255


@pytest.mark.parametrize("mode, suffix, tolerance", [
    ("L", "png", 0), ("LA", "png", 0), ("RGB", "png", 0), ("RGBA", "png", 0), ("CMYK", "tif", 1), ("YCbCr", "tif", 3),
    ("LAB", "tif", 25), ("P", "png", 60),
])  # fmt: skip
def test_images_of_8_bits_keep_their_colours(tmp_path, mode, suffix, tolerance):
    pixels = COLOURS if mode not in ("L", "LA") else np.stack([GRAY] * 3, 2)
    found = np.asarray(read_image(saved(tmp_path / f"a.{suffix}", pixels, mode)))
    assert found.shape == (8, 8, 3) and abs(found.astype(int) - pixels).max() <= tolerance


def test_images_of_one_bit_and_with_transparency(tmp_path):
    found = np.asarray(read_image(saved(tmp_path / "a.png", GRAY > 127)))
    assert np.array_equal(found[..., 0], (GRAY > 127) * 255)
    image = Image.fromarray(COLOURS).quantize(64)
    image.save(tmp_path / "b.png", transparency=bytes(range(64)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.array_equal(np.asarray(read_image(tmp_path / "b.png")), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("kind, message", [
    (np.int32, "a.tif has mode I, 32-bit integers without a known range"),
    (np.float32, "a.tif has mode F, floating-point numbers without a known range"),
])  # fmt: skip
@pytest.mark.parametrize("part", ["train", "val"])
def test_pixels_without_a_known_range_are_refused(rejected, own_photographs, kind, message, part):
    """Before there is a run folder, in either part."""
    saved(own_photographs / part / "red/a.tif", np.stack([GRAY] * 8).reshape(32, 16).astype(kind))
    flags = ["--dataset", "imagefolder", "--arch", "squeezenet1_1", "--data_dir", "d", "--workers", "1"]
    assert message in rejected("train.py", *flags)


def test_the_orientation_of_a_photograph_is_applied(tmp_path):
    upright = Image.fromarray(np.kron(COLOURS[:4], np.ones((8, 8, 1), np.uint8)))
    undone = {6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}  # all others undo themselves
    for number, turn in TURNS.items():
        for suffix in ("png", "tif", "jpg"):
            exif = Image.Exif()
            exif[0x0112] = number
            upright.transpose(undone.get(number, turn)).save(tmp_path / f"a.{suffix}", exif=exif, quality=100)
            found = np.asarray(read_image(tmp_path / f"a.{suffix}")).astype(int)
            assert found.shape == (32, 64, 3) and abs(found - np.asarray(upright)).mean() < 3, (number, suffix)
    upright.save(tmp_path / "b.jpg", exif=b"Exif\x00\x00II*\x00\x08\x00\x00\x00\xff\xffdamaged")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_image(tmp_path / "b.jpg").size == (64, 32)


def test_no_more_workers_than_cores(photographs):
    dataset = load_dataset("imagefolder", photographs, CPU, workers=500)
    assert dataset.train.workers == len(os.sched_getaffinity(0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dataset.test.check_files(whole=True)
        assert len([*dataset.test.batches(8)]) == 1
    assert load_dataset("imagefolder", photographs, CPU, workers=0).train.workers == 0
