"""The method: quantization grids, the PSGD optimizer, and quantized and pruned copies of networks.

The package needs only torch. It is named `quant` in a checkout and `psgd` once installed. The names exported here cover
a user's tasks; the modules hold the functions behind them.
"""

from .activations import float_activations, quantize_activations
from .deploy import export, load_packed, read_facts
from .grid import Grid, fake_quantize_weight, weight_scale
from .groups import psg_param_groups
from .lambda_s import Pace, expected_share
from .layers import layer_grids
from .penalties import penalize_l1
from .post_training import adaround, correct_bias, reestimate_batch_norm
from .pruning import prune_weights, sparse_param_groups
from .psgd import PSGD
from .ranges import bn_ranges, calibrate, quantize_sums
from .report import describe, layer_rows, layer_sqnr
from .weights import clip_weights, grid_share, packed_bytes, quantize_weights, weight_mse

__version__ = "2.0.0"

__all__ = [
    "PSGD",
    "Grid",
    "Pace",
    "adaround",
    "bn_ranges",
    "calibrate",
    "clip_weights",
    "correct_bias",
    "describe",
    "expected_share",
    "export",
    "fake_quantize_weight",
    "float_activations",
    "grid_share",
    "layer_grids",
    "layer_rows",
    "layer_sqnr",
    "load_packed",
    "packed_bytes",
    "penalize_l1",
    "prune_weights",
    "psg_param_groups",
    "quantize_activations",
    "quantize_sums",
    "quantize_weights",
    "read_facts",
    "reestimate_batch_norm",
    "sparse_param_groups",
    "weight_mse",
    "weight_scale",
]
