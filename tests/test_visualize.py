"""visualize.py: one readable picture a layer, without a display."""

from argparse import Namespace

import matplotlib.image
import numpy
import pytest
import torch

from models import build_model
from quant import Grid, fake_quantize_weight
from utils.checkpoint import save_checkpoint
from utils.drawing.figures import bits_figures, curve_figures, lambda_s_figures, layer_figures
from utils.drawing.paper_figures import sparse_histograms, toy_trajectories
from utils.drawing.result_figures import (
    accuracy_grids,
    errors_over_bits,
    layer_bars,
    layer_histograms,
    pace_of_runs,
    training_curves,
)


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
    all_layers = Namespace(model_path=paths, labels=["SGD", "PSGD"], layers=None, w_bit=4, first_last_quant=1)
    assert len(layer_figures(all_layers)) == 10


@pytest.mark.parametrize("width", [2, 4, 8])
def test_histogram_content(width):
    torch.manual_seed(0)
    weights = {"SGD": torch.randn(500), "PSGD": fake_quantize_weight(torch.randn(500), width)}
    figure = layer_histograms("conv.weight", weights, dict.fromkeys(weights, Grid(width)))
    axes = figure.axes
    assert [axis.get_title() for axis in axes] == [
        "SGD, float", "PSGD, float", f"SGD, {width} bits", f"PSGD, {width} bits",
    ]  # fmt: skip
    assert len({axis.get_xlim() for axis in axes}) == 1  # one x axis for all
    for axis in axes:
        assert axis.patches[0].get_data().values.sum() == 500
    points = fake_quantize_weight(weights["SGD"], width).unique()
    lines = {round(line.get_xdata()[0], 5) for line in axes[2].lines}
    if width > 5:
        assert not lines  # 63 lines and more would hide the histogram
    else:
        assert {round(point.item(), 5) for point in points} <= lines and len(lines) == 2**width - 1


def test_a_network_with_grids_of_channels_is_drawn_on_them(cli, tmp_path, channel_run, digits_run):
    for out, run in (("channel", channel_run), ("tensor", digits_run)):
        flags = ["--model_path", run, "--labels", "PSGD", "--layers", "conv1.weight", "--w_bit", "2", "--out", out]
        assert cli("visualize.py", *flags).code == 0
    pictures = [matplotlib.image.imread(tmp_path / out / "conv1.weight.png") for out in ("channel", "tensor")]
    assert not numpy.array_equal(*pictures)
    weight = torch.tensor([[1.0, 0.3], [0.1, 0.02]])
    axes = layer_histograms("fc.weight", {"PSGD": weight}, {"PSGD": Grid(2, per_channel=True)}).axes
    for axis, steps in zip(axes, ([0.2, 0.3, 1], [0, 1])):  # of each weight's channel: 1 and 0.1
        counts, edges, _ = axis.patches[0].get_data()
        assert ((edges[:-1] + edges[1:]) / 2)[counts > 0] == pytest.approx(steps, abs=0.01)
        assert {line.get_xdata()[0] for line in axis.lines} == {-1, 0, 1}


def test_figure_1a(cli, rejected, tmp_path):
    """Bars are errors, lines weight errors; a PSGD bar is of the network trained for that bit-width, seeds averaged."""
    header = "trained,epoch,seed,w_bit,a_bit,post,top1,weight_mse\n"
    rows = [
        "SGD,82,1,4,32,none,99,1", "SGD,150,1,32,32,none,70,0", "SGD,150,1,8,32,none,69,1e-6",
        "SGD,150,1,4,32,none,50,1e-3", "SGD,150,1,4,32,bn_reestimate,60,1e-3", "PSGD W4,150,1,4,32,none,68,1e-4",
        "PSGD W4,150,2,4,32,none,70,3e-4", "PSGD W4,150,1,8,32,none,1,1", "PSGD W4,150,1,4,4,none,1,1",
        "PSGD W4 channel,150,1,4,32,none,71,2e-4", "PSGD W4 channel,150,1,2,32,none,1,1",
    ]  # fmt: skip
    (tmp_path / "r.csv").write_text(header + "\n".join(rows) + "\n")
    outcome = cli("visualize.py", "--figure", "1a", "--results", "r.csv", "--out", "fig")
    assert outcome.code == 0 and (tmp_path / "fig/figure1a.png").stat().st_size > 10_000, outcome.err
    ((_, draw),) = bits_figures(Namespace(results=[str(tmp_path / "r.csv")]))
    assert {label: [row["top1"] for row in rows] for label, rows in draw.args[0].items()} == {
        "SGD": ["70", "69", "50"], "PSGD": ["68", "70"], "PSGD, a scale for each channel": ["71"],
    }  # fmt: skip
    (tmp_path / "r.csv").write_text(
        header.replace("top1", "granularity,top1")
        + "SGD,150,1,4,32,none,tensor,50,1e-3\nSGD,150,1,4,32,none,channel,60,1e-4\n"
    )
    ((_, draw),) = bits_figures(Namespace(results=[str(tmp_path / "r.csv")]))
    assert {label: [row["top1"] for row in rows] for label, rows in draw.args[0].items()} == {
        "SGD": ["50"], "PSGD": [], "SGD, a scale for each channel": ["60"],
    }  # fmt: skip
    (tmp_path / "r.csv").write_text(
        header.replace("top1", "weight_range,top1")
        + "SGD,150,1,4,32,none,absmax,50,1e-3\nSGD,150,1,4,32,none,mse,60,1e-4\n"
    )
    assert "SGD has rows of one bit-width that differ in more than the seed" in rejected(
        "visualize.py", "--figure", "1a", "--results", "r.csv"
    )
    series = {
        "SGD": [{"w_bit": "8", "top1": "69", "weight_mse": "1e-6"}, {"w_bit": "4", "top1": "50", "weight_mse": "1e-3"}],
        "PSGD": [{"w_bit": "4", "top1": top1, "weight_mse": mse} for top1, mse in (("68", "1e-4"), ("70", "3e-4"))],
    }
    bars, lines = errors_over_bits(series).axes
    assert [[bar.get_height() for bar in group] for group in bars.containers] == [[31, 50], [31]]
    heights = [list(line.get_ydata()) for line in lines.lines]  # a bit-width without a network is a gap
    assert heights == [[1e-6, 1e-3], pytest.approx([numpy.nan, 2e-4], nan_ok=True)]
    assert [tick.get_text() for tick in lines.get_xticklabels()] == ["W8", "W4"] and lines.get_yscale() == "log"


def test_training_curves(cli, tmp_path):
    for name, shift in (("a", 0), ("b", 5)):
        (tmp_path / name).mkdir()
        text = "epoch,fp_top1,w4_top1,grid_share\n" + "".join(
            f"{e},{60 + e},{50 + e},0.2\n" for e in (1 + shift, 2 + shift)
        )
        (tmp_path / name / "metrics.csv").write_text(text)
    flags = ["--runs", "a", "b", "--labels", "SGD", "PSGD", "--out", "fig"]
    outcome = cli("visualize.py", "--figure", "curves", *flags)
    assert outcome.code == 0 and (tmp_path / "fig/curves.png").stat().st_size > 10_000, outcome.err
    columns = {"epoch": [1, 2], "fp_top1": [60, 61], "w3_top1": [1, 2], "grid_share": [0.2, 0.4]}
    whole = training_curves({"mine": columns})
    (axis,) = whole.axes
    assert [list(line.get_ydata()) for line in axis.lines] == [[60, 61], [1, 2]]
    assert [text.get_text() for text in axis.get_legend().get_texts()] == ["mine, float", "mine, 3 bits"]


def test_runs_of_one_group_look_alike_in_the_figure_of_the_pace():
    """Labels up to a colon name a group, which has one color, one marker and one entry in the legend."""
    figure = pace_of_runs({"A: W4": ([1.0], [0.4]), "B": ([2.0], [0.6]), "A: W3": ([3.0], [0.7])})
    _, *drawn = figure.axes[0].lines
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["the law", "A", "B"]
    looks = {tuple(line.get_ydata()): (line.get_color(), line.get_marker()) for line in drawn}
    assert looks[40.0,] == looks[70.0,] != looks[60.0,]


def test_curves_need_no_other_columns_than_theirs(cli, tmp_path):
    """A run that an older version began has no tau in its first epochs. A half-written row is left out."""
    (tmp_path / "metrics.csv").write_text("epoch,fp_top1,w4_top1,tau\n1,60,50,\n2,61,51,0.4\n3,62,,\n")
    ((_, draw),) = curve_figures(Namespace(labels=["A"], runs=[str(tmp_path)]))
    assert draw.args[0]["A"] == {"epoch": [1, 2], "fp_top1": [60, 61], "w4_top1": [50, 51]}
    (tmp_path / "metrics.csv").write_text("epoch,fp_top1,w4_top1\n1,60,\n")
    outcome = cli("visualize.py", "--figure", "curves", "--runs", ".")
    assert outcome.code == 2 and "metrics.csv has no whole row" in outcome.err


def test_the_first_run_is_drawn_beside_each_of_the_others():
    columns = {"epoch": [1, 2, 3, 4], "fp_top1": [60, 61, 62, 63], "w4_top1": [50, 51, 52, 53]}
    sparse = {"epoch": [3, 4], "fp_top1": [64, 65], "s90_top1": [54, 55]}
    *panels, empty = training_curves({"SGD": columns, "A": columns, "B": sparse, "C": sparse}).axes
    for axis, own in zip(panels, ("A, 4 bits", "B, 90 % zeros", "C, 90 % zeros")):
        texts = [text.get_text() for text in axis.get_legend().get_texts()]
        assert texts == ["SGD, float", "SGD, 4 bits", f"{own[0]}, float", own]
    lines = [list(line.get_ydata()) for line in panels[1].lines]
    assert lines == [columns["fp_top1"], columns["w4_top1"], sparse["fp_top1"], sparse["s90_top1"]]
    assert 2 < panels[1].get_xlim()[0] < 3 < 4 < panels[1].get_xlim()[1]  # the epochs of B
    assert len(panels) == 3 and not empty.get_visible()


def test_figure_2(cli, tmp_path):
    """PSGD goes where gradient descent in the warped space goes, to the grid; gradient descent goes elsewhere."""
    paths = toy_trajectories()
    plain, psgd, warped = (paths[name] for name in ("gradient descent", "PSGD", "gradient descent in the warped space"))
    assert numpy.abs(psgd - warped).max() < 0.01 < numpy.abs(psgd - plain).max()
    assert numpy.abs(psgd[-1] - (0, 1)).max() < 0.01 and numpy.abs(plain[-1] - (0.62, 0.42)).max() < 1e-6
    assert cli("visualize.py", "--figure", "2", "--out", "p").code == 0
    assert (tmp_path / "p/figure2.png").stat().st_size > 20_000


def test_figure_3(cli, tmp_path, digits_run):
    flags = ["--model_path", digits_run, digits_run, "--labels", "SGD", "PSGD", "--sparsity", "0.75", "--out", "p"]
    assert cli("visualize.py", "--figure", "3", *flags).code == 0
    assert (tmp_path / "p/figure3.png").stat().st_size > 10_000
    (axis,) = sparse_histograms({"mine": torch.tensor([-4.0, 1.0, 2.0, -3.0])}, 0.75).axes
    assert axis.get_yscale() == "log" and axis.get_title() == "mine: 75 % are within ±3"
    assert sum(patch.get_height() for patch in axis.patches[:201]) == 4


def test_grid_of_bit_widths(cli, tmp_path, digits_run):
    flags = ["--model_path", digits_run, "--w_bit", "32", "2", "--a_bit", "32", "2", "--calib_images", "64"]
    flags += ["--val_split", "16"]
    assert cli("eval.py", *flags, "--out", "a").code == 0
    outcome = cli("visualize.py", "--figure", "grid", "--results", "a/results.csv", "--out", "fig")
    assert outcome.code == 0 and (tmp_path / "fig/grid.png").stat().st_size > 10_000, outcome.err
    (axis,) = accuracy_grids({"SGD 3": {(32, 32): 90.0, (32, 2): 50.0, (2, 32): 10.0, (2, 2): 5.0}}).axes
    assert [text.get_text() for text in axis.texts] == ["90.0", "50.0", "10.0", "5.0"]
    assert [tick.get_text() for tick in axis.get_yticklabels()] == ["float", "W2"]
    assert [tick.get_text() for tick in axis.get_xticklabels()] == ["float", "A2"]
    cells = {(32, 32): 90.0, (2, 32): 10.0, (2, 2): 5.0}  # a row of one figure would be an empty row
    (axis,) = accuracy_grids({"SGD 3": cells}).axes
    assert [tick.get_text() for tick in axis.get_yticklabels()] == ["W2"]
    assert axis.get_title() == "SGD 3: top-1 in percent (90.0 in float)"


def test_bars_of_a_report(cli, tmp_path):
    text = "model,layer,bits,sqnr,top1_lost\na,conv1,4,20,1.5\na,fc,4,10,-0.5\nb,conv1,4,30,0\nb,fc,4,15,2\n"
    (tmp_path / "layers.csv").write_text(text)
    outcome = cli("visualize.py", "--figure", "report", "--results", "layers.csv", "--out", "fig")
    assert outcome.code == 0 and (tmp_path / "fig/report.png").stat().st_size > 10_000, outcome.err
    models = {
        "a": [{"layer": "conv1", "sqnr": "20", "top1_lost": "1.5"}, {"layer": "fc", "sqnr": "9", "top1_lost": "-1"}]
    }
    top, bottom = layer_bars(models).axes
    assert [bar.get_height() for bar in top.containers[0]] == [1.5, -1]
    assert [bar.get_height() for bar in bottom.containers[0]] == [20, 9]
    assert [tick.get_text() for tick in bottom.get_xticklabels()] == ["conv1", "fc"]


def test_shares_over_lambda_s(cli, tmp_path):
    rows = ["arm,lambda_s,share", "update,300,0.9", "gradient,30,0.2", "update,30,0.3", "update_outside,30,0.4"]
    (tmp_path / "r.csv").write_text("\n".join(rows))
    flags = ["--figure", "lambda_s", "--results", "r.csv", "--out", "fig"]
    assert cli("visualize.py", *flags).code == 0 and (tmp_path / "fig/lambda_s.png").stat().st_size > 10_000
    ((_, draw),) = lambda_s_figures(Namespace(results=[str(tmp_path / "r.csv")]))
    (axis,) = draw().axes
    lines = [list(zip(*line.get_data())) for line in axis.lines]
    assert lines[:2] == [[(30, pytest.approx(30)), (300, pytest.approx(90))], [(30, pytest.approx(20))]]
    told = [text.get_text() for text in axis.get_legend().get_texts()]
    assert (
        told == [*(f"PSG on the {arm}" for arm in ("update", "gradient", "update_outside")), "chance"]
        and axis.get_xscale() == "log"
    )


def test_bad_input_of_figures(rejected, tmp_path):
    (tmp_path / "metrics.csv").write_text("epoch\n1\n")
    flags = ["--figure", "curves", "--runs", "."]
    assert "metrics.csv lacks the column fp_top1: it is not a metrics.csv" in rejected("visualize.py", *flags)
    (tmp_path / "metrics.csv").write_text("epoch,fp_top1\n1,60\n")
    assert "metrics.csv has no top-1 at a bit-width or sparsity" in rejected("visualize.py", *flags)
    (tmp_path / "metrics.csv").write_text("epoch,fp_top1,w4_top1\n1,60,50\n2,sixty,50\n")
    assert "metrics.csv, line 3: fp_top1 is 'sixty' instead of a number" in rejected("visualize.py", *flags)
    (tmp_path / "r.csv").write_text("trained,epoch,seed,w_bit,a_bit,post,top1\nSGD,150,1,4,32,none,68\n")
    assert "r.csv lacks the column weight_mse" in rejected("visualize.py", "--figure", "1a", "--results", "r.csv")
    (tmp_path / "r.csv").write_text(
        "trained,epoch,seed,w_bit,a_bit,post,top1,weight_mse\nPSGD W4,150,1,4,32,none,68,0\n"
    )
    assert "has no row of a network trained with SGD" in rejected(
        "visualize.py", "--figure", "1a", "--results", "r.csv"
    )
    flags = ["--figure", "report", "--results", "r.csv"]
    assert "r.csv lacks the column model: it is not a layers.csv" in rejected("visualize.py", *flags)


def test_bad_input(rejected, digits_run, tmp_path):
    model = ["--model_path", digits_run]
    state = build_model("squeezenet1_1", 10).state_dict()
    save_checkpoint(tmp_path / "s.pth", {"state_dict": state, "arch": "squeezenet1_1", "num_classes": 10, "args": {}})
    assert "s.pth have no quantized layer in common" in rejected("visualize.py", *model, "s.pth")
    assert "no quantized layer 'conv9'; the layers are conv1.weight, " in rejected(
        "visualize.py", *model, "--layers", "conv9"
    )
