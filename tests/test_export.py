"""export.py and tools.benchmark_deploy as a user runs them."""

import json
import re

import onnx
import pytest
import torch
from torch import nn

import tools.benchmark
from models import build_model
from quant import (
    Grid,
    calibrate,
    export,
    load_packed,
    quantize_weights,
    read_facts,
    reestimate_batch_norm,
)
from quant.deploy import integer_weights, to_onnx
from tests.helpers import ResNet8, copy_with_args, same
from tools import benchmark_deploy
from utils.checkpoint import load_checkpoint, model_from_checkpoint
from utils.data.load import load_dataset
from utils.trained_for import mismatches
from utils.training.evaluation import evaluate


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
    assert (facts["arch"], facts["num_classes"], facts["grid"]["bits"]) == ("ResNet8", 10, 4)
    model = model_from_checkpoint(load_checkpoint(digits_run), digits_run)
    packed = load_packed(tmp_path / "a/b/last_w4.safetensors", ResNet8(10)).state_dict()
    assert all(torch.equal(packed[name], value) for name, value in quantize_weights(model, 4).state_dict().items())
    train = load_dataset("digits", "", torch.device("cpu")).train
    images = [batch for batch, _ in train.calibration(64, seed=1)]
    constants = {constant.name: constant for constant in onnx.load(tmp_path / "a/b/last_w4a8.onnx").graph.initializer}
    for name, top in calibrate(model, images, 8).items():
        assert onnx.numpy_helper.to_array(constants[f"{name}.scale"]) == pytest.approx(top / 255), name


def test_a_network_of_channel_grids_is_exported_as_one(cli, tmp_path, channel_run):
    assert cli("export.py", "--model_path", channel_run, "--w_bit", "3", "--out", "a").code == 0
    assert read_facts(tmp_path / "a/channel_w3.safetensors")["grid"]["per_channel"] is True


def test_batch_norm_is_re_estimated_for_both_files(cli, tmp_path, digits_run):
    """The packed file has that of quantized weights, as has a twin by the package; the ONNX file equals its network."""
    flags = ["--model_path", digits_run, "--w_bit", "2", "--post", "bn_reestimate", "--calib_images", "64"]
    outcome = cli("export.py", *flags, "--a_bit", "4", "--out", "a")
    assert outcome.code == 0, outcome.err
    train = load_dataset("digits", "", torch.device("cpu")).train
    images = [batch for batch, _ in train.calibration(64, seed=1)]
    model = model_from_checkpoint(load_checkpoint(digits_run), digits_run)
    twin = reestimate_batch_norm(quantize_weights(model, 2), images).state_dict()
    packed = load_packed(tmp_path / "a/last_w2.safetensors", ResNet8(10)).state_dict()
    for name, value in twin.items():
        torch.testing.assert_close(packed[name], value)
    assert not same(packed, quantize_weights(model, 2).state_dict())
    assert read_facts(tmp_path / "a/last_w2.safetensors")["post"] == "bn_reestimate"
    assert "| batch norm | re-estimated" in (tmp_path / "a/last_w2a4.md").read_text()


def test_batch_norm_cannot_be_re_estimated_without_images_or_batch_norm(rejected, digits_run, tmp_path):
    flags = ["--model_path", digits_run, "--dataset", "cifar10", "--post", "bn_reestimate"]
    assert "--post bn_reestimate needs training images, and there is no cifar10" in rejected("export.py", *flags)
    facts = {"arch": "vit_tiny", "num_classes": 10, "args": {"dataset": "digits"}}
    torch.save({**facts, "state_dict": build_model("vit_tiny", 10).state_dict()}, tmp_path / "v.pth")
    flags = ["--model_path", "v.pth", "--calib_images", "8", "--post", "bn_reestimate"]
    assert "v.pth: VisionTransformer has no batch-norm statistics" in rejected("export.py", *flags)


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
