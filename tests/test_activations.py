"""Activation quantizers, and their ranges by batch norm and by calibration."""

import copy

import pytest
import torch
from torch import nn

from models import ResNet32, vgg16_bn
from quant import bn_ranges, quantize_activations
from quant.quantizers import ActivationQuantizer
from quant.ranges import minmax_ranges


def test_activation_quantizer_is_relu_and_grid():
    x = torch.linspace(-2, 8, 4001)
    out = ActivationQuantizer(4, 6.0)(x)
    theirs = torch.fake_quantize_per_tensor_affine(x, 6.0 / 15, 0, 0, 15)
    steps = x / (6.0 / 15)
    near_tie = (steps - steps.floor() - 0.5).abs() < 1e-4
    assert torch.allclose(out[~near_tie], theirs[~near_tie], atol=1e-6)
    assert out.min() == 0 and out.max() == pytest.approx(6.0)


def test_relu_that_never_fired_stays_usable():
    out = ActivationQuantizer(4, 0.0)(torch.tensor([-1.0, 0.0, 0.3, 2.2]))
    assert out.tolist() == [0, 0, 0, 2]


@pytest.mark.parametrize("x_max", [-1.0, float("nan"), float("inf")])
def test_activation_quantizer_bad_range(x_max):
    with pytest.raises(ValueError, match="range must be a finite number >= 0"):
        ActivationQuantizer(4, x_max)


@pytest.mark.parametrize("arch", [ResNet32, vgg16_bn])
def test_one_quantizer_for_each_relu(arch):
    model = arch(10)
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


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_bn_ranges_that_are_not_finite_are_refused(net, value):
    with torch.no_grad():
        net.bn1.bias[0] = value
    with pytest.raises(ValueError, match="the batch norm before relu1 has values that are not finite"):
        bn_ranges(net)


def test_bn_ranges_add_the_shortcut(net):
    """The sum of the second batch norm and a rectified normal shortcut, against 400,000 samples of just that."""
    with_statistics(net)
    ranges = bn_ranges(net, n=3)
    generator = torch.Generator().manual_seed(1)
    main, other = (bn.bias + bn.weight * torch.randn(400_000, 8, generator=generator) for bn in (net.bn2, net.bn1))
    total = main + other.clamp_min(0)
    assert ranges["relu2"] == pytest.approx((total.mean(0) + 3 * total.std(0)).max().item(), rel=5e-3)
    assert ranges["relu1"] == pytest.approx(bn_ranges(net, n=3, shortcut=False)["relu1"])


def test_a_relu_used_twice_gets_the_larger_range(net):
    with_statistics(net)
    apart = bn_ranges(net, n=3)
    net.relu2 = net.relu1
    assert bn_ranges(net, n=3) == {"relu1": pytest.approx(max(apart.values()))}


def test_bn_ranges_of_resnet32_name_every_relu():
    model = ResNet32(10)
    ranges = bn_ranges(model)
    assert list(ranges) == [name for name, module in model.named_modules() if isinstance(module, nn.ReLU)]
    assert ranges["relu"] == pytest.approx(6.0) and ranges["layer1.0.relu2"] > 6.0


def test_bn_ranges_name_the_relu_without_batch_norm():
    with pytest.raises(ValueError, match="no batch norm feeds classifier.1"):
        bn_ranges(vgg16_bn(10))


def test_a_relu_under_two_names_is_quantized_under_both(net):
    relu = nn.ReLU()
    stack = nn.Sequential(nn.Conv2d(3, 4, 1), relu, nn.Conv2d(4, 4, 1), relu)
    images = torch.randn(16, 3, 8, 8)
    quantized = quantize_activations(stack, 2, minmax_ranges(stack, [images]))
    assert quantized[1] is quantized[3] and isinstance(quantized[3], ActivationQuantizer)
    assert len(quantized(images).unique()) <= 4 and stack[3] is relu


def test_a_sum_with_a_factor_is_no_plain_sum():
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.relu = nn.BatchNorm2d(3), nn.ReLU()

        def forward(self, x):
            y = self.norm(x)
            return self.relu(torch.add(y, y, alpha=0.5))

    with pytest.raises(ValueError, match="no batch norm feeds relu"):
        bn_ranges(Scaled())


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_small_ranges_in_16_bits(dtype, inplace):
    """The scale of such a range is zero in float16."""
    quantizer = ActivationQuantizer(8, 5e-6, inplace).to(dtype)
    x = torch.tensor([-1.0, 0.0, 2e-6, 1.0], dtype=dtype)
    expected = ActivationQuantizer(8, 5e-6)(x.float()).to(dtype)
    assert quantizer.scale.dtype == torch.float32
    out = quantizer(x)
    assert out.dtype == dtype and torch.equal(out, expected) and (out is x) == inplace
