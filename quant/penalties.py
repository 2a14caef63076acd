"""Penalties that other methods add to the loss: baselines beside PSG, and L1 together with it."""

from collections.abc import Callable
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .pruning import prunable_weights
from .psgd import with_gradients

Penalty = Callable[[Tensor], Tensor]  # of a batch's loss, 0-d, to what is added to it, 0-d


def penalize_l1(optimizer: Optimizer, model: nn.Module, strength: float, first_last: bool = True) -> None:
    """Makes each step of `optimizer` minimize strength * sum |w| over the prunable weights of `model` as well.

    For an optimizer that is, or will be, the base of a PSGD that acts on gradients: the penalty's, strength * sign(w),
    is then added after the scaling, as weight decay is. Scaled, as with acts_on="update", it would pull at every weight
    in proportion, as weight decay does, and make none of them zero. Does nothing for a strength of 0. (Ours; the paper
    has no penalty.)

    It is a hook on `optimizer`, which a deepcopy or a pickle of it lacks. A step with a closure raises ValueError: the
    gradients that the closure makes would not have the penalty's.
    """
    if not strength:
        return
    weights = [*prunable_weights(model, first_last).values()]

    @torch.no_grad()
    def add_gradient(_: Optimizer, step_args: tuple[Any, ...], step_kwargs: dict[str, Any]) -> None:
        if any(callable(argument) for argument in [*step_args[1:], *step_kwargs.values()]):
            raise ValueError("an L1 penalty cannot be added in a step with a closure")
        moved, gradients = with_gradients(weights)
        if not moved:
            return
        pulls = torch._foreach_sign(moved)
        factor = getattr(optimizer, "grad_scale", None)
        if factor is not None:  # of GradScaler, by which a fused optimizer divides the gradients inside its step
            torch._foreach_mul_(pulls, factor.to(moved[0].device))
        torch._foreach_add_(gradients, pulls, alpha=strength)

    optimizer.register_step_pre_hook(add_gradient)


def gradient_penalty(model: nn.Module, strength: float, first_last: bool = True) -> Penalty | None:
    """strength * sum |d loss / d w| over the prunable weights of `model`; None for a strength of 0.

    Robustness to quantization by gradient-L1 regularization (Alizadeh et al. 2020). It differentiates twice: a step
    takes several times as long.
    """
    if not strength:
        return None
    weights = [*prunable_weights(model, first_last).values()]

    def penalty(loss: Tensor) -> Tensor:
        gradients = torch.autograd.grad(loss, weights, create_graph=True)
        return strength * reduce(torch.add, [gradient.abs().sum() for gradient in gradients])

    return penalty
