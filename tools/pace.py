"""The pace of recorded runs beside the law: pace.csv, a row for each epoch, for `visualize.py --figure pace`.

    python -m tools.pace --runs results/runs/w4_psgd_seed1 results/runs/w8_psgd_seed1 --out results/studies/pace

A run that logged its own tau keeps it. For other runs tau is what the law makes of their learning rates and lambda_s,
with the gradients of the network that the run began with (--load_pretrained of its args.json): their mean square in
each weight tensor, over --steps batches that the network is not trained on in between.
"""

from argparse import Namespace
from collections.abc import Callable, Sequence
from functools import cache
from itertools import islice
from operator import mul
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from quant import Grid, expected_share, psg_param_groups
from quant.settings import AUTO
from quant.sharded import mean_squares
from utils import flags
from utils.cli import Parser, UserError, count, run
from utils.device import select_device
from utils.files import command_line, git_commit, output_folder, write_csv, write_json
from utils.opening import Datasets, open_network
from utils.results import read_rows
from utils.runs import RunFolder

MOMENTUM = 0.9  # train.py's
COLUMNS = ("epoch", "lr", "grid_share")
LOGGED = ("tau", "expected_share")
NEEDED = ("w_bit", "batch_size", "lambda_s")  # settings, of which a run that logged its tau needs the first
Row = dict[str, str | float]
Squares = list[tuple[int, float]]  # number of weights, and mean square of their gradients, of each tensor
Measure = Callable[[str, int, int], tuple[Squares, int]]


def parser() -> Parser:
    p = Parser(__doc__)
    p.add_argument("--runs", nargs="+", required=True, metavar="DIR", help="run folders with args.json and metrics.csv")
    p.add_argument(
        "--labels",
        nargs="+",
        metavar="NAME",
        help="names of the runs; those that agree up to a colon look alike (default: the folders)",
    )
    p.add_argument("--steps", type=count, default=25, metavar="N", help="batches to measure gradients on")
    flags.add_data_dir(p, None)
    flags.add_device(p)
    p.add_argument("--out", default="results/studies/pace", metavar="DIR", help="folder for pace.csv and pace.json")
    return p


def parse() -> Namespace:
    args = parser().parse_args()
    args.labels = args.labels or [Path(path).name for path in args.runs]
    if len(args.labels) != len(args.runs):
        raise UserError(f"{len(args.labels)} --labels for {len(args.runs)} --runs: give one for each")
    if twice := next((label for label in args.labels if args.labels.count(label) > 1), None):
        raise UserError(f"two runs have the label {twice}: give --labels that differ")
    return args


def settings_of(path: str) -> dict[str, Any]:
    """The args of a run with PSG on gradients, or with a logged tau. Raises UserError for another run."""
    settings: dict[str, Any] = RunFolder(Path(path)).settings()["args"]
    if not settings.get("psg") or settings.get("target", "grid") != "grid":
        raise UserError(f"{path} is not a run of PSG for a grid: leave it out")
    return settings


def rows_of(path: str, label: str, measure: Measure) -> list[Row]:
    """The rows of one run. `measure` is `gradient_squares` of a run's first network."""
    settings = settings_of(path)
    table = Path(path) / "metrics.csv"
    rows = read_rows(table, COLUMNS, "metrics.csv of a run with PSG", COLUMNS)
    logged = bool(rows[0].get("tau"))
    if logged:
        rows = read_rows(table, (*COLUMNS, *LOGGED), "metrics.csv of a run with a pace", (*COLUMNS, *LOGGED))
    if absent := next((key for key in NEEDED[: 1 if logged else None] if key not in settings), None):
        raise UserError(f"{Path(path) / 'args.json'} has no {absent}: it is not of a run of train.py")
    if not logged:
        check_law(path, rows, settings)
    pace: Sequence[tuple[str | float, str | float]] = (
        [(row["tau"], row["expected_share"]) for row in rows] if logged else by_law(rows, settings, measure)
    )
    same: Row = {"run": label, "bits": settings["w_bit"], "granularity": settings.get("granularity") or "tensor"}
    return [
        same | {"epoch": row["epoch"], "tau": tau, "expected_share": share, "grid_share": row["grid_share"],
                "tau_from": "run" if logged else "law"}
        for row, (tau, share) in zip(rows, pace)
    ]  # fmt: skip


def check_law(path: str, rows: list[dict[str, str]], settings: dict[str, Any]) -> None:
    """Raises UserError for a run whose tau the law cannot tell."""
    if settings.get("lambda_s") == AUTO and not all(row.get("lambda_s") for row in rows):
        raise UserError(f"{path} has lambda_s auto, and neither its tau nor lambda_s was logged: leave it out")
    if settings.get("adam"):
        raise UserError(f"{path} is of Adam, which normalizes the gradients that PSG scales: the law is not for it")
    if not settings.get("load_pretrained"):
        raise UserError(f"{path} began without a checkpoint, and the law needs the gradients of its first network")
    if settings.get("clip_weights") or not settings.get("first_last_quant", 1):
        raise UserError(f"{path} has --clip_weights 1 or --first_last_quant 0, which are not computed: leave it out")


def by_law(rows: list[dict[str, str]], settings: dict[str, Any], measure: Measure) -> list[tuple[float, float]]:
    """Mean tau and expected share after each epoch of a run with these `settings`."""
    squares, images = measure(settings["load_pretrained"], settings["batch_size"], settings["w_bit"])
    steps = -(-(images - (settings.get("val_split") or 0)) // settings["batch_size"])
    sizes = [size for size, _ in squares]
    taus, result = [0.0] * len(squares), []
    for row in rows:
        lambda_s = float(row.get("lambda_s") or settings["lambda_s"])
        factor = steps * (float(row["lr"]) / (1 - MOMENTUM) * lambda_s) ** 2
        taus = [tau + factor * square for tau, (_, square) in zip(taus, squares)]
        shares = [expected_share(tau) for tau in taus]
        tau, share = (sum(map(mul, sizes, values)) / sum(sizes) for values in (taus, shares))
        result.append((tau, share))
    return result


def gradient_squares(path: str, batch_size: int, bits: int, args: Namespace, datasets: Datasets) -> tuple[Squares, int]:
    """Mean square of the gradients in each scaled tensor of the checkpoint `path`, and the number of its images."""
    opened = open_network(path, datasets)
    network, batches = opened.model, opened.data.train.shuffled(batch_size, seed=1)
    groups = psg_param_groups(network, Grid(bits))
    weights = [weight for group in groups if "bits" in group for weight in group["params"]]
    network.train()
    found = []
    for images, labels in islice(batches.epoch(1), args.steps):
        found.append(mean_squares(list(torch.autograd.grad(cross_entropy(network(images), labels), weights))).cpu())
    means = torch.stack(found).mean(0).tolist()
    return [(weight.numel(), square) for weight, square in zip(weights, means)], len(opened.data.train)


def main() -> None:
    args = parse()
    device, line = select_device(args.device, args.cu_num)
    print(line)
    datasets = Datasets(args.data_dir, device)

    @cache
    def measure(path: str, batch_size: int, bits: int) -> tuple[Squares, int]:
        return gradient_squares(path, batch_size, bits, args, datasets)

    with output_folder("--out", args.out) as out:
        rows = []
        for path, label in zip(args.runs, args.labels):
            own = rows_of(path, label, measure)
            last = own[-1]
            print(f"{label}: tau {float(last['tau']):.2f}, share {last['grid_share']}, law {last['expected_share']}")
            rows += own
        write_csv(out / "pace.csv", rows)
        write_json(out / "pace.json", {"command": command_line(), "commit": git_commit(), "batches": args.steps})


if __name__ == "__main__":
    run(main)
