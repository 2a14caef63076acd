"""Checks before the first epoch: whether a network takes the images, and whether PSG moves its weights."""

import copy

import torch
from torch import nn

from quant.pruning import prunable_weights
from utils.cli import UserError, first_line

VANISHED = 1e-6  # weights this small are outweighed by batch norm's eps, 1e-5 beside the variance of a layer's output


@torch.no_grad()
def check_takes(model: nn.Module, name: str, size: int, smallest_step: int = 2) -> None:
    """Raises UserError if `model`, called `name`, cannot take images of size x size, or be trained on `smallest_step`
    of them."""
    image = torch.zeros(1, 3, size, size, device=next(model.parameters()).device)
    try:
        model.eval()(image)
    except Exception as error:  # torch and torchvision raise several kinds
        raise UserError(f"{name} cannot take {size} x {size} images ({first_line(error)})") from None
    if smallest_step == 1:  # batch norm over one number has no variance
        try:
            copy.deepcopy(model).train()(image)
        except ValueError as error:
            advice = "choose a --batch_size that leaves more than one image for the last step of an epoch"
            raise UserError(f"{name} cannot be trained on one image ({first_line(error)}): {advice}") from None


def check_moves(model: nn.Module, first_last: bool = True) -> None:
    """Raises UserError if a weight of `model` is all zeros: it is on its target, and PSG with eps 0 never moves it."""
    for name, weight in prunable_weights(model, first_last).items():
        if not weight.any():
            raise UserError(
                f"{name} is all zeros, which PSG never moves: use --eps 0.01, or start from trained weights"
            )


def vanished_layer(model: nn.Module, first_last: bool = True) -> str | None:
    """Name of a prunable weight of `model` none of whose elements is above VANISHED in magnitude, or None."""
    weights = prunable_weights(model, first_last).items()
    return next((name for name, weight in weights if weight.detach().abs().amax() <= VANISHED), None)
