"""Networks with quantized weights: which parameters, at how many bits, and the figures about them."""

import copy

import pytest
import torch
from torch import nn

from quant import fake_quantize_weight, grid_share, layer_bits, layer_rows, packed_bytes, quantize_weights, weight_mse


def test_layer_bits_first_last_rule(net):
    names = ["conv1.weight", "conv2.weight", "fc.weight", "fc.bias"]
    assert layer_bits(net, 4) == dict.fromkeys(names, 4)
    assert layer_bits(net, 3) == {"conv1.weight": 8, "conv2.weight": 3, "fc.weight": 8, "fc.bias": 8}
    assert layer_bits(net, 2, first_last=False) == {"conv2.weight": 2}


def test_layer_bits_counts_a_shared_parameter_once():
    first, second = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
    second.weight = first.weight
    assert list(layer_bits(nn.Sequential(first, second), 4)) == ["0.weight"]


def test_layer_bits_takes_weights_and_linear_biases_alone(net):
    """Not what a subclass adds; a weight under the name that spectral_norm gives it is one."""
    net.fc.lora = nn.Parameter(torch.ones(5, 2))
    nn.utils.spectral_norm(net.conv2)
    assert list(layer_bits(net, 4)) == ["conv1.weight", "conv2.weight_orig", "fc.weight", "fc.bias"]


def test_nothing_to_quantize(net):
    with pytest.raises(ValueError, match="no convolution or linear layer"):
        layer_bits(nn.Sequential(nn.ReLU()), 4)
    with pytest.raises(ValueError, match="Sequential has no weights to quantize"):
        grid_share(nn.Sequential(net.conv1, net.fc), 4, first_last=False)


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
    assert packed_bytes(net, 4, per_channel=True) == (68 + 4 * 5) + 4 * 5 + (11 + 4 * 3) + (2 + 4)
    assert packed_bytes(net, 2) == (135 + 4) + 4 * 5 + (21 + 4) + (3 + 4)  # both layers are ends: 8 bits
    three = nn.Sequential(net, nn.Linear(3, 2, bias=False))
    assert packed_bytes(three, 4, first_last=False) == packed_bytes(net[0], 32) + (11 + 4) + (2 + 4) + 4 * 6


def test_layer_rows(net):
    before = copy.deepcopy(net.state_dict())
    images = torch.randn(16, 3, 8, 8)
    seen = []
    for row, network in layer_rows(net, images.split(8), bits=3):
        name = f"{row['layer']}.weight"
        width = layer_bits(net, 3)[name]
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
    first = next(iter(layer_rows(net, [images], bits=3)))[0]
    assert first["input_max"] == images.max().item() and first["input_min"] == images.min().item()
    rows = layer_rows(net, [images], bits=3)
    next(rows)
    rows.close()
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
