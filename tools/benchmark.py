"""Times the pieces of training and evaluation against each other, alternating them in one run; medians and ratios.

    python -m tools.benchmark
    python -m tools.benchmark --data_dir data --dataset cifar100 --rounds 40 --json step.json

A step is ResNet-32 at batch 128. Unless stated otherwise it runs in the precision that train.py picks on the device,
on one held batch, forward, backward and optimizer; "training loop" is train.py's own loop with its data. Compare ratios
of one run, not times of different ones.
"""

import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from itertools import chain, count, islice
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy
from torch.optim import SGD, Adam, Optimizer

from models import ResNet32
from quant import PSGD, fake_quantize_weight, layer_grids, psg_param_groups, quantize_weights
from quant.grid import FLOAT_BITS
from utils.cli import Parser, UserError, run
from utils.cli import count as whole_number
from utils.data.load import Dataset, load_dataset
from utils.device import autocast, machine, resolve_precision, select_device
from utils.files import check_output_file, command_line, git_commit, write_json
from utils.training.epochs import Training
from utils.training.evaluation import evaluate, fold_batch_norm
from utils.training.loop import train_epoch

BATCH_SIZE = 128
WARM_UP = 2
LOOP_STEPS = 10  # of train.py's loop in a round, so that what it does once an epoch does not count for each step
SWEEP = (8, 7, 6, 5, 4, 3, 2, FLOAT_BITS)  # bit-widths
STARTS = 3  # of each command that a user waits for
LOOP = "training loop, PSGD, with data"

Piece = Callable[[], object]  # what is timed
Groups = list[dict[str, Any]]  # of an optimizer's parameters


def sgd(groups: Groups) -> Optimizer:
    return SGD(groups, lr=0.01, momentum=0.9, weight_decay=1e-4, fused=True)


def adam(groups: Groups) -> Optimizer:
    return Adam(groups, lr=1e-4, weight_decay=1e-4, fused=True)


def scaled(base: Callable[[Groups], Optimizer], groups: Groups, **settings: Any) -> PSGD:
    """PSGD around the optimizer that `base` makes."""
    return PSGD(base(groups), **{"lambda_s": 150, **settings})


class TrainingPieces:
    """Makes functions that do one training step each, on networks of their own and on one held batch."""

    def __init__(self, dataset: Dataset, device: torch.device, precision: str) -> None:
        self.classes, self.device, self.precision = len(dataset.classes), device, precision
        self.source = dataset.train.shuffled(BATCH_SIZE, seed=1)
        endless = chain.from_iterable(self.source.epoch(epoch) for epoch in count())
        self.batches = (batch for batch in endless if len(batch[1]) == BATCH_SIZE)
        self.images, self.labels = next(self.batches)

    def all(self) -> dict[str, Piece]:
        """Every piece by its name, the unit "SGD step" among them."""
        whole = {}
        if self.device.type == "cuda":
            name = f"epoch of {len(self.source)} steps, CUDA graph"
            whole = {name: self.graphed_epoch(compiled=False), f"{name}, compiled": self.graphed_epoch(compiled=True)}
        return whole | {
            LOOP: self.loop(),
            "forward and backward alone": self.step(None),
            "SGD step": self.step(sgd),
            "PSGD step": self.step(partial(scaled, sgd)),
            "PSGD step, lambda_s auto": self.step(partial(scaled, sgd, lambda_s="auto", steps=10_000)),
            "Adam step": self.step(adam),
            "Adam step with PSG": self.step(partial(scaled, adam)),
            "Adam step with PSG on the update": self.step(partial(scaled, adam, acts_on="update")),
            "the same, lambda_s auto": self.step(
                partial(scaled, adam, acts_on="update", lambda_s="auto", steps=10_000)
            ),
            "quantization-aware SGD step": self.quantization_aware_step(),
            "SGD step, float32": self.step(sgd, "fp32"),
            "SGD step, float32, contiguous": self.step(sgd, "fp32", torch.contiguous_format),
            "preparing a batch": lambda: next(self.batches),
        }

    def network(self, layout: torch.memory_format = torch.channels_last) -> nn.Module:
        """A fresh network in training mode, the same at each call."""
        torch.manual_seed(1)
        return ResNet32(self.classes).to(self.device).to(memory_format=layout).train()

    def step(
        self,
        make_optimizer: Callable[[Groups], Optimizer] | None,
        precision: str | None = None,
        layout: torch.memory_format = torch.channels_last,
    ) -> Piece:
        """Forward and backward and, if it can be made, the optimizer; `precision` None is that of the device."""
        model = self.network(layout)
        optimizer = make_optimizer(psg_param_groups(model, 4)) if make_optimizer else None
        images = self.images.contiguous(memory_format=layout)

        def once() -> None:
            with autocast(self.device, precision or self.precision):
                loss = cross_entropy(model(images), self.labels)
            model.zero_grad()
            loss.backward()
            if optimizer:
                optimizer.step()

        return once

    def quantization_aware_step(self) -> Piece:
        """A step with the weights quantized in the forward pass."""
        model = self.network()
        optimizer = sgd([{"params": [*model.parameters()]}])
        grids = layer_grids(model, 4)

        def once() -> None:
            quantized = {name: fake_quantize_weight(model.get_parameter(name), grid) for name, grid in grids.items()}
            with autocast(self.device, self.precision):
                loss = cross_entropy(functional_call(model, quantized, (self.images,)), self.labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

        return once

    def loop(self) -> Piece:
        """LOOP_STEPS steps of train.py's own loop, each with a batch of its own."""
        model = self.network()
        optimizer = scaled(sgd, psg_param_groups(model, 4))
        return lambda: train_epoch(model, optimizer, islice(self.batches, LOOP_STEPS), self.precision)

    def graphed_epoch(self, compiled: bool) -> Piece:
        """An epoch as train.py trains it on a GPU. The piece raises UserError if no graph can be captured."""
        model = self.network()
        optimizer = scaled(sgd, psg_param_groups(model, 4))
        training = Training(model, optimizer, self.source, self.precision, compile=compiled)

        def once() -> None:
            training.epoch(1, "")
            if training.loop != "CUDA graph":
                raise UserError(f"{training.loop}: a graph's epoch has no time")

        return once


def evaluation_pieces(dataset: Dataset, device: torch.device) -> dict[str, Piece]:
    """Functions that evaluate the whole test set, once or at the eight bit-widths of SWEEP, as eval.py does."""
    torch.manual_seed(1)
    model = ResNet32(len(dataset.classes)).to(device).to(memory_format=torch.channels_last).eval()

    def once(bits: int, precision: str = "fp32", fold: bool = True) -> None:
        quantized = quantize_weights(model, bits)
        evaluate(fold_batch_norm(quantized) if fold else quantized, dataset.test, precision)

    def sweep() -> None:
        for bits in SWEEP:
            once(bits)

    return {
        "evaluation, float32": lambda: once(FLOAT_BITS),
        "evaluation, float32, batch norm not folded": lambda: once(FLOAT_BITS, fold=False),
        "evaluation, bfloat16": lambda: once(FLOAT_BITS, "bf16"),
        f"sweep of {len(SWEEP)} bit-widths, float32": sweep,
    }


def alternate(
    pieces: Mapping[str, Piece], rounds: int, device: torch.device, before: Piece = lambda: None
) -> dict[str, float]:
    """Median seconds of each piece over `rounds`, in each of which every piece runs once; two rounds warm up.

    `before` runs before each piece, and is not timed.
    """

    def clock() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    seconds: dict[str, list[float]] = {name: [] for name in pieces}
    for turn in range(rounds + WARM_UP):
        for name, piece in pieces.items():
            before()
            start = clock()
            piece()
            if turn >= WARM_UP:
                seconds[name].append(clock() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def start_up() -> dict[str, float]:
    """Seconds, the least of STARTS, that commands take for which a user waits."""
    root = Path(__file__).parent.parent
    commands = {"train.py --help": ["train.py", "--help"], "import of torch": ["-c", "import torch"]}
    seconds = {}
    for name, words in commands.items():
        times = []
        for _ in range(STARTS):
            started = time.perf_counter()
            subprocess.run([sys.executable, *words], cwd=root, check=True, stdout=subprocess.DEVNULL)
            times.append(time.perf_counter() - started)
        seconds[name] = min(times)
    return seconds


def peak_memory(device: torch.device) -> int:
    """Bytes: of the GPU's allocator on a GPU, else the largest resident size of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def show(seconds: dict[str, float], unit: str) -> None:
    """Prints medians in milliseconds, and their ratios to the piece `unit`."""
    print(f"{'':44}{'median ms':>10}  {'ratio to ' + unit}")
    for name, value in seconds.items():
        print(f"{name:44}{1000 * value:10.2f}  {value / seconds[unit]:.3f}")


def parser() -> Parser:
    p = Parser(__doc__)
    p.add_argument("--dataset", default="digits", choices=["cifar100", "cifar10", "digits"], help="data set")
    p.add_argument(
        "--data_dir", default="data", metavar="DIR", help="folder of <dataset>.npz or of torchvision's archive"
    )
    p.add_argument("--device", default=None, help="cpu, cuda:1, ... (default: a GPU, or the CPU)")
    p.add_argument("--rounds", type=whole_number, default=30, help="times that every step is measured")
    p.add_argument("--json", default=None, metavar="FILE", help="write the figures there too")
    return p


def main() -> None:
    args = parser().parse_args()
    if args.json:
        check_output_file("--json", args.json)
    device, _ = select_device(args.device, 0)
    precision = resolve_precision("auto", device)
    started = time.perf_counter()
    dataset = load_dataset(args.dataset, args.data_dir, device)
    data_ready = time.perf_counter() - started

    steps = alternate(TrainingPieces(dataset, device, precision).all(), args.rounds, device)
    steps[LOOP] /= LOOP_STEPS
    hardware = machine(device)
    settings = f"torch {torch.__version__}, device {device}, {precision}, {args.rounds} rounds, batch {BATCH_SIZE}"
    print(f"{hardware}, {settings}")
    show(steps, "SGD step")
    evaluations = alternate(evaluation_pieces(dataset, device), max(3, args.rounds // 10), device)
    show(evaluations, "evaluation, float32")
    starts = start_up()
    print(f"data ready in {data_ready:.2f} s, {args.dataset} at {args.data_dir}")
    for name, seconds in starts.items():
        print(f"{name}: {seconds:.2f} s")
    peak = peak_memory(device)
    print(f"peak memory of this run: {peak / 1e9:.2f} GB")
    if args.json:
        write_json(args.json, {
            "command": command_line(), "commit": git_commit(), "machine": hardware, "torch": torch.__version__,
            "device": str(device), "precision": precision, "dataset": args.dataset, "rounds": args.rounds,
            "data_ready_seconds": data_ready, "step_seconds": steps,
            "step_ratios_to_sgd": {name: seconds / steps["SGD step"] for name, seconds in steps.items()},
            "evaluation_seconds": evaluations, "start_up_seconds": starts, "peak_memory_bytes": peak,
        })  # fmt: skip


if __name__ == "__main__":
    run(main)
