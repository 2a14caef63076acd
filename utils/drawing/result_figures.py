"""The drawing of the figures: each function takes plain values and returns a matplotlib figure.

Call matplotlib.use("Agg") before where there is no display.
"""

from collections.abc import Collection, Iterable

import numpy
import seaborn
from matplotlib import pyplot

from quant import Grid, fake_quantize_weight, weight_scale
from quant.grid import weight_quant_max

COLORS = {"SGD": "#3b6fb6", "PSGD": "#c8443c"}  # the paper's blue and red
OTHER_COLORS = ["#4c9a5b", "#8a63a8", "#c98a2b", "#2a9d9d", "#7a7a7a", "#d36ba6"]
BINS = 201


def color_of(label: str, position: int) -> str:
    """The paper's color for SGD and PSGD, another for each other label."""
    return COLORS.get(label, OTHER_COLORS[position % len(OTHER_COLORS)])


def layer_histograms(name: str, weights: dict, width: int, by_channel: Collection[str] = ()):
    """Figure of one layer: a column for each network of `weights` (label -> tensor), float above quantized.

    Thin lines mark the points of the grid, up to 5 bits. The labels in `by_channel` have a grid for each output
    channel: their axis counts steps, each weight's of its own channel, so that one grid shows them all.
    """
    quantized = {
        label: fake_quantize_weight(weight, Grid(width, per_channel=label in by_channel))
        for label, weight in weights.items()
    }
    largest = weight_quant_max(width)
    limit = max((weight.abs().max().item() for label, weight in weights.items() if label not in by_channel), default=0)
    figure, axes = pyplot.subplots(
        2, len(weights), figsize=(1 + 4.6 * len(weights), 5.6), sharex="col", sharey="row", squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for column, (label, weight) in enumerate(weights.items()):
        color, scale = color_of(label, column), weight_scale(weight, Grid(width, per_channel=label in by_channel))
        unit, step, end = (scale, 1, largest) if label in by_channel else (1, scale.item(), limit)
        edges = numpy.linspace(-1.04 * end, 1.04 * end, BINS + 1)
        points = step * numpy.arange(-largest, largest + 1) if width <= 5 else []
        rows = ((axes[0][column], weight, "float"), (axes[1][column], quantized[label], f"{width} bits"))
        for axis, values, kind in rows:
            for point in points:
                axis.axvline(point, color="0.75", linewidth=0.6, zorder=0)
            counts, _ = numpy.histogram((values / unit).flatten().numpy(), edges)
            axis.stairs(counts, edges, color=color, fill=True)  # one outline: 201 bars take twice the time to draw
            axis.set_title(f"{label}, {kind}")
            axis.set_ylabel("weights in a bin" if column == 0 else "")
        axes[1][column].set_xlabel("weight, in steps of its channel's grid" if label in by_channel else "weight")
    mse = ", ".join(f"{k} {(w - quantized[k]).square().mean():.2e}" for k, w in weights.items())
    figure.suptitle(f"{name}    mean-squared error at {width} bits: {mse}", fontsize="medium")
    return figure


def errors_over_bits(series: dict[str, list[dict[str, str]]]):
    """Figure 1a: for each method a line of weight error (log axis) and bars of test error over bit-widths.

    `series` holds rows of eval.py's results by method; rows of one bit-width (seeds) are averaged. PSGD's network at
    each bit-width is the one trained for it.
    """
    widths = sorted({int(row["w_bit"]) for rows in series.values() for row in rows} - {32}, reverse=True)
    figure, bars = pyplot.subplots(figsize=(7.6, 4.6), layout="constrained")
    lines = bars.twinx()
    lines.set_zorder(bars.get_zorder() + 1)  # lines over bars
    share = 0.8 / len(series)
    for position, (label, rows) in enumerate(series.items()):
        color = color_of(label, position)
        own = [[row for row in rows if int(row["w_bit"]) == width] for width in widths]
        places = [place for place, found in enumerate(own) if found]
        errors = [numpy.mean([100 - float(row["top1"]) for row in own[place]]) for place in places]
        mses = [numpy.mean([float(row["weight_mse"]) for row in found]) if found else numpy.nan for found in own]
        shift = (position - (len(series) - 1) / 2) * share
        drawn = bars.bar(numpy.add(places, shift), errors, share, color=color, alpha=0.45, label=f"{label}, test error")
        bars.bar_label(drawn, fmt="%.1f", fontsize="x-small", label_type="center")  # clear of the lines
        lines.plot(range(len(widths)), mses, "o-", color=color, label=f"{label}, weight error")
    bars.set_xticks(range(len(widths)), [f"W{width}" for width in widths])
    bars.set_xlabel("bit-width of the weights (PSGD: trained for that bit-width)")
    bars.set_ylabel("top-1 test error in percent (bars)")
    bars.set_ylim(0, 105)
    lines.set_yscale("log")
    lines.set_ylabel("mean-squared error of the weights (lines)")
    handles = [pair for axis in (bars, lines) for pair in zip(*axis.get_legend_handles_labels())]
    figure.legend(*zip(*handles), loc="outside upper center", fontsize="small", ncols=2)
    return figure


def target_column(columns: Iterable[str]) -> str | None:
    """The column of a metrics.csv with the top-1 at the run's bit-width or sparsity: w4_top1, s90_top1, ..."""
    return next((key for key in columns if key[0] in "ws" and key.endswith("_top1")), None)


def training_curves(runs: dict[str, dict[str, list[float]]]):
    """Top-1 (solid: float, dashed: at the run's bit-width or sparsity) and share of weights near the grid, over epochs.

    `runs` holds the columns of each run's metrics.csv by label.
    """
    figure, (top, bottom) = pyplot.subplots(2, 1, figsize=(9.5, 6), sharex=True, layout="constrained")
    for position, (label, columns) in enumerate(runs.items()):
        color = color_of(label, position)
        low = target_column(columns)
        top.plot(columns["epoch"], columns["fp_top1"], color=color, label=f"{label}, float")
        number = low[1:].removesuffix("_top1")
        low_label = f"{label}, {number} bits" if low[0] == "w" else f"{label}, {number} % zeros"
        top.plot(columns["epoch"], columns[low], "--", color=color, linewidth=1.2, label=low_label)
        if "grid_share" in columns:
            bottom.plot(columns["epoch"], [100 * share for share in columns["grid_share"]], color=color)
    top.set_ylabel("top-1 accuracy in percent")
    bottom.set_ylabel("weights within a tenth of\na step of the grid, percent")
    bottom.set_ylim(0, 100)
    bottom.set_xlabel("epoch")
    bottom.set_visible(bool(bottom.lines))  # sparse runs alone have no grid
    for axis in (top, bottom):
        axis.grid(alpha=0.3)
    figure.legend(*top.get_legend_handles_labels(), loc="outside right upper", fontsize="small")
    return figure


def accuracy_grids(groups: dict[str, dict[tuple[int, int], float]]):
    """A heat map of top-1 for each network: weight bit-widths down, activation bit-widths across; 32 is float.

    `groups` holds top-1 in percent by (w_bit, a_bit) for each network.
    """
    widths = sorted({w for cells in groups.values() for w, _ in cells}, reverse=True)
    depths = sorted({a for cells in groups.values() for _, a in cells}, reverse=True)
    figure, axes = pyplot.subplots(
        1, len(groups), figsize=(1.5 + (1.2 + 0.75 * len(depths)) * len(groups), 1.6 + 0.5 * len(widths)),
        squeeze=False, layout="constrained",
    )  # fmt: skip
    for axis, (label, cells) in zip(axes[0], groups.items()):
        values = numpy.array([[cells.get((w, a), numpy.nan) for a in depths] for w in widths])
        seaborn.heatmap(
            values, ax=axis, annot=True, fmt=".1f", cmap="viridis", vmin=0, cbar=False,
            xticklabels=["float" if a == 32 else f"A{a}" for a in depths],
            yticklabels=["float" if w == 32 else f"W{w}" for w in widths],
        )  # fmt: skip
        axis.set_title(f"{label}: top-1 in percent")
        axis.set_xlabel("bit-width of the activations")
        axis.tick_params(axis="y", rotation=0)
    axes[0][0].set_ylabel("bit-width of the weights")
    return figure


def layer_bars(models: dict[str, list[dict[str, str]]]):
    """For each layer, bars of the top-1 lost when it alone is quantized and of its signal to quantization noise.

    `models` holds the rows of eval.py --report by model, which need the same layers.
    """
    names = [row["layer"] for row in next(iter(models.values()))]
    figure, (top, bottom) = pyplot.subplots(2, 1, figsize=(11, 7), sharex=True, layout="constrained")
    share = 0.8 / len(models)
    colors = [*COLORS.values()] if len(models) <= len(COLORS) else OTHER_COLORS
    for position, (label, rows) in enumerate(models.items()):
        color = colors[position % len(colors)]
        places = numpy.arange(len(rows)) + (position - (len(models) - 1) / 2) * share
        top.bar(places, [float(row["top1_lost"]) for row in rows], share, color=color, label=label)
        bottom.bar(places, [float(row["sqnr"]) for row in rows], share, color=color)
    top.set_ylabel("points of top-1 lost if\nonly this layer is quantized")
    bottom.set_ylabel("signal to quantization\nnoise of the weights, dB")
    bottom.set_xticks(range(len(names)), names, rotation=90, fontsize="x-small")
    top.legend(fontsize="small")
    top.axhline(0, color="0.3", linewidth=0.8)
    return figure
