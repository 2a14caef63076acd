"""Stages of lambda_s "auto" in which some weights begin later, pause, or are added."""

import copy

import pytest
import torch
from torch import nn

from quant import PSGD, psg_param_groups
from quant.lambda_s import RECORD
from tests.helpers import Walk

STEPS = 400
SHORT = {"tau_end": 1.0, "noise_limit": 0.1}  # 100 steps at the limit


def record(optimizer, weight):
    return dict(zip(RECORD, optimizer.state[weight]["psg_pace"].tolist()))


def only_first(walk, optimizer, count):
    """Steps of the first weight, while the others have no gradient."""
    for _ in range(count):
        weight = walk.weights[0]
        weight.grad = torch.randn(weight.shape, generator=walk.generator)
        optimizer.step()


@pytest.mark.parametrize("acts_on", ["gradient", "update"])
@pytest.mark.parametrize("added", [False, True])
def test_a_late_layer_follows_the_plan_of_the_stage(acts_on, added):
    walk = Walk(sizes=(500, 600), spreads=(1.0, 1.0))
    weights = walk.weights[:1] if added else walk.weights
    base = torch.optim.SGD([{"params": weights, "bits": 4} | SHORT], lr=0.01)
    optimizer = PSGD(base, "auto", acts_on=acts_on, steps=STEPS)
    only_first(walk, optimizer, STEPS // 2)
    if added:
        optimizer.add_param_group({"params": walk.weights[1:], "bits": 4} | SHORT)
    walk.steps(optimizer, STEPS // 4)
    early, late = (record(optimizer, weight) for weight in walk.weights)
    assert early["steps"] == late["steps"] == optimizer.pace().steps == 0.75 * STEPS
    assert late["seen"] == STEPS // 4 and late["mean_square"] == pytest.approx(1, rel=0.1)
    # 100 steps are left of the plan, in which a step's limit lets tau grow by 1.
    assert early["tau"] == pytest.approx(1, rel=0.05) and late["tau"] == pytest.approx(1, rel=0.1)
    assert optimizer.pace().planned_tau == optimizer.pace().tau
    for group in optimizer.param_groups:
        group["lr"] /= 10
    walk.steps(optimizer, STEPS // 4)
    for weight, before in zip(walk.weights, (early, late)):
        assert record(optimizer, weight)["lambda_s"] == before["lambda_s"]


def test_a_late_layer_cannot_make_up_for_all_that_it_missed():
    walk = Walk(sizes=(500, 500), spreads=(1.0, 1.0))
    optimizer = PSGD(torch.optim.SGD(walk.groups(**SHORT), lr=0.01), "auto", steps=STEPS)
    only_first(walk, optimizer, 250)
    walk.steps(optimizer, 1)
    assert optimizer.pace().planned_tau == pytest.approx((1 + 0.5) / 2, rel=0.02)  # 50 steps of at most 0.01


@pytest.mark.parametrize("pause", ["rate 0", "no gradient"])
def test_a_pause_does_not_change_what_is_known_of_the_updates(pause):
    torch.manual_seed(0)
    model = nn.Linear(30, 40)
    base = torch.optim.AdamW(psg_param_groups(model, 4), lr=0.01, betas=(0.0, 0.999))
    optimizer = PSGD(base, "auto", acts_on="update", steps=4000)

    def steps(count, lr=0.01, moves=True):
        for _ in range(count):
            for group in optimizer.param_groups:
                group["lr"] = lr
            for parameter in model.parameters():
                parameter.grad = torch.randn_like(parameter) if moves else None
            optimizer.step()

    steps(30)
    before = record(optimizer, model.weight)
    steps(100, *((0.0,) if pause == "rate 0" else (0.01, False)))
    paused = record(optimizer, model.weight)
    assert paused["mean_square"] == before["mean_square"] and paused["lambda_s"] == before["lambda_s"]
    steps(1)
    assert record(optimizer, model.weight)["lambda_s"] == pytest.approx(before["lambda_s"], rel=0.1)


def test_a_group_that_is_added_after_a_resume_has_the_settings_of_the_stage():
    first, second = nn.Linear(8, 8), nn.Linear(8, 8)
    base = torch.optim.SGD(psg_param_groups(first, 4), lr=0.01)
    saved = PSGD(base, "auto", eps=0.5, steps=5000, keep_range=True).state_dict()
    resumed = PSGD(torch.optim.SGD(psg_param_groups(first, 4), lr=0.01))
    resumed.load_state_dict(copy.deepcopy(saved))
    for group in psg_param_groups(second, 4):
        resumed.add_param_group(group)
    for key, value in {"lambda_s": "auto", "psg_eps": 0.5, "steps": 5000, "keep_range": True}.items():
        assert [group[key] for group in resumed.param_groups] == [value] * len(resumed.param_groups)


def test_a_stage_that_an_earlier_version_began():
    """Its records have no count of what the mean square is of, which was the count of steps."""
    walk, old = (Walk(sizes=(300,)) for _ in range(2))
    optimizer, resumed = (
        PSGD(torch.optim.SGD(own.groups(**SHORT), lr=0.01), "auto", steps=STEPS) for own in (walk, old)
    )
    walk.steps(optimizer, 20)
    saved = copy.deepcopy(optimizer.state_dict())
    for own in saved["state"].values():
        own["psg_pace"] = own["psg_pace"][:4]
    resumed.load_state_dict(saved)
    assert record(resumed, old.weights[0]) == record(optimizer, walk.weights[0])
