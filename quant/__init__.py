"""The method: quantization grids, the PSGD optimizer and quantized copies of networks. Needs torch alone."""

from quant.grid import (
    fake_quantize,
    fake_quantize_weight,
    quantize,
    weight_scale,
)
from quant.layers import layer_bits
from quant.network import (
    FLOAT_BITS,
    ActivationQuantizer,
    bn_ranges,
    grid_share,
    minmax_ranges,
    packed_bytes,
    quantize_activations,
    quantize_weights,
    weight_mse,
)
from quant.psgd import PSGD, psg_multipliers, psg_param_groups

__all__ = [
    "FLOAT_BITS",
    "PSGD",
    "ActivationQuantizer",
    "bn_ranges",
    "fake_quantize",
    "fake_quantize_weight",
    "grid_share",
    "layer_bits",
    "minmax_ranges",
    "packed_bytes",
    "psg_multipliers",
    "psg_param_groups",
    "quantize",
    "quantize_activations",
    "quantize_weights",
    "weight_mse",
    "weight_scale",
]
