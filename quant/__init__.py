"""The method: quantization grids, the PSGD optimizer, and quantized and pruned copies of networks.

Needs torch alone. In a checkout this package is `quant`; installed, it is `psgd`.
"""

from .activations import bn_ranges, float_activations, quantize_activations
from .auto import AUTO_MULTIPLIER, auto_lambda_s, mean_distance, steer_lambda_s
from .calibrate import calibrate, minmax_ranges, mse_ranges, percentile_ranges, quantize_sums, relu_histograms
from .export import export
from .goals import GridGoal, SparseGoal
from .grid import FLOAT_BITS, fake_quantize, fake_quantize_weight, quantize, weight_scale
from .layers import layer_bits, psg_param_groups
from .network import grid_share, packed_bytes, quantize_weights, weight_mse
from .onnx_graph import to_onnx
from .packed_file import integer_weights, load_packed, read_facts, save_packed
from .penalty import gradient_penalty, penalise_l1
from .post import adaround, correct_bias, reestimate_batch_norm
from .psgd import PSGD, psg_multipliers
from .quantizers import ActivationQuantizer, SumQuantizer
from .report import layer_rows
from .sparsity import nonzero_weights, prunable_weights, prune_weights, pruning_mse, sparse_param_groups
from .warp import unwarp, warp

__all__ = [
    "AUTO_MULTIPLIER",
    "FLOAT_BITS",
    "PSGD",
    "ActivationQuantizer",
    "GridGoal",
    "SparseGoal",
    "SumQuantizer",
    "adaround",
    "auto_lambda_s",
    "bn_ranges",
    "calibrate",
    "correct_bias",
    "export",
    "fake_quantize",
    "fake_quantize_weight",
    "float_activations",
    "gradient_penalty",
    "grid_share",
    "integer_weights",
    "layer_bits",
    "layer_rows",
    "load_packed",
    "mean_distance",
    "minmax_ranges",
    "mse_ranges",
    "nonzero_weights",
    "packed_bytes",
    "penalise_l1",
    "percentile_ranges",
    "prunable_weights",
    "prune_weights",
    "pruning_mse",
    "psg_multipliers",
    "psg_param_groups",
    "quantize",
    "quantize_activations",
    "quantize_sums",
    "quantize_weights",
    "read_facts",
    "reestimate_batch_norm",
    "relu_histograms",
    "save_packed",
    "sparse_param_groups",
    "steer_lambda_s",
    "to_onnx",
    "unwarp",
    "warp",
    "weight_mse",
    "weight_scale",
]
