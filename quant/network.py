"""Copies of a float network with quantized weights, and what quantization does to its weights and size."""

import torch
from torch import nn

from .grid import FLOAT_BITS, fake_quantize_weight, number, scale_count, weight_scale
from .layers import WEIGHT_LAYERS, check_finite, copy_network, layer_bits, weight_value


@torch.no_grad()
def quantize_weights(
    model: nn.Module,
    bits: int,
    first_last: bool = True,
    per_channel: bool = False,
    weight_range: str = "absmax",
    inplace: bool = False,
) -> nn.Module:
    """A copy of `model` whose weights (see `layer_bits`) are the float values of their low-bit grid points.

    bits=32 changes nothing; inplace=True changes `model` itself and returns it. Raises ValueError for other bits
    outside 2..8, and for a weight that is not finite.
    """
    widths = {} if bits == FLOAT_BITS else layer_bits(model, bits, first_last)
    for name in widths:
        check_finite(name, model.get_parameter(name))
    quantized = model if inplace else copy_network(model)
    for name, width in widths.items():
        value = fake_quantize_weight(weight_value(quantized, name), width, per_channel, weight_range)
        quantized.get_parameter(name).copy_(value)
    return quantized


@torch.no_grad()
def weight_mse(
    model: nn.Module, bits: int, first_last: bool = True, per_channel: bool = False, weight_range: str = "absmax"
) -> float:
    """Mean of (w - Q(w))^2 over all weights and biases that `layer_bits` names (appendix table 1A); 0 at 32 bits."""
    if bits == FLOAT_BITS:
        return 0.0
    total, count = 0.0, 0
    for name, width in layer_bits(model, bits, first_last).items():
        weight = weight_value(model, name)
        error = weight - fake_quantize_weight(weight, width, per_channel, weight_range)
        total += number(error.cpu().double().square().sum())
        count += weight.numel()
    return total / count


@torch.no_grad()
def grid_share(
    model: nn.Module, bits: int, first_last: bool = True, per_channel: bool = False, tolerance: float = 0.1
) -> float:
    """Share (0 to 1) of the quantized weights that lie within `tolerance` steps of a point of their own grid.

    Weights spread evenly over the cells of the grid give 2 * tolerance (0.2 by default).
    """
    near, count = 0, 0
    for name, width in layer_bits(model, bits, first_last).items():
        weight = weight_value(model, name)
        distance = (weight - fake_quantize_weight(weight, width, per_channel)).abs()
        near += number((distance <= tolerance * weight_scale(weight, width, per_channel)).sum())
        count += weight.numel()
    return near / count


def packed_bytes(model: nn.Module, bits: int, first_last: bool = True, per_channel: bool = False) -> int:
    """Bytes of the convolution and linear layers' parameters, packed at their bit-width.

    A quantized tensor takes ceil(numel * bits / 8) bytes and 4 for each scale; one left in float takes 4 an element.
    Batch norm is not counted: it stays float at every bit-width.
    """
    widths = {} if bits == FLOAT_BITS else layer_bits(model, bits, first_last)
    total = 0
    seen: set[int] = set()  # a parameter that layers share is stored once
    for name, module in model.named_modules():
        if not isinstance(module, WEIGHT_LAYERS):
            continue
        for key, parameter in module.named_parameters(name, recurse=False):
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            if key in widths:
                total += (parameter.numel() * widths[key] + 7) // 8 + 4 * scale_count(parameter, per_channel)
            else:
                total += 4 * parameter.numel()
    return total
