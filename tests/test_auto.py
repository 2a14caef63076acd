"""lambda_s "auto": the plan, its limits, and a real run that is steered and resumed."""

import csv

import pytest
import torch

from quant import AUTO_START, PSGD, psg_param_groups, steer_lambda_s


@pytest.fixture
def optimizer(net):
    return PSGD(torch.optim.SGD(psg_param_groups(net, bits=3), lr=0.01), lambda_s=AUTO_START)


def scaled(optimizer):
    return [group["lambda_s"] for group in optimizer.param_groups if "bits" in group]


def test_rises_below_the_plan_only(optimizer):
    assert steer_lambda_s(optimizer, share=0.58, progress=0.5) == 150  # the plan is 0.575
    assert steer_lambda_s(optimizer, share=0.57, progress=0.5) == 187.5
    assert scaled(optimizer) == [187.5, 187.5]  # the groups of 3 and of 8 bits
    assert "lambda_s" not in optimizer.param_groups[2]
    assert steer_lambda_s(optimizer, share=0.99, progress=0.6) == 187.5  # it never falls


def test_stays_after_the_decay_and_below_its_limit(optimizer):
    assert steer_lambda_s(optimizer, share=0.1, progress=1) == 150
    for _ in range(30):
        steer_lambda_s(optimizer, share=0.1, progress=0.9)
    assert scaled(optimizer) == [3000, 3000]


def test_nothing_to_steer(net):
    with pytest.raises(ValueError, match="no parameter group with PSG settings"):
        steer_lambda_s(torch.optim.SGD(net.parameters(), lr=0.1), 0.5, 0.5)


def test_a_steered_run_is_resumed_as_it_was(cli, tmp_path):
    flags = ["--dataset", "digits", "--batch_size", "256", "--lr", "0.005", "--deterministic", "--device", "cpu"]
    flags += ["--lambda_s", "auto", "--decay_epoch", "4"]
    assert cli("train.py", *flags, "--epoch", 4, "--exp_name", "whole").code == 0
    assert cli("train.py", *flags, "--epoch", 2, "--exp_name", "cut").code == 0
    assert cli("train.py", "--exp_name", "cut", "--resume", "--epoch", 4).code == 0
    columns = {}
    for name in ("whole", "cut"):
        with open(tmp_path / f"runs/{name}/metrics.csv", newline="") as file:
            columns[name] = [(row["grid_share"], row["lambda_s"]) for row in csv.DictReader(file)]
    assert columns["whole"] == columns["cut"]
    # A small learning rate leaves the weights where they were: epochs 1 and 2 fall behind the plan, which ends with 3.
    assert [float(used) for _, used in columns["whole"]] == [150, 187.5, 234.375, 234.375]
