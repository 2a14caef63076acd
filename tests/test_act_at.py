"""eval.py --act_at inputs: activations of any network."""

import pytest
import torch

from models import ARCHITECTURES, build_model
from quant import Grid, calibrate, quantize_activations, quantize_weights, reestimate_batch_norm
from quant.inputs import input_layers
from tests.helpers import read_csv, small_mobilenet
from utils.checkpoint import save_checkpoint
from utils.data.load import load_dataset
from utils.training.evaluation import evaluate, fold_batch_norm

FLAGS = ["--w_bit", "8", "--val_split", "16", "--calib_images", "16", "--seed", "2"]


@pytest.fixture
def mobile(tmp_path, monkeypatch):
    """A small MobileNetV3 with random weights and statistics of digits, and its checkpoint."""
    monkeypatch.setitem(ARCHITECTURES, "mobile", small_mobilenet)
    torch.manual_seed(0)
    net = build_model("mobile", 10)
    with torch.no_grad():
        net.classifier[-1].weight.mul_(100)  # its losses would be nearly those of no network at all
    reestimate_batch_norm(net, load_dataset("digits", "", torch.device("cpu")).train.calibration(64, seed=1))
    facts = {"arch": "mobile", "num_classes": 10, "args": {"dataset": "digits"}}
    save_checkpoint(tmp_path / "m.pth", facts | {"state_dict": net.state_dict()})
    return net.to(memory_format=torch.channels_last), tmp_path / "m.pth"


@pytest.mark.parametrize("first_last", [1, 0])
def test_it_is_what_the_package_does(cli, tmp_path, mobile, first_last):
    net, path = mobile
    flags = ["--a_bit", "8", "4", "--act_at", "inputs", "--act_range", "percentile", "--percentile", "99.5"]
    outcome = cli("eval.py", "--model_path", path, *FLAGS, *flags, "--first_last_quant", first_last, "--out", "a")
    assert outcome.code == 0 and "Warning" not in outcome.err, outcome.err
    train, held_out, _ = load_dataset("digits", "", torch.device("cpu")).splits(16)
    images, grid = [batch for batch, _ in train.calibration(16, seed=2)], Grid(8, bool(first_last))
    written = read_csv(tmp_path / "a/results.csv")
    assert [(row["a_bit"], row["act_at"], row["act_range"]) for row in written] == [
        ("32", "none", "none"), ("8", "inputs", "percentile"), ("4", "inputs", "percentile")
    ]  # fmt: skip
    for row in written[1:]:
        bits = int(row["a_bit"])
        ranges = calibrate(net, images, bits, "percentile", 99.5, at="inputs", grid=grid)
        quantized = quantize_activations(quantize_weights(net, grid), bits, ranges)
        loss = evaluate(fold_batch_norm(quantized), held_out).loss
        assert float(row["loss"]) == pytest.approx(loss, rel=1e-3)
    assert len({row["loss"] for row in written}) == 3


def test_post_training_methods_run_on_it(cli, tmp_path, mobile):
    flags = ["--a_bit", "8", "--act_at", "inputs", "--post", "bn_reestimate", "bias_correct"]
    outcome = cli("eval.py", "--model_path", mobile[1], *FLAGS, *flags, "--out", "a")
    assert outcome.code == 0, outcome.err
    assert [row["post"] for row in read_csv(tmp_path / "a/results.csv") if row["act_at"] == "inputs"] == [
        "bn_reestimate", "bias_correct",
    ]  # fmt: skip


def test_where_relus_are_not_enough_it_is_the_advice(rejected, mobile):
    error = rejected("eval.py", "--model_path", mobile[1], *FLAGS, "--a_bit", "8")
    assert "7 activations would stay float" in error and "(--act_at inputs)" in error


def test_export_writes_them(cli, tmp_path, mobile):
    """A QuantizeLinear before each layer, and the same best classes as the quantized network (export.py checks)."""
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    flags = ["--w_bit", "8", "--a_bit", "8", "--act_at", "inputs", "--calib_images", "16", "--out", "deploy"]
    outcome = cli("export.py", "--model_path", mobile[1], *flags)
    assert outcome.code == 0, outcome.err
    graph = onnx.load(tmp_path / "deploy/m_w8a8.onnx").graph
    operations = [node.op_type for node in graph.node]
    assert operations.count("QuantizeLinear") == len(input_layers(mobile[0], 8)) == 14
    assert {node.op_type for node in graph.node if node.input[0] in quantized(graph)} == {"DequantizeLinear"}


def quantized(graph):
    return {node.output[0] for node in graph.node if node.op_type == "QuantizeLinear"}
