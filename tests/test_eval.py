"""eval.py: sweeps, the files they leave, activation quantization, and what is answered to bad input."""

import copy
import json
import re
from functools import partial
from pathlib import Path

import pytest
import torch

from eval import SEARCHED
from models import build_model
from quant import (
    Grid,
    adaround,
    bn_ranges,
    calibrate,
    correct_bias,
    fake_quantize_weight,
    packed_bytes,
    prune_weights,
    quantize_activations,
    quantize_weights,
    reestimate_batch_norm,
    weight_mse,
)
from quant.pruning import nonzero_weights
from tests.helpers import CIFAR100, ORDER, ROOT, WORDS, ResNet8, copy_with_args, needs_cifar100, permuted, read_csv
from utils.checkpoint import load_checkpoint, load_weights, model_from_checkpoint
from utils.data.load import load_dataset
from utils.training.evaluation import evaluate, evaluate_batches, fold_batch_norm

COLUMNS = [
    "model", "arch", "dataset", "split", "trained", "seed", "epoch", "sparsity", "prune", "nonzero", "w_bit",
    "weight_range", "granularity", "a_bit", "act_at", "act_range", "clipping_range", "post", "top1", "loss",
    "weight_mse", "bytes",
]  # fmt: skip


@pytest.fixture(scope="module")
def network(digits_run):
    """In the memory format of the scripts, so that its numbers are theirs to the last bit."""
    model = ResNet8(10)
    load_weights(model, load_checkpoint(digits_run), digits_run)
    return model.to(memory_format=torch.channels_last).eval()


# Most tests here look at 64 images that training would hold out: the 360 to test on take six times as long.
HELD_OUT = ["--val_split", "64"]


@pytest.fixture(scope="module")
def digits():
    return load_dataset("digits", "", torch.device("cpu"))


@pytest.fixture(scope="module")
def training(digits):
    return digits.splits(64)[0]


@pytest.fixture(scope="module")
def held_out(digits):
    return digits.splits(64)[1]


def rows(folder):
    return read_csv(folder / "results.csv")


def test_sweep(cli, tmp_path, digits_run, network, few_digits):
    model = copy_with_args(digits_run, tmp_path / "a.pth", dataset="cifar10")
    test = load_dataset("cifar10", "data", torch.device("cpu")).test
    flags = ["--model_path", model, model, "--w_bit", "8", "3", "32", "3", "--out", "out/deep"]
    outcome = cli("eval.py", *flags)
    assert outcome.code == 0, outcome.err
    written = rows(tmp_path / "out/deep")
    assert list(written[0]) == COLUMNS
    assert [(row["w_bit"], row["a_bit"]) for row in written] == [("32", "32"), ("8", "32"), ("3", "32")] * 2
    for row in written[:3]:
        quantized = quantize_weights(network, int(row["w_bit"]))
        expected = evaluate(quantized, test)
        assert float(row["top1"]) == pytest.approx(expected.top1, abs=1e-3)
        assert float(row["loss"]) == pytest.approx(expected.loss, rel=1e-3)
        assert float(row["weight_mse"]) == pytest.approx(weight_mse(network, int(row["w_bit"])), rel=1e-9)
        assert row["arch"] == "ResNet8" and row["dataset"] == "cifar10" and row["act_range"] == row["post"] == "none"
        assert (row["trained"], row["seed"], row["epoch"], row["split"]) == ("SGD", "1", "3", "test")
    content = json.loads((tmp_path / "out/deep/results.json").read_text())
    assert [{k: str(v) for k, v in row.items()} for row in content["rows"]] == written
    assert (
        " --model_path " in content["command"] and content["command"].endswith("--out out/deep") and content["commit"]
    )
    assert content["settings"]["w_bit"] == [8, 3, 32, 3] and content["machine"]
    table = outcome.out.splitlines()
    assert len({len(line) for line in table[1:8] if not line.startswith("written")}) == 1


def test_published_clipping_flags_equal_bn_published(cli, tmp_path, digits_run, network, held_out):
    common = ["--model_path", digits_run, "--w_bit", "4", "--a_bit", "4", *HELD_OUT]
    cli("eval.py", *common, "--act_quant", "1", "--act_clipping", "1", "--clipping_range", "6", "--out", "a")
    cli("eval.py", *common, "--act_range", "bn_published", "--out", "b")
    old, new = rows(tmp_path / "a"), rows(tmp_path / "b")
    assert old == new and old[1]["act_range"] == "bn_published" and old[1]["a_bit"] == "4"
    ranges = bn_ranges(network, 6, shortcut=False)
    quantized = quantize_activations(quantize_weights(network, 4), 4, ranges)
    expected = evaluate(fold_batch_norm(quantized), held_out)
    assert float(old[1]["loss"]) == pytest.approx(expected.loss, rel=1e-3)


def test_post_bn_reestimate(cli, tmp_path, digits_run, network, training, held_out):
    """A row without and a row with it at every setting, with statistics of the quantized network."""
    flags = ["--w_bit", "3", "--post", "none", "bn_reestimate", "--calib_images", "96", "--out", "a"]
    assert cli("eval.py", "--model_path", digits_run, *flags, *HELD_OUT).code == 0
    written = rows(tmp_path / "a")
    assert [(row["w_bit"], row["post"]) for row in written] == [
        ("32", "none"), ("32", "bn_reestimate"), ("3", "none"), ("3", "bn_reestimate"),
    ]  # fmt: skip
    images = [batch for batch, _ in training.calibration(96, seed=1)]
    expected = evaluate(reestimate_batch_norm(quantize_weights(network, 3), images), held_out)
    assert float(written[3]["loss"]) == pytest.approx(expected.loss, rel=1e-3)
    assert len({row["loss"] for row in written}) == 4


@pytest.mark.parametrize("rule", ["minmax", "percentile", "mse"])
def test_calibrated_ranges(cli, tmp_path, digits_run, network, training, held_out, rule):
    flags = [*HELD_OUT, "--w_bit", "8", "--a_bit", "3", "--percentile", "99.5", "--calib_images", "32", "--seed", "2"]
    flags += [] if rule == "minmax" else ["--act_range", rule]  # minmax is the default
    assert cli("eval.py", "--model_path", digits_run, *flags, "--out", "a").code == 0
    images = [batch for batch, _ in training.calibration(32, seed=2)]
    ranges = calibrate(network, images, 3, rule, 99.5)
    quantized = quantize_activations(quantize_weights(network, 8), 3, ranges)
    expected = evaluate(fold_batch_norm(quantized), held_out)
    row = rows(tmp_path / "a")[1]
    assert row["act_range"] == rule and float(row["loss"]) == pytest.approx(expected.loss, rel=1e-3)
    assert rows(tmp_path / "a")[0]["act_range"] == "none"


def test_clipping_range_is_searched_on_training_images(cli, tmp_path, digits_run, network, training):
    flags = ["--model_path", digits_run, "--a_bit", "3", "--act_range", "bn", "--calib_images", "64", *HELD_OUT]
    outcome = cli("eval.py", *flags, "--clipping_range", "1", "3", "12", "--out", "a")
    assert outcome.code == 0, outcome.err
    losses = {}
    for n in (1.0, 3.0, 12.0):
        quantized = quantize_activations(quantize_weights(network, 4), 3, bn_ranges(network, n))
        batches = training.calibration(64, seed=1)
        losses[n] = evaluate_batches(fold_batch_norm(quantized), batches).loss
    best = min(losses, key=losses.get)
    curve = ", ".join(f"{n:g}: {loss:.4f}" for n, loss in losses.items())
    assert f"W4A3: training loss by clipping range {curve}; chosen: {best:g}" in outcome.out
    row = rows(tmp_path / "a")[1]
    assert float(row["clipping_range"]) == best and len(rows(tmp_path / "a")) == 2
    few = ["--val_split", "8", "--calib_images", "8"]
    curve = re.search(r"by clipping range (.*);", cli("eval.py", *flags, *few, "--clipping_range", "search").out)[1]
    assert [float(n) for n in re.findall(r"([\d.]+): ", curve)] == SEARCHED


def test_grids_of_the_weights(cli, tmp_path, digits_run, network, held_out):
    flags = [*HELD_OUT, "--w_bit", "3", "--weight_range", "mse", "--granularity", "channel", "--out", "a"]
    assert cli("eval.py", "--model_path", digits_run, *flags).code == 0
    row = rows(tmp_path / "a")[1]
    assert (row["weight_range"], row["granularity"]) == ("mse", "channel")
    assert float(row["weight_mse"]) == pytest.approx(
        weight_mse(network, Grid(3, first_last=True, per_channel=True, weight_range="mse")), rel=1e-6
    )
    assert float(row["weight_mse"]) < weight_mse(network, Grid(3, first_last=True, per_channel=True))
    expected = evaluate(
        quantize_weights(network, Grid(3, first_last=True, per_channel=True, weight_range="mse")), held_out
    )
    assert float(row["loss"]) == pytest.approx(expected.loss, rel=1e-3)
    assert int(row["bytes"]) == packed_bytes(network, Grid(3, per_channel=True))


def test_the_grids_are_those_of_training_unless_told(cli, tmp_path, digits_run, channel_run, network):
    assert cli("eval.py", "--model_path", channel_run, digits_run, "--w_bit", "3", *HELD_OUT, "--out", "a").code == 0
    (_, by_channel, _, by_tensor) = rows(tmp_path / "a")
    assert (by_channel["granularity"], by_tensor["granularity"]) == ("channel", "tensor")
    assert float(by_channel["weight_mse"]) == pytest.approx(weight_mse(network, Grid(3, per_channel=True)), rel=1e-6)
    assert float(by_tensor["weight_mse"]) == pytest.approx(weight_mse(network, 3), rel=1e-6)
    cli("eval.py", "--model_path", channel_run, "--w_bit", "3", "--granularity", "tensor", *HELD_OUT, "--out", "b")
    assert rows(tmp_path / "b")[1]["weight_mse"] == by_tensor["weight_mse"]


def test_post_training_methods(cli, tmp_path, digits_run, network, training, held_out):
    """Each in a row of its own; at full precision only the method that does something there."""
    flags = ["--w_bit", "2", "--post", "none", "bias_correct", "adaround", "--calib_images", "8", "--out", "a"]
    flags += ["--iterations", "10", "--seed", "3", *HELD_OUT]
    assert cli("eval.py", "--model_path", digits_run, *flags).code == 0
    written = rows(tmp_path / "a")
    assert [(row["w_bit"], row["post"]) for row in written] == [
        ("32", "none"), ("2", "none"), ("2", "bias_correct"), ("2", "adaround"),
    ]  # fmt: skip
    assert len({row["loss"] for row in written}) == 4
    images = [batch for batch, _ in training.calibration(8, seed=3)]
    quantized = quantize_weights(network, 2)
    learned = adaround(copy.deepcopy(quantized), network, images, 2, iterations=10, seed=3)
    for row, model in ((written[2], correct_bias(quantized, network, images)), (written[3], learned)):
        expected = evaluate(fold_batch_norm(model), held_out)
        assert float(row["loss"]) == pytest.approx(expected.loss, rel=1e-3), row["post"]


def test_sparsity_sweep(cli, tmp_path, digits_run, network, held_out):
    """Pruned first, then quantized; full precision and dense in the first row, no other bit-width unless asked for."""
    common = ["--model_path", digits_run, "--sparsity", "0", "0.5", "0.9", *HELD_OUT]
    assert cli("eval.py", *common, "--prune", "layer", "--out", "a").code == 0
    assert cli("eval.py", *common, "--w_bit", "32", "3", "--first_last_quant", "0", "--out", "b").code == 0
    a, b = rows(tmp_path / "a"), rows(tmp_path / "b")
    assert [(row["sparsity"], row["prune"], row["w_bit"]) for row in a] == [
        ("0.0", "none", "32"), ("0.5", "layer", "32"), ("0.9", "layer", "32"),
    ]  # fmt: skip
    assert [(row["sparsity"], row["w_bit"]) for row in b] == [
        (s, w) for w in ("32", "3") for s in ("0.0", "0.5", "0.9")
    ]
    expected = prune_weights(network, 0.9, "layer")
    assert int(a[2]["nonzero"]) == nonzero_weights(expected)
    assert float(a[2]["loss"]) == pytest.approx(evaluate(expected, held_out).loss, rel=1e-3)
    expected = quantize_weights(prune_weights(network, 0.5, first_last=False), Grid(3, first_last=False))
    assert int(b[4]["nonzero"]) == nonzero_weights(expected, first_last=False) < int(b[1]["nonzero"])
    assert float(b[4]["loss"]) == pytest.approx(evaluate(expected, held_out).loss, rel=1e-3)


def test_post_training_methods_on_a_pruned_network(cli, tmp_path, digits_run):
    """Mean outputs are brought back to those of the whole network, and weight_mse is that of what is rounded."""
    flags = ["--sparsity", "0.7", "--w_bit", "32", "3", "--post", "none", "bias_correct", "adaround", "--out", "a"]
    flags += ["--calib_images", "4", "--iterations", "5", *HELD_OUT]
    assert cli("eval.py", "--model_path", digits_run, *flags).code == 0
    written = rows(tmp_path / "a")
    assert [(row["sparsity"], row["w_bit"], row["post"]) for row in written] == [
        ("0.0", "32", "none"), ("0.7", "32", "none"), ("0.7", "32", "bias_correct"),
        ("0.7", "3", "none"), ("0.7", "3", "bias_correct"), ("0.7", "3", "adaround"),
    ]  # fmt: skip
    pruned = int(written[1]["nonzero"])
    assert all(int(row["nonzero"]) <= pruned for row in written[2:]) and written[1]["loss"] != written[2]["loss"]
    model = model_from_checkpoint(load_checkpoint(digits_run), digits_run)
    assert float(written[3]["weight_mse"]) == pytest.approx(weight_mse(prune_weights(model, 0.7), 3))


def test_report(cli, tmp_path, digits_run, network, held_out):
    flags = ["--w_bit", "2", "--report", "--calib_images", "4", *HELD_OUT, "--out", "a"]
    outcome = cli("eval.py", "--model_path", digits_run, *flags)
    assert outcome.code == 0 and outcome.out.endswith("a/results.csv and results.json and layers.csv\n")
    layers = read_csv(tmp_path / "a/layers.csv")
    assert len(layers) == 10 and layers[0]["layer"] == "conv1" and layers[-1]["layer"] == "fc"
    row = max(layers[1:-1], key=lambda row: abs(float(row["top1_lost"])))
    alone = copy.deepcopy(network)
    with torch.no_grad():
        weight = alone.get_submodule(row["layer"]).weight
        weight.copy_(fake_quantize_weight(weight, 2))
    full, lost = (evaluate(net, held_out).top1 for net in (network, alone))
    assert float(row["top1_lost"]) == pytest.approx(full - lost, abs=1e-3) != 0 and row["bits"] == "2"


def test_val_split_is_what_train_holds_out(cli, tmp_path, digits_run, network, digits):
    assert cli("eval.py", "--model_path", digits_run, "--val_split", "30", "--out", "a").code == 0
    row = rows(tmp_path / "a")[0]
    assert row["split"] == "validation"
    assert float(row["loss"]) == pytest.approx(evaluate(network, digits.splits(30)[1]).loss, 1e-3)


def test_act_quant_0_ignores_a_bit(cli, digits_run):
    outcome = cli("eval.py", "--model_path", digits_run, "--a_bit", "4", "--act_quant", "0", *HELD_OUT)
    assert outcome.code == 0 and "minmax" not in outcome.out


def test_published_name_of_out(cli, tmp_path, digits_run):
    assert cli("eval.py", "--model_path", digits_run, "--exp_name", "mine", *HELD_OUT).code == 0
    assert len(rows(tmp_path / "results/mine")) == 2


def test_bad_input_with_a_good_checkpoint(rejected, digits_run, tmp_path):
    model = ["--model_path", digits_run]
    assert "is a ResNet8, but --arch is vgg16_bn" in rejected("eval.py", *model, "--arch", "vgg16_bn")
    too_many = [*model, "--a_bit", "4", "--calib_images", "1438"]
    assert "--calib_images 1438 is more than the 1437 training images" in rejected("eval.py", *too_many)
    too_many = [*model, "--post", "bn_reestimate", "--val_split", "1000", "--calib_images", "438"]
    assert "--calib_images 438 is more than the 437 training images" in rejected("eval.py", *too_many)
    (tmp_path / "file").write_text("")
    assert "file/x" in rejected("eval.py", *model, "--out", "file/x")


@pytest.mark.parametrize("script", ["eval.py", "export.py"])
def test_activations_that_would_stay_float_are_refused(rejected, tmp_path, script):
    state = build_model("mobilenet_v3_small", 10).state_dict()
    facts = {"arch": "mobilenet_v3_small", "num_classes": 10, "args": {"dataset": "digits"}}
    torch.save({"state_dict": state, **facts}, tmp_path / "mobile.pth")
    error = rejected(script, "--model_path", "mobile.pth", "--a_bit", 4, "--w_bit", 4)
    assert "mobile.pth: 28 activations would stay float, such as features.0.2 (Hardswish)" in error


def test_bn_range_without_batch_norm_names_the_relu(cli, tmp_path):
    from models import vgg16_bn
    from utils.checkpoint import save_checkpoint

    state = vgg16_bn(10).state_dict()
    save_checkpoint(tmp_path / "vgg.pth", {"state_dict": state, "arch": "vgg16_bn", "args": {"dataset": "digits"}})
    outcome = cli("eval.py", "--model_path", "vgg.pth", "--a_bit", "8", "--act_range", "bn")
    assert outcome.code == 2 and "no batch norm feeds classifier.1" in outcome.err


def published():
    """Top-1 in results/weights and results/sparse of the shipped files, each on its own kind of grid, post none, by
    (file name, "32" | "4" | ..., sparsity)."""
    found = [
        row
        for kind in ("weights", "sparse")
        for path in (ROOT / "results" / kind).rglob("results.csv")
        for row in rows(path.parent)
    ]
    return {  # rows from before there was pruning have no column for it
        (Path(row["model"]).name, row["w_bit"], float(row.get("sparsity") or 0)): float(row["top1"])
        for row in found
        if row["model"].startswith("models/") and row["post"] == "none" and row.get("prune") != "layer"
        if (row["granularity"] == "channel") == ("channel" in row["model"])
    }


# Two of 10,000 images: the last bits of a float32 convolution differ between processors.
as_published = partial(pytest.approx, abs=0.02)


@needs_cifar100
@pytest.mark.parametrize("name, per_channel", [("W4_ResNet.pth", False), ("W4_channel_ResNet.pth", True)])
def test_shipped_checkpoints_have_their_published_figures(name, per_channel):
    """At 4 bits on the real test set, by the package's own functions."""
    path = ROOT / "models" / name
    grid = Grid(4, per_channel=per_channel)
    model = quantize_weights(model_from_checkpoint(load_checkpoint(path), path).eval(), grid)
    test = load_dataset("cifar100", CIFAR100.parent, torch.device("cpu")).test
    assert evaluate(model, test).top1 == as_published(published()[path.name, "4", 0.0])


def test_classes_in_another_order_are_the_same_classes(cli, tmp_path, digits_run, few_digits):
    """By their names, which training has put into the file; and one run may have data sets of both orders."""
    model = copy_with_args(digits_run, tmp_path / "a.pth", dataset="cifar10")
    assert load_checkpoint(model)["classes"] == [str(number) for number in range(10)]
    permuted(tmp_path / "b/cifar10.npz", ORDER)
    for folder in ("data", "b"):
        flags = ["--model_path", model, "--data_dir", folder, "--a_bit", "4", "--act_range", "bn"]
        flags += ["--clipping_range", "3", "9", "--calib_images", "32"]
        assert cli("eval.py", *flags, "--out", f"out/{folder}").code == 0
    assert rows(tmp_path / "out/data") == rows(tmp_path / "out/b")


def test_other_classes_are_refused_wherever_a_network_meets_data(rejected, tmp_path, digits_run, few_digits):
    copy_with_args(digits_run, tmp_path / "a.pth", dataset="cifar10", data_dir="b")
    copy_with_args(digits_run, tmp_path / "epoch_1.pth", dataset="cifar10", data_dir="b")
    permuted(tmp_path / "b/cifar10.npz", range(10), WORDS)
    model = ["--model_path", "a.pth"]
    for script, flags in (
        ("eval.py", model),
        ("export.py", model),
        ("tools.benchmark_deploy", model),
        ("tools.hessian", model),
        ("tools.average", [tmp_path, "--epochs", "1", "--out", "c.pth"]),
    ):
        message = rejected(script, *flags)
        assert "is for other classes than the data set: its '0' is not in the data set, 'zero' of the data" in message


def test_the_folder_of_the_training_is_the_default(cli, rejected, tmp_path, digits_run, few_digits):
    """Where it has the data set; the files of the folder data are others."""
    (tmp_path / "data").rename(tmp_path / "mine")
    copy_with_args(digits_run, tmp_path / "a.pth", dataset="cifar10", data_dir="mine")
    assert cli("eval.py", "--model_path", "a.pth", "--out", "out").code == 0
    assert cli("export.py", "--model_path", "a.pth", "--a_bit", "8").code == 0
    copy_with_args(digits_run, tmp_path / "b.pth", dataset="imagefolder", data_dir="mine")
    message = rejected("eval.py", "--model_path", "b.pth")
    assert "b.pth needs images, but mine, the folder of its training, has no train/: name another" in message


def test_fewer_training_images_than_the_default(cli, tmp_path, digits_run, few_digits):
    copy_with_args(digits_run, tmp_path / "a.pth", dataset="cifar10")
    outcome = cli("eval.py", "--model_path", "a.pth", "a.pth", "--a_bit", "8", "--out", "out")
    assert outcome.code == 0
    assert outcome.err == "warning: all 128 training images are taken: there are fewer than --calib_images 1024\n"
    assert json.loads((tmp_path / "out/results.json").read_text())["settings"]["calib_images"] == 128
