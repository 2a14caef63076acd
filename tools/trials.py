"""Stages with other rules for lambda_s "auto", for the comparison in docs/experiments.md.

    python -m tools.trials --rule grafted --w_bit 3 --epoch 86 --decay_epoch 86 --exp_name trials/grafted

--rule, --tau_end, --noise_limit and --plan_end change how `auto` works; --decay_at, --decay_outside and --beta1 change
what is round it. All other flags are those of train.py.

even: the rule of `auto`. fast_first, slow_first: tau grows to the same end, in the first half of the plan to three
quarters or one quarter of it. one_lambda_s: one lambda_s for all tensors of a group, from the mean square of all
gradients. grafted: no law, each tensor's scaled gradient has the norm that it had unscaled. gap: no law, one lambda_s
from 150, raised by a half when the quantized network's loss is further above the float one's than a straight line to
zero at the end of the plan allows, else lowered as much.
"""

import math
import sys
from argparse import Namespace
from collections.abc import Callable
from itertools import islice
from operator import mul
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

import quant.psgd
import train
from quant import lambda_s as law
from quant.grid import Grid, snap
from quant.lambda_s import Records, State
from quant.layers import copy_network
from quant.settings import AUTO, STAGE_DEFAULTS
from quant.sharded import mean_squares
from utils.cli import Parser, UserError, positive, run, share
from utils.training.evaluation import evaluate_batches

GAP_CHECKS = 8  # of the rule "gap", in each epoch
GAP_FACTOR = 1.5

RULES = ["even", "fast_first", "slow_first", "one_lambda_s", "grafted", "gap"]
Shape = Callable[[Tensor], Tensor]  # share of tau_end at a share of the plan


def shaped(shape: Shape) -> Callable[[Records, dict[str, Any]], Tensor]:
    """`planned_variance` for a plan whose tau is tau_end * shape(progress)."""

    def planned_variance(records: Records, group: dict[str, Any]) -> Tensor:
        end = law.plan_end(group)
        before, after = (shape(((records["steps"] + ahead) / end).clamp(max=1)) for ahead in (0, 1))
        left = (group["tau_end"] - records["tau"]).clamp(min=0)
        return left * (after - before) / (1 - before).clamp(min=1e-9)

    return planned_variance


def one_lambda_s(
    weights: list[Tensor], moves: list[Tensor], group: dict[str, Any], state: State, _: bool
) -> list[Tensor]:
    """`take_step` with the mean over all tensors in place of each tensor's mean square. Gradients only."""
    counts, squares = [weight.numel() for weight in weights], mean_squares(moves)
    mean = sum(map(mul, squares.unbind(), counts), torch.zeros_like(squares[0])) / sum(counts)
    return law.walk(Records(weights, state), mean.expand_as(squares).clone(), group)


def grafted(weights: list[Tensor], moves: list[Tensor], group: dict[str, Any], state: State, _: bool) -> list[Tensor]:
    """`take_step` with |g| / | |w - Q(w)| * g | as the lambda_s of each tensor. Gradients only."""
    records, squares = Records(weights, state), mean_squares(moves)
    grid = Grid(group["bits"], per_channel=group["per_channel"])
    scaled = [(weight - snap(weight, grid)[0]) * move for weight, move in zip(weights, moves)]
    lambda_s = (squares / mean_squares(scaled).clamp(min=1e-30)).sqrt()
    tau = records["tau"] + (law.gain(group) * lambda_s).square() * squares
    records.write(steps=records["steps"] + 1, tau=tau, lambda_s=lambda_s)
    return list(lambda_s.unbind())


STEPS = {"one_lambda_s": one_lambda_s, "grafted": grafted}  # what replaces `take_step`


class GapRule:
    """The rule "gap": after every step, see the module. `run` is a utils.training.run.Run."""

    def __init__(self, run: Any) -> None:
        self.run, self.steps, self.widest = run, 0, 0.0
        self.every = max(len(run.batches) // GAP_CHECKS, 1)
        self.plan = law.plan_end(staged(run.optimizer))
        self.images = list(islice(run.batches.epoch(0), 4))
        self.set(150.0)

    def set(self, lambda_s: float) -> None:
        self.lambda_s = lambda_s
        for group in self.run.optimizer.param_groups:
            if "lambda_s" in group:
                group["lambda_s"] = lambda_s

    def __call__(self, *_: Any) -> None:
        self.steps += 1
        if self.steps % self.every or self.steps > self.plan:
            return
        quantized = self.run.goal.deployed(self.run.model)
        gap = self.loss(quantized) - self.loss(copy_network(self.run.model))
        self.widest = self.widest or gap
        lags = gap > self.widest * (1 - self.steps / self.plan)
        self.set(self.lambda_s * (GAP_FACTOR if lags else 1 / GAP_FACTOR))

    def loss(self, network: torch.nn.Module) -> float:
        return evaluate_batches(network, self.images, self.run.args.precision).loss


class Decay:
    """Divides the rates by 10 after a number of steps."""

    def __init__(self, optimizer: Optimizer, steps: int) -> None:
        self.optimizer, self.left = optimizer, steps

    def __call__(self, *_: Any) -> None:
        self.left -= 1
        if not self.left:
            for group in self.optimizer.param_groups:
                group["lr"] /= 10


def staged(optimizer: Optimizer) -> dict[str, Any]:
    """A group that knows the steps of its stage."""
    return next(group for group in optimizer.param_groups if "steps" in group)


@torch.no_grad()
def shrink(optimizer: Optimizer, w_decay: float) -> None:
    """AdamW's decay of all weights, unscaled."""
    for group in optimizer.param_groups:
        torch._foreach_mul_(group["params"], 1 - group["lr"] * w_decay)


def extend(run: Any, args: Namespace) -> None:
    """Adds what --decay_at, --decay_outside, --beta1 and the rule "gap" ask for to a prepared run."""
    optimizer, run.command = run.optimizer, ""
    if args.rule == "gap":
        if run.world.size > 1:
            raise UserError("--rule gap needs a single process")
        optimizer.register_step_post_hook(GapRule(run))
    if args.decay_at:
        steps = math.ceil(args.decay_at * staged(optimizer)["steps"])
        optimizer.register_step_post_hook(Decay(optimizer, steps))
    for group in optimizer.param_groups:
        if args.decay_outside:
            group["weight_decay"] = 0.0
        if args.beta1 is not None:
            group["betas"] = (args.beta1, group["betas"][1])
    if args.decay_outside:
        optimizer.register_step_pre_hook(lambda *_: shrink(optimizer, run.args.w_decay))


def change(args: Namespace) -> None:
    """Makes `auto` follow the rule of `args` in this process."""
    shapes: dict[str, Shape] = {"fast_first": lambda p: 1 - (1 - p).square(), "slow_first": lambda p: p.square()}
    if args.rule in shapes:
        setattr(law, "planned_variance", shaped(shapes[args.rule]))  # noqa: B010 - mypy takes functions for constants
    if args.rule in STEPS:
        setattr(quant.psgd, "take_step", STEPS[args.rule])  # noqa: B010
    setattr(law, "PLAN_END", args.plan_end)  # noqa: B010
    STAGE_DEFAULTS.update(tau_end=args.tau_end, noise_limit=args.noise_limit)


def parser() -> Parser:
    p = Parser(__doc__)
    p.add_argument("--rule", default="even", choices=RULES, help="what replaces the rule of auto")
    p.add_argument("--tau_end", type=positive, default=STAGE_DEFAULTS["tau_end"], help="tau at the end of the plan")
    p.add_argument(
        "--noise_limit",
        type=positive,
        default=STAGE_DEFAULTS["noise_limit"],
        help="limit of the root mean square of a step's x (docs/optimizer.md)",
    )
    p.add_argument("--plan_end", type=share, default=law.PLAN_END, help="share of the stage at which the plan ends")
    p.add_argument("--decay_at", type=share, help="share of the stage's steps after which the rate is a tenth")
    p.add_argument("--decay_outside", action="store_true", help="AdamW's decay outside of the scaling")
    p.add_argument("--beta1", type=float, choices=[0.0, 0.5, 0.9], help="of Adam (default: train.py's)")
    return p


def parser_of_auto() -> Parser:
    """The parser of train.py, with lambda_s "auto" where PSG trains for a grid."""
    p = train.parser()
    known, _ = p.parse_known_args()
    if known.psg and known.target == "grid":
        p.set_defaults(lambda_s=AUTO)
    return p


def check(args: Namespace, settings: Namespace, resumed: bool) -> None:
    """UserError for what has no meaning together."""
    if resumed:
        raise UserError("a stage of tools.trials cannot be resumed: start a new run")
    if not settings.psg or settings.target == "zero":
        raise UserError("tools.trials changes lambda_s auto, which needs --psg 1 and --target grid")
    if settings.lambda_s != AUTO:
        raise UserError(f"--lambda_s {settings.lambda_s:g}: tools.trials changes lambda_s auto, leave it out")
    if args.rule in STEPS and settings.psg_acts_on == "update":
        raise UserError(f"--rule {args.rule} is for gradients: leave --psg_acts_on update out")
    unplanned = [key for key in ("tau_end", "noise_limit") if getattr(args, key) != STAGE_DEFAULTS[key]]
    if args.rule in ("grafted", "gap") and unplanned:
        raise UserError(f"--{unplanned[0]} does nothing with --rule {args.rule}, which has no plan: leave it out")
    if not settings.adam and args.beta1 is not None:
        raise UserError(f"--beta1 {args.beta1:g} needs --adam 1")
    if args.decay_outside and not settings.decoupled_decay:
        raise UserError("--decay_outside needs --decoupled_decay 1")


def main() -> None:
    args, flags = parser().parse_known_args()
    command, sys.argv = sys.argv, [*sys.argv[:1], *flags]
    settings, folder = train.parse(parser_of_auto)
    sys.argv = command  # for the record
    check(args, settings, resumed=folder is not None)
    vars(settings).update(vars(args))
    if args.decay_at or args.decay_outside or args.rule == "gap":
        settings.cuda_graph = 0  # a graph replays no hooks
    change(args)

    from utils.training.run import train as train_run

    train_run(settings, folder, lambda prepared: extend(prepared, args))


if __name__ == "__main__":
    run(main)
