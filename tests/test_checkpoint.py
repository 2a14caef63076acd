"""Checkpoints: whole or not there, read without running anything, and checked against the network."""

import argparse
import os
import pathlib
import pickle
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

import train
from models import ResNet32
from tests.helpers import ROOT
from utils.checkpoint import load_checkpoint, load_weights, model_from_checkpoint, save_checkpoint, training_facts
from utils.cli import UserError

WRITER = """
import sys, torch
from utils.checkpoint import save_checkpoint
state = {"state_dict": {"w": torch.full((30_000_000,), 2.0)}}
print("ready", flush=True)
while True:
    save_checkpoint(sys.argv[1], state)
"""


def test_round_trip(tmp_path):
    model = ResNet32(10)
    save_checkpoint(tmp_path / "a.pth", {"epoch": 3, "state_dict": model.state_dict(), "arch": "ResNet32", "args": {}})
    checkpoint = load_checkpoint(tmp_path / "a.pth")
    again = model_from_checkpoint(checkpoint, "a.pth", "ResNet32", 10)
    assert checkpoint["epoch"] == 3
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values()))
    assert os.listdir(tmp_path) == ["a.pth"]


def test_kill_in_mid_write_leaves_a_whole_file(tmp_path):
    path = tmp_path / "last.pth"
    save_checkpoint(path, {"state_dict": {"w": torch.ones(10)}})
    writer = subprocess.Popen([sys.executable, "-c", WRITER, path], cwd=ROOT, stdout=subprocess.PIPE)
    try:
        writer.stdout.readline()
        deadline = time.monotonic() + 60
        while not list(tmp_path.glob(".last.pth.*.tmp")):  # a write of 120 MB is under way
            assert writer.poll() is None and time.monotonic() < deadline
            time.sleep(0.001)
        time.sleep(0.03)
    finally:
        writer.kill()
        writer.wait()
    value = load_checkpoint(path)["state_dict"]["w"]
    assert torch.equal(value, torch.ones(10)) or torch.equal(value, torch.full((30_000_000,), 2.0))


@pytest.fixture
def temporary(monkeypatch):
    """The temporary name of this process's writings of last.pth."""
    monkeypatch.setattr("secrets.token_hex", lambda length: "0")
    return f".last.pth.{os.getpid()}-0.tmp"


def test_failed_write_keeps_the_old_file_and_leaves_no_other(tmp_path, temporary):
    path = tmp_path / "last.pth"
    save_checkpoint(path, {"state_dict": {"w": torch.ones(1)}})
    (tmp_path / temporary).mkdir()  # the temporary name cannot be opened
    with pytest.raises(UserError, match="could not be written .*; what was there before is intact"):
        save_checkpoint(path, {"state_dict": {"w": torch.zeros(1)}})
    assert load_checkpoint(path)["state_dict"]["w"] == 1


def test_a_folder_is_no_file():
    with pytest.raises(UserError, match="name a file"):
        save_checkpoint(".", {"state_dict": {}})


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_no_space_left(tmp_path, temporary):
    path = tmp_path / "last.pth"
    save_checkpoint(path, {"state_dict": {"w": torch.ones(1)}})
    (tmp_path / temporary).symlink_to("/dev/full")
    with pytest.raises(UserError, match="could not be written"):
        save_checkpoint(path, {"state_dict": {"w": torch.zeros(100_000)}})
    assert load_checkpoint(path)["state_dict"]["w"] == 1 and os.listdir(tmp_path) == ["last.pth"]


def test_weights_that_are_not_finite():
    state = ResNet32(10).state_dict()
    state["bn1.weight"][3] = float("nan")
    with pytest.raises(UserError, match="x.pth: bn1.weight has values that are NaN or infinite"):
        load_weights(ResNet32(10), {"state_dict": state}, "x.pth")


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    path = tmp_path_factory.mktemp("good") / "good.pth"
    save_checkpoint(path, {"state_dict": ResNet32(10).state_dict()})
    return path.read_bytes()


@pytest.mark.parametrize(
    "spoil",
    [
        lambda b: b[: len(b) // 2],
        lambda b: b[:-30],
        lambda b: b"",
        lambda b: b"hello",
        lambda b: b[500:],
        lambda b: b"epoch,lr",
    ],
)
def test_damaged_files(tmp_path, good, spoil):
    path = tmp_path / "bad.pth"
    path.write_bytes(spoil(good))
    with pytest.raises(UserError, match="bad.pth is not a readable checkpoint") as error:
        load_checkpoint(path)
    assert len(str(error.value).splitlines()) == 1


class Payload:
    def __reduce__(self):
        return os.system, ("touch ran",)


def test_nothing_in_a_file_is_executed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": Payload()}, "zip.pth")
    (tmp_path / "plain.pth").write_bytes(pickle.dumps(Payload()))
    for name in ("zip.pth", "plain.pth"):
        with pytest.raises(UserError, match="not a readable checkpoint"):
            load_checkpoint(name)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("content", [[1, 2], {"state_dict": {}}, {"state_dict": {"w": 3}}, {"epoch": 3}, torch.ones(2)])
def test_files_without_a_state_dict(tmp_path, content):
    torch.save(content, tmp_path / "odd.pth")
    with pytest.raises(UserError, match="holds no state_dict"):
        load_checkpoint(tmp_path / "odd.pth")


def test_missing_file():
    with pytest.raises(UserError, match="no checkpoint at nowhere.pth"):
        load_checkpoint("nowhere.pth")


def test_published_files_load(tmp_path):
    """Their layout: no arch, and the quantizers' constants beside the weights; or a bare state_dict."""
    state = ResNet32(100).state_dict()
    extras = {"conv1.wscale_value": torch.ones(1), "layer1.0.relu1.scale_value": torch.ones(1)}
    extras |= {"fc.wscale_value": torch.ones(1), "fc.bscale_value": torch.ones(1)}
    torch.save({"epoch": 150, "state_dict": {**state, **extras}, "best_FP_acc": 0.7, "optimizer": {}}, tmp_path / "a")
    torch.save(dict(state), tmp_path / "b")
    for name in ("a", "b"):
        model = model_from_checkpoint(load_checkpoint(tmp_path / name), name, None, 100)
        assert torch.equal(model.fc.weight, state["fc.weight"])


def test_everything_that_does_not_fit_is_listed():
    state = ResNet32(10).state_dict()
    del state["bn1.weight"]
    state["conv9.weight"] = torch.ones(1)
    state["conv1.weight"] = torch.ones(16, 3, 5, 5)
    with pytest.raises(UserError) as error:
        load_weights(ResNet32(10), {"state_dict": state}, "x.pth")
    for word in (
        "missing bn1.weight",
        "unknown conv9.weight",
        "conv1.weight is [16, 3, 5, 5] instead of [16, 3, 3, 3]",
    ):
        assert word in str(error.value)


def test_other_architecture_or_class_count():
    checkpoint = {"state_dict": ResNet32(10).state_dict(), "arch": "ResNet32"}
    with pytest.raises(UserError, match="x.pth is a ResNet32, but --arch is vgg16_bn"):
        model_from_checkpoint(checkpoint, "x.pth", "vgg16_bn", 10)
    with pytest.raises(UserError, match="x.pth has 10 classes, but the data set has 100"):
        model_from_checkpoint(checkpoint, "x.pth", None, 100)
    with pytest.raises(UserError, match="x.pth: unknown architecture 'ResNet50'"):
        model_from_checkpoint({**checkpoint, "arch": "ResNet50"}, "x.pth", None, 10)


def test_copy_without_optimizer_state(cli, tmp_path):
    save_checkpoint(
        tmp_path / "a.pth",
        {"epoch": 2, "state_dict": {"w": torch.ones(1)}, "optimizer": {}, "scheduler": {}, "classes": ["a", "b"]},
    )
    assert cli("tools.strip_checkpoint", "a.pth", "b.pth").code == 0
    copy = load_checkpoint(tmp_path / "b.pth")
    assert copy.keys() == {"epoch", "state_dict", "classes"} and copy["classes"] == ["a", "b"]


@pytest.mark.parametrize(
    "facts, message",
    [
        ({"args": None}, "its args is None"),
        ({"arch": ["x"]}, "its arch is ['x']"),
        ({"epoch": "last"}, "its epoch is 'last'"),
        ({"averaged_epochs": 3}, "its averaged_epochs is 3"),
        ({"deployed": 4}, "its deployed is 4"),
        ({"classes": "abc"}, "its classes is 'abc'"),
        ({"classes": ["a", 3]}, "a class name is 3"),
        ({"classes": ["a", "b"], "args": {"dataset": "digits"}}, "a.pth has 2 classes, but the data set has 10"),
        ({"args": {"dataset": "mnist"}}, "unknown data set 'mnist'"),
    ],
)
def test_facts_of_the_wrong_kind(rejected, tmp_path, facts, message):
    save_checkpoint(tmp_path / "a.pth", {"state_dict": ResNet32(10).state_dict(), **facts})
    assert message in rejected("eval.py", "--model_path", "a.pth")


def test_facts_that_are_missing(tmp_path):
    assert training_facts({"args": {"psg": 1}, "averaged_epochs": []}) == {"trained": "", "seed": "", "epoch": ""}


@pytest.mark.parametrize(
    "flags, name",
    [
        ("--psg 0 --granularity channel", "SGD"),
        ("--adam 1 --psg 0", "Adam"),
        ("--w_bit 3 --granularity channel", "PSGD W3 channel"),
        ("--w_bit 4 --adam 1", "PSG-Adam W4"),
        ("--w_bit 4 --adam 1 --psg_acts_on update", "PSG-Adam W4 update"),
        ("--w_bit 4 --adam 1 --psg_acts_on update --decoupled_decay 1", "PSG-AdamW W4 update"),
    ],
)
def test_networks_that_were_trained_in_other_ways_have_other_names(flags, name):
    args = vars(train.parser().parse_args(flags.split()))
    assert training_facts({"args": args, "epoch": 150, "state_dict": {}})["trained"] == name


def wrapped(wrap, state):
    """`state` under the names that it has in a network that is wrapped by `wrap`."""
    model = ResNet32(10)
    model.load_state_dict(state)
    return wrap(model).state_dict()


def inside(model):
    """With one of its parts wrapped twice."""
    model.layer1[0] = torch.nn.DataParallel(torch.compile(model.layer1[0]))
    return model


@pytest.mark.parametrize("wrap", [
    torch.nn.DataParallel, torch.compile, lambda net: torch.compile(torch.nn.DataParallel(net)),
    lambda net: torch.nn.DataParallel(torch.compile(net)), lambda net: inside(torch.nn.DataParallel(net).module),
    torch.optim.swa_utils.AveragedModel, lambda net: torch.nn.ModuleDict({"model": torch.compile(net)}),
])  # fmt: skip
def test_names_that_a_wrapper_has_changed(tmp_path, wrap):
    state = ResNet32(10).state_dict()
    torch.save(wrapped(wrap, state), tmp_path / "a.pth")
    model = model_from_checkpoint(load_checkpoint(tmp_path / "a.pth"), "a.pth")
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_a_network_with_a_part_called_module_keeps_its_names():
    model = torch.nn.Sequential()
    model.module = torch.nn.Linear(2, 2)
    again = torch.nn.Sequential()
    again.module = torch.nn.Linear(2, 2)
    load_weights(again, {"state_dict": model.state_dict()}, "a.pth")
    assert torch.equal(again.module.weight, model.module.weight)
    both = {"fc.bias": torch.zeros(1), "module.fc.bias": torch.ones(1)}
    with pytest.raises(UserError, match="unknown module.fc.bias"):
        load_weights(ResNet32(10), {"state_dict": ResNet32(10).state_dict() | both}, "a.pth")


@pytest.mark.parametrize(
    "place",
    [
        "model",
        "model_state_dict",
        "model_state",
        "net",
        "state_dict_ema",
        "ema",
        "model_ema",
        "ema_state_dict",
        "weights",
    ],
)
def test_weights_under_the_keys_of_other_programs(tmp_path, place):
    state, other = ResNet32(10).state_dict(), ResNet32(10).state_dict()
    later = {"model_ema": other} if place in ("model", "net") else {}
    torch.save({place: state, **later, "epoch": 7, "optimizer": {}}, tmp_path / "a.pth")
    checkpoint = load_checkpoint(tmp_path / "a.pth")
    assert checkpoint.keys() == {"state_dict", "epoch", "optimizer"} and checkpoint["epoch"] == 7
    assert torch.equal(checkpoint["state_dict"]["fc.weight"], state["fc.weight"])
    torch.save({place: other, "state_dict": state}, tmp_path / "b.pth")
    assert torch.equal(load_checkpoint(tmp_path / "b.pth")["state_dict"]["fc.weight"], state["fc.weight"])
    torch.save({"model": {place: state, "depth": 3}}, tmp_path / "c.pth")
    assert torch.equal(load_checkpoint(tmp_path / "c.pth")["state_dict"]["fc.weight"], state["fc.weight"])


def test_weights_from_before_batches_were_counted(tmp_path):
    state = {name: value for name, value in ResNet32(10).state_dict().items() if "num_batches" not in name}
    torch.save(state, tmp_path / "a.pth")
    model = model_from_checkpoint(load_checkpoint(tmp_path / "a.pth"), "a.pth")
    assert torch.equal(model.bn1.running_var, state["bn1.running_var"]) and model.bn1.num_batches_tracked == 0


@pytest.mark.parametrize("content, message", [
    ({"acc": np.float64(0.5)}, "it holds a numpy scalar, numpy._core.multiarray.scalar, which is neither a tensor"),
    ({"mean": np.zeros(3)}, "it holds a numpy array, numpy._core.multiarray._reconstruct, which"),
    ({"args": argparse.Namespace(lr=1)}, "it holds argparse.Namespace, which is neither a tensor nor a plain value"),
    (ResNet32(10), "it holds models.resnet.ResNet32, which is neither a tensor nor a plain value"),
    ({"out": pathlib.PurePosixPath("a")}, "it holds pathlib.PurePosixPath, which"),
])  # fmt: skip
@pytest.mark.parametrize("as_zip", [True, False])
def test_what_is_no_plain_value_is_named(tmp_path, content, message, as_zip):
    content = content if isinstance(content, torch.nn.Module) else {"state_dict": {"w": torch.ones(1)}, **content}
    torch.save(content, tmp_path / "a.pth", _use_new_zipfile_serialization=as_zip)
    with pytest.raises(UserError) as error:
        load_checkpoint(tmp_path / "a.pth")
    said = str(error.value)
    assert message in said and "save model.state_dict()" in said
    assert "\x1b" not in said and "\n" not in said and "weights_only" not in said


def test_entries_that_are_no_tensors_are_named(tmp_path):
    for name, value, kind in (("num_updates", 300, "int"), (3, torch.ones(1), "Tensor"), ("ema", {"decay": 1}, "dict")):
        torch.save({"state_dict": {"w": torch.ones(1), name: value}}, tmp_path / "a.pth")
        with pytest.raises(UserError, match=rf"a.pth: '{name}' in its state_dict is not a tensor \({kind}\)|'3' in"):
            load_checkpoint(tmp_path / "a.pth")


@pytest.mark.parametrize("change, message", [
    (lambda bias: bias.to(torch.complex64), "fc.bias is torch.complex64 instead of torch.float32"),
    (lambda bias: bias.to(torch.int8), "fc.bias is torch.int8 instead of torch.float32"),
    (lambda bias: bias.to_sparse(), "fc.bias is a tensor of layout torch.sparse_coo"),
    (lambda bias: bias.to("meta"), "fc.bias is on the meta device, without values"),
])  # fmt: skip
def test_weights_that_would_lose_something_are_refused(change, message):
    state = ResNet32(10).state_dict()
    with pytest.raises(UserError, match=f"a.pth does not fit ResNet32: {message}"):
        load_weights(ResNet32(10), {"state_dict": state | {"fc.bias": change(state["fc.bias"])}}, "a.pth")


def test_a_folder_names_its_checkpoint(rejected, tmp_path, digits_run):
    assert f"{digits_run.parent} is a folder: its last checkpoint is {digits_run}" in rejected(
        "eval.py", "--model_path", digits_run.parent
    )
    (tmp_path / "d").mkdir()
    flags = ["--dataset", "digits", "--load_pretrained", "d"]
    assert "d is a folder: name a file" in rejected("train.py", *flags)
