"""Top-1 of trained networks at full precision and quantized, for one setting or a sweep.

The paper's 4-bit network
  python eval.py --arch ResNet32 --model_path models/W4_ResNet.pth --w_bit 4 --a_bit 4 --lambda_s 150 \\
                 --first_last_quant 1 --act_quant 0 --act_clipping 0 --cu_num 0

Several networks at several bit-widths, written to results/sweep/results.csv and results.json
  python eval.py --model_path models/ResNet82.pth models/W4_ResNet.pth --w_bit 8 6 5 4 3 2 --out results/sweep

Weights and activations, with data-free ranges, and with ranges calibrated on training images
  python eval.py --w_bit 8 4 --a_bit 32 8 4 --act_range bn --clipping_range search
  python eval.py --w_bit 8 4 --a_bit 32 8 4 --act_range mse --calib_images 1024

The same at the inputs of layers instead of ReLUs, for a network with any activations
  python eval.py --w_bit 8 4 --a_bit 8 --act_at inputs --act_range mse

Post-training methods on training images, each beside the plain network
  python eval.py --w_bit 4 3 --post none bn_reestimate bias_correct adaround

One-shot magnitude pruning, by itself and with quantized weights
  python eval.py --model_path models/ResNet150.pth --sparsity 0.5 0.7 0.8 0.9 0.95 0.98 --out results/sparse_sweep
  python eval.py --sparsity 0.5 0.7 --w_bit 32 4 --prune layer

The most likely classes of image files, in float and at 4 bits, side by side
  python eval.py --images photo.jpg other.jpg --model_path runs/mine/last.pth --w_bit 4

What each layer contributes at the first --w_bit, written to results/layers/layers.csv
  python eval.py --w_bit 4 --report --out results/layers

Ranges, scales, bit-widths and roundings are never fitted to test images. A bit-width of 32 stands for full precision,
which is the first row of every model.
"""

from argparse import Namespace

from utils import cli, flags
from utils.cli import Parser, UserError, run
from utils.data.specs import DATASETS

POST = ["none", "bn_reestimate", "bias_correct", "adaround"]
ACT_RANGES = ["bn", "bn_published", "minmax", "percentile", "mse"]
SEARCHED = [1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 5.0, 6.0, 8.0]  # values of --clipping_range search


def add_networks(p: Parser) -> None:
    """Networks, data and weights."""
    # fmt: off
    flags.add_arch(p)
    p.add_argument("--model_path", nargs="+", default=["models/W4_ResNet.pth"], metavar="FILE", help="checkpoints")
    p.add_argument("--dataset", default=None, choices=list(DATASETS),
                   help="data set (default: the one that the file was trained on, cifar100 if it names none)")
    flags.add_data_dir(p)
    flags.add_image_size(p)
    p.add_argument("--images", nargs="+", default=None, metavar="FILE",
                   help="image files: prints the most likely classes of each in float and at each --w_bit and "
                   "--sparsity, and evaluates nothing")
    flags.add_workers(p)
    p.add_argument("--val_split", type=cli.index, default=None, metavar="N",
                   help="evaluate on the N training images that train.py --val_split N holds out, not on the test set "
                   "(default: 0, or as in training for a folder without val/)")
    p.add_argument("--sparsity", type=cli.sparsity, nargs="+", default=[0.0], metavar="S",
                   help="shares of weights to prune, smallest magnitudes first, before --w_bit is applied")
    p.add_argument("--prune", choices=["global", "layer"], default="global",
                   help="prune this share of all weights together, or of each layer separately")
    p.add_argument("--w_bit", type=cli.bits_or_float, nargs="+", default=None, metavar="B",
                   help="weight bit-widths (default: 4, or 32 with --sparsity)")
    p.add_argument("--weight_range", choices=["absmax", "mse"], default="absmax",
                   help="range of the weights' grid: up to the largest magnitude, or the one of least squared error")
    flags.add_granularity(p)
    flags.add_first_last_quant(p)
    # fmt: on


def add_deployment(p: Parser) -> None:
    """Activations, post-training methods and output."""
    # fmt: off
    p.add_argument("--a_bit", type=cli.bits_or_float, nargs="+", default=None, metavar="B",
                   help="activation bit-widths (default: 8 with --act_quant 1, else 32)")
    p.add_argument("--act_quant", type=int, choices=[0, 1], default=None,
                   help="1: quantize activations; 0: ignore --a_bit (default: 1 if --a_bit is given)")
    flags.add_act_at(p)
    p.add_argument("--act_range", choices=ACT_RANGES, default=None,
                   help="range of activations; bn: mean + n standard deviations, from batch norm, shortcuts included; "
                   "bn_published: the same without shortcuts; from training images: minmax: the largest value, "
                   "percentile: the value at --percentile, mse: the one of least squared error "
                   "(default: bn_published with --act_clipping 1, else minmax)")
    p.add_argument("--act_clipping", type=int, choices=[0, 1], default=0, help="1: the published flag for bn_published")
    p.add_argument("--clipping_range", type=cli.positive_or("search"), nargs="+", default=[6.0], metavar="N",
                   help="n of the bn ranges; of several, or of search, the one of least loss on training images is "
                   "taken")
    p.add_argument("--percentile", type=cli.percent, default=99.99,
                   help="percentile of a ReLU's values, zeros included, or of a layer's inputs")
    p.add_argument("--post", nargs="+", choices=POST, default=["none"],
                   help="methods applied after quantization, on training images; bn_reestimate: re-estimate batch-norm "
                   "statistics; bias_correct: restore mean outputs; adaround: learn roundings layer by layer")
    p.add_argument("--iterations", type=cli.count, default=1000, metavar="N",
                   help="iterations of adaround for each layer")
    flags.add_calib_images(p, 1024, "minmax, percentile, mse, search, --report and --post")
    p.add_argument("--seed", type=cli.seed, default=1, help="seed for the choice of calibration images")
    p.add_argument("--report", action="store_true",
                   help="also write a row for each layer of each model, at the first --w_bit, to layers.csv in --out, "
                   "which it needs: error of the weights, share near the grid, range of the inputs, and top-1 lost "
                   "if only this layer is quantized")
    p.add_argument("--lambda_s", type=cli.positive, default=150.0, help="recorded in results.json; no effect")
    p.add_argument("--out", default=None, metavar="DIR", help="folder for results.csv and results.json")
    p.add_argument("--exp_name", default=None, help="the published flag for --out results/<exp_name>")
    flags.add_device(p)
    p.add_argument("--precision", choices=["auto", "fp32", "bf16"], default="fp32",
                   help="precision of the forward pass")
    # fmt: on


def parser() -> Parser:
    p = Parser(__doc__)
    add_networks(p)
    add_deployment(p)
    return p


def parse() -> Namespace:
    args = parser().parse_args()
    args.w_bit = args.w_bit or ([32] if any(args.sparsity) else [4])
    if args.act_quant is None:
        args.act_quant = int(args.a_bit is not None)
    if not args.act_quant and (args.act_range or args.act_at != "relu"):
        flag = f"--act_range {args.act_range}" if args.act_range else f"--act_at {args.act_at}"
        raise UserError(f"{flag} needs --a_bit: activations are float without it")
    args.a_bit = (args.a_bit or [8]) if args.act_quant else [32]
    args.act_range = args.act_range or ("bn_published" if args.act_clipping else "minmax")
    args.clipping_range = SEARCHED if "search" in args.clipping_range else list(dict.fromkeys(args.clipping_range))
    args.out = args.out or (f"results/{args.exp_name}" if args.exp_name else None)
    if args.act_at == "inputs" and args.act_range.startswith("bn"):
        raise UserError(f"--act_range {args.act_range} is for ReLUs: --act_at inputs needs minmax, percentile or mse")
    if args.report and not args.out:
        raise UserError("--report writes layers.csv: name a folder with --out DIR")
    if args.report and args.w_bit[0] == 32:
        raise UserError("--report is for the first --w_bit, and 32 is full precision: put another bit-width first")
    if args.images:
        given = {"--a_bit": args.act_quant, "--post": args.post != ["none"], "--report": args.report, "--out": args.out}
        for flag in (flag for flag, value in given.items() if value):
            raise UserError(f"--images prints predictions with float activations: leave {flag} out")
    return args


def main() -> None:
    args = parse()
    if args.images:
        from utils.predicting import predict

        return predict(args)

    from utils.sweep import evaluate_all

    evaluate_all(args)


if __name__ == "__main__":
    run(main)
