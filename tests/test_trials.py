"""The other rules for lambda_s "auto", which tools.trials compares."""

import os
import signal
import subprocess
import sys
from argparse import Namespace

import pytest
import torch
from torch import nn

import quant.psgd
from quant import PSGD, Grid, expected_share, psg_param_groups, quantize_weights
from quant import lambda_s as law
from quant.settings import STAGE_DEFAULTS
from tests.helpers import ROOT, Walk
from tools.trials import GAP_CHECKS, Decay, GapRule, change, extend, main
from utils.training.goals import GridGoal


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


def prepared(optimizer, model, images):
    """What `extend` needs of a run of one epoch of `images`."""
    settings = Namespace(epoch=1, precision="fp32", w_decay=0.1)
    batches = type("Batches", (list,), {"epoch": lambda self, number: iter(self)})(images)
    return Namespace(
        optimizer=optimizer, model=model, batches=batches, goal=GridGoal(Grid(2)), first_epoch=1, args=settings
    )


@pytest.mark.parametrize(("on_grid", "factor"), [(True, 1 / 1.5), (False, 1.5)])
def test_the_gap_rule_raises_lambda_s_only_while_the_quantized_network_is_worse(on_grid, factor):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 9), nn.ReLU(), nn.Linear(9, 9), nn.Linear(9, 3))
    images = torch.randn(32, 1, 2, 2)
    model[4].weight.data *= 50
    labels = model(images).argmax(1)  # of the float network, which is sure of them: any other one is worse
    if on_grid:
        model = quantize_weights(model, Grid(2))
    optimizer = PSGD(torch.optim.SGD(psg_param_groups(model, Grid(2)), lr=0.0), "auto", steps=16)
    rule = GapRule(prepared(optimizer, model, [(images, labels)] * GAP_CHECKS))
    for _ in range(2):
        rule()
    assert rule.lambda_s == pytest.approx(150 * factor**2)
    assert {group["lambda_s"] for group in optimizer.param_groups if "bits" in group} == {rule.lambda_s}


def test_a_rate_falls_after_a_number_of_steps():
    walk = Walk()
    optimizer = PSGD(torch.optim.SGD(walk.groups(), lr=0.5), "auto", steps=9)
    optimizer.register_step_post_hook(Decay(optimizer, 3))
    rates = []
    for _ in range(5):
        rates.append(optimizer.param_groups[0]["lr"])
        walk.steps(optimizer, 1)
    assert rates == pytest.approx([0.5, 0.5, 0.5, 0.05, 0.05])


@pytest.mark.parametrize("outside", [False, True])
def test_decay_outside_the_scaling_shrinks_all_weights_alike(outside):
    torch.manual_seed(0)
    model = nn.Linear(30, 20)
    before = model.weight.detach().clone()
    base = torch.optim.AdamW(psg_param_groups(model, 4), lr=0.1, betas=(0.0, 0.999), weight_decay=0.1)
    optimizer = PSGD(base, 50.0, acts_on="update")
    extend(prepared(optimizer, model, []), Namespace(rule="even", decay_at=None, decay_outside=outside, beta1=0.5))
    assert optimizer.param_groups[0]["betas"][0] == 0.5
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    shrunk = (model.weight / before).detach()
    if outside:
        torch.testing.assert_close(shrunk, torch.full_like(shrunk, 0.99))
    else:
        assert shrunk.flatten()[before.abs().argmax()] == 1 and shrunk.min() < 0.999


def test_a_run_of_a_trial_keeps_its_command(cli, tmp_path, few_digits):
    words = ["--rule", "fast_first", "--tau_end", 3, "--dataset", "cifar10", "--device", "cpu", "--epoch", 1]
    assert cli("tools.trials", *words, "--exp_name", "a").code == 0
    assert "--rule fast_first --tau_end 3 --dataset cifar10" in (tmp_path / "runs/a/args.json").read_text()
    for command in ("train.py", "tools.trials"):
        outcome = cli(command, "--exp_name", "a", "--resume", "--epoch", 2)
        assert outcome.code == 2 and "start a new run" in outcome.err


@pytest.mark.parametrize(
    ("flags", "graph"),
    [
        ([], 1),
        (["--rule", "gap"], 0),
        (["--decay_at", "0.5"], 0),
        (["--adam", "1", "--psg_acts_on", "update", "--decoupled_decay", "1", "--decay_outside"], 0),
    ],
)
def test_hooks_of_steps_need_the_plain_loop(monkeypatch, flags, graph):
    """A CUDA graph replays none."""
    asked = []
    monkeypatch.setattr("utils.training.run.train", lambda settings, *_: asked.append(settings.cuda_graph))
    monkeypatch.setattr(sys, "argv", ["trials", *flags])
    main()
    assert asked == [graph]


def test_a_run_that_cannot_be_resumed_says_so_when_it_is_stopped(tmp_path, few_digits):
    flags = ["--dataset", "cifar10", "--arch", "squeezenet1_1", "--load_pretrained", "", "--batch_size", "16"]
    flags += ["--lr", "0.001", "--epoch", "500", "--exp_name", "a", "--device", "cpu"]
    command = [sys.executable, "-m", "tools.trials", *flags]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, cwd=tmp_path, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert any(line.startswith("epoch   1 ") for line in process.stdout)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=100)
    assert process.returncode == 143 and "it cannot be resumed: start a new run" in err and "--resume" not in err


def test_wrong_rules_are_one_line(rejected):
    assert "invalid choice: 'best'" in rejected("tools.trials", "--rule", "best")
    assert "--tau_end" in rejected("tools.trials", "--tau_end", "0")
    assert "unrecognized arguments: --lamda" in rejected("tools.trials", "--lamda", "3")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--psg 0", "tools.trials changes lambda_s auto, which needs --psg 1 and --target grid"),
        ("--target zero", "tools.trials changes lambda_s auto, which needs --psg 1 and --target grid"),
        ("--rule grafted --tau_end 9", "--tau_end does nothing with --rule grafted"),
        ("--rule gap --noise_limit 9", "--noise_limit does nothing with --rule gap"),
        ("--decay_at 2", "--decay_at: 2 must be 1 or less"),
        ("--lambda_s 300", "--lambda_s 300: tools.trials changes lambda_s auto"),
        ("--rule grafted --adam 1 --psg_acts_on update", "--rule grafted is for gradients"),
        ("--beta1 0", "--beta1 0 needs --adam 1"),
        ("--decay_outside --adam 1 --psg_acts_on update", "--decay_outside needs --decoupled_decay 1"),
    ],
)
def test_what_has_no_meaning_together(rejected, flags, message):
    assert message in rejected("tools.trials", *flags.split())
