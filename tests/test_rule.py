"""The PSG rule against a readable twin and against the theory, and which parameters it is for."""

import copy

import pytest
import torch
from torch import nn

from quant import PSGD, Grid, fake_quantize_weight, layer_grids, psg_param_groups
from tests.helpers import backward, fill_gradients, same, scale_by_hand, sgd, twin_multiplier, weights
from utils.device import select_device

# --- the rule -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("eps", [0.0, 0.01])
def test_equals_the_twin(net, bits, eps):
    optimizer = PSGD(sgd(net, bits), lambda_s=37.0, eps=eps)
    grids = layer_grids(net, bits)
    backward(net)
    expected = {}
    for name, parameter in net.named_parameters():
        gradient = parameter.grad.clone()
        if name in grids:
            gradient *= twin_multiplier(parameter.detach(), grids[name].bits, 37.0, eps)
        expected[name] = gradient
    optimizer.scale_gradients()
    for name, parameter in net.named_parameters():
        assert torch.equal(parameter.grad, expected[name]), name


def test_whole_training_equals_a_plain_loop(net):
    """Steps of PSGD(SGD) = scale by hand, then SGD: momentum and weight decay see the scaled gradient."""
    reference = copy.deepcopy(net)
    plain = torch.optim.SGD(reference.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)
    optimizer = PSGD(sgd(net), lambda_s=150)
    for step in range(5):
        fill_gradients(net, step)
        optimizer.step()
        fill_gradients(reference, step)
        scale_by_hand(reference, 4, 150)
        plain.step()
    assert same(weights(net), weights(reference))


@pytest.fixture
def flush_denormal():
    """Torch's switch; it is off again after the test, as it is for every other one."""
    yield torch.set_flush_denormal
    torch.set_flush_denormal(False)


def test_a_weight_drawn_to_zero_is_denormal_unless_these_are_flushed(flush_denormal):
    """Each step takes it half of the way; the scripts flush, as denormal numbers slow some CPUs down.

    Flushed, it becomes zero where the last step is one multiply-add, and stays the least normal number where the
    product is flushed before it is added.
    """
    ends = []
    for flush in (False, True):
        flush_denormal(False)
        if flush:
            select_device("cpu", 0)
        weight = nn.Parameter(torch.tensor([1.0, 1e-3]))
        optimizer = PSGD(torch.optim.SGD([{"params": [weight], "bits": 4}], lr=0.01), lambda_s=50)
        for _ in range(200):
            weight.grad = torch.tensor([0.0, 1.0])
            optimizer.step()
        ends.append(weight[1].item())
    tiny = torch.finfo(torch.float32).tiny
    assert 0 < ends[0] < tiny and (ends[1] == 0 or tiny <= ends[1] < 2.5 * tiny)


def test_adam_undoes_a_factor_of_the_gradient_but_not_of_the_update(net):
    """Its first step is the rate, whatever the gradient: lambda_s sets the length of a step only by the update."""

    def first_step(acts_on, lambda_s):
        model = copy.deepcopy(net)
        base = torch.optim.Adam(psg_param_groups(model, 4), lr=1e-3, eps=0)
        fill_gradients(model, 0)
        PSGD(base, lambda_s, acts_on=acts_on).step()
        return (model.conv2.weight - net.conv2.weight).detach().abs()

    distance = (net.conv2.weight - fake_quantize_weight(net.conv2.weight, 4)).detach().abs()
    for lambda_s in (10, 1000):
        steps = first_step("gradient", lambda_s)[distance > 0]
        assert torch.allclose(steps, torch.full_like(steps, 1e-3), rtol=1e-2)
        assert torch.allclose(first_step("update", lambda_s), 1e-3 * lambda_s * distance, rtol=1e-2, atol=1e-7)


def test_per_channel_grid(net):
    base = torch.optim.SGD(psg_param_groups(net, Grid(4, per_channel=True)), lr=0.1)
    backward(net)
    gradient, bias_gradient = net.conv2.weight.grad.clone(), net.fc.bias.grad.clone()
    PSGD(base, lambda_s=2.0).scale_gradients()
    expected = torch.stack([g * twin_multiplier(w, 4, 2.0) for g, w in zip(gradient, net.conv2.weight.detach())])
    assert torch.equal(net.conv2.weight.grad, expected)
    # A bias has one grid for all of it: with a grid an element it would never move.
    assert torch.equal(net.fc.bias.grad, bias_gradient * twin_multiplier(net.fc.bias.detach(), 4, 2.0))


def test_target_zero(net):
    base = torch.optim.SGD([{"params": [net.conv1.weight], "target": "zero"}, {"params": [net.fc.weight]}], lr=0.1)
    backward(net)
    scaled, untouched = net.conv1.weight.grad.clone(), net.fc.weight.grad.clone()
    PSGD(base, lambda_s=3.0).scale_gradients()
    assert torch.equal(net.conv1.weight.grad, scaled * (net.conv1.weight.detach().abs() * 3.0))
    assert torch.equal(net.fc.weight.grad, untouched)


def test_weights_on_the_grid_do_not_move(net):
    with torch.no_grad():
        net.conv2.weight.copy_(fake_quantize_weight(net.conv2.weight, 4))
        # Another off-grid weight keeps the layer alive.
        net.conv2.weight[0, 0, 0, 0] *= 0.9
    before = net.conv2.weight.detach().clone()
    optimizer = PSGD(torch.optim.SGD(psg_param_groups(net, 4), lr=0.1), lambda_s=150)
    backward(net)
    optimizer.step()
    step = before.abs().max() / 7
    on_grid = (before - fake_quantize_weight(before, 4)).abs() < 1e-6 * step
    moved = (net.conv2.weight.detach() - before).abs()
    assert on_grid.sum() >= before.numel() - 1
    assert moved[on_grid].max() < 1e-6 and moved[~on_grid].min() > 1e-6


def test_all_zero_tensor_stays_finite():
    weight = nn.Parameter(torch.zeros(3, 3))
    weight.grad = torch.ones(3, 3)
    PSGD(torch.optim.SGD([{"params": [weight], "bits": 4}], lr=0.1)).step()
    assert torch.equal(weight.detach(), torch.zeros(3, 3))


def test_empty_tensor_is_no_error():
    weight = nn.Parameter(torch.zeros(0, 3))
    weight.grad = torch.ones(0, 3)
    PSGD(torch.optim.SGD([{"params": [weight], "bits": 4}], lr=0.1)).step()


# --- parameter groups ---------------------------------------------------------------------------------------------


def test_param_groups_cover_every_parameter_once(net):
    for bits, first_last in ((4, True), (3, True), (3, False)):
        groups = psg_param_groups(net, Grid(bits, first_last=first_last))
        ids = [id(p) for group in groups for p in group["params"]]
        assert sorted(ids) == sorted(map(id, net.parameters()))
    scaled = {group.get("bits"): {id(p) for p in group["params"]} for group in psg_param_groups(net, 3)}
    assert scaled[8] == {id(net.conv1.weight), id(net.fc.weight), id(net.fc.bias)}
    assert scaled[3] == {id(net.conv2.weight)}
    assert id(net.bn1.weight) in scaled[None] and id(net.conv2.bias) in scaled[None]


def test_parameter_shared_with_an_embedding_is_scaled():
    model = nn.ModuleDict({"embedding": nn.Embedding(6, 4), "inner": nn.Linear(4, 4), "head": nn.Linear(4, 6)})
    model["head"].weight = model["embedding"].weight
    scaled = [id(p) for group in psg_param_groups(model, 4) if "bits" in group for p in group["params"]]
    assert id(model["embedding"].weight) in scaled and len(scaled) == 4


def test_frozen_parameters_are_left_out(net):
    net.conv2.weight.requires_grad_(False)
    assert not any(p is net.conv2.weight for group in psg_param_groups(net, 4) for p in group["params"])
    with pytest.raises(ValueError, match="SmallNet has no weights to scale"):
        psg_param_groups(net.requires_grad_(False), 4)


def test_one_element_of_a_grid_of_its_own_still_learns():
    """It is the largest of its grid, so that PSG would freeze it."""
    model = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 1))
    assert [len(group["params"]) for group in psg_param_groups(model, 4)] == [3, 1]
    assert psg_param_groups(model, 4)[-1]["params"] == [model[1].bias]
    depthwise = nn.Sequential(nn.Conv2d(3, 3, 1, groups=3, bias=False), nn.Linear(6, 4))
    assert psg_param_groups(depthwise, Grid(4, per_channel=True))[-1]["params"] == [depthwise[0].weight]
    assert len(psg_param_groups(depthwise, 4)) == 1


def test_groups_without_bits_pass_through(net):
    reference = copy.deepcopy(net)
    base = torch.optim.SGD([{"params": [net.conv1.weight], "bits": 4}, {"params": [net.fc.weight]}], lr=0.1)
    optimizer = PSGD(base)
    plain = torch.optim.SGD([reference.fc.weight], lr=0.1)
    fill_gradients(net, 0)
    fill_gradients(reference, 0)
    optimizer.step()
    plain.step()
    assert torch.equal(net.fc.weight, reference.fc.weight)


@pytest.mark.parametrize("bad", [0, -1, float("nan"), float("inf"), "150"])
def test_bad_lambda_s(net, bad):
    with pytest.raises(ValueError, match="lambda_s must be a finite number > 0"):
        PSGD(sgd(net), lambda_s=bad)


def test_bad_settings(net):
    with pytest.raises(ValueError, match="eps"):
        PSGD(sgd(net), eps=-0.1)
    with pytest.raises(ValueError, match="bits must be"):
        PSGD(torch.optim.SGD([{"params": net.parameters(), "bits": 1}], lr=0.1))
    with pytest.raises(ValueError, match="target"):
        PSGD(torch.optim.SGD([{"params": net.parameters(), "bits": 4, "target": "one"}], lr=0.1))
    with pytest.raises(ValueError, match="acts_on must be one of .*, got 'weight'"):
        PSGD(sgd(net), acts_on="weight")
    with pytest.raises(ValueError, match="psg_param_groups"):
        PSGD(torch.optim.SGD(net.parameters(), lr=0.1))
    with pytest.raises(ValueError, match="lambda_s=5 needs"):
        PSGD(torch.optim.SGD([{"params": [net.fc.weight], "lambda_s": 5}, {"params": [net.conv1.weight], "bits": 4}]))
    base = sgd(net)
    with pytest.raises(ValueError, match="lambda_s"):
        PSGD(base, lambda_s=0)
    assert PSGD(base, lambda_s=7).param_groups[0]["lambda_s"] == 7  # the failed one left nothing behind
    for wrong in (torch.optim.SGD, PSGD(base)):
        with pytest.raises(TypeError, match="instance of another torch optimizer"):
            PSGD(wrong)
