"""Copies of a float network with quantized weights, and measures of the quantization error and the packed size."""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn

from .grid import Grid, as_grid, fake_quantize, in_float32, scale_count, weight_scale
from .layers import check_finite, check_values, choices, copy_network, layer_grids, warn_of_float, weight_value
from .passes import pieces
from .sharded import number


def quantize_weights(model: nn.Module, grid: Grid | int, inplace: bool = False) -> nn.Module:
    """A copy of `model` whose weights (see `layer_grids`) are rounded to their grid points and stored in float.

    At 32 bits the weights stay as they are. inplace=True changes `model` itself and returns it. Weights in float16 or
    bfloat16 are rounded in float32, and then to their dtype. Warnings name the layers whose weight is computed from
    other parameters, as by weight_norm, and the other matrices that stay in float, without the user's word, and are
    above 1 % of the parameters. Raises ValueError for a weight that is not finite, and what `layer_grids` raises.
    """
    grid = as_grid(grid)
    grids = {} if grid.is_float else layer_grids(model, grid)
    for name in grids:
        check_finite(name, model.get_parameter(name))
    if grids:
        warn_of_float(model, grid)
    quantized = model if inplace else copy_network(model)
    with torch.no_grad():
        for name, own in grids.items():
            weight = weight_value(quantized, name)
            for _, nearest, _, part in _parts(weight, own, quantized.get_parameter(name)):
                part.copy_(nearest)
    return quantized


def _parts(weight: Tensor, grid: Grid, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Pieces of `weight` with their nearest grid points, their scale, and their part of `others`, as views.

    Nothing as large as the weight is made.
    """
    for part, scale, *rest in pieces(weight, weight_scale(weight, grid), *others):
        nearest = fake_quantize(in_float32(part), scale, -grid.quant_max, grid.quant_max).to(weight.dtype)
        yield part, nearest, scale, *rest


def clip_weights(model: nn.Module, grid: Grid | int) -> nn.Module:
    """Clips the weights (see `layer_grids`) to the range whose grid has the smallest squared error, in place (ours).

    That range is the one of `weight_range` "mse"; afterwards it is that of "absmax" too. Call it once before a stage of
    PSGD(..., keep_range=True) at 2 bits, where max|w| makes the cells of the grid too wide for most weights; at 3 bits
    it made no difference. A second call clips further. Frozen weights stay as they are: no stage could make up for what
    is cut. Returns `model`. Warns as `quantize_weights` does. Raises ValueError for full precision, for a weight that
    is not finite, and what `layer_grids` raises.
    """
    grids = layer_grids(model, replace(as_grid(grid), weight_range="mse"))
    warn_of_float(model, grid)
    grids = {name: own for name, own in grids.items() if model.get_parameter(name).requires_grad}
    for name in grids:
        check_finite(name, model.get_parameter(name))
    for name, own in grids.items():
        weight = weight_value(model, name).detach()
        reach = weight_scale(weight, own) * own.quant_max
        with torch.no_grad():
            model.get_parameter(name).copy_(weight.clamp(-reach, reach))
    return model


@torch.no_grad()
def weight_mse(model: nn.Module, grid: Grid | int) -> float:
    """Mean of (w - Q(w))^2 over all quantized weights and biases (paper, appendix, table 1A); 0 at 32 bits."""
    grid = as_grid(grid)
    if grid.is_float:
        return 0.0
    total, count = 0.0, 0
    for name, own in layer_grids(model, grid).items():
        check_values(name, model.get_parameter(name))
        weight = weight_value(model, name)
        for part, nearest, _ in _parts(weight, own):
            total += number((part - nearest).cpu().double().square().sum())
        count += weight.numel()
    return total / count


@torch.no_grad()
def grid_share(model: nn.Module, grid: Grid | int, tolerance: float = 0.1) -> float:
    """Share (0 to 1) of the quantized weights whose distance to their nearest grid point is at most tolerance * scale.

    Weights that are spread evenly over the cells of the grid give 2 * tolerance, 0.2 by default. In bfloat16 they may
    give more, as grid points are rounded to it. Raises ValueError at 32 bits and for a weight that is not finite.
    """
    near, count = 0.0, 0
    for name, own in layer_grids(model, grid).items():
        check_finite(name, model.get_parameter(name))
        weight = weight_value(model, name)
        for part, nearest, scale in _parts(weight, own):
            near += number(((part - nearest).abs() <= tolerance * scale).sum())
        count += weight.numel()
    return near / count


def packed_bytes(model: nn.Module, grid: Grid | int) -> int:
    """Size in bytes of the parameters of the layers of `layer_grids`, and of those included, packed at their
    bit-widths.

    A quantized tensor takes ceil(numel * bits / 8) bytes, and 4 bytes for each scale. A float tensor takes 4 bytes for
    each element. Batch norm is not counted, since it stays in float at every bit-width.
    """
    total = 0
    for _, parameter, role, own, *_ in choices(model, grid):
        if own is not None and not own.is_float:
            total += (parameter.numel() * own.bits + 7) // 8 + 4 * scale_count(parameter, own)
        elif own is not None or role.kind:
            total += 4 * parameter.numel()
    return total
