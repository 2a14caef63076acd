"""Activations that quantizers would miss, or would replace although they compute something else."""

import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional

from models import build_model
from quant import calibrate, float_activations, quantize_activations, quantize_weights
from quant.quantizers import ActivationQuantizer
from quant.ranges import minmax_ranges


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.ReLU(inplace=True)])
def test_a_transformer_layer_calls_the_quantizer(activation):
    """Under no_grad torch runs these layers in one kernel, which applies its own ReLU."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, activation=activation, batch_first=True)
    net = nn.TransformerEncoder(layer, 2).eval()
    images = torch.randn(4, 5, 16)
    quantized = quantize_activations(net, 2, minmax_ranges(net, [images]))
    with torch.no_grad():
        by_kernel = quantized(images)
    by_modules = quantized(images)  # with gradients, module by module
    torch.testing.assert_close(by_kernel, by_modules)
    assert (by_kernel - net(images)).abs().max() > 0.01
    padding = torch.tensor([[False] * 5] * 3 + [[False] * 3 + [True] * 2])
    with torch.no_grad():
        torch.testing.assert_close(
            quantized(images, src_key_padding_mask=padding)[:3], by_kernel[:3], rtol=1e-4, atol=1e-4
        )


def test_activations_that_stay_float_are_counted():
    net = build_model("mobilenet_v3_small", 10)
    left = float_activations(net)
    assert len(left) == 28 and left[0] == "features.0.2 (Hardswish)"
    images = torch.randn(2, 3, 64, 64)
    ranges = calibrate(net, [images], 4)
    expected = r"28 of 42 activations stay float: features.0.2 \(Hardswish\), .* and 25 more"
    with pytest.warns(UserWarning, match=expected):
        quantize_activations(net, 4, ranges)


def test_functional_activations_are_counted():
    assert float_activations(build_model("densenet121", 10)) == ["relu (relu)"]
    encoder = nn.TransformerEncoderLayer(16, 2, 32, activation="gelu")
    assert float_activations(nn.Sequential(encoder)) == ["0.activation (gelu)"]

    class Functions(nn.Module):
        def forward(self, x):
            return torch.sigmoid(x).tanh() + functional.silu(x) + x.clamp_(min=0).softmax(1)

    assert [name.split()[1] for name in float_activations(Functions())] == ["(sigmoid)", "(tanh)", "(silu)", "(clamp)"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for arch in ("ResNet32", "vgg16_bn"):
            net = build_model(arch, 10)
            assert float_activations(net) == []
            quantize_activations(net, 4, minmax_ranges(net, [torch.randn(1, 3, 32, 32)]))


@pytest.mark.parametrize(
    "function",
    [
        torch.clip,
        functional.logsigmoid,
        torch.special.expit,
        lambda x: torch.maximum(x, 0 * x),
        lambda x: x.clamp_max(6),
    ],
)
def test_activations_by_their_other_names_are_counted(function):
    class Function(nn.Module):
        def forward(self, x):
            return function(x, 0, 6) if function is torch.clip else function(x)

    assert len(float_activations(Function())) == 1


def test_functions_of_a_network_that_cannot_be_traced_are_told_of():
    class Untraceable(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.relu = nn.Conv2d(3, 4, 3), nn.ReLU()

        def forward(self, x):
            return functional.relu(self.relu(self.conv(x)) if x.sum() else x)

    with pytest.warns(
        UserWarning, match="torch.fx cannot trace Untraceable: functions such as F.relu, if it calls any"
    ):
        quantize_activations(Untraceable(), 4, {"relu": 1.0})


class ShiftedReLU(nn.ReLU):
    def forward(self, x):
        return super().forward(x) - 0.5


class NamedReLU(nn.ReLU):
    pass


def test_a_subclass_of_relu_is_replaced_only_if_it_computes_the_same():
    net, images = nn.Sequential(nn.Linear(5, 5), nn.ReLU(), ShiftedReLU(), NamedReLU()), torch.randn(4, 5)
    with pytest.warns(UserWarning, match="1 of 3 activations stay float: relu"):
        quantized = quantize_activations(net, 8, minmax_ranges(net, [images]))
    assert [type(module) for module in quantized][1:] == [ActivationQuantizer, ShiftedReLU, ActivationQuantizer]
    torch.testing.assert_close(quantized(images), net(images), rtol=0, atol=0.02)


@pytest.mark.parametrize("activation", [nn.GELU(), nn.ReLU()])
def test_copies_of_a_decoder_layer_keep_their_activation(activation):
    """copy.deepcopy gives them F.relu instead."""
    torch.manual_seed(0)
    layer = nn.TransformerDecoderLayer(16, 2, 32, activation=activation, batch_first=True).eval()
    words = torch.randn(4, 5, 16)
    assert torch.equal(quantize_weights(layer, 32)(words, words), layer(words, words))


class Seq2Seq(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Transformer(16, 2, 1, 1, 32, activation=nn.ReLU(), batch_first=True)

    def forward(self, x):
        return self.inner(x, x)


def test_a_relu_that_torch_never_calls_is_not_quantized():
    """The layers of an nn.TransformerDecoder call F.relu in place of their module."""
    torch.manual_seed(0)
    net, words = Seq2Seq().eval(), torch.randn(4, 5, 16)
    ranges = minmax_ranges(net, [words])
    assert list(ranges) == ["inner.encoder.layers.0.activation"]
    with pytest.warns(UserWarning, match=r"1 of 2 activations stay float: inner.decoder.layers.0.activation \(relu\)"):
        quantized = quantize_activations(net, 2, ranges)
    assert (quantized(words) - net(words)).abs().max() > 0.01
