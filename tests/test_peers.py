"""tools.peers as a user runs it: short runs by each method, their files, and what is answered to bad input."""

import csv
import importlib.util
import sys

import pytest
import torch

import train
from quant import Grid, layer_grids, quantize_weights
from tests.helpers import same, weights
from tools.peers import METHODS, OF_TORCHAO, parse
from utils.checkpoint import load_checkpoint, model_from_checkpoint, training_facts
from utils.trained_for import mismatches
from utils.training.qat import lsq

RUN = ["--dataset", "cifar10", "--arch", "squeezenet1_1", "--batch_size", "64", "--lr", "0.001", "--device", "cpu"]
RUN += ["--precision", "fp32", "--deterministic", "--w_bit", "3", "--granularity", "channel"]
needs_torchao = pytest.mark.skipif(not importlib.util.find_spec("torchao"), reason="needs torchao")
EACH = [pytest.param(name, marks=needs_torchao) if name in OF_TORCHAO else name for name in METHODS]


def rows(folder):
    with open(folder / "metrics.csv", newline="") as file:
        return [{k: float(v) for k, v in row.items() if "seconds" not in k} for row in csv.DictReader(file)]


@pytest.mark.parametrize("method", EACH)
def test_a_run_and_its_files(cli, tmp_path, few_digits, method):
    """Of two epochs, the second one resumed, beside one that was not interrupted."""
    words = ["--method", method, *RUN, "--decay_epoch", 2]
    assert cli("tools.peers", *words, "--epoch", 2, "--save_epochs", 1, "--exp_name", "whole").code == 0
    outcome = cli("tools.peers", *words, "--epoch", 2, "--exp_name", "cut", "--save_epochs", 1)
    assert outcome.code == 0 and f"{method}: {METHODS[method]}" in outcome.out
    cut, whole = tmp_path / "runs/cut", tmp_path / "runs/whole"
    (cut / "epoch_1.pth").replace(cut / "last.pth")
    assert cli("tools.peers", "--exp_name", "cut", "--resume").code == 0
    last, other = (load_checkpoint(folder / "last.pth") for folder in (whole, cut))
    model = model_from_checkpoint(last, "last.pth")
    assert same(weights(model), weights(model_from_checkpoint(other, "last.pth")))
    assert rows(whole) == rows(cut) and {"fp_top1", "w3_top1", "grid_share"} <= rows(whole)[0].keys()
    for name in ("last.pth", "quantized.pth"):
        assert cli("eval.py", "--model_path", whole / name, "--w_bit", 32, 3, "--device", "cpu").code == 0
    kind = "PSGD W3 channel" if method == "psgd" else f"{method.upper()} W3 channel"
    quantized = load_checkpoint(whole / "quantized.pth")
    assert training_facts(last)["trained"] == training_facts(quantized)["trained"] == kind
    for file in (last, quantized):  # learned steps make grids of their own
        assert bool(mismatches(file, Grid(3, per_channel=True))) == (method == "lsq")
    expected = quantize_weights(model, Grid(3, per_channel=True))
    if method == "lsq":
        grids = layer_grids(model, Grid(3, per_channel=True))
        with torch.no_grad():
            for name, step in last["steps"].items():
                expected.get_parameter(name).copy_(lsq(model.get_parameter(name), step, grids[name].quant_max))
    assert same(weights(model_from_checkpoint(quantized, "quantized.pth")), weights(expected))


@needs_torchao
@pytest.mark.parametrize("decay", [9, 2])
def test_the_relaxation_ends_within_the_stage(cli, tmp_path, few_digits, decay):
    """With a fall of the rate behind the end of the run, as with the default one, it ends with the run."""
    words = ["--method", "parq", *RUN, "--epoch", 2, "--decay_epoch", decay, "--exp_name", "a"]
    assert cli("tools.peers", *words).code == 0
    relaxed = load_checkpoint(tmp_path / "runs/a/last.pth")["relaxed"]
    points = [len(channel.unique()) for name, weight in relaxed.items() if "squeeze" in name for channel in weight]
    assert points and max(points) <= 7  # of 3 bits


def test_psgd_is_train_py(cli, tmp_path, few_digits):
    words = [*RUN, "--epoch", 1, "--exp_name"]
    assert cli("train.py", *words, "a", "--lambda_s", "auto").code == 0
    assert cli("tools.peers", "--method", "psgd", *words, "b").code == 0
    ours, theirs = (load_checkpoint(tmp_path / "runs" / name / "last.pth") for name in "ab")
    assert all(torch.equal(value, theirs["state_dict"][name]) for name, value in ours["state_dict"].items())
    assert rows(tmp_path / "runs/a") == rows(tmp_path / "runs/b")


def test_weight_decay_is_that_of_sgd_at_two_bits(monkeypatch):
    for method, decay in (("ste", 1e-4), ("psgd", 0.0)):
        monkeypatch.setattr(sys, "argv", ["peers", "--method", method, "--w_bit", "2"])
        args, _ = parse()
        assert args.w_decay == decay and args.psg == (method == "psgd")
        assert args.load_pretrained == train.PRETRAINED and args.exp_name == f"peers/{method}"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "no method: choose --method ste, lsq"),
        (["--method", "dorefa"], "invalid choice: 'dorefa'"),
        (["--method", "msqe", "--penalty", "0"], "0 must be greater than 0"),
        (["--method", "ste", "--penalty", "99"], "--penalty 99 is for --method msqe"),
        (["--method", "ste", "--w_bits", "4"], "did you mean --w_bit?"),
        (["--method", "ste", "--psg", "0"], "--psg follows from --method"),
        (["--method", "ste", "--target", "zero"], "leave --target zero and --grad_l1 out"),
        (["--method", "ste", "--lambda_s", "300"], "--lambda_s 300.0 does not go with --method ste"),
        (["--method", "lsq", "--compile", "1"], "--compile 1 does not go with --method lsq"),
    ],
)
def test_bad_commands(rejected, words, message):
    assert message in rejected("tools.peers", *words)


def test_without_torchao(rejected, monkeypatch):
    monkeypatch.setattr("tools.peers.importlib.util.find_spec", lambda name: None)
    line = rejected("tools.peers", "--method", "parq")
    assert "--method parq needs torchao: pip install --no-deps torchao" in line


def test_a_run_is_resumed_by_the_command_that_started_it(cli, tmp_path, few_digits):
    words = [*RUN, "--epoch", 1, "--exp_name"]
    assert cli("tools.peers", "--method", "ste", *words, "a").code == 0
    outcome = cli("train.py", "--exp_name", "a", "--resume", "--epoch", 2)
    assert outcome.code == 2 and "python -m tools.peers --exp_name a --resume continues it" in outcome.err
    outcome = cli("tools.peers", "--exp_name", "a", "--resume", "--method", "lsq")
    assert outcome.code == 2 and "--method lsq (was ste)" in outcome.err
    assert cli("train.py", "--psg", 0, *words, "b").code == 0
    outcome = cli("tools.peers", "--exp_name", "b", "--resume")
    assert outcome.code == 2 and "runs/b was not started by tools.peers: the command that" in outcome.err
