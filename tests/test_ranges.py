"""Ranges of activations from images."""

import copy

import pytest
import torch
from torch import nn

from models import vgg16_bn
from quant import calibrate, layer_grids, layer_sqnr, quantize_sums, quantize_weights
from quant.grid import fake_quantize
from quant.histograms import BINS
from quant.quantizers import SumQuantizer
from quant.ranges import minmax_ranges, mse_ranges, percentile_ranges, relu_histograms


@pytest.fixture
def values():
    """Outputs of a ReLU: half zeros, else the absolute value of a normal variable, with one outlier."""
    torch.manual_seed(0)
    x = torch.randn(100, 1000)
    x[3, 7] = 30
    return x


def histograms(values):
    return relu_histograms(nn.Sequential(nn.ReLU()), values.split(30))


def test_histogram(values):
    (histogram,) = histograms(values).values()
    assert histogram.top == 30 and histogram.counts.sum() == values.numel()
    expected = torch.histogram(values.relu().flatten(), BINS, range=(0, 30)).hist
    assert torch.equal(histogram.counts, expected.double())


def test_calibrate_by_each_rule(net):
    batches = torch.randn(64, 3, 8, 8).split(32)
    found = relu_histograms(net, batches)
    assert calibrate(net, batches, 3, "minmax") == minmax_ranges(net, batches)
    assert calibrate(net, batches, 3, "percentile", 90) == percentile_ranges(found, 90)
    assert calibrate(net, batches, 3) == mse_ranges(found, 3) != mse_ranges(found, 4)
    with pytest.raises(ValueError, match="rule must be one of minmax, percentile, mse, got 'max'"):
        calibrate(net, batches, 3, "max")


def test_histogram_counts_beyond_the_whole_numbers_of_float32():
    count = 2**24 + 1000
    (histogram,) = relu_histograms(nn.Sequential(nn.ReLU()), [torch.zeros(1, count)]).values()
    assert histogram.counts[0] == count


@pytest.mark.parametrize("percentile", [60, 99, 99.9, 100])
def test_percentile(values, percentile):
    expected = torch.quantile(values.relu().flatten().double(), percentile / 100).item()
    assert percentile_ranges(histograms(values), percentile)["0"] == pytest.approx(expected, abs=30 / BINS)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_mse_range_is_the_best_on_the_values_themselves(values, bits):
    found = mse_ranges(histograms(values), bits)["0"]
    quant_max = 2**bits - 1
    outputs = values.relu()

    def error(x_max):
        return (fake_quantize(outputs, torch.tensor(x_max / quant_max), 0, quant_max) - outputs).square().mean().item()

    best = min(error(30 * part / 100) for part in range(1, 101))
    assert error(found) == pytest.approx(best, rel=0.05) and error(found) <= error(30.0)


def test_a_relu_that_never_fires():
    found = histograms(-torch.rand(4, 5))
    assert found["0"].top == 0
    assert percentile_ranges(found, 99)["0"] == mse_ranges(found, 4)["0"] == 0


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.relu, self.conv = nn.ReLU(), nn.Conv2d(2, 2, 1, bias=False)

    def forward(self, x):
        y = self.relu(x)
        return self.conv(y) + y


class Sums(nn.Module):
    """Sums of sizes and of token ids, which have no ranges, and a sum of a tensor with itself."""

    def __init__(self):
        super().__init__()
        self.embed, self.linear = nn.Embedding(8, 4), nn.Linear(4, 4)

    def forward(self, ids):
        x = self.linear(self.embed(ids + (ids > 2).long()))
        return (x + x).view(x.size(0) + x.size(1) - x.size(1), -1)


def test_sums_of_other_things_than_activations_stay():
    torch.manual_seed(0)
    net, ids = Sums().eval(), torch.arange(6).view(2, 3)
    quantized = quantize_sums(net, [ids])
    (quantizer,) = [module for module in quantized.modules() if isinstance(module, SumQuantizer)]
    with torch.no_grad():
        x = quantizer(net.linear(net.embed(ids + (ids > 2).long())))
        assert torch.equal(quantized(ids), (x + x).view(2, -1))


def test_sums_take_8_bits():
    torch.manual_seed(0)
    net, images = Residual(), torch.randn(4, 2, 5, 5)
    with torch.no_grad():
        branch = net.conv(images.relu())
        scale = branch.abs().max() / 127
        expected = (branch / scale).round() * scale + images.relu()  # the other operand is a ReLU's, and left alone
        quantized = quantize_sums(net, [images[:2], images[2:]])
        torch.testing.assert_close(quantized(images), expected)
        assert torch.equal(net(images), branch + images.relu())  # the network itself is as it was
    with pytest.raises(ValueError, match="at least one batch"):
        quantize_sums(net, [])
    assert list(quantized.state_dict()) == ["conv.weight", "sum_quantizer_0.scale"] and quantized.training
    without_sums = quantize_sums(vgg16_bn(10), [torch.randn(1, 3, 32, 32)])
    assert not [module for module in without_sums.modules() if isinstance(module, SumQuantizer)]


class Backwards(nn.Module):
    """Registers its layers in another order than it calls them, and one that it calls in training only."""

    def __init__(self):
        super().__init__()
        self.head, self.auxiliary = nn.Linear(8, 5), nn.Linear(8, 5)
        self.stem, self.last = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x):
        x = self.stem(x)
        x = x + self.last(x)
        features = x.mean((2, 3))
        return self.head(features) + self.auxiliary(features) if self.training else self.head(features)


def test_a_traced_copy_has_the_grids_of_the_network():
    torch.manual_seed(0)
    net, images = Backwards().eval(), torch.randn(4, 3, 8, 8)
    traced = quantize_sums(quantize_weights(net, 2), [images])
    wanted = {name: grid for name, grid in layer_grids(net, 2).items() if not name.startswith("auxiliary")}
    for copied in (traced, copy.deepcopy(traced)):
        assert {name: grid.bits for name, grid in layer_grids(copied, 2).items()} == {
            name: grid.bits for name, grid in wanted.items()
        }
    assert torch.equal(quantize_weights(traced, 2)(images), traced(images))
    assert list(layer_sqnr(net, traced, [images])) == ["stem", "last", "head", ""]
