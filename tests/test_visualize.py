"""visualize.py: one readable picture a layer, without a display."""

import matplotlib.image
import pytest
import torch

from quant import fake_quantize_weight
from visualize import layer_histograms


def test_a_picture_for_each_layer(cli, tmp_path, digits_run, monkeypatch):
    monkeypatch.delenv("DISPLAY", raising=False)
    layers = ["conv1.weight", "layer2.0.downsample.0.weight", "fc.weight"]
    paths = [digits_run, digits_run]
    outcome = cli(
        "visualize.py", "--model_path", *paths, "--labels", "SGD", "PSGD", "--layers", *layers, "--out", "p/q"
    )
    assert outcome.code == 0, outcome.err
    pictures = sorted(path.name for path in (tmp_path / "p/q").iterdir())
    assert pictures == sorted(f"{layer}.png" for layer in layers)
    pixels = matplotlib.image.imread(tmp_path / "p/q" / pictures[0])
    assert pixels.shape[0] > 500 and pixels.shape[1] > 1000 and pixels.std() > 0.05


@pytest.mark.parametrize("width", [2, 4, 8])
def test_histogram_content(width):
    torch.manual_seed(0)
    weights = {"SGD": torch.randn(500), "PSGD": fake_quantize_weight(torch.randn(500), width)}
    figure = layer_histograms("conv.weight", weights, width)
    axes = figure.axes
    assert [axis.get_title() for axis in axes] == [
        "SGD, float", "PSGD, float", f"SGD, {width} bits", f"PSGD, {width} bits",
    ]  # fmt: skip
    assert len({axis.get_xlim() for axis in axes}) == 1  # one x axis for all
    for axis in axes:
        assert sum(patch.get_height() for patch in axis.patches) == 500
    points = fake_quantize_weight(weights["SGD"], width).unique()
    lines = {round(line.get_xdata()[0], 5) for line in axes[2].lines}
    if width > 5:
        assert not lines  # 63 lines and more would hide the histogram
    else:
        assert {round(point.item(), 5) for point in points} <= lines and len(lines) == 2**width - 1


def test_bad_input(rejected, digits_run):
    model = ["--model_path", digits_run]
    assert "no quantized layer 'conv9'; the layers are conv1.weight, " in rejected(
        "visualize.py", *model, "--layers", "conv9"
    )
    assert "2 --labels for 1 checkpoints" in rejected("visualize.py", *model, "--labels", "a", "b")
    assert "are not all different" in rejected(
        "visualize.py", "--model_path", digits_run, digits_run, "--labels", "a", "a"
    )
    assert "no checkpoint at no.pth" in rejected("visualize.py", "--model_path", "no.pth")
    assert "--w_bit: 1 must be from 2 to 8" in rejected("visualize.py", "--w_bit", "1")
