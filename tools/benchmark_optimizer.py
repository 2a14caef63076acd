"""Time and memory of an optimizer's step with PSG and without, and of the functions on weights, as networks grow.

    python -m tools.benchmark_optimizer
    python -m tools.benchmark_optimizer --networks ResNet-32 GPT-2 --csv results/benchmarks/optimizer.csv

The networks are trees of layers with random weights and gradients; nothing runs forward. Fused SGD has PSG on the
gradient, fused AdamW (beta1 = 0) on the update. All kinds of a step take turns on the same weights and the same state:
compare the ratios of one run. "Extra" is the peak of memory during a step or call above what was there before.
"""

import ctypes
import gc
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from models import ResNet32, build_model
from quant import PSGD, Grid, grid_share, psg_param_groups, quantize_weights, weight_mse
from quant.deploy.packed_file import save_packed
from tools.benchmark import alternate
from utils.cli import Parser, count, csv_file, run
from utils.device import machine, select_device
from utils.files import check_output_file, command_line, git_commit, markdown_table, write_csv, write_json

BASES = {"SGD": "gradient", "AdamW": "update"}
STAGE = {"steps": 1_000_000, "tau_end": 10.0, "noise_limit": 0.1}  # of "auto"
KINDS: dict[str, dict[str, Any]] = {  # settings of the scaled groups
    "a scale for each tensor": {"lambda_s": 150.0, "per_channel": False},
    "a scale for each channel": {"lambda_s": 150.0, "per_channel": True},
    "the same, lambda_s auto": {"lambda_s": "auto", "per_channel": True, **STAGE},
}
COMPILED = ", compiled"


def in_a_file(model: nn.Module, grid: Grid) -> None:
    with tempfile.TemporaryDirectory() as folder:
        save_packed(f"{folder}/network.safetensors", model, grid)


FUNCTIONS: dict[str, Callable[[nn.Module, Grid], object]] = {
    "grid_share": grid_share,
    "weight_mse": weight_mse,
    "quantize_weights": quantize_weights,
    "quantize_weights(inplace=True)": partial(quantize_weights, inplace=True),
    "save_packed": in_a_file,
}

Row = dict[str, str | float]


def gpt2() -> nn.Module:
    """The layers of GPT-2 small, whose head shares its weight with the embedding."""
    sizes = [(768, 2304), (768, 768), (768, 3072), (3072, 768)]
    blocks = [nn.Sequential(*(nn.Linear(*size) for size in sizes), nn.LayerNorm(768)) for _ in range(12)]
    return nn.Sequential(nn.Embedding(50257, 768), nn.Embedding(1024, 768), *blocks)


def squares(width: int) -> nn.Module:
    return nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(24)))


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "ResNet-32": lambda: ResNet32(100),
    "ResNet-50": lambda: build_model("resnet50", 1000),
    "ViT-B": lambda: build_model("vit_b_16", 1000),
    "24 x 2048^2": lambda: squares(2048),
    "GPT-2": gpt2,
    "24 x 4096^2": lambda: squares(4096),
}


def grid_of(model: nn.Module) -> Grid:
    """4 bits. Embeddings stay in float, which needs no warning here."""
    has_embeddings = any(isinstance(module, nn.Embedding) for module in model.modules())
    return Grid(4, exclude=nn.Embedding if has_embeddings else ())


class Memory:
    """Peak of memory since `start`, in bytes: of the GPU's allocator, else of this process, on Linux."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.before = device, 0

    def start(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self.before = torch.cuda.memory_allocated(self.device)
            return
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # else freed memory that the process has kept would be used again unseen
        Path("/proc/self/clear_refs").write_text("5")
        self.before = self.status("VmRSS")

    def peak(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) - self.before
        return max(self.status("VmHWM") - self.before, 0)

    @staticmethod
    def status(name: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name))


class Steps:
    """Steps of one optimizer with PSG of several kinds and without, on the weights of `model`."""

    def __init__(self, base: str, model: nn.Module, compiled: bool) -> None:
        groups = psg_param_groups(model, grid_of(model))
        self.base: Optimizer = (
            SGD(groups, lr=1e-9, momentum=0.9, weight_decay=1e-4, fused=True)
            if base == "SGD"
            else AdamW(groups, lr=1e-9, betas=(0.0, 0.999), fused=True)
        )
        self.name, self.optimizer = base, PSGD(self.base, acts_on=BASES[base])
        self.kinds = [*KINDS, *(kind + COMPILED for kind in KINDS if compiled)]
        self.parameters = list(model.parameters())
        self.gradients = [torch.randn_like(parameter) for parameter in self.parameters]
        for parameter in self.parameters:
            parameter.grad = torch.empty_like(parameter)

    def pieces(self) -> dict[str, Callable[[], object]]:
        return {self.name: self.base.step, **{kind: self.piece(kind) for kind in self.kinds}}

    def piece(self, kind: str) -> Callable[[], object]:
        """A step of the optimizer after its scaled groups have taken the settings of `kind`."""

        def once() -> None:
            self.optimizer.compiled = kind.endswith(COMPILED)
            for group in self.optimizer.param_groups:
                if "bits" in group:
                    group.pop("steps", None)
                    group.update(KINDS[kind.removesuffix(COMPILED)])
            self.optimizer.step()

        return once

    @torch.no_grad()
    def restore_gradients(self) -> None:
        """PSG leaves scaled gradients, which would be denormal numbers after a few steps."""
        for parameter, gradient in zip(self.parameters, self.gradients):
            parameter.grad.copy_(gradient)  # type: ignore[union-attr]


def rows_of(name: str, rounds: int, device: torch.device, compiled: bool) -> Iterator[Row]:
    """A row for each optimizer and kind of step, and for each function."""
    torch.manual_seed(0)
    model, memory = NETWORKS[name]().to(device), Memory(device)
    size = sum(parameter.numel() for parameter in model.parameters())

    def row(optimizer: str, kind: str, seconds: float, unit: float, extra: int) -> Row:
        return {
            "network": name, "parameters": size, "optimizer": optimizer, "kind": kind,
            "milliseconds": round(1000 * seconds, 3), "ratio": round(seconds / unit, 3),
            "extra_bytes": extra, "extra_share": round(extra / (4 * size), 4),
        }  # fmt: skip

    for base in BASES:
        torch.compiler.reset()  # it keeps a few variants of a function only, as many as one network needs
        steps = Steps(base, model, compiled)
        pieces = steps.pieces()
        seconds = alternate(pieces, rounds, device, steps.restore_gradients)
        for kind, piece in pieces.items():
            extra = peak_of(memory, piece)
            yield row(base, "" if kind == base else kind, seconds[kind], seconds[base], extra)
        for parameter in model.parameters():
            parameter.grad = None
        del steps, pieces
    calls = {key: partial(function, model, grid_of(model)) for key, function in FUNCTIONS.items()}
    seconds = alternate(calls, max(rounds // 4, 1), device)
    for key, call in calls.items():
        yield row("", key, seconds[key], seconds["grid_share"], peak_of(memory, call))


def peak_of(memory: Memory, call: Callable[[], object]) -> int:
    memory.start()
    call()
    return memory.peak()


def markdown(rows: list[dict[str, str]]) -> str:
    """The steps' ratios and shares of extra memory as a table: a line for each kind, a column for each network."""
    networks, heads = _networks(rows)
    found = {(row["network"], row["optimizer"], row["kind"]): row for row in rows if row["optimizer"]}
    lines = []
    for base in BASES:
        for kind in dict.fromkeys(kind for _, optimizer, kind in found if optimizer == base and kind):
            cells = [found[network, base, kind] for network in networks]
            figures = [f"{float(cell['ratio']):.2f}, {float(cell['extra_share']):.0%}" for cell in cells]
            lines.append([f"PSGD({base})", kind, *figures])
    return markdown_table(["optimizer", "kind", *heads], lines)


def markdown_of_functions(rows: list[dict[str, str]]) -> str:
    """The functions' milliseconds and shares of extra memory as a table: a line for each, a column for each network."""
    networks, heads = _networks(rows)
    found = {(row["network"], row["kind"]): row for row in rows if not row["optimizer"]}
    lines = []
    for function in FUNCTIONS:
        cells = [found[network, function] for network in networks]
        figures = [f"{float(cell['milliseconds']):,.0f} ms, {float(cell['extra_share']):.0%}" for cell in cells]
        lines.append([f"`{function}`", *figures])
    return markdown_table(["function", *heads], lines)


def _networks(rows: list[dict[str, str]]) -> tuple[list[str], list[str]]:
    """The names of the networks, and the heads of their columns."""
    sizes = {row["network"]: int(row["parameters"]) for row in rows}
    return list(sizes), [f"{network}, {size / 1e6:.1f} M" for network, size in sizes.items()]


def write_figures(path: str, rows: list[Row], command: str, device: torch.device, rounds: int) -> None:
    """Writes the rows as a CSV file, and beside it a JSON file of how they were made."""
    write_csv(path, rows)
    facts = {"command": command, "commit": git_commit(), "machine": machine(device)}
    write_json(Path(path).with_suffix(".json"), {**facts, "torch": torch.__version__, "rounds": rounds})


def parser() -> Parser:
    p = Parser(__doc__)
    p.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=list(NETWORKS), help="what is measured")
    p.add_argument("--compiled", type=int, choices=[0, 1], default=1, help="0: leave the compiled pass out")
    p.add_argument("--device", default=None, help="cpu, cuda:1, ... (default: a GPU, or the CPU)")
    p.add_argument("--rounds", type=count, default=12, help="times that every step is measured")
    p.add_argument("--csv", type=csv_file, metavar="FILE", help="write the figures there, and their origin beside")
    return p


def main() -> None:
    args = parser().parse_args()
    if args.csv:
        check_output_file("--csv", args.csv)
    device, _ = select_device(args.device, 0)
    print(f"{machine(device)}, torch {torch.__version__}, {args.rounds} rounds")
    rows: list[Row] = []
    for network in args.networks:
        for row in rows_of(network, args.rounds, device, bool(args.compiled)):
            name, optimizer, kind = row["network"], row["optimizer"], row["kind"]
            print(f"{name:12} {optimizer:6} {kind:36} {row['milliseconds']:9} ms {row['ratio']:7} {row['extra_share']}")
            rows.append(row)
    words = [{key: str(value) for key, value in row.items()} for row in rows]
    print(markdown(words), markdown_of_functions(words), sep="\n\n")
    if args.csv:
        write_figures(args.csv, rows, command_line(), device, args.rounds)


if __name__ == "__main__":
    run(main)
