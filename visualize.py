"""Draw weights, results and training curves as PNG files.

A histogram of every layer of the shipped SGD and PSGD networks, float and quantized, into visualizations/
  python visualize.py

Some layers of other checkpoints, at 3 bits (the paper's figure 1b)
  python visualize.py --model_path runs/a/last.pth runs/b/last.pth --labels SGD PSGD --w_bit 3 \\
                      --layers conv1.weight fc.weight --out figures

The paper's figure 1a, weight error and test error over bit-widths, from the results of eval.py
  python visualize.py --figure 1a --results results/weights/w4/results.csv --out fig

Top-1 over the epochs of runs, float and quantized: the first run beside each of the others
  python visualize.py --figure curves --runs results/runs/vanilla_seed1 results/runs/w4_psgd_seed1 \\
                      --labels SGD PSGD --out fig

Top-1 over weight and activation bit-widths, and what each layer contributes, from eval.py
  python visualize.py --figure grid --results results/activations/w4_mse/results.csv --out fig
  python visualize.py --figure report --results results/studies/report/layers.csv --out fig

The law of the pace beside recorded runs, from tools.pace
  python visualize.py --figure pace --results results/studies/pace/pace.csv --out fig

PSGD with target zero and weight decay beside the lasso, from tools.lasso
  python visualize.py --figure lasso --out fig

The share near the grid over lambda_s with AdamW, PSG on the gradient and on the update, from examples/character_gpt.py
  python visualize.py --figure lambda_s --results results/studies/character_gpt/lambda_s.csv --out fig

The paper's figures 2 (a toy loss in the warped space), 3 (a sparse network's weights) and 4 (curvature)
  python visualize.py --figure 2 --out fig
  python visualize.py --figure 3 --model_path models/ResNet150.pth runs/sparse/last.pth --labels SGD PSGD
  python visualize.py --figure 4 --results results/studies/hessian --out fig

No display is needed. In a histogram each column is a network: the upper row shows its float weights, the lower row the
same weights quantized at the granularity that it was trained with. Thin lines mark the grid points, up to 5 bits. With
a grid for each output channel, the axis counts steps of each weight's own channel.
"""

from argparse import Namespace

from utils import flags
from utils.cli import Parser, UserError, bits, run, sparsity

FIGURES = ["layers", "1a", "curves", "grid", "report", "pace", "lasso", "lambda_s", "2", "3", "4"]
RESULTS = {
    "report": "results/studies/report/layers.csv",
    "pace": "results/studies/pace/pace.csv",
    "lasso": "results/studies/lasso/lasso.csv",
    "lambda_s": "results/studies/character_gpt/lambda_s.csv",
    "4": "results/studies/hessian",
}  # default of --results by figure
TAKEN_BY = {
    "model_path": ("layers", "3"),
    "layers": ("layers",),
    "results": ("1a", "grid", "report", "pace", "lasso", "lambda_s", "4"),
    "runs": ("curves",),
}  # the figures that take a flag


def parser() -> Parser:
    p = Parser(__doc__)
    # fmt: off
    p.add_argument("--figure", choices=FIGURES, default="layers",
                   help="layers: weight histograms; 1a: errors over bit-widths; curves: runs over epochs; grid: top-1 "
                   "over weight and activation bit-widths; report: layer by layer; pace: runs beside the law; "
                   "lasso: its path beside PSGD's; lambda_s: shares near the grid over lambda_s; "
                   "2, 3, 4: the paper's figures")
    p.add_argument("--model_path", nargs="+", metavar="FILE",
                   default=["models/ResNet150.pth", "models/W4_ResNet.pth"], help="layers, 3: checkpoints")
    p.add_argument("--w_bit", type=bits, default=4, help="layers: bit-width of the quantized histograms and the grid")
    flags.add_first_last_quant(p)
    p.add_argument("--layers", nargs="+", default=None, metavar="NAME",
                   help="layers: state_dict names (default: all weights)")
    p.add_argument("--results", nargs="+", default=None, metavar="FILE",
                   help="1a, grid: results.csv of eval.py (1a takes several); report: layers.csv of eval.py "
                   "--report; pace: pace.csv of tools.pace; lasso: lasso.csv of tools.lasso; lambda_s: a results.csv "
                   "of examples/character_gpt.py, with a lambda_s in each row; 4: folder of tools.hessian (default: "
                   "those in results/)")
    p.add_argument("--sparsity", type=sparsity, default=0.9, metavar="S", help="3: share of weights to mark")
    p.add_argument("--runs", nargs="+", default=["runs/vanilla", "runs/cifar100/4bits"], metavar="DIR",
                   help="curves: run folders, or any folders with a metrics.csv; the first is drawn beside each other")
    p.add_argument("--labels", nargs="+", default=None, metavar="NAME",
                   help="names of the checkpoints or runs in the pictures (default: SGD PSGD for the default ones, "
                   "else the file names)")
    p.add_argument("--out", default="visualizations", metavar="DIR", help="folder for the pictures")
    # fmt: on
    return p


def parse() -> Namespace:
    p = parser()
    args = p.parse_args()
    for key, figures in TAKEN_BY.items():
        if args.figure not in figures and getattr(args, key) != p.get_default(key):
            raise UserError(f"--{key} has no effect with --figure {args.figure}: it is for {', '.join(figures)}")
    args.results = args.results or [RESULTS.get(args.figure, "results/weights/w4/results.csv")]
    flag = {"layers": "model_path", "3": "model_path", "curves": "runs"}.get(args.figure)
    if flag:
        named = getattr(args, flag)
        if args.labels is None:
            default = named == p.get_default(flag)
            args.labels = ["SGD", "PSGD"] if default else [path.removesuffix(".pth") for path in named]
        if len(args.labels) != len(named):
            raise UserError(f"{len(args.labels)} --labels for {len(named)} of --{flag}: give one for each")
        if len(set(args.labels)) < len(args.labels):
            raise UserError(f"the labels {', '.join(args.labels)} are not all different: choose them with --labels")
    elif args.labels:
        raise UserError(f"--labels {' '.join(args.labels)}: figure {args.figure} takes its names from the results")
    return args


def main() -> None:
    args = parse()

    from utils.drawing.figures import draw_all

    draw_all(args)


if __name__ == "__main__":
    run(main)
