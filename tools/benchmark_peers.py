"""Time and memory of a training step by each method of tools.peers, beside plain SGD's.

    python -m tools.benchmark_peers
    python -m tools.benchmark_peers --rounds 12 --csv results/benchmarks/peers.csv

A step is forward, backward and optimizer, in float32, on one held batch of 128, at 4 bits with a scale for each output
channel. All methods take turns, each on a network of its own: compare the ratios of one run. "Extra" is the peak of
memory in two steps beyond that of SGD's. In the table it stands for networks whose weights outweigh their activations.
"""

import gc
import importlib.util
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import SGD, Optimizer

from models import ResNet32
from quant import PSGD, Grid, layer_grids, psg_param_groups
from tools.benchmark import BATCH_SIZE, alternate
from tools.benchmark_optimizer import Memory, Row, squares, write_figures
from tools.peers import INSTALL, METHODS, OF_TORCHAO
from utils.cli import Parser, count, csv_file, run
from utils.device import machine, select_device
from utils.files import check_output_file, command_line, markdown_table
from utils.training.qat import LearnedGoal, QuantizationPenalty, Substitution, first_step, ste_changes

BASE = "SGD"
STEPS = 10_000  # of the stage
LARGE = 10_000_000  # parameters from which their memory can be told from that of activations
GRID = Grid(4, per_channel=True)
NETWORKS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {  # and their inputs
    "ResNet-32": lambda: (ResNet32(100), torch.randn(BATCH_SIZE, 3, 32, 32)),
    "24 x 1024^2": lambda: (squares(1024), torch.randn(BATCH_SIZE, 1024)),
}
CHANGES = {
    "ste": "the forward pass takes rounded weights",
    "lsq": "the forward pass takes rounded weights; the steps are parameters",
    "parq": "the forward pass takes relaxed weights, which the optimizer keeps beside the float ones",
    "binaryrelax": "the same",
    "msqe": "the loss has one more term",
    "psgd": "the optimizer is wrapped",
}


def with_method(method: str, model: nn.Module) -> Optimizer:
    """Makes `model` train by `method`, or by SGD alone; its optimizer."""
    groups = psg_param_groups(model, GRID) if method == "psgd" else [{"params": [*model.parameters()]}]
    optimizer: Optimizer = SGD(groups, lr=1e-4, momentum=0.9, weight_decay=1e-4, fused=method not in OF_TORCHAO)
    if method == "psgd":
        return PSGD(optimizer, "auto", steps=STEPS)
    if method == "ste":
        Substitution(model, ste_changes(model, GRID))
    if method == "lsq":
        steps = {name: first_step(model.get_parameter(name), grid) for name, grid in layer_grids(model, GRID).items()}
        optimizer.add_param_group({"params": [*steps.values()], "weight_decay": 0.0})
        Substitution(model, LearnedGoal(GRID, steps).changes(model))
    if method == "msqe":
        QuantizationPenalty(optimizer, model, GRID, 10.0, STEPS)
    if method in OF_TORCHAO:
        from utils.training.parq import Relaxed

        optimizer = relaxed = Relaxed(optimizer, model, GRID, method, STEPS)
        Substitution(model, relaxed.changes())
    return optimizer


def training_step(network: str, method: str, device: torch.device) -> Callable[[], object]:
    """A step of a network of its own, the same for each method."""
    torch.manual_seed(0)
    model, inputs = NETWORKS[network]()
    layout = torch.channels_last if inputs.dim() == 4 else torch.contiguous_format
    model = model.to(device).to(memory_format=torch.channels_last).train()
    inputs = inputs.to(device, memory_format=layout)
    labels = torch.randint(100, (len(inputs),), device=device)
    optimizer = with_method(method, model)

    def once() -> None:
        optimizer.zero_grad()
        cross_entropy(model(inputs), labels).backward()
        optimizer.step()

    return once


def memory_of(network: str, method: str, device: torch.device) -> int:
    """Bytes at the peak of two steps, beside what there was before the network."""
    memory = Memory(device)
    memory.start()
    step = training_step(network, method, device)
    step()
    step()
    peak = memory.peak()
    del step
    gc.collect()  # a network and its hooks hold each other
    return peak


def rows_of(network: str, methods: list[str], rounds: int, device: torch.device) -> Iterator[Row]:
    """A row for SGD and for each of `methods`."""
    size = sum(parameter.numel() for parameter in NETWORKS[network]()[0].parameters())
    kinds = [BASE, *methods]
    for kind in kinds:
        memory_of(network, kind, device)  # loads code, which is not memory of the method
    peaks = {kind: memory_of(network, kind, device) for kind in kinds}
    seconds = alternate({kind: training_step(network, kind, device) for kind in kinds}, rounds, device)
    for kind in kinds:
        extra = peaks[kind] - peaks[BASE]
        yield {
            "network": network, "parameters": size, "method": kind, "milliseconds": round(1000 * seconds[kind], 2),
            "ratio": round(seconds[kind] / seconds[BASE], 3), "extra_bytes": extra,
            "extra_share": round(extra / (4 * size), 4),
        }  # fmt: skip


def markdown(rows: list[dict[str, str]]) -> str:
    """A line for each method: what it changes, and for each network its ratio and, if large, its extra memory."""
    found = {(row["network"], row["method"]): row for row in rows}
    networks = list(dict.fromkeys(network for network, _ in found))
    sizes = {network: int(found[network, BASE]["parameters"]) for network in networks}
    heads = [f"time, {network}, {size / 1e6:.1f} M" for network, size in sizes.items()]
    large = [network for network, size in sizes.items() if size >= LARGE]
    heads += [f"extra memory, {network}" for network in large]
    lines = []
    for method in (method for method in METHODS if (networks[0], method) in found):
        figures = [f"{float(found[network, method]['ratio']):.2f}" for network in networks]
        figures += [f"{max(float(found[network, method]['extra_share']), 0):.0%}" for network in large]
        lines.append([METHODS[method], CHANGES[method], *figures])
    return markdown_table(["method", "what changes", *heads], lines)


def parser() -> Parser:
    p = Parser(__doc__)
    p.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=list(NETWORKS), help="what is measured")
    p.add_argument("--device", default=None, help="cpu, cuda:1, ... (default: a GPU, or the CPU)")
    p.add_argument("--rounds", type=count, default=12, help="times that every step is measured")
    p.add_argument("--csv", type=csv_file, metavar="FILE", help="write the figures there, and their origin beside")
    return p


def main() -> None:
    args = parser().parse_args()
    if args.csv:
        check_output_file("--csv", args.csv)
    device, _ = select_device(args.device, 0)
    methods = [method for method in METHODS if method not in OF_TORCHAO or importlib.util.find_spec("torchao")]
    print(f"{machine(device)}, torch {torch.__version__}, float32, {args.rounds} rounds")
    if len(methods) < len(METHODS):
        print(f"{', '.join(OF_TORCHAO)} left out: they need torchao: {INSTALL}")
    rows: list[Row] = []
    for network in args.networks:
        for row in rows_of(network, methods, args.rounds, device):
            print(f"{network:12} {row['method']:12} {row['milliseconds']:9} ms {row['ratio']:7} {row['extra_share']}")
            rows.append(row)
    print(markdown([{key: str(value) for key, value in row.items()} for row in rows]))
    if args.csv:
        write_figures(args.csv, rows, command_line(), device, args.rounds)


if __name__ == "__main__":
    run(main)
