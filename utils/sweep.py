"""The rows of eval.py: every network at every setting of a sweep, on screen and in files."""

import math
from argparse import Namespace
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch

from quant import layer_rows, packed_bytes, weight_mse
from quant.grid import FLOAT_BITS
from quant.pruning import nonzero_weights
from utils.checkpoint import dataset_name, grid_of, training_facts
from utils.cli import UserError, first_line, warn
from utils.data.split import Split
from utils.deployment import BN_RANGES, Deployment, Setting, check_activations
from utils.device import machine, resolve_precision, select_device
from utils.files import output_folder, write_csv, write_results
from utils.opening import Datasets, OpenedNetwork, open_network
from utils.trained_for import evaluation_mismatches
from utils.training.evaluation import evaluate, fold_batch_norm

COLUMNS = {  # name: (least width on screen, format); those of width 0 are only in the files
    "model": (5, "s"), "arch": (0, "s"), "dataset": (0, "s"), "split": (0, "s"), "trained": (12, "s"),
    "seed": (5, "s"), "epoch": (7, "s"), "sparsity": (8, "g"), "prune": (6, "s"), "nonzero": (8, "d"),
    "w_bit": (6, "d"), "weight_range": (0, "s"), "granularity": (0, "s"), "a_bit": (6, "d"), "act_at": (0, "s"),
    "act_range": (13, "s"),
    "clipping_range": (0, "s"), "post": (14, "s"), "top1": (7, ".2f"), "loss": (8, ".4f"), "weight_mse": (11, ".3e"),
    "bytes": (9, "d"),
}  # fmt: skip


@dataclass
class Network:
    """A trained network as it is deployed, and the images that it is evaluated on."""

    facts: dict[str, str]
    deployment: Deployment
    test: Split


def evaluate_all(args: Namespace) -> None:
    """Evaluates, prints and, with --out, writes what eval.py's `args` ask for."""
    with output_folder("--out", args.out) if args.out else nullcontext():
        device, device_line = select_device(args.device, args.cu_num)
        args.precision = resolve_precision(args.precision, device)
        networks = load_networks(args, device)
        print(f"{device_line}, precision: {args.precision}")
        sweep(args, networks, device)


def load_networks(args: Namespace, device: torch.device) -> list[Network]:
    """Every network with its data. Everything that can be wrong is checked here, before the first evaluation."""
    datasets = Datasets(args.data_dir, device, args.workers, args.image_size)
    counts: dict[int, int] = {}  # calibration images, by the number of training images
    quantizes = any(a_bit != FLOAT_BITS for a_bit in args.a_bit)
    by_batch_norm = args.act_range in BN_RANGES
    searches = by_batch_norm and len(args.clipping_range) > 1
    needs_images = args.report or set(args.post) != {"none"} or (quantizes and (searches or not by_batch_norm))
    networks, told = [], {}
    for path in args.model_path:
        opened = open_network(path, datasets, args.dataset, args.arch)
        opened.model.to(memory_format=torch.channels_last)
        train, test, split_name = opened.data.splits(opened.val_split if args.val_split is None else args.val_split)
        if needs_images and len(train) not in counts:
            counts[len(train)] = train.count_for(args.calib_images)
        deployment = deployed_as(args, opened, train, counts.get(len(train), 0))
        try:
            if quantizes:
                if args.act_at == "relu":
                    check_activations(opened.model, path)
                deployment.activation_ranges(8, args.clipping_range[0])
        except ValueError as error:
            advice = "; use --act_range minmax, percentile or mse" if by_batch_norm else ""
            raise UserError(f"{path}: {first_line(error)}{advice}") from None
        facts = {"model": path, "arch": opened.arch, "dataset": opened.dataset_name, "split": split_name}
        networks.append(Network(facts | training_facts(opened.checkpoint), deployment, test))
        told[path] = remarks(args, opened, deployment)
    for path, found in told.items():
        if found:
            warn(f"{path}: {'; '.join(found)}")
    args.calib_images = max(counts.values(), default=args.calib_images)  # for the record
    return networks


def remarks(args: Namespace, opened: OpenedNetwork, deployment: Deployment) -> list[str]:
    """What the file of a network was not made for, and what it has seen, in words."""
    found = evaluation_mismatches(opened.checkpoint, [deployment.weight_grid(w_bit) for w_bit in args.w_bit])
    trained = opened.checkpoint.get("args", {}).get("val_split")
    own = opened.dataset_name == dataset_name(opened.checkpoint)
    if own and trained is not None and (args.val_split or 0) > trained:
        found.append(f"it was trained with --val_split {trained}, on some of the images that it is evaluated on")
    return found


def deployed_as(args: Namespace, opened: OpenedNetwork, train: Split, count: int) -> Deployment:
    """How `args` deploy a network; all fitting is done on `count` images of `train`."""
    return Deployment(
        opened.model, lambda: train.calibration(count, args.seed),
        grid_of(opened.checkpoint, FLOAT_BITS, bool(args.first_last_quant), args.granularity, args.weight_range),
        prune=args.prune, act_at=args.act_at, act_range=args.act_range, percentile=args.percentile,
        iterations=args.iterations, seed=args.seed,
    )  # fmt: skip


def settings(args: Namespace) -> list[Setting]:
    """Every row of a network: full precision first, then the sweep, each once."""
    rows = [Setting(), *(Setting(post=post) for post in args.post)]
    rows += [Setting(*row) for row in product(args.w_bit, args.a_bit, args.sparsity, args.post)]
    # Learned roundings need quantized weights; bias correction needs something that shifts mean outputs.
    return [
        row
        for row in dict.fromkeys(rows)
        if not (row.post == "adaround" and row.w_bit == FLOAT_BITS) and row != Setting(post="bias_correct")
    ]


def sweep(args: Namespace, networks: list[Network], device: torch.device) -> None:
    """Evaluates and prints every row of every network; with --out, writes what there is after each network."""
    columns = {name: shape for name, shape in COLUMNS.items() if shape[0]}
    columns["model"] = (max(map(len, ["model", *args.model_path])), "s")
    print("  ".join(f"{name:>{width}}" for name, (width, _) in columns.items()), flush=True)
    facts = {"torch": torch.__version__, "device": str(device), "machine": machine(device)}
    rows: list[dict[str, Any]] = []
    layers: list[dict[str, Any]] = []
    for net in networks:
        chosen: dict[Setting, float] = {}
        for setting in settings(args):
            plain = replace(setting, post="none")
            if plain not in chosen:
                chosen[plain] = clipping_range(args, net.deployment, plain)
            row = evaluated(args, net, setting, chosen[plain])
            rows.append(row)
            print("  ".join(f"{row[name]:>{width}{fmt}}" for name, (width, fmt) in columns.items()), flush=True)
        if args.out:  # after each network, so that an interrupted sweep leaves what it has
            write_results(args.out, rows, **facts, settings=vars(args))
        if args.report:
            layers += layer_report(args, net)
            write_csv(Path(args.out) / "layers.csv", layers)
    if args.out:
        print(f"written: {args.out}/results.csv and results.json" + (" and layers.csv" if layers else ""))


def evaluated(args: Namespace, net: Network, setting: Setting, n: float) -> dict[str, Any]:
    """The row of a network as `setting` deploys it, with `n` for the bn ranges."""
    deployment = net.deployment
    try:
        network = deployment.network(setting, n)
    except ValueError as error:  # such as for a network without batch norm or ReLUs
        raise UserError(f"{net.facts['model']}: {first_line(error)}") from None
    grid = deployment.weight_grid(setting.w_bit)
    nonzero = nonzero_weights(network, grid.first_last)
    result = evaluate(fold_batch_norm(network), net.test, args.precision)
    del network  # no more than two models at a time
    pruned = f", sparsity {setting.sparsity:g}" if setting.sparsity else ""
    deployed = f"at W{setting.w_bit}A{setting.a_bit}{pruned}, post {setting.post}" if setting != Setting() else ""
    check_outputs(result.loss, net.facts["model"], deployed)
    return net.facts | {
        "sparsity": setting.sparsity, "prune": args.prune if setting.sparsity else "none", "nonzero": nonzero,
        "w_bit": setting.w_bit, "weight_range": args.weight_range,
        "granularity": "channel" if grid.per_channel else "tensor",
        "a_bit": setting.a_bit, "act_at": "none" if setting.a_bit == FLOAT_BITS else args.act_at,
        "act_range": "none" if setting.a_bit == FLOAT_BITS else args.act_range,
        "clipping_range": f"{n:g}" if n else "", "post": setting.post, "top1": round(result.top1, 4),
        "loss": round(result.loss, 6), "weight_mse": weight_mse(deployment.pruned(setting.sparsity), grid),
        "bytes": packed_bytes(deployment.model, grid),
    }  # fmt: skip


def check_outputs(loss: float, model: str, deployed: str = "") -> None:
    """Checks that a `loss` is finite. If not: UserError for the trained network, a warning for one that is deployed, as
    the words `deployed` say."""
    if math.isfinite(loss):
        return
    what = f"{model}: the network's outputs are not finite (loss {loss})"
    if not deployed:
        raise UserError(f"{what}: take the file of an earlier epoch, or train with a smaller --lr")
    warn(f"{what} {deployed}: its top-1 is meaningless")


def clipping_range(args: Namespace, deployment: Deployment, setting: Setting) -> float:
    """n of the bn ranges, of several the one of least loss on the calibration images; 0 if no bn range is used."""
    if setting.a_bit == FLOAT_BITS or args.act_range not in BN_RANGES:
        return 0.0
    if len(args.clipping_range) == 1:
        return args.clipping_range[0]
    losses = deployment.clipping_losses(setting, args.clipping_range, args.precision)
    curve = ", ".join(f"{n:g}: {loss:.4f}" for n, loss in losses.items())
    best = min(losses, key=lambda n: (not math.isfinite(losses[n]), losses[n]))
    pruned = f", sparsity {setting.sparsity:g}" if setting.sparsity else ""
    print(
        f"W{setting.w_bit}A{setting.a_bit}{pruned}: training loss by clipping range {curve}; chosen: {best:g}",
        flush=True,
    )
    return best


def layer_report(args: Namespace, net: Network) -> list[dict[str, Any]]:
    """A row for each layer: error of its weights, share near the grid, and top-1 lost with it quantized."""
    deployment = net.deployment
    full = evaluate(deployment.model, net.test, args.precision).top1
    rows = []
    for row, network in layer_rows(deployment.model, deployment.images(), deployment.weight_grid(args.w_bit[0])):
        result = evaluate(network, net.test, args.precision)
        check_outputs(result.loss, net.facts["model"], f"with only {row['layer']} at W{row['bits']}")
        rows.append({"model": net.facts["model"], **row, "top1_lost": round(full - result.top1, 4)})
    return rows
