"""lambda_s "auto": one setting for every model and bit-width (ours).

The share of weights near the grid and the training loss steer lambda_s during training.
"""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .grid import number
from .psgd import is_scaled, psg_multipliers

AUTO_MULTIPLIER = 4.0  # mean PSG multiplier of the paper's run: lambda_s 150, ResNet-32, 4 bits
AUTO_SHARE = (0.2, 0.95)  # planned shares at progress 0 (a network that was not trained for a grid) and at progress 1
AUTO_RISE = 1.25  # factor of lambda_s after an epoch that is behind the plan
AUTO_LIMIT = 20  # largest factor of lambda_s over all epochs
AUTO_HARM = 1.1  # a rise is taken back if the loss grows by more than this factor


@torch.no_grad()
def mean_distance(weights: Iterable[Tensor], bits: int = 4) -> float:
    """Mean of |w - Q(w)| over the elements of all `weights`. Each tensor has its own per-tensor grid of `bits` bits.

    lambda_s times this mean is the mean PSG multiplier. Raises ValueError for bits outside 2..8 and if there are no
    weights.
    """
    weights = list(weights)
    count = sum(weight.numel() for weight in weights)
    if not count:
        raise ValueError("there are no weights to measure")
    unit = {"target": "grid", "bits": bits, "per_channel": False, "lambda_s": 1.0, "psg_eps": 0.0}
    return sum(number(psg_multipliers([weight], unit)[0].cpu().double().sum()) for weight in weights) / count


def auto_lambda_s(groups: list[dict[str, Any]]) -> float:
    """The initial lambda_s, which makes the mean PSG multiplier at 4 bits equal to that of the paper's run (ours).

    `groups` are parameter groups such as `psg_param_groups` returns. The mean is taken on 4-bit per-tensor grids
    whatever the bits and per_channel of the groups: for a given lambda_s a weight moves equally fast within its grid
    cell at every bit-width, so distances to the groups' own grids are not informative.

    Raises ValueError if no group is scaled, if a group has target "zero", which has no grid, and if all weights are on
    the 4-bit grid. Raises TypeError if `groups` is not a list of groups (model.parameters(), for example), and for a
    group whose params are not a list: an iterator would be exhausted here.
    """
    if not isinstance(groups, (list, tuple)) or not all(isinstance(group, dict) for group in groups):
        got = type(groups).__name__
        raise TypeError(
            f"groups must be a list of parameter groups, as psg_param_groups(model, grid) returns, got a {got}"
        )
    for group in groups:
        if group.get("target") == "zero":
            raise ValueError('a group has target "zero": lambda_s is found only for grids')
        if not isinstance(group["params"], (list, tuple)):
            raise TypeError(f"a group's params must be a list of tensors, got {type(group['params']).__name__}")
    weights = [weight for group in groups if is_scaled(group) for weight in group["params"]]
    distance = mean_distance(weights)
    if distance == 0:
        raise ValueError("every weight is on the 4-bit grid: there is no lambda_s to find")
    return AUTO_MULTIPLIER / distance


def steer_lambda_s(optimizer: Optimizer, share: float, progress: float, loss: float) -> float:
    """Adjusts lambda_s after one epoch and returns it (ours).

    Build the PSGD optimizer with lambda_s=auto_lambda_s(groups) and call this function after each epoch. lambda_s rises
    if too few weights are near the grid; the rises are taken back if they harm the loss.

    The planned share of weights near the grid grows linearly with `progress`, from AUTO_SHARE[0] to AUTO_SHARE[1]. An
    epoch that ends below the plan multiplies the lambda_s of every scaled group by AUTO_RISE, up to AUTO_LIMIT times
    its initial value. If the loss of the next epoch is more than AUTO_HARM times as large, lambda_s returns to its
    initial value for good. lambda_s does not rise once `progress` has reached 1.

    Frozen layers keep `share` below the plan: give a network with frozen layers a fixed lambda_s. All state is in the
    parameter groups, and is saved and restored with them.

    Args:
        optimizer: the PSGD optimizer, or any optimizer with its parameter groups.
        share: share (0 to 1) of the weights near the grid, as `grid_share` returns it.
        progress: how much (0 to 1) of the epochs before the first learning-rate decay has passed.
        loss: mean training loss of the epoch, > 0.

    Raises ValueError if the optimizer has no scaled group, and if `share` is not from 0 to 1.
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
