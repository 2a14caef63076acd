"""The noise that quantized activations add to networks of many kinds, layer by layer.

    python -m tools.activation_table

Each network has random weights, batch-norm statistics of random images, and quantizers at the inputs of its layers. The
ranges are those of least squared error on other random images. A row has the signal-to-noise ratio in dB of one network
at one setting: the least and the median of the layers' outputs, and the network's output. The GPT-2 needs the package
transformers.
"""

import importlib
import statistics
from collections.abc import Sequence
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

from quant import Grid, calibrate, layer_sqnr, quantize_activations, quantize_weights, reestimate_batch_norm
from utils.cli import Parser, UserError, run
from utils.files import check_output_file, markdown_table, write_csv

NETWORKS = [
    "resnet18", "mobilenet_v2", "mobilenet_v3_small", "efficientnet_b0", "convnext_tiny", "vit_b_16", "swin_t", "gpt2",
]  # fmt: skip
SETTINGS = ((8, 8), (4, 8))  # bits of the weights and of the activations
SIZE = 64  # pixels per side of an image
CALIBRATION = 2  # batches, after which one more is measured
BATCH = 16
TOKENS = 256  # of the small GPT-2


def network(name: str) -> nn.Module:
    """The network `name` with random weights. Those that begin as zeros are random too, and the layer scales of
    ConvNeXt, which begin at 1e-6, are 1: with these a branch would have no effect on the output."""
    torch.manual_seed(0)
    if name == "gpt2":
        try:
            transformers = importlib.import_module("transformers")
        except ImportError:
            raise UserError("gpt2 needs the package transformers: pip install transformers") from None
        config = transformers.GPT2Config(vocab_size=TOKENS, n_positions=SIZE, n_embd=64, n_layer=4, n_head=4)
        language: nn.Module = transformers.GPT2LMHeadModel(config).eval()
        return language
    settings = {"image_size": SIZE} if name.startswith("vit") else {}
    net: nn.Module = torchvision.models.get_model(name, num_classes=100, **settings).eval()
    for key, parameter in net.named_parameters():
        if key.endswith("layer_scale"):
            nn.init.ones_(parameter)
        elif key.endswith("weight") and not parameter.any():
            nn.init.normal_(parameter, std=0.02)
    return net


def inputs(name: str) -> list[Tensor]:
    """Batches of random images float32 [BATCH, 3, SIZE, SIZE], or of random token ids int64 [BATCH, SIZE]."""
    generator = torch.Generator().manual_seed(1)
    if name == "gpt2":
        return [torch.randint(0, TOKENS, (BATCH, SIZE), generator=generator) for _ in range(CALIBRATION + 1)]
    return [torch.randn(BATCH, 3, SIZE, SIZE, generator=generator) for _ in range(CALIBRATION + 1)]


def rows(name: str) -> list[dict[str, Any]]:
    """A row for each of SETTINGS."""
    net, batches = network(name), inputs(name)
    if any(isinstance(module, nn.BatchNorm2d) for module in net.modules()):
        reestimate_batch_norm(net, batches[:CALIBRATION])
    found = []
    for w_bit, a_bit in SETTINGS:
        grid = Grid(w_bit, per_channel=True)
        ranges = calibrate(net, batches[:CALIBRATION], a_bit, at="inputs", grid=grid)
        quantized = quantize_activations(quantize_weights(net, grid), a_bit, ranges, inplace=True)
        sqnr = layer_sqnr(net, quantized, batches[CALIBRATION:])
        output = sqnr.pop("")
        worst = min(sqnr, key=lambda layer: sqnr[layer])
        found.append({
            "network": name, "quantizers": len(ranges), "w_bit": w_bit, "a_bit": a_bit, "worst_layer": worst,
            "least": round(sqnr[worst], 1), "median": round(statistics.median(sqnr.values()), 1),
            "output": round(output, 1),
        })  # fmt: skip
    return found


def markdown(found: Sequence[dict[str, Any]]) -> str:
    """The rows as the table of docs/deployment.md, a line for each network."""
    settings = list(dict.fromkeys((row["w_bit"], row["a_bit"]) for row in found))
    figures = ("least", "median", "output")
    heads = ["network", "quantizers", *(f"W{w}A{a} {figure}" for w, a in settings for figure in figures)]
    lines = []
    for name in dict.fromkeys(row["network"] for row in found):
        own = [row for row in found if row["network"] == name]
        cells = [f"{float(row[figure]):.1f}" for row in own for figure in figures]
        lines.append([name, str(own[0]["quantizers"]), *cells])
    return markdown_table(heads, lines).rstrip("\n")


def parser() -> Parser:
    p = Parser(__doc__ or "")
    p.add_argument("--networks", nargs="+", choices=NETWORKS, default=NETWORKS, metavar="NAME",
                   help=f"of {', '.join(NETWORKS)}")  # fmt: skip
    p.add_argument("--out", default="results/benchmarks/activations.csv", metavar="FILE", help="file to write")
    return p


def main() -> None:
    args = parser().parse_args()
    check_output_file("--out", args.out)
    found = []
    for name in args.networks:
        found += rows(name)
        print(markdown(found[-len(SETTINGS) :]), flush=True)
    write_csv(args.out, found)
    print(markdown(found))


if __name__ == "__main__":
    run(main)
