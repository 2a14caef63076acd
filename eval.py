"""Top-1 of trained networks at full precision and quantized, for one setting or a sweep.

The paper's 4-bit network
  python eval.py --arch ResNet32 --model_path models/W4_ResNet.pth --w_bit 4 --a_bit 4 --lambda_s 150 \\
                 --first_last_quant 1 --act_quant 0 --act_clipping 0 --cu_num 0

Several networks at several bit-widths, written to results/sweep/results.csv and results.json
  python eval.py --model_path models/ResNet82.pth models/W4_ResNet.pth --w_bit 8 6 5 4 3 2 --out results/sweep

Weights and activations, with data-free ranges, and with ranges calibrated on training images
  python eval.py --w_bit 8 4 --a_bit 32 8 4 --act_range bn --clipping_range search
  python eval.py --w_bit 8 4 --a_bit 32 8 4 --act_range mse --calib_images 1024

Post-training methods on training images, each beside the plain network
  python eval.py --w_bit 4 3 --post none bn_reestimate bias_correct adaround

One-shot magnitude pruning, alone and with quantized weights
  python eval.py --model_path models/ResNet150.pth --sparsity 0.5 0.7 0.8 0.9 0.95 0.98 --out results/pruning
  python eval.py --sparsity 0.5 0.7 --w_bit 32 4 --prune layer

What each layer contributes, at the first --w_bit, to results/report/layers.csv
  python eval.py --w_bit 4 --report --out results/report

Ranges, scales, bit-widths and roundings are never fitted to test images. A bit-width of 32 stands for full precision,
which is the first row of every model.
"""

import math
import sys
from argparse import Namespace
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from utils import cli
from utils.cli import Parser, UserError, first_line, run

COLUMNS = {  # name: (least width on screen, format); without a width only in the files
    "model": (5, "s"), "arch": (0, "s"), "dataset": (0, "s"), "split": (0, "s"), "trained": (12, "s"),
    "seed": (5, "s"), "epoch": (7, "s"), "sparsity": (8, "g"), "prune": (6, "s"), "nonzero": (8, "d"),
    "w_bit": (6, "d"), "weight_range": (0, "s"), "granularity": (0, "s"), "a_bit": (6, "d"), "act_range": (13, "s"),
    "clipping_range": (0, "s"), "post": (14, "s"), "top1": (7, ".2f"), "loss": (8, ".4f"), "weight_mse": (11, ".3e"),
    "bytes": (9, "d"),
}  # fmt: skip
POST = ["none", "bn_reestimate", "bias_correct", "adaround"]
ACT_RANGES = ["bn", "bn_published", "minmax", "percentile", "mse"]
SEARCHED = [1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 5.0, 6.0, 8.0]  # values of --clipping_range search


@dataclass
class Network:
    """A trained network and what it is evaluated on."""

    facts: dict[str, str]
    deployment: Any
    test: Any
    spec: Any


def parse() -> Namespace:
    p = Parser(__doc__)
    # fmt: off
    p.add_argument("--arch", default=None,
                   help="network (default: the one the file names, ResNet32 if it names none)")
    p.add_argument("--model_path", nargs="+", default=["models/W4_ResNet.pth"], metavar="FILE", help="checkpoints")
    p.add_argument("--dataset", default=None, choices=cli.DATASET_NAMES,
                   help="data set (default: the one the file was trained on, cifar100 if it names none)")
    p.add_argument("--data_dir", default=None, help=cli.DATA_DIR_HELP)
    p.add_argument("--workers", type=cli.index, default=4,
                   help="processes that read images of an imagefolder, one a core at most")
    p.add_argument("--val_split", type=cli.index, default=0, metavar="N",
                   help="evaluate on the N training images that train.py --val_split N holds out, not on the test set")
    p.add_argument("--sparsity", type=cli.sparsity, nargs="+", default=[0.0], metavar="S",
                   help="shares of zero weights: those of the smallest magnitude, cut before --w_bit is applied")
    p.add_argument("--prune", choices=["global", "layer"], default="global",
                   help="the share is one of all weights together, or of each layer by itself")
    p.add_argument("--w_bit", type=cli.bits_or_float, nargs="+", default=None, metavar="B",
                   help="weight bit-widths (default: 4, or 32 with --sparsity)")
    p.add_argument("--weight_range", choices=["absmax", "mse"], default="absmax",
                   help="grid of the weights: up to the largest, or the range of the least squared error")
    p.add_argument("--granularity", choices=["tensor", "channel"], default=None,
                   help="a step for each weight tensor, or for each of its output channels "
                   "(default: as the file was trained, tensor if it does not say)")
    p.add_argument("--first_last_quant", type=int, choices=[0, 1], default=1,
                   help="1: quantize and prune the first and last layer too, at 8 bits if the others have fewer "
                   "than 4; 0: keep them float and whole")
    p.add_argument("--a_bit", type=cli.bits_or_float, nargs="+", default=None, metavar="B",
                   help="activation bit-widths (default: 8 with --act_quant 1, else 32)")
    p.add_argument("--act_quant", type=int, choices=[0, 1], default=None,
                   help="1: quantize activations; 0: ignore --a_bit (default: 1 if --a_bit is given)")
    p.add_argument("--act_range", choices=ACT_RANGES, default=None,
                   help="range of activations: bn: mean + n standard deviations by batch norm, shortcuts included; "
                   "bn_published: the same without shortcuts; on training images minmax: largest value, percentile: "
                   "that of --percentile, mse: least squared error "
                   "(default: bn_published with --act_clipping 1, else minmax)")
    p.add_argument("--act_clipping", type=int, choices=[0, 1], default=0, help="1: the published name of bn_published")
    p.add_argument("--clipping_range", type=cli.positive_or("search"), nargs="+", default=[6.0], metavar="N",
                   help="n of the bn ranges; of several, or of search, the one of least loss on training images")
    p.add_argument("--percentile", type=cli.percent, default=99.99, help="of the values of a ReLU, zeros included")
    p.add_argument("--post", nargs="+", choices=POST, default=["none"],
                   help="after quantization, on training images: bn_reestimate: batch-norm statistics anew; "
                   "bias_correct: mean outputs brought back; adaround: roundings learned layer by layer")
    p.add_argument("--iterations", type=cli.count, default=1000, metavar="N", help="of adaround, for each layer")
    p.add_argument("--calib_images", type=cli.count, default=cli.Default(1024), metavar="N",
                   help="training images for calibration and --post; all if there are fewer and N is not given")
    p.add_argument("--seed", type=cli.seed, default=1, help="of the choice of calibration images")
    p.add_argument("--report", action="store_true",
                   help="also a row for each layer of each model, at the first --w_bit, to --out DIR/layers.csv")
    p.add_argument("--lambda_s", type=cli.positive, default=150.0, help="for the record in results.json; no effect")
    p.add_argument("--out", default=None, metavar="DIR", help="folder for results.csv and results.json")
    p.add_argument("--exp_name", default=None, help="the published name of --out results/<exp_name>")
    p.add_argument("--cu_num", type=cli.index, default=0, help="GPU number")
    p.add_argument("--device", default=None, help="cpu, cuda:1, ... (default: the GPU --cu_num, or the CPU)")
    p.add_argument("--precision", choices=["auto", "fp32", "bf16"], default="fp32", help="of the forward pass")
    # fmt: on
    args = p.parse_args()
    args.w_bit = args.w_bit or ([32] if any(args.sparsity) else [4])
    if args.act_quant is None:
        args.act_quant = int(args.a_bit is not None)
    args.a_bit = (args.a_bit or [8]) if args.act_quant else [32]
    args.act_range = args.act_range or ("bn_published" if args.act_clipping else "minmax")
    args.clipping_range = SEARCHED if "search" in args.clipping_range else list(dict.fromkeys(args.clipping_range))
    args.out = args.out or (f"results/{args.exp_name}" if args.exp_name else None)
    if args.report and not args.out:
        raise UserError("--report writes layers.csv: name a folder with --out DIR")
    if args.report and args.w_bit[0] == 32:
        raise UserError("--report is about the first --w_bit, and 32 is full precision: begin with the one it is for")
    return args


def settings(args: Namespace) -> list:
    """Every row of a model: full precision first, then the sweep, each once."""
    from utils.deployment import Setting

    rows = [Setting(), *(Setting(post=post) for post in args.post)]
    rows += [Setting(*row) for row in product(args.w_bit, args.a_bit, args.sparsity, args.post)]
    # Roundings need quantized weights, and mean outputs something that shifts them.
    return [
        row
        for row in dict.fromkeys(rows)
        if not (row.post == "adaround" and row.w_bit == 32) and row != Setting(post="bias_correct")
    ]


def main() -> None:
    args = parse()

    from utils.device import resolve_precision, select_device
    from utils.files import output_folder

    with output_folder("--out", args.out) if args.out else nullcontext():
        device, device_line = select_device(args.device, args.cu_num)
        args.precision = resolve_precision(args.precision, device)
        networks = load_networks(args, device)
        print(f"{device_line}, precision: {args.precision}")
        sweep(args, networks, device)


def sweep(args: Namespace, networks: list[Network], device) -> None:
    """Evaluates and prints every row of every model; with --out, writes what there is after each model."""
    import torch

    from utils.device import machine
    from utils.files import write_csv, write_results

    columns = {name: shape for name, shape in COLUMNS.items() if shape[0]}
    columns["model"] = (max(map(len, ["model", *args.model_path])), "s")
    print("  ".join(f"{name:>{width}}" for name, (width, _) in columns.items()), flush=True)
    facts = {"torch": torch.__version__, "device": str(device), "machine": machine(device)}
    rows: list[dict[str, Any]] = []
    layers: list[dict[str, Any]] = []
    for net in networks:
        chosen: dict[Any, float] = {}
        for setting in settings(args):
            plain = replace(setting, post="none")
            if plain not in chosen:
                chosen[plain] = clipping_range(args, net.deployment, plain)
            row = evaluated(args, net, setting, chosen[plain])
            rows.append(row)
            print("  ".join(f"{row[name]:>{width}{fmt}}" for name, (width, fmt) in columns.items()), flush=True)
        if args.out:  # after each model, so that a sweep that is cut off leaves what it has
            write_results(args.out, rows, **facts, settings=vars(args))
        if args.report:
            layers += layer_report(args, net)
            write_csv(Path(args.out) / "layers.csv", layers)
    if args.out:
        print(f"written: {args.out}/results.csv and results.json" + (" and layers.csv" if layers else ""))


def evaluated(args: Namespace, net: Network, setting, n: float) -> dict[str, Any]:
    """The row of a network as `setting` deploys it, with `n` for the bn ranges."""
    from quant import nonzero_weights, packed_bytes, weight_mse
    from utils.deployment import Setting
    from utils.engine import evaluate, fold_batch_norm

    deployment = net.deployment
    try:
        network = deployment.network(setting, n)
    except ValueError as error:  # a network that has no batch norm, ReLU, ... for what is asked
        raise UserError(f"{net.facts['model']}: {first_line(error)}") from None
    nonzero = nonzero_weights(network, deployment.first_last)
    result = evaluate(fold_batch_norm(network), net.test, net.spec, args.precision)
    del network  # two models at a time
    pruned = f", sparsity {setting.sparsity:g}" if setting.sparsity else ""
    deployed = f"at W{setting.w_bit}A{setting.a_bit}{pruned}, post {setting.post}" if setting != Setting() else ""
    check_outputs(result.loss, net.facts["model"], deployed)
    grid = deployment.weight_grid(setting.w_bit)
    return net.facts | {
        "sparsity": setting.sparsity, "prune": args.prune if setting.sparsity else "none", "nonzero": nonzero,
        "w_bit": setting.w_bit, "weight_range": args.weight_range,
        "granularity": "channel" if deployment.per_channel else "tensor",
        "a_bit": setting.a_bit, "act_range": "none" if setting.a_bit == 32 else args.act_range,
        "clipping_range": f"{n:g}" if n else "", "post": setting.post, "top1": round(result.top1, 4),
        "loss": round(result.loss, 6), "weight_mse": weight_mse(deployment.pruned(setting.sparsity), **grid),
        "bytes": packed_bytes(deployment.model, setting.w_bit, grid["first_last"], grid["per_channel"]),
    }  # fmt: skip


def check_outputs(loss: float, model: str, deployed: str = "") -> None:
    """For a `loss` that is no number: UserError if it is the trained network's, a warning if it is of one `deployed`
    as these words say."""
    if math.isfinite(loss):
        return
    what = f"{model}: the network's outputs are not finite (loss {loss})"
    if not deployed:
        raise UserError(f"{what}: take the file of an earlier epoch, or train with a smaller --lr")
    print(f"warning: {what} {deployed}: its top-1 means nothing", file=sys.stderr)


def load_networks(args: Namespace, device) -> list[Network]:
    """Every model with its data; all that can be wrong is looked at before the first evaluation."""
    import torch

    from utils.checkpoint import dataset_name, load_checkpoint, model_from_checkpoint, per_channel, training_facts
    from utils.data import calib_images, calibration_batches
    from utils.deployment import BN_RANGES, Deployment, check_activations
    from utils.pairing import Datasets

    datasets, networks = Datasets(args.data_dir, device, args.workers), []
    counts: dict[int, int] = {}  # of images for calibration, by those there are
    quantizes = any(a_bit != 32 for a_bit in args.a_bit)
    by_batch_norm = args.act_range in BN_RANGES
    searches = by_batch_norm and len(args.clipping_range) > 1
    needs_images = args.report or set(args.post) != {"none"} or (quantizes and (searches or not by_batch_norm))
    for path in args.model_path:
        checkpoint = load_checkpoint(path)
        name = args.dataset or dataset_name(checkpoint)
        dataset = datasets.of(checkpoint, path, name)
        model = model_from_checkpoint(checkpoint, path, args.arch, len(dataset.classes))
        model.to(device, memory_format=torch.channels_last).eval()
        train, test, split_name = dataset.splits(args.val_split)
        if needs_images and len(train) not in counts:
            counts[len(train)] = calib_images(args.calib_images, train)
        taken = counts.get(len(train), 0)

        def images(train=train, spec=dataset.spec, taken=taken):
            return calibration_batches(train, spec, taken, args.seed)

        facts = {
            "model": path,
            "arch": checkpoint.get("arch") or type(model).__name__,
            "dataset": name,
            "split": split_name,
        }
        deployment = Deployment(
            model, images, first_last=bool(args.first_last_quant), prune=args.prune, weight_range=args.weight_range,
            per_channel=per_channel(checkpoint, args.granularity), act_range=args.act_range,
            percentile=args.percentile, iterations=args.iterations, seed=args.seed,
        )  # fmt: skip
        try:
            if quantizes:
                check_activations(model, path)
                deployment.activation_ranges(8, args.clipping_range[0])
        except ValueError as error:
            advice = "; use --act_range minmax, percentile or mse" if by_batch_norm else ""
            raise UserError(f"{path}: {first_line(error)}{advice}") from None
        networks.append(Network(facts | training_facts(checkpoint), deployment, test, dataset.spec))
    args.calib_images = max(counts.values(), default=args.calib_images)  # for the record
    return networks


def clipping_range(args: Namespace, deployment, setting) -> float:
    """n of the bn ranges: of several the one of least loss on the calibration images; 0 if no bn range is used."""
    from utils.deployment import BN_RANGES

    if setting.a_bit == 32 or args.act_range not in BN_RANGES:
        return 0.0
    if len(args.clipping_range) == 1:
        return args.clipping_range[0]
    losses = deployment.clipping_losses(setting, args.clipping_range, args.precision)
    curve = ", ".join(f"{n:g}: {loss:.4f}" for n, loss in losses.items())
    best = min(losses, key=lambda n: (not math.isfinite(losses[n]), losses[n]))  # nan is smaller and larger than none
    pruned = f", sparsity {setting.sparsity:g}" if setting.sparsity else ""
    print(
        f"W{setting.w_bit}A{setting.a_bit}{pruned}: training loss by clipping range {curve}; taken: {best:g}",
        flush=True,
    )
    return best


def layer_report(args: Namespace, net: Network) -> list[dict[str, Any]]:
    """A row for each layer: error of its weights, share near the grid, and top-1 lost if it alone is quantized."""
    from quant import layer_rows
    from utils.engine import evaluate

    deployment = net.deployment
    full = evaluate(deployment.model, net.test, net.spec, args.precision).top1
    rows = []
    images = (batch for batch, _ in deployment.images())
    for row, network in layer_rows(deployment.model, images, **deployment.weight_grid(args.w_bit[0])):
        result = evaluate(network, net.test, net.spec, args.precision)
        check_outputs(result.loss, net.facts["model"], f"with {row['layer']} alone at W{row['bits']}")
        rows.append({"model": net.facts["model"], **row, "top1_lost": round(full - result.top1, 4)})
    return rows


if __name__ == "__main__":
    run(main)
