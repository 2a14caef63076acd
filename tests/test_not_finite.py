"""Networks whose outputs are not finite: an error or a warning, never a row without a word."""

import json

import pytest
import torch

from utils.checkpoint import load_checkpoint, save_checkpoint


@pytest.fixture
def overflowing(digits_run, tmp_path):
    """A function that gives a copy of a trained network whose weights are finite and whose outputs are not."""

    def make():
        checkpoint = load_checkpoint(digits_run)
        for name in ("fc.weight", "bn1.weight"):
            checkpoint["state_dict"][name].mul_(1e30)
        save_checkpoint(tmp_path / "big.pth", checkpoint)
        return tmp_path / "big.pth"

    return make


def test_outputs_that_are_not_finite(rejected, cli, tmp_path, overflowing):
    path = overflowing()
    message = rejected("eval.py", "--model_path", path, "--w_bit", "4", "--out", "a")
    assert f"error: {path}: the network's outputs are not finite (loss nan): take the file of" in message
    pytest.importorskip("onnxruntime")
    assert "the network's outputs are not finite at W4A32: nothing is written" in rejected(
        "export.py", "--model_path", path, "--out", "a"
    )


def test_outputs_that_quantization_makes_infinite(cli, tmp_path, digits_run):
    """A first layer whose weights, on a gray image, cancel out as floats and not on a grid of 15 points."""
    checkpoint = load_checkpoint(digits_run)
    state = checkpoint["state_dict"]
    state["conv1.weight"].zero_()[:, :, 1, 1] = 1e36 * torch.tensor([1, -0.5, -0.5])
    state["fc.weight"].mul_(1e4)
    save_checkpoint(tmp_path / "big.pth", checkpoint)
    flags = ["--model_path", "big.pth", "--w_bit", "4", "--calib_images", "16", "--report", "--out", "a"]
    outcome = cli("eval.py", *flags)
    first, *others = outcome.err.splitlines()
    assert outcome.code == 0 and "warning: big.pth: the network's outputs are not finite (loss " in first
    assert first.endswith(") at W4A32, post none: its top-1 is meaningless")
    assert len(others) == 1 and " with only conv1 at W4: " in others[0], others
    rows = json.loads((tmp_path / "a/results.json").read_text())["rows"]
    assert [row["w_bit"] for row in rows] == [32, 4] and rows[1]["loss"] is None and rows[0]["loss"] > 0


def test_a_network_that_evaluation_finds_not_finite_ends_the_run(cli, tmp_path, digits_run, few_digits):
    """Training takes its batch norm from the images, evaluation from what was written down."""
    checkpoint = load_checkpoint(digits_run)
    checkpoint["state_dict"]["layer1.0.bn1.running_var"].fill_(-1000)
    save_checkpoint(tmp_path / "bad.pth", checkpoint)
    flags = ["--load_pretrained", "bad.pth", "--arch", "ResNet8", "--dataset", "cifar10", "--psg", "0"]
    outcome = cli("train.py", *flags, "--epoch", "4", "--exp_name", "a", "--device", "cpu")
    assert outcome.code == 2 and len(outcome.err.splitlines()) == 1, outcome.err
    reason = (
        "the network's outputs were not finite (loss nan) in the evaluation of epoch 4; last good checkpoint: bad.pth"
    )
    assert reason in outcome.err and not (tmp_path / "runs/a/last.pth").exists()
