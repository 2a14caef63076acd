"""Draws figures: each function takes plain values and returns a matplotlib figure.

Without a display, call matplotlib.use("Agg") first.
"""

import math
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any

import numpy
import seaborn
from matplotlib import pyplot
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from quant import Grid, expected_share
from quant.grid import snap
from utils.drawing.text import add_legend, as_written

COLORS = {"SGD": "#3b6fb6", "PSGD": "#c8443c"}  # the paper's blue and red
OTHER_COLORS = ["#4c9a5b", "#8a63a8", "#c98a2b", "#2a9d9d", "#7a7a7a", "#d36ba6"]
BINS = 201


def color_of(label: str, position: int) -> str:
    """The paper's color for SGD and PSGD, another for each other label."""
    return COLORS.get(label, OTHER_COLORS[position % len(OTHER_COLORS)])


@as_written
def layer_histograms(name: str, weights: dict[str, Tensor], grids: dict[str, Grid]) -> Figure:
    """Figure of one layer: a column for each network of `weights`, by label, float weights above quantized ones.

    Thin lines mark the points of the grid, up to 5 bits. With a grid for each output channel, the axis counts steps of
    each weight's own channel, so that one grid serves all channels.
    """
    snapped = {label: snap(weight, grids[label]) for label, weight in weights.items()}
    bits = next(iter(grids.values())).bits
    whole = [weight.abs().max().item() for label, weight in weights.items() if not grids[label].per_channel]
    limit = max(whole, default=0.0)
    figure, axes = pyplot.subplots(
        2, len(weights), figsize=(1 + 4.6 * len(weights), 5.6), sharex="col", sharey=True, squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for column, (label, weight) in enumerate(weights.items()):
        quantized, scale = snapped[label]
        largest, by_channel = grids[label].quant_max, grids[label].per_channel
        unit, step, end = (scale, 1.0, float(largest)) if by_channel else (1.0, scale.item(), limit)
        edges = numpy.linspace(-1.04 * end, 1.04 * end, BINS + 1)
        points = (step * numpy.arange(-largest, largest + 1)).tolist() if bits <= 5 else []
        for axis, values, kind in ((axes[0][column], weight, "float"), (axes[1][column], quantized, f"{bits} bits")):
            for point in points:
                axis.axvline(point, color="0.75", linewidth=0.6, zorder=0)
            counts, _ = numpy.histogram((values / unit).flatten().numpy(), edges)
            # One outline: 201 bars take twice as long to draw.
            axis.stairs(counts, edges, color=color_of(label, column), fill=True)
            axis.set_title(f"{label}, {kind}")
            axis.set_ylabel("weights in a bin" if column == 0 else "")
        axes[1][column].set_xlabel("weight, in steps of its channel's grid" if by_channel else "weight")
    mse = ", ".join(f"{label} {(weights[label] - q).square().mean():.2e}" for label, (q, _) in snapped.items())
    lines = f"    gray lines: the {bits}-bit grid" if points else ""
    figure.suptitle(f"{name}    mean-squared error at {bits} bits: {mse}{lines}", fontsize="medium")
    return figure


@as_written
def errors_over_bits(series: dict[str, list[dict[str, str]]]) -> Figure:
    """Figure 1a: for each method bars of test error and, below them, a line of weight error (log axis) over bit-widths.

    `series` holds rows of eval.py's results by method; rows of one bit-width (seeds) are averaged. PSGD's network at
    each bit-width is the one trained for it.
    """
    widths = sorted({int(row["w_bit"]) for rows in series.values() for row in rows} - {32}, reverse=True)
    figure, (bars, lines) = pyplot.subplots(2, 1, figsize=(6.4, 6.4), sharex=True, layout="constrained")
    share = 0.8 / len(series)
    legend, heights = {}, []
    for position, (label, rows) in enumerate(series.items()):
        color = color_of(label, position)
        own = [[row for row in rows if int(row["w_bit"]) == width] for width in widths]
        places = [place for place, found in enumerate(own) if found]
        if not places:
            continue
        errors = [float(numpy.mean([100 - float(row["top1"]) for row in own[place]])) for place in places]
        mses = [float(numpy.mean([float(row["weight_mse"]) for row in found])) if found else math.nan for found in own]
        shift = (position - (len(series) - 1) / 2) * share
        drawn = draw_bars(bars, numpy.add(places, shift), errors, share, 105, color=color)
        told = [f"{error:.1f}" if numpy.isfinite(error) else "" for error in errors]
        bars.bar_label(drawn, told, fontsize="small", padding=3, rotation=90)  # side by side they would overlap
        on_axis = [mse if 0 < mse < math.inf else math.nan for mse in mses]
        lines.plot(range(len(widths)), on_axis, "o-", color=color)
        legend[label] = whole_bar(drawn)
        heights += on_axis
        for place in places:
            mark_off_axis(lines, place, mses[place], color)
    bars.set_ylabel("top-1 test error, percent")
    bars.set_ylim(0, 125)  # room for the numbers
    bars.set_yticks(range(0, 101, 20))
    log_scale(lines, heights)
    lines.set_xticks(range(len(widths)), [f"W{width}" for width in widths])
    lines.set_xlabel("bit-width of the weights\n(PSGD: trained for that bit-width)")
    lines.set_ylabel("mean-squared error\nof the weights")
    lines.grid(alpha=0.3)
    columns = min(len(legend), 2)
    add_legend(figure, legend.values(), [*legend], loc="outside upper center", fontsize="small", ncols=columns)
    return figure


def log_scale(axis, heights: Iterable[float]) -> None:
    """Makes the y axis of `axis`, on which `heights` are drawn, logarithmic, even if none is above 0."""
    axis.set_yscale("log")
    if not any(height > 0 for height in heights):
        axis.set_ylim(1e-6, 1)


def mark_off_axis(axis, place: float, value: float, color: str) -> None:
    """Marks a `value` at `place` that a logarithmic axis cannot show: 0 at its lower end, infinity at its upper one."""
    if 0 < value < numpy.inf:
        return
    name, height, marker = ("∞", 0.97, "^") if value == numpy.inf else (f"{value:g}", 0.03, "v")
    across = axis.get_xaxis_transform()  # x in data, y as a share of the axis
    axis.plot(place, height, marker, color=color, transform=across)
    axis.annotate(name, (place, height), (6, 0), xycoords=across, textcoords="offset points", va="center", color=color)


def draw_bars(axis, places, heights: Sequence[float], width: float, end: float, **style):
    """Bars of `heights` at `places`. An infinite one is hatched and ends at `end`, with ∞ there; a height that is not a
    number is marked "nan"."""
    drawn = axis.bar(places, numpy.nan_to_num(heights, nan=0.0, posinf=end, neginf=-end), width, **style)
    for bar, height in zip(drawn, heights):
        if not numpy.isfinite(height):
            at = (bar.get_x() + bar.get_width() / 2, bar.get_height())
            name = "nan"
            if numpy.isinf(height):
                name = "∞" if height > 0 else "-∞"
                bar.set(hatch="///", edgecolor="white")
            axis.annotate(name, at, ha="center", va="top" if height < 0 else "bottom", fontsize="small")
            axis.margins(y=0.12)  # room for the text
    return drawn


def whole_bar(drawn):
    """The bar for a legend: the first of `drawn` that is not hatched, or else the first."""
    return next((bar for bar in drawn if not bar.get_hatch()), drawn[0])


def beyond(heights: Iterable[float]) -> float:
    """Where an infinite bar ends: a little above the largest of the others."""
    return 1.15 * max((abs(height) for height in heights if numpy.isfinite(height)), default=0) or 1.0


def target_column(columns: Iterable[str]) -> str:
    """The column of a metrics.csv with the top-1 at the run's bit-width or sparsity: w4_top1, s90_top1; else empty."""
    return next((key for key in columns if key[0] in "ws" and key.endswith("_top1")), "")


def lone_points(values: Sequence[float]) -> dict[str, Any]:
    """Style of a line that marks those of `values` without a neighbor to draw to, as in a run of one epoch."""
    finite = [False, *numpy.isfinite(values), False]
    lone = [n for n in range(len(values)) if finite[n + 1] and not (finite[n] or finite[n + 2])]
    return {"marker": "o", "markersize": 4, "markevery": lone} if lone else {}


@as_written
def training_curves(runs: dict[str, dict[str, list[float]]]) -> Figure:
    """Top-1 over epochs, solid: float, dashed: at the run's bit-width or sparsity.

    Each run after the first has a panel, over its own epochs and a few before them, where the first is drawn beside it.
    `runs` holds the columns of each run's metrics.csv by label.
    """
    first, *others = runs
    pairs = [[first, other] for other in others] or [[first]]
    across = min(2, len(pairs))
    down = math.ceil(len(pairs) / across)
    figure, axes = pyplot.subplots(
        down, across, figsize=(0.8 + 3.2 * across, 0.6 + 3.4 * down), sharey=True, squeeze=False, layout="constrained"
    )
    for axis in axes.flat[len(pairs) :]:
        axis.set_visible(False)
    for axis, pair in zip(axes.flat, pairs):
        labels = []
        for label, color in zip(pair, COLORS.values()):
            columns = runs[label]
            low = target_column(columns)
            axis.plot(columns["epoch"], columns["fp_top1"], color=color, **lone_points(columns["fp_top1"]))
            axis.plot(columns["epoch"], columns[low], "--", color=color, **lone_points(columns[low]))
            number = low[1:].removesuffix("_top1")
            labels += [f"{label}, float", f"{label}, {number} bits" if low[0] == "w" else f"{label}, {number} % zeros"]
        own = runs[pair[-1]]["epoch"]
        axis.set_xlim(own[0] - 0.1 * len(own), own[-1] + 0.05 * len(own))
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
        axis.set_xlabel("epoch")
        axis.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        add_legend(axis, axis.lines, labels, fontsize="small", loc="best")
    for axis in axes[:, 0]:
        axis.set_ylabel("top-1 accuracy, percent")
    return figure


@as_written
def accuracy_grids(groups: dict[str, dict[tuple[int, int], float]]) -> Figure:
    """A heat map of top-1 for each network: weight bit-widths down, activation bit-widths across; 32 is float.

    `groups` holds top-1 in percent by (w_bit, a_bit) for each network. If float weights were evaluated only with float
    activations, that figure stands in the title instead of in a row of its own.
    """
    cells = {place for places in groups.values() for place in places}
    in_title = {a for w, a in cells if w == 32} == {32} and len(cells) > 1
    cells -= {(32, 32)} if in_title else set()
    widths = sorted({w for w, _ in cells}, reverse=True)
    depths = sorted({a for _, a in cells}, reverse=True)
    figure, axes = pyplot.subplots(
        len(groups), 1, figsize=(1.2 + 0.62 * len(depths), (1.1 + 0.42 * len(widths)) * len(groups)),
        squeeze=False, layout="constrained",
    )  # fmt: skip
    for axis, (label, found) in zip(axes[:, 0], groups.items()):
        values = numpy.array([[found.get((w, a), numpy.nan) for a in depths] for w in widths])
        finite = numpy.where(numpy.isfinite(values), values, numpy.nan)
        seaborn.heatmap(
            finite, ax=axis, annot=True, fmt=".1f", cmap="viridis", vmin=0, cbar=False,
            vmax=None if numpy.isfinite(values).any() else 1,
            xticklabels=["float" if a == 32 else f"A{a}" for a in depths],
            yticklabels=["float" if w == 32 else f"W{w}" for w in widths],
        )  # fmt: skip
        for w, a in cells & found.keys():
            if not math.isfinite(found[w, a]):
                place = depths.index(a) + 0.5, widths.index(w) + 0.5
                axis.text(*place, f"{found[w, a]:g}", ha="center", va="center")
        told = f" ({found[32, 32]:.1f} in float)" if in_title and (32, 32) in found else ""
        axis.set_title(f"{label}: top-1 in percent{told}")
        axis.set_ylabel("weights")
        axis.tick_params(axis="y", rotation=0)
    axes[-1][0].set_xlabel("activations")
    return figure


@as_written
def layer_bars(models: dict[str, list[dict[str, str]]]) -> Figure:
    """For each layer, bars of the top-1 lost when only this layer is quantized and of its signal to quantization noise.

    `models` holds the rows of eval.py --report by model; all need the same layers. A layer whose weights lie exactly
    on its grid has no noise: its bar is infinite (`draw_bars`).
    """
    names = [row["layer"] for row in next(iter(models.values()))]
    figure, (top, bottom) = pyplot.subplots(2, 1, figsize=(11, 7), sharex=True, layout="constrained")
    share = 0.8 / len(models)
    columns = {key: [[float(row[key]) for row in rows] for rows in models.values()] for key in ("top1_lost", "sqnr")}
    ends = {key: beyond(chain(*values)) for key, values in columns.items()}
    handles: list = []
    colors = [*COLORS.values()] if len(models) <= len(COLORS) else OTHER_COLORS
    for position in range(len(models)):
        color = colors[position % len(colors)]
        places = numpy.arange(len(names)) + (position - (len(models) - 1) / 2) * share
        for axis, (key, values) in zip((bottom, top), reversed(columns.items())):
            bars = draw_bars(axis, places, values[position], share, ends[key], color=color)
        handles.append(whole_bar(bars))
    top.set_ylabel("points of top-1 lost if\nonly this layer is quantized")
    bottom.set_ylabel("signal to quantization\nnoise of the weights, dB")
    bottom.set_xticks(range(len(names)), names, rotation=90, fontsize="x-small")
    add_legend(top, handles, [*models], fontsize="small")
    top.axhline(0, color="0.3", linewidth=0.8)
    return figure


@as_written
def pace_of_runs(runs: dict[str, tuple[list[float], list[float]]]) -> Figure:
    """Share of weights near the grid over tau, a point an epoch, beside the curve of `expected_share`.

    `runs` holds tau and the measured share of each epoch by label. Runs whose labels agree up to a colon look alike.
    """
    figure, axis = pyplot.subplots(figsize=(8.4, 4.8), layout="constrained")
    highest = max(max(taus) for taus, _ in runs.values())
    lowest = min(tau for taus, _ in runs.values() for tau in taus if tau > 0)
    grid = numpy.geomspace(lowest / 1.5, 1.5 * highest, 200)
    axis.plot(grid, [100 * expected_share(tau) for tau in grid], color="0.2")
    groups: dict[str, list[tuple[list[float], list[float]]]] = {}
    for label, run in runs.items():
        groups.setdefault(label.split(": ")[0], []).append(run)
    legend = {"the law": axis.lines[0]}
    palette = seaborn.color_palette("husl", len(groups))
    for (group, members), color, marker in zip(groups.items(), palette, "osD^vP*X" * len(groups)):
        for taus, shares in members:
            (legend[group],) = axis.plot(
                taus, [100 * share for share in shares], marker, color=color, markersize=4.5, alpha=0.7
            )
    axis.set_xscale("log")
    axis.set_ylim(0, 102)
    axis.grid(alpha=0.3)
    axis.set_title("a point for each epoch of a stage", fontsize="medium")
    axis.set_xlabel("tau: variance of log |w - Q(w)|")
    axis.set_ylabel("weights within a tenth of\na step of the grid, percent")
    add_legend(figure, legend.values(), [*legend], loc="outside right upper", fontsize="small")
    return figure


@as_written
def shares_over_lambda_s(series: dict[str, list[tuple[float, float]]]) -> Figure:
    """Share of weights near the grid over lambda_s, a line for each arm of `series`, and the share that is chance."""
    figure, axis = pyplot.subplots(figsize=(6.4, 4.2), layout="constrained")
    for color, marker, points in zip([*COLORS.values(), *OTHER_COLORS], "soD^vP*X", series.values()):
        axis.plot(*zip(*((lambda_s, 100 * share) for lambda_s, share in points)), f"{marker}-", color=color)
    axis.axhline(100 * expected_share(0), color="0.5", linestyle=":")
    axis.set_xscale("log")
    values = sorted({lambda_s for points in series.values() for lambda_s, _ in points})
    axis.set_xticks(values, [f"{value:g}" for value in values])
    axis.minorticks_off()
    axis.set_ylim(0, 102)
    axis.grid(alpha=0.3)
    axis.set_xlabel("lambda_s")
    axis.set_ylabel("weights within a tenth of\na step of the grid, percent")
    add_legend(axis, axis.lines, [*(f"PSG on the {arm}" for arm in series), "chance"], fontsize="small")
    return figure
