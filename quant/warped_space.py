"""The warped space in which plain gradient descent is equivalent to PSG (paper, section 3.1 and appendix)."""

import torch
from torch import Tensor


def warp(x: Tensor, scale: Tensor | float, lambda_s: float, eps: float = 0.0) -> Tensor:
    """f(x), element by element, in the shape of `x`. Its slope is (lambda_s * |x - t| + eps)^(-1/2), where t is the
    multiple of `scale` nearest to x.

    Consider the loss as a function of f(x). A step of gradient descent on it moves x by the PSG step, to first order in
    the learning rate. f is increasing, continuous and odd. With eps = 0 the slope of f is infinite at each t, and a
    weight at t stays there.
    """
    target = torch.round(x / scale)
    offset = x - target * scale
    return 2 * target * _stretched(torch.as_tensor(scale) / 2, lambda_s, eps) + offset.sign() * _stretched(
        offset.abs(), lambda_s, eps
    )


def unwarp(y: Tensor, scale: Tensor | float, lambda_s: float, eps: float = 0.0) -> Tensor:
    """The inverse of `warp`: the x for which warp(x) = y."""
    cell = 2 * _stretched(torch.as_tensor(scale) / 2, lambda_s, eps)
    target = torch.round(y / cell)
    offset = y - target * cell
    root: float = eps**0.5
    return target * scale + offset * (lambda_s * offset.abs() / 4 + root)


def _stretched(distance: Tensor, lambda_s: float, eps: float) -> Tensor:
    """The integral of (lambda_s * d + eps)^(-1/2) from 0 to `distance`."""
    root: float = eps**0.5
    return 2 / lambda_s * ((lambda_s * distance + eps).sqrt() - root)
