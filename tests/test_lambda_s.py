"""lambda_s "auto": the plan, its limits, and a real run that is steered and resumed."""

import csv
import math
import shutil

import pytest
import torch
import torchvision
from torch import nn

from models import ResNet32
from quant import (
    PSGD,
    auto_lambda_s,
    fake_quantize_weight,
    grid_share,
    layer_grids,
    psg_param_groups,
    quantize_weights,
    sparse_param_groups,
    steer_lambda_s,
)
from quant.lambda_s import AUTO_MULTIPLIER, mean_distance
from quant.psgd import psg_multipliers
from tests.helpers import ROOT
from utils.checkpoint import load_checkpoint


def test_parameters_are_not_groups(net):
    for wrong in (net.parameters(), [*net.parameters()], net):
        with pytest.raises(TypeError, match="groups must be a list of parameter groups, as psg_param_groups"):
            auto_lambda_s(wrong)


@pytest.fixture
def optimizer(net):
    return PSGD(torch.optim.SGD(psg_param_groups(net, 3), lr=0.01), lambda_s=150)


def scaled(optimizer):
    return [group["lambda_s"] for group in optimizer.param_groups if "bits" in group]


def test_rises_below_the_plan_only(optimizer):
    assert steer_lambda_s(optimizer, share=0.58, progress=0.5, loss=2.0) == 150  # the plan is 0.575
    assert steer_lambda_s(optimizer, share=0.57, progress=0.5, loss=1.0) == 187.5
    assert scaled(optimizer) == [187.5, 187.5]  # the groups of 3 and of 8 bits
    assert "lambda_s" not in optimizer.param_groups[2]
    assert steer_lambda_s(optimizer, share=0.99, progress=0.6, loss=1.09) == 187.5  # above the plan it does not fall
    assert steer_lambda_s(optimizer, share=0.1, progress=0.6, loss=2.0) == 234.375  # two epochs after a rise


def test_stays_after_the_decay_and_below_its_limit(optimizer):
    assert steer_lambda_s(optimizer, share=0.1, progress=1, loss=1.0) == 150
    for _ in range(30):
        steer_lambda_s(optimizer, share=0.1, progress=0.9, loss=1.0)
    assert scaled(optimizer) == [3000, 3000]


def test_rises_that_the_loss_does_not_bear_are_taken_back_for_good(net):
    def make():
        return PSGD(torch.optim.SGD(psg_param_groups(net, 3), lr=0.01), lambda_s=150)

    optimizer = make()
    for loss, expected in ((1.0, 187.5), (1.09, 234.375), (1.2, 150), (0.9, 150), (0.9, 150)):  # 1.2 > 1.1 * 1.09
        assert steer_lambda_s(optimizer, share=0.1, progress=0.5, loss=loss) == expected
        saved, optimizer = optimizer.state_dict(), make()  # as resumed after each epoch
        optimizer.load_state_dict(saved)
    assert scaled(optimizer) == [150, 150]


def test_a_loss_that_is_no_number_is_harm(optimizer):
    assert steer_lambda_s(optimizer, share=0.1, progress=0.5, loss=1.0) == 187.5
    assert steer_lambda_s(optimizer, share=0.1, progress=0.5, loss=math.nan) == 150


def test_a_weight_that_cannot_follow_the_plan_does_not_diverge():
    """Trained by PSGD. It wants to stay in mid-cell, so that its share of the grid never rises and lambda_s does, until
    its steps overshoot. Without a look at the loss it jumps further with each rise, up to 43 and a loss of 1,800.

    The other weight is the largest, and so the grid, of steps of 1, never moves. The loss cannot fall below 0.09.
    """
    layer = nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[7.0, 0.4]]))
    groups = psg_param_groups(layer, 4)
    optimizer = PSGD(torch.optim.SGD(groups, lr=0.1), lambda_s=auto_lambda_s(groups))
    losses, used = [], []
    for _ in range(12):
        steps = []
        for shift in (0.01, -0.01, 0.01, -0.01):
            wanted = torch.tensor([[0.8], [0.2]]) + shift
            loss = (layer(torch.tensor([[0.0, 1.0]] * 2)) - wanted).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            steps.append(loss.item())
        losses.append(sum(steps) / 4)
        used.append(steer_lambda_s(optimizer, grid_share(layer, 4), 0.5, losses[-1]))
    assert used == pytest.approx([25, 31.25] + 10 * [20]) and max(losses) < 0.14 and losses[-1] < 0.1


def transformer():
    return nn.Sequential(nn.Linear(8, 32), nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), nn.Linear(32, 10))


@pytest.mark.parametrize("build", [torchvision.models.resnet18, transformer])
@pytest.mark.parametrize("bits", [4, 2])
def test_start_on_other_networks(build, bits):
    torch.manual_seed(0)
    model = build()
    groups = psg_param_groups(model, bits)
    start = auto_lambda_s(groups)
    assert start > 300  # their weights are smaller than ResNet-32's, and 150 would hardly move them
    # Stated layer by layer, at 4 bits: the mean over all weights is the target.
    names = layer_grids(model, bits)
    layers = {name: start * mean_distance([model.get_parameter(name)]) for name in names}
    sizes = {name: model.get_parameter(name).numel() for name in names}
    mean = sum(layers[name] * sizes[name] for name in names) / sum(sizes.values())
    assert mean == pytest.approx(AUTO_MULTIPLIER)
    if bits == 4:  # and so it is what PSGD does in its first step
        optimizer = PSGD(torch.optim.SGD(groups, lr=0.1), lambda_s=start)
        group = optimizer.param_groups[0]
        multipliers = torch.cat([m.flatten() for m in psg_multipliers(group["params"], group)])
        assert multipliers.mean().item() == pytest.approx(AUTO_MULTIPLIER, rel=1e-4)


def test_start_on_the_papers_network():
    model = ResNet32(100)
    model.load_state_dict(load_checkpoint(ROOT / "models/ResNet82.pth")["state_dict"])
    assert 130 < auto_lambda_s(psg_param_groups(model, 4)) < 170  # the paper took 150
    weight = model.layer1[0].conv1.weight
    expected = (weight - fake_quantize_weight(weight, 3)).abs().mean().item()
    assert mean_distance([weight], 3) == pytest.approx(expected, rel=1e-5)


def test_no_start():
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    for parameter in net.parameters():
        nn.init.zeros_(parameter)
    with pytest.raises(ValueError, match="every weight is on the 4-bit grid"):
        auto_lambda_s(psg_param_groups(net, 4))
    with pytest.raises(ValueError, match="no weights"):
        auto_lambda_s([{"params": list(net.parameters())}])
    with pytest.raises(TypeError, match="params must be a list of tensors, got generator"):
        auto_lambda_s([{"params": net.parameters(), "bits": 4}])
    with pytest.raises(ValueError, match='target "zero": lambda_s is found only for grids'):
        auto_lambda_s(sparse_param_groups(net))


def test_nothing_to_steer(net):
    with pytest.raises(ValueError, match="no parameter group with PSG settings"):
        steer_lambda_s(torch.optim.SGD(net.parameters(), lr=0.1), 0.5, 0.5, 1.0)
    with pytest.raises(ValueError, match="share must be from 0 to 1, got 93.7"):  # in percent
        steer_lambda_s(torch.optim.SGD(net.parameters(), lr=0.1), 93.7, 0.5, 1.0)


def test_a_network_on_its_grid_has_no_start(cli, tmp_path, digits_run):
    checkpoint = load_checkpoint(digits_run)
    model = ResNet32(10)
    model.load_state_dict(checkpoint["state_dict"])
    torch.save(checkpoint | {"state_dict": quantize_weights(model, 4).state_dict()}, tmp_path / "a.pth")
    outcome = cli("train.py", "--dataset", "digits", "--load_pretrained", "a.pth", "--lambda_s", "auto")
    assert outcome.code == 2 and "--lambda_s auto: every weight is on the 4-bit grid" in outcome.err
    assert not (tmp_path / "runs").exists()


def test_a_steered_run_is_resumed_as_it_was(cli, tmp_path, few_digits):
    flags = ["--dataset", "cifar10", "--batch_size", "100", "--lr", "1e-4", "--deterministic", "--device", "cpu"]
    flags += ["--arch", "squeezenet1_1", "--lambda_s", "auto", "--decay_epoch", "4"]
    assert cli("train.py", *flags, "--epoch", 4, "--save_epochs", 2, "--exp_name", "whole").code == 0
    cut = shutil.copytree(tmp_path / "runs/whole", tmp_path / "runs/cut")
    (cut / "epoch_2.pth").replace(cut / "last.pth")
    assert cli("train.py", "--exp_name", "cut", "--resume").code == 0
    columns = {}
    for name in ("whole", "cut"):
        with open(tmp_path / f"runs/{name}/metrics.csv", newline="") as file:
            columns[name] = [(row["grid_share"], row["lambda_s"]) for row in csv.DictReader(file)]
    assert columns["whole"] == columns["cut"]
    # A small learning rate leaves the weights where they were: epochs 1 and 2 fall behind the plan, which ends with 3.
    used = [float(used) for _, used in columns["whole"]]
    assert used == pytest.approx([used[0] * 1.25**rises for rises in (0, 1, 2, 2)])


def test_the_plan_ends_with_the_run_where_no_decay_comes_before(cli, tmp_path, few_digits):
    flags = ["--dataset", "cifar10", "--batch_size", "100", "--lr", "1e-4", "--device", "cpu", "--epoch", 2]
    flags += ["--decay_epoch", 100_000]
    assert cli("train.py", *flags, "--arch", "squeezenet1_1", "--lambda_s", "auto", "--exp_name", "a").code == 0
    with open(tmp_path / "runs/a/metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert float(rows[0]["grid_share"]) > 0.2 + 0.75 / 100_000  # more than a plan to that decay would ask for
    assert float(rows[1]["lambda_s"]) == pytest.approx(1.25 * float(rows[0]["lambda_s"]))
