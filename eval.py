"""Top-1 of trained networks at full precision and quantized, for one setting or a sweep.

The paper's 4-bit network
  python eval.py --arch ResNet32 --model_path models/W4_ResNet.pth --w_bit 4 --a_bit 4 --lambda_s 150 \\
                 --first_last_quant 1 --act_quant 0 --act_clipping 0 --cu_num 0

Several networks at several bit-widths, written to results/sweep/results.csv and results.json
  python eval.py --model_path models/ResNet82.pth models/W4_ResNet.pth --w_bit 8 6 5 4 3 2 --out results/sweep

Weights and activations, with data-free ranges and with ranges calibrated on training images
  python eval.py --w_bit 8 4 --a_bit 32 8 4 --act_range bn
  python eval.py --w_bit 8 4 --a_bit 32 8 4 --act_range minmax --calib_images 1024

With batch-norm statistics taken anew on training images, with the weights as deployed
  python eval.py --w_bit 4 3 --post none bn_reestimate --calib_images 10240

Ranges, scales and bit-widths are never fitted to test images. A bit-width of 32 stands for full precision, which is
the first row of every model.
"""

import os
from argparse import Namespace
from pathlib import Path
from typing import Any

from utils.cli import Parser, UserError, bits_or_float, count, index, positive, run, seed

COLUMNS = {  # name: (least width on screen, format); without a width only in the files
    "model": (5, "s"), "arch": (0, "s"), "dataset": (0, "s"), "split": (0, "s"), "trained": (12, "s"),
    "seed": (5, "s"), "epoch": (7, "s"), "w_bit": (6, "d"), "a_bit": (6, "d"), "act_range": (13, "s"),
    "post": (14, "s"), "top1": (7, ".2f"), "loss": (8, ".4f"), "weight_mse": (11, ".3e"), "bytes": (9, "d"),
}  # fmt: skip


POST = ["none", "bn_reestimate"]


def parse() -> Namespace:
    p = Parser(__doc__)
    # fmt: off
    p.add_argument("--arch", default=None, choices=["ResNet32", "vgg16_bn"],
                   help="network (default: the one the file names, ResNet32 if it names none)")
    p.add_argument("--model_path", nargs="+", default=["models/W4_ResNet.pth"], metavar="FILE", help="checkpoints")
    p.add_argument("--dataset", default=None, choices=["cifar100", "cifar10", "digits"],
                   help="data set (default: the one the file was trained on, cifar100 if it names none)")
    p.add_argument("--data_dir", default="data", help="folder of <dataset>.npz or of torchvision's archive")
    p.add_argument("--val_split", type=index, default=0, metavar="N",
                   help="evaluate on the N training images that train.py --val_split N holds out, not on the test set")
    p.add_argument("--w_bit", type=bits_or_float, nargs="+", default=[4], metavar="B", help="weight bit-widths")
    p.add_argument("--a_bit", type=bits_or_float, nargs="+", default=None, metavar="B",
                   help="activation bit-widths (default: 8 with --act_quant 1, else 32)")
    p.add_argument("--first_last_quant", type=int, choices=[0, 1], default=1,
                   help="1: first and last layer too, at 8 bits if the others have fewer than 4; 0: keep them float")
    p.add_argument("--act_quant", type=int, choices=[0, 1], default=None,
                   help="1: quantize activations; 0: ignore --a_bit (default: 1 if --a_bit is given)")
    p.add_argument("--act_range", choices=["bn", "bn_published", "minmax"], default=None,
                   help="range of activations: bn: mean + n standard deviations by batch norm, shortcuts included; "
                   "bn_published: the same without shortcuts; minmax: largest value on training images "
                   "(default: bn_published with --act_clipping 1, else minmax)")
    p.add_argument("--act_clipping", type=int, choices=[0, 1], default=0, help="1: the published name of bn_published")
    p.add_argument("--clipping_range", type=positive, default=6.0, help="n of the bn ranges")
    p.add_argument("--post", nargs="+", choices=POST, default=["none"],
                   help="after quantization: bn_reestimate: batch-norm statistics anew on --calib_images")
    p.add_argument("--calib_images", type=count, default=1024, metavar="N",
                   help="training images for minmax and --post")
    p.add_argument("--seed", type=seed, default=1, help="of the choice of calibration images")
    p.add_argument("--lambda_s", type=positive, default=150.0, help="for the record in results.json; no effect")
    p.add_argument("--out", default=None, metavar="DIR", help="folder for results.csv and results.json")
    p.add_argument("--exp_name", default=None, help="the published name of --out results/<exp_name>")
    p.add_argument("--cu_num", type=index, default=0, help="GPU number")
    p.add_argument("--device", default=None, help="cpu, cuda:1, ... (default: the GPU --cu_num, or the CPU)")
    p.add_argument("--precision", choices=["auto", "fp32", "bf16"], default="fp32", help="of the forward pass")
    # fmt: on
    args = p.parse_args()
    if args.act_quant is None:
        args.act_quant = int(args.a_bit is not None)
    args.a_bit = (args.a_bit or [8]) if args.act_quant else [32]
    args.act_range = args.act_range or ("bn_published" if args.act_clipping else "minmax")
    args.out = args.out or (f"results/{args.exp_name}" if args.exp_name else None)
    return args


def settings(args: Namespace) -> list[tuple[int, int, str]]:
    """(w_bit, a_bit, post) of every row of a model: full precision first, then the sweep, each once."""
    pairs = dict.fromkeys([(32, 32), *((w, a) for w in args.w_bit for a in args.a_bit)])
    return [(w, a, post) for w, a in pairs for post in dict.fromkeys(args.post)]


def main() -> None:
    args = parse()

    import torch

    from quant import packed_bytes, quantize_activations, quantize_weights, reestimate_batch_norm, weight_mse
    from utils.checkpoint import load_checkpoint, model_from_checkpoint, training_facts
    from utils.data import calibration_batches, load_dataset
    from utils.device import keep_freed_memory, resolve_precision, select_device
    from utils.engine import evaluate, fold_batch_norm
    from utils.files import write_results

    device, device_line = select_device(args.device, args.cu_num)
    args.precision = resolve_precision(args.precision, device)
    if device.type == "cpu":
        keep_freed_memory()

    # Everything that can be wrong is looked at before the first evaluation.
    datasets, networks = {}, []
    for path in args.model_path:
        checkpoint = load_checkpoint(path)
        name = args.dataset or checkpoint.get("args", {}).get("dataset", "cifar100")
        if name not in datasets:
            datasets[name] = load_dataset(name, args.data_dir, device)
        dataset = datasets[name]
        model = model_from_checkpoint(checkpoint, path, args.arch, len(dataset.classes))
        model.to(device, memory_format=torch.channels_last).eval()
        train, test, split_name = dataset.splits(args.val_split)
        if needs_images(args) and args.calib_images > len(train):
            raise UserError(f"--calib_images {args.calib_images} is more than the {len(train)} training images")

        def images(train=train, spec=dataset.spec):
            return calibration_batches(train, spec, args.calib_images, args.seed)

        facts = {"model": path, "arch": type(model).__name__, "dataset": name, "split": split_name}
        ranges = activation_ranges(args, path, model, images)
        networks.append((facts | training_facts(checkpoint), model, ranges, test, dataset.spec, images))
    if args.out:
        Path(args.out).mkdir(parents=True, exist_ok=True)
        if not os.access(args.out, os.W_OK):
            raise UserError(f"--out {args.out} cannot be written to")

    print(f"{device_line}, precision: {args.precision}")
    columns = {name: shape for name, shape in COLUMNS.items() if shape[0]}
    columns["model"] = (max(map(len, ["model", *args.model_path])), "s")
    print("  ".join(f"{name:>{width}}" for name, (width, _) in columns.items()))
    rows: list[dict[str, Any]] = []
    for facts, model, ranges, test, spec, images in networks:
        for w_bit, a_bit, post in settings(args):
            weights = (w_bit, bool(args.first_last_quant))
            network = quantize_activations(quantize_weights(model, *weights), a_bit, ranges, inplace=True)
            if post == "bn_reestimate":
                network = reestimate_batch_norm(network, images(), inplace=True)
            result = evaluate(fold_batch_norm(network), test, spec, args.precision)
            row = facts | {
                "w_bit": w_bit, "a_bit": a_bit, "act_range": "none" if a_bit == 32 else args.act_range, "post": post,
                "top1": round(result.top1, 4), "loss": round(result.loss, 6),
                "weight_mse": weight_mse(model, *weights), "bytes": packed_bytes(model, *weights),
            }  # fmt: skip
            rows.append(row)
            print("  ".join(f"{row[name]:>{width}{fmt}}" for name, (width, fmt) in columns.items()), flush=True)
        if args.out:  # after each model, so that a sweep that is cut off leaves what it has
            write_results(args.out, rows, torch=torch.__version__, device=str(device), settings=vars(args))
    if args.out:
        print(f"written: {args.out}/results.csv and results.json")


def needs_images(args: Namespace) -> bool:
    """Whether a setting of the sweep looks at training images."""
    minmax = args.act_range == "minmax" and any(a_bit != 32 for a_bit in args.a_bit)
    return minmax or "bn_reestimate" in args.post


def activation_ranges(args: Namespace, path: str, model, images) -> dict[str, float]:
    """x_max of every ReLU by --act_range; none if activations stay float."""
    from quant import bn_ranges, minmax_ranges

    if all(a_bit == 32 for a_bit in args.a_bit):
        return {}
    if args.act_range == "minmax":
        return minmax_ranges(model, images())
    try:
        return bn_ranges(model, args.clipping_range, shortcut=args.act_range == "bn")
    except ValueError as error:
        raise UserError(f"{path}: {error}; use --act_range minmax") from None


if __name__ == "__main__":
    run(main)
