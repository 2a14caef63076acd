"""Sparse training and pruning: parameter groups with target "zero", and one-shot magnitude pruning.

Only the weights that `layer_grids` lists are pruned; biases and normalization layers never are. The first and
last layers are pruned like the others by default; first_last=False keeps them whole and does not count their weights.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .grid import Grid
from .groups import warn_of_values
from .layers import check_finite, copy_network, layer_grids, settle_masks, warn_of_computed, weight_value

SCOPES = ("global", "layer")


def prunable_weights(model: nn.Module, first_last: bool = True) -> dict[str, nn.Parameter]:
    """The weights that pruning may set to zero, by state_dict name: those of `layer_grids` without the biases.

    Raises ValueError if there are none.
    """
    named = {name: model.get_parameter(name) for name in layer_grids(model, Grid(8, first_last))}
    found = {name: weight for name, weight in named.items() if weight.dim() > 1}
    if not found:
        raise ValueError(f"{type(model).__name__} has no convolution or linear weights to prune")
    return found


def sparse_param_groups(
    model: nn.Module, first_last: bool = True, weight_decay: float | None = None
) -> list[dict[str, Any]]:
    """Parameter groups for sparse training with PSGD: one group of prunable weights with target "zero", then one
    unscaled group with all other parameters.

    `weight_decay` >= 0 is that of the prunable weights; by default they have the optimizer's, as the others do. The
    decay of torch.optim.SGD is not scaled. Beside scaled gradients it acts as an L1 penalty of weight_decay / lambda_s
    times the sum of |w| (docs/pruning.md). The other parameters, such as those of batch norm, do not bear as much.

    Parameters that do not require a gradient are left out. Pruned weights under an active mask are set to zero in
    `model` (see `settle_masks`). Warnings name weights as those of `psg_param_groups` do. Raises ValueError for a
    weight_decay that is not a finite number >= 0, for a model without prunable weights, and if all of them are frozen.
    """
    if weight_decay is not None and not 0 <= weight_decay < float("inf"):
        raise ValueError(f"weight_decay must be a finite number >= 0, got {weight_decay!r}")
    named = prunable_weights(model, first_last)
    settle_masks(model, named)
    warn_of_computed(model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    name_of = {id(weight): name for name, weight in named.items() if weight.requires_grad}
    if not name_of:
        raise ValueError(f"{type(model).__name__} has no weights to scale: all prunable weights are frozen")
    warn_of_values({name: named[name] for name in name_of.values()})
    scaled = [parameter for parameter in trained if id(parameter) in name_of]
    others = [parameter for parameter in trained if id(parameter) not in name_of]
    own = {} if weight_decay is None else {"weight_decay": weight_decay}
    groups: list[dict[str, Any]] = [{"params": scaled, "target": "zero", **own}]
    return groups + ([{"params": others}] if others else [])


def prune_weights(
    model: nn.Module, sparsity: float, scope: str = "global", first_last: bool = True, inplace: bool = False
) -> nn.Module:
    """A copy of `model` whose smallest prunable weights, by magnitude, are zero.

    `sparsity`, 0 <= sparsity < 1, is the share of the weights that become zero, rounded to whole weights. It applies to
    all prunable weights together (scope "global", the default) or to each layer separately (scope "layer"). There is no
    fine-tuning. inplace=True changes `model` itself and returns it. A warning names the layers whose weight is computed
    from other parameters.

    Raises ValueError for any other sparsity or scope, and for a weight that is not finite. Source: paper, section 4,
    which does not specify the scope.
    """
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity must be from 0 to less than 1, got {sparsity!r}")
    if scope not in SCOPES:
        raise ValueError(f"scope must be one of {', '.join(SCOPES)}, got {scope!r}")
    for name, weight in prunable_weights(model, first_last).items():
        check_finite(name, weight)
    warn_of_computed(model)
    pruned = model if inplace else copy_network(model)
    weights = prunable_weights(pruned, first_last)
    settle_masks(pruned, weights)
    for group in [[*weights.values()]] if scope == "global" else [[weight] for weight in weights.values()]:
        _prune_smallest(group, sparsity)
    return pruned


@torch.no_grad()
def _prune_smallest(weights: Sequence[Tensor], sparsity: float) -> None:
    for weight, mask in zip(weights, masks_of_smallest([weight.abs() for weight in weights], sparsity)):
        weight.mul_(mask)


def masks_of_smallest(scores: Sequence[Tensor], sparsity: float) -> list[Tensor]:
    """A mask in the shape of each of `scores`: 0 for the share `sparsity` of them all that is smallest, else 1."""
    flat = torch.cat([score.flatten() for score in scores])
    kept = torch.ones_like(flat)
    kept[flat.topk(round(sparsity * len(flat)), largest=False).indices] = 0
    parts = kept.split_with_sizes([score.numel() for score in scores])
    return [part.view(score.shape) for part, score in zip(parts, scores)]


def nonzero_weights(model: nn.Module, first_last: bool = True) -> int:
    """Number of nonzero elements among the prunable weights of `model`."""
    return sum(int(weight_value(model, name).count_nonzero()) for name in prunable_weights(model, first_last))


@torch.no_grad()
def pruning_mse(model: nn.Module, sparsity: float, scope: str = "global", first_last: bool = True) -> float:
    """Mean of (w - pruned w)^2 over the prunable weights of `model`, where `prune_weights` gives the pruned w."""
    names, pruned = [*prunable_weights(model, first_last)], prune_weights(model, sparsity, scope, first_last)
    change = [weight_value(model, name) - pruned.get_parameter(name) for name in names]
    squares = sum(part.cpu().double().square().sum().item() for part in change)
    return squares / sum(part.numel() for part in change)
