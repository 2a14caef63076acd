"""Shared fixtures. Scripts run in the test's own process, in an empty folder, as `python <script> ...` would."""

import copy
import functools
import importlib
import shutil
import subprocess
import sys
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from filelock import FileLock
from PIL import Image

from models import ARCHITECTURES
from tests.helpers import ROOT, ResNet8, SmallNet, copy_with_args
from utils.checkpoint import save_checkpoint
from utils.cli import run

ARCHITECTURES["ResNet8"] = ResNet8  # for the commands that run in this process
SLOW = {"cli", "rejected", "digits_run", "channel_run", "installed"}  # fixtures that run commands


def pytest_collection_modifyitems(items):
    """Tests that run commands are slow ones. Those marked cuda are skipped without a CUDA GPU."""
    for item in items:
        if SLOW & set(item.fixturenames):
            item.add_marker(pytest.mark.slow)
        if item.get_closest_marker("cuda") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


@pytest.fixture(scope="session", autouse=True)
def translations_read_once():
    """Torch's ONNX exporter reads the sources of its 500 translations at each call: here once for a process."""
    try:
        from torch.onnx._internal.exporter._registration import ONNXRegistry

        read = functools.cache(ONNXRegistry.from_torchlib)
    except (ImportError, AttributeError):  # its own names, which another version of torch may lack
        yield
        return

    def fresh(*args, **kwargs):
        found = copy.copy(read(*args, **kwargs))
        found.functions = {key: [*own] for key, own in found.functions.items()}  # an export adds to them
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ONNXRegistry, "from_torchlib", staticmethod(fresh))
        yield


@dataclass
class Outcome:
    code: int
    out: str
    err: str


def run_alone(main):
    """Runs a script's `main`, and sets back what scripts leave on, for the process they are alone in."""
    try:
        run(main)
    finally:
        torch.use_deterministic_algorithms(False)
        torch.set_flush_denormal(False)


@pytest.fixture
def cli(tmp_path, monkeypatch, capfd):
    """cli("train.py", "--flag", ...) -> Outcome; the working directory is tmp_path."""
    monkeypatch.chdir(tmp_path)

    def call(script: str, *words: object) -> Outcome:
        module = importlib.import_module(script.removesuffix(".py"))
        monkeypatch.setattr(sys, "argv", [script, *map(str, words)])
        capfd.readouterr()
        code = 0
        try:
            run_alone(module.main)
        except SystemExit as stop:
            code = stop.code
        return Outcome(code, *capfd.readouterr())

    return call


@pytest.fixture
def rejected(cli, tmp_path):
    """rejected("train.py", flags...) -> the one line on stderr of a command that must fail and leave nothing behind."""

    def call(script: str, *words: object) -> str:
        before = sorted(tmp_path.rglob("*"))
        outcome = cli(script, *words)
        assert outcome.code == 2, outcome
        assert len(outcome.err.strip().splitlines()) == 1, outcome.err
        assert "Traceback" not in outcome.err
        assert sorted(tmp_path.rglob("*")) == before
        return outcome.err

    return call


@pytest.fixture
def net():
    torch.manual_seed(0)
    return SmallNet()


@pytest.fixture
def few_digits(tmp_path):
    """data/cifar10.npz in the test's folder, for runs whose accuracy does not matter: 128 digits, and 32 to test."""
    from utils.data.load import load_dataset

    digits = load_dataset("digits", "", torch.device("cpu"))
    (tmp_path / "data").mkdir()
    np.savez(tmp_path / "data/cifar10.npz", classes=np.array(digits.classes),
             x_train=digits.train.images[:128], y_train=digits.train.labels[:128],
             x_test=digits.test.images[:32], y_test=digits.test.labels[:32])  # fmt: skip


def shared_folder(tmp_path_factory, worker_id):
    """The temporary folder that all processes of a test run share."""
    folder = tmp_path_factory.getbasetemp()
    return folder if worker_id == "master" else folder.parent  # theirs lie side by side


@pytest.fixture(scope="session")
def digits_run(tmp_path_factory, worker_id):
    """Path of a checkpoint of a real vanilla run of ResNet8 on the digits, epoch 3 alone, once for all processes."""
    folder = shared_folder(tmp_path_factory, worker_id)
    flags = "--psg 0 --dataset digits --arch ResNet8 --lr 0.05 --batch_size 16 --resume_epoch 3 --epoch 3 --exp_name v"
    checkpoint = folder / "runs/v/last.pth"
    with FileLock(folder / "digits.lock"), pytest.MonkeyPatch.context() as patch:
        if not checkpoint.exists():
            patch.chdir(folder)
            patch.setattr(sys, "argv", ["train.py", *flags.split(), "--precision", "fp32"])
            run_alone(importlib.import_module("train").main)
    return checkpoint


@pytest.fixture
def channel_run(tmp_path, digits_run):
    """Path of a copy of `digits_run` that says it was trained with a grid for each output channel."""
    return copy_with_args(digits_run, tmp_path / "channel.pth", granularity="channel")


@pytest.fixture(scope="session")
def photographs(tmp_path_factory):
    """A folder of six training and three validation images of each of two classes, red and blue, of unequal sizes."""
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


@pytest.fixture
def own_photographs(tmp_path, photographs):
    """A copy of `photographs` that a test may change: d in the test's folder."""
    return shutil.copytree(photographs, tmp_path / "d")


@pytest.fixture
def photograph_network(own_photographs):
    """A checkpoint of a small network for `own_photographs` at 48 px, which says that it was trained for 4 bits."""
    torch.manual_seed(0)
    model = ResNet8(2)
    for norm in (module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)):
        norm.momentum = 1.0  # one batch is enough for statistics that fit
    model(torch.randn(16, 3, 48, 48))
    args = {"dataset": "imagefolder", "data_dir": str(own_photographs), "image_size": 48, "psg": 1, "w_bit": 4}
    path = own_photographs.parent / "p.pth"
    facts = {"arch": "ResNet8", "num_classes": 2, "classes": ["blue", "red"], "args": args}
    save_checkpoint(path, facts | {"state_dict": model.state_dict()})
    return path


@pytest.fixture(scope="session")
def installed(tmp_path_factory, worker_id):
    """A folder with psgd in it, installed once for all processes; pip builds in a copy of the sources."""
    folder = shared_folder(tmp_path_factory, worker_id)
    target = folder / "installed"
    with FileLock(folder / "installed.lock"):
        if not target.exists():
            source = tmp_path_factory.mktemp("source")
            for name in ("pyproject.toml", "README.md", "LICENSE", "requirements-export.txt"):
                shutil.copy(ROOT / name, source)
            shutil.copytree(ROOT / "quant", source / "quant")
            flags = ["--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--target", target, source]
            subprocess.run([sys.executable, "-m", "pip", "install", *flags], check=True)
    return target


@pytest.fixture
def no_compiled_code_of_before(monkeypatch, tmp_path):
    """What torch.compile has kept of earlier runs stays out: it may be for another instruction set, and is used. After
    eight compilations of a function torch runs it as it is, so that they are forgotten too."""
    torch._dynamo.reset()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
