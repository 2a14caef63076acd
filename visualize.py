"""Draw weights, results and training curves as PNG files.

A histogram of every layer of the shipped SGD and PSGD networks, float and quantized, into visualizations/
  python visualize.py

Some layers of other checkpoints, at 3 bits (the paper's figure 1b)
  python visualize.py --model_path runs/a/last.pth runs/b/last.pth --labels SGD PSGD --w_bit 3 \\
                      --layers conv1.weight fc.weight --out figures

The paper's figure 1a, weight error and test error over bit-widths, from the results of eval.py
  python visualize.py --figure 1a --results results/cifar100/results.csv --out fig

Accuracy and share of weights near the grid over the epochs of runs
  python visualize.py --figure curves --runs results/runs/vanilla_seed1 results/runs/w4_psgd_seed1 \\
                      --labels SGD PSGD --out fig

Top-1 over weight and activation bit-widths, and what each layer contributes, from eval.py
  python visualize.py --figure grid --results results/activations/mse/results.csv --out fig
  python visualize.py --figure report --results results/report/layers.csv --out fig

The paper's figures 2 (a toy loss in the warped space), 3 (a sparse network's weights) and 4 (curvature)
  python visualize.py --figure 2 --out fig
  python visualize.py --figure 3 --model_path models/ResNet150.pth runs/sparse/last.pth --labels SGD PSGD
  python visualize.py --figure 4 --results results/hessian --out fig

Needs no display. In a histogram a column is a network, the upper row its float weights, the lower row the same weights
quantized on the grid, or the grids of its output channels, that it was trained for; thin lines mark its points, up to 5
bits. With grids of channels the axis counts steps, each weight's of its own channel.
"""

import math
from argparse import Namespace
from functools import partial
from pathlib import Path

from utils.cli import Parser, UserError, bits, run, sparsity


def parse() -> Namespace:
    p = Parser(__doc__)
    # fmt: off
    p.add_argument("--figure", choices=list(FIGURES), default="layers",
                   help="layers: weight histograms; 1a: errors over bit-widths; curves: runs over epochs; grid: top-1 "
                   "over weight and activation bit-widths; report: layer by layer; 2, 3, 4: the paper's")
    p.add_argument("--model_path", nargs="+", metavar="FILE",
                   default=["models/ResNet150.pth", "models/W4_ResNet.pth"], help="layers, 3: checkpoints")
    p.add_argument("--w_bit", type=bits, default=4, help="layers: bit-width of the quantized histograms and the grid")
    p.add_argument("--first_last_quant", type=int, choices=[0, 1], default=1,
                   help="layers: 1: first and last layer too, at 8 bits if --w_bit < 4; 0: leave them out")
    p.add_argument("--layers", nargs="+", default=None, metavar="NAME",
                   help="layers: state_dict names (default: all weights)")
    p.add_argument("--results", nargs="+", default=None, metavar="FILE",
                   help="1a, grid: results.csv of eval.py (of 1a one or several); report: layers.csv of eval.py "
                   "--report; 4: folder of tools.hessian")
    p.add_argument("--sparsity", type=sparsity, default=0.9, metavar="S", help="3: share of weights to mark")
    p.add_argument("--runs", nargs="+", default=["runs/vanilla", "runs/cifar100/4bits"], metavar="DIR",
                   help="curves: run folders, or any folders with a metrics.csv")
    p.add_argument("--labels", nargs="+", default=None, metavar="NAME",
                   help="names of the checkpoints or runs in the pictures (default: SGD PSGD for the default ones, "
                   "else the file names)")
    p.add_argument("--out", default="visualizations", metavar="DIR", help="folder for the pictures")
    # fmt: on
    args = p.parse_args()
    args.results = args.results or [RESULTS.get(args.figure, "results/cifar100/results.csv")]
    flag = {"layers": "model_path", "3": "model_path", "curves": "runs"}.get(args.figure)
    if flag:
        named = getattr(args, flag)
        if args.labels is None:
            default = named == p.get_default(flag)
            args.labels = ["SGD", "PSGD"] if default else [path.removesuffix(".pth") for path in named]
        if len(args.labels) != len(named):
            raise UserError(f"{len(args.labels)} --labels for {len(named)} of --{flag}: give one for each")
        if len(set(args.labels)) < len(args.labels):
            raise UserError(f"the labels {', '.join(args.labels)} are not all different: name them with --labels")
    elif args.labels:
        raise UserError(f"--labels {' '.join(args.labels)}: figure {args.figure} takes its names from the results")
    return args


def main() -> None:
    args = parse()

    import matplotlib

    matplotlib.use("Agg")
    import seaborn
    from matplotlib import pyplot

    from utils.drawing.text import save_png
    from utils.files import output_folder, replacing

    seaborn.set_theme(style="ticks", context="notebook")
    with output_folder("--out", args.out) as out:
        for number, (name, count, draw) in enumerate(FIGURES[args.figure](args), 1):
            path = out / f"{name}.png"
            figure = draw()
            with replacing(path) as temporary:
                save_png(figure, temporary)
            pyplot.close(figure)
            print(f"{number}/{count}  {path}", flush=True)


def load_networks(args: Namespace) -> dict:
    """(network, whether it was trained for a grid for each output channel) by label."""
    from utils.checkpoint import load_checkpoint, model_from_checkpoint, per_channel

    networks = {}
    for label, path in zip(args.labels, args.model_path, strict=True):
        checkpoint = load_checkpoint(path)
        networks[label] = model_from_checkpoint(checkpoint, path), per_channel(checkpoint)
    return networks


def layer_figures(args: Namespace) -> list:
    """(name, number of pictures, drawing function) for each layer."""
    from quant import Grid, layer_grids
    from utils.drawing.result_figures import layer_histograms

    networks = load_networks(args)
    by_channel = {label for label, (_, channels) in networks.items() if channels}
    widths = [
        layer_grids(network, Grid(args.w_bit, first_last=bool(args.first_last_quant)))
        for network, _ in networks.values()
    ]
    shared = [name for name in widths[0] if name.endswith("weight") and all(name in names for names in widths)]
    if not shared:
        raise UserError(f"{', '.join(args.model_path)} have no quantized layer in common: draw them one by one")
    unknown = [name for name in args.layers or [] if name not in shared]
    if unknown:
        raise UserError(f"no quantized layer {unknown[0]!r}; the layers are {', '.join(shared)}")
    layers = args.layers or shared
    weights = {
        name: {k: network.get_parameter(name).detach() for k, (network, _) in networks.items()} for name in layers
    }
    return [
        (name, len(layers), partial(layer_histograms, name, weights[name], widths[0][name], by_channel))
        for name in layers
    ]


def one(results: list[str]) -> str:
    """The only one of --results."""
    if len(results) > 1:
        raise UserError(f"--results {' '.join(results)}: this figure is made of one")
    return results[0]


def dense_rows(paths: list[str], *numbers: str) -> list[dict[str, str]]:
    """The rows of results.csv files, with `numbers`, of networks neither pruned nor changed after training."""
    from utils.results import read_results

    return [
        row for row in read_results(paths, numbers) if row["post"] == "none" and not float(row.get("sparsity") or 0)
    ]


def bits_figures(args: Namespace) -> list:
    from utils.drawing.result_figures import errors_over_bits
    from utils.results import distinct, network_of

    rows = distinct(row for row in dense_rows(args.results, "weight_mse") if row["a_bit"] == "32")
    last = max((int(row["epoch"]) for row in rows if row["trained"] == "SGD" and row["epoch"].isdigit()), default=None)
    if last is None:
        raise UserError(
            f"{', '.join(args.results)} has no row of a network trained with SGD: evaluate one beside the others"
        )
    series = {
        "SGD": [row for row in rows if row["trained"] == "SGD" and row["epoch"] == str(last)],
        "PSGD": [row for row in rows if row["trained"] == f"PSGD W{row['w_bit']}"],
    }
    by_channel = [row for row in rows if row["trained"] == f"PSGD W{row['w_bit']} channel"]
    if by_channel:
        series["PSGD, grids of channels"] = by_channel
    if all(row["w_bit"] == "32" for found in series.values() for row in found):
        raise UserError(f"{', '.join(args.results)} has no row with quantized weights: evaluate with --w_bit")
    for label, found in series.items():
        if len({(row["w_bit"], network_of(row)) for row in found}) > len({row["w_bit"] for row in found}):
            raise UserError(
                f"{label} has rows of one bit-width that differ in more than the seed: name those of one kind"
            )
    return [("figure1a", 1, partial(errors_over_bits, series))]


def curve_figures(args: Namespace) -> list:
    from utils.drawing.result_figures import target_column, training_curves
    from utils.results import check_numbers, read_rows

    runs = {}
    for label, folder in zip(args.labels, args.runs, strict=True):
        path = Path(folder) / "metrics.csv"
        rows = read_rows(path, ("epoch", "fp_top1"), "metrics.csv of train.py")
        whole = [row for row in rows if all(row.values())]  # a run that was cut off may leave half a row
        check_numbers(path, whole, rows[0])
        if not target_column(rows[0]):
            raise UserError(f"{path} has no top-1 at a bit-width or sparsity: it is none of train.py")
        runs[label] = {key: [float(row[key]) for row in whole] for key in rows[0]}
    return [("curves", 1, partial(training_curves, runs))]


def grid_figures(args: Namespace) -> list:
    from utils.drawing.result_figures import accuracy_grids

    groups: dict[str, dict[tuple[int, int], float]] = {}
    for row in dense_rows([one(args.results)]):
        name = f"{row['trained']} {row['epoch']}".strip() or row.get("model", "")
        place = int(row["w_bit"]), int(row["a_bit"])
        cells = groups.setdefault(name, {})
        if place in cells:
            raise UserError(f"{args.results[0]} has two networks that are both {name}: evaluate them one by one")
        cells[place] = float(row["top1"])
    return [("grid", 1, partial(accuracy_grids, groups))]


def report_figures(args: Namespace) -> list:
    from utils.drawing.result_figures import layer_bars
    from utils.results import read_rows

    numbers = ("sqnr", "top1_lost")
    rows = read_rows(one(args.results), ("model", "layer", "bits", *numbers), "layers.csv of eval.py --report", numbers)
    models: dict[str, list[dict[str, str]]] = {}
    for row in rows:
        models.setdefault(row["model"], []).append(row)
    if len({tuple(row["layer"] for row in rows) for rows in models.values()}) > 1:
        raise UserError(f"{args.results[0]} has networks with different layers: report them one by one")
    return [("report", 1, partial(layer_bars, models))]


def warp_figures(args: Namespace) -> list:
    from utils.drawing.paper_figures import warped_space

    return [("figure2", 1, warped_space)]


def sparse_figures(args: Namespace) -> list:
    import torch

    from quant.pruning import prunable_weights
    from utils.drawing.paper_figures import sparse_histograms

    weights = {
        label: torch.cat([weight.detach().flatten() for weight in prunable_weights(network).values()])
        for label, (network, _) in load_networks(args).items()
    }
    return [("figure3", 1, partial(sparse_histograms, weights, args.sparsity))]


def curvature_figures(args: Namespace) -> list:
    from utils.drawing.paper_figures import curvature
    from utils.results import read_rows

    folder = Path(one(args.results))

    def columns(name: str, by: str, *wanted: str) -> dict[str, list[list[float]]]:
        read: dict[str, list[list[float]]] = {}
        for row in read_rows(folder / name, (by, *wanted), f"{name} of tools.hessian", wanted):
            held = read.setdefault(row[by], [[] for _ in wanted])
            for values, key in zip(held, wanted):
                values.append(float(row[key]))
                if not math.isfinite(values[-1]):
                    raise UserError(f"{folder / name}: {key} is {row[key]}, which has no place in a figure")
        return read

    digits = columns("digits.csv", "network", "weight", "eigenvalue")
    spectra = {}
    if (folder / "spectrum.csv").exists():
        by_file = columns("spectrum.csv", "model", "eigenvalue", "share")
        names = {
            row["model"]: row["trained"] for row in read_rows(folder / "spectrum.csv", ("trained",), "spectrum.csv")
        }
        distinct = all(names.values()) and len(set(names.values())) == len(names)
        spectra = {names[path] if distinct else path: values for path, values in by_file.items()}
    return [("figure4", 1, partial(curvature, digits, spectra))]


RESULTS = {"report": "results/report/layers.csv", "4": "results/hessian"}  # default of --results by figure
FIGURES = {
    "layers": layer_figures,
    "1a": bits_figures,
    "curves": curve_figures,
    "grid": grid_figures,
    "report": report_figures,
    "2": warp_figures,
    "3": sparse_figures,
    "4": curvature_figures,
}


if __name__ == "__main__":
    run(main)
