"""Training steps with PSG and without over several processes: time, memory and result, under DDP and FSDP2.

    python -m tools.benchmark_distributed
    python -m tools.benchmark_distributed --layers 2 --width 256 --csv rows.csv

The network is a transformer encoder, by default of 25 million parameters, on random tokens; processes talk by gloo on
this machine. All kinds of a step take turns in one run: compare the ratios of one run. "Difference" is the largest one
between a weight after three steps and that of one process that trains on the whole batch, in shares of the longest way
that a weight has gone. "Extra" is the peak of a
process's memory during a step of the optimizer above what was there before.
"""

import os
import sys
import tempfile
from argparse import Namespace
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import mse_loss
from torch.optim import SGD, AdamW, Optimizer

from quant import PSGD, Grid, psg_param_groups
from quant.sharded import is_sharded, largest_magnitude
from tools.benchmark import alternate
from tools.benchmark_optimizer import BASES, Memory, peak_of, write_figures
from utils.cli import Parser, count, csv_file, run
from utils.files import check_output_file, command_line, markdown_table

CPU = torch.device("cpu")
TOKENS, SEQUENCES = 64, 4  # of each process
STEPS = 3  # that are compared with those of one process
HEADS = ["wrap", "optimizer", "grid", "extra_share", "difference", "step_ms", "ratio"]
Row = dict[str, str | float]


def network(layers: int, width: int) -> nn.Module:
    """Encoder layers of 12 width^2 parameters each, without dropout."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(width, 8, 4 * width, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
    for parameter in model.parameters():
        if parameter.dim() < 2:
            nn.init.normal_(parameter, 1.0, 0.1)  # PSG does not move zeros
    return model


def data_parallel(model: nn.Module) -> nn.Module:
    return nn.parallel.DistributedDataParallel(model)


def sharded(model: nn.Module) -> nn.Module:
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    for layer in model.layers:  # type: ignore[union-attr]
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)  # changes the class of the model
    return model


WRAPS: dict[str, Callable[[nn.Module], nn.Module]] = {"DDP": data_parallel, "FSDP2": sharded}


def optimizer_of(base: str, per_channel: bool | None, model: nn.Module) -> Optimizer:
    """SGD or AdamW, with PSG for 4 bits unless per_channel is None. Fused SGD does not take sharded weights."""
    scaled = per_channel is not None
    groups = psg_param_groups(model, Grid(4, per_channel=bool(per_channel))) if scaled else model.parameters()
    inner: Optimizer = (
        SGD(groups, lr=0.1, momentum=0.9, foreach=True)
        if base == "SGD"
        else AdamW(groups, lr=1e-4, betas=(0.0, 0.999), foreach=True)
    )
    return PSGD(inner, 150.0, acts_on=BASES[base]) if scaled else inner


def train_step(model: nn.Module, optimizer: Optimizer, batch: Tensor) -> None:
    optimizer.zero_grad(set_to_none=False)
    mse_loss(model(batch), batch.roll(1, 1)).backward()  # of the token before
    optimizer.step()


def batches(processes: int, width: int) -> list[Tensor]:
    """The whole batches, a part of SEQUENCES for each process."""
    torch.manual_seed(1)
    return [torch.randn(processes * SEQUENCES, TOKENS, width) for _ in range(STEPS)]


def difference(model: nn.Module, reference: nn.Module, start: nn.Module) -> float:
    """The largest one between weights of the first two networks, in shares of the longest way from `start`."""
    found = [p.full_tensor() if is_sharded(p) else p for p in model.parameters()]
    apart = [largest_magnitude((p - q).detach()) for p, q in zip(found, reference.parameters(), strict=True)]
    ways = [largest_magnitude((q - r).detach()) for q, r in zip(reference.parameters(), start.parameters())]
    return (max(apart) / max(ways)).item()


def rows_of(wrap: str, base: str, rank: int, args: Namespace) -> list[Row]:
    """A row for `base` alone and with each kind of grid, from the view of one process."""
    pieces: dict[str, Callable[[], None]] = {}
    rows: list[Row] = []
    own = slice(rank * SEQUENCES, (rank + 1) * SEQUENCES)
    for grid, per_channel in {"": None, "tensor": False, "channel": True}.items():
        reference, model = (network(args.layers, args.width) for _ in range(2))
        wrapped = WRAPS[wrap](model)
        optimizer, other = (optimizer_of(base, per_channel, net) for net in (model, reference))
        for batch in batches(args.processes, args.width):
            train_step(wrapped, optimizer, batch[own])
            train_step(reference, other, batch)
        apart = difference(model, reference, network(args.layers, args.width))
        size = sum(p.numel() for p in reference.parameters())
        del reference, other
        share = peak_of(Memory(CPU), optimizer.step) / (4 * size)
        rows.append({"wrap": wrap, "optimizer": base, "grid": grid, "extra_share": round(share, 4),
                     "difference": float(f"{apart:.1e}")})  # fmt: skip
        pieces[grid] = partial(train_step, wrapped, optimizer, batch[own])
    seconds = alternate(pieces, args.rounds, CPU, torch.distributed.barrier)
    for row, grid in zip(rows, pieces):
        row |= {"step_ms": round(1000 * seconds[grid], 1), "ratio": round(seconds[grid] / seconds[""], 3)}
    return rows


def markdown(rows: list[dict[str, str]]) -> str:
    """The rows as a table: a line for each optimizer and kind of grid, a column for each figure under DDP and FSDP2."""
    found = {(row["wrap"], row["optimizer"], row["grid"]): row for row in rows}
    lines = []
    for base, grid in dict.fromkeys((row["optimizer"], row["grid"]) for row in rows):
        cells = [found[wrap, base, grid] for wrap in WRAPS]
        name = f"PSGD({base}), a scale for each {grid}" if grid else base
        times = [f"{float(cell['ratio']):.2f}" if grid else f"{float(cell['step_ms']):,.0f} ms" for cell in cells]
        extras = [f"{float(cell['extra_share']):.0%}" for cell in cells]
        lines.append([name, *times, *extras, *(cell["difference"] for cell in cells)])
    figures = [f"{figure}, {wrap}" for figure in ("step", "extra memory", "difference") for wrap in WRAPS]
    return markdown_table(["optimizer", *figures], lines)


def process(rank: int, store: str, args: Namespace) -> None:
    """One of the processes; the first writes the rows."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=args.processes)
    rows = [row for wrap in WRAPS for base in BASES for row in rows_of(wrap, base, rank, args)]
    if not rank:
        print(markdown([{key: str(value) for key, value in row.items()} for row in rows]))
        if args.csv:
            write_figures(args.csv, rows, args.command, CPU, args.rounds)
    torch.distributed.barrier()
    sys.stdout.flush()
    os._exit(0)  # gloo's threads may outlive the group, and abort a process that shuts down


def parser() -> Parser:
    p = Parser(__doc__)
    p.add_argument("--processes", type=count, default=2, help="processes, of one thread each")
    p.add_argument("--layers", type=count, default=8, help="of the transformer")
    p.add_argument("--width", type=count, default=512, help="of a layer, which has 12 width^2 parameters; 8 heads")
    p.add_argument("--rounds", type=count, default=8, help="times that every step is measured")
    p.add_argument("--csv", type=csv_file, metavar="FILE", help="write the figures there, and their origin beside")
    return p


def main() -> None:
    args = parser().parse_args()
    if args.csv:
        check_output_file("--csv", args.csv)
    args.command = command_line()
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(process, (f"{folder}/store", args), nprocs=args.processes)


if __name__ == "__main__":
    run(main)
