"""Draw weights, results and training curves as PNG files.

A histogram of every layer of the shipped SGD and PSGD networks, float and quantized, into visualizations/
  python visualize.py

Some layers of other checkpoints, at 3 bits (the paper's figure 1b)
  python visualize.py --model_path runs/a/last.pth runs/b/last.pth --labels SGD PSGD --w_bit 3 \\
                      --layers conv1.weight fc.weight --out figures

The paper's figure 1a, weight error and test error over bit-widths, from the results of eval.py
  python visualize.py --figure 1a --results results/cifar100/results.csv --out fig

Accuracy and share of weights near the grid over the epochs of runs
  python visualize.py --figure curves --runs runs/vanilla runs/cifar100/4bits --labels SGD PSGD --out fig

Needs no display. In a histogram a column is a network, the upper row its float weights, the lower row the same weights
quantized; thin lines mark the points of the grid, up to 5 bits.
"""

from argparse import Namespace
from pathlib import Path

from utils.cli import Parser, UserError, bits, run

COLORS = {"SGD": "#3b6fb6", "PSGD": "#c8443c"}  # the paper's blue and red
OTHER_COLORS = ["#4c9a5b", "#8a63a8", "#c98a2b", "#3b6fb6", "#c8443c"]
BINS = 201


def parse() -> Namespace:
    p = Parser(__doc__)
    # fmt: off
    p.add_argument("--figure", choices=["layers", "1a", "curves"], default="layers",
                   help="layers: weight histograms; 1a: errors over bit-widths; curves: runs over epochs")
    p.add_argument("--model_path", nargs="+", metavar="FILE",
                   default=["models/ResNet82.pth", "models/W4_ResNet.pth"], help="layers: checkpoints")
    p.add_argument("--w_bit", type=bits, default=4, help="layers: bit-width of the quantized histograms and the grid")
    p.add_argument("--first_last_quant", type=int, choices=[0, 1], default=1,
                   help="layers: 1: first and last layer too, at 8 bits if --w_bit < 4; 0: leave them out")
    p.add_argument("--layers", nargs="+", default=None, metavar="NAME",
                   help="layers: state_dict names (default: all weights)")
    p.add_argument("--results", default="results/cifar100/results.csv", metavar="FILE", help="1a: rows of eval.py")
    p.add_argument("--runs", nargs="+", default=["runs/vanilla", "runs/cifar100/4bits"], metavar="DIR",
                   help="curves: run folders, or any folders with a metrics.csv")
    p.add_argument("--labels", nargs="+", default=None, metavar="NAME",
                   help="names of the checkpoints or runs in the pictures (default: SGD PSGD for the default ones, "
                   "else the file names)")
    p.add_argument("--out", default="visualizations", metavar="DIR", help="folder for the pictures")
    # fmt: on
    args = p.parse_args()
    flag = {"layers": "model_path", "curves": "runs"}.get(args.figure)
    if flag:
        named = getattr(args, flag)
        if args.labels is None:
            default = named == p.get_default(flag)
            args.labels = ["SGD", "PSGD"] if default else [path.removesuffix(".pth") for path in named]
        if len(args.labels) != len(named):
            raise UserError(f"{len(args.labels)} --labels for {len(named)} of --{flag}: give one for each")
        if len(set(args.labels)) < len(args.labels):
            raise UserError(f"the labels {', '.join(args.labels)} are not all different: name them with --labels")
    return args


def main() -> None:
    args = parse()

    import matplotlib

    matplotlib.use("Agg")
    import seaborn
    from matplotlib import pyplot

    seaborn.set_theme(style="ticks", context="notebook")
    figures = {"layers": layer_figures, "1a": bits_figures, "curves": curve_figures}[args.figure](args)
    out = Path(args.out)
    for number, (name, count, draw) in enumerate(figures, 1):
        out.mkdir(parents=True, exist_ok=True)
        figure = draw()
        figure.savefig(out / f"{name}.png", dpi=130)
        pyplot.close(figure)
        print(f"{number}/{count}  {out / name}.png", flush=True)


def color_of(label: str, position: int) -> str:
    """The paper's color for SGD and PSGD, another for each other label."""
    return COLORS.get(label, OTHER_COLORS[position % len(OTHER_COLORS)])


def layer_figures(args: Namespace) -> list:
    """(name, number of pictures, drawing function) for each layer."""
    from functools import partial

    from quant import layer_bits
    from utils.checkpoint import load_checkpoint, model_from_checkpoint

    networks = {}
    for label, path in zip(args.labels, args.model_path, strict=True):
        networks[label] = model_from_checkpoint(load_checkpoint(path), path)
    widths = [layer_bits(network, args.w_bit, bool(args.first_last_quant)) for network in networks.values()]
    shared = [name for name in widths[0] if name.endswith("weight") and all(name in names for names in widths)]
    unknown = [name for name in args.layers or [] if name not in shared]
    if unknown:
        raise UserError(f"no quantized layer {unknown[0]!r}; the layers are {', '.join(shared)}")
    layers = args.layers or shared
    weights = {name: {k: network.get_parameter(name).detach() for k, network in networks.items()} for name in layers}
    return [(name, len(layers), partial(layer_histograms, name, weights[name], widths[0][name])) for name in layers]


def layer_histograms(name: str, weights: dict, width: int):
    """Figure of one layer: a column for each network of `weights` (label -> tensor), float above quantized."""
    import numpy
    import seaborn
    from matplotlib import pyplot

    from quant import fake_quantize_weight, weight_scale
    from quant.grid import weight_quant_max

    limit = 1.04 * max(weight.abs().max().item() for weight in weights.values())
    edges = numpy.linspace(-limit, limit, BINS + 1)
    figure, axes = pyplot.subplots(
        2, len(weights), figsize=(1 + 4.6 * len(weights), 5.6), sharex=True, sharey="row", squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for column, (label, weight) in enumerate(weights.items()):
        color = color_of(label, column)
        quantized = fake_quantize_weight(weight, width)
        largest = weight_quant_max(width)
        points = weight_scale(weight, width).item() * numpy.arange(-largest, largest + 1) if width <= 5 else []
        for axis, values, kind in ((axes[0][column], weight, "float"), (axes[1][column], quantized, f"{width} bits")):
            for point in points:
                axis.axvline(point, color="0.75", linewidth=0.6, zorder=0)
            seaborn.histplot(
                values.flatten().numpy(), bins=edges, ax=axis, color=color, edgecolor=None, linewidth=0, alpha=1
            )
            axis.set_title(f"{label}, {kind}")
            axis.set_ylabel("weights in a bin" if column == 0 else "")
        axes[1][column].set_xlabel("weight")
    mse = ", ".join(f"{k} {(w - fake_quantize_weight(w, width)).square().mean():.2e}" for k, w in weights.items())
    figure.suptitle(f"{name}    mean-squared error at {width} bits: {mse}", fontsize="medium")
    return figure


def bits_figures(args: Namespace) -> list:
    from utils.table import read_results

    rows = [row for row in read_results(args.results) if row["a_bit"] == "32" and row["post"] == "none"]
    last = max((int(row["epoch"]) for row in rows if row["trained"] == "SGD" and row["epoch"].isdigit()), default=None)
    if last is None:
        raise UserError(f"{args.results} has no row of a network trained with SGD: evaluate one beside the others")
    series = {
        "SGD": [row for row in rows if row["trained"] == "SGD" and row["epoch"] == str(last)],
        "PSGD": [row for row in rows if row["trained"] == f"PSGD W{row['w_bit']}"],
    }
    return [("figure1a", 1, lambda: errors_over_bits(series))]


def errors_over_bits(series: dict[str, list[dict[str, str]]]):
    """Figure 1a: for each method a line of weight error (log axis) and bars of test error over bit-widths.

    `series` holds rows of eval.py's results by method; rows of one bit-width (seeds) are averaged. PSGD's network at
    each bit-width is the one trained for it.
    """
    import numpy
    from matplotlib import pyplot

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
        mses = [numpy.mean([float(row["weight_mse"]) for row in own[place]]) for place in places]
        shift = (position - (len(series) - 1) / 2) * share
        drawn = bars.bar(numpy.add(places, shift), errors, share, color=color, alpha=0.45, label=f"{label}, test error")
        bars.bar_label(drawn, fmt="%.1f", fontsize="x-small", padding=1)
        lines.plot(places, mses, "o-", color=color, label=f"{label}, weight error")
    bars.set_xticks(range(len(widths)), [f"W{width}" for width in widths])
    bars.set_xlabel("bit-width of the weights (PSGD: trained for that bit-width)")
    bars.set_ylabel("top-1 test error in percent (bars)")
    bars.set_ylim(0, 112)
    lines.set_yscale("log")
    lines.set_ylabel("mean-squared quantization error of the weights (lines)")
    handles = [pair for axis in (bars, lines) for pair in zip(*axis.get_legend_handles_labels())]
    lines.legend(*zip(*handles), loc="upper left", fontsize="small", ncols=2)
    return figure


def curve_figures(args: Namespace) -> list:
    import csv

    runs = {}
    for label, folder in zip(args.labels, args.runs, strict=True):
        path = Path(folder) / "metrics.csv"
        if not path.is_file():
            raise UserError(f"no {path}: --runs needs folders that train.py wrote")
        with open(path, newline="") as file:
            rows = list(csv.DictReader(file))
        if not rows or "grid_share" not in rows[0]:
            raise UserError(f"{path} is no metrics.csv of train.py")
        runs[label] = {key: [float(row[key]) for row in rows] for key in rows[0]}
    return [("curves", 1, lambda: training_curves(runs))]


def training_curves(runs: dict[str, dict[str, list[float]]]):
    """Top-1 (solid: float, dashed: at the run's bit-width) and share of weights near the grid, over epochs.

    `runs` holds the columns of each run's metrics.csv by label.
    """
    from matplotlib import pyplot

    figure, (top, bottom) = pyplot.subplots(2, 1, figsize=(8, 6.4), sharex=True, layout="constrained")
    for position, (label, columns) in enumerate(runs.items()):
        color = color_of(label, position)
        low = next(key for key in columns if key.startswith("w") and key.endswith("_top1"))
        top.plot(columns["epoch"], columns["fp_top1"], color=color, label=f"{label}, float")
        bits_label = f"{label}, {low.removeprefix('w').removesuffix('_top1')} bits"
        top.plot(columns["epoch"], columns[low], "--", color=color, linewidth=1.2, label=bits_label)
        bottom.plot(columns["epoch"], [100 * share for share in columns["grid_share"]], color=color, label=label)
    top.set_ylabel("top-1 accuracy in percent")
    bottom.set_ylabel("weights within a tenth of\na step of the grid, percent")
    bottom.set_ylim(0, 100)
    bottom.set_xlabel("epoch")
    for axis in (top, bottom):
        axis.legend(fontsize="small")
        axis.grid(alpha=0.3)
    return figure


if __name__ == "__main__":
    run(main)
