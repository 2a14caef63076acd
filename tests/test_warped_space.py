"""The warped space, and that PSG is gradient descent in it."""

import pytest
import torch

from quant import PSGD, weight_scale
from quant.warped_space import unwarp, warp

STEP, LAMBDA_S = 0.25, 6.0


@pytest.fixture
def x():
    return torch.linspace(-1.3, 1.3, 4001, dtype=torch.float64)


@pytest.mark.parametrize("eps", [0.0, 0.03])
def test_unwarp_inverts_warp(x, eps):
    y = warp(x, STEP, LAMBDA_S, eps)
    assert (y.diff() > 0).all()  # so it has an inverse, also across the borders of the cells
    assert torch.allclose(unwarp(y, STEP, LAMBDA_S, eps), x, atol=1e-12)
    assert torch.allclose(warp(-x, STEP, LAMBDA_S, eps), -y, atol=1e-12)


def test_slope_is_the_multiplier_to_the_power_of_minus_a_half(x):
    inside = x.requires_grad_()
    (slope,) = torch.autograd.grad(warp(inside, STEP, LAMBDA_S, 0.03).sum(), inside)
    distance = (x - STEP * torch.round(x / STEP)).abs()
    off_target = distance > 1e-6  # at a target sign() has no derivative for autograd
    assert torch.allclose(slope[off_target], (LAMBDA_S * distance + 0.03)[off_target] ** -0.5)


def quadratic(seed):
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(12, 12, generator=generator, dtype=torch.float64)
    center = torch.randn(12, generator=generator, dtype=torch.float64)
    return lambda w: 0.5 * (root @ (w - center)).square().sum() / 12


@pytest.mark.parametrize("seed", range(3))
def test_psgd_is_gradient_descent_in_the_warped_space(seed):
    """One step each on a random quadratic: they part by a multiple of lr^2, so by a quarter at half the rate."""
    loss = quadratic(seed)
    generator = torch.Generator().manual_seed(100 + seed)
    start = torch.randn(12, generator=generator, dtype=torch.float64)
    scale = weight_scale(start, 4)

    def gap(lr):
        weight = torch.nn.Parameter(start.clone())
        optimizer = PSGD(torch.optim.SGD([{"params": [weight], "bits": 4}], lr=lr), lambda_s=LAMBDA_S, eps=0.05)
        loss(weight).backward()
        optimizer.step()
        warped = warp(start, scale, LAMBDA_S, 0.05).requires_grad_()
        (gradient,) = torch.autograd.grad(loss(unwarp(warped, scale, LAMBDA_S, 0.05)), warped)
        moved = unwarp((warped - lr * gradient).detach(), scale, LAMBDA_S, 0.05)
        assert (moved - start).abs().max() > lr / 100
        return (moved - weight.detach()).abs().max().item()

    assert gap(1e-4) / gap(5e-5) == pytest.approx(4, rel=0.05)
