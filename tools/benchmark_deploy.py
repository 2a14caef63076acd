"""Size, accuracy and speed of exported networks beside the same networks in torch, in one run on one machine.

    python -m tools.benchmark_deploy --model_path models/ResNet150.pth models/W4_ResNet.pth --w_bit 8 4
    python -m tools.benchmark_deploy --json results/benchmarks/deploy.json

For each checkpoint: float32 and bfloat16 in torch, float32 in onnxruntime, and there each --w_bit with float
activations, with 8-bit ones, and with 8-bit ones as `export.py --integer_kernels` writes them, on the grids that the
network was trained for. Images a second are medians over pieces of 256 images, the kinds taking turns; compare ratios
of one run. Needs: pip install -r requirements-export.txt
"""

import copy
import tempfile
from argparse import Namespace
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from quant import Grid, calibrate, quantize_activations, quantize_sums, quantize_weights
from quant.deploy import integer_weights, to_onnx
from tools.benchmark import alternate
from utils import flags
from utils.checkpoint import grid_of
from utils.cli import Parser, UserError, bits, count, first_line, run
from utils.data.split import Split
from utils.deployment import check_activations
from utils.device import autocast, machine, select_device
from utils.exporting import check_packages
from utils.files import check_output_file, command_line, git_commit, write_json
from utils.opening import Datasets, OpenedNetwork, open_network
from utils.training.evaluation import fold_batch_norm

if TYPE_CHECKING:
    from onnx import ModelProto

BATCHES = (1, 256)
PIECE = 256  # images timed at once
A_BIT = 8
CPU = torch.device("cpu")

Forward = Callable[[Tensor], Tensor]  # images float32 [N, 3, 32, 32], normalized -> logits [N, classes]
Row = dict[str, str | float]


class Kind(NamedTuple):
    """One way to run a network, with the bytes of its file, or in torch of its parameters."""

    name: str
    size: int
    forward: Forward


class Graph(NamedTuple):
    """What onnxruntime is given."""

    name: str
    proto: "ModelProto"
    float_activations: bool


def torch_kind(name: str, model: nn.Module, precision: str) -> Kind:
    """`model` in torch with its batch norm folded."""
    folded = fold_batch_norm(copy.deepcopy(model)).to(memory_format=torch.channels_last)
    width = {"fp32": 4, "bf16": 2}[precision]

    @torch.inference_mode()
    def forward(images: Tensor) -> Tensor:
        with autocast(images.device, precision):
            logits: Tensor = folded(images).float()
        return logits

    return Kind(name, width * sum(parameter.numel() for parameter in model.parameters()), forward)


def onnx_kind(graph: Graph, path: Path) -> Kind:
    """`graph`, written to `path`, in onnxruntime."""
    import onnx
    import onnxruntime

    onnx.save(graph.proto, path)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # Its threads would go on spinning after a run, on the cores of the kind that is timed next.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    options.add_session_config_entry("session.set_denormal_as_zero", "1")  # as `select_device` does for torch
    if graph.float_activations:  # let the weights become floats once, when the file is loaded, not at every run
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def forward(images: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {"images": images.contiguous().numpy()})[0])

    return Kind(graph.name, path.stat().st_size, forward)


def onnx_graphs(model: nn.Module, grids: Sequence[Grid], batches: Sequence[Tensor]) -> list[Graph]:
    """`model` in float and on each of `grids`; `batches` of training images are for the ranges of activations.

    Raises ValueError for what has no counterpart in ONNX.
    """
    ranges = calibrate(model, batches, A_BIT)
    graphs = [Graph("onnxruntime, float32", to_onnx(model, {}), float_activations=True)]
    for grid in grids:
        name, integers = f"onnxruntime, W{grid.bits}", integer_weights(model, grid)
        quantized = quantize_activations(quantize_weights(model, grid), A_BIT, ranges, inplace=True)
        with_sums = quantize_sums(quantized, batches)
        graphs += [
            Graph(name, to_onnx(model, integers), float_activations=True),
            Graph(f"{name}A{A_BIT}", to_onnx(quantized, integers), float_activations=False),
            Graph(f"{name}A{A_BIT}, integer kernels", to_onnx(with_sums, integers, int8=True), float_activations=False),
        ]
    return graphs


def top1(kind: Kind, test: Split) -> float:
    """Accuracy in percent on all of `test`. Raises ValueError if an output is not finite."""
    hits = 0
    for images, labels in test.batches(256):
        logits = kind.forward(images)
        if not logits.isfinite().all():
            raise ValueError(f"the outputs of {kind.name} are not finite")
        hits += int((logits.argmax(1) == labels).sum())
    return 100 * hits / len(test)


def images_per_second(kinds: Sequence[Kind], images: Tensor, batch_size: int, rounds: int) -> dict[str, float]:
    """Speed of each kind on `images` in batches of `batch_size`, by name."""
    batches = images.split(batch_size)
    pieces = {kind.name: partial(run_all, kind.forward, batches) for kind in kinds}
    return {name: len(images) / seconds for name, seconds in alternate(pieces, rounds, CPU).items()}


def run_all(forward: Forward, batches: Sequence[Tensor]) -> None:
    for images in batches:
        forward(images)


def compare(kinds: Sequence[Kind], test: Split, rounds: int) -> list[Row]:
    """A row for each of `kinds`, printed too: bytes, top-1 on `test` and images a second at each of BATCHES."""
    accuracy = {kind.name: top1(kind, test) for kind in kinds}
    images, _ = next(test.batches(PIECE))
    speed = {batch: images_per_second(kinds, images, batch, rounds) for batch in BATCHES}
    print(f"{'':40}{'bytes':>10}{'top-1':>8}" + "".join(f"{f'images/s at {batch}':>17}" for batch in BATCHES))
    rows: list[Row] = []
    for name, size, _ in kinds:
        rows.append({
            "kind": name, "bytes": size, "top1": round(accuracy[name], 4),
            **{f"images_per_second_at_{batch}": round(speed[batch][name], 1) for batch in BATCHES},
        })  # fmt: skip
        figures = "".join(f"{speed[batch][name]:17.0f}" for batch in BATCHES)
        print(f"{name:40}{size:10d}{accuracy[name]:8.2f}{figures}", flush=True)
    return rows


def rows_of(opened: OpenedNetwork, args: Namespace) -> list[Row]:
    """The rows of a checkpoint. Raises UserError for a network that cannot be exported or calibrated."""
    train = opened.data.train
    taken = train.count_for(args.calib_images)
    check_activations(opened.model, opened.path)
    batches = [images for images, _ in train.calibration(taken, seed=1)]
    grids = [grid_of(opened.checkpoint, width) for width in args.w_bit]
    kinds = [
        torch_kind("torch, float32", opened.model, "fp32"),
        torch_kind("torch, bfloat16", opened.model, "bf16"),
    ]
    with tempfile.TemporaryDirectory() as folder:
        try:
            for number, graph in enumerate(onnx_graphs(opened.model, grids, batches)):
                kinds.append(onnx_kind(graph, Path(folder) / f"{number}.onnx"))
            rows = compare(kinds, opened.data.test, args.rounds)
        except ValueError as error:  # as for an operation without a counterpart in the file
            raise UserError(f"{opened.path}: {first_line(error)}") from None
    return [{"model": opened.path, **row} for row in rows]


def parser() -> Parser:
    p = Parser(__doc__)
    p.add_argument("--model_path", nargs="+", default=["models/W4_ResNet.pth"], metavar="FILE", help="checkpoints")
    p.add_argument("--w_bit", type=bits, nargs="+", default=[8, 4], metavar="B", help="weight bit-widths")
    flags.add_data_dir(p)
    flags.add_calib_images(p, 1024, "activations")
    p.add_argument("--rounds", type=count, default=20, help="times that each kind is measured at each batch size")
    p.add_argument("--json", default=None, metavar="FILE", help="write the figures there too")
    return p


def main() -> None:
    args = parser().parse_args()
    if args.json:
        check_output_file("--json", args.json)
    check_packages()
    import onnxruntime

    device, _ = select_device(CPU.type, 0)
    hardware = machine(device)
    print(f"{hardware}, torch {torch.__version__}, onnxruntime {onnxruntime.__version__}, {args.rounds} rounds")
    datasets = Datasets(args.data_dir, device)
    rows: list[Row] = []
    for path in args.model_path:
        rows += rows_of(open_network(path, datasets, sizes=(32,)), args)
    if args.json:
        facts = {"command": command_line(), "commit": git_commit(), "machine": hardware, "torch": torch.__version__}
        write_json(args.json, {**facts, "onnxruntime": onnxruntime.__version__, "rounds": args.rounds, "rows": rows})


if __name__ == "__main__":
    run(main)
