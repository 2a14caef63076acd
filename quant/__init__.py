"""The method: quantization grids, the PSGD optimizer and quantized copies of networks. Needs torch alone."""

from quant.activations import ActivationQuantizer, bn_ranges, quantize_activations
from quant.auto import AUTO_START, steer_lambda_s
from quant.calibrate import minmax_ranges, mse_ranges, percentile_ranges, relu_histograms
from quant.grid import FLOAT_BITS, fake_quantize, fake_quantize_weight, quantize, weight_scale
from quant.layers import layer_bits
from quant.network import grid_share, packed_bytes, quantize_weights, weight_mse
from quant.post import adaround, correct_bias, reestimate_batch_norm
from quant.psgd import PSGD, psg_multipliers, psg_param_groups
from quant.report import layer_rows

__all__ = [
    "AUTO_START",
    "FLOAT_BITS",
    "PSGD",
    "ActivationQuantizer",
    "adaround",
    "bn_ranges",
    "correct_bias",
    "fake_quantize",
    "fake_quantize_weight",
    "grid_share",
    "layer_bits",
    "layer_rows",
    "minmax_ranges",
    "mse_ranges",
    "packed_bytes",
    "percentile_ranges",
    "psg_multipliers",
    "psg_param_groups",
    "quantize",
    "quantize_activations",
    "quantize_weights",
    "reestimate_batch_norm",
    "relu_histograms",
    "steer_lambda_s",
    "weight_mse",
    "weight_scale",
]
