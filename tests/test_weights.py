"""Networks with quantized weights: which parameters, at how many bits, and the figures about them."""

import copy
import warnings
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from quant import (
    Grid,
    clip_weights,
    fake_quantize_weight,
    grid_share,
    layer_grids,
    layer_rows,
    packed_bytes,
    prune_weights,
    psg_param_groups,
    quantize_weights,
    sparse_param_groups,
    weight_mse,
    weight_scale,
)
from quant.deploy import integer_weights
from quant.pruning import nonzero_weights, pruning_mse


def test_layer_grids_first_last_rule(net):
    names = ["conv1.weight", "conv2.weight", "fc.weight", "fc.bias"]
    assert layer_grids(net, 4) == dict.fromkeys(names, Grid(4))
    grids = layer_grids(net, Grid(3, per_channel=True))
    assert {name: grid.bits for name, grid in grids.items()} == dict(zip(names, (8, 3, 8, 8)))
    assert all(grid.per_channel for grid in grids.values())
    inner = Grid(2, first_last=False)
    assert layer_grids(net, inner) == {"conv2.weight": inner}


def test_layer_grids_counts_a_shared_parameter_once():
    first, second = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
    second.weight = first.weight
    assert list(layer_grids(nn.Sequential(first, second), 4)) == ["0.weight"]


def test_layer_grids_takes_weights_and_linear_biases_alone(net):
    """Not what a subclass adds; a weight under the name that spectral_norm gives it is one."""
    net.fc.lora = nn.Parameter(torch.ones(5, 2))
    nn.utils.spectral_norm(net.conv2)
    assert list(layer_grids(net, 4)) == ["conv1.weight", "conv2.weight_orig", "fc.weight", "fc.bias"]


def test_nothing_to_quantize(net):
    with pytest.raises(ValueError, match="no convolution or linear layer"):
        layer_grids(nn.Sequential(nn.ReLU()), 4)
    with pytest.raises(ValueError, match="Sequential has no weights to quantize"):
        grid_share(nn.Sequential(net.conv1, net.fc), Grid(4, first_last=False))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("per_channel", [False, True])
def test_quantize_weights_is_a_copy_on_the_grid(net, bits, per_channel):
    before = copy.deepcopy(net.state_dict())
    quantized = quantize_weights(net, Grid(bits, per_channel=per_channel))
    grids = layer_grids(net, Grid(bits, per_channel=per_channel))
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name])
        expected = fake_quantize_weight(value, grids[name]) if name in grids else value
        assert torch.equal(quantized.state_dict()[name], expected), name


def test_quantize_weights_at_32_bits_changes_nothing(net):
    quantized = quantize_weights(net, 32)
    assert quantized is not net
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), quantized.state_dict().values()))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_quantize_weights_names_the_layer_that_is_not_finite(net, bad):
    with torch.no_grad():
        net.conv2.weight[0, 0, 0, 0] = bad
    with pytest.raises(ValueError, match="conv2.weight has values that are not finite"):
        quantize_weights(net, 4)


def test_weight_mse_and_grid_share(net):
    names = layer_grids(net, 3)
    error = torch.cat([(net.get_parameter(n) - fake_quantize_weight(net.get_parameter(n), b)).detach().flatten()
                       for n, b in names.items()])  # fmt: skip
    assert weight_mse(net, 3) == pytest.approx(error.square().mean().item(), rel=1e-5)
    assert weight_mse(net, 32) == 0
    quantized = quantize_weights(net, 3)
    assert weight_mse(quantized, 3) < 1e-15 and grid_share(quantized, 3) == 1
    big = nn.Sequential(nn.Linear(300, 300), nn.Linear(300, 300))
    for parameter in big.parameters():
        nn.init.uniform_(parameter)
    assert grid_share(big, 4) == pytest.approx(0.2, abs=0.01)
    big[0].weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="0.weight has values that are not finite"):
        grid_share(big, 4)


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("bits", [2, 4])
def test_clip_weights(net, bits, per_channel):
    """Afterwards the largest weights span the grid that had the least squared error before; the others stay."""
    before, grid = copy.deepcopy(net), Grid(bits, per_channel=per_channel)
    assert clip_weights(net, grid) is net
    grids = layer_grids(net, replace(grid, weight_range="mse"))
    assert any(not torch.equal(net.get_parameter(name), before.get_parameter(name)) for name in grids)
    for name, weight in net.named_parameters():
        start = before.get_parameter(name)
        if name not in grids:
            assert torch.equal(weight, start)
            continue
        scale = weight_scale(start, grids[name])
        reach = scale * grids[name].quant_max
        assert torch.equal(weight, torch.maximum(torch.minimum(start, reach), -reach))
        torch.testing.assert_close(weight_scale(weight, replace(grids[name], weight_range="absmax")), scale)
    assert weight_mse(net, grid) < weight_mse(before, replace(grid, weight_range="mse")) < weight_mse(before, grid)


def test_clip_weights_changes_nothing_if_it_cannot_be_done(net):
    with torch.no_grad():
        net.fc.weight[0, 0] = float("nan")
    before = copy.deepcopy(net.conv2.weight)
    with pytest.raises(ValueError, match="fc.weight"):
        clip_weights(net, 2)
    assert torch.equal(net.conv2.weight, before)
    with pytest.raises(ValueError, match="32"):
        clip_weights(net, 32)


def test_clip_weights_leaves_frozen_weights_and_names_computed_ones(net):
    grid, before = Grid(2, per_channel=True), copy.deepcopy(net.conv2.weight)
    nn.utils.parametrizations.weight_norm(net.fc)
    net.conv2.weight.requires_grad_(False)
    with pytest.warns(UserWarning, match="the weights of fc are computed"):
        clip_weights(net, grid)
    assert torch.equal(net.conv2.weight, before)
    net.conv2.weight.requires_grad_(True)
    with pytest.warns(UserWarning, match="the weights of fc are computed"):
        clip_weights(net, grid)
    assert not torch.equal(net.conv2.weight, before)


def test_packed_bytes():
    net = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.Linear(7, 3))
    conv, conv_bias, linear, linear_bias = 3 * 5 * 9, 5, 21, 3
    assert packed_bytes(net, 32) == 4 * (conv + conv_bias + linear + linear_bias)
    # 4 bits: 135 weights in 68 bytes, 21 in 11, 3 in 2, a 4-byte scale each; the convolution's bias stays float.
    assert packed_bytes(net, 4) == (68 + 4) + 4 * 5 + (11 + 4) + (2 + 4)
    assert packed_bytes(net, Grid(4, per_channel=True)) == (68 + 4 * 5) + 4 * 5 + (11 + 4 * 3) + (2 + 4)
    assert packed_bytes(net, 2) == (135 + 4) + 4 * 5 + (21 + 4) + (3 + 4)  # both layers are ends: 8 bits
    three = nn.Sequential(net, nn.Linear(3, 2, bias=False))
    assert packed_bytes(three, Grid(4, first_last=False)) == packed_bytes(net[0], 32) + (11 + 4) + (2 + 4) + 4 * 6


def test_layer_rows(net):
    before = copy.deepcopy(net.state_dict())
    images = torch.randn(16, 3, 8, 8)
    seen = []
    for row, network in layer_rows(net, images.split(8), 3):
        name = f"{row['layer']}.weight"
        width = layer_grids(net, 3)[name].bits
        assert row["bits"] == width and row["weights"] == before[name].numel()
        for key, value in network.state_dict().items():
            own = key.startswith(f"{row['layer']}.")
            bits = 8 if key == "fc.bias" else width if key == name else 32  # a convolution's bias stays float
            assert torch.equal(value, fake_quantize_weight(before[key], bits) if own and bits < 32 else before[key])
        error = fake_quantize_weight(before[name], width) - before[name]
        assert row["mse"] == pytest.approx(error.square().mean().item(), rel=1e-5)
        sqnr = 10 * torch.log10(before[name].square().sum() / error.square().sum()).item()
        assert row["sqnr"] == pytest.approx(sqnr, abs=1e-3) and 0 < row["grid_share"] <= 1
        seen.append(row["layer"])
    assert seen == ["conv1", "conv2", "fc"]
    first = next(iter(layer_rows(net, [images], 3)))[0]
    assert first["input_max"] == images.max().item() and first["input_min"] == images.min().item()
    rows = layer_rows(net, [images], 3)
    next(rows)
    rows.close()
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


@pytest.fixture
def masked(net):
    """`net` with its largest weights under a pruning mask, and its twin with zeros in their place."""
    twin = copy.deepcopy(net)
    for module in (net.conv1, net.conv2, net.fc):
        mask = (module.weight.abs() < 0.5 * module.weight.abs().max()).float()
        twin.get_submodule(next(n for n, m in net.named_modules() if m is module)).weight.data.mul_(mask)
        prune.custom_from_mask(module, "weight", mask)
    return net, twin


def test_masked_weights_do_not_count(masked):
    """Neither for a grid's range nor for a pruned share: all is as with zeros in the weights themselves."""
    net, twin = masked
    images = torch.randn(4, 3, 8, 8)
    for function in (lambda n: quantize_weights(n, 4), lambda n: prune_weights(n, 0.9)):
        torch.testing.assert_close(function(net).eval()(images), function(twin).eval()(images))
    for figure in (weight_mse, grid_share):
        assert figure(net, 4) == pytest.approx(figure(twin, 4), rel=1e-6)
    assert pruning_mse(net, 0.9) == pytest.approx(pruning_mse(twin, 0.9), rel=1e-6)
    assert nonzero_weights(net) == nonzero_weights(twin)
    integers, expected = integer_weights(net, 4), integer_weights(twin, 4)
    assert torch.equal(integers["conv2.weight_orig"][0], expected["conv2.weight"][0])


@pytest.mark.parametrize("groups_of", [lambda net: psg_param_groups(net, 3), sparse_param_groups])
def test_masked_weights_are_zero_in_parameter_groups(masked, groups_of):
    """So that the optimizer's range does not count them, and the network computes what it did."""
    net, twin = masked
    images = torch.randn(4, 3, 8, 8)
    before = net.eval()(images)
    for group, expected in zip(groups_of(net), groups_of(twin), strict=True):
        pairs = zip(sorted(group["params"], key=torch.numel), sorted(expected["params"], key=torch.numel), strict=True)
        assert all(torch.equal(*pair) for pair in pairs)
    assert torch.equal(net(images), before)


@pytest.mark.parametrize("wrap", [nn.utils.weight_norm, nn.utils.spectral_norm,
                                  lambda layer: prune.l1_unstructured(layer, "weight", 0.5)])  # fmt: skip
def test_networks_that_compute_a_weight_are_copied_after_a_training_step(net, wrap):
    wrap(net.conv2)
    images = torch.randn(4, 3, 8, 8)
    net.train()(images).sum().backward()
    for function in (quantize_weights, prune_weights):
        copied = function(net, 4 if function is quantize_weights else 0.5)
        assert copied.conv2.weight is not net.conv2.weight
        copied.eval()(images)
    assert net.conv2.weight.requires_grad  # as it was


@pytest.mark.parametrize("dtype", [torch.complex64, torch.uint8])
def test_weights_without_a_grid_are_refused(net, dtype):
    net.conv2.weight = nn.Parameter(torch.ones(8, 8, 3, 3, dtype=dtype), requires_grad=False)
    for function in (quantize_weights, grid_share, psg_param_groups, layer_grids):
        with pytest.raises(ValueError, match=f"conv2.weight is {dtype}: only real floating-point weights have a grid"):
            function(net, 4)


def test_a_network_on_the_meta_device_is_refused(net):
    for function in (
        lambda n: quantize_weights(n, 4),
        lambda n: prune_weights(n, 0.5),
        lambda n: integer_weights(n, 4),
    ):
        with pytest.raises(ValueError, match="conv1.weight is on the meta device: it has no values"):
            function(net.to("meta"))


def test_a_failed_quantization_in_place_changes_nothing(net):
    net.fc.weight.data[0, 0] = float("nan")
    before = copy.deepcopy(net.state_dict())
    for function in (lambda: quantize_weights(net, 4, inplace=True), lambda: prune_weights(net, 0.5, inplace=True)):
        with pytest.raises(ValueError, match="fc.weight has values that are not finite"):
            function()
        assert all(torch.equal(before[name], value) for name, value in net.state_dict().items() if name != "fc.weight")


def test_weights_that_psg_never_moves_are_named_once(net):
    """LoRA's second matrix, zero-initialized branches and biases begin on their grid."""
    nn.init.zeros_(net.conv2.weight)
    nn.init.zeros_(net.fc.bias)
    with pytest.warns(UserWarning, match="all zeros, which PSG never moves: conv2.weight, fc.bias; give PSGD") as seen:
        psg_param_groups(net, 4)
    assert len(seen) == 1 and seen[0].filename == __file__
    with pytest.warns(UserWarning, match="all zeros, which PSG never moves: conv2.weight; give PSGD"):
        sparse_param_groups(net)
    net.conv2.requires_grad_(False)
    net.fc.requires_grad_(False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        psg_param_groups(net, 4)
