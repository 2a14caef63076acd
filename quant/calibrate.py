"""Ranges of activation quantizers from images: the largest value, a percentile, or the least squared error.

Take training images without augmentation, never test images.
"""

import copy
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor, fx, nn

from .activations import ActivationQuantizer, SumQuantizer, is_sum, relu_names, trace
from .grid import activation_quant_max, check_bits
from .network import eval_mode

BINS = 2048
RULES = ("minmax", "percentile", "mse")
CANDIDATES = 100  # ranges that mse tries: k/100 of the largest value


class Histogram(NamedTuple):
    """Values of one ReLU: float64 counts [BINS] over equal bins from 0 to `top`, the largest value seen."""

    counts: Tensor
    top: float


def calibrate(
    model: nn.Module, batches: Iterable[Tensor], bits: int, rule: str = "mse", percentile: float = 99.99
) -> dict[str, float]:
    """Ranges for `quantize_activations` at `bits` bits from `batches` of images, by one of RULES.

    Raises ValueError for another rule, bits outside 2..8, and if `batches` is empty.
    """
    check_bits(bits)
    if rule not in RULES:
        raise ValueError(f"rule must be one of {', '.join(RULES)}, got {rule!r}")
    if rule == "minmax":
        return minmax_ranges(model, batches)
    histograms = relu_histograms(model, batches)
    return mse_ranges(histograms, bits) if rule == "mse" else percentile_ranges(histograms, percentile)


def relu_histograms(model: nn.Module, batches: Iterable[Tensor]) -> dict[str, Histogram]:
    """Histogram of the outputs of every ReLU over `batches` of images, in two passes (so `batches` is held whole).

    Raises ValueError if `batches` is empty.
    """
    batches = list(batches)
    tops = minmax_ranges(model, batches)
    counts: dict[str, Tensor] = {}

    def observe(name: str, output: Tensor) -> None:
        parts = output.float().flatten().split(2**24)  # histc counts in float32, which is exact up to there
        bins = sum(torch.histc(part, BINS, 0, tops[name] or 1.0).cpu().double() for part in parts)
        counts[name] = counts[name] + bins if name in counts else bins

    _watch(model, tops, batches, observe)
    return {name: Histogram(bins, tops[name]) for name, bins in counts.items()}


def minmax_ranges(model: nn.Module, batches: Iterable[Tensor]) -> dict[str, float]:
    """Largest output of every ReLU over `batches` of images. Raises ValueError if `batches` is empty."""
    return _largest_outputs(model, relu_names(model), batches)


def quantize_sums(model: nn.Module, batches: Iterable[Tensor]) -> fx.GraphModule:
    """A copy of `model`, as a torch.fx graph, with a `SumQuantizer` before each operand of a residual sum but ReLUs.

    With `quantize_activations` alone half of a residual network's convolutions give floats to a sum; with both a
    runtime has integers from the second layer to the last sum. Ranges are the largest magnitudes on `batches` of
    images, in eval mode. Parameters keep their names. Source: ours. Raises ValueError if `batches` is empty.
    """
    source = copy.deepcopy(model)
    quantized = fx.GraphModule(source, trace(source), type(model).__name__)
    names = []
    for node in list(filter(is_sum, quantized.graph.nodes)):
        for operand in node.args:
            module = quantized.get_submodule(operand.target) if operand.op == "call_module" else None
            if not isinstance(module, (nn.ReLU, ActivationQuantizer)):
                names.append(f"sum_quantizer_{len(names)}")
                quantized.add_submodule(names[-1], nn.Identity())
                with quantized.graph.inserting_before(node):
                    node.replace_input_with(operand, quantized.graph.call_module(names[-1], (operand,)))
    quantized.recompile()
    for name, absmax in _largest_outputs(quantized, names, batches).items():
        quantized.set_submodule(name, SumQuantizer(absmax).to(next(model.parameters()).device))
    return quantized.train(model.training)


def percentile_ranges(histograms: dict[str, Histogram], percentile: float) -> dict[str, float]:
    """For each ReLU the upper edge of the bin that holds the `percentile` (0 to 100) of its values, zeros included."""
    ranges = {}
    for name, (counts, top) in histograms.items():
        share = counts.cumsum(0) / counts.sum()
        ranges[name] = top * (int((share < percentile / 100).sum()) + 1) / BINS
    return ranges


def mse_ranges(histograms: dict[str, Histogram], bits: int) -> dict[str, float]:
    """For each ReLU the range, of CANDIDATES equal parts of the largest value, with the least mean-squared error at
    `bits` bits, every value standing at the centre of its bin. Raises ValueError for bits outside 2..8.
    """
    quant_max = activation_quant_max(bits)
    centres = (torch.arange(BINS, dtype=torch.float64) + 0.5) / BINS
    parts = torch.arange(1, CANDIDATES + 1, dtype=torch.float64) / CANDIDATES
    steps = (parts / quant_max)[:, None]
    errors = ((centres / steps).round().clamp(max=quant_max) * steps - centres).square()
    return {name: top * parts[(errors @ counts).argmin()].item() for name, (counts, top) in histograms.items()}


def _largest_outputs(model: nn.Module, names: Iterable[str], batches: Iterable[Tensor]) -> dict[str, float]:
    """Largest magnitude that each of the modules `names` gives. Raises ValueError if `batches` is empty."""
    largest: dict[str, Tensor] = {}

    def observe(name: str, output: Tensor) -> None:
        peak = output.abs().amax()
        largest[name] = torch.maximum(largest[name], peak) if name in largest else peak

    if not _watch(model, names, batches, observe):
        raise ValueError("calibration needs at least one batch of images")
    return {name: peak.item() for name, peak in largest.items()}


@torch.no_grad()
def _watch(
    model: nn.Module, names: Iterable[str], batches: Iterable[Tensor], observe: Callable[[str, Tensor], None]
) -> int:
    """Runs `batches` through `model` in eval mode and shows name and output of the modules `names` to `observe`.

    Returns the number of batches.
    """

    def hook_for(name: str):
        return lambda module, inputs, output: observe(name, output)

    handles = [model.get_submodule(name).register_forward_hook(hook_for(name)) for name in names]
    seen = 0
    try:
        with eval_mode(model):
            for images in batches:
                model(images)
                seen += 1
    finally:
        for handle in handles:
            handle.remove()
    return seen
