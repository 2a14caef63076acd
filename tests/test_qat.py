"""Quantization-aware training: each rule against a closed form, a twin or the paper's words."""

import copy
import importlib.util
import math

import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss

from quant import Grid, layer_grids, quantize_weights
from quant.grid import weight_scale
from tests.helpers import SmallNet, backward, same, weights
from utils.training.qat import (
    RISE,
    LearnedGoal,
    QuantizationPenalty,
    Substitution,
    first_step,
    lsq,
    ste_changes,
    straight_through,
)

GRIDS = [Grid(4), Grid(3, per_channel=True), Grid(2), Grid(2, first_last=False)]
RELAXATIONS = ["parq", "binaryrelax"]
needs_torchao = pytest.mark.skipif(not importlib.util.find_spec("torchao"), reason="needs torchao")


def images(count=4):
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def outputs(model):
    """Of a training pass, which leaves the batch-norm statistics as they were."""
    return copy.deepcopy(model).train()(images())


@pytest.mark.parametrize("grid", GRIDS)
def test_the_forward_pass_of_ste_is_that_of_the_quantized_network(net, grid):
    expected = outputs(quantize_weights(net, grid))
    before, order = weights(net), [*net.state_dict()]
    Substitution(net, ste_changes(net, grid))
    assert torch.equal(outputs(net), expected)
    net.train()(images())
    assert same(weights(net), before) and [*net.state_dict()] == order
    assert all(isinstance(value, nn.Parameter) for value in net.parameters())


def test_outside_of_training_the_float_weights_are_used(net):
    expected = copy.deepcopy(net).eval()(images())
    Substitution(net, ste_changes(net, Grid(2)))
    assert torch.equal(net.eval()(images()), expected)


def test_the_gradient_of_ste_is_that_of_the_quantized_network(net):
    quantized = quantize_weights(net, Grid(2))
    backward(quantized)
    Substitution(net, ste_changes(net, Grid(2)))
    backward(net)
    for expected, parameter in zip(quantized.parameters(), net.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, expected.grad)


def test_a_copy_substitutes_for_weights_of_its_own(net):
    Substitution(net, ste_changes(net, Grid(3)))
    twin = copy.deepcopy(net)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(3)
    backward(twin)
    assert not torch.equal(outputs(net), outputs(twin))
    assert all(parameter.grad is None for parameter in net.parameters())
    assert all(parameter.grad is not None for parameter in twin.parameters())


def test_a_shared_weight_is_substituted_wherever_it_is():
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    Substitution(model, {"0.weight": torch.zeros_like})
    torch.testing.assert_close(model(torch.ones(1, 4)), model[2].bias[None])


@pytest.mark.parametrize("change", [torch.zeros_like, lambda weight: weight.reshape(7)], ids=["layer", "change"])
def test_a_forward_pass_that_fails_leaves_the_parameters(net, change):
    parameters = dict(net.named_parameters())
    Substitution(net, {"conv1.weight": change})
    with pytest.raises(RuntimeError):
        net(torch.ones(1, 1, 8, 8))
    assert all(parameter is parameters[name] for name, parameter in net.named_parameters())


def test_the_straight_through_gradient():
    weight, other = torch.randn(3, 5, requires_grad=True), torch.randn(3, 5)
    result = straight_through(weight, other)
    assert torch.equal(result, other)
    gradient = torch.randn(3, 5)
    result.backward(gradient)
    assert torch.equal(weight.grad, gradient)


def lsq_by_hand(weight, step, quant_max, gradient):
    """Values and both gradients as the paper writes them, a number at a time; one step for each row."""
    result, of_weight, of_step = torch.zeros_like(weight), torch.zeros_like(weight), torch.zeros_like(step)
    for row in range(len(weight)):
        s = step[row].item()
        for column in range(weight.shape[1]):
            v, g = weight[row, column].item() / s, gradient[row, column].item()
            inside = -quant_max < v < quant_max
            result[row, column] = s * round(min(max(v, -quant_max), quant_max))
            of_weight[row, column] = g if inside else 0.0
            of_step[row] += g * (round(v) - v if inside else math.copysign(quant_max, v))
        of_step[row] /= math.sqrt(weight.shape[1] * quant_max)
    return result, of_weight, of_step


@pytest.mark.parametrize("quant_max", [1, 3, 7])
def test_lsq_is_what_the_paper_writes(quant_max):
    torch.manual_seed(0)
    weight = torch.randn(4, 50, dtype=torch.float64, requires_grad=True)
    step = (torch.rand(4, 1, dtype=torch.float64) / quant_max + 0.1).requires_grad_()
    gradient = torch.randn(4, 50, dtype=torch.float64)
    quantized = lsq(weight, step, quant_max)
    quantized.backward(gradient)
    for found, expected in zip(
        (quantized, weight.grad, step.grad), lsq_by_hand(weight.detach(), step.detach(), quant_max, gradient)
    ):
        torch.testing.assert_close(found.detach(), expected)
    assert (weight.grad == 0).any() and (weight.grad != 0).any()


def test_one_step_for_a_tensor_gathers_all_of_its_gradients():
    torch.manual_seed(0)
    weight, gradient = torch.randn(2, 4, 3, 5, dtype=torch.float64)
    step = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    lsq(weight, step, 3).backward(gradient)
    *_, expected = lsq_by_hand(weight.view(1, -1), step.detach().view(1, 1), 3, gradient.view(1, -1))
    torch.testing.assert_close(step.grad, expected[0, 0])


def test_the_gradient_of_a_step_where_it_is_differentiable():
    """All weights are out of range: the output is +-s Q, whose derivative is no estimate."""
    weight, quant_max = torch.tensor([5.0, -6.0, 7.0], dtype=torch.float64), 3
    step, factors = torch.tensor(0.5, dtype=torch.float64, requires_grad=True), torch.tensor([1.0, 2.0, 4.0]).double()
    (lsq(weight, step, quant_max) * factors).sum().backward()
    with torch.no_grad():
        high, low = ((lsq(weight, step + d, quant_max) * factors).sum() for d in (1e-4, -1e-4))
    torch.testing.assert_close(step.grad, (high - low) / 2e-4 / math.sqrt(3 * quant_max))


@pytest.mark.parametrize("grid", GRIDS)
def test_the_steps_that_lsq_starts_from(net, grid):
    for name, own in layer_grids(net, grid).items():
        weight = net.get_parameter(name).detach()
        step = first_step(weight, own).detach()
        assert step.shape == weight_scale(weight, own).shape
        rows = (weight.flatten(1) if step.dim() else weight.view(1, -1)).double()
        expected = 2 * rows.abs().sum(1) / rows.shape[1] / (2 ** (own.bits - 1) - 1) ** 0.5
        torch.testing.assert_close(step.flatten().double(), expected, rtol=1e-5, atol=0)


def test_a_channel_of_zeros_has_a_step():
    weight = torch.tensor([[0.0, 0.0], [1.0, -3.0]])
    step = first_step(weight, Grid(3, per_channel=True))
    torch.testing.assert_close(step, torch.tensor([[1.0], [4 / 3**0.5]]))
    assert lsq(weight, step, 3)[0].tolist() == [0, 0]


def learned_goal(net, grid):
    return LearnedGoal(
        grid, {name: first_step(net.get_parameter(name), own) for name, own in layer_grids(net, grid).items()}
    )


def test_the_goal_of_learned_steps(net):
    goal = learned_goal(net, Grid(3, per_channel=True))
    quantized = goal.deployed(net)
    squares, near, count = 0.0, 0, 0
    for name, step in goal.steps.items():
        weight, found = net.get_parameter(name).detach(), quantized.get_parameter(name).detach()
        integers = found / step.detach()
        torch.testing.assert_close(integers, integers.round())
        limit = 127 if name in ("conv1.weight", "fc.weight", "fc.bias") else 3
        assert integers.abs().max() <= limit + 1e-3
        squares += mse_loss(found, weight, reduction="sum").item()
        near += ((found - weight).abs() <= 0.1 * step).sum().item()
        count += weight.numel()
    measured = goal.distances(net)
    assert measured["w3_mse"] == pytest.approx(squares / count, rel=1e-4)
    assert measured["grid_share"] == pytest.approx(near / count, abs=1e-3)
    Substitution(net, goal.changes(net))
    assert torch.equal(outputs(net), outputs(quantized))


@pytest.mark.parametrize("grid", GRIDS)
def test_the_gradient_of_the_quantization_penalty(net, grid):
    """Against autograd of the penalty itself; the strength rises up to the end of the stage."""
    start, steps, done = 0.7, 10, 9
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    QuantizationPenalty(optimizer, net, grid, start, steps, done)
    for step in (9, 10, 10):
        before = {name: parameter.detach().clone().requires_grad_() for name, parameter in net.named_parameters()}
        quantized = quantize_weights(net, grid)
        penalty = sum(mse_loss(before[name], quantized.get_parameter(name).detach()) for name in layer_grids(net, grid))
        (start * RISE ** (step / steps) * penalty).backward()
        for parameter in net.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        for name, parameter in net.named_parameters():
            pull = before[name].grad if before[name].grad is not None else torch.zeros_like(parameter)
            torch.testing.assert_close(parameter.grad, pull, rtol=1e-4, atol=1e-7)


@needs_torchao
@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_grid_of_torchao_is_ours(bits, per_channel):
    from torchao.prototype.parq.quant import MaxUnifQuantizer

    weight = torch.randn(16, 75, generator=torch.Generator().manual_seed(bits))
    found, points = MaxUnifQuantizer().quantize(weight, bits, dim=-1 if per_channel else None)
    grid = Grid(bits, per_channel=per_channel)
    layer = nn.Linear(75, 16, bias=False)
    layer.weight.data = weight
    expected = quantize_weights(layer, Grid(bits, True, per_channel)).weight if bits >= 4 else None
    scale = weight_scale(weight, grid)
    assert torch.equal(found, (weight / scale).round() * scale)
    assert expected is None or torch.equal(found, expected)
    assert points.shape[-1] == 2 * grid.quant_max + 1


def relaxed(net, method, end, per_channel=True):
    from utils.training.parq import Relaxed

    base = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)
    return Relaxed(base, net, Grid(2, per_channel=per_channel), method, end)


def steps(net, optimizer, count, first=0):
    for step in range(first, first + count):
        generator = torch.Generator().manual_seed(step)
        for parameter in net.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()


@needs_torchao
@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("method", RELAXATIONS)
def test_relaxed_weights_are_torchaos_and_parameters_stay_float(method, per_channel):
    from torchao.prototype.parq import optim
    from torchao.prototype.parq.quant import MaxUnifQuantizer

    torch.manual_seed(0)
    net = SmallNet().to(memory_format=torch.channels_last)
    twin = copy.deepcopy(net).to(memory_format=torch.contiguous_format)
    plain = copy.deepcopy(twin)
    ends, middle = ["conv1.weight", "fc.weight", "fc.bias"], ["conv2.weight"]
    others = [parameter for name, parameter in twin.named_parameters() if name not in ends + middle]
    groups = [
        {"params": others},
        {"params": [twin.get_parameter(name) for name in ends], "quant_bits": 8},
        {"params": [twin.get_parameter(name) for name in middle], "quant_bits": 2},
    ]
    base = torch.optim.SGD(groups, lr=0.1, momentum=0.9, weight_decay=1e-3)
    prox = {"parq": optim.ProxPARQ, "binaryrelax": optim.ProxBinaryRelax}[method](0, 6)
    theirs = optim.QuantOptimizer(base, MaxUnifQuantizer(), prox, quant_period=1, quant_per_channel=per_channel)
    optimizer = relaxed(net, method, 6, per_channel)
    sgd = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)
    for step in range(9):
        for network, stepped in ((net, optimizer), (twin, theirs), (plain, sgd)):
            steps(network, stepped, 1, step)
        for name, value in optimizer.relaxed.items():
            assert torch.equal(value, twin.get_parameter(name)), (step, name)
        assert same(weights(net), weights(plain))  # the gradients do not depend on the weights
    hard = quantize_weights(net, Grid(2, per_channel=per_channel))
    assert all(torch.equal(value, hard.get_parameter(name)) for name, value in optimizer.relaxed.items())


@needs_torchao
@pytest.mark.parametrize("method", RELAXATIONS)
def test_the_state_of_torchaos_optimizer_is_saved_and_loaded(method):
    torch.manual_seed(0)
    whole = SmallNet()
    optimizer = relaxed(whole, method, 8)
    steps(whole, optimizer, 4)
    again = SmallNet()
    resumed = relaxed(again, method, 8)
    again.load_state_dict(whole.state_dict())
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    steps(whole, optimizer, 6, 4)
    steps(again, resumed, 6, 4)
    assert same(weights(whole), weights(again))
    assert all(torch.equal(value, resumed.relaxed[name]) for name, value in optimizer.relaxed.items())
