"""Quantized copies of networks: which parameters, at how many bits, and the ranges of activations."""

import copy

import pytest
import torch
from torch import nn

from models import ResNet32, vgg16_bn
from quant import (
    ActivationQuantizer,
    bn_ranges,
    fake_quantize_weight,
    grid_share,
    layer_bits,
    minmax_ranges,
    packed_bytes,
    quantize_activations,
    quantize_weights,
    weight_mse,
)


def test_layer_bits_first_last_rule(net):
    names = ["conv1.weight", "conv2.weight", "fc.weight", "fc.bias"]
    assert layer_bits(net, 4) == dict.fromkeys(names, 4)
    assert layer_bits(net, 3) == {"conv1.weight": 8, "conv2.weight": 3, "fc.weight": 8, "fc.bias": 8}
    assert layer_bits(net, 2, first_last=False) == {"conv2.weight": 2}


def test_layer_bits_counts_a_shared_parameter_once():
    first, second = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
    second.weight = first.weight
    assert list(layer_bits(nn.Sequential(first, second), 4)) == ["0.weight"]


def test_layer_bits_without_layers():
    with pytest.raises(ValueError, match="no convolution or linear layer"):
        layer_bits(nn.Sequential(nn.ReLU()), 4)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("per_channel", [False, True])
def test_quantize_weights_is_a_copy_on_the_grid(net, bits, per_channel):
    before = copy.deepcopy(net.state_dict())
    quantized = quantize_weights(net, bits, per_channel=per_channel)
    widths = layer_bits(net, bits)
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name])
        expected = fake_quantize_weight(value, widths[name], per_channel) if name in widths else value
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
    names = layer_bits(net, 3)
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


def test_packed_bytes():
    net = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.Linear(7, 3))
    conv, conv_bias, linear, linear_bias = 3 * 5 * 9, 5, 21, 3
    assert packed_bytes(net, 32) == 4 * (conv + conv_bias + linear + linear_bias)
    # 4 bits: 135 weights in 68 bytes, 21 in 11, 3 in 2, a 4-byte scale each; the convolution's bias stays float.
    assert packed_bytes(net, 4) == (68 + 4) + 4 * 5 + (11 + 4) + (2 + 4)
    assert packed_bytes(net, 4, per_channel=True) == (68 + 4 * 5) + 4 * 5 + (11 + 4 * 3) + (2 + 4 * 3)
    assert packed_bytes(net, 2) == (135 + 4) + 4 * 5 + (21 + 4) + (3 + 4)  # both layers are ends: 8 bits
    assert packed_bytes(net, 4, first_last=False) == packed_bytes(net, 32)


def test_activation_quantizer_is_relu_and_grid():
    x = torch.linspace(-2, 8, 4001)
    out = ActivationQuantizer(4, 6.0)(x)
    theirs = torch.fake_quantize_per_tensor_affine(x, 6.0 / 15, 0, 0, 15)
    steps = x / (6.0 / 15)
    near_tie = (steps - steps.floor() - 0.5).abs() < 1e-4
    assert torch.allclose(out[~near_tie], theirs[~near_tie], atol=1e-6)
    assert out.min() == 0 and out.max() == pytest.approx(6.0)


@pytest.mark.parametrize("x_max", [0.0, -1.0, float("nan"), float("inf")])
def test_activation_quantizer_bad_range(x_max):
    with pytest.raises(ValueError, match="range must be a finite number > 0"):
        ActivationQuantizer(4, x_max)


@pytest.mark.parametrize("model", [ResNet32(10), vgg16_bn(10)])
def test_one_quantizer_for_each_relu(model):
    relus = [name for name, module in model.named_modules() if isinstance(module, nn.ReLU)]
    ranges = {name: 1.0 + index for index, name in enumerate(relus)}
    quantized = quantize_activations(model, 4, ranges)
    found = {name: m for name, m in quantized.named_modules() if isinstance(m, ActivationQuantizer)}
    assert list(found) == relus and len({id(m) for m in found.values()}) == len(relus)
    assert not any(isinstance(m, nn.ReLU) for m in quantized.modules())
    assert any(isinstance(m, nn.ReLU) for m in model.modules())
    for name, module in found.items():
        assert module.scale.item() * 15 == pytest.approx(ranges[name])
    with pytest.raises(ValueError, match="no activation range is given for"):
        quantize_activations(model, 4, {})


def test_minmax_ranges_are_the_largest_outputs(net):
    batches = [torch.randn(4, 3, 8, 8) for _ in range(3)]
    net.train()
    statistics = copy.deepcopy(net.bn1.running_mean)
    ranges = minmax_ranges(net, batches)
    assert net.training and torch.equal(statistics, net.bn1.running_mean)
    net.eval()
    x = torch.cat(batches)
    first = net.relu1(net.bn1(net.conv1(x)))
    second = net.relu2(net.bn2(net.conv2(first)) + first)
    assert ranges == pytest.approx({"relu1": first.max().item(), "relu2": second.max().item()}, rel=1e-5)
    with pytest.raises(ValueError, match="at least one batch"):
        minmax_ranges(net, [])


def with_statistics(net, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for norm in (net.bn1, net.bn2):
            norm.weight.copy_(torch.rand(8, generator=generator) + 0.5)
            norm.bias.copy_(torch.randn(8, generator=generator))
    return net


def test_published_bn_ranges(net):
    """max over channels of beta + n * gamma of the batch norm before the ReLU; the shortcut is not looked at."""
    with_statistics(net)
    ranges = bn_ranges(net, n=3, shortcut=False)
    expected = {name: (bn.bias + 3 * bn.weight).max().item() for name, bn in (("relu1", net.bn1), ("relu2", net.bn2))}
    assert ranges == pytest.approx(expected)


def test_bn_ranges_add_the_shortcut(net):
    """The sum of the second batch norm and a rectified normal shortcut, against 400,000 samples of just that."""
    with_statistics(net)
    ranges = bn_ranges(net, n=3)
    generator = torch.Generator().manual_seed(1)
    main, other = (bn.bias + bn.weight * torch.randn(400_000, 8, generator=generator) for bn in (net.bn2, net.bn1))
    total = main + other.clamp_min(0)
    assert ranges["relu2"] == pytest.approx((total.mean(0) + 3 * total.std(0)).max().item(), rel=5e-3)
    assert ranges["relu1"] == pytest.approx(bn_ranges(net, n=3, shortcut=False)["relu1"])


def test_bn_ranges_of_resnet32_name_every_relu():
    model = ResNet32(10)
    ranges = bn_ranges(model)
    assert list(ranges) == [name for name, module in model.named_modules() if isinstance(module, nn.ReLU)]
    assert ranges["relu"] == pytest.approx(6.0) and ranges["layer1.0.relu2"] > 6.0


def test_bn_ranges_name_the_relu_without_batch_norm():
    with pytest.raises(ValueError, match="no batch norm feeds classifier.1"):
        bn_ranges(vgg16_bn(10))
