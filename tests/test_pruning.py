"""Pruning against torch.nn.utils.prune, and sparse training against powerpropagation."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from models import ResNet32
from quant import PSGD, penalize_l1, prune_weights, sparse_param_groups
from quant.penalties import gradient_penalty
from quant.pruning import nonzero_weights, prunable_weights, pruning_mse


def pruned_by_torch(model, sparsity, scope):
    """The same network pruned by torch's own functions."""
    twin = copy.deepcopy(model)
    layers = [(module, "weight") for module in twin.modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
    if scope == "global":
        prune.global_unstructured(layers, prune.L1Unstructured, amount=sparsity)
    for module, name in layers:
        if scope == "layer":
            prune.l1_unstructured(module, name, sparsity)
        prune.remove(module, name)
    return twin


@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.9, 0.98])
def test_prune_weights_is_torch_s_magnitude_pruning(scope, sparsity):
    torch.manual_seed(0)
    model = ResNet32(10)
    expected = dict(pruned_by_torch(model, sparsity, scope).named_parameters())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    pruned = prune_weights(model.to(memory_format=torch.channels_last), sparsity, scope)
    for name, parameter in pruned.named_parameters():
        assert torch.equal(parameter, expected[name]), name
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    total = sum(weight.numel() for weight in prunable_weights(model).values())
    assert nonzero_weights(pruned) == pytest.approx((1 - sparsity) * total, abs=34)


def test_first_and_last_layer_can_be_kept(net):
    pruned = prune_weights(net, 0.75, first_last=False)
    assert torch.equal(pruned.conv1.weight, net.conv1.weight) and torch.equal(pruned.fc.weight, net.fc.weight)
    assert (pruned.conv2.weight == 0).sum() == round(0.75 * net.conv2.weight.numel())
    assert nonzero_weights(pruned, first_last=False) == 144 and list(prunable_weights(net, False)) == ["conv2.weight"]
    assert torch.equal(pruned.conv2.bias, net.conv2.bias)


def test_shared_weights_count_once(net):
    net.conv3 = nn.Conv2d(8, 8, 3)
    net.conv3.weight = net.conv2.weight
    pruned = prune_weights(net, 0.5, "layer")
    assert pruned.conv3.weight is pruned.conv2.weight
    assert (pruned.conv2.weight == 0).sum() == net.conv2.weight.numel() // 2


def test_inplace(net):
    assert prune_weights(net, 0.5, inplace=True) is net
    assert nonzero_weights(net) == sum(weight.numel() for weight in prunable_weights(net).values()) / 2


def test_pruning_mse():
    model = nn.Sequential(nn.Linear(4, 1), nn.Linear(1, 4))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, -2.0, 3.0, -4.0]]))
        model[1].weight.copy_(torch.tensor([[0.5], [6.0], [7.0], [-8.0]]))
    assert pruning_mse(model, 0.375) == pytest.approx((0.25 + 1 + 4) / 8)
    assert pruning_mse(model, 0.25, "layer") == pytest.approx((0.25 + 1) / 8)
    assert pruning_mse(model, 0) == 0


@pytest.mark.parametrize("sparsity", [-0.1, 1, 90, float("nan")])
def test_bad_sparsity(net, sparsity):
    with pytest.raises(ValueError, match="sparsity must be from 0 to less than 1"):
        prune_weights(net, sparsity)


def test_of_equal_weights_the_exact_number_is_pruned():
    model = nn.Sequential(nn.Linear(10, 5), nn.Linear(5, 10))
    for parameter in model.parameters():
        nn.init.ones_(parameter)
    assert nonzero_weights(prune_weights(model, 0.3)) == 70


def test_bad_scope_and_broken_weights(net):
    with pytest.raises(ValueError, match="scope must be one of global, layer, got 'channel'"):
        prune_weights(net, 0.5, "channel")
    net.conv2.weight.data[0, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="conv2.weight has values that are not finite"):
        prune_weights(net, 0.5)


@pytest.mark.parametrize("first_last", [True, False])
def test_sparse_param_groups(net, first_last):
    net.bn2.weight.requires_grad_(False)
    groups = sparse_param_groups(net, first_last)
    names = {id(parameter): name for name, parameter in net.named_parameters()}
    scaled = ["conv1.weight", "conv2.weight", "fc.weight"] if first_last else ["conv2.weight"]
    assert [names[id(parameter)] for parameter in groups[0]["params"]] == scaled
    optimizer = PSGD(torch.optim.SGD(groups, lr=1.0), lambda_s=3)
    before = {name: parameter.detach().clone() for name, parameter in net.named_parameters()}
    net(torch.randn(4, 3, 8, 8)).square().sum().backward()
    gradients = {name: parameter.grad.clone() for name, parameter in net.named_parameters() if parameter.requires_grad}
    optimizer.step()
    for name, gradient in gradients.items():
        multiplier = 3 * before[name].abs() if name in scaled else 1
        assert torch.allclose(net.get_parameter(name), before[name] - multiplier * gradient, atol=1e-6), name


def test_sparse_param_groups_of_a_frozen_network(net):
    for weight in prunable_weights(net).values():
        weight.requires_grad_(False)
    with pytest.raises(ValueError, match="SmallNet has no weights to scale: all prunable weights are frozen"):
        sparse_param_groups(net)


def test_psg_to_zero_is_powerpropagation_to_first_order():
    """Powerpropagation (Schwarz et al. 2021) with exponent 2 trains p in w = p * |p|; that is PSG with lambda_s = 4."""
    torch.manual_seed(0)
    root, start = torch.randn(20, 20, dtype=torch.float64), torch.randn(20, dtype=torch.float64)

    def loss(weight):
        return (root @ weight - 1).square().mean()

    def gap(lr):
        weight = nn.Parameter(start.clone())
        optimizer = PSGD(torch.optim.SGD([{"params": [weight], "target": "zero"}], lr=lr), lambda_s=4)
        loss(weight).backward()
        optimizer.step()
        power = (start.sign() * start.abs().sqrt()).requires_grad_()
        (gradient,) = torch.autograd.grad(loss(power * power.abs()), power)
        power = (power - lr * gradient).detach()
        assert (weight - start).abs().max() > lr
        return (power * power.abs() - weight.detach()).abs().max().item()

    assert gap(1e-4) / gap(5e-5) == pytest.approx(4, rel=0.05)


@pytest.mark.parametrize("psg", [False, True])
def test_l1_is_its_gradient_in_the_loss_after_the_scaling_of_psg(net, psg):
    """One step with the penalty and one without differ by lr * strength * sign(w), on the prunable weights alone."""
    lr, strength, images = 0.1, 0.3, torch.randn(4, 3, 8, 8)

    def stepped(model, strength):
        base = torch.optim.SGD(sparse_param_groups(model, first_last=False), lr=lr, momentum=0.9)
        penalize_l1(base, model, strength, first_last=False)
        optimizer = PSGD(base, lambda_s=4) if psg else base
        model(images).square().sum().backward()
        optimizer.step()
        return dict(model.named_parameters())

    (l1_gradient,) = torch.autograd.grad(strength * net.conv2.weight.abs().sum(), net.conv2.weight)
    plain, penalised = stepped(copy.deepcopy(net), 0), stepped(copy.deepcopy(net), strength)
    for name, weight in penalised.items():
        expected = lr * l1_gradient if name == "conv2.weight" else torch.zeros_like(weight)
        assert torch.allclose(plain[name] - weight, expected, atol=1e-6), name


def test_l1_penalty_takes_no_closure(net):
    base = torch.optim.SGD(sparse_param_groups(net), lr=0.1)
    penalize_l1(base, net, 1e-3)
    for optimizer in (base, PSGD(base)):
        with pytest.raises(ValueError, match="cannot be added in a step with a closure"):
            optimizer.step(lambda: 0)
    base.step()  # no gradients at all


def test_l1_penalty_is_not_for_a_psgd(net):
    base = torch.optim.SGD(sparse_param_groups(net), lr=0.1)
    with pytest.raises(TypeError, match=r"a PSGD would scale the penalty: give its base optimizer"):
        penalize_l1(PSGD(base), net, 1e-3)
    for strength in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="must be a finite number >= 0"):
            penalize_l1(base, net, strength)


def test_gradient_penalty_on_a_closed_form():
    """For loss = sum(a * w^2) / 2, the gradient is a * w, and its L1 norm's gradient is a * sign(a * w)."""
    layer = nn.Linear(5, 3, bias=False)
    a = torch.randn(3, 5)
    assert gradient_penalty(layer, 0) is None
    loss = (a * layer.weight.square()).sum() / 2
    penalty = gradient_penalty(layer, 0.2)(loss)
    assert penalty.item() == pytest.approx(0.2 * (a * layer.weight).abs().sum().item(), rel=1e-5)
    penalty.backward()
    assert torch.allclose(layer.weight.grad, 0.2 * a * (a * layer.weight).sign(), atol=1e-6)


@pytest.mark.parametrize("unscaled_first", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_l1_under_a_grad_scaler(net, fused, unscaled_first):
    """A fused optimizer is given scaled gradients, and divides them itself."""
    twin = copy.deepcopy(net)
    images = torch.randn(4, 3, 8, 8)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for model, scaled in ((net, True), (twin, False)):
        base = torch.optim.SGD(model.parameters(), lr=0.1, fused=fused)
        penalize_l1(base, model, 0.3)
        loss = model(images).square().sum()
        if not scaled:
            loss.backward()
            base.step()
            continue
        scaler.scale(loss).backward()
        if unscaled_first:  # as for clipping
            scaler.unscale_(base)
        scaler.step(base)
        scaler.update()
    for one, other in zip(net.parameters(), twin.parameters()):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_l1_penalty_is_not_for_bases_that_maximize(net):
    base = torch.optim.SGD(sparse_param_groups(net), lr=0.1, maximize=True)
    with pytest.raises(ValueError, match="a group has maximize=True"):
        penalize_l1(base, net, 1e-3)
