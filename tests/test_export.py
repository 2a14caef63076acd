"""ONNX graphs by onnxruntime against the quantized network, and export.py as a user runs it."""

import collections
import json
import re

import onnx
import onnxruntime
import pytest
import torch
import torchvision
from torch import nn
from torch.nn.utils import prune

import tools.benchmark
from models import ResNet32, build_model, vgg16_bn
from quant import (
    Grid,
    calibrate,
    export,
    load_packed,
    quantize_activations,
    quantize_sums,
    quantize_weights,
    read_facts,
)
from quant.deploy import integer_weights, to_onnx
from quant.ranges import mse_ranges, relu_histograms
from tests.helpers import copy_with_args, trained_resnet
from tools import benchmark_deploy
from utils.checkpoint import load_checkpoint, model_from_checkpoint
from utils.data.load import load_dataset
from utils.trained_for import mismatches
from utils.training.evaluation import evaluate


def run(proto, images):
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


@pytest.fixture(scope="module")
def resnet():
    return trained_resnet()


@pytest.mark.parametrize("bits, kind", [(8, "INT8"), (6, "INT8"), (5, "INT8"), (4, "INT4"), (3, "INT4"), (2, "INT2")])
@pytest.mark.parametrize("per_channel", [False, True])
def test_weights_only_is_exact(resnet, bits, kind, per_channel):
    images = torch.randn(8, 3, 32, 32)
    proto = to_onnx(resnet, integer_weights(resnet, Grid(bits, per_channel=per_channel)))
    types = {tensor.name: tensor.data_type for tensor in proto.graph.initializer}
    assert types["layer2.0.conv1.weight.integers"] == getattr(onnx.TensorProto, kind)
    with torch.no_grad():
        expected = quantize_weights(resnet, Grid(bits, per_channel=per_channel))(images)
    assert (run(proto, images) - expected).abs().max() < 1e-4 * expected.abs().max()
    assert run(proto, images[:3]).shape == (3, 10)  # any batch


@pytest.mark.parametrize("w_bit, a_bit", [(8, 8), (4, 8), (4, 4)])
def test_activations_too(resnet, w_bit, a_bit):
    images = torch.randn(64, 3, 32, 32)
    ranges = mse_ranges(relu_histograms(resnet, [images]), a_bit)
    quantized = quantize_activations(quantize_weights(resnet, w_bit), a_bit, ranges)
    proto = to_onnx(quantized, integer_weights(resnet, w_bit))
    kinds = [node.op_type for node in proto.graph.node]
    assert (
        kinds.count("QuantizeLinear") == 31 and "Relu" not in kinds and kinds.count("Clip") == (31 if a_bit < 8 else 0)
    )
    with torch.no_grad():
        expected, plain = quantized(images), resnet(images)
    found = run(proto, images)
    # Values between two levels may be rounded the other way: far nearer than to the float network, but not exact.
    assert (found - expected).abs().mean() < 0.2 * (plain - expected).abs().mean()


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
    assert optimized_ops(to_onnx(quantized, integers, int8=True), tmp_path / "a.onnx")["QLinearConv"] == 15
    with_sums = quantize_sums(quantized, images)
    proto = to_onnx(with_sums, integers, int8=True)
    ops = optimized_ops(proto, tmp_path / "b.onnx")
    # All but the first convolution, whose images are floats, and the linear layer behind the average.
    assert (ops["QLinearConv"], ops["QLinearAdd"], ops["Conv"]) == (32, 15, 1)
    with torch.no_grad():
        expected, plain = with_sums(images[0]), resnet(images[0])
    assert (run(proto, images[0]) - expected).abs().mean() < 0.5 * (plain - expected).abs().mean()
    weights_only = to_onnx(resnet, integers)
    assert optimized_ops(weights_only, tmp_path / "c.onnx")["DequantizeLinear"] == 35
    assert optimized_ops(weights_only, tmp_path / "d.onnx", disable_quant_qdq="1")["DequantizeLinear"] == 0


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
    assert (run(proto, batches[0]) - expected).abs().mean() < 0.5 * (plain - expected).abs().mean()


def convolution_with_bias():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10)
    ).eval()  # fmt: skip


class Twice(nn.Module):
    """One convolution called twice, each time before a batch norm of its own: neither may go into its scale."""

    def __init__(self):
        super().__init__()
        self.conv, self.first, self.second = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.BatchNorm2d(3)

    def forward(self, x):
        return self.second(self.conv(self.first(self.conv(x)))).flatten(1)


def test_a_convolution_called_twice():
    torch.manual_seed(0)
    net, images = Twice().eval(), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        net.first.running_var.fill_(4)
        expected = quantize_weights(net, 4)(images)
    assert (run(to_onnx(net, integer_weights(net, 4)), images) - expected).abs().max() < 1e-4 * expected.abs().max()


@pytest.mark.parametrize("build", [trained_resnet, convolution_with_bias])
def test_batch_norm_becomes_scale_and_bias(build):
    net = build()
    with torch.no_grad():
        for norm in (module for module in net.modules() if isinstance(module, nn.BatchNorm2d)):
            norm.running_mean.normal_()
            norm.weight[0], norm.weight[1] = -0.7, 0
    images = torch.randn(8, 3, 32, 32)
    proto = to_onnx(net, integer_weights(net, 4))
    assert "BatchNormalization" not in [node.op_type for node in proto.graph.node]
    for tensor in proto.graph.initializer:
        if tensor.name.endswith(".scale"):
            assert (onnx.numpy_helper.to_array(tensor) > 0).all()
    with torch.no_grad():
        expected = quantize_weights(net, 4)(images)
    assert (run(proto, images) - expected).abs().max() < 1e-4 * expected.abs().max()


def test_vgg16_bn_at_4_bits():
    torch.manual_seed(0)
    net = vgg16_bn(10).eval()
    images = torch.randn(2, 3, 32, 32)
    proto = to_onnx(net, integer_weights(net, 4))
    assert len(proto.SerializeToString()) < 0.14 * 4 * sum(p.numel() for p in net.parameters())
    with torch.no_grad():
        expected = quantize_weights(net, 4)(images)
    assert (run(proto, images) - expected).abs().max() < 1e-4 * expected.abs().max() + 1e-6


def test_normalisation_inside(resnet):
    images = torch.randint(0, 256, (4, 32, 32, 3), dtype=torch.uint8)
    mean, std = torch.tensor([100.0, 110, 120]), torch.tensor([50.0, 60, 70])
    proto = to_onnx(resnet, integer_weights(resnet, 4), normalize=(mean, std))
    with torch.no_grad():
        expected = quantize_weights(resnet, 4)(((images.float() - mean) / std).permute(0, 3, 1, 2))
    assert (run(proto, images) - expected).abs().max() < 1e-4 * expected.abs().max()


def test_what_has_no_counterpart_is_named():
    with pytest.raises(ValueError, match="1, a Tanh, cannot be exported to ONNX"):
        to_onnx(nn.Sequential(nn.Conv2d(3, 2, 1), nn.Tanh()), {})

    class Doubled(nn.Module):
        def forward(self, x):
            return x * 2

    with pytest.raises(ValueError, match=r"the operation mul \(mul\) cannot be exported"):
        to_onnx(nn.Sequential(nn.Conv2d(3, 2, 1), Doubled()), {})


class Inputs(nn.Module):
    """A convolution called as `call` says."""

    def __init__(self, call):
        super().__init__()
        self.conv, self.call = nn.Conv2d(3, 2, 1), call

    def forward(self, x):
        return self.call(self.conv, x)


class TwoInputs(Inputs):
    def forward(self, x, mask):
        return self.call(self.conv, x)


@pytest.mark.parametrize("model, message", [
    (nn.Sequential(nn.Flatten(), nn.Linear(12, 2)), "no Conv2d, so it takes no images"),
    (nn.Sequential(nn.Conv2d(3, 4, 1), nn.Linear(32, 2)), "cannot be exported to ONNX: .*Gemm"),
    (TwoInputs(lambda conv, x: conv(x)), "TwoInputs has a second input, mask"),
    (Inputs(lambda conv, x: (conv(x), x)), "Inputs does not return a single tensor"),
    (Inputs(lambda conv, x: conv(input=x)), "conv is called without a positional argument"),
])  # fmt: skip
def test_a_network_of_another_kind_is_refused(model, message):
    with pytest.raises(ValueError, match=message):
        to_onnx(model, {})


def test_grey_images_and_convolutions_of_every_kind():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3, stride=2, padding=1), nn.Conv2d(4, 4, 3, groups=2, dilation=2), nn.ReLU(), nn.Flatten(),
        nn.Linear(4 * 12 * 12, 3),
    )  # fmt: skip
    images = torch.randn(2, 1, 32, 32)
    with torch.no_grad():
        expected = quantize_weights(net, 4)(images)
    assert torch.allclose(run(to_onnx(net, integer_weights(net, 4)), images), expected, atol=1e-5)


def test_weights_that_are_not_finite_are_not_written(net, tmp_path):
    net.conv2.weight.data[0, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="conv2.weight has values that are not finite"):
        export(net, tmp_path / "a.safetensors", 4)
    assert not any(tmp_path.iterdir())


def test_export_writes_both_files(cli, tmp_path, digits_run):
    flags = [
        "--model_path",
        digits_run,
        "--a_bit",
        "8",
        "--integer_kernels",
        "--with_normalize",
        "--calib_images",
        "64",
    ]
    outcome = cli("export.py", *flags, "--out", "a/b")
    assert outcome.code == 0, outcome.err
    assert sorted(path.name for path in (tmp_path / "a/b").iterdir()) == [
        "last_w4.safetensors",
        "last_w4a8.md",
        "last_w4a8.onnx",
    ]
    assert "bit for bit" in outcome.out and "times smaller; largest logit difference" in outcome.out
    facts = read_facts(tmp_path / "a/b/last_w4.safetensors")
    assert (facts["arch"], facts["num_classes"], facts["grid"]["bits"]) == ("ResNet32", 10, 4)
    model = model_from_checkpoint(load_checkpoint(digits_run), digits_run)
    packed = load_packed(tmp_path / "a/b/last_w4.safetensors", ResNet32(10)).state_dict()
    assert all(torch.equal(packed[name], value) for name, value in quantize_weights(model, 4).state_dict().items())
    train = load_dataset("digits", "", torch.device("cpu")).train
    images = [batch for batch, _ in train.calibration(64, seed=1)]
    constants = {constant.name: constant for constant in onnx.load(tmp_path / "a/b/last_w4a8.onnx").graph.initializer}
    for name, top in calibrate(model, images, 8).items():
        assert onnx.numpy_helper.to_array(constants[f"{name}.scale"]) == pytest.approx(top / 255), name


def test_a_network_of_channel_grids_is_exported_as_one(cli, tmp_path, channel_run):
    assert cli("export.py", "--model_path", channel_run, "--w_bit", "3", "--out", "a").code == 0
    assert read_facts(tmp_path / "a/channel_w3.safetensors")["grid"]["per_channel"] is True


def test_files_that_fail_their_check_are_not_left_behind(cli, tmp_path, digits_run, monkeypatch):
    from utils import exporting

    monkeypatch.setattr(exporting, "run_onnx", lambda path, images, as_written: torch.zeros(len(images), 10))
    outcome = cli("export.py", "--model_path", digits_run, "--out", "a")
    assert outcome.code == 2 and "last_w4.onnx differs from the quantized network: largest logit" in outcome.err
    assert not (tmp_path / "a").exists()


def test_bad_input(rejected, digits_run, tmp_path, monkeypatch):
    flags = ["--model_path", digits_run, "--dataset", "cifar100"]
    assert "has 10 classes, but the data set has 100" in rejected("export.py", *flags)
    flags = ["--model_path", digits_run, "--dataset", "cifar10", "--a_bit", "8"]
    assert "--a_bit 8 needs training images, and there is no cifar10 in data" in rejected("export.py", *flags)
    flags = ["--model_path", digits_run, "--a_bit", "8", "--calib_images", "5000"]
    assert "--calib_images 5000 is more than the 1437 training images" in rejected("export.py", *flags)
    state = build_model("mobilenet_v2", 10).state_dict()
    facts = {"arch": "mobilenet_v2", "num_classes": 10, "args": {"dataset": "digits"}}
    torch.save({**facts, "state_dict": state}, tmp_path / "m.pth")
    message = "m.pth: 35 activations would stay float"
    assert message in rejected("export.py", "--model_path", "m.pth", "--a_bit", "8", "--calib_images", "8")
    copy_with_args(digits_run, tmp_path / "i.pth", dataset="imagefolder", image_size=224)
    message = "i.pth is for imagefolder; this command takes networks for images of 32 x 32"
    assert message in rejected("tools.benchmark_deploy", "--model_path", "i.pth")
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    assert "pip install -r requirements-export.txt" in rejected("export.py", "--model_path", digits_run)


def test_benchmark_of_deployed_networks(cli, tmp_path, digits_run, few_digits, monkeypatch):
    monkeypatch.setattr(tools.benchmark, "WARM_UP", 0)
    model = copy_with_args(digits_run, tmp_path / "a.pth", dataset="cifar10", granularity="channel")
    flags = ["--model_path", model, "--w_bit", "4", "--rounds", "1", "--calib_images", "64", "--json", "a.json"]
    outcome = cli("tools.benchmark_deploy", *flags)
    assert outcome.code == 0, outcome.err
    rows = json.loads((tmp_path / "a.json").read_text())["rows"]
    assert [row["kind"] for row in rows] == [
        "torch, float32", "torch, bfloat16", "onnxruntime, float32", "onnxruntime, W4", "onnxruntime, W4A8",
        "onnxruntime, W4A8, integer kernels",
    ]  # fmt: skip
    assert rows[0]["top1"] == pytest.approx(rows[2]["top1"], abs=0.3)  # the same of 32 images
    network = model_from_checkpoint(load_checkpoint(model), model).eval()
    written = to_onnx(network, integer_weights(network, Grid(4, per_channel=True))).SerializeToString()
    assert rows[3]["bytes"] == len(written) < 0.2 * rows[2]["bytes"]
    assert all(row["images_per_second_at_256"] > 0 for row in rows)


def test_the_benchmark_counts_the_images_that_there_are(monkeypatch):
    monkeypatch.setattr(benchmark_deploy, "alternate", lambda pieces, rounds, device: dict.fromkeys(pieces, 0.5))
    kind = benchmark_deploy.Kind("a", 0, nn.Flatten())
    assert benchmark_deploy.images_per_second([kind], torch.zeros(32, 3, 1, 1), 8, 1) == {"a": 64}


def test_computed_weights_and_other_precisions_are_refused_by_name():
    def net():
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))

    for wrap in (nn.utils.weight_norm, nn.utils.spectral_norm, nn.utils.parametrizations.weight_norm,
                 lambda layer: prune.l1_unstructured(layer, "weight", 0.5)):  # fmt: skip
        for index in (0, 4):
            model = net()
            wrap(model[index])
            with pytest.raises(ValueError, match=f"{index}.weight is computed by its layer"):
                to_onnx(model, {}, 8)
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        with pytest.raises(ValueError, match=f"0.weight is {dtype}: ONNX files hold float32 networks"):
            to_onnx(net().to(dtype), {}, 8)


def test_what_a_network_was_not_made_for_is_said(cli, tmp_path, digits_run):
    """Behind the accuracies of the file on test images, by which a bad one is seen."""
    copy_with_args(digits_run, tmp_path / "a.pth", psg=1, w_bit=2)
    outcome = cli("export.py", "--model_path", "a.pth", "--w_bit", "2", "--a_bit", "3", "--out", "a")
    assert outcome.code == 0 and outcome.err == ""
    assert "it was trained for 2 bits, not for 4" in cli("export.py", "--model_path", "a.pth", "--out", "b").err
    test = load_dataset("digits", "", torch.device("cpu")).test
    model = model_from_checkpoint(load_checkpoint(digits_run), digits_run).eval()
    right = evaluate(model, test).top1
    found = re.search(r"top-1 on these test images: ([\d.]+) % in float, [\d.]+ % at W2A3\n", outcome.out)
    assert float(found[1]) == pytest.approx(right, abs=0.6)  # two of 360 images
    assert read_facts(tmp_path / "a/a_w2.safetensors")["classes"] == [str(number) for number in range(10)]


PSGD4 = {"psg": 1, "w_bit": 4, "granularity": "tensor", "first_last_quant": 1}


@pytest.mark.parametrize("facts, grid, message", [
    ({"args": PSGD4}, (4, True, False), None),
    ({}, (2, True, False), None),
    ({"args": PSGD4 | {"psg": 0}}, (6, True, False), None),
    ({"args": PSGD4 | {"psg": 0}}, (4, True, False), "it was not trained for a grid, and 4 bits are few for"),
    ({"args": PSGD4 | {"target": "zero", "w_bit": None}}, (3, True, False), "it was not trained for a grid, and 3"),
    ({"args": PSGD4}, (8, True, False), "it was trained for 4 bits, not for 8"),
    ({"args": PSGD4}, (4, True, True), "it was trained with a grid for each tensor"),
    ({"args": PSGD4 | {"granularity": "channel"}}, (4, True, False), "it was trained with a grid for each channel"),
    ({"args": PSGD4}, (4, False, False), "it was trained with --first_last_quant 1"),
    ({"args": PSGD4, "averaged_epochs": [3, 3]}, (4, True, False), None),  # published before files said more
    ({"args": PSGD4, "averaged_epochs": [3, 3]}, (3, True, False), "re-estimated, but the file does not say"),
    ({"args": PSGD4, "averaged_epochs": [1, 3], "deployed": {"w_bit": 4, "sparsity": 0.0}}, (4, True, False), None),
    ({"args": PSGD4, "averaged_epochs": [1, 3], "deployed": {"w_bit": 32, "sparsity": 0.0}}, (4, True, False), None),
    ({"args": PSGD4, "averaged_epochs": [1, 3], "deployed": {"w_bit": 2, "sparsity": 0.0}}, (4, True, False),
     "its batch norm was re-estimated at 2 bits"),
    ({"args": PSGD4, "averaged_epochs": [1, 3], "deployed": {"w_bit": 32, "sparsity": 0.9}}, (4, True, False),
     "its batch norm was re-estimated at sparsity 0.9, and nothing is pruned here"),
])  # fmt: skip
def test_mismatches(facts, grid, message):
    bits, first_last, by_channel = grid
    found = mismatches(facts, Grid(bits, first_last, by_channel))
    assert (message in "; ".join(found)) if message else not found
