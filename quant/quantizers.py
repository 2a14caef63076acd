"""Modules that fake-quantize activations: in place of a ReLU, before a residual sum, and at the input of a layer."""

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from .grid import activation_quant_max, fake_quantize, nonzero_scale


class Quantizer(nn.Module):
    """Rounds to the grid points scale * {quant_min ... quant_max}, where `largest` is scale * quant_max.

    A `largest` of 0 gives scale 1. inplace=True writes the result over the input, as an in-place ReLU does. The buffer
    `scale` stays float32 whatever the network is cast to; inputs of 16 bits are quantized in float32. Raises
    ValueError for a `largest` that is negative or not finite.
    """

    scale: Tensor

    def __init__(self, largest: float, quant_min: int, quant_max: int, inplace: bool = False) -> None:
        super().__init__()
        if not 0 <= largest < float("inf"):
            raise ValueError(f"the activation range must be a finite number >= 0, got {largest!r}")
        self.quant_min, self.quant_max, self.inplace = quant_min, quant_max, inplace
        self.register_buffer("scale", nonzero_scale(torch.tensor(largest / quant_max)))

    def forward(self, x: Tensor) -> Tensor:
        held = x.to(torch.promote_types(x.dtype, self.scale.dtype))
        if self.inplace and held is x:
            held = x.clone()  # the backward pass needs the original input, which the in-place write overwrites
        quantized = self.quantize(held, self.scale.to(held.dtype)).to(x.dtype)
        return x.copy_(quantized) if self.inplace else quantized

    def quantize(self, x: Tensor, scale: Tensor) -> Tensor:
        return fake_quantize(x, scale, self.quant_min, self.quant_max)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        scale = self.scale
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.scale.dtype != scale.dtype:  # model.half() would round a small scale to zero
            self.scale = scale.to(self.scale.device)
        return self

    def extra_repr(self) -> str:
        return f"integers {self.quant_min} to {self.quant_max}, largest={self.scale.item() * self.quant_max:.6g}"


class ActivationQuantizer(Quantizer):
    """A ReLU and a quantizer in one: clamps to [0, x_max] and rounds to the 2^bits levels of that range.

    An x_max of 0, of a ReLU that never fired during calibration, gives scale 1. Raises ValueError for bits outside 2..8
    and for an x_max that is negative or not finite.
    """

    def __init__(self, bits: int, x_max: float, inplace: bool = False) -> None:
        super().__init__(x_max, 0, activation_quant_max(bits), inplace)


class SumQuantizer(Quantizer):
    """Quantizes an operand of a residual sum: rounds to scale * {-128 ... 127}, where scale is absmax / 127.

    An absmax of 0 gives scale 1. Raises ValueError for an absmax that is negative or not finite.
    """

    def __init__(self, absmax: float) -> None:
        super().__init__(absmax, -128, 127)


class InputQuantizer(Quantizer):
    """Quantizes the input of a layer to the 2^bits integers 0 ... 2^bits - 1 of a grid that covers `low` to `high`.

    The output is (clamp(round(x / scale) + zero_point, 0, 2^bits - 1) - zero_point) * scale: ONNX's QuantizeLinear and
    DequantizeLinear. Ties round to even. The range is widened to hold zero, which is a grid point. From it follow
    `scale` = (high - low) / (2^bits - 1) and `zero_point` = round(-low / scale). The zero point is 0 where no value is
    negative, as after a ReLU. It is 2^(bits-1) where the range is symmetric: the grid is then the signed one, moved by
    half its length. It is in between where negative values are smaller, as after GELU. A range of zeros has scale 1.

    Buffers: `scale`, float32, and `zero_point`, int32, both 0-d. They keep these dtypes whatever the network is cast
    to. Inputs of 16 bits are quantized in float32; the output has the dtype of the input. The gradient is straight
    through: 1 inside the range of the grid, 0 outside. Raises ValueError for bits outside 2..8, and unless low <= high
    are finite.
    """

    zero_point: Tensor

    def __init__(self, bits: int, low: float, high: float) -> None:
        if not low <= high:
            raise ValueError(f"the range of an input must be low <= high, got {low!r} to {high!r}")
        low, high = min(low, 0.0), max(high, 0.0)
        super().__init__(high - low, 0, activation_quant_max(bits))
        zero_point = round(-low / ((high - low) or 1.0) * self.quant_max)
        self.register_buffer("zero_point", torch.tensor(zero_point, dtype=torch.int32))

    def quantize(self, x: Tensor, scale: Tensor) -> Tensor:
        quantized: Tensor = _QuantizeInput.apply(x, scale, self.zero_point, self.quant_min, self.quant_max)
        return quantized

    def extra_repr(self) -> str:
        scale, zero_point = self.scale.item(), int(self.zero_point)
        low, high = (self.quant_min - zero_point) * scale, (self.quant_max - zero_point) * scale
        return f"integers {self.quant_min} to {self.quant_max}, zero_point={zero_point}, {low:.6g} to {high:.6g}"


class _QuantizeInput(torch.autograd.Function):
    """The rule of `InputQuantizer`, with its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor, quant_min: int, quant_max: int) -> Tensor:
        ctx.save_for_backward(x, scale, zero_point)
        ctx.limits = quant_min, quant_max
        # Not in one sum before rounding: the zero point would decide which way ties go.
        return (x / scale).round_().add_(zero_point).clamp_(quant_min, quant_max).sub_(zero_point).mul_(scale)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, zero_point = ctx.saved_tensors
        quant_min, quant_max = ctx.limits
        integers = (x / scale).round_().add_(zero_point)
        return grads[0] * ((integers >= quant_min) & (integers <= quant_max)), None, None, None, None
