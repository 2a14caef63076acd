"""Quantizers at the inputs of layers, in networks of every kind."""

import copy
import io
import warnings

import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional

from quant import Grid, calibrate, quantize_activations, quantize_weights
from quant.inputs import input_layers
from quant.quantizers import InputQuantizer


def quantizers(net):
    return {name: module for name, module in net.named_modules() if isinstance(module, InputQuantizer)}


def at_inputs(net, *batches, bits=8, rule="minmax", grid=8):
    return quantize_activations(net.eval(), bits, calibrate(net, batches, bits, rule, at="inputs", grid=grid))


def rounded(x, low, high, bits=8):
    """The rule as torch has it, for values that are not near ties."""
    low, high = min(low, 0.0), max(high, 0.0)
    scale = (high - low) / (2**bits - 1)
    return torch.fake_quantize_per_tensor_affine(x, scale, round(-low / scale), 0, 2**bits - 1)


def small_vit():
    net = torchvision.models.VisionTransformer(16, 8, 2, 2, 16, 32, num_classes=5)
    nn.init.normal_(net.heads.head.weight, std=0.1)  # zeros otherwise
    return net


NETWORKS = {
    "resnet18": (torchvision.models.resnet18, 32),
    "mobilenet_v2": (torchvision.models.mobilenet_v2, 32),  # ReLU6
    "mobilenet_v3_small": (torchvision.models.mobilenet_v3_small, 32),  # Hardswish
    "efficientnet_b0": (torchvision.models.efficientnet_b0, 32),  # SiLU, products
    "shufflenet_v2_x0_5": (torchvision.models.shufflenet_v2_x0_5, 32),  # concatenations
    "convnext": (lambda **_: torchvision.models.ConvNeXt(  # GELU
        [torchvision.models.convnext.CNBlockConfig(8, 16, 1), torchvision.models.convnext.CNBlockConfig(16, None, 1)]
    ), 32),
    "swin": (lambda **_: torchvision.models.SwinTransformer([4, 4], 16, [1, 1], [2, 2], [4, 4], num_classes=5), 32),
    "swin_v2": (lambda **_: torchvision.models.SwinTransformer(
        [4, 4], 16, [2], [2], [4, 4], num_classes=5, block=torchvision.models.swin_transformer.SwinTransformerBlockV2
    ), 32),
    "vit": (lambda **_: small_vit(), 16),
}  # fmt: skip


@pytest.mark.parametrize("arch", NETWORKS)
def test_every_layer_has_a_quantizer_that_is_called(arch):
    torch.manual_seed(0)
    build, size = NETWORKS[arch]
    net, images = build(weights=None), torch.randn(4, 3, size, size)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quantized = at_inputs(net, images)
    layers = [m for m in net.modules() if isinstance(m, (nn.Conv2d, nn.Linear, nn.MultiheadAttention))]
    found, called = quantizers(quantized), set()
    assert set(found) == {f"{name}.input_quantizer" for name in input_layers(net, 8)}
    assert len(found) >= len([layer for layer in layers if not isinstance(layer, nn.MultiheadAttention)])
    for name, module in found.items():
        module.register_forward_hook(lambda *_, name=name: called.add(name))
    with torch.no_grad():
        expected, output = net(images), quantized(images)
    assert called == set(found)
    assert 0 < (output - expected).square().sum() < 0.05 * expected.square().sum()


@pytest.mark.parametrize(
    ("bits", "low", "high", "scale", "zero_point"),
    [
        (8, 0.0, 25.5, 0.1, 0),
        (4, -0.5, 1.0, 0.1, 5),
        (8, -1.0, 1.0, 2 / 255, 128),
        (8, -0.17, 2.38, 0.01, 17),
        (2, -3.0, -1.0, 1.0, 3),
        (2, 1.0, 3.0, 1.0, 0),
        (8, 0.0, 0.0, 1.0, 0),
    ],
)
def test_scale_and_zero_point(bits, low, high, scale, zero_point):
    quantizer = InputQuantizer(bits, low, high)
    assert quantizer.scale.item() == pytest.approx(scale) and quantizer.zero_point.item() == zero_point
    assert (quantizer.quant_min, quantizer.quant_max) == (0, 2**bits - 1)
    points = quantizer(torch.linspace(4 * low - 1, 4 * high + 1, 5001)).unique()
    expected = (torch.arange(2**bits) - zero_point) * quantizer.scale
    assert set(points.tolist()) <= set(expected.tolist()) and 0.0 in quantizer(torch.zeros(1)).tolist()


@pytest.mark.parametrize("limits", [(1.0, -1.0), (float("nan"), 1.0), (0.0, float("inf")), (-1e308, 1e308)])
def test_a_range_that_is_none(limits):
    with pytest.raises(ValueError, match="range"):
        InputQuantizer(8, *limits)


@pytest.mark.parametrize("zero_point", [0, 1, 128, 255])
def test_ties_and_saturation_are_those_of_onnx(zero_point):
    onnx, onnxruntime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    scale = 0.25  # a power of two, so that the ties are exact
    quantizer = InputQuantizer(8, -zero_point * scale, (255 - zero_point) * scale)
    assert quantizer.scale.item() == scale and quantizer.zero_point.item() == zero_point
    x = torch.arange(-1200, 1200) * scale / 2
    helper, types = onnx.helper, onnx.TensorProto
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale", "zero_point"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero_point"], ["y"]),
    ]
    constants = [
        helper.make_tensor("scale", types.FLOAT, [], [scale]),
        helper.make_tensor("zero_point", types.UINT8, [], [zero_point]),
    ]
    ends = [helper.make_tensor_value_info(name, types.FLOAT, [len(x)]) for name in "xy"]
    graph = helper.make_graph(nodes, "qdq", ends[:1], ends[1:], constants)
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    assert torch.equal(quantizer(x), torch.from_numpy(session.run(None, {"x": x.numpy()})[0]))


def test_the_gradient_is_straight_through():
    x = torch.tensor([-2.0, -0.4, 0.3, 0.9, 5.0], requires_grad=True)  # the grid is -0.5 ... 1
    InputQuantizer(4, -0.5, 1.0)(x).sum().backward()
    assert x.grad.tolist() == [0, 1, 1, 1, 0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes(dtype):
    quantizer = InputQuantizer(8, -1e-5, 2e-5)
    x = (torch.rand(1000, dtype=torch.float64) * 4e-5 - 2e-5).to(dtype)
    expected = rounded(x.float(), -1e-5, 2e-5)
    quantizer.to(dtype)
    assert quantizer.scale.dtype == torch.float32 and quantizer.zero_point.dtype == torch.int32
    output = quantizer(x)
    assert output.dtype == dtype
    # A step apart at most, where a value is near a tie, and hardly ever that.
    apart = (output.float() - expected).abs()
    assert apart.max() < 1.3e-7 and (apart > 6e-8).float().mean() < 0.02


class Branches(nn.Module):
    """Functional activations, a concatenation, a layer that is used twice, and a branch that the data decide."""

    def __init__(self):
        super().__init__()
        self.first, self.shared = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)
        self.positive, self.negative = nn.Conv2d(8, 4, 1), nn.Conv2d(8, 4, 1)
        self.last = nn.Linear(4, 2)

    def forward(self, images):
        x = functional.silu(self.first(images))
        both = torch.cat([x, functional.gelu(self.shared(self.shared(x)))], 1)
        y = self.positive(both) if images.mean() > 0 else self.negative(both)
        return self.last(y.mean((2, 3)))


@pytest.fixture
def branches():
    torch.manual_seed(0)
    net = Branches().eval()
    for parameter in net.parameters():
        nn.init.normal_(parameter)
    # Images of both branches, from which the ranges come
    return net, [torch.randn(2, 3, 2, 2) + 3 * (-1) ** number for number in range(8)]


def test_functions_and_control_flow(branches):
    net, batches = branches
    values = {name: [] for name in ("first", "shared", "positive", "negative", "last")}
    for name, seen in values.items():
        net.get_submodule(name).register_forward_hook(lambda _, args, __, seen=seen: seen.append(args[0].flatten()))
    for batch in batches:
        net(batch)
    limits = {name: torch.cat(seen).aminmax() for name, seen in values.items()}
    found = quantizers(quantized := at_inputs(net, *batches, bits=4))
    for name, (low, high) in limits.items():
        bits, own = 8 if name in ("first", "last") else 4, found[f"{name}.input_quantizer"]
        assert own.scale.item() == pytest.approx((max(high.item(), 0) - min(low.item(), 0)) / (2**bits - 1), rel=1e-5)
        assert own.quant_max == 2**bits - 1

    def fake(name, x):
        low, high = limits[name]
        layer, bits = net.get_submodule(name), 8 if name in ("first", "last") else 4
        return layer._conv_forward(rounded(x, low.item(), high.item(), bits), layer.weight, layer.bias)

    for batch in batches[:2]:
        x = functional.silu(fake("first", batch))
        both = torch.cat([x, functional.gelu(fake("shared", fake("shared", x)))], 1)
        y = fake("positive" if batch.mean() > 0 else "negative", both).mean((2, 3))
        low, high = limits["last"]
        torch.testing.assert_close(quantized(batch), net.last(rounded(y, low.item(), high.item())))
    assert not quantizers(net)


def test_copies_and_files(branches):
    net, batches = branches
    quantized = at_inputs(net, *batches)
    expected = quantized(batches[0])
    assert torch.equal(copy.deepcopy(quantized)(batches[0]), expected)
    assert torch.equal(quantize_weights(quantized, 32)(batches[0]), expected)
    other = at_inputs(copy.deepcopy(net), *[2 * batch for batch in batches])
    assert not torch.equal(other(batches[0]), expected)
    other.load_state_dict(quantized.state_dict())
    assert torch.equal(other(batches[0]), expected)
    torch.save(quantized, file := io.BytesIO())
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(batches[0]), expected)


@pytest.mark.parametrize("arch", ["convnext", "swin", "vit"])
def test_an_exported_program_computes_the_same(arch):
    torch.manual_seed(0)
    build, size = NETWORKS[arch]
    net, images = build(weights=None).eval(), torch.randn(2, 3, size, size)
    quantized = copy.deepcopy(at_inputs(net, images))
    with torch.no_grad():
        program = torch.export.export(quantized, (images,))
        torch.testing.assert_close(program.module()(images), quantized(images))
    rounds = [node for node in program.graph.nodes if "aten.round" in str(node.target)]
    assert len(rounds) == len(input_layers(net, 8))


def test_first_and_last_layers(net):
    images = torch.randn(4, 3, 8, 8)
    bits = {name: module.quant_max for name, module in quantizers(at_inputs(net, images, bits=3)).items()}
    assert bits == {"conv1.input_quantizer": 255, "conv2.input_quantizer": 7, "fc.input_quantizer": 255}
    assert list(quantizers(at_inputs(net, images, grid=Grid(4, first_last=False)))) == ["conv2.input_quantizer"]
