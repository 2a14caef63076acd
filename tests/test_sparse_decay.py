"""Weight decay of the weights that are to become zero: an L1 penalty, beside scaled gradients."""

import pytest
import torch

import train
from quant import sparse_param_groups
from tests.helpers import read_csv
from tools import lasso
from utils.checkpoint import load_checkpoint, save_checkpoint
from utils.training.setup import build_goal, build_optimizer


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_it_reaches_the_lasso(momentum):
    """At rest lambda_s * |w| * g + weight_decay * w is 0, so g is weight_decay / lambda_s * sign(w) where w is not 0.

    Seen: relative differences of 1e-12 and less. That of the start is 0.2.
    """
    x, y = lasso.problem(seed=0)
    penalty = 0.2

    def objective(weight):
        return ((x @ weight - y).square().mean() / 2 + penalty * weight.abs().sum()).item()

    best, weight = lasso.lasso(x, y, penalty), lasso.psgd(x, y, penalty, momentum)
    assert objective(weight) == pytest.approx(objective(best), rel=1e-3)
    assert objective(lasso.least_squares(x, y)) > 1.1 * objective(best)
    assert torch.equal(weight.abs() < 1e-3, best == 0) and 0 < (best == 0).sum() < lasso.WEIGHTS


def test_the_paths_as_a_table_and_a_picture(cli, tmp_path, monkeypatch):
    monkeypatch.setattr(lasso, "PENALTIES", [0.2, 0.4])
    assert cli("tools.lasso", "--out", "l").code == 0
    rows = read_csv(tmp_path / "l/lasso.csv")
    assert len(rows) == 2 * lasso.WEIGHTS
    assert all(float(row["psgd"]) == pytest.approx(float(row["lasso"]), abs=1e-3) for row in rows)
    assert cli("visualize.py", "--figure", "lasso", "--results", "l/lasso.csv", "--out", "f").code == 0
    assert (tmp_path / "f/lasso.png").stat().st_size > 10_000


def test_decay_of_the_target_apart(net):
    args = train.parser().parse_args(
        ["--target", "zero", "--w_decay", "0.5", "--w_decay_target", "0.25", "--sparsity", "0.9"]
    )
    scaled, others = build_optimizer(args, net, build_goal(args), torch.device("cpu"), steps=9).param_groups
    assert scaled["target"] == "zero" and scaled["weight_decay"] == 0.25 and others["weight_decay"] == 0.5
    assert all("weight_decay" not in group for group in sparse_param_groups(net))


@pytest.mark.parametrize("decay", [-1.0, float("nan"), float("inf")])
def test_bad_decay(net, decay):
    with pytest.raises(ValueError, match=f"weight_decay must be a finite number >= 0, got {decay}"):
        sparse_param_groups(net, weight_decay=decay)


def test_a_layer_that_vanishes_ends_the_run(cli, tmp_path, digits_run, few_digits):
    """A step is an epoch here, and the first is epoch 4. Decay alone, 0.1 * 5 with a momentum of 0.9, makes of the
    largest weight, 3e-6, first 0.5 and then -0.2 of it; lambda_s 1e-6 leaves nothing of the gradient."""
    checkpoint = load_checkpoint(digits_run)
    weight = checkpoint["state_dict"]["conv1.weight"]
    weight.mul_(3e-6 / weight.abs().max())
    save_checkpoint(tmp_path / "small.pth", checkpoint)
    flags = ["--load_pretrained", "small.pth", "--arch", "ResNet8", "--dataset", "cifar10", "--exp_name", "a"]
    flags += ["--epoch", "9", "--lr", "0.1", "--target", "zero", "--lambda_s", "1e-6", "--w_decay_target", "5"]
    outcome = cli("train.py", *flags, "--device", "cpu")
    assert outcome.code == 2 and len(outcome.err.splitlines()) == 1, outcome.err
    assert "conv1.weight has no weight above 1e-06 after epoch 5" in outcome.err
    assert "last good checkpoint: runs/a/last.pth; try a smaller --w_decay_target or --l1" in outcome.err
    kept = load_checkpoint(tmp_path / "runs/a/last.pth")["state_dict"]["conv1.weight"]
    assert kept.abs().max() == pytest.approx(1.5e-6, rel=0.05)
