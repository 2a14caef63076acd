"""Copies of a float network with quantized weights, and measures of the quantization error and the packed size."""

import torch
from torch import nn

from .grid import Grid, as_grid, number, scale_count, snap
from .layers import WEIGHT_LAYERS, check_finite, copy_network, layer_grids, warn_of_computed, weight_value


@torch.no_grad()
def quantize_weights(model: nn.Module, grid: Grid | int, inplace: bool = False) -> nn.Module:
    """A copy of `model` whose weights (see `layer_grids`) are rounded to their grid points and stored in float.

    At 32 bits the weights stay as they are. inplace=True changes `model` itself and returns it. A warning names the
    layers whose weight is computed from other parameters, as by weight_norm: it stays float. Raises ValueError for a
    weight that is not finite, and what `layer_grids` raises.
    """
    grid = as_grid(grid)
    grids = {} if grid.is_float else layer_grids(model, grid)
    for name in grids:
        check_finite(name, model.get_parameter(name))
    if grids:
        warn_of_computed(model)
    quantized = model if inplace else copy_network(model)
    for name, own in grids.items():
        quantized.get_parameter(name).copy_(snap(weight_value(quantized, name), own)[0])
    return quantized


@torch.no_grad()
def weight_mse(model: nn.Module, grid: Grid | int) -> float:
    """Mean of (w - Q(w))^2 over all quantized weights and biases (paper, appendix, table 1A); 0 at 32 bits."""
    grid = as_grid(grid)
    if grid.is_float:
        return 0.0
    total, count = 0.0, 0
    for name, own in layer_grids(model, grid).items():
        weight = weight_value(model, name)
        total += number((weight - snap(weight, own)[0]).cpu().double().square().sum())
        count += weight.numel()
    return total / count


@torch.no_grad()
def grid_share(model: nn.Module, grid: Grid | int, tolerance: float = 0.1) -> float:
    """Share (0 to 1) of the quantized weights whose distance to their nearest grid point is at most tolerance * scale.

    Weights that are spread evenly over the cells of the grid give 2 * tolerance, 0.2 by default. Raises ValueError at
    32 bits.
    """
    near, count = 0.0, 0
    for name, own in layer_grids(model, grid).items():
        weight = weight_value(model, name)
        nearest, scale = snap(weight, own)
        near += number(((weight - nearest).abs() <= tolerance * scale).sum())
        count += weight.numel()
    return near / count


def packed_bytes(model: nn.Module, grid: Grid | int) -> int:
    """Size in bytes of the parameters of convolutions and linear layers, packed at their bit-widths.

    A quantized tensor takes ceil(numel * bits / 8) bytes, and 4 bytes for each scale. A float tensor takes 4 bytes for
    each element. Batch norm is not counted, since it stays in float at every bit-width.
    """
    grid = as_grid(grid)
    grids = {} if grid.is_float else layer_grids(model, grid)
    total = 0
    seen: set[int] = set()  # a parameter that layers share is stored once
    for name, module in model.named_modules():
        if not isinstance(module, WEIGHT_LAYERS):
            continue
        for key, parameter in module.named_parameters(name, recurse=False):
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            if key in grids:
                scales = scale_count(parameter, grid.per_channel)
                total += (parameter.numel() * grids[key].bits + 7) // 8 + 4 * scales
            else:
                total += 4 * parameter.numel()
    return total
