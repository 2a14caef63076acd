"""Stages with other rules for lambda_s "auto", for the comparison in docs/experiments.md.

    python -m tools.trials --rule grafted --w_bit 3 --epoch 86 --decay_epoch 86 --exp_name trials/grafted

--rule, --tau_end, --noise_limit and --plan_end change how `auto` works; all other flags are those of train.py.

even: the rule of `auto`. fast_first, slow_first: tau grows to the same end, in the first half of the plan to three
quarters or one quarter of it. one_lambda_s: one lambda_s for all tensors of a group, from the mean square of all
gradients. grafted: no law, each tensor's scaled gradient has the norm that it had unscaled.
"""

import sys
from argparse import Namespace
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import quant.psgd
import train
from quant import lambda_s as law
from quant.lambda_s import Records, State, mean_squares
from quant.psgd import distances
from quant.settings import AUTO, STAGE_DEFAULTS
from utils.cli import Parser, positive, run

RULES = ["even", "fast_first", "slow_first", "one_lambda_s", "grafted"]
Shape = Callable[[Tensor], Tensor]  # share of tau_end at a share of the plan


def shaped(shape: Shape) -> Callable[[Records, dict[str, Any]], Tensor]:
    """`planned_variance` for a plan whose tau is tau_end * shape(progress)."""

    def planned_variance(records: Records, group: dict[str, Any]) -> Tensor:
        end = law.plan_end(group)
        before, after = (shape(((records["steps"] + ahead) / end).clamp(max=1)) for ahead in (0, 1))
        left = (group["tau_end"] - records["tau"]).clamp(min=0)
        return left * (after - before) / (1 - before).clamp(min=1e-9)

    return planned_variance


def one_lambda_s(weights: list[Tensor], moves: list[Tensor], group: dict[str, Any], state: State) -> list[Tensor]:
    """`take_step` with the mean over all tensors in place of each tensor's mean square. Gradients only."""
    sizes = torch.tensor([float(weight.numel()) for weight in weights])
    squares = mean_squares(moves)
    mean = (sizes * squares).sum() / sizes.sum()
    return law.walk(Records(weights, state), mean.expand_as(squares).clone(), group)


def grafted(weights: list[Tensor], moves: list[Tensor], group: dict[str, Any], state: State) -> list[Tensor]:
    """`take_step` with |g| / | |w - Q(w)| * g | as the lambda_s of each tensor. Gradients only."""
    records, squares = Records(weights, state), mean_squares(moves)
    scaled = torch._foreach_mul(distances(weights, group), moves)
    lambda_s = (squares / mean_squares(list(scaled)).clamp(min=1e-30)).sqrt()
    tau = records["tau"] + (law.gain(group) * lambda_s).square() * squares
    records.write(steps=records["steps"] + 1, tau=tau, lambda_s=lambda_s)
    return list(lambda_s.unbind())


def change(args: Namespace) -> None:
    """Makes `auto` follow the rule of `args` in this process."""
    shapes: dict[str, Shape] = {"fast_first": lambda p: 1 - (1 - p).square(), "slow_first": lambda p: p.square()}
    if args.rule in shapes:
        setattr(law, "planned_variance", shaped(shapes[args.rule]))  # noqa: B010 - mypy takes functions for constants
    steps = {"one_lambda_s": one_lambda_s, "grafted": grafted}
    if args.rule in steps:
        setattr(quant.psgd, "take_step", steps[args.rule])  # noqa: B010
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
    p.add_argument("--plan_end", type=positive, default=law.PLAN_END, help="share of the stage at which the plan ends")
    return p


def main() -> None:
    args, flags = parser().parse_known_args()
    command, sys.argv = sys.argv, [*sys.argv[:1], *flags, "--lambda_s", AUTO]
    settings, folder = train.parse()
    sys.argv = command  # for the record
    change(args)

    from utils.training.run import train as train_run

    train_run(settings, folder)


if __name__ == "__main__":
    run(main)
