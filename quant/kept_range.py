"""Weights that stay within the range that they had at the start of a stage, so that their grids stay too (ours).

Momentum carries weights beyond the largest one, so that the range grows and all grid points move. Each scaled weight of
a group with keep_range has its range in the optimizer's state: max|w| over each part with a scale of its own, in the
shape of `weight_scale` and the dtype of the weight.
"""

import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from .grid import dims_with_scales
from .lambda_s import State
from .sharded import largest_magnitude, local

RANGE = "psg_range"


def _kept(groups: Iterable[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], list[Tensor]]]:
    """The groups whose weights keep their range, and those of their weights that may move."""
    for group in groups:
        if group.get("keep_range"):
            yield group, [weight for weight in group["params"] if weight.requires_grad and weight.numel()]


@torch.no_grad()
def first_ranges(groups: Iterable[dict[str, Any]], state: State) -> dict[Tensor, Tensor]:
    """The ranges, before a step, of weights that have none yet. A tensor or channel of zeros has an endless one."""
    found = {}
    for group, weights in _kept(groups):
        for weight in weights:
            if RANGE not in state.get(weight, {}):
                own = dims_with_scales(weight, group["per_channel"], group.get("scale_dims"))
                reach = largest_magnitude(weight.detach(), own)
                found[weight] = torch.where(reach == 0, torch.full_like(reach, math.inf), reach)
    return found


@torch.no_grad()
def keep_ranges(groups: Iterable[dict[str, Any]], state: State, first: dict[Tensor, Tensor]) -> None:
    """Clamps the weights to their ranges after a step, of which `first` are new. Weights without a gradient stay.

    A weight that began to move within the step, and has no range yet, gets one before the next.
    """
    for weight, reach in first.items():
        if weight.grad is not None:  # not before the step, in which the base optimizer expects an empty state
            state[weight][RANGE] = reach
    for _, weights in _kept(groups):
        moved = [weight for weight in weights if weight.grad is not None and RANGE in state.get(weight, {})]
        for weight, reach in zip(local(moved), local([state[weight][RANGE] for weight in moved])):
            weight.clamp_(-reach, reach)
