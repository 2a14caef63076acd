"""Times the pieces of training and evaluation against each other, alternating them in one run; medians and ratios.

    python -m utils.benchmark
    python -m utils.benchmark --data_dir data --dataset cifar100 --rounds 40 --json step.json

A step is ResNet-32 at batch 128. Where nothing else is said, it is in the precision that train.py picks on the device,
on one held batch, forward, backward and optimizer; "training loop" is train.py's own loop with its data. Compare ratios
of one run, not times of different ones.
"""

import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import chain, count, islice
from pathlib import Path
from typing import Any

from utils.cli import Parser, UserError, run
from utils.cli import count as whole_number
from utils.files import check_output_file, command_line, git_commit, write_json

BATCH_SIZE = 128
WARM_UP = 2
LOOP_STEPS = 10  # of train.py's loop in a round, so that what it does once an epoch does not count for each step
SWEEP = (8, 7, 6, 5, 4, 3, 2, 32)  # bit-widths
STARTS = 3  # of each command that a user waits for


def main() -> None:
    p = Parser(__doc__)
    p.add_argument("--dataset", default="digits", choices=["cifar100", "cifar10", "digits"], help="data set")
    p.add_argument("--data_dir", default="data", help="folder of <dataset>.npz or of torchvision's archive")
    p.add_argument("--device", default=None, help="cpu, cuda:1, ... (default: a GPU, or the CPU)")
    p.add_argument("--rounds", type=whole_number, default=30, help="times that every step is measured")
    p.add_argument("--json", default=None, metavar="FILE", help="write the figures there too")
    args = p.parse_args()
    if args.json:
        check_output_file("--json", args.json)

    import torch

    from utils.data import load_dataset
    from utils.device import machine, resolve_precision, select_device

    device, _ = select_device(args.device, 0)
    precision = resolve_precision("auto", device)
    started = time.perf_counter()
    dataset = load_dataset(args.dataset, args.data_dir, device)
    figures: dict[str, Any] = {"data_ready_seconds": time.perf_counter() - started}

    steps = alternate(training_pieces(dataset, device, precision), args.rounds, device)
    steps["training loop, PSGD, with data"] /= LOOP_STEPS
    hardware = machine(device)
    settings = f"torch {torch.__version__}, device {device}, {precision}, {args.rounds} rounds, batch {BATCH_SIZE}"
    print(f"{hardware}, {settings}")
    show(steps, "SGD step")
    figures |= {"step_seconds": steps, "step_ratios_to_sgd": {k: v / steps["SGD step"] for k, v in steps.items()}}

    evaluations = alternate(evaluation_pieces(dataset, device), max(3, args.rounds // 10), device)
    show(evaluations, "evaluation, float32")
    figures |= {"evaluation_seconds": evaluations, "start_up_seconds": start_up()}
    print(f"data ready in {figures['data_ready_seconds']:.2f} s, {args.dataset} at {args.data_dir}")
    for name, seconds in figures["start_up_seconds"].items():
        print(f"{name}: {seconds:.2f} s")
    figures["peak_memory_bytes"] = peak_memory(device)
    print(f"peak memory of this run: {figures['peak_memory_bytes'] / 1e9:.2f} GB")
    if args.json:
        facts = {"command": command_line(), "commit": git_commit(), "machine": hardware, "torch": torch.__version__}
        facts |= {"device": str(device), "precision": precision, "dataset": args.dataset, "rounds": args.rounds}
        write_json(args.json, facts | figures)


def training_pieces(dataset, device, precision: str) -> dict[str, Callable[[], object]]:
    """Functions that do one step each, on networks of their own."""
    import torch
    from torch.func import functional_call
    from torch.nn.functional import cross_entropy
    from utils.engine import train_epoch

    from models import ResNet32
    from quant import PSGD, fake_quantize_weight, layer_bits, psg_param_groups
    from utils.data import TrainBatches
    from utils.device import autocast
    from utils.training import Training

    source = TrainBatches(dataset.train, dataset.spec, BATCH_SIZE, seed=1)
    batches = chain.from_iterable(source.epoch(epoch) for epoch in count())
    full = (batch for batch in batches if len(batch[1]) == BATCH_SIZE)
    images, labels = next(full)

    def network(layout=torch.channels_last):
        torch.manual_seed(1)
        return ResNet32(len(dataset.classes)).to(device, memory_format=layout).train()

    def sgd(groups):
        return torch.optim.SGD(groups, lr=0.01, momentum=0.9, weight_decay=1e-4, fused=True)

    def adam(groups):
        return torch.optim.Adam(groups, lr=1e-4, weight_decay=1e-4, fused=True)

    def step(make_optimizer, step_precision=precision, layout=torch.channels_last):
        model = network(layout)
        optimizer = make_optimizer(psg_param_groups(model, 4)) if make_optimizer else None
        held = images.contiguous(memory_format=layout)

        def once() -> None:
            with autocast(device, step_precision):
                loss = cross_entropy(model(held), labels)
            model.zero_grad()
            loss.backward()
            if optimizer:
                optimizer.step()

        return once

    def quantization_aware():
        model = network()
        optimizer = sgd(model.parameters())
        widths = layer_bits(model, 4)

        def once() -> None:
            quantized = {name: fake_quantize_weight(model.get_parameter(name), bits) for name, bits in widths.items()}
            with autocast(device, precision):
                loss = cross_entropy(functional_call(model, quantized, (images,)), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

        return once

    def loop():
        model = network()
        optimizer = PSGD(sgd(psg_param_groups(model, 4)), lambda_s=150)
        return lambda: train_epoch(model, optimizer, islice(full, LOOP_STEPS), precision)

    def graphed_epoch(compiled: bool):
        model = network()
        optimizer = PSGD(sgd(psg_param_groups(model, 4)), lambda_s=150)
        training = Training(model, optimizer, source, precision, compile=compiled)

        def once() -> None:
            training.epoch(1, "")
            if training.loop != "CUDA graph":
                raise UserError(f"{training.loop}: a graph's epoch has no time")

        return once

    whole = {}
    if device.type == "cuda":
        name = f"epoch of {len(source)} steps, CUDA graph"
        whole = {name: graphed_epoch(compiled=False), f"{name}, compiled": graphed_epoch(compiled=True)}
    return whole | {
        "training loop, PSGD, with data": loop(),
        "forward and backward alone": step(None),
        "SGD step": step(sgd),
        "PSGD step": step(lambda groups: PSGD(sgd(groups), lambda_s=150)),
        "Adam step": step(adam),
        "Adam step with PSG": step(lambda groups: PSGD(adam(groups), lambda_s=150)),
        "Adam step with PSG on the update": step(lambda groups: PSGD(adam(groups), lambda_s=150, acts_on="update")),
        "quantization-aware SGD step": quantization_aware(),
        "SGD step, float32": step(sgd, "fp32"),
        "SGD step, float32, contiguous": step(sgd, "fp32", torch.contiguous_format),
        "preparing a batch": lambda: next(full),
    }


def evaluation_pieces(dataset, device) -> dict[str, Callable[[], object]]:
    """Functions that evaluate the whole test set, once or at the eight bit-widths of SWEEP, as eval.py does."""
    import torch
    from utils.engine import evaluate, fold_batch_norm

    from models import ResNet32
    from quant import quantize_weights

    torch.manual_seed(1)
    model = ResNet32(len(dataset.classes)).to(device, memory_format=torch.channels_last).eval()

    def once(bits: int, precision: str = "fp32", fold: bool = True) -> None:
        quantized = quantize_weights(model, bits)
        evaluate(fold_batch_norm(quantized) if fold else quantized, dataset.test, dataset.spec, precision)

    return {
        "evaluation, float32": lambda: once(32),
        "evaluation, float32, batch norm not folded": lambda: once(32, fold=False),
        "evaluation, bfloat16": lambda: once(32, "bf16"),
        f"sweep of {len(SWEEP)} bit-widths, float32": lambda: [once(bits) for bits in SWEEP],
    }


def alternate(pieces: dict[str, Callable[[], object]], rounds: int, device) -> dict[str, float]:
    """Median seconds of each piece over `rounds`, in each of which every piece runs once; two rounds warm up."""
    import torch

    def clock() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    seconds: dict[str, list[float]] = {name: [] for name in pieces}
    for turn in range(rounds + WARM_UP):
        for name, piece in pieces.items():
            start = clock()
            piece()
            if turn >= WARM_UP:
                seconds[name].append(clock() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def start_up() -> dict[str, float]:
    """Seconds, least of STARTS, of commands that a user waits for."""
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


def peak_memory(device) -> int:
    """Bytes: of the GPU's allocator on a GPU, else the largest resident size of this process."""
    import torch

    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def show(seconds: dict[str, float], unit: str) -> None:
    """Prints medians in milliseconds, and their ratios to the piece `unit`."""
    print(f"{'':44}{'median ms':>10}  {'ratio to ' + unit}")
    for name, value in seconds.items():
        print(f"{name:44}{1000 * value:10.2f}  {value / seconds[unit]:.3f}")


if __name__ == "__main__":
    run(main)
