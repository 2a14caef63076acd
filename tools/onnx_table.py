"""Networks of torchvision, timm and transformers as ONNX files: how near onnxruntime comes to torch, and the sizes.

    python -m tools.onnx_table --out results/benchmarks/onnx_networks.csv
    python -m tools.onnx_table --networks resnet18 swin_t

Each network has random weights, and batch norm the statistics of a few random batches. It is written with weights of
8, 4 and 2 bits, and with weights of 4 bits and 8-bit quantizers at the inputs of its layers. "difference" is the
largest one between an output of onnxruntime, which runs the file as it is written, and of the quantized network in
torch, in parts of the spread of all outputs. "rounding" is the same between torch in float64 and in float32: as much
follows from the order of sums alone. Needs: pip install -r requirements-export.txt timm transformers
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from quant import calibrate, quantize_activations, quantize_weights
from quant.deploy import integer_weights
from quant.deploy.onnx_capture import float_program
from quant.deploy.onnx_graph import with_integers
from quant.layers import copy_network
from utils.cli import Parser, UserError, first_line, run
from utils.exporting import check_packages, run_onnx
from utils.files import check_output_file, markdown_table, write_csv

BITS = (8, 4, 2)
W_BIT, A_BIT = 4, 8  # of the setting with quantized activations
BATCH = 8
Row = dict[str, str | int]


def of_torchvision(name: str, pixels: int) -> tuple[nn.Module, Tensor]:
    from torchvision import models

    size = {"image_size": pixels} if name.startswith("vit") else {}
    return models.get_model(name, weights=None, **size), torch.randn(BATCH, 3, pixels, pixels)


def of_timm(name: str, pixels: int) -> tuple[nn.Module, Tensor]:
    import timm

    size = {"img_size": pixels} if name.startswith("vit") else {}
    return timm.create_model(name, **size), torch.randn(BATCH, 3, pixels, pixels)


def tiny_gpt2(tokens: int) -> tuple[nn.Module, Tensor]:
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"vocab_size": 512, "n_positions": tokens, "n_embd": 64, "n_layer": 4, "n_head": 4}
    config = GPT2Config(**sizes, bos_token_id=0, eos_token_id=0, use_cache=False)
    return GPT2LMHeadModel(config), torch.randint(config.vocab_size, (BATCH, tokens))


NETWORKS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    **{name: partial(of_torchvision, name, 64) for name in (
        "resnet18", "mobilenet_v2", "mobilenet_v3_small", "efficientnet_b0", "convnext_tiny", "densenet121",
        "regnet_y_400mf", "shufflenet_v2_x1_0", "vit_b_16", "swin_t",
    )},
    **{f"timm {name}": partial(of_timm, name, 64) for name in ("mobilenetv2_100", "vit_tiny_patch16_224")},
    "transformers GPT-2, 4 layers": partial(tiny_gpt2, 32),
}  # fmt: skip


@torch.no_grad()
def built(name: str) -> tuple[nn.Module, Tensor]:
    """The network, in eval mode, and a batch of inputs. Raises UserError if its library is missing."""
    torch.manual_seed(0)
    try:
        model, inputs = NETWORKS[name]()
    except ImportError as error:
        raise UserError(f"{name}: {first_line(error)}: pip install timm transformers") from None
    for parameter in model.parameters():
        if not parameter.any():  # such as the head of a vision transformer: all outputs would be zero
            parameter.normal_(0, 0.02)
    if inputs.is_floating_point():
        model.train()
        for _ in range(3):
            model(torch.randn_like(inputs))
    return model.eval(), inputs


@torch.no_grad()
def outputs_of(model: nn.Module, inputs: Tensor) -> Tensor:
    outputs = model(inputs)
    logits: Tensor = outputs if isinstance(outputs, Tensor) else outputs.logits
    return logits


def row(name: str, kind: str, deployed: nn.Module, graph: bytes, inputs: Tensor) -> Row:
    """The row of a file, printed too."""
    expected, found = outputs_of(deployed, inputs), run_onnx(graph, inputs, as_written=True)
    exact = outputs_of(copy_network(deployed).double(), inputs.double() if inputs.is_floating_point() else inputs)
    spread = expected.max() - expected.min()
    difference, rounding = (((other - expected).abs().max() / spread).item() for other in (found, exact))
    float_bytes = 4 * sum(parameter.numel() for parameter in deployed.parameters())
    print(
        f"{name:30}{kind:6}{difference:12.1e}{rounding:12.1e}{len(graph):12d}{len(graph) / float_bytes:8.3f}",
        flush=True,
    )
    return {
        "network": name, "kind": kind, "difference": f"{difference:.1e}", "rounding": f"{rounding:.1e}",
        "bytes": len(graph), "float_bytes": float_bytes,
    }  # fmt: skip


def rows_of(name: str) -> list[Row]:
    """The rows of a network, which is exported once for all settings with float activations."""
    model, inputs = built(name)
    program, rows = float_program(model, (inputs,)), []
    for bits in BITS:
        graph = with_integers(program.clone(), model, integer_weights(model, bits)).SerializeToString()
        rows.append(row(name, f"W{bits}", quantize_weights(model, bits), graph, inputs))
    ranges = calibrate(model, [inputs], A_BIT, "minmax", at="inputs", grid=W_BIT)
    deployed = quantize_activations(quantize_weights(model, W_BIT), A_BIT, ranges, inplace=True)
    graph = with_integers(
        float_program(deployed, (inputs,)), deployed, integer_weights(model, W_BIT)
    ).SerializeToString()
    return [*rows, row(name, f"W{W_BIT}A{A_BIT}", deployed, graph, inputs)]


def cell(row: Mapping[str, str | int], float_bytes: int) -> str:
    """Size and difference; with quantized activations also the rounding."""
    words = f"{int(row['bytes']) / float_bytes:.3f}, {row['difference']}"
    return f"{words} ({row['rounding']})" if "A" in str(row["kind"]) else words


def markdown(rows: Sequence[Mapping[str, str | int]]) -> str:
    """The rows of a CSV file as a table: a line for each network, and in the cells the bytes of the file in parts of
    the float32 parameters' bytes and the difference, with quantized activations also the rounding in parentheses."""
    kinds = [*(f"W{bits}" for bits in BITS), f"W{W_BIT}A{A_BIT}"]
    lines = []
    for name in dict.fromkeys(row["network"] for row in rows):
        own = {row["kind"]: row for row in rows if row["network"] == name}
        total = int(next(iter(own.values()))["float_bytes"])
        cells = [cell(own[kind], total) if kind in own else "" for kind in kinds]
        lines.append([str(name), f"{total:,}", *cells])
    return markdown_table(["network", "float32 bytes", *kinds], lines)


def parser() -> Parser:
    p = Parser(__doc__)
    p.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=list(NETWORKS), metavar="NAME",
                   help="networks to write (default: all)")  # fmt: skip
    p.add_argument("--out", default=None, metavar="FILE", help="write the rows to this .csv file too")
    return p


def main() -> None:
    args = parser().parse_args()
    if args.out:
        check_output_file("--out", args.out)
    check_packages()
    print(f"{'':30}{'':6}{'difference':>12}{'rounding':>12}{'bytes':>12}{'share':>8}")
    rows: list[Row] = []
    for name in args.networks:
        rows += rows_of(name)
        if args.out:  # after each network: all of them take several minutes
            write_csv(args.out, rows)
    print("\n" + markdown(rows))


if __name__ == "__main__":
    run(main)
