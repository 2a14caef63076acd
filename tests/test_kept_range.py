"""PSGD(keep_range=True): the weights stay within the range of the stage's start."""

import copy

import pytest
import torch
from torch import nn

from quant import PSGD
from quant.kept_range import RANGE
from tests.helpers import fill_gradients, same, sgd, take_steps, weights


def adam(net, per_channel):
    groups = sgd(net, per_channel=per_channel).param_groups
    kept = ("params", "bits", "per_channel", "scale_dims")
    return torch.optim.Adam([{k: v for k, v in group.items() if k in kept} for group in groups], 0.1, (0.0, 0.999))


def stage(net, acts_on, per_channel, **settings):
    base = sgd(net, per_channel=per_channel, lr=0.5) if acts_on == "gradient" else adam(net, per_channel)
    return PSGD(base, 20.0, acts_on=acts_on, **settings)


def reaches(net, per_channel):
    """max|w| of the start by hand, for each channel of a matrix or for each tensor."""
    return {
        name: weight.abs().amax(tuple(range(1, weight.dim())), keepdim=True)
        if per_channel and weight.dim() > 1
        else weight.abs().max()
        for name, weight in weights(net).items()
    }


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("acts_on", ["gradient", "update"])
def test_it_clamps_after_each_step(net, acts_on, per_channel):
    """As PSGD without it, whose weights are clamped by hand; which weights of the others are beyond, is undone."""
    other, free = copy.deepcopy(net), copy.deepcopy(net)
    reach = reaches(net, per_channel)
    optimizer = stage(net, acts_on, per_channel, keep_range=True)
    by_hand = stage(other, acts_on, per_channel)
    scaled = {id(p) for group in by_hand.param_groups if "bits" in group for p in group["params"]}
    for step in range(4):
        take_steps(net, optimizer, 1, step)
        take_steps(other, by_hand, 1, step)
        with torch.no_grad():
            for name, parameter in other.named_parameters():
                if id(parameter) in scaled:
                    parameter.copy_(torch.maximum(torch.minimum(parameter, reach[name]), -reach[name]))
        assert same(weights(net), weights(other))
    take_steps(free, stage(free, acts_on, per_channel), 4)
    beyond = [name for name, weight in weights(free).items() if (weight.abs() > reach[name]).any()]
    assert any("weight" in name for name in beyond)
    for name, parameter in net.named_parameters():
        if id(parameter) in {id(p) for group in optimizer.param_groups if "bits" in group for p in group["params"]}:
            assert torch.equal(optimizer.state[parameter][RANGE], reach[name])


@pytest.mark.parametrize("acts_on", ["gradient", "update"])
def test_the_ranges_are_saved_with_the_state(net, acts_on):
    """A stage that goes on from a state_dict keeps the ranges of its start, not those of its weights."""
    optimizer = stage(net, acts_on, True, keep_range=True)
    take_steps(net, optimizer, 2)
    with torch.no_grad():
        net.conv2.weight.mul_(0.9)
    twin = copy.deepcopy(net)
    resumed = stage(twin, acts_on, True)  # keep_range comes with the state
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    take_steps(net, optimizer, 3, first=2)
    take_steps(twin, resumed, 3, first=2)
    assert same(weights(net), weights(twin))
    assert resumed.param_groups[0]["keep_range"]


def test_without_it_the_state_is_that_of_the_base(net):
    optimizer = stage(net, "gradient", False)
    take_steps(net, optimizer, 1)
    assert not any(RANGE in own for own in optimizer.state.values())
    assert not any("keep_range" in group for group in optimizer.param_groups)


def test_zeros_have_no_range_and_a_weight_without_gradient_no_state():
    zeros, still = nn.Parameter(torch.zeros(3, 2)), nn.Parameter(torch.ones(2, 2))
    base = torch.optim.Adam([{"params": [zeros, still], "bits": 4}], lr=0.1, betas=(0.0, 0.999))
    optimizer = PSGD(base, eps=1.0, acts_on="update", keep_range=True)
    zeros.grad = torch.ones_like(zeros)
    optimizer.step()
    assert (zeros != 0).all() and still not in optimizer.state
    still.grad = torch.ones_like(still)
    optimizer.step()
    assert optimizer.state[still][RANGE] == 1


def test_a_closure(net):
    """Its gradients come after the ranges are taken."""
    reach = reaches(net, False)["conv2.weight"]
    optimizer = stage(net, "gradient", False, keep_range=True)
    for parameter in net.parameters():
        parameter.grad = None
    for step in range(3):
        optimizer.step(lambda: fill_gradients(net, step))  # noqa: B023 - called at once
    assert net.conv2.weight.abs().max() <= reach and optimizer.state[net.conv2.weight][RANGE] == reach


def test_a_state_that_was_saved_without_it_turns_it_off(net):
    free = stage(copy.deepcopy(net), "gradient", False)
    optimizer = stage(net, "gradient", False, keep_range=True)
    optimizer.load_state_dict(free.state_dict())
    assert not any("keep_range" in group for group in optimizer.param_groups)


def test_a_weight_that_begins_to_move_within_a_step_has_its_range_from_the_next(net):
    optimizer, weight = stage(net, "gradient", False, keep_range=True), net.conv2.weight
    weight.requires_grad_(False)

    def closure():
        weight.requires_grad_(True)
        fill_gradients(net, 0)

    optimizer.step(closure)
    assert RANGE not in optimizer.state[weight] and RANGE in optimizer.state[net.fc.weight]
    reach = weight.abs().max()
    optimizer.step(closure)
    assert optimizer.state[weight][RANGE] == reach >= weight.abs().max()


def test_wrong_settings():
    weight = [nn.Parameter(torch.ones(2, 2))]
    with pytest.raises(ValueError, match="keep_range must be True or False, got 1"):
        PSGD(torch.optim.SGD([{"params": weight, "bits": 4, "keep_range": 1}], lr=0.1))
    with pytest.raises(ValueError, match='keep_range=True needs a grid, and a group has target "zero"'):
        PSGD(torch.optim.SGD([{"params": weight, "target": "zero"}], lr=0.1), keep_range=True)
