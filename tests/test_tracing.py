"""Networks that their traced graph would misrepresent, and activations that quantizers would miss."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional

from models import build_model
from quant import bn_ranges, calibrate, float_activations, quantize_activations, quantize_sums
from quant.deploy import to_onnx
from quant.quantizers import ActivationQuantizer
from quant.ranges import minmax_ranges
from quant.tracing import InPlaceError, trace
from utils.training.evaluation import fold_batch_norm


class Block(nn.Module):
    """Two convolutions with batch norm and ReLUs, `inplace` or not; subclasses differ in what they do in place."""

    def __init__(self, inplace: bool = True) -> None:
        super().__init__()
        self.c0, self.c1 = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.n0, self.n1 = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.r1, self.r2 = nn.ReLU(inplace), nn.ReLU(inplace)


class SkipReadsARewrittenTensor(Block):
    def forward(self, x):
        x = self.n0(self.c0(x))
        return self.r2(self.n1(self.c1(self.r1(x)))) + x


class SkipThroughADropout(Block):
    def forward(self, x):
        x = self.n0(self.c0(x))
        skip = functional.dropout(x, training=self.training)
        return self.r2(self.n1(self.c1(self.r1(x)))) + skip


class SkipIsAView(Block):
    def forward(self, x):
        x = self.n0(self.c0(x))
        skip = x.flatten(2)
        y = self.n1(self.c1(self.r1(x)))
        return self.r2(y) + skip.view_as(y)


class SumAsAStatement(Block):
    def forward(self, x):
        x = self.r1(self.n0(self.c0(x)))
        y = self.n1(self.c1(x))
        y.add_(x)
        return self.r2(y)


class ProductAsAStatement(Block):
    def forward(self, x):
        y = self.n0(self.c0(x))
        y.mul_(2)
        return self.r2(self.n1(self.c1(self.r1(y))))


class ReLUAsAStatement(Block):
    def forward(self, x):
        x = self.n0(self.c0(x))
        self.r1(x)
        return self.r2(self.n1(self.c1(x)))


class FunctionInPlace(Block):
    def forward(self, x):
        x = self.r1(self.n0(self.c0(x)))
        y = self.n1(self.c1(x))
        functional.relu(y, True)
        return self.r2(y)


class AugmentedAssignment(Block):
    """`y += x` writes into y, which `kept` is another name of."""

    def forward(self, x):
        x = self.r1(self.n0(self.c0(x)))
        y = kept = self.n1(self.c1(x))
        y += x
        return self.r2(y) + kept


class OutArgument(Block):
    def forward(self, x):
        x = self.r1(self.n0(self.c0(x)))
        y = self.n1(self.c1(x))
        torch.mul(y, x, out=y)
        return self.r2(y)


HAZARDS = [
    SkipReadsARewrittenTensor, SkipThroughADropout, SkipIsAView, SumAsAStatement, ProductAsAStatement,
    ReLUAsAStatement, FunctionInPlace, AugmentedAssignment, OutArgument,
]  # fmt: skip


@pytest.mark.parametrize("kind", HAZARDS)
def test_what_rewrites_a_value_that_is_read_again_is_refused(kind):
    torch.manual_seed(0)
    net, images = kind().eval(), torch.randn(2, 3, 8, 8)
    for call in (
        lambda: to_onnx(net, {}, 8),
        lambda: quantize_sums(net, [images]),
        lambda: quantize_activations(net, 8, {"r1": 9.0, "r2": 9.0}),
        lambda: bn_ranges(net),
    ):
        with pytest.raises(InPlaceError, match=r"works in place, and \w+ reads \w+, which it has overwritten"):
            call()
    with torch.no_grad():
        expected = net(images)
        assert torch.equal(fold_batch_norm(copy.deepcopy(net))(images), expected)  # and so is not folded


class InPlaceAsItShouldBe(Block):
    def forward(self, x):
        x = self.r1(self.n0(self.c0(x)))
        y = self.n1(self.c1(x))
        y += x
        return self.r2(y)


@pytest.mark.parametrize("arch", ["resnet18", "densenet121", "mobilenet_v2", "googlenet", "shufflenet_v2_x0_5"])
def test_torchvision_s_operations_in_place_are_followed(arch):
    from torchvision import models

    trace(models.get_model(arch, weights=None, **({"init_weights": False} if arch == "googlenet" else {})))


def test_an_in_place_network_is_rewritten_right():
    torch.manual_seed(0)
    net, images = InPlaceAsItShouldBe().eval(), torch.randn(8, 3, 8, 8)
    with torch.no_grad():
        expected = net(images)
        fine = quantize_activations(quantize_sums(net, [images]), 8, minmax_ranges(net, [images]))
        assert (fine(images) - expected).abs().max() < 0.05 * expected.abs().max()


class Branching(SkipReadsARewrittenTensor):
    """Cannot be traced."""

    def forward(self, x):
        return super().forward(x) if x.sum() > -1e9 else x


def test_a_quantizer_works_in_place_where_its_relu_did():
    """Without a graph to look at, the skip must still read what the first ReLU leaves."""
    torch.manual_seed(0)
    net, images = Branching().eval(), torch.randn(8, 3, 8, 8)
    with torch.no_grad():
        expected = net(images)
        found = quantize_activations(net, 8, minmax_ranges(net, [images]))(images)
    assert (found - expected).abs().max() < 0.03 * expected.abs().max()
    with pytest.raises(ValueError, match="Branching cannot be traced by torch.fx"):
        quantize_sums(net, [images])


def test_a_quantizer_in_place_has_the_same_gradient():
    x = torch.linspace(-1, 2, 301)
    gradients = []
    for inplace in (False, True):
        leaf = x.clone().requires_grad_()
        ActivationQuantizer(3, 1.0, inplace)(leaf * 1).square().sum().backward()
        gradients.append(leaf.grad)
    assert torch.equal(*gradients)


class DropsInTraining(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        x = functional.dropout(self.first(x), 0.5, self.training)
        return self.second(x) + x


def test_quantized_sums_drop_nothing_in_eval_mode():
    torch.manual_seed(0)
    net, images = DropsInTraining().train(), torch.randn(16, 8)
    quantized = quantize_sums(net, [images])
    assert quantized.training and net.training
    with torch.no_grad():
        found, expected = quantized.eval()(images), net.eval()(images)
        assert torch.equal(found, quantized(images))
    assert (found - expected).abs().max() < 0.02 * expected.abs().max()


def test_a_graph_that_computes_something_else_is_noticed():
    class Counting(Block):
        """Does something else when it is traced: fx takes the branch of its own call."""

        def forward(self, x):
            y = self.n0(self.c0(x))
            return y + y if isinstance(x, torch.Tensor) else y - (-y) * 0.5

    for call in (lambda net: quantize_sums(net, [torch.randn(2, 3, 8, 8)]), lambda net: to_onnx(net, {}, 8)):
        with pytest.raises(ValueError, match="the traced graph of Counting does not compute what the network does"):
            call(Counting())


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


class AuxiliaryHead(InPlaceAsItShouldBe):
    """Has a head, with a ReLU and a SiLU, that eval mode never calls."""

    def __init__(self) -> None:
        super().__init__()
        self.aux = nn.Sequential(nn.ReLU(), nn.SiLU())

    def forward(self, x):
        y = super().forward(x)
        return (y, self.aux(y)) if self.training else y


@pytest.mark.parametrize("rule", [bn_ranges, lambda net: calibrate(net, [torch.randn(4, 3, 8, 8)], 4)])
def test_a_relu_that_eval_mode_never_calls_is_left_alone(rule):
    net = AuxiliaryHead().train()
    ranges = rule(net)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quantized = quantize_activations(net, 4, ranges)
    assert isinstance(quantized.aux[0], nn.ReLU) and isinstance(quantized.r1, ActivationQuantizer)
    del ranges["r2"]
    with pytest.raises(ValueError, match="no activation range is given for r2"):
        quantize_activations(net, 4, ranges)


def test_a_layer_called_by_keyword_is_refused_by_name():
    class ByKeyword(Block):
        def forward(self, x):
            return self.r1(input=self.n0(self.c0(x)))

    for call in (bn_ranges, lambda net: to_onnx(net, {}, 8)):
        with pytest.raises(ValueError, match="r1 is called without a positional argument"):
            call(ByKeyword())


def test_activations_that_overflow_are_named(net):
    with torch.no_grad():
        net.conv2.weight.fill_(1e38)
    images = [torch.ones(2, 3, 8, 8)]
    for call in (lambda: minmax_ranges(net, images), lambda: calibrate(net, images, 8)):
        with pytest.raises(ValueError, match="the output of relu2 reaches (inf|nan): its range cannot be calibrated"):
            call()
