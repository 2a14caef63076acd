"""The method: quantization grids, the PSGD optimizer and quantized copies of networks. Needs torch alone."""

from quant.activations import ActivationQuantizer, bn_ranges, quantize_activations
from quant.auto import AUTO_START, steer_lambda_s
from quant.calibrate import minmax_ranges, mse_ranges, percentile_ranges, relu_histograms
from quant.grid import FLOAT_BITS, fake_quantize, fake_quantize_weight, quantize, weight_scale
from quant.layers import layer_bits
from quant.network import grid_share, packed_bytes, quantize_weights, weight_mse
from quant.onnx_graph import to_onnx
from quant.packed_file import integer_weights, load_packed, read_facts, save_packed
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
    "integer_weights",
    "layer_bits",
    "layer_rows",
    "load_packed",
    "minmax_ranges",
    "mse_ranges",
    "packed_bytes",
    "percentile_ranges",
    "psg_multipliers",
    "psg_param_groups",
    "quantize",
    "quantize_activations",
    "quantize_weights",
    "read_facts",
    "reestimate_batch_norm",
    "relu_histograms",
    "save_packed",
    "steer_lambda_s",
    "to_onnx",
    "weight_mse",
    "weight_scale",
]
