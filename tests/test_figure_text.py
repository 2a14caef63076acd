"""Text in figures: as it is written, whatever characters it has; and figures of numbers that are none."""

import warnings

import matplotlib.image
import pytest
import torch
from matplotlib import font_manager, pyplot
from matplotlib.text import Text

import visualize
from quant import Grid
from utils.drawing import text as drawing_text
from utils.drawing.paper_figures import curvature, sparse_histograms
from utils.drawing.result_figures import (
    accuracy_grids,
    errors_over_bits,
    layer_bars,
    layer_histograms,
    pace_of_runs,
    shares_over_lambda_s,
    training_curves,
)
from utils.drawing.text import LAST_RESORT, add_legend, as_written, save_png

ODD = ["_hidden", "$x", r"$\frac{1}{$", "a$b$_c^2", "%s{0}", "two\nlines", r"\$5", "#&~"]
REPORT = "model,layer,bits,sqnr,top1_lost\n"
RESULTS = "trained,epoch,seed,w_bit,a_bit,post,top1,weight_mse\n"


def texts(figure):
    return "\n".join(text.get_text() for text in figure.findobj(Text))


def row(top1, mse, width="4"):
    return {"w_bit": width, "top1": str(top1), "weight_mse": str(mse)}


FIGURES = {
    "layers": lambda label: layer_histograms(label, {label: torch.tensor([1.0, 0.3])}, {label: Grid(4)}),
    "1a": lambda label: errors_over_bits({label: [row(50, 1e-3)]}),
    "curves": lambda label: training_curves({label: {"epoch": [1.0], "fp_top1": [1.0], "w4_top1": [2.0]}}),
    "grid": lambda label: accuracy_grids({label: {(32, 32): 90.0, (4, 8): 50.0}}),
    "report": lambda label: layer_bars({label: [{"layer": label, "sqnr": "9", "top1_lost": "1"}]}),
    "pace": lambda label: pace_of_runs({label: ([0.1, 1.0], [0.3, 0.5])}),
    "lambda_s": lambda label: shares_over_lambda_s({label: [(10.0, 0.2), (100.0, 0.5)]}),
    "3": lambda label: sparse_histograms({label: torch.tensor([1.0, 0.3])}, 0.5),
    "4": lambda label: curvature({label: [[1.0, 2.0], [1.0, 2.0]]}, {label: [[1.0, 2.0], [1.0, 2.0]]}),
}


@pytest.fixture(autouse=True)
def without_display():
    matplotlib.use("Agg")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield
    pyplot.close("all")


def test_no_figure_with_labels_is_forgotten():
    assert {*FIGURES, "2", "lasso"} == {*visualize.FIGURES}  # these two have only texts of their own


# `as_written` treats the texts of all figures alike, so each figure meets two of the labels, and one meets all.
@pytest.mark.parametrize(("name", "label"), [(name, label) for name in FIGURES for label in (ODD[0], ODD[2])]
                         + [("curves", label) for label in ODD if label not in (ODD[0], ODD[2])])  # fmt: skip
def test_labels_are_shown_as_they_are(tmp_path, name, label):
    figure = FIGURES[name](label)
    save_png(figure, tmp_path / "x.png")
    assert label in texts(figure)
    assert not any(text.get_parse_math() for text in figure.findobj(Text) if label in text.get_text())
    legends = [*figure.legends, *(axis.get_legend() for axis in figure.axes if axis.get_legend())]
    if name == "pace":
        assert [text.get_text() for text in legends[0].get_texts()] == ["the law", label]
    if name in ("1a", "curves", "report", "4"):
        assert legends and all(text.get_text().startswith(label) for text in legends[0].get_texts())


def test_numbers_at_a_logarithmic_axis_stay_powers(tmp_path):
    figure = errors_over_bits({"$": [row(50, 1e-3), row(60, 1e-5, "8")]})
    save_png(figure, tmp_path / "x.png")
    ticks = [text for text in figure.axes[1].get_yticklabels() if text.get_text()]
    assert ticks and all("mathdefault" in tick.get_text() and tick.get_parse_math() for tick in ticks)


@pytest.fixture
def rare():
    """A character that this machine's default font lacks and another of its fonts has."""
    first = drawing_text.file_of("sans-serif")
    for name in {font.name for font in font_manager.fontManager.ttflist}:
        if LAST_RESORT not in name:
            found = [*font_manager.get_font(drawing_text.file_of(name)).get_charmap()]
            lacking = drawing_text._lacks(first, (chr(code) for code in found if 160 < code < 2**16))
            if lacking:
                return min(lacking)
    pytest.skip("no other font has a character more")


def test_characters_of_another_font(tmp_path, capsys, rare):
    figure = FIGURES["curves"](rare)
    save_png(figure, tmp_path / "x.png")
    (text, _) = figure.axes[0].get_legend().get_texts()
    assert len(text.get_fontfamily()) > 1 and rare not in capsys.readouterr().err


def test_characters_that_no_font_has_are_one_warning(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(drawing_text, "_told", set())
    unassigned = "\U000e0fff\U0003ffff"
    for _ in range(2):
        save_png(FIGURES["curves"](f"x{unassigned}"), tmp_path / "x.png")
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: no font here has ") and line.endswith("give other names, or install a font")


def test_a_path_that_is_no_unicode(tmp_path):
    save_png(FIGURES["curves"](b"a\xff".decode(errors="surrogateescape")), tmp_path / "x.png")


def test_a_legend_of_hidden_names(tmp_path):
    axis = pyplot.subplots()[1]
    lines = axis.plot([1], [1]) + axis.plot([1], [2])
    assert [text.get_text() for text in add_legend(axis, lines, ["_a", "_b"]).get_texts()] == ["_a", "_b"]

    @as_written
    def draw():
        return axis.figure

    assert draw() is axis.figure


def test_a_layer_on_its_grid_is_no_layer_without_signal(tmp_path):
    """Its bar is above the highest of all networks and says why."""
    models = {
        name: [{"layer": layer, "sqnr": sqnr, "top1_lost": "1"} for layer, sqnr in zip("xyz", values)]
        for name, values in (("a", ("20", "inf", "-3")), ("b", ("30", "nan", "-inf")))
    }
    figure = layer_bars(models)
    save_png(figure, tmp_path / "x.png")
    _, bottom = figure.axes
    first, second = ([bar.get_height() for bar in bars] for bars in bottom.containers)
    assert first == [20, pytest.approx(34.5), -3] and second == [30, 0, pytest.approx(-34.5)]
    assert [text.get_text() for text in bottom.texts] == ["∞", "nan", "-∞"]
    assert bottom.get_ylim()[0] < -34.5 and bottom.get_ylim()[1] > 34.5
    on_grid = layer_bars({"a": [{"layer": "x", "sqnr": "inf", "top1_lost": "0"}]})
    assert on_grid.axes[1].containers[0][0].get_height() > 0


def test_weight_errors_that_a_logarithmic_axis_has_not(tmp_path):
    found = [row(50, 0.0), row(60, 1e-5, "8"), row(70, "inf", "6"), row("nan", "nan", "3")]
    figure = errors_over_bits({"SGD": found, "PSGD": []})
    save_png(figure, tmp_path / "x.png")
    bars, lines = figure.axes
    assert sorted(text.get_text() for text in lines.texts) == ["0", "nan", "∞"]
    assert [text.get_text() for text in bars.texts if text.get_text()] == ["nan", "40.0", "30.0", "50.0"]
    save_png(errors_over_bits({"SGD": [row(50, 0)]}), tmp_path / "x.png")  # and no other


def test_cells_that_are_no_numbers(tmp_path):
    figure = accuracy_grids(
        {"a": {(32, 32): 90.0, (4, 32): float("nan"), (4, 8): float("inf")}, "b": {(4, 8): float("nan")}}
    )
    save_png(figure, tmp_path / "x.png")
    assert sorted(text.get_text() for text in figure.axes[0].texts) == ["inf", "nan"]
    assert [axis.get_title() for axis in figure.axes] == ["a: top-1 in percent (90.0 in float)", "b: top-1 in percent"]
    assert [text.get_text() for text in figure.axes[1].texts] == ["nan"]


def test_a_point_without_neighbours_is_marked(tmp_path):
    columns = {"epoch": [1.0, 2.0, 3.0, 4.0], "fp_top1": [1, float("nan"), 2, 3], "w4_top1": [1, 2, 3, 4]}
    figure = training_curves({"a": columns})
    save_png(figure, tmp_path / "x.png")
    floats, quantized = figure.axes[0].lines
    assert floats.get_markevery() == [0] and floats.get_marker() == "o" and quantized.get_marker() == "None"
    (line, _) = FIGURES["curves"]("a").axes[0].lines
    assert line.get_markevery() == [0]  # a run of one epoch


def test_weights_of_nothing_but_zeros(tmp_path):
    save_png(sparse_histograms({"a": torch.zeros(300), "b": torch.zeros(300)}, 0.9), tmp_path / "x.png")
    nearly = torch.zeros(300)
    nearly[0] = 2
    figure = sparse_histograms({"a": nearly}, 0.9)
    assert sum(patch.get_height() for patch in figure.axes[0].patches[:201]) == 300
    save_png(layer_histograms("x", {"a": torch.zeros(4, 2)}, {"a": Grid(4)}), tmp_path / "x.png")
    save_png(curvature({"a": [[0.0, 0.0], [0.0, 0.0]]}, {"": [[1.0], [1.0]]}), tmp_path / "x.png")


def test_the_command(cli, rejected, tmp_path):
    """Labels and folders as a shell passes them on, and nothing on stderr."""
    (tmp_path / "$a$").mkdir()
    (tmp_path / "$a$/metrics.csv").write_text("epoch,fp_top1,w4_top1\n1,60,50\n")
    outcome = cli("visualize.py", "--figure", "curves", "--runs", "$a$", "--out", "$b_{$")
    assert outcome.code == 0 and outcome.err == "" and (tmp_path / "$b_{$/curves.png").stat().st_size > 10_000
    (tmp_path / "layers.csv").write_text(REPORT + "_$a,_$x,4,inf,1.5\n_$a,fc,4,10,nan\n")
    outcome = cli("visualize.py", "--figure", "report", "--results", "layers.csv", "--out", "p")
    assert outcome.code == 0 and outcome.err == "" and (tmp_path / "p/report.png").exists()
    (tmp_path / "r.csv").write_text(RESULTS + "SGD,150,1,32,32,none,70,0\n")
    message = rejected("visualize.py", "--figure", "1a", "--results", "r.csv")
    assert "r.csv has no row with quantized weights: evaluate with --w_bit" in message
    (tmp_path / "digits.csv").write_text("network,weight,eigenvalue\nSGD,1,nan\n")
    message = rejected("visualize.py", "--figure", "4", "--results", ".")
    assert "digits.csv: eigenvalue is nan, which cannot be drawn" in message
