"""Sparse training and pruning: parameter groups whose target is zero, and one-shot magnitude pruning.

Only the weights of convolutions and linear layers are pruned; biases and normalisation never are. The first and the
last layer are pruned like the others (first_last=True), or kept whole and left out of the count (first_last=False).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .grid import Grid
from .layers import check_finite, copy_network, layer_grids, settle_masks, split_parameters, weight_value

SCOPES = ("global", "layer")


def prunable_weights(model: nn.Module, first_last: bool = True) -> dict[str, nn.Parameter]:
    """The weights that pruning may set to zero, by state_dict name: those that `layer_grids` names, without biases.

    Raises ValueError if there are none.
    """
    named = {name: model.get_parameter(name) for name in layer_grids(model, Grid(8, first_last))}
    found = {name: weight for name, weight in named.items() if weight.dim() > 1}
    if not found:
        raise ValueError(f"{type(model).__name__} has no convolution or linear weights to prune")
    return found


def sparse_param_groups(model: nn.Module, first_last: bool = True) -> list[dict[str, Any]]:
    """Parameter groups for sparse training with PSGD: the prunable weights with target "zero", then all others.

    Parameters that do not require a gradient are left out. Weights under an active pruning mask become zero
    (`settle_masks`); a weight that is all zeros is named in a warning. Raises ValueError for a model with nothing to
    prune, or of which all that can be pruned is frozen.
    """
    named = prunable_weights(model, first_last)
    settle_masks(model, named)
    scaled, others = split_parameters(model, named)
    if not scaled:
        raise ValueError(f"{type(model).__name__} has no weights to scale: all that can be pruned are frozen")
    groups: list[dict[str, Any]] = [{"params": [*scaled.values()], "target": "zero"}]
    return groups + ([{"params": others}] if others else [])


@torch.no_grad()
def prune_weights(
    model: nn.Module, sparsity: float, scope: str = "global", first_last: bool = True, inplace: bool = False
) -> nn.Module:
    """A copy of `model` whose prunable weights of the smallest magnitude are zero.

    The share `sparsity`, 0 <= sparsity < 1, rounded to whole weights, is taken of all weights together (scope "global")
    or of each layer by itself ("layer"). No fine-tuning. inplace=True changes `model` itself and returns it.

    Raises ValueError for another sparsity or scope, and for a weight that is not finite.
    Source: paper, section 4, which leaves the scope open.
    """
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity must be from 0 to less than 1, got {sparsity!r}")
    if scope not in SCOPES:
        raise ValueError(f"scope must be one of {', '.join(SCOPES)}, got {scope!r}")
    for name, weight in prunable_weights(model, first_last).items():
        check_finite(name, weight)
    pruned = model if inplace else copy_network(model)
    weights = prunable_weights(pruned, first_last)
    settle_masks(pruned, weights)
    for group in [[*weights.values()]] if scope == "global" else [[weight] for weight in weights.values()]:
        _prune_smallest(group, sparsity)
    return pruned


def _prune_smallest(weights: Sequence[Tensor], sparsity: float) -> None:
    magnitudes = torch.cat([weight.abs().flatten() for weight in weights])
    kept = torch.ones_like(magnitudes)
    kept[magnitudes.topk(round(sparsity * len(magnitudes)), largest=False).indices] = 0
    for weight, mask in zip(weights, kept.split_with_sizes([weight.numel() for weight in weights])):
        weight.mul_(mask.view(weight.shape))


def nonzero_weights(model: nn.Module, first_last: bool = True) -> int:
    """Number of prunable weights that are not zero."""
    return sum(int(weight_value(model, name).count_nonzero()) for name in prunable_weights(model, first_last))


@torch.no_grad()
def pruning_mse(model: nn.Module, sparsity: float, scope: str = "global", first_last: bool = True) -> float:
    """Mean squared change of the prunable weights by `prune_weights`: of the whole it is the part that pruning cuts."""
    names, pruned = [*prunable_weights(model, first_last)], prune_weights(model, sparsity, scope, first_last)
    change = [weight_value(model, name) - pruned.get_parameter(name) for name in names]
    squares = sum(part.cpu().double().square().sum().item() for part in change)
    return squares / sum(part.numel() for part in change)
