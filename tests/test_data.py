"""The three sources of data, bad files, and batches against a plain loop."""

import functools
import hashlib
import http.server
import pickle
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision

from models import ResNet32
from tests.helpers import CIFAR100, needs_cifar100
from utils import cli as commands
from utils.cli import UserError
from utils.data.in_memory import InMemorySplit, normalize
from utils.data.load import load_dataset
from utils.data.specs import DATASETS, DataSpec

CPU = torch.device("cpu")


def arrays(train=20, test=8, classes=100, seed=0):
    rng = np.random.default_rng(seed)
    return {
        "x_train": rng.integers(0, 256, (train, 32, 32, 3), dtype=np.uint8),
        "y_train": rng.integers(0, classes, train),
        "x_test": rng.integers(0, 256, (test, 32, 32, 3), dtype=np.uint8),
        "y_test": rng.integers(0, classes, test).astype(np.uint8),
        "classes": np.array([f"class {n}" for n in range(classes)]),
    }


def test_npz(tmp_path):
    content = arrays()
    np.savez(tmp_path / "cifar100.npz", **content)
    dataset = load_dataset("cifar100", tmp_path, CPU)
    assert torch.equal(dataset.train.images, torch.from_numpy(content["x_train"]))
    assert dataset.test.labels.dtype == torch.int64
    assert dataset.test.labels.tolist() == content["y_test"].tolist()
    assert dataset.classes[3] == "class 3"


def test_digits():
    dataset = load_dataset("digits", "nowhere", CPU)
    assert dataset.train.images.shape == (1437, 32, 32, 3) and len(dataset.test) == 360
    assert dataset.train.images.dtype == torch.uint8 and dataset.train.images.max() == 255
    assert set(dataset.test.labels.tolist()) == set(range(10)) == set(map(int, dataset.classes))
    mean = dataset.train.images.float().mean().item()
    assert mean == pytest.approx(DATASETS["digits"].mean[0], abs=0.1)


def test_torchvision_archive(tmp_path, monkeypatch):
    """A real archive folder of torchvision's CIFAR-10 format, with the checksums of these files."""
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    content = arrays(train=10, test=4, classes=10)

    def write(name, value):
        (folder / name).write_bytes(pickle.dumps(value))
        return name, hashlib.md5((folder / name).read_bytes()).hexdigest()

    def batch(part):
        flat = content[f"x_{part}"].transpose(0, 3, 1, 2).reshape(-1, 3072)
        return {"data": flat, "labels": content[f"y_{part}"].tolist()}

    cls = torchvision.datasets.CIFAR10
    monkeypatch.setattr(cls, "train_list", [write("data_batch_1", batch("train"))])
    monkeypatch.setattr(cls, "test_list", [write("test_batch", batch("test"))])
    name, digest = write("batches.meta", {"label_names": [f"class {n}" for n in range(10)]})
    monkeypatch.setattr(cls, "meta", {"filename": name, "key": "label_names", "md5": digest})
    dataset = load_dataset("cifar10", tmp_path, CPU)
    assert torch.equal(dataset.train.images, torch.from_numpy(content["x_train"]))
    assert dataset.classes[9] == "class 9"

    # A file whose checksum is another's is never unpickled: it would be downloaded again.
    class Bomb:
        def __reduce__(self):
            return (folder.joinpath("opened").touch, ())

    (folder / "data_batch_1").write_bytes(pickle.dumps(Bomb()))
    monkeypatch.setattr(cls, "url", (tmp_path / "nowhere.tar.gz").as_uri())
    with pytest.raises(UserError, match="no cifar10 data: .* the download failed"):
        load_dataset("cifar10", tmp_path, CPU)
    assert not (folder / "opened").exists()


def test_npz_wins_over_the_archive(tmp_path):
    (tmp_path / "cifar-100-python").mkdir()
    np.savez(tmp_path / "cifar100.npz", **arrays())
    assert len(load_dataset("cifar100", tmp_path, CPU).train) == 20


def test_no_data_and_no_network(tmp_path, monkeypatch):
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "url", (tmp_path / "nowhere.tar.gz").as_uri())
    with pytest.raises(UserError) as error:
        load_dataset("cifar10", tmp_path, CPU)
    assert str(tmp_path / "cifar10.npz") in str(error.value) and "--dataset digits" in str(error.value)


BAD = {
    "missing key": (lambda a: a.pop("y_test"), "lacks y_test"),
    "float images": (lambda a: a.update(x_train=a["x_train"] / 255.0), "x_train must be uint8"),
    "16-bit images": (lambda a: a.update(x_test=a["x_test"].astype(np.uint16)), "x_test must be uint8 .* is uint16"),
    "another size": (lambda a: a.update(x_test=a["x_test"][:, :28, :28]), r"x_test must be uint8 .* \[8, 28, 28, 3\]"),
    "channels first": (lambda a: a.update(x_test=a["x_test"].transpose(0, 3, 1, 2)), "x_test must be uint8"),
    "unequal lengths": (lambda a: a.update(y_train=a["y_train"][:-1]), "does not match 20 images"),
    "label too large": (lambda a: a["y_train"].__setitem__(3, 100), "outside 0..99"),
    "negative label": (lambda a: a["y_train"].__setitem__(3, -1), "outside 0..99"),
    "float labels": (lambda a: a.update(y_train=a["y_train"] * 1.0), "whole numbers"),
    "empty": (lambda a: a.update(x_test=a["x_test"][:0], y_test=a["y_test"][:0]), "y_test"),
    "one class": (lambda a: a.update(classes=a["classes"][:1]), "at least two"),
    "objects": (lambda a: a.update(classes=np.array([{}, []], dtype=object)), "not a readable .npz"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_npz(tmp_path, name):
    spoil, message = BAD[name]
    content = arrays()
    spoil(content)
    np.savez(tmp_path / "cifar100.npz", **content)
    with pytest.raises(UserError, match=message):
        load_dataset("cifar100", tmp_path, CPU)


@pytest.mark.parametrize("spoil", [lambda b: b[: len(b) // 2], lambda b: b"not a zip", lambda b: b""])
def test_damaged_npz(tmp_path, spoil):
    path = tmp_path / "cifar100.npz"
    np.savez(path, **arrays())
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(UserError, match="cifar100.npz is not a readable .npz"):
        load_dataset("cifar100", tmp_path, CPU)


def split(count=50, seed=0):
    content = arrays(train=count, seed=seed)
    return InMemorySplit(torch.from_numpy(content["x_train"]), torch.arange(count), DATASETS["cifar100"])


def test_crop_equals_pad_and_slice():
    data = split()
    batches = data.shuffled(16, seed=1)
    chosen = torch.tensor([0, 7, 3, 49, 7])
    shifts = torch.tensor([[0, 8, 4, 3, 7], [1, 2, 4, 8, 0]])
    mirrored = torch.tensor([False, True, False, True, False])
    crops = batches.crop(chosen, shifts, mirrored)
    for number, index in enumerate(chosen):
        image = data.images[index].permute(2, 0, 1).float()[None]
        padded = torch.nn.functional.pad(image, (4, 4, 4, 4), mode="reflect")[0]
        row, column = shifts[:, number]
        expected = padded[:, row : row + 32, column : column + 32]
        if mirrored[number]:
            expected = expected.flip(2)
        assert torch.equal(crops[number].permute(2, 0, 1).float(), expected)


def test_epoch_is_a_permutation_with_a_short_last_batch():
    """Each image with its label, normalised: of one colour, which no crop changes."""
    colours = torch.arange(50, dtype=torch.uint8)[:, None, None, None].expand(-1, 32, 32, 3).contiguous()
    batches = InMemorySplit(colours, torch.arange(50), DATASETS["cifar100"]).shuffled(16, seed=1)
    epoch = list(batches.epoch(3))
    assert len(batches) == len(epoch) == 4 and [len(labels) for _, labels in epoch] == [16, 16, 16, 2]
    assert sorted(torch.cat([labels for _, labels in epoch]).tolist()) == list(range(50))
    assert all(torch.equal(images, normalize(colours[labels], DATASETS["cifar100"])) for images, labels in epoch)
    images, _ = epoch[0]
    assert images.dtype == torch.float32 and images.shape == (16, 3, 32, 32)
    assert images.is_contiguous(memory_format=torch.channels_last)


def test_epochs_depend_on_seed_and_epoch_alone():
    def first(seed, epoch):
        images, labels = next(split().shuffled(16, seed).epoch(epoch))
        return images, labels.tolist()

    torch.manual_seed(0)
    one = first(1, 5)
    torch.manual_seed(99)
    again = first(1, 5)
    assert torch.equal(one[0], again[0]) and one[1] == again[1]
    assert first(1, 6)[1] != one[1] != first(2, 5)[1]


def test_augmentation_statistics():
    """Every shift occurs about equally often, and half of the images are mirrored, where that is valid."""
    ramp = torch.arange(32, dtype=torch.uint8).repeat(5000, 32, 1)[..., None].repeat(1, 1, 1, 3)
    for flip in (True, False):
        data = InMemorySplit(ramp, torch.zeros(5000, dtype=torch.int64), DataSpec((0, 0, 0), (1, 1, 1), flip))
        batches = data.shuffled(5000, seed=1)
        images, _ = next(batches.epoch(1))
        middle = images[:, 0, 16, 12:20]
        mirrored = (middle[:, 0] > middle[:, -1]).float().mean().item()
        assert mirrored == pytest.approx(0.5 if flip else 0, abs=0.03)
        if not flip:
            shifts = images[:, 0, 16, 16].long() - 12
            assert shifts.bincount(minlength=9).float().div(5000).sub(1 / 9).abs().max() < 0.02


def test_normalize():
    images = torch.randint(0, 256, (3, 32, 32, 3), dtype=torch.uint8)
    spec = DATASETS["cifar100"]
    expected = torchvision.transforms.functional.normalize(
        images.permute(0, 3, 1, 2).float(), list(spec.mean), list(spec.std)
    )
    assert torch.allclose(normalize(images, spec), expected)


def test_eval_batches_keep_order():
    data, spec = split(23), DATASETS["cifar100"]
    images, labels = map(torch.cat, zip(*data.batches(10)))
    assert labels.tolist() == list(range(23)) and torch.equal(images, normalize(data.images, spec))


def test_calibration_batches_are_seeded():
    data, spec = split(50), DATASETS["cifar100"]

    def draw(seed):
        return torch.cat([images for images, _ in data.calibration(30, seed, batch_size=16)])

    batches = [*data.calibration(30, 1, batch_size=16)]
    assert [len(labels) for _, labels in batches] == [15, 15]
    assert len(torch.cat([labels for _, labels in batches]).unique()) == 30
    assert all(torch.equal(images, normalize(data.images[labels], spec)) for images, labels in batches)
    assert torch.equal(draw(1), draw(1)) and not torch.equal(draw(1), draw(2))


def test_splits():
    dataset = load_dataset("digits", "nowhere", CPU)
    assert dataset.splits() == (dataset.train, dataset.test, "test")
    kept, held, name = dataset.splits(400)
    assert (len(kept), len(held), name) == (1037, 400, "validation")
    assert torch.equal(torch.cat([kept.images, held.images]), dataset.train.images)
    assert kept.images.data_ptr() == dataset.train.images.data_ptr()  # a view: the data set is held once
    assert torch.equal(dataset.splits(400)[1].labels, held.labels)
    with pytest.raises(UserError, match="--val_split 1437 leaves none"):
        dataset.splits(1437)


@needs_cifar100
def test_real_cifar100():
    dataset = load_dataset("cifar100", CIFAR100.parent, CPU)
    assert len(dataset.train) == 50_000 and len(dataset.test) == 10_000 and len(dataset.classes) == 100
    assert dataset.train.labels.bincount().tolist() == [500] * 100
    spec = DATASETS["cifar100"]
    mean = dataset.train.images.float().mean((0, 1, 2))
    assert torch.allclose(mean, torch.tensor(spec.mean), atol=0.1)


def test_labels_in_another_order_of_the_classes():
    dataset = load_dataset("digits", "nowhere", CPU)
    order = [str(number) for number in (3, 1, 4, 0, 5, 9, 2, 6, 8, 7)]
    again = dataset.in_order_of(order)
    assert again.classes == order and again.train.images is dataset.train.images
    for before, after in ((dataset.train, again.train), (dataset.test, again.test)):
        assert [order[label] for label in after.labels] == [dataset.classes[label] for label in before.labels]


def matched_digits(classes, **kind):
    from utils.opening import matched

    return matched(load_dataset("digits", "nowhere", CPU), {"classes": classes} if classes else {}, "a.pth", **kind)


def test_a_file_without_classes_has_those_of_the_data():
    assert matched_digits(None).classes == [str(number) for number in range(10)]


DIGITS = [str(number) for number in range(10)]


@pytest.mark.parametrize("classes, message", [
    ([*DIGITS[:9], "nine"], "its 'nine' is not in the data set, '9' of the data set is not in the file"),
    ([*DIGITS[:9], "8"], "'9' of the data set is not in the file"),
    (DIGITS[:9], "a.pth has 9 classes, but the data set has 10: '9' of the data set is not in the file"),
    ([*DIGITS, "ten"], "a.pth has 11 classes, but the data set has 10: its 'ten' is not in the data set"),
])  # fmt: skip
def test_other_classes_are_named(capsys, classes, message):
    with pytest.raises(UserError) as error:
        matched_digits(classes)
    assert message in str(error.value)
    if len(classes) == 10:  # on which a network may well go on
        assert matched_digits(classes, transfer=True).classes == DIGITS
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("warning: a.pth is for other classes") and message in line
    else:
        with pytest.raises(UserError, match="a.pth has"):
            matched_digits(classes, transfer=True)


@pytest.fixture
def no_network(monkeypatch):
    """Downloads are asked for at a port that nobody listens at."""
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("folder", ["nowhere/deep", "data", "there"])
def test_no_folder_is_left_by_a_download_that_fails(rejected, tmp_path, no_network, folder):
    (tmp_path / "there").mkdir()
    flags = ["--dataset", "cifar10", "--load_pretrained", "", "--data_dir", folder]
    message = f"no cifar10 data: {folder}/cifar10.npz is not there and the download failed ("
    assert message in rejected("train.py", *flags)
    torch.save({"state_dict": ResNet32(10).state_dict(), "args": {"dataset": "cifar10"}}, tmp_path / "a.pth")
    assert "no cifar10 data: data/cifar10.npz is not there" in rejected("eval.py", "--model_path", "a.pth")


def test_a_download_that_succeeds_is_put_in_place(tmp_path, monkeypatch):
    """Of a small archive of CIFAR-10's format, served on this machine."""
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    cls, content = torchvision.datasets.CIFAR10, arrays(train=10, test=4, classes=10)

    def write(name, value):
        (folder / name).write_bytes(pickle.dumps(value))
        return name, hashlib.md5((folder / name).read_bytes()).hexdigest()

    for part in ("train", "test"):
        flat = content[f"x_{part}"].transpose(0, 3, 1, 2).reshape(-1, 3072)
        listed = [write(f"{part}_batch", {"data": flat, "labels": content[f"y_{part}"].tolist()})]
        monkeypatch.setattr(cls, f"{part}_list", listed)
    name, digest = write("batches.meta", {"label_names": [f"class {n}" for n in range(10)]})
    monkeypatch.setattr(cls, "meta", {"filename": name, "key": "label_names", "md5": digest})
    archive = shutil.make_archive(str(tmp_path / "served"), "gztar", tmp_path, folder.name)
    serve = functools.partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), serve)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(cls, "url", f"http://127.0.0.1:{server.server_port}/served.tar.gz")
    monkeypatch.setattr(cls, "tgz_md5", hashlib.md5(Path(archive).read_bytes()).hexdigest())
    try:
        dataset = load_dataset("cifar10", tmp_path / "new/deep", CPU)
    finally:
        server.shutdown()
        server.server_close()
    assert torch.equal(dataset.test.images, torch.from_numpy(content["x_test"]))
    assert sorted(path.name for path in (tmp_path / "new/deep").iterdir()) == [folder.name, cls.filename]
    assert not list(tmp_path.rglob(".download*"))


def test_fewer_images_than_the_default(capsys):
    data = split(45)
    assert data.count_for(commands.Default(1024)) == 45
    assert "warning: all 45 training images are taken: there are fewer than --calib_images" in capsys.readouterr().err
    assert data.count_for(commands.Default(40)) == data.count_for(40) == 40
    with pytest.raises(UserError, match="--calib_images 1024 is more than the 45 training images"):
        data.count_for(1024)
