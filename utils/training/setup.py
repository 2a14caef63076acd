"""What train.py's settings ask for: the goal, the optimizer and the words for the log."""

import warnings
from argparse import Namespace
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from quant import PSGD, Grid, penalize_l1
from utils.cli import as_typed
from utils.training.goals import Goal, GridGoal, SparseGoal

EXTRAS = ("w_decay_target", "l1", "grad_l1")  # flags that the log names where they are set


def build_goal(args: Namespace) -> Goal:
    """What the weights are trained for."""
    first_last = bool(args.first_last_quant)
    if args.target == "zero":
        return SparseGoal(args.sparsity, first_last, args.w_decay_target)
    return GridGoal(Grid(args.w_bit, first_last, per_channel=args.granularity == "channel"))


def build_optimizer(args: Namespace, model: nn.Module, goal: Goal, device: torch.device, steps: int) -> Optimizer:
    """SGD with momentum, Adam or AdamW, inside PSGD with --psg 1, for a run of `steps` steps."""
    groups = goal.param_groups(model) if args.psg else [{"params": [*model.parameters()]}]
    normalized = bool(args.adam) and args.psg_acts_on == "gradient"
    lr = args.lr * (0.01 * args.lambda_s if normalized and args.psg else 1)
    shared: dict[str, Any] = {"lr": lr, "weight_decay": args.w_decay, "fused": device.type in ("cpu", "cuda")}
    # Momentum would repeat each scaled step, with no draw towards the grid for it (docs/optimizer.md).
    momentum = 0.0 if args.psg and args.psg_acts_on == "update" else 0.9
    base: Optimizer = (
        torch.optim.Adam(groups, betas=(momentum, 0.999), decoupled_weight_decay=bool(args.decoupled_decay), **shared)
        if args.adam
        else torch.optim.SGD(groups, momentum=momentum, **shared)
    )
    penalize_l1(base, model, args.l1, bool(args.first_last_quant))
    if not args.psg:
        return base
    has_pace = args.target == "grid" and not normalized
    with warnings.catch_warnings():  # PaceWatch says it at the stage's middle, in epochs
        warnings.filterwarnings("ignore", 'lambda_s "auto" over')
        return PSGD(
            base, args.lambda_s, args.eps, args.psg_acts_on, steps if has_pace else None,
            keep_range=bool(args.clip_weights),
        )  # fmt: skip


def described(args: Namespace, goal: Goal, optimizer: Optimizer) -> str:
    """Start, goal and method, in words for the log."""
    start = f"torchvision's weights {args.weights}" if args.weights else args.load_pretrained or "scratch"
    lambda_s = optimizer.param_groups[0]["lambda_s"] if args.psg else 0
    method = f"PSG for {goal.name}, lambda_s {as_typed(lambda_s)}" if args.psg else "no PSG"
    method += f" on the {args.psg_acts_on}" if args.psg else ""
    method += ", clipped weights" if args.clip_weights else ""
    method += "".join(f", {flag} {getattr(args, flag):g}" for flag in EXTRAS if getattr(args, flag))
    why = " (as published at 2 bits; --w_decay overrides)" if args.psg and args.w_bit == 2 and not args.w_decay else ""
    return f"from {start}, {method}, weight decay {args.w_decay:g}{why}"
