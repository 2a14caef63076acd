"""ONNX graphs: what is in them, and by onnxruntime that they compute what the quantized network does."""

import collections
import warnings

import onnx
import onnxruntime
import pytest
import torch
import torchvision
from torch import nn
from torch.nn.utils import prune

from models import vgg16_bn
from quant import Grid, calibrate, quantize_activations, quantize_sums, quantize_weights
from quant.deploy import IntegerWeight, integer_weights, to_onnx
from quant.quantizers import ActivationQuantizer, Quantizer
from quant.ranges import mse_ranges, relu_histograms
from tests.helpers import SmallNet, graph_is_near, run_graph, trained_resnet


def kinds(proto):
    return [node.op_type for node in proto.graph.node]


def stored_types(proto):
    return {tensor.name: tensor.data_type for tensor in proto.graph.initializer}


@pytest.fixture(scope="module")
def resnet():
    return trained_resnet()


@pytest.fixture(scope="module")
def small():
    torch.manual_seed(0)
    net = SmallNet()
    with torch.no_grad():
        for norm in (net.bn1, net.bn2):
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)
            norm.weight[0], norm.weight[1] = -0.7, 0
    return net.eval()


@pytest.mark.parametrize("bits, per_channel, kind, opset", [
    (8, False, "INT8", 21), (5, True, "INT8", 21), (4, False, "INT4", 21), (3, True, "INT4", 21), (2, True, "INT2", 25),
])  # fmt: skip
def test_weights_only_is_exact(small, bits, per_channel, kind, opset):
    grid, images = Grid(bits, per_channel=per_channel), torch.randn(8, 3, 8, 8)
    proto = to_onnx(small, integer_weights(small, grid), 8)
    assert stored_types(proto)["conv2.weight.integers"] == getattr(onnx.TensorProto, kind)
    assert proto.opset_import[0].version == opset
    assert graph_is_near(proto, quantize_weights(small, grid), images)
    assert run_graph(proto, images[:3]).shape == (3, 5)  # any batch
    assert [value.type.tensor_type.shape.dim[0].dim_param for value in proto.graph.input] == ["batch"]
    assert (proto.graph.input[0].name, proto.graph.output[0].name) == ("images", "logits")


@pytest.mark.parametrize("a_bit", [8, 4])
def test_activations_too(resnet, a_bit):
    images = torch.randn(64, 3, 32, 32)
    ranges = mse_ranges(relu_histograms(resnet, [images]), a_bit)
    quantized = quantize_activations(quantize_weights(resnet, 4), a_bit, ranges)
    proto = to_onnx(quantized, integer_weights(resnet, 4))
    found = kinds(proto)
    assert (found.count("QuantizeLinear"), found.count("Clip"), found.count("Relu")) == (7, 7 if a_bit < 8 else 0, 0)
    constants = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}
    assert constants["layer1.0.relu1.scale"] == pytest.approx(ranges["layer1.0.relu1"] / (2**a_bit - 1))
    with torch.no_grad():
        expected, plain = quantized(images), resnet(images)
    # Values between two levels may be rounded the other way: far nearer than to the float network, but not exact.
    assert (run_graph(proto, images) - expected).abs().mean() < 0.2 * (plain - expected).abs().mean()


def optimized_ops(proto, path, **entries):
    """Counts of the operations that onnxruntime makes of a graph, without those that this machine alone knows."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(path)
    for key, value in entries.items():
        options.add_session_config_entry(f"session.{key}", value)
    onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return collections.Counter(node.op_type for node in onnx.load(path).graph.node)


def test_runtime_makes_integer_kernels(resnet, tmp_path):
    images = [torch.randn(64, 3, 32, 32)]
    ranges = mse_ranges(relu_histograms(resnet, images), 8)
    integers = integer_weights(resnet, 4)
    quantized = quantize_activations(quantize_weights(resnet, 4), 8, ranges)
    assert optimized_ops(to_onnx(quantized, integers, int8=True), tmp_path / "a.onnx")["QLinearConv"] == 3
    with_sums = quantize_sums(quantized, images)
    proto = to_onnx(with_sums, integers, int8=True)
    ops = optimized_ops(proto, tmp_path / "b.onnx")
    # All but the first convolution, whose images are floats, and the linear layer behind the average.
    assert (ops["QLinearConv"], ops["QLinearAdd"], ops["Conv"]) == (8, 3, 1)
    with torch.no_grad():
        expected, plain = with_sums(images[0]), resnet(images[0])
    assert (run_graph(proto, images[0]) - expected).abs().mean() < 0.5 * (plain - expected).abs().mean()


def test_the_runtime_can_dequantize_weights_once(resnet, tmp_path):
    proto = to_onnx(resnet, integer_weights(resnet, 4))
    assert graph_is_near(proto, quantize_weights(resnet, 4), torch.randn(8, 3, 32, 32))
    assert optimized_ops(proto, tmp_path / "a.onnx")["DequantizeLinear"] == 11
    assert optimized_ops(proto, tmp_path / "b.onnx", disable_quant_qdq="1")["DequantizeLinear"] == 0


def test_a_network_of_torchvision_as_in_the_docs(tmp_path):
    torch.manual_seed(0)
    model = torchvision.models.resnet18(num_classes=10).eval()
    batches = [torch.randn(4, 3, 64, 64)]
    deployed = quantize_activations(quantize_weights(model, 4), 8, calibrate(model, batches, 8))
    deployed = quantize_sums(deployed, batches)
    proto = to_onnx(deployed, integer_weights(model, 4), image_size=64, int8=True)
    ops = optimized_ops(proto, tmp_path / "a.onnx")
    # Floats go into the first convolution and into the one behind max pooling.
    assert (ops["QLinearConv"], ops["QLinearAdd"], ops["Conv"]) == (18, 8, 2)
    with torch.no_grad():
        expected, plain = deployed(batches[0]), model(batches[0])
    assert (run_graph(proto, batches[0]) - expected).abs().mean() < 0.5 * (plain - expected).abs().mean()


class Twice(nn.Module):
    """One convolution called twice, each time before a batch norm of its own: neither may go into its scale."""

    def __init__(self):
        super().__init__()
        self.conv, self.first, self.second = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.BatchNorm2d(3)

    def forward(self, x):
        return self.second(self.conv(self.first(self.conv(x)))).flatten(1)


def test_a_convolution_called_twice():
    torch.manual_seed(0)
    net = Twice().eval()
    net.first.running_var.fill_(4)
    proto = to_onnx(net, integer_weights(net, 4))
    assert graph_is_near(proto, quantize_weights(net, 4), torch.randn(2, 3, 32, 32))
    assert len([name for name in stored_types(proto) if name.endswith("integers")]) == 1


@pytest.mark.parametrize("per_channel", [False, True])
def test_batch_norm_becomes_scale_and_bias(small, per_channel):
    grid = Grid(4, per_channel=per_channel)
    proto = to_onnx(small, integer_weights(small, grid), 8)
    assert "BatchNormalization" not in kinds(proto)
    constants = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}
    assert all((value > 0).all() for name, value in constants.items() if name.endswith(".scale"))
    known = integer_weights(small, grid)["conv2.weight"].values
    stored = torch.from_numpy(constants["conv2.weight.integers"].astype("int8"))
    assert torch.equal(stored[0], -known[0]) and torch.equal(stored[2:], known[2:])  # with the sign of gamma


def test_vgg16_bn_at_4_bits():
    torch.manual_seed(0)
    net = vgg16_bn(10).eval()
    proto = to_onnx(net, integer_weights(net, 4))
    assert len(proto.SerializeToString()) < 0.14 * 4 * sum(p.numel() for p in net.parameters())
    assert graph_is_near(proto, quantize_weights(net, 4), torch.randn(2, 3, 32, 32))


def test_normalization_inside(small):
    images = torch.randint(0, 256, (4, 8, 8, 3), dtype=torch.uint8)
    mean, std = torch.tensor([100.0, 110, 120]), torch.tensor([50.0, 60, 70])
    proto = to_onnx(small, integer_weights(small, 4), 8, normalize=(mean, std))
    with torch.no_grad():
        expected = quantize_weights(small, 4)(((images.float() - mean) / std).permute(0, 3, 1, 2))
    assert (run_graph(proto, images) - expected).abs().max() < 1e-4 * expected.abs().max()
    assert (proto.graph.input[0].name, proto.graph.input[0].type.tensor_type.elem_type) == (
        "images",
        onnx.TensorProto.UINT8,
    )


def test_grey_images_and_convolutions_of_every_kind():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3, stride=2, padding=1), nn.Conv2d(4, 4, 3, groups=2, dilation=2, padding="same"), nn.ReLU(),
        nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"), nn.Flatten(2), nn.Conv1d(4, 2, 3),
        nn.BatchNorm1d(2), nn.Unflatten(2, (2, 127, 1)), nn.Conv3d(2, 2, 1), nn.Flatten(), nn.Linear(508, 3),
    ).eval()  # fmt: skip
    assert graph_is_near(to_onnx(net, integer_weights(net, 4)), quantize_weights(net, 4), torch.randn(3, 1, 32, 32))


@pytest.mark.parametrize("shape", [(), (1, 4), (3, 1), (3, 4)])
def test_a_scale_may_lie_along_any_dimension(shape):
    """ONNX has an axis of scales. Scales along two dimensions are a product."""
    torch.manual_seed(0)
    net, scale = nn.Sequential(nn.Linear(4, 3, bias=False)).eval(), torch.rand(shape) + 0.5
    values = torch.randint(-7, 8, (3, 4), dtype=torch.int8)
    for inputs in (torch.randn(3, 4), torch.randn(2, 5, 4)):  # a Gemm, and a MatMul by the transposed weight
        proto = to_onnx(net, {"0.weight": IntegerWeight(values, scale, 4)}, example_inputs=(inputs,))
        with torch.no_grad():
            net[0].weight.copy_(values * scale)
        assert graph_is_near(proto, net, inputs) and onnx.TensorProto.INT4 in stored_types(proto).values()
    assert ("Transpose" in kinds(proto)) == (len(shape) == 2 and 1 not in shape)


class Moved(Quantizer):
    """A quantizer with a zero point."""

    def __init__(self, quant_min, quant_max, zero_point):
        super().__init__(1.0, quant_min, quant_max)
        self.register_buffer("zero_point", torch.tensor(zero_point))

    def forward(self, x):
        integers = ((x / self.scale).round() + self.zero_point).clamp(self.quant_min, self.quant_max)
        return (integers - self.zero_point) * self.scale


@pytest.mark.parametrize("quantizer, narrow", [
    (Moved(0, 255, 100), False), (Moved(-128, 127, 3), False), (Moved(0, 15, 5), True),
    (ActivationQuantizer(3, 2.0, inplace=True), True),
])  # fmt: skip
def test_quantizers_of_every_kind(quantizer, narrow):
    proto = to_onnx(nn.Sequential(quantizer), {}, example_inputs=(torch.randn(2, 601),))
    values = torch.linspace(-3, 3, 601).expand(2, -1).clone()
    expected = quantizer(values.clone())
    assert kinds(proto) == ["Clip"] * narrow + ["QuantizeLinear", "DequantizeLinear"]
    assert (run_graph(proto, values) - expected).abs().max() < 1e-6
    assert len(expected.unique()) > 5 and "forward" not in vars(quantizer)


class Rewrites(nn.Module):
    """Reads a tensor again that was overwritten in place."""

    def __init__(self):
        super().__init__()
        self.conv, self.relu, self.quantizer = nn.Conv2d(3, 3, 1), nn.ReLU(True), ActivationQuantizer(4, 1.0, True)

    def forward(self, x):
        x = self.conv(x)
        y = self.relu(x)
        y *= 2
        z = self.quantizer(x)
        return (x + y + z).flatten(1)


def test_operations_in_place_mean_what_they_do():
    torch.manual_seed(0)
    net = Rewrites().eval()
    assert graph_is_near(to_onnx(net, integer_weights(net, 8)), quantize_weights(net, 8), torch.randn(2, 3, 32, 32))


@pytest.mark.parametrize("wrap", [
    nn.utils.weight_norm, nn.utils.spectral_norm, nn.utils.parametrizations.weight_norm,
    lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
])  # fmt: skip
def test_weights_that_their_layer_computes(wrap):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)).eval()
    wrap(net[0])
    computed, images = vars(net[0]).get("weight"), torch.randn(2, 3, 8, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a computed weight stays float
        proto, quantized = to_onnx(net, integer_weights(net, 4), 8), quantize_weights(net, 4)
    assert graph_is_near(proto, quantized, images)
    assert vars(net[0]).get("weight") is computed  # and nothing of the export
