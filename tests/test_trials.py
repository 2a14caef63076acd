"""The other rules for lambda_s "auto", which tools.trials compares."""

from argparse import Namespace

import pytest
import torch

import quant.psgd
from quant import PSGD, expected_share
from quant import lambda_s as law
from quant.settings import STAGE_DEFAULTS
from tests.test_lambda_s import Walk
from tools.trials import change


@pytest.fixture(autouse=True)
def rule(monkeypatch):
    """rule(name) makes `auto` follow it. What a test changes, also by a command, ends with the test."""
    for owner, name in ((law, "planned_variance"), (law, "PLAN_END"), (quant.psgd, "take_step")):
        monkeypatch.setattr(owner, name, getattr(owner, name))
    for key, value in STAGE_DEFAULTS.items():
        monkeypatch.setitem(STAGE_DEFAULTS, key, value)
    return lambda name, tau_end=8.0: change(Namespace(rule=name, tau_end=tau_end, noise_limit=0.5, plan_end=0.5))


@pytest.mark.parametrize(("name", "half"), [("even", 4.0), ("fast_first", 6.0), ("slow_first", 2.0)])
def test_plans_reach_the_same_end_by_other_ways(rule, name, half):
    rule(name)
    walk = Walk()
    optimizer = PSGD(torch.optim.SGD(walk.groups(), lr=0.01), "auto", steps=2000)
    walk.steps(optimizer, 500)
    assert optimizer.pace().tau == pytest.approx(half, rel=0.05)
    walk.steps(optimizer, 500)
    assert optimizer.pace().tau == pytest.approx(8, rel=0.05)
    assert walk.share() == pytest.approx(expected_share(8.0), abs=0.03)


def test_one_lambda_s_for_all_tensors(rule):
    rule("one_lambda_s")
    walk = Walk(sizes=(1000, 3000), spreads=(1.0, 3.0))
    optimizer = PSGD(torch.optim.SGD(walk.groups(), lr=0.01), "auto", steps=1000)
    walk.steps(optimizer, 400)
    used = [optimizer.state[weight]["psg_pace"][law.RECORD.index("lambda_s")].item() for weight in walk.weights]
    assert used[0] == used[1] and optimizer.pace().tau == pytest.approx(8 * 0.8, rel=0.05)


def test_grafted_gradients_keep_their_norm(rule):
    rule("grafted")
    walk = Walk(sizes=(500, 700), spreads=(1.0, 5.0))
    optimizer = PSGD(torch.optim.SGD(walk.groups(), lr=0.0), "auto", steps=9)
    for weight in walk.weights:
        weight.grad = torch.randn(weight.shape, generator=walk.generator)
    before = [weight.grad.norm().item() for weight in walk.weights]
    optimizer.step()
    assert [weight.grad.norm().item() for weight in walk.weights] == pytest.approx(before, rel=1e-4)


def test_a_run_of_a_trial_keeps_its_command(cli, tmp_path, few_digits):
    words = ["--rule", "fast_first", "--tau_end", 3, "--dataset", "cifar10", "--device", "cpu", "--epoch", 1]
    assert cli("tools.trials", *words, "--exp_name", "a").code == 0
    assert "--rule fast_first --tau_end 3 --dataset cifar10" in (tmp_path / "runs/a/args.json").read_text()


def test_wrong_rules_are_one_line(rejected):
    assert "invalid choice: 'best'" in rejected("tools.trials", "--rule", "best")
    assert "--tau_end" in rejected("tools.trials", "--tau_end", "0")
    assert "unrecognized arguments: --lamda" in rejected("tools.trials", "--lamda", "3")
