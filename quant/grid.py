"""The uniform quantization grids and their fake-quantize functions.

Weights sit on a symmetric narrow-range grid (integers -(2^(b-1)-1) ... 2^(b-1)-1, zero_point 0), activations after a
ReLU on an unsigned one (integers 0 ... 2^b-1, zero_point 0). Every function works on any shape and float dtype.
"""

from dataclasses import dataclass, replace
from numbers import Integral
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

BITS = range(2, 9)
FLOAT_BITS = 32  # stands for "not quantized" wherever a bit-width is given
FIRST_LAST_BITS = 8  # of the first and the last layer when the others have fewer than 4
WEIGHT_RANGES = ("absmax", "mse")


def check_bits(bits: int) -> int:
    """`bits` as an int if it is a whole number from 2 to 8. Raises ValueError otherwise."""
    if isinstance(bits, bool) or not isinstance(bits, Integral) or bits not in BITS:
        raise ValueError(f"bits must be a whole number from {BITS[0]} to {BITS[-1]}, got {bits!r}")
    return int(bits)


@dataclass(frozen=True)
class Grid:
    """The grids of a network's weights, said once and handed to every function. A plain `4` stands for `Grid(4)`.

    Args:
        bits: 2 to 8, or 32: full precision, where nothing is quantized.
        first_last: whether the first and the last layer are quantized too, at `bits` bits from 4 up and at 8 below
            (published rule). False leaves them float.
        per_channel: whether each output channel (index of dim 0) has a step of its own. By default a tensor has one.
        weight_range: "absmax" (published), where the step is max|w| / (2^(bits-1) - 1), or "mse" (ours, for
            evaluation), where it is the fraction of that, in hundredths, with the least squared error: large weights
            are clipped. PSGD trains for "absmax" only.

    Raises ValueError with the value for anything else.
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
        """Whether this is full precision, which has no grid."""
        return self.bits == FLOAT_BITS

    @property
    def quant_max(self) -> int:
        """Largest integer of the narrow-range weight grid, 2^(bits-1) - 1; the smallest is its negative.

        Raises ValueError for full precision.
        """
        return (1 << (check_bits(self.bits) - 1)) - 1

    @property
    def of_ends(self) -> "Grid":
        """The grid of the first and the last layer, if these are quantized."""
        return replace(self, bits=FIRST_LAST_BITS) if self.bits < 4 else self


def as_grid(grid: Grid | int) -> Grid:
    """`grid`, or Grid(grid) for a plain number. Raises ValueError with the value for anything else."""
    return grid if isinstance(grid, Grid) else Grid(grid)


def activation_quant_max(bits: int) -> int:
    """Largest integer of the unsigned activation grid, 2^bits - 1; the smallest is 0."""
    return (1 << check_bits(bits)) - 1


def weight_scale(weight: Tensor, grid: Grid | int) -> Tensor:
    """Step of the grid of `weight`: a 0-d tensor, or with per_channel one step for each index of dim 0, shaped to
    broadcast against `weight`.

    A 1-D tensor (a bias) has one step either way. A tensor (or channel) of zeros has step 1: it lies on that grid
    exactly, and nothing divides by zero. Raises ValueError for full precision.
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
    """Q(w), the nearest points of the grid of `weight`, and the grid's step, as `weight_scale` gives it.

    The gradient of Q(w) is straight-through. Raises ValueError for full precision.
    """
    grid = as_grid(grid)
    scale = weight_scale(weight.detach(), grid)
    return fake_quantize(weight, scale, -grid.quant_max, grid.quant_max), scale


def fake_quantize_weight(weight: Tensor, grid: Grid | int) -> Tensor:
    """Q(w): `weight` moved to the nearest points of its grid; straight-through gradient.

    `grid.bits` are this weight's own, whatever layer it belongs to. Raises ValueError for full precision.
    """
    return snap(weight, grid)[0]


def weight_scales(weights: list[Tensor], bits: int, per_channel: bool = False) -> list[Tensor]:
    """`weight_scale` of each of `weights`, which share one device and dtype, in few operations for all together.

    Sharded weights are taken one by one. A 1-D tensor's step may have shape [1] with `per_channel`. Raises ValueError
    for bits outside 2..8.
    """
    grid = Grid(bits, per_channel=per_channel)
    if any(map(is_sharded, weights)):
        return [weight_scale(weight, grid) for weight in weights]
    # Not _foreach_norm(weights, inf): on a CPU that takes as long as all the rest of PSG.
    magnitudes = torch._foreach_abs(weights)
    if per_channel:
        peaks = [magnitude.amax(tuple(range(1, magnitude.dim())) or 0, keepdim=True) for magnitude in magnitudes]
    else:
        peaks = list(torch._foreach_max(magnitudes))
    scales = nonzero_scale(torch.cat([peak.flatten() for peak in peaks]) / grid.quant_max)
    sizes = [peak.numel() for peak in peaks]
    return [scale.view_as(peak) for scale, peak in zip(scales.split_with_sizes(sizes), peaks)]


def scale_count(weight: Tensor, per_channel: bool) -> int:
    """Number of grids of `weight`, each with a step of its own: see `weight_scale`."""
    return len(weight) if per_channel and weight.dim() > 1 else 1


def is_sharded(tensor: Tensor) -> TypeGuard["DTensor"]:
    """Whether `tensor` is a DTensor, of which this process may hold a part, or nothing."""
    return hasattr(tensor, "full_tensor")


def number(value: Tensor) -> float:
    """The 0-d `value` on the host; of a DTensor the whole's, where .item() would read this process's part."""
    return (value.full_tensor() if is_sharded(value) else value).item()


def is_all_zeros(weight: Tensor) -> bool:
    """Whether `weight`, which may be sharded, has elements and none of them differs from zero."""
    return weight.numel() > 0 and not weight.is_meta and number(_largest_magnitude(weight.detach())) == 0


def _largest_magnitude(weight: Tensor) -> Tensor:
    """max|w|, 0-d, of a tensor that is not empty, though this process's part of it may be."""
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
    """Integers clamp(round(x / scale), quant_min, quant_max), in the dtype of `x`.

    Ties round to even. The division is not replaced by a multiplication with 1/scale: at ties the two differ.
    """
    return (x / scale).round_().clamp_(quant_min, quant_max)


class _FakeQuantize(torch.autograd.Function):
    """scale * quantize(x) with the straight-through gradient: 1 inside the grid's range, 0 outside."""

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
    """`x` moved to the nearest of the grid points scale * {quant_min ... quant_max}; straight-through gradient.

    No gradient flows to `scale`.
    """
    quantized: Tensor = _FakeQuantize.apply(x, scale, quant_min, quant_max)
    return quantized
