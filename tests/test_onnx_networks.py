"""Networks of torch, torchvision, timm and transformers as ONNX graphs, small ones of each kind, against torch."""

import onnx
import pytest
import torch
from torch import nn
from torchvision.models import ConvNeXt, DenseNet, ShuffleNetV2, SwinTransformer, VisionTransformer
from torchvision.models.convnext import CNBlockConfig

from quant import Grid, calibrate, export, quantize_activations, quantize_weights
from quant.deploy import integer_weights, to_onnx
from tests.helpers import read_csv, run_graph, small_mobilenet
from utils.exporting import run_onnx

CLASSES = 3


TORCHVISION = {
    "mobilenet_v3": (lambda: small_mobilenet(CLASSES), 32),
    "densenet": (lambda: DenseNet(4, (2, 2), 8, num_classes=CLASSES), 32),
    "shufflenet": (lambda: ShuffleNetV2([1, 1, 1], [8, 16, 32, 64, 64], CLASSES), 32),
    "convnext": (lambda: ConvNeXt([CNBlockConfig(8, 16, 1), CNBlockConfig(16, None, 1)], num_classes=CLASSES), 32),
    "vit": (lambda: VisionTransformer(16, 8, 1, 2, 8, 16, num_classes=CLASSES), 16),
    "swin": (lambda: SwinTransformer([2, 2], 8, [1, 1], [1, 2], [2, 2], num_classes=CLASSES), 16),
}


def prepared(build):
    """The network in eval mode, with no parameter of zeros and with batch-norm statistics unlike those of a new one."""
    torch.manual_seed(0)
    model = build().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(0, 0.1)
        for module in model.modules():
            if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
                module.running_mean.normal_(0, 0.3)
                module.running_var.uniform_(0.5, 2)
    return model


def check(model, proto, inputs, grid):
    """The file gives the outputs of the quantized network, and every integer parameter has a type of its bits."""
    with torch.no_grad():
        outputs = quantize_weights(model, grid)(inputs)
    expected = outputs if isinstance(outputs, torch.Tensor) else outputs.logits
    found = run_graph(proto, inputs)
    assert (found - expected).abs().max() < 1e-4 * (expected.max() - expected.min())
    stored = [tensor for tensor in proto.graph.initializer if tensor.name.endswith(".integers")]
    integers = integer_weights(model, grid)
    names = {tensor.name.removesuffix(".integers") for tensor in stored}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    assert {id(parameters[name]) for name in names} == {id(parameters[name]) for name in integers}
    assert {tensor.data_type for tensor in stored} <= {onnx.TensorProto.INT4, onnx.TensorProto.INT8}


@pytest.mark.parametrize("name", TORCHVISION)
def test_networks_of_torchvision(name):
    build, size = TORCHVISION[name]
    model, grid = prepared(build), Grid(4, per_channel=name in ("densenet", "swin"))
    proto = to_onnx(model, integer_weights(model, grid), size)
    check(model, proto, torch.randn(5, 3, size, size), grid)


def test_quantized_activations_of_a_network_with_concatenations():
    model, images = prepared(TORCHVISION["shufflenet"][0]), torch.randn(16, 3, 32, 32)
    quantized = quantize_activations(quantize_weights(model, 8), 8, calibrate(model, [images], 8, "minmax"))
    proto = to_onnx(quantized, integer_weights(model, 8))
    with torch.no_grad():
        expected = quantized(images)
    found = run_onnx(proto.SerializeToString(), images, as_written=True)
    assert (found - expected).abs().mean() < 0.01 * (expected.max() - expected.min())
    relus = [module for module in model.modules() if isinstance(module, nn.ReLU)]
    assert [node.op_type for node in proto.graph.node].count("QuantizeLinear") == len(relus)


def test_a_transformer_of_torch_leaves_its_fused_kernel():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    model, tokens = nn.TransformerEncoder(layer, 2).eval(), torch.randn(3, 6, 16)
    for parameter in model.parameters():  # equal ones, as those of copied layers, would be stored once
        nn.init.normal_(parameter, 0, 0.2)
    proto = to_onnx(model, integer_weights(model, 4), example_inputs=(tokens,))
    check(model, proto, tokens, Grid(4))


def test_the_tokens_of_gpt2(tmp_path):
    """Its head shares the weight of an embedding, which is stored once."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=32, n_positions=8, n_embd=16, n_layer=1, n_head=2, use_cache=False)
    model, tokens = transformers.GPT2LMHeadModel(config).eval(), torch.randint(32, (3, 8))
    export(model, tmp_path / "a.onnx", 4, example_inputs=(tokens[:1],))
    proto = onnx.load(tmp_path / "a.onnx")
    assert [value.name for value in proto.graph.input] == ["input_ids"]
    check(model, proto, tokens, Grid(4))


@pytest.mark.parametrize("name", ["test_efficientnet", "test_vit"])
def test_networks_of_timm(name):
    timm = pytest.importorskip("timm")
    settings = {"img_size": 32} if "vit" in name else {}
    model = prepared(lambda: timm.create_model(name, num_classes=CLASSES, **settings))
    check(model, to_onnx(model, integer_weights(model, 4)), torch.randn(3, 3, 32, 32), Grid(4))


def test_the_table_of_networks(cli, tmp_path, monkeypatch):
    from tools import onnx_table

    monkeypatch.setattr(
        onnx_table, "NETWORKS", {"small": lambda: (TORCHVISION["shufflenet"][0](), torch.randn(4, 3, 32, 32))}
    )
    outcome = cli("tools.onnx_table", "--networks", "small", "--out", "a.csv")
    assert outcome.code == 0, outcome.err
    rows = read_csv(tmp_path / "a.csv")
    assert [row["kind"] for row in rows] == ["W8", "W4", "W2", "W4A8"]
    assert all(float(row["difference"]) < 1e-4 for row in rows[:3]) and float(rows[3]["difference"]) < 0.2
    assert int(rows[0]["bytes"]) > int(rows[1]["bytes"]) > int(rows[2]["bytes"])
