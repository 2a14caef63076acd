"""The pictures of visualize.py, made from checkpoints, results and runs."""

import math
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from pathlib import Path

import matplotlib
import seaborn
import torch
from matplotlib import pyplot
from matplotlib.figure import Figure
from torch import nn

from quant import Grid, layer_grids
from quant.pruning import prunable_weights
from utils.checkpoint import grid_of, load_checkpoint, model_from_checkpoint
from utils.cli import UserError
from utils.drawing.paper_figures import curvature, lasso_paths, sparse_histograms, warped_space
from utils.drawing.result_figures import (
    accuracy_grids,
    errors_over_bits,
    layer_bars,
    layer_histograms,
    pace_of_runs,
    shares_over_lambda_s,
    target_column,
    training_curves,
)
from utils.drawing.text import save_png
from utils.files import output_folder, replacing
from utils.results import check_numbers, distinct, network_of, read_results, read_rows

Picture = tuple[str, Callable[[], Figure]]  # its name, and the function that draws it


def draw_all(args: Namespace) -> None:
    """Writes the pictures that visualize.py's `args` ask for, each as it is drawn."""
    matplotlib.use("Agg")
    seaborn.set_theme(style="ticks", context="notebook")
    with output_folder("--out", args.out) as out:
        pictures = BUILDERS[args.figure](args)
        for number, (name, draw) in enumerate(pictures, 1):
            path = out / f"{name}.png"
            figure = draw()
            with replacing(path) as temporary:
                save_png(figure, temporary)
            pyplot.close(figure)
            print(f"{number}/{len(pictures)}  {path}", flush=True)


def load_networks(args: Namespace) -> dict[str, tuple[nn.Module, Grid]]:
    """Each network, and the grid at --w_bit that it was trained for, by label."""
    networks = {}
    for label, path in zip(args.labels, args.model_path, strict=True):
        checkpoint = load_checkpoint(path)
        grid = grid_of(checkpoint, args.w_bit, bool(args.first_last_quant))
        networks[label] = model_from_checkpoint(checkpoint, path), grid
    return networks


def layer_figures(args: Namespace) -> list[Picture]:
    """A picture of each layer."""
    networks = load_networks(args)
    grids = {label: layer_grids(network, grid) for label, (network, grid) in networks.items()}
    first, *others = grids.values()
    shared = [name for name in first if name.endswith("weight") and all(name in names for names in others)]
    if not shared:
        raise UserError(f"{', '.join(args.model_path)} have no quantized layer in common: draw them one by one")
    unknown = [name for name in args.layers or [] if name not in shared]
    if unknown:
        raise UserError(f"no quantized layer {unknown[0]!r}; the layers are {', '.join(shared)}")

    def picture(name: str) -> Picture:
        weights = {label: network.get_parameter(name).detach() for label, (network, _) in networks.items()}
        return name, partial(layer_histograms, name, weights, {label: grids[label][name] for label in weights})

    return [picture(name) for name in args.layers or shared]


def one(results: list[str]) -> str:
    """The only path of --results; UserError if there are several."""
    if len(results) > 1:
        raise UserError(f"--results {' '.join(results)}: this figure takes only one")
    return results[0]


def dense_rows(paths: list[str], *numbers: str) -> list[dict[str, str]]:
    """The rows of results.csv files, with `numbers`, without pruned networks and post-training methods."""
    return [
        row for row in read_results(paths, numbers) if row["post"] == "none" and not float(row.get("sparsity") or 0)
    ]


def bits_figures(args: Namespace) -> list[Picture]:
    rows = distinct(row for row in dense_rows(args.results, "weight_mse") if row["a_bit"] == "32")
    last = max((int(row["epoch"]) for row in rows if row["trained"] == "SGD" and row["epoch"].isdigit()), default=None)
    if last is None:
        raise UserError(
            f"{', '.join(args.results)} has no row of a network trained with SGD: evaluate one with the others"
        )
    sgd = [row for row in rows if row["trained"] == "SGD" and row["epoch"] == str(last)]
    by_channel = {
        "SGD, a scale for each channel": [row for row in sgd if row.get("granularity") == "channel"],
        "PSGD, a scale for each channel": [row for row in rows if row["trained"] == f"PSGD W{row['w_bit']} channel"],
    }
    series = {
        "SGD": [row for row in sgd if row.get("granularity") != "channel"],
        "PSGD": [row for row in rows if row["trained"] == f"PSGD W{row['w_bit']}"],
        **{label: found for label, found in by_channel.items() if found},
    }
    if all(row["w_bit"] == "32" for found in series.values() for row in found):
        raise UserError(f"{', '.join(args.results)} has no row with quantized weights: evaluate with --w_bit")
    for label, found in series.items():
        if len({(row["w_bit"], network_of(row)) for row in found}) > len({row["w_bit"] for row in found}):
            raise UserError(
                f"{label} has rows of one bit-width that differ in more than the seed: keep only those of one kind"
            )
    return [("figure1a", partial(errors_over_bits, series))]


def curve_figures(args: Namespace) -> list[Picture]:
    runs = {}
    for label, folder in zip(args.labels, args.runs, strict=True):
        path = Path(folder) / "metrics.csv"
        rows = read_rows(path, ("epoch", "fp_top1"), "metrics.csv of train.py")
        if not (low := target_column(rows[0])):
            raise UserError(f"{path} has no top-1 at a bit-width or sparsity: it is not from train.py")
        drawn = ("epoch", "fp_top1", low)
        whole = [row for row in rows if all(row[key] for key in drawn)]  # an interrupted run may leave half a row
        check_numbers(path, whole, drawn)
        if not whole:
            raise UserError(f"{path} has no whole row")
        runs[label] = {key: [float(row[key]) for row in whole] for key in drawn}
    return [("curves", partial(training_curves, runs))]


def grid_figures(args: Namespace) -> list[Picture]:
    groups: dict[str, dict[tuple[int, int], float]] = {}
    for row in dense_rows([one(args.results)]):
        name = f"{row['trained']} {row['epoch']}".strip() or row.get("model", "")
        place = int(row["w_bit"]), int(row["a_bit"])
        cells = groups.setdefault(name, {})
        if place in cells:
            raise UserError(f"{args.results[0]} has two networks that are both {name}: evaluate them one by one")
        cells[place] = float(row["top1"])
    return [("grid", partial(accuracy_grids, groups))]


def report_figures(args: Namespace) -> list[Picture]:
    numbers = ("sqnr", "top1_lost")
    rows = read_rows(one(args.results), ("model", "layer", "bits", *numbers), "layers.csv of eval.py --report", numbers)
    models: dict[str, list[dict[str, str]]] = {}
    for row in rows:
        models.setdefault(row["model"], []).append(row)
    if len({tuple(row["layer"] for row in rows) for rows in models.values()}) > 1:
        raise UserError(f"{args.results[0]} has networks with different layers: report them one by one")
    return [("report", partial(layer_bars, models))]


def warp_figures(args: Namespace) -> list[Picture]:
    return [("figure2", warped_space)]


def sparse_figures(args: Namespace) -> list[Picture]:
    weights = {
        label: torch.cat([weight.detach().flatten() for weight in prunable_weights(network).values()])
        for label, (network, _) in load_networks(args).items()
    }
    return [("figure3", partial(sparse_histograms, weights, args.sparsity))]


def curvature_figures(args: Namespace) -> list[Picture]:
    folder = Path(one(args.results))

    def columns(name: str, by: str, *wanted: str) -> dict[str, list[list[float]]]:
        read: dict[str, list[list[float]]] = {}
        for row in read_rows(folder / name, (by, *wanted), f"{name} of tools.hessian", wanted):
            held = read.setdefault(row[by], [[] for _ in wanted])
            for values, key in zip(held, wanted):
                values.append(float(row[key]))
                if not math.isfinite(values[-1]):
                    raise UserError(f"{folder / name}: {key} is {row[key]}, which cannot be drawn")
        return read

    digits = columns("digits.csv", "network", "weight", "eigenvalue")
    spectra = {}
    if (folder / "spectrum.csv").exists():
        by_file = columns("spectrum.csv", "model", "eigenvalue", "share")
        names = {
            row["model"]: row["trained"] for row in read_rows(folder / "spectrum.csv", ("trained",), "spectrum.csv")
        }
        telling = all(names.values()) and len(set(names.values())) == len(names)
        spectra = {names[path] if telling else path: values for path, values in by_file.items()}
    return [("figure4", partial(curvature, digits, spectra))]


def pace_figures(args: Namespace) -> list[Picture]:
    numbers = ("tau", "grid_share")
    runs: dict[str, tuple[list[float], list[float]]] = {}
    for row in read_rows(one(args.results), ("run", *numbers), "pace.csv of tools.pace", numbers):
        for values, key in zip(runs.setdefault(row["run"], ([], [])), numbers):
            values.append(float(row[key]))
            if not math.isfinite(values[-1]):
                raise UserError(f"{args.results[0]}: {key} is {row[key]}, which has no place in a figure")
    if not any(tau > 0 for taus, _ in runs.values() for tau in taus):
        raise UserError(f"{args.results[0]} has no tau above 0: nothing has moved")
    return [("pace", partial(pace_of_runs, runs))]


def lasso_figures(args: Namespace) -> list[Picture]:
    numbers = ("penalty", "weight", "lasso", "psgd")
    rows = read_rows(one(args.results), numbers, "lasso.csv of tools.lasso", numbers)
    return [("lasso", partial(lasso_paths, [{key: float(row[key]) for key in numbers} for row in rows]))]


def lambda_s_figures(args: Namespace) -> list[Picture]:
    numbers = ("lambda_s", "share")
    series: dict[str, list[tuple[float, float]]] = {}
    for row in read_rows(one(args.results), ("arm", *numbers), "results.csv of examples/character_gpt.py", numbers):
        series.setdefault(row["arm"], []).append((float(row["lambda_s"]), float(row["share"])))
    return [("lambda_s", partial(shares_over_lambda_s, {arm: sorted(points) for arm, points in series.items()}))]


BUILDERS: dict[str, Callable[[Namespace], list[Picture]]] = {
    "layers": layer_figures,
    "1a": bits_figures,
    "curves": curve_figures,
    "grid": grid_figures,
    "report": report_figures,
    "pace": pace_figures,
    "lasso": lasso_figures,
    "lambda_s": lambda_s_figures,
    "2": warp_figures,
    "3": sparse_figures,
    "4": curvature_figures,
}
