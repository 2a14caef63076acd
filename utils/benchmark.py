"""Times the pieces of a training step against each other, alternating them in one run; prints medians and ratios.

    python -m utils.benchmark
    python -m utils.benchmark --data_dir data --dataset cifar100 --rounds 40 --json step.json

A step is ResNet-32 at batch 128: batch preparation, forward, backward and optimizer. Ratios are to the row they name.
"""

import platform
import statistics
import time
from collections.abc import Callable
from itertools import chain, count
from pathlib import Path

from utils.cli import Parser, run
from utils.cli import count as whole_number
from utils.files import command_line, git_commit, write_json

WARM_UP = 2


def machine() -> str:
    """Processor and number of cores, as the operating system names them."""
    name = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        models = [line.split(":", 1)[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
                  if line.startswith("model name")]  # fmt: skip
        name = models[0] if models else name
    import torch

    return f"{name}, {torch.get_num_threads()} threads"


def main() -> None:
    p = Parser(__doc__)
    p.add_argument("--dataset", default="digits", choices=["cifar100", "cifar10", "digits"], help="data set")
    p.add_argument("--data_dir", default="data", help="folder of <dataset>.npz or of torchvision's archive")
    p.add_argument("--device", default=None, help="cpu, cuda:1, ... (default: a GPU, or the CPU)")
    p.add_argument("--rounds", type=whole_number, default=30, help="times that every piece is measured")
    p.add_argument("--json", default=None, metavar="FILE", help="write the figures there too")
    args = p.parse_args()

    import torch
    from torch.nn.functional import cross_entropy

    from models import ResNet32
    from quant import PSGD, psg_param_groups, quantize_weights
    from utils.data import TrainBatches, load_dataset
    from utils.device import autocast, keep_freed_memory, resolve_precision, select_device
    from utils.engine import evaluate, fold_batch_norm

    device, _ = select_device(args.device, 0)
    fast = resolve_precision("auto", device)
    if device.type == "cpu":
        keep_freed_memory()
    dataset = load_dataset(args.dataset, args.data_dir, device)
    source = TrainBatches(dataset.train, dataset.spec, 128, seed=1)
    batches = chain.from_iterable(source.epoch(epoch) for epoch in count())
    full_batches = (batch for batch in batches if len(batch[1]) == 128)

    def trainer(precision: str, layout: torch.memory_format, psg: bool) -> Callable[[bool, bool], None]:
        torch.manual_seed(1)
        model = ResNet32(len(dataset.classes)).to(device, memory_format=layout)
        optimizer = torch.optim.SGD(psg_param_groups(model, 4), lr=0.01, momentum=0.9, weight_decay=1e-4, fused=True)
        if psg:
            optimizer = PSGD(optimizer, lambda_s=150)
        held = next(full_batches)

        def step(with_data: bool, with_optimizer: bool) -> None:
            images, labels = next(full_batches) if with_data else held
            with autocast(device, precision):
                loss = cross_entropy(model(images.contiguous(memory_format=layout)), labels)
            optimizer.zero_grad()
            loss.backward()
            if with_optimizer:
                optimizer.step()

        return step

    plain = trainer("fp32", torch.contiguous_format, psg=False)
    last = trainer("fp32", torch.channels_last, psg=False)
    sgd = trainer(fast, torch.channels_last, psg=False)
    psgd = trainer(fast, torch.channels_last, psg=True)
    steps = {
        "float32 step, contiguous": lambda: plain(True, True),
        "float32 step, channels_last": lambda: last(True, True),
        f"{fast} forward and backward alone": lambda: sgd(False, False),
        f"{fast} step with SGD": lambda: sgd(True, True),
        f"{fast} step with PSGD": lambda: psgd(True, True),
        "preparing a batch": lambda: next(full_batches),
    }
    seconds = alternate(steps, args.rounds, device)
    unit = seconds[f"{fast} step with SGD"]
    print(f"{machine()}, torch {torch.__version__}, device {device}, {args.rounds} rounds, batch 128")
    print(f"{'':36}{'median ms':>10}{'ratio to SGD step':>19}")
    for name, value in seconds.items():
        print(f"{name:36}{1000 * value:10.2f}{value / unit:19.3f}")

    network = ResNet32(len(dataset.classes)).to(device, memory_format=torch.channels_last)

    def evaluate_both() -> None:
        for net in (network, quantize_weights(network, 4)):
            evaluate(fold_batch_norm(net), dataset.test, dataset.spec, fast)

    both = alternate({"evaluation": evaluate_both}, max(3, args.rounds // 10), device)["evaluation"]
    share = both / (len(source) * seconds[f"{fast} step with PSGD"])
    print(f"evaluation of float and 4 bits: {both:.2f} s, {100 * share:.1f} % of the training steps of an epoch")
    if args.json:
        facts = {"command": command_line(), "commit": git_commit(), "machine": machine(), "torch": torch.__version__}
        figures = {"median_seconds": seconds, "evaluation_seconds": both, "evaluation_share_of_epoch": share}
        write_json(args.json, {**facts, "device": str(device), "rounds": args.rounds, **figures})


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


if __name__ == "__main__":
    run(main)
