"""Draw the weights of networks: a histogram of each convolution and linear layer, float and quantized.

Every layer of the shipped SGD and PSGD networks, into visualizations/
  python visualize.py

Some layers of other checkpoints, at 3 bits
  python visualize.py --model_path runs/a/last.pth runs/b/last.pth --labels SGD PSGD --w_bit 3 \\
                      --layers conv1.weight fc.weight --out figures

Needs no display. A column of each picture is a network, the upper row its float weights, the lower row the same
weights quantized; thin lines mark the points of the grid, up to 5 bits.
"""

from argparse import Namespace
from pathlib import Path

from utils.cli import Parser, UserError, bits, run

COLORS = {"SGD": "#3b6fb6", "PSGD": "#c8443c"}  # the paper's blue and red
OTHER_COLORS = ["#3b6fb6", "#c8443c", "#4c9a5b", "#8a63a8", "#c98a2b"]
BINS = 201


def parse() -> Namespace:
    p = Parser(__doc__)
    # fmt: off
    p.add_argument("--model_path", nargs="+", metavar="FILE",
                   default=["models/ResNet82.pth", "models/W4_ResNet.pth"], help="checkpoints")
    p.add_argument("--labels", nargs="+", default=None, metavar="NAME",
                   help="names of the checkpoints in the pictures (default: SGD PSGD for the default checkpoints, "
                   "else the file names)")
    p.add_argument("--w_bit", type=bits, default=4, help="bit-width of the quantized histograms and the grid lines")
    p.add_argument("--first_last_quant", type=int, choices=[0, 1], default=1,
                   help="1: first and last layer too, at 8 bits if --w_bit < 4; 0: leave them out")
    p.add_argument("--layers", nargs="+", default=None, metavar="NAME", help="state_dict names (default: all weights)")
    p.add_argument("--out", default="visualizations", metavar="DIR", help="folder for <layer>.png")
    # fmt: on
    args = p.parse_args()
    if args.labels is None:
        default = args.model_path == p.get_default("model_path")
        args.labels = ["SGD", "PSGD"] if default else [str(Path(path).with_suffix("")) for path in args.model_path]
    if len(args.labels) != len(args.model_path):
        raise UserError(f"{len(args.labels)} --labels for {len(args.model_path)} checkpoints: give one for each")
    if len(set(args.labels)) < len(args.labels):
        raise UserError(f"the labels {', '.join(args.labels)} are not all different: name them with --labels")
    return args


def main() -> None:
    args = parse()

    import matplotlib

    matplotlib.use("Agg")
    import seaborn
    from matplotlib import pyplot

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
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)

    seaborn.set_theme(style="ticks", context="notebook")
    layers = args.layers or shared
    for number, name in enumerate(layers, 1):
        weights = {label: network.get_parameter(name).detach() for label, network in networks.items()}
        figure = layer_histograms(name, weights, widths[0][name])
        path = out / f"{name}.png"
        figure.savefig(path, dpi=130)
        pyplot.close(figure)
        print(f"{number}/{len(layers)}  {path}", flush=True)


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
        color = COLORS.get(label, OTHER_COLORS[column % len(OTHER_COLORS)])
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


if __name__ == "__main__":
    run(main)
