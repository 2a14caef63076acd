"""torchvision's networks, and images in folders: trained, resumed, evaluated and exported by the scripts."""

import csv
import re

import numpy as np
import pytest
import torch
from PIL import Image

from models import architectures, build_model
from quant import load_packed, quantize_weights, save_packed
from utils.checkpoint import load_checkpoint, model_from_checkpoint, save_checkpoint
from utils.cli import UserError
from utils.data import DATASETS, calibration_batches, eval_batches, load_dataset, train_batches
from utils.distributed import World
from utils.imagefolder import FolderSplit

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Six training and three validation images of each of two classes, red and blue, of unequal sizes."""
    root = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    for part, count in (("train", 6), ("val", 3)):
        for channel, name in ((0, "red"), (2, "blue")):
            place = root / part / name
            place.mkdir(parents=True)
            for number in range(count):
                pixels = generator.integers(0, 60, (80 + 10 * number, 100, 3), dtype=np.uint8)
                pixels[..., channel] += 180
                Image.fromarray(pixels).save(place / f"{number}.jpg")
    return root


def test_batches(folder):
    dataset = load_dataset("imagefolder", folder, CPU, workers=2)
    assert dataset.classes == ["blue", "red"] and len(dataset.train) == 12 and len(dataset.test) == 6
    ((images, labels),) = eval_batches(dataset.test, dataset.spec, 8)
    assert images.shape == (6, 3, 224, 224) and labels.tolist() == [0, 0, 0, 1, 1, 1]
    # Normalised: a blue image of 180 to 240 lies above zero in the last channel alone.
    assert images[0, 2].mean() > 1 > 0 > images[0, 0].mean()
    batches = train_batches(dataset.train, dataset.spec, 5, seed=1)
    assert len(batches) == 3 and batches.sizes == [5, 5, 2]
    first, again, other = ([*batches.epoch(number)] for number in (1, 1, 2))
    assert all(torch.equal(a, b) and torch.equal(c, d) for (a, c), (b, d) in zip(first, again))
    assert not torch.equal(first[0][1], other[0][1])
    assert sorted(torch.cat([labels for _, labels in first]).tolist()) == [0] * 6 + [1] * 6
    order = [label for _, label in dataset.train.files]
    assert order != sorted(order)  # --val_split takes the last, not a whole class
    chosen = [*calibration_batches(dataset.train, dataset.spec, 7, seed=3, batch_size=4)]
    assert [len(labels) for _, labels in chosen] == [4, 3]


def test_crops_and_flips(folder):
    """Other ones in each epoch, the same for any number of processes and workers, and none outside of training."""
    dataset, again = (load_dataset("imagefolder", folder, CPU, workers=workers) for workers in (0, 2))
    one = dataset.train.part(slice(1))
    (first,), (second,) = (train_batches(one, dataset.spec, 1, seed=1).epoch(number) for number in (1, 2))
    (seen,), (seen_again,) = (eval_batches(one, dataset.spec, 1) for _ in range(2))
    assert not torch.equal(first[0], second[0]) and torch.equal(seen[0], seen_again[0])
    alone = [*train_batches(dataset.train, dataset.spec, 5, seed=1).epoch(1)]
    parts = [train_batches(again.train, dataset.spec, 5, seed=1, world=World(rank, 2)).epoch(1) for rank in (0, 1)]
    for (images, labels), *shared in zip(alone, *parts, strict=True):
        together, named = map(torch.cat, zip(*shared))
        assert sorted(named.tolist()) == sorted(labels.tolist())
        assert all(any(torch.equal(image, other) for other in together) for image in images)


def test_training_images_alone_are_augmented(folder, monkeypatch):
    dataset, augmented = load_dataset("imagefolder", folder, CPU), []
    monkeypatch.setattr(FolderSplit, "batches", lambda self, chosen, augment, seed=0: augmented.append(augment) or [])
    for batches in (
        train_batches(dataset.train, dataset.spec, 4, seed=1).epoch(1),
        eval_batches(dataset.test, dataset.spec, 4),
        calibration_batches(dataset.train, dataset.spec, 4, seed=1),
    ):
        list(batches)
    assert augmented == [True, False, False]


def test_train_resume_and_evaluate(cli, tmp_path, folder):
    common = ["--dataset", "imagefolder", "--data_dir", folder, "--arch", "mobilenet_v3_small", "--workers", "0"]
    flags = [*common, "--batch_size", "6", "--lambda_s", "50", "--w_bit", "8", "--exp_name", "a", "--val_split", "0"]
    assert cli("train.py", *flags, "--epoch", "1").code == 0
    assert cli("train.py", "--exp_name", "a", "--resume", "--epoch", "2").code == 0
    checkpoint = load_checkpoint(tmp_path / "runs/a/last.pth")
    assert checkpoint["arch"] == "mobilenet_v3_small" and checkpoint["num_classes"] == 2 and checkpoint["epoch"] == 2
    flags = ["--model_path", "runs/a/last.pth", "--data_dir", folder, "--w_bit", "8", "--post", "none", "bn_reestimate"]
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
    save_packed(tmp_path / "a.safetensors", model, {}, bits=4)
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


def test_architectures():
    names = architectures()
    assert names[:2] == ["ResNet32", "vgg16_bn"] and {"resnet18", "mobilenet_v2", "vit_b_16"} <= set(names)
    assert len(set(names)) == len(names) and "inception_v3" not in names
    assert len(build_model("resnet18", 7).fc.bias) == 7


def test_bad_networks(rejected, tmp_path):
    digits = ["--dataset", "digits"]
    message = "unknown architecture 'resnet19': ResNet32, vgg16_bn or a classification network of torchvision, such as"
    assert message in rejected("train.py", *digits, "--arch", "resnet19")
    flags = [*digits, "--arch", "resnet18", "--weights", "BEST"]
    assert "unknown weights 'BEST' for resnet18: it has IMAGENET1K_V1" in rejected("train.py", *flags)
    assert "no torchvision weights for ResNet32" in rejected("train.py", *digits, "--weights", "DEFAULT")
    both = [*digits, "--arch", "resnet18", "--weights", "DEFAULT", "--load_pretrained", "a.pth"]
    assert "--weights DEFAULT and --load_pretrained a.pth: choose one" in rejected("train.py", *both)
    for claim in (None, True, 0, 10**9, "ten"):
        torch.save({"arch": "resnet18", "num_classes": claim, "state_dict": {"a": torch.zeros(1)}}, tmp_path / "x.pth")
        assert "does not say how many classes it has" in rejected("eval.py", "--model_path", "x.pth", *digits)


def test_bad_folders(rejected, cli, tmp_path, folder):
    flags = ["--dataset", "imagefolder", "--arch", "squeezenet1_1", "--workers", "0", "--data_dir"]
    assert "train/ must hold a folder of images for each class" in rejected("train.py", *flags, "nowhere")
    for part, name in (("train", "a"), ("train", "b"), ("val", "a"), ("val", "c")):
        (tmp_path / "d" / part / name).mkdir(parents=True)
        (tmp_path / "d" / part / name / "0.jpg").write_bytes((folder / "val/red/0.jpg").read_bytes())
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


def test_any_seed_will_do(folder):
    """The largest that --seed takes, at a late epoch."""
    dataset = load_dataset("imagefolder", folder, CPU)
    images, _ = next(iter(train_batches(dataset.train, dataset.spec, 2, seed=2**31 - 1).epoch(300)))
    assert images.shape == (2, 3, 224, 224)
