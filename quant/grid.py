"""The uniform quantization grids and their fake-quantize functions.

Weights sit on a symmetric narrow-range grid (integers -(2^(b-1)-1) ... 2^(b-1)-1, zero_point 0), activations after a
ReLU on an unsigned one (integers 0 ... 2^b-1, zero_point 0). Every function works on any shape and float dtype.
"""

import torch
from torch import Tensor

BITS = range(2, 9)
FLOAT_BITS = 32  # stands for "not quantized" wherever a bit-width is given


def check_bits(bits: int) -> int:
    """`bits`, if it is a whole number from 2 to 8; else ValueError."""
    if isinstance(bits, bool) or bits not in BITS:
        raise ValueError(f"bits must be a whole number from {BITS[0]} to {BITS[-1]}, got {bits!r}")
    return int(bits)


def weight_quant_max(bits: int) -> int:
    """Largest integer of the narrow-range weight grid, 2^(bits-1) - 1; the smallest is its negative."""
    return 2 ** (check_bits(bits) - 1) - 1


def activation_quant_max(bits: int) -> int:
    """Largest integer of the unsigned activation grid, 2^bits - 1; the smallest is 0."""
    return 2 ** check_bits(bits) - 1


WEIGHT_RANGES = ("absmax", "mse")


def weight_scale(weight: Tensor, bits: int, per_channel: bool = False, weight_range: str = "absmax") -> Tensor:
    """Step of the weight grid: with "absmax" s = max|w| / (2^(bits-1) - 1) (design of the published code), with "mse"
    the part of it, in hundredths, of the least squared error (ours, for evaluation: large weights are cut off).

    Returns a 0-d tensor, or with `per_channel` one step for each index of dim 0, shaped to broadcast against
    `weight`; a 1-D tensor (a bias) has one step either way. A tensor (or channel) of zeros gets step 1: it lies on that
    grid exactly, and nothing divides by zero.
    Raises ValueError for bits outside 2..8 or an unknown weight_range.
    """
    quant_max = weight_quant_max(bits)
    if weight_range not in WEIGHT_RANGES:
        raise ValueError(f"weight_range must be one of {', '.join(WEIGHT_RANGES)}, got {weight_range!r}")
    dims = tuple(range(1, weight.dim())) if per_channel and weight.dim() > 1 else tuple(range(weight.dim()))
    if weight.numel() == 0:
        return nonzero_scale(weight.new_zeros(()))
    absmax = weight.abs().amax(dims, keepdim=True) if len(dims) < weight.dim() else _largest_magnitude(weight)
    scale = nonzero_scale(absmax / quant_max)
    if weight_range == "absmax":
        return scale
    best, least = scale, torch.full_like(scale, float("inf"))
    for hundredths in range(100, 0, -1):
        tried = nonzero_scale(scale * (hundredths / 100))
        error = quantize(weight, tried, -quant_max, quant_max).mul_(tried).sub_(weight).square_()
        error = error.sum(dim=dims, keepdim=len(dims) < weight.dim())
        best, least = torch.where(error < least, tried, best), torch.minimum(error, least)
    return best


def weight_scales(weights: list[Tensor], bits: int, per_channel: bool = False) -> list[Tensor]:
    """`weight_scale` of each of `weights`, which share one device and dtype, in few operations for all together.

    Sharded weights are taken one by one. A 1-D tensor's step may have shape [1] with `per_channel`. Raises ValueError
    for bits outside 2..8.
    """
    if any(map(is_sharded, weights)):
        return [weight_scale(weight, bits, per_channel) for weight in weights]
    # Not _foreach_norm(weights, inf): on a CPU that takes as long as all the rest of PSG.
    magnitudes = torch._foreach_abs(weights)
    if per_channel:
        peaks = [magnitude.amax(tuple(range(1, magnitude.dim())) or 0, keepdim=True) for magnitude in magnitudes]
    else:
        peaks = list(torch._foreach_max(magnitudes))
    scales = nonzero_scale(torch.cat([peak.flatten() for peak in peaks]) / weight_quant_max(bits))
    return [scale.view_as(peak) for scale, peak in zip(scales.split([peak.numel() for peak in peaks]), peaks)]


def scale_count(weight: Tensor, per_channel: bool) -> int:
    """Number of grids of `weight`, each with a step of its own: see `weight_scale`."""
    return len(weight) if per_channel and weight.dim() > 1 else 1


def is_sharded(tensor: Tensor) -> bool:
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
    def forward(ctx, x, scale, quant_min, quant_max):
        ctx.save_for_backward(x, scale)
        ctx.limits = quant_min, quant_max
        return quantize(x, scale, quant_min, quant_max) * scale

    @staticmethod
    def backward(ctx, grad):
        x, scale = ctx.saved_tensors
        quant_min, quant_max = ctx.limits
        integers = (x / scale).round_()
        inside = (integers >= quant_min) & (integers <= quant_max)
        return grad * inside, None, None, None


def fake_quantize(x: Tensor, scale: Tensor, quant_min: int, quant_max: int) -> Tensor:
    """`x` moved to the nearest of the grid points scale * {quant_min ... quant_max}; straight-through gradient.

    No gradient flows to `scale`.
    """
    return _FakeQuantize.apply(x, scale, quant_min, quant_max)


def fake_quantize_weight(weight: Tensor, bits: int, per_channel: bool = False, weight_range: str = "absmax") -> Tensor:
    """Q(w): `weight` on its own grid of `bits` bits, per tensor (default) or per output channel; see `weight_scale`.

    Raises ValueError for bits outside 2..8 or an unknown weight_range.
    """
    quant_max = weight_quant_max(bits)
    scale = weight_scale(weight.detach(), bits, per_channel, weight_range)
    return fake_quantize(weight, scale, -quant_max, quant_max)
