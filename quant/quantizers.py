"""Modules that round activations: in place of a ReLU, and before a residual sum."""

import torch
from torch import Tensor, nn

from .grid import activation_quant_max, fake_quantize, nonzero_scale


class Quantizer(nn.Module):
    """Rounds to the integers quant_min ... quant_max times a step, of which `largest` is the last.

    inplace=True writes the result over the input, as the ReLU does that it stands for.
    """

    scale: Tensor

    def __init__(self, largest: float, quant_min: int, quant_max: int, inplace: bool = False) -> None:
        super().__init__()
        if not 0 <= largest < float("inf"):
            raise ValueError(f"the activation range must be a finite number >= 0, got {largest!r}")
        self.quant_min, self.quant_max, self.inplace = quant_min, quant_max, inplace
        self.register_buffer("scale", nonzero_scale(torch.tensor(largest / quant_max)))

    def forward(self, x: Tensor) -> Tensor:
        # The gradient needs the input as it was, which writing in place destroys.
        held = x.clone() if self.inplace else x
        quantized = fake_quantize(held, self.scale.to(x.dtype), self.quant_min, self.quant_max)
        return x.copy_(quantized) if self.inplace else quantized

    def extra_repr(self) -> str:
        return f"integers {self.quant_min} to {self.quant_max}, largest={self.scale.item() * self.quant_max:.6g}"


class ActivationQuantizer(Quantizer):
    """ReLU and quantizer in one: clamps to [0, x_max] and rounds to the 2^bits levels of that range.

    An x_max of 0, a ReLU that was never seen to fire, gives a step of 1. Raises ValueError for bits outside 2..8 or an
    x_max that is negative or not finite.
    """

    def __init__(self, bits: int, x_max: float, inplace: bool = False) -> None:
        super().__init__(x_max, 0, activation_quant_max(bits), inplace)


class SumQuantizer(Quantizer):
    """Rounds to integers -128 ... 127 of a step absmax / 127: what a residual sum takes.

    An absmax of 0 gives a step of 1. Raises ValueError for an absmax that is negative or not finite.
    """

    def __init__(self, absmax: float) -> None:
        super().__init__(absmax, -128, 127)
