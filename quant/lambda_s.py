"""lambda_s "auto": one setting for every model and bit-width, steered by the share of weights near the grid and the
training loss."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .grid import number
from .psgd import is_scaled, psg_multipliers

AUTO_MULTIPLIER = 4.0  # mean multiplier of the paper's run: lambda_s 150 on ResNet-32 at 4 bits
AUTO_SHARE = (0.2, 0.95)  # planned shares at progress 0 (a network not trained for a grid) and 1
AUTO_RISE, AUTO_LIMIT = 1.25, 20  # after an epoch behind the plan; in all
AUTO_HARM = 1.1  # times the loss before a rise: with more after it, the network does not bear the rise


@torch.no_grad()
def mean_distance(weights: Iterable[Tensor], bits: int = 4) -> float:
    """Mean of |w - Q(w)| over all weights together, each tensor on its own grid of `bits` bits.

    Times lambda_s it is the mean multiplier of PSG. Raises ValueError for bits outside 2..8 or no weights at all.
    """
    weights = list(weights)
    count = sum(weight.numel() for weight in weights)
    if not count:
        raise ValueError("there are no weights to look at")
    unit = {"target": "grid", "bits": bits, "per_channel": False, "lambda_s": 1.0, "psg_eps": 0.0}
    return sum(number(psg_multipliers([weight], unit)[0].cpu().double().sum()) for weight in weights) / count


def auto_lambda_s(groups: list[dict[str, Any]]) -> float:
    """The lambda_s to start with: the mean multiplier at 4 bits is then that of the paper's run. Source: ours.

    `groups` are parameter groups as `psg_param_groups` makes them. At 4 bits whatever the target is: how fast a weight
    moves within its cell is the same at every bit-width if lambda_s is, so the target's own distances say nothing. The
    grid is that of the whole tensor, also with per_channel.
    Raises ValueError if no group is scaled, if one has target "zero", which knows no grid, or if all weights are on the
    4-bit grid; TypeError for what is not a list of groups, such as model.parameters(), and for a group whose params are
    no list: reading them here would use an iterator up.
    """
    if not isinstance(groups, (list, tuple)) or not all(isinstance(group, dict) for group in groups):
        got = type(groups).__name__
        raise TypeError(
            f"groups must be a list of parameter groups, as psg_param_groups(model, grid) gives, got a {got}"
        )
    for group in groups:
        if group.get("target") == "zero":
            raise ValueError('a group has target "zero": lambda_s is found for grids alone')
        if not isinstance(group["params"], (list, tuple)):
            raise TypeError(f"a group's params must be a list of tensors, got {type(group['params']).__name__}")
    weights = [weight for group in groups if is_scaled(group) for weight in group["params"]]
    distance = mean_distance(weights)
    if distance == 0:
        raise ValueError("every weight is on the 4-bit grid: there is no lambda_s to find")
    return AUTO_MULTIPLIER / distance


def steer_lambda_s(optimizer: Optimizer, share: float, progress: float, loss: float) -> float:
    """One epoch of lambda_s "auto": raises lambda_s if too few weights are near the grid, or takes its rises back, and
    returns it. Source: ours.

    Build the PSGD optimizer with lambda_s=auto_lambda_s(groups) and call this after each epoch, with the `share`
    (0 to 1) of weights near the grid, as `grid_share` gives it, the `progress` (0 to 1) through the epochs before the
    first learning-rate decay, and the epoch's mean training `loss`, a positive number. The plan is a share that rises
    evenly over these epochs from AUTO_SHARE[0] to AUTO_SHARE[1]; an epoch that ends below it multiplies the lambda_s of
    every scaled group by AUTO_RISE, up to AUTO_LIMIT times the start. If the next epoch has more than AUTO_HARM times
    the loss, lambda_s goes back to its start for good. It does not rise once `progress` has reached 1. A share that
    counts frozen layers cannot follow the plan: give such a network a fixed lambda_s. All state is in the parameter
    groups, saved and restored with them.

    Raises ValueError if the optimizer has no scaled group, or `share` is not from 0 to 1.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share must be from 0 to 1, got {share!r}")
    groups = [group for group in optimizer.param_groups if is_scaled(group)]
    if not groups:
        raise ValueError("the optimizer has no parameter group with PSG settings to steer")
    low, high = AUTO_SHARE
    for group in groups:
        start = group.setdefault("lambda_s_start", group["lambda_s"])
        limit = group.setdefault("lambda_s_limit", AUTO_LIMIT * start)
        before, group["lambda_s_loss"] = group.get("lambda_s_loss", math.inf), math.inf
        if not loss <= AUTO_HARM * before:
            group["lambda_s"] = group["lambda_s_limit"] = start
        elif progress < 1 and share < low + (high - low) * progress and group["lambda_s"] < limit:
            group["lambda_s"] = min(group["lambda_s"] * AUTO_RISE, limit)
            group["lambda_s_loss"] = loss
    lambda_s: float = groups[0]["lambda_s"]
    return lambda_s
