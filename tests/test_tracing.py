"""Networks that their traced graph would misrepresent."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional

from quant import bn_ranges, calibrate, quantize_activations, quantize_sums
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


class ListsOfTensors(Block):
    def forward(self, x):
        x = self.r1(self.n0(self.c0(x)))
        y = self.n1(self.c1(x))
        torch._foreach_add_([y], [x])
        return self.r2(y)


class ViewsByOtherNames(Block):
    def forward(self, x):
        x = self.n0(self.c0(x))
        torch.hsplit(torch.atleast_3d(functional.pad(x, (0, 0))), 2)[0].mul_(3)
        return self.r2(self.n1(self.c1(self.r1(x))))


HAZARDS = [
    SkipReadsARewrittenTensor, SkipThroughADropout, SkipIsAView, SumAsAStatement, ProductAsAStatement,
    ReLUAsAStatement, FunctionInPlace, AugmentedAssignment, OutArgument, ListsOfTensors, ViewsByOtherNames,
]  # fmt: skip


@pytest.mark.parametrize("kind", HAZARDS)
def test_what_rewrites_a_value_that_is_read_again_is_refused(kind):
    torch.manual_seed(0)
    net, images = kind().eval(), torch.randn(2, 3, 8, 8)
    for call in (
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

    with pytest.raises(ValueError, match="the traced graph of Counting does not compute what the network does"):
        quantize_sums(Counting(), [torch.randn(2, 3, 8, 8)])


@pytest.mark.parametrize("shown", [lambda y: (y.mean(), y), lambda y: {"out": [1e-6 * y]}])
def test_outputs_of_any_form_and_size_are_compared(shown):
    class Hooked(Block):
        """torch.fx leaves out the hooks of the whole network."""

        def forward(self, x):
            x = self.r1(self.n0(self.c0(x)))
            return shown(self.n1(self.c1(x)) + x)

    net, images = Hooked().eval(), [torch.randn(2, 3, 8, 8)]
    quantize_sums(net, images)
    net.register_forward_pre_hook(lambda _, args: (2 * args[0],))
    with pytest.raises(ValueError, match="the traced graph of Hooked does not compute what the network does"):
        quantize_sums(net, images)


def test_quantized_sums_keep_each_module_s_mode():
    net = InPlaceAsItShouldBe().train()
    net.n0.eval()  # a frozen batch norm
    quantized = quantize_sums(net, [torch.randn(2, 3, 8, 8)])
    assert quantized.training and quantized.n1.training and not quantized.n0.training
    assert net.training and not net.n0.training


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

    with pytest.raises(ValueError, match="r1 is called without a positional argument"):
        bn_ranges(ByKeyword())


def test_activations_that_overflow_are_named(net):
    with torch.no_grad():
        net.conv2.weight.fill_(1e38)
    images = [torch.ones(2, 3, 8, 8)]
    for call in (lambda: minmax_ranges(net, images), lambda: calibrate(net, images, 8)):
        with pytest.raises(ValueError, match="the output of relu2 reaches (inf|nan): its range cannot be calibrated"):
            call()
