"""Penalties on the loss: the L1 penalty, for use together with PSG, and the gradient penalty, a baseline."""

import math
from collections.abc import Callable
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .pruning import prunable_weights
from .psgd import PSGD, with_gradients

Penalty = Callable[[Tensor], Tensor]  # from the 0-d loss of a batch to the 0-d term that is added to it


def penalize_l1(optimizer: Optimizer, model: nn.Module, strength: float, first_last: bool = True) -> None:
    """Adds strength * sum |w| over the prunable weights of `model` to what each step of `optimizer` minimizes (ours).

    `optimizer` is, or will be, the base of a PSGD with acts_on="gradient". The gradient of the penalty, strength *
    sign(w), is then added after PSG has scaled the gradients, as weight decay is. With acts_on="update" PSG would scale
    the penalty too. The penalty would then shrink each weight in proportion to its size and make none of them zero. A
    strength of 0 adds nothing.

    The penalty is a hook on `optimizer`; a deepcopy or a pickle of the optimizer lacks it. A step with a closure raises
    ValueError, because the gradients that the closure computes would lack the penalty. Raises TypeError for a PSGD, and
    ValueError for a strength that is not a finite number of at least 0, and for a base with maximize=True.
    """
    if isinstance(optimizer, PSGD):
        raise TypeError("a PSGD would scale the penalty: give its base optimizer (optimizer.base)")
    if not (math.isfinite(strength) and strength >= 0):
        raise ValueError(f"the strength of the L1 penalty must be a finite number >= 0, got {strength!r}")
    if any(group.get("maximize") for group in optimizer.param_groups):
        raise ValueError("the L1 penalty is for optimizers that minimize, and a group has maximize=True")
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
        if factor is not None:  # GradScaler sets it; a fused optimizer divides its gradients by it
            torch._foreach_mul_(pulls, factor.to(moved[0].device))
        torch._foreach_add_(gradients, pulls, alpha=strength)

    optimizer.register_step_pre_hook(add_gradient)


def gradient_penalty(model: nn.Module, strength: float, first_last: bool = True) -> Penalty | None:
    """The penalty strength * sum |d loss / d w| over the prunable weights of `model`, or None for a strength of 0.

    Source: gradient L1 regularization for quantization robustness (Alizadeh et al. 2020). The penalty differentiates
    twice, so a training step takes several times as long.
    """
    if not strength:
        return None
    weights = [*prunable_weights(model, first_last).values()]

    def penalty(loss: Tensor) -> Tensor:
        gradients = torch.autograd.grad(loss, weights, create_graph=True)
        return strength * reduce(torch.add, [gradient.abs().sum() for gradient in gradients])

    return penalty
