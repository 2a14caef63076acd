"""The law of the pace against walks that are simulated, and lambda_s "auto", which sets the pace."""

import copy
import io
import math
import warnings

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from quant import PSGD, expected_share, psg_param_groups
from quant.lambda_s import PLAN_END, RECORD
from quant.settings import STAGE_DEFAULTS
from tests.helpers import Walk, same, sgd, take_steps, weights

SCHEDULES = {
    "steps": lambda o, steps: lr_scheduler.MultiStepLR(o, [steps // 2, 3 * steps // 4]),
    "one cycle": lambda o, steps: lr_scheduler.OneCycleLR(o, 0.1, steps),
    "warm-up": lambda o, steps: lr_scheduler.LinearLR(o, 0.01, 1.0, steps // 4),
}


@pytest.mark.parametrize("tau", [1e-7, 0.3, 1.2, 3.0, 5.4, 9.4, 14.0, 300.0])
def test_expected_share_is_that_of_walks(tau):
    """Against 20,000 walks of 1,000 small steps, each reflected in the middle between two grid points."""
    generator = torch.Generator().manual_seed(0)
    apart = torch.rand(20_000, generator=generator) / 2
    for _ in range(1000):
        apart *= 1 - (tau / 1000) ** 0.5 * torch.randn(apart.shape, generator=generator)
        apart = (apart - apart.round()).abs()
    assert expected_share(tau) == pytest.approx((apart <= 0.1).float().mean().item(), abs=0.012)


@pytest.mark.parametrize("tau", [-0.1, math.nan])
def test_expected_share_of_no_tau(tau):
    with pytest.raises(ValueError, match=f"tau must be at least 0, got {tau}"):
        expected_share(tau)


# OneCycleLR sets the momentum itself.
@pytest.mark.parametrize(
    ("schedule", "momentum"), [("steps", 0.9), ("one cycle", 0.9), ("warm-up", 0.9), ("warm-up", 0.0)]
)
def test_auto_keeps_to_its_plan_whatever_the_rate_does(schedule, momentum):
    walk = Walk()
    base = torch.optim.SGD(walk.groups(), lr=0.01, momentum=momentum)
    optimizer = PSGD(base, "auto", steps=4000)
    scheduler = SCHEDULES[schedule](optimizer, 4000)
    rises = schedule == "one cycle"
    planned = STAGE_DEFAULTS["tau_end"] / PLAN_END
    for quarter in (0.25, 0.5, 0.75):
        walk.steps(optimizer, 1000, scheduler)
        assert optimizer.pace().tau == pytest.approx(quarter * planned, rel=0.02)
        # While the rate rises, gradients in the momentum act at later, larger rates than those of their own steps.
        assert walk.share() == pytest.approx(optimizer.pace().expected_share, abs=0.07 if rises else 0.03)
    walk.steps(optimizer, 1000, scheduler)
    assert walk.share() > 0.93


@pytest.mark.parametrize("loss_scale", [1e-3, 1e3])
def test_the_scale_of_the_loss_and_the_rates_and_gradients_of_tensors_do_not_matter(loss_scale):
    walk = Walk(sizes=(2000, 3000), spreads=(1.0, 30.0))
    groups = [{"params": [weight], "bits": 4, "lr": lr} for weight, lr in zip(walk.weights, (0.01, 0.05))]
    optimizer = PSGD(torch.optim.SGD(groups), "auto", steps=2000)
    walk.steps(optimizer, 1500, loss_scale=loss_scale)
    first, second = (optimizer.state[weight]["psg_pace"] for weight in walk.weights)
    tau, lambda_s = RECORD.index("tau"), RECORD.index("lambda_s")
    assert first[tau].item() == pytest.approx(10, rel=0.03) and second[tau].item() == pytest.approx(10, rel=0.03)
    assert (first[lambda_s] / second[lambda_s]).item() == pytest.approx(30 * 5, rel=0.1)


def test_tau_of_a_fixed_lambda_s_is_the_closed_form():
    """Groups of different rates, momentum and lambda_s, and steps at which a weight has no gradient."""
    walk = Walk(sizes=(500, 700), spreads=(1.0, 2.0))
    groups = [
        {"params": walk.weights[:1], "bits": 4, "lr": 0.01, "momentum": 0.5, "lambda_s": 3.0},
        {"params": walk.weights[1:], "bits": 3, "lr": 0.02, "momentum": 0.9, "dampening": 0.9},
    ]
    optimizer, expected = PSGD(torch.optim.SGD(groups, lr=1.0), 2.0, steps=10), [0.0, 0.0]
    for step in range(5):
        for index, (weight, factor) in enumerate(zip(walk.weights, (0.01 / 0.5 * 3, 0.02 * 2))):
            weight.grad = torch.full_like(weight, step + index + 1.0) if (step + index) % 2 else None
            if weight.grad is not None:
                expected[index] += (factor * (step + index + 1)) ** 2
        optimizer.step()
    found = [optimizer.state[weight]["psg_pace"][RECORD.index("tau")].item() for weight in walk.weights]
    assert found == pytest.approx(expected)
    pace = optimizer.pace()
    assert pace.steps == 3 and pace.tau == pace.planned_tau
    assert pace.tau == pytest.approx((500 * expected[0] + 700 * expected[1]) / 1200)
    assert pace.lambda_s == pytest.approx((500 * 3 + 700 * 2) / 1200)


def test_measuring_the_pace_changes_no_weight(net):
    other = copy.deepcopy(net)
    for acts_on in ("gradient", "update"):
        take_steps(net, PSGD(sgd(net), 20, acts_on=acts_on), 3)
        take_steps(other, PSGD(sgd(other), 20, acts_on=acts_on, steps=3), 3)
        assert same(weights(net), weights(other))


def test_lambda_s_by_hand():
    """One weight tensor: even noise until the plan's end, then a constant; bursts are cut to the limit."""
    walk = Walk(sizes=(3,))
    weight, steps = walk.weights[0], 8
    optimizer = PSGD(torch.optim.SGD(walk.groups(tau_end=0.06, noise_limit=0.2), lr=0.5), "auto", steps=steps)
    tau, mean, held = 0.0, 0.0, 0.0
    for step, size in enumerate((1.0, 1.0, 20.0, 1.0, 0.0, 3.0, 2.0, 9.0)):
        weight.grad = torch.tensor([0.0, size, -size])
        square = 2 * size**2 / 3
        mean += (square - mean) / (step + 1)
        held = math.sqrt(0.06 / 6) / (0.5 * math.sqrt(mean)) if step < 6 else held
        used = math.sqrt((0.06 - tau) / (6 - step)) / (0.5 * math.sqrt(mean)) if step < 6 else held
        used = min(used, 0.2 / (0.5 * math.sqrt(square))) if square else used
        tau += (0.5 * used) ** 2 * square
        before = weight.detach().clone()
        optimizer.step()
        apart = (before - before.round()).abs()
        assert torch.allclose(weight, before - 0.5 * used * apart * weight.new_tensor([0.0, size, -size])), step
        record = dict(zip(RECORD, optimizer.state[weight]["psg_pace"].tolist()))
        assert (record["tau"], record["lambda_s"]) == pytest.approx((tau, held), rel=1e-4), step


def test_more_tau_than_the_limit_bears_is_not_planned():
    walk = Walk()
    optimizer = PSGD(torch.optim.SGD(walk.groups(), lr=0.01), "auto", steps=400)
    walk.steps(optimizer, 100)
    assert optimizer.pace().planned_tau == pytest.approx(3.0, rel=0.02)  # 300 steps of 0.1^2, instead of 10
    walk.steps(optimizer, 200)
    assert optimizer.pace().tau == pytest.approx(3.0, rel=0.03)


@pytest.mark.parametrize(
    "base",
    [
        lambda groups: torch.optim.SGD(groups, lr=0.01),
        lambda groups: torch.optim.SGD(groups, lr=0.01, momentum=0.9),
        lambda groups: torch.optim.AdamW(groups, lr=1e-3),
        lambda groups: torch.optim.AdamW(groups, lr=torch.tensor(1e-3), foreach=False),
    ],
)
def test_auto_on_updates_whether_or_not_they_are_correlated(base):
    walk = Walk()
    optimizer = PSGD(base(walk.groups()), "auto", acts_on="update", steps=4000)
    scheduler = lr_scheduler.CosineAnnealingLR(optimizer, 4000)
    walk.steps(optimizer, 3000, scheduler)
    assert optimizer.pace().tau == pytest.approx(10, rel=0.02)
    assert 0.9 < walk.share() < 0.99


def test_momentum_adds_to_the_noise_of_scaled_steps_and_not_to_the_draw():
    """Of Adam's steps over gradients of pure noise. With beta1 the squares of single steps, which draw the weights to
    the grid, are (1 - beta1) / (1 + beta1) of those without; the noise of the steps' sum is the same."""
    taus, shares = [], []
    for beta1 in (0.0, 0.9):
        walk = Walk(sizes=(20_000,))
        base = torch.optim.Adam(walk.groups(), lr=0.01, betas=(beta1, 0.999))
        optimizer = PSGD(base, 10.0, acts_on="update", steps=600)
        walk.steps(optimizer, 600)
        taus.append(optimizer.pace().tau)
        shares.append(walk.share())
    assert taus[1] == pytest.approx(taus[0] / 19, rel=0.1)
    assert shares[0] == pytest.approx(expected_share(taus[0]), abs=0.02)
    assert shares[1] < shares[0] - 0.1


@pytest.mark.parametrize("acts_on", ["gradient", "update"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_stage_goes_on_exactly(net, dtype, acts_on):
    def build(model):
        optimizer = PSGD(sgd(model), "auto", acts_on=acts_on, steps=40)
        return optimizer, lr_scheduler.StepLR(optimizer, 10)

    net.to(dtype)
    twin = copy.deepcopy(net)
    optimizer, _ = build(net)
    take_steps(net, optimizer, 7)
    file = io.BytesIO()
    torch.save([optimizer.state_dict(), net.state_dict()], file)
    file.seek(0)
    saved, values = torch.load(file, weights_only=True)
    twin.load_state_dict(values)
    resumed, _ = build(twin)
    resumed.load_state_dict(saved)
    copied = copy.deepcopy(optimizer)
    for chosen, model in ((optimizer, net), (resumed, twin)):
        take_steps(model, chosen, 30, first=7)
        assert chosen.pace().steps == 37
    assert same(weights(net), weights(twin)) and optimizer.pace() == resumed.pace()
    assert all(
        own["psg_pace"].dtype == torch.float32 for own in resumed.state.values() if "psg_pace" in own
    )  # bfloat16 would count no further than 256
    assert copied.pace().steps == 7


def test_what_a_loaded_stage_brings(net):
    """Settings that were saved win, with or without steps; a bare optimizer's state leaves the new stage's alone."""
    auto, fixed, bare = PSGD(sgd(net), "auto", steps=40), PSGD(sgd(net), 20), sgd(net)
    stages = {}
    for name, saved in {"auto": auto, "fixed": fixed, "bare": torch.optim.SGD(bare.param_groups, lr=0.1)}.items():
        optimizer = PSGD(sgd(net), "auto", steps=99)
        state = saved.state_dict()
        if name == "bare":
            state = {"state": {}, "param_groups": [
                {key: value for key, value in group.items() if key in ("lr", "momentum", "params")}
                for group in state["param_groups"]
            ]}  # fmt: skip
        optimizer.load_state_dict(copy.deepcopy(state))
        group = optimizer.param_groups[0]
        stages[name] = group["lambda_s"], group.get("steps")
    assert stages == {"auto": ("auto", 40), "fixed": (20, None), "bare": ("auto", 99)}


def test_steps_beyond_the_stage_warn_once_and_keep_lambda_s(net, recwarn):
    optimizer = PSGD(sgd(net), "auto", steps=4)
    take_steps(net, optimizer, 4)
    held = optimizer.pace().lambda_s
    assert not [w for w in recwarn if "of a stage of" in str(w.message)]
    take_steps(net, optimizer, 3, first=4)
    told = [str(w.message) for w in recwarn if "of a stage of" in str(w.message)]
    assert told == ["step 5 of a stage of 4: lambda_s stays as it is from here on"]
    assert optimizer.pace().lambda_s == held


@pytest.mark.parametrize("steps, share", [(200, 55), (837, None), (1334, None), (800, 89)])
def test_a_stage_that_is_too_short_is_named(net, steps, share):
    """The plan is steps * 0.75 * 0.1^2 of tau, and 10 in full."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        optimizer = PSGD(sgd(net), "auto", steps=steps)
        PSGD(sgd(net), 150, steps=steps)
    about = f'lambda_s "auto" over {steps} steps plans for only {share} % of the weights near the grid: it takes 1334'
    assert [str(one.message)[: len(about)] for one in said] == ([about] if share else [])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        PSGD(torch.optim.SGD(Walk(sizes=(50,)).groups(tau_end=0.1), lr=0.1), "auto", steps=20)  # little is asked for
    take_steps(net, optimizer, 1)
    assert optimizer.pace().planned_tau == pytest.approx(min(math.ceil(0.75 * steps) * 0.01, 10), rel=0.05)


def test_the_shortest_stage():
    walk = Walk(sizes=(50,))
    optimizer = PSGD(torch.optim.SGD(walk.groups(), lr=0.01), "auto", steps=1)
    walk.steps(optimizer, 1)
    assert optimizer.pace().tau == pytest.approx(0.01)  # one step at the limit


def test_gradients_of_zero_and_nearly_zero_break_nothing():
    walk = Walk(sizes=(50, 50, 50), spreads=(0.0, 1e-30, 1.0))
    optimizer = PSGD(torch.optim.SGD(walk.groups(), lr=0.01), "auto", steps=40)
    before = [weight.detach().clone() for weight in walk.weights]
    walk.steps(optimizer, 35)
    assert torch.equal(walk.weights[0], before[0]) and torch.equal(walk.weights[1], before[1])
    assert all(optimizer.state[weight]["psg_pace"].isfinite().all() for weight in walk.weights)
    walk.spreads = (1.0, 1.0, 1.0)  # and then they come to life
    walk.steps(optimizer, 5)
    assert all(weight.isfinite().all() and weight.abs().max() <= 7.5 for weight in walk.weights)


@pytest.mark.parametrize("rate", [0.0, torch.tensor(0.0)])
@pytest.mark.parametrize("acts_on", ["gradient", "update"])
def test_a_rate_of_zero_breaks_nothing(rate, acts_on):
    walk = Walk(sizes=(50,))
    optimizer = PSGD(torch.optim.SGD(walk.groups(), lr=rate, foreach=False), "auto", acts_on=acts_on, steps=40)
    walk.steps(optimizer, 2)
    optimizer.param_groups[0]["lr"] = 0.01
    walk.steps(optimizer, 3)
    pace = optimizer.pace()
    assert pace.steps == 5 and 0.02 < pace.tau < 0.1 and walk.weights[0].isfinite().all()


def test_a_loss_that_does_not_bear_the_pace_halves_it():
    walk = Walk()
    optimizer = PSGD(torch.optim.SGD(walk.groups(), lr=0.01), "auto", steps=4000)
    walk.steps(optimizer, 500)
    assert not any(optimizer.watch_loss(loss) for loss in (1.0, 0.5, 1.09))
    before = optimizer.pace()
    assert optimizer.watch_loss(1.2) and not optimizer.watch_loss(1.3)
    assert optimizer.pace().lambda_s == pytest.approx(before.lambda_s / 2)
    resumed = PSGD(torch.optim.SGD(walk.groups(), lr=0.01), "auto", steps=4000)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    walk.steps(resumed, 500)
    assert resumed.pace().tau - before.tau == pytest.approx(500 * 10 / 3000 / 4, rel=0.05)
    assert resumed.watch_loss(math.nan)
    assert not resumed.watch_loss(1.2) and not resumed.watch_loss(torch.tensor(1.25))
    again = PSGD(torch.optim.SGD(walk.groups(), lr=0.01), "auto", steps=4000)
    again.load_state_dict(resumed.state_dict())
    assert [again.watch_loss(loss) for loss in (1.4, math.inf, 1.45)] == [False, True, False]
    falling = PSGD(torch.optim.SGD(Walk().groups(), lr=0.01), "auto", steps=4000)
    assert [falling.watch_loss(loss) for loss in (-1.0, -1.05, -0.95, -0.8)] == [False, False, False, True]
    fixed = PSGD(torch.optim.SGD(Walk().groups(), lr=0.01), 150)
    assert not fixed.watch_loss(1.0) and not fixed.watch_loss(9.0)


@pytest.mark.parametrize("seed", [0, 3])
def test_perceptrons_bear_auto(seed):
    """A multilayer perceptron on the digits, trained to a loss near zero: neither NaN nor a standstill, at 2 bits."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.tensor(digits.data, dtype=torch.float32) / 16
    labels = torch.tensor(digits.target)
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))

    def epochs(optimizer, count):
        for _ in range(count):
            losses = []
            for chosen in torch.randperm(len(labels)).split(64):
                loss = nn.functional.cross_entropy(model(images[chosen]), labels[chosen])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(loss.item())
            if isinstance(optimizer, PSGD):
                optimizer.watch_loss(sum(losses) / len(losses))
        return sum(losses) / len(losses)

    start = epochs(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), 20)
    optimizer = PSGD(torch.optim.SGD(psg_param_groups(model, 2), lr=0.05, momentum=0.9), "auto", steps=30 * 29)
    end = epochs(optimizer, 30)
    assert start < 0.05 and end < 0.1 and all(weight.isfinite().all() for weight in model.parameters())
    assert 0.2 < optimizer.pace().tau < 10


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(lambda_s="auto"), 'lambda_s "auto" needs steps'),
        (dict(lambda_s="auto", steps=0), "steps must be a whole number of at least 1, got 0"),
        (dict(lambda_s="auto", steps=2.5), "steps must be a whole number of at least 1, got 2.5"),
        (dict(lambda_s=150, steps=True), "steps must be a whole number of at least 1, got True"),
        (dict(lambda_s=True), 'lambda_s must be a finite number > 0 or "auto", got True'),
        (dict(lambda_s="fast", steps=9), "lambda_s must be a finite number > 0 or \"auto\", got 'fast'"),
    ],
)
def test_settings_that_are_refused(net, settings, message):
    with pytest.raises(ValueError, match=message):
        PSGD(sgd(net), **settings)


@pytest.mark.parametrize("key", ["tau_end", "noise_limit"])
@pytest.mark.parametrize("value", [0, -1.0, math.inf, "9"])
def test_stage_settings_out_of_range(key, value):
    groups = Walk(sizes=(5,)).groups(**{key: value})
    with pytest.raises(ValueError, match=f"{key} must be a finite number > 0, got"):
        PSGD(torch.optim.SGD(groups, lr=0.1), "auto", steps=9)


def test_bases_and_targets_without_a_law():
    weight = Walk(sizes=(5,)).weights[0]
    for lambda_s in ("auto", 150):
        with pytest.raises(ValueError, match='Adam may normalize gradients, which cancels lambda_s; use acts_on="upd'):
            PSGD(torch.optim.Adam([{"params": [weight], "bits": 4}]), lambda_s, steps=9)
    with pytest.raises(ValueError, match='"auto" needs a grid'):
        PSGD(torch.optim.SGD([{"params": [weight], "target": "zero"}], lr=0.1), "auto", steps=9)
    with pytest.raises(ValueError, match="the pace is measured only with steps"):
        PSGD(torch.optim.SGD([{"params": [weight], "bits": 4}], lr=0.1)).pace()
