"""The uniform quantization grids and their fake-quantize functions.

Weights lie on a symmetric narrow-range grid: integers -(2^(bits-1) - 1) ... 2^(bits-1) - 1, zero_point 0. Activations
after a ReLU lie on an unsigned grid: integers 0 ... 2^bits - 1, zero_point 0. The scale is the distance between
neighboring grid points. Every function accepts any shape and any float dtype.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from .selectors import Selector, selectors
from .sharded import is_sharded, largest_magnitude, largest_magnitudes, other_dims

BITS = range(2, 9)
FLOAT_BITS = 32  # means "not quantized" wherever a bit-width is given
FIRST_LAST_BITS = 8  # bits of the first and last layers if the other layers have fewer than 4
WEIGHT_RANGES = ("absmax", "mse")
HALVES = (torch.float16, torch.bfloat16)


def quant_max_of(bits: int) -> int:
    """Largest integer of the narrow-range weight grid, 2^(bits-1) - 1. Raises ValueError for bits outside 2..8."""
    return (1 << (check_bits(bits) - 1)) - 1


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
        per_channel: whether each output channel has its own scale. By default each tensor has one, and each expert of a
            stack of experts.
        weight_range: "absmax" (default, published) sets the scale to max|w| / (2^(bits-1) - 1). "mse" (ours, for
            evaluation) tries 1%, 2%, ..., 100% of that scale and takes the one with the smallest squared error, which
            clips large weights. PSGD trains only for "absmax".
        include: adds parameters with at least two dims that the rule of `layer_grids` leaves out, such as embeddings. A
            pattern (as of fnmatch) for state_dict names of parameters or names of modules, a module class, or a
            sequence of these; a module stands for all of its parameters. Default: nothing.
        exclude: leaves parameters in float, in the same words; it prevails over `include`.
        scale_dims: for a single weight, the dims whose every index has a scale of its own, such as (1,). By default
            none, or dim 0 if per_channel. `layer_grids` sets it; a grid for a whole network has none.

    Raises ValueError, showing the value, for any other setting.
    """

    bits: int
    first_last: bool = True
    per_channel: bool = False
    weight_range: str = "absmax"
    include: Selector | Sequence[Selector] = ()
    exclude: Selector | Sequence[Selector] = ()
    scale_dims: Sequence[int] | None = None

    def __post_init__(self) -> None:
        is_float = isinstance(self.bits, Integral) and self.bits == FLOAT_BITS
        object.__setattr__(self, "bits", FLOAT_BITS if is_float else check_bits(self.bits))
        for name in ("first_last", "per_channel"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be True or False, got {getattr(self, name)!r}")
        if self.weight_range not in WEIGHT_RANGES:
            raise ValueError(f"weight_range must be one of {', '.join(WEIGHT_RANGES)}, got {self.weight_range!r}")
        for name in ("include", "exclude"):
            object.__setattr__(self, name, selectors(name, getattr(self, name)))
        if self.scale_dims is not None:
            object.__setattr__(self, "scale_dims", check_scale_dims(self.scale_dims))

    @property
    def is_float(self) -> bool:
        """Whether this stands for full precision, which has no grid."""
        return self.bits == FLOAT_BITS

    @property
    def quant_max(self) -> int:
        """Largest integer of the narrow-range weight grid, 2^(bits-1) - 1. The smallest is -quant_max.

        Raises ValueError for full precision.
        """
        return quant_max_of(self.bits)

    @property
    def of_ends(self) -> "Grid":
        """The grid of the first and last layers, provided that they are quantized."""
        return replace(self, bits=FIRST_LAST_BITS) if self.bits < 4 else self

    def facts(self) -> dict[str, Any]:
        """The settings that JSON can hold, of which `Grid(**facts)` makes the grid again; `include`, `exclude` and
        `scale_dims` only where they are set.

        Raises ValueError for module classes in `include` or `exclude`, which JSON cannot hold.
        """
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        classes = [entry.__name__ for entry in (*values["include"], *values["exclude"]) if isinstance(entry, type)]
        if classes:
            raise ValueError(
                f"a grid with the class {classes[0]} cannot be written to a file: name its modules instead"
            )
        lists = {name: values.pop(name) for name in ("include", "exclude", "scale_dims")}
        said = {name for name, value in lists.items() if value or (name == "scale_dims" and value is not None)}
        return values | {name: list(lists[name]) for name in lists if name in said}


def check_scale_dims(dims: Any) -> tuple[int, ...]:
    """Returns `dims` as a tuple. Raises ValueError unless they are distinct whole numbers of at least 0, in order."""
    if not isinstance(dims, Sequence) or any(type(dim) is not int or dim < 0 for dim in dims):
        raise ValueError(f"scale_dims must be whole numbers of at least 0, such as (1,), got {dims!r}")
    if sorted(set(dims)) != list(dims):
        raise ValueError(f"scale_dims must rise, got {dims!r}")
    return tuple(dims)


def as_grid(grid: Grid | int) -> Grid:
    """Returns `grid` itself, or Grid(grid) for a plain number. Raises ValueError, showing the value, otherwise."""
    return grid if isinstance(grid, Grid) else Grid(grid)


def activation_quant_max(bits: int) -> int:
    """Largest integer of the unsigned activation grid, 2^bits - 1. The smallest is 0. Raises ValueError for bits
    outside 2..8."""
    return (1 << check_bits(bits)) - 1


def weight_scale(weight: Tensor, grid: Grid | int) -> Tensor:
    """Scale of the grid of `weight`, in the dtype of `weight`; in float32 for float16 and bfloat16, whose range and
    precision are too small for it.

    The result is a 0-d tensor. With per_channel it has shape [C, 1, ..., 1], one scale for each index of dim 0. With
    scale_dims=(1,) it has shape [1, C, 1, ..., 1], and so on. A 1-D tensor (a bias) always has a single, 0-d scale. A
    tensor or channel of zeros has scale 1: zero is a grid point at any scale, and 1 avoids a division by zero. Raises
    ValueError for full precision, and for scale_dims that `weight` does not have.
    """
    grid = as_grid(grid)
    quant_max = grid.quant_max
    own = dims_with_scales(weight, grid.per_channel, grid.scale_dims)
    dims = other_dims(weight, own)
    if weight.numel() == 0:
        return nonzero_scale(in_float32(weight.new_zeros(())))
    scale = nonzero_scale(in_float32(largest_magnitude(weight, own)) / quant_max)
    if grid.weight_range == "absmax":
        return scale
    weight = in_float32(weight)
    best, least = scale, torch.full_like(scale, float("inf"))
    for hundredths in range(100, 0, -1):
        tried = nonzero_scale(scale * (hundredths / 100))
        error = quantize(weight, tried, -quant_max, quant_max).mul_(tried).sub_(weight).square_()
        error = error.sum(dim=dims, keepdim=bool(own))
        best, least = torch.where(error < least, tried, best), torch.minimum(error, least)
    return best


def snap(weight: Tensor, grid: Grid | int) -> tuple[Tensor, Tensor]:
    """Returns Q(w), which is `weight` rounded to the nearest points of its grid, and the grid's `weight_scale`.

    The gradient of Q(w) is straight-through. Raises ValueError for full precision.
    """
    grid = as_grid(grid)
    scale = weight_scale(weight.detach(), grid)
    return fake_quantize(in_float32(weight), scale, -grid.quant_max, grid.quant_max).to(weight.dtype), scale


def fake_quantize_weight(weight: Tensor, grid: Grid | int) -> Tensor:
    """Q(w): `weight` rounded to the nearest points of its grid, with a straight-through gradient.

    `grid.bits` applies as it is: the rule for first and last layers is not used here. Raises ValueError for full
    precision.
    """
    return snap(weight, grid)[0]


def in_float32(weight: Tensor) -> Tensor:
    """`weight` in float32 if it is float16 or bfloat16, else `weight` itself."""
    return weight.float() if weight.dtype in HALVES else weight


def weight_scales(
    weights: list[Tensor], bits: int, per_channel: bool = False, scale_dims: Sequence[int] | None = None
) -> list[Tensor]:
    """`weight_scale` of each of `weights`, in their dtype, computed with a few operations for all of them together.

    All `weights` share one device and dtype, and are sharded over one mesh or not at all. With `per_channel` or
    `scale_dims` the scale of a 1-D tensor may have shape [1] instead of []. Raises ValueError for bits outside 2..8.
    """
    sharded = list(filter(is_sharded, weights))
    if sharded and not (per_channel or scale_dims):
        return [nonzero_scale(peak / quant_max_of(bits)) for peak in largest_magnitudes(sharded)]
    if sharded or len(weights) == 1:
        grid = Grid(bits, per_channel=per_channel, scale_dims=scale_dims)
        # A scale of a float16 weight may vanish in float16.
        return [nonzero_scale(weight_scale(weight, grid).to(weight.dtype)) for weight in weights]
    # Not _foreach_norm(weights, inf): on a CPU it takes as long as the rest of PSG together.
    magnitudes = torch._foreach_abs(weights)
    if per_channel or scale_dims:
        peaks = [peak_over(magnitude, dims_with_scales(magnitude, per_channel, scale_dims)) for magnitude in magnitudes]
    else:
        peaks = list(torch._foreach_max(magnitudes))
    scales = nonzero_scale(torch.cat([peak.flatten() for peak in peaks]) / quant_max_of(bits))
    sizes = [peak.numel() for peak in peaks]
    return [scale.view_as(peak) for scale, peak in zip(scales.split_with_sizes(sizes), peaks)]


def peak_over(magnitude: Tensor, own: Sequence[int]) -> Tensor:
    """The maximum over all dims except `own`, which are kept."""
    dims = other_dims(magnitude, own)
    return magnitude.amax(dims, keepdim=True) if dims else magnitude  # torch would take none of the dims for all


def dims_with_scales(weight: Tensor, per_channel: bool, scale_dims: Sequence[int] | None) -> tuple[int, ...]:
    """The dims of `weight` whose every index has a scale of its own. A 1-D tensor has one scale and no such dims.

    Raises ValueError for scale_dims that `weight` does not have.
    """
    if weight.dim() < 2:
        return ()
    if scale_dims is None:
        return (0,) if per_channel else ()
    if any(dim >= weight.dim() for dim in scale_dims):
        raise ValueError(f"scale_dims {tuple(scale_dims)} do not fit a weight of shape {list(weight.shape)}")
    return tuple(scale_dims)


def scale_count(weight: Tensor, grid: Grid) -> int:
    """Number of scales of `weight` (see `weight_scale`)."""
    return math.prod(weight.shape[dim] for dim in dims_with_scales(weight, grid.per_channel, grid.scale_dims))


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
