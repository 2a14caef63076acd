"""A training run from its settings: first the checks, then the run folder, then the epochs."""

import time
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from shlex import quote
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, MultiStepLR

from quant import clip_weights
from utils.checkpoint import (
    image_size,
    known_arch,
    load_checkpoint,
    load_run,
    model_from_checkpoint,
    new_model,
    save_checkpoint,
)
from utils.cli import UserError, warn
from utils.data.load import Dataset, load_dataset
from utils.data.split import Split, TrainBatches
from utils.device import machine, resolve_precision, select_device, set_deterministic
from utils.distributed import World, join, leave, own_device
from utils.files import command_line, git_commit
from utils.opening import listed, matched
from utils.runs import KEPT_BY_RESUMES, RunFolder
from utils.signals import StopRequest
from utils.training.checks import VANISHED, check_moves, check_takes, vanished_layer
from utils.training.epochs import Training
from utils.training.evaluation import evaluate_goal
from utils.training.extra_loss import extra_loss, load_teacher
from utils.training.goals import Goal, GridGoal
from utils.training.loop import NonFiniteError
from utils.training.pace import PaceWatch
from utils.training.setup import build_goal, build_optimizer, described

WORTH_RENEWING = 0.5  # points of top-1 below the float network from which a cure is named
Builder = Callable[[Namespace, nn.Module, Goal, torch.device, int], Optimizer]  # takes what build_optimizer takes


@dataclass
class Run:
    """What a run's epochs need. `done` epochs are trained; `last_good` is the file that holds the last of them."""

    args: Namespace
    world: World
    device: torch.device
    model: nn.Module
    classes: list[str]
    batches: TrainBatches
    held: Split  # to evaluate on
    held_name: str
    goal: Goal
    optimizer: Optimizer
    scheduler: LRScheduler
    first_epoch: int
    done: int
    last_good: str | Path
    extras: dict[str, Any] = field(default_factory=dict)  # what else the checkpoints hold
    teacher: nn.Module | None = None
    command: str = "python train.py"  # which resumes it; "" if nothing does

    @property
    def facts(self) -> dict[str, Any]:
        """What the run runs on, for the record."""
        return {
            "torch": torch.__version__, "device": str(self.device), "machine": machine(self.device),
            "processes": self.world.size,
        }  # fmt: skip


def train(
    args: Namespace,
    resumed: RunFolder | None,
    extend: Callable[[Run], None] | None = None,
    build: Builder = build_optimizer,
) -> None:
    """Trains as train.py's `args` say, in a new folder or in the one that is `resumed`. `build` makes the optimizer,
    and `extend` may add to the prepared run."""
    device, device_line = select_device(*own_device(args.device, args.cu_num))
    world = join(device)
    if resumed and world.is_main:
        resumed.lock()
    args.precision = resolve_precision(args.precision, device)
    if args.deterministic:
        set_deterministic()
    torch.manual_seed(args.seed)
    run = prepare(args, resumed, device, world, build)
    if extend:
        extend(run)
    if resumed and run.done >= args.epoch:
        print(f"{resumed.path} has all {run.done} epochs: nothing left to do (a larger --epoch continues it)")
        return leave(world)
    folder = open_folder(run, resumed, device_line) if world.is_main else None
    print(f"{args.arch} on {args.dataset} {described(args, run.goal, run.optimizer)}")
    print(listed(run.classes))
    images = f"{len(run.held)} {run.held_name} images"
    print(f"epochs {run.done + 1} to {args.epoch}; accuracy is on the {images}", flush=True)
    train_epochs(run, folder)
    leave(world)


def prepare(
    args: Namespace, resumed: RunFolder | None, device: torch.device, world: World, build: Builder = build_optimizer
) -> Run:
    """Network, data and optimizer. Raises UserError for all that can be wrong; files are checked before downloads."""
    known_arch(args.arch)
    start = resumed.last_checkpoint if resumed else args.load_pretrained
    source = load_checkpoint(start) if start else {}
    with world.main_first():
        size = args.image_size or image_size(source, args.dataset)
        dataset = load_dataset(args.dataset, args.data_dir, device, args.workers, size)
    args.image_size = dataset.spec.size
    dataset = matched(dataset, source, start, transfer=not resumed)
    train_split, held, held_name = dataset.splits(args.val_split)
    first_epoch = args.resume_epoch or (0 if resumed else source.get("epoch", 0)) + 1
    args.resume_epoch = first_epoch
    if args.epoch < first_epoch:
        raise UserError(f"--epoch {args.epoch} is before the first epoch, {first_epoch}: nothing to train")
    if beyond := [epoch for epoch in args.save_epochs if not first_epoch <= epoch <= args.epoch]:
        warn(f"--save_epochs {beyond[0]} is not an epoch of this run, which has {first_epoch} to {args.epoch}")
    model = build_network(args, dataset, source, resumed is not None, world)
    batches = train_split.shuffled(args.batch_size, args.seed, world)
    check_processes(args, batches, len(held), world)
    model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stubs lack it
    check_takes(model, f"--arch {args.arch}", dataset.spec.size, batches.sizes[-1] // world.size)
    teacher = load_teacher(args.teacher, dataset, device) if args.teacher else None
    if args.psg and not args.eps and not resumed:
        check_moves(model, bool(args.first_last_quant))
    goal = build_goal(args)
    if args.clip_weights and isinstance(goal, GridGoal) and not resumed:
        clip_weights(model, goal.grid)
    planned_epoch = resumed.settings()["args"]["epoch"] if resumed else args.epoch
    optimizer = build(args, model, goal, device, (planned_epoch - first_epoch + 1) * len(batches))
    scheduler = MultiStepLR(optimizer, [epoch - first_epoch for epoch in decays(args)], gamma=0.1)
    done = load_run(source, start, model, optimizer, scheduler) if resumed else first_epoch - 1
    if done < args.epoch:
        # Finds damaged files before an epoch is spent. Decoding the images to evaluate on costs at most an evaluation;
        # decoding those to train on would cost an epoch, so only their headers are read. Images that are damaged behind
        # their headers are replaced when an epoch meets them.
        train_split.check_files(whole=False, world=world)
        held.check_files(whole=True, world=world)
    return Run(
        args, world, device, model, dataset.classes, batches, held, held_name, goal, optimizer, scheduler,
        first_epoch, done, start or "none", teacher=teacher,
    )  # fmt: skip


def build_network(
    args: Namespace, dataset: Dataset, source: dict[str, Any], is_resumed: bool, world: World
) -> nn.Module:
    """The network to start from: that of a checkpoint, torchvision's, or a fresh one, which a resume then fills."""
    if source and not is_resumed:
        return model_from_checkpoint(source, args.load_pretrained, args.arch, len(dataset.classes))
    with world.main_first():
        return new_model(args.arch, len(dataset.classes), None if is_resumed else args.weights)


def check_processes(args: Namespace, batches: TrainBatches, held: int, world: World) -> None:
    """Raises UserError if several processes, or --compile, do not go with the images or the penalty."""
    if min(batches.sizes[-1], held) < world.size:
        raise UserError(f"{world.size} processes, but a step or the evaluation has fewer images")
    if args.grad_l1 and (world.size > 1 or args.compile):
        raise UserError("--grad_l1 differentiates twice: it needs a single process and --compile 0")


def decays(args: Namespace) -> list[int]:
    """The epochs at which the learning rate falls, all after the first of the run."""
    return sorted({epoch for epoch in args.decay_epoch if epoch > args.resume_epoch})


def open_folder(run: Run, resumed: RunFolder | None, device_line: str) -> RunFolder:
    """The run folder, new or resumed, with its settings noted and its logs open."""
    args = run.args
    if resumed:
        folder = resumed
        folder.note_resume(run.done, **{key: getattr(args, key) for key in KEPT_BY_RESUMES}, **run.facts)
    else:
        folder = RunFolder.create(args.exp_name)
        args.exp_name = folder.exp_name
        folder.write_settings({"args": vars(args), "command": command_line(), "commit": git_commit(), **run.facts})
    folder.start_logging(after_epoch=run.done)
    shared = f" on {run.world.size} processes" if run.world.size > 1 else ""
    print(f"{device_line}{shared}, precision: {args.precision}, run folder: {folder.path}")
    return folder


def train_epochs(run: Run, folder: RunFolder | None) -> None:
    """The remaining epochs, each logged and saved in `folder` by the first process."""
    args = run.args
    extra = extra_loss(args, run.model, run.teacher)
    use_graph, stop = bool(args.cuda_graph) and not args.deterministic, StopRequest()
    training = Training(
        run.model, run.optimizer, run.batches, args.precision, extra, run.world, use_graph, stop, bool(args.compile)
    )
    pace = PaceWatch(run.optimizer, run.first_epoch, args.epoch, decays(args))
    stop.advice = "no epoch is complete yet: run the same command to start over"
    first, loop = run.done + 1, ""
    for epoch in range(first, args.epoch + 1):
        if epoch > run.first_epoch:
            resume = f"{run.command} --exp_name {quote(args.exp_name)} --resume continues after its last complete epoch"
            stop.advice = resume if run.command else "it cannot be resumed: start a new run"
        row = train_epoch_and_evaluate(run, training, epoch)
        if training.loop != loop:
            loop = training.loop
            print(f"step: {loop}", flush=True)
        run.scheduler.step()
        columns, remarks = pace.after_epoch(epoch, row["train_loss"])
        row |= columns
        if folder:
            folder.log(row)
            save(run, folder, row)
            if epoch == args.epoch:
                remarks += closing_remarks(run, folder, row)
            print("\n".join([summary(run.goal, row), *remarks]), flush=True)


def train_epoch_and_evaluate(run: Run, training: Training, epoch: int) -> dict[str, float]:
    """The row of an epoch for the log. Raises UserError if loss, weights or outputs are no longer finite."""
    args = run.args
    # Dropout of an epoch, like its batches, depends only on (seed, epoch). It differs between processes.
    torch.manual_seed(args.seed * 2**20 + epoch + run.world.rank * 2**52)
    lr, started = run.optimizer.param_groups[0]["lr"], time.perf_counter()
    try:
        trained = training.epoch(epoch, f"epoch {epoch}/{args.epoch}")
        trained_at = time.perf_counter()
        figures = evaluate_goal(run.model, run.goal, run.held, run.world)
    except NonFiniteError as error:
        advice = "try a smaller --lr or --lambda_s" if args.psg else "try a smaller --lr"
        raise UserError(f"{error} of epoch {epoch}; last good checkpoint: {run.last_good}; {advice}") from None
    if args.target == "zero" and (name := vanished_layer(run.model, bool(args.first_last_quant))):
        raise UserError(
            f"{name} has no weight above {VANISHED:g} after epoch {epoch}; last good checkpoint: {run.last_good}; "
            "try a smaller --w_decay_target or --l1"
        )
    return {
        "epoch": epoch, "lr": lr, "train_loss": trained.loss, "train_top1": trained.top1, **figures,
        "train_seconds": trained_at - started, "eval_seconds": time.perf_counter() - trained_at,
    }  # fmt: skip


def save(run: Run, folder: RunFolder, row: dict[str, float]) -> None:
    """Writes last.pth, and the epoch's own file if --save_epochs names it."""
    checkpoint = {
        "epoch": row["epoch"], "state_dict": run.model.state_dict(), "optimizer": run.optimizer.state_dict(),
        "scheduler": run.scheduler.state_dict(), "arch": run.args.arch, "num_classes": len(run.classes),
        "classes": run.classes, "args": vars(run.args), "metrics": row, **run.extras,
    }  # fmt: skip
    if row["epoch"] in run.args.save_epochs:
        save_checkpoint(folder.path / f"epoch_{row['epoch']}.pth", checkpoint)
    save_checkpoint(folder.last_checkpoint, checkpoint)
    run.last_good = folder.last_checkpoint


def closing_remarks(run: Run, folder: RunFolder, row: dict[str, float]) -> list[str]:
    """A line that names re-estimated batch norm, if there is any and PSG's network loses much as it is deployed."""
    lost = row["fp_top1"] - row[f"{run.goal.name.lower()}_top1"]
    norms = any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in run.model.modules())
    if not (run.args.psg and norms and lost > WORTH_RENEWING):
        return []
    command = f"python eval.py --model_path {quote(str(folder.last_checkpoint))} {run.goal.flags} --post bn_reestimate"
    return [f"{run.goal.name} is {lost:.1f} points below FP: re-estimated batch norm may help: {command}"]


def summary(goal: Goal, row: dict[str, float]) -> str:
    """An epoch in one line."""
    near = f"on grid {100 * row['grid_share']:.1f} %  " if "grid_share" in row else ""
    return (
        f"epoch {row['epoch']:3d}  lr {row['lr']:.4g}  loss {row['train_loss']:.4f}  train {row['train_top1']:.2f}  "
        f"FP {row['fp_top1']:.2f}  {goal.name} {row[f'{goal.name.lower()}_top1']:.2f}  {near}"
        f"{row['train_seconds']:.1f} + {row['eval_seconds']:.1f} s"
    )
