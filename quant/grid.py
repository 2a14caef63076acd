"""The uniform quantization grids and their fake-quantize functions.

Weights lie on a symmetric narrow-range grid: integers -(2^(bits-1) - 1) ... 2^(bits-1) - 1, zero_point 0. Activations
after a ReLU lie on an unsigned grid: integers 0 ... 2^bits - 1, zero_point 0. The scale is the distance between
neighboring grid points. Every function accepts any shape and any float dtype.
"""

from dataclasses import dataclass, replace
from numbers import Integral
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

BITS = range(2, 9)
FLOAT_BITS = 32  # means "not quantized" wherever a bit-width is given
FIRST_LAST_BITS = 8  # bits of the first and last layers if the other layers have fewer than 4
WEIGHT_RANGES = ("absmax", "mse")


def check_bits(bits: int) -> int:
    """Returns `bits` as an int. Raises ValueError unless it is a whole number from 2 to 8."""
    if isinstance(bits, bool) or not isinstance(bits, Integral) or bits not in BITS:
        raise ValueError(f"bits must be a whole number from {BITS[0]} to {BITS[-1]}, got {bits!r}")
    return int(bits)


@dataclass(frozen=True)
class Grid:
    """The settings of the grids of a network's weights. Every function also takes a plain `4` for `Grid(4)`.

    Args:
        bits: bit-width, 2 to 8; or 32 for full precision, where nothing is quantized.
        first_last: whether the first and last layers are quantized too (default True). They then have `bits` bits if
            `bits` is at least 4, and 8 bits otherwise (published rule). False leaves them in float.
        per_channel: whether each output channel (index of dim 0) has its own scale. By default each tensor has one.
        weight_range: "absmax" (default, published) sets the scale to max|w| / (2^(bits-1) - 1). "mse" (ours, for
            evaluation) tries 1%, 2%, ..., 100% of that scale and takes the one with the smallest squared error, which
            clips large weights. PSGD trains only for "absmax".

    Raises ValueError, showing the value, for any other setting.
    """

    bits: int
    first_last: bool = True
    per_channel: bool = False
    weight_range: str = "absmax"

    def __post_init__(self) -> None:
        is_float = isinstance(self.bits, Integral) and self.bits == FLOAT_BITS
        object.__setattr__(self, "bits", FLOAT_BITS if is_float else check_bits(self.bits))
        for name in ("first_last", "per_channel"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be True or False, got {getattr(self, name)!r}")
        if self.weight_range not in WEIGHT_RANGES:
            raise ValueError(f"weight_range must be one of {', '.join(WEIGHT_RANGES)}, got {self.weight_range!r}")

    @property
    def is_float(self) -> bool:
        """Whether this stands for full precision, which has no grid."""
        return self.bits == FLOAT_BITS

    @property
    def quant_max(self) -> int:
        """Largest integer of the narrow-range weight grid, 2^(bits-1) - 1. The smallest is -quant_max.

        Raises ValueError for full precision.
        """
        return (1 << (check_bits(self.bits) - 1)) - 1

    @property
    def of_ends(self) -> "Grid":
        """The grid of the first and last layers, provided that they are quantized."""
        return replace(self, bits=FIRST_LAST_BITS) if self.bits < 4 else self


def as_grid(grid: Grid | int) -> Grid:
    """Returns `grid` itself, or Grid(grid) for a plain number. Raises ValueError, showing the value, otherwise."""
    return grid if isinstance(grid, Grid) else Grid(grid)


def activation_quant_max(bits: int) -> int:
    """Largest integer of the unsigned activation grid, 2^bits - 1. The smallest is 0. Raises ValueError for bits
    outside 2..8."""
    return (1 << check_bits(bits)) - 1


def weight_scale(weight: Tensor, grid: Grid | int) -> Tensor:
    """Scale of the grid of `weight`, in the dtype of `weight`.

    The result is a 0-d tensor. With per_channel it has shape [C, 1, ..., 1], one scale for each index of dim 0; a 1-D
    tensor (a bias) still has a single, 0-d scale. A tensor or channel of zeros has scale 1: zero is a grid point at any
    scale, and 1 avoids a division by zero. Raises ValueError for full precision.
    """
    grid = as_grid(grid)
    quant_max = grid.quant_max
    by_channel = grid.per_channel and weight.dim() > 1
    dims = tuple(range(1 if by_channel else 0, weight.dim()))
    if weight.numel() == 0:
        return nonzero_scale(weight.new_zeros(()))
    absmax = weight.abs().amax(dims, keepdim=True) if by_channel else _largest_magnitude(weight)
    scale = nonzero_scale(absmax / quant_max)
    if grid.weight_range == "absmax":
        return scale
    best, least = scale, torch.full_like(scale, float("inf"))
    for hundredths in range(100, 0, -1):
        tried = nonzero_scale(scale * (hundredths / 100))
        error = quantize(weight, tried, -quant_max, quant_max).mul_(tried).sub_(weight).square_()
        error = error.sum(dim=dims, keepdim=by_channel)
        best, least = torch.where(error < least, tried, best), torch.minimum(error, least)
    return best


def snap(weight: Tensor, grid: Grid | int) -> tuple[Tensor, Tensor]:
    """Returns Q(w), which is `weight` rounded to the nearest points of its grid, and the grid's `weight_scale`.

    The gradient of Q(w) is straight-through. Raises ValueError for full precision.
    """
    grid = as_grid(grid)
    scale = weight_scale(weight.detach(), grid)
    return fake_quantize(weight, scale, -grid.quant_max, grid.quant_max), scale


def fake_quantize_weight(weight: Tensor, grid: Grid | int) -> Tensor:
    """Q(w): `weight` rounded to the nearest points of its grid, with a straight-through gradient.

    `grid.bits` applies as it is: the rule for first and last layers is not used here. Raises ValueError for full
    precision.
    """
    return snap(weight, grid)[0]


def weight_scales(weights: list[Tensor], bits: int, per_channel: bool = False) -> list[Tensor]:
    """`weight_scale` of each of `weights`, computed with a few operations for all of them together.

    All `weights` share one device and dtype. Sharded weights are processed one by one. With `per_channel` the scale of
    a 1-D tensor may have shape [1] instead of []. Raises ValueError for bits outside 2..8.
    """
    grid = Grid(bits, per_channel=per_channel)
    if any(map(is_sharded, weights)):
        return [weight_scale(weight, grid) for weight in weights]
    # Not _foreach_norm(weights, inf): on a CPU it takes as long as the rest of PSG together.
    magnitudes = torch._foreach_abs(weights)
    if per_channel:
        peaks = [magnitude.amax(tuple(range(1, magnitude.dim())) or 0, keepdim=True) for magnitude in magnitudes]
    else:
        peaks = list(torch._foreach_max(magnitudes))
    scales = nonzero_scale(torch.cat([peak.flatten() for peak in peaks]) / grid.quant_max)
    sizes = [peak.numel() for peak in peaks]
    return [scale.view_as(peak) for scale, peak in zip(scales.split_with_sizes(sizes), peaks)]


def scale_count(weight: Tensor, per_channel: bool) -> int:
    """Number of scales of `weight`: one, or one for each index of dim 0 (see `weight_scale`)."""
    return len(weight) if per_channel and weight.dim() > 1 else 1


def is_sharded(tensor: Tensor) -> TypeGuard["DTensor"]:
    """Whether `tensor` is a DTensor. This process may hold only a part of it, or nothing."""
    return hasattr(tensor, "full_tensor")


def number(value: Tensor) -> float:
    """The 0-d `value` as a Python number. For a DTensor it is the value over all processes; .item() would read only
    this process's part."""
    return (value.full_tensor() if is_sharded(value) else value).item()


def is_all_zeros(weight: Tensor) -> bool:
    """Whether `weight`, which may be sharded, has at least one element and all of them are zero."""
    return weight.numel() > 0 and not weight.is_meta and number(_largest_magnitude(weight.detach())) == 0


def _largest_magnitude(weight: Tensor) -> Tensor:
    """max|w|, 0-d. `weight` is not empty as a whole, but this process's part of it may be."""
    if not is_sharded(weight):
        return weight.abs().amax()
    from torch.distributed.tensor import DTensor, Partial, Replicate

    part, mesh = weight.to_local(), weight.device_mesh
    peak = part.abs().amax() if part.numel() else part.new_zeros(())
    return DTensor.from_local(peak, mesh, [Partial("max")] * mesh.ndim).redistribute(mesh, [Replicate()] * mesh.ndim)


def nonzero_scale(scale: Tensor) -> Tensor:
    """`scale` with zeros replaced by one."""
    return torch.where(scale == 0, torch.ones_like(scale), scale)


def quantize(x: Tensor, scale: Tensor, quant_min: int, quant_max: int) -> Tensor:
    """Integers clamp(round(x / scale), quant_min, quant_max), in the shape and dtype of `x`. Ties round to even."""
    # Not x * (1 / scale): at ties the result differs.
    return (x / scale).round_().clamp_(quant_min, quant_max)


class _FakeQuantize(torch.autograd.Function):
    """scale * quantize(x) with the straight-through gradient: 1 inside the range of the grid, 0 outside."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, quant_min: int, quant_max: int) -> Tensor:
        ctx.save_for_backward(x, scale)
        ctx.limits = quant_min, quant_max
        return quantize(x, scale, quant_min, quant_max) * scale

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, scale = ctx.saved_tensors
        quant_min, quant_max = ctx.limits
        integers = (x / scale).round_()
        inside = (integers >= quant_min) & (integers <= quant_max)
        return grads[0] * inside, None, None, None


def fake_quantize(x: Tensor, scale: Tensor, quant_min: int, quant_max: int) -> Tensor:
    """`x` rounded to the nearest of the grid points scale * {quant_min ... quant_max}; straight-through gradient.

    `scale` is 0-d or broadcasts against `x`. No gradient flows to it.
    """
    quantized: Tensor = _FakeQuantize.apply(x, scale, quant_min, quant_max)
    return quantized
