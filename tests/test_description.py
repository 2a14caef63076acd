"""`describe`: what becomes of each parameter, and why."""

import pytest
from torch import nn

from quant import Grid, describe, layer_grids, quantize_weights


def test_every_parameter_has_a_row_with_its_reason(net):
    net.conv2.bias.requires_grad_(False)
    net.words = nn.Embedding(4, 3)
    net.recurrent = nn.GRU(2, 2)
    net.fc.lora = nn.Parameter(net.fc.weight.detach().clone())
    rows = describe(net, Grid(3, exclude="conv2.weight")).rows
    assert {row.name: row.reason for row in rows if "recurrent" not in row.name} == {
        "conv1.weight": "convolution, first layer",
        "bn1.weight": "normalization",
        "bn1.bias": "normalization",
        "conv2.weight": "excluded",
        "conv2.bias": "bias of a convolution, frozen",
        "bn2.weight": "normalization",
        "bn2.bias": "normalization",
        "fc.weight": "linear layer, last layer",
        "fc.bias": "linear layer, last layer",
        "fc.lora": "lora of a linear layer",
        "words.weight": "embedding",
    }
    assert {row.reason for row in rows if "recurrent" in row.name} == {"of GRU, not a known kind of layer"}
    assert {row.name: row.shape for row in rows} == {name: tuple(p.shape) for name, p in net.named_parameters()}


@pytest.mark.filterwarnings("ignore:matrices that stay in float")
@pytest.mark.parametrize("grid", [4, Grid(2, per_channel=True), Grid(3, False), Grid(4, include="words")])
def test_it_says_what_is_done(net, grid):
    net.words = nn.Embedding(4, 3)
    quantized = quantize_weights(net, grid)
    rows = describe(net, grid).rows
    assert {row.name: row.bits for row in rows if row.bits != 32} == {
        name: own.bits for name, own in layer_grids(net, grid).items()
    }
    for row in rows:
        same = quantized.get_parameter(row.name).equal(net.get_parameter(row.name))
        assert same == (row.bits == 32), row


def test_the_table():
    net = nn.Sequential(nn.Conv2d(3, 10, 5), nn.GroupNorm(2, 10), nn.Conv2d(10, 4, 1, bias=False), nn.Linear(4, 2))
    net.gain = nn.Parameter(net[1].bias.detach().sum())
    assert str(describe(net, Grid(3, first_last=False))).splitlines() == [
        "gain      scalar    float   of Sequential, not a known kind of layer",
        "0.weight  10x3x5x5  float   first layer, left out",
        "0.bias    10        float   bias of a convolution",
        "1.weight  10        float   normalization",
        "1.bias    10        float   normalization",
        "2.weight  4x10x1x1  3 bits  convolution",
        "3.weight  2x4       float   last layer, left out",
        "3.bias    2         float   last layer, left out",
        "40 of 831 parameters are quantized",
    ]
    assert {row.bits for row in describe(net, 32).rows} == {32}


def test_a_shared_parameter_has_the_row_of_the_layer_that_quantizes_it():
    net = nn.Sequential(nn.Embedding(6, 4), nn.Linear(4, 6))
    net[1].weight = net[0].weight
    assert [(row.name, row.bits) for row in describe(net, 4).rows] == [("1.weight", 4), ("1.bias", 4)]
    assert str(describe(nn.ReLU(), 4)) == "0 of 0 parameters are quantized"
