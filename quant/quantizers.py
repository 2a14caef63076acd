"""Modules that fake-quantize activations: one replaces a ReLU, the other precedes a residual sum."""

import torch
from torch import Tensor, nn

from .grid import activation_quant_max, fake_quantize, nonzero_scale


class Quantizer(nn.Module):
    """Rounds to the grid points scale * {quant_min ... quant_max}, where `largest` is scale * quant_max.

    A `largest` of 0 gives scale 1. inplace=True writes the result over the input, as an in-place ReLU does. Raises
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
        # The backward pass needs the original input, which the in-place write overwrites.
        held = x.clone() if self.inplace else x
        quantized = fake_quantize(held, self.scale.to(x.dtype), self.quant_min, self.quant_max)
        return x.copy_(quantized) if self.inplace else quantized

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
