"""Penalties that other methods add to the loss, as baselines beside PSG."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .sparsity import prunable_weights

Penalty = Callable[[Tensor], Tensor]  # of a batch's loss, 0-d, to what is added to it, 0-d


def build_penalty(model: nn.Module, l1: float = 0.0, grad_l1: float = 0.0, first_last: bool = True) -> Penalty | None:
    """l1 * sum |w| + grad_l1 * sum |d loss / d w| over the prunable weights of `model`; None if both are 0.

    The first term is sparse training by L1 regularisation, the second robustness to quantization by gradient-L1
    regularisation (Alizadeh et al. 2020), which differentiates twice: a step then takes several times as long.
    """
    if not l1 and not grad_l1:
        return None
    weights = [*prunable_weights(model, first_last).values()]

    def penalty(loss: Tensor) -> Tensor:
        total = torch.zeros_like(loss)
        if l1:
            total = total + l1 * sum(weight.abs().sum() for weight in weights)
        if grad_l1:
            gradients = torch.autograd.grad(loss, weights, create_graph=True)
            total = total + grad_l1 * sum(gradient.abs().sum() for gradient in gradients)
        return total

    return penalty
