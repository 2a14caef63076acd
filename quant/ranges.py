"""Ranges of activation quantizers, from calibration images or from batch norm.

Images give the largest value, a percentile, or the range with the smallest squared error; batch norm needs no images.
Calibrate on training images without augmentation, never on test images. A batch is a tensor of images, or (images,
labels) as a data loader yields it.
"""

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.fx.node import Argument

from .activations import relu_names
from .grid import Grid, check_bits
from .histograms import Histogram, count, mse_part, upper_edge
from .hooks import Batch, watch
from .inputs import InputRange, input_histograms, input_ranges
from .layers import ENDS, copy_network, end_layers, is_relu
from .quantizers import ActivationQuantizer, SumQuantizer
from .tracing import called_module, check_same, is_sum, trace

RULES = ("minmax", "percentile", "mse")
PLACES = ("relu", "inputs")
Ranges = dict[str, float] | dict[str, InputRange]


def calibrate(
    model: nn.Module,
    batches: Iterable[Batch],
    bits: int,
    rule: str = "mse",
    percentile: float = 99.99,
    at: str = "relu",
    grid: Grid | int = 8,
) -> Ranges:
    """Ranges for `quantize_activations` from `batches` of images, by module name.

    `at` decides where the quantizers stand. "relu" (default, published) finds the largest value x_max of every nn.ReLU.
    "inputs" (ours) finds the InputRange of the input of each layer that has a parameter in `layer_grids(model, grid)`,
    by default of all convolutions and linear layers: it suits networks with any activations. Give it the grid of the
    weights. There a batch may hold anything that the network takes as its only argument, such as int64 token ids.

    `rule` is "mse" (default: smallest squared error at `bits` bits), "minmax" (smallest and largest value) or
    "percentile" (the `percentile`, above 50 and up to 100, of the values; below zero, 100 minus that). A ReLU that eval
    mode never calls has no range. Neither has an input that no hook reaches: that of a layer which is not called,
    unless the module that holds the layer gives its weight to F.linear. One warning names such inputs, which stay
    float.

    Raises ValueError for any other rule, place or percentile, for bits outside 2..8, if `batches` is empty, for
    activations that are not finite, and for a model without ReLU modules or without layers to quantize.
    """
    check_bits(bits)
    if rule not in RULES:
        raise ValueError(f"rule must be one of {', '.join(RULES)}, got {rule!r}")
    if not 50 < percentile <= 100:
        raise ValueError(f"percentile must be above 50 and at most 100 (percent, not a fraction), got {percentile!r}")
    if at not in PLACES:
        raise ValueError(f"at must be one of {', '.join(PLACES)}, got {at!r}")
    if at == "inputs":
        of_inputs = input_histograms(model, batches, grid)
        if not of_inputs:
            raise ValueError(f"no hook reaches the inputs of a layer of {type(model).__name__}")
        return input_ranges(of_inputs, rule, bits, percentile)
    if rule == "minmax":
        return minmax_ranges(model, batches)
    histograms = relu_histograms(model, batches)
    return mse_ranges(histograms, bits) if rule == "mse" else percentile_ranges(histograms, percentile)


def relu_histograms(model: nn.Module, batches: Iterable[Batch]) -> dict[str, Histogram]:
    """Histogram of the outputs of every ReLU over `batches` of images, by module name.

    It takes two passes, so all of `batches` is held in memory. Raises ValueError as `minmax_ranges` does.
    """
    batches = list(batches)
    tops = minmax_ranges(model, batches)
    counts: dict[str, Tensor] = {}

    def observe(name: str, _: Tensor, output: Tensor) -> None:
        counts[name] = counts.get(name, 0) + count(output, 0.0, tops[name])

    watch(model, tops, batches, observe)
    return {name: Histogram(bins, tops[name]) for name, bins in counts.items()}


def minmax_ranges(model: nn.Module, batches: Iterable[Batch]) -> dict[str, float]:
    """Largest output of every ReLU over `batches` of images, by module name.

    Raises ValueError if `batches` is empty, for a model without ReLU modules, and, with its name, for a ReLU whose
    output is not finite.
    """
    return _largest_outputs(model, relu_names(model), batches)


def quantize_sums(model: nn.Module, batches: Iterable[Batch]) -> fx.GraphModule:
    """A copy of `model` as a torch.fx graph with a `SumQuantizer` before each operand of a residual sum except the
    outputs of ReLUs and of activation quantizers (ours).

    With only `quantize_activations`, half of the convolutions of a residual network pass floats to a sum. With both, a
    runtime computes in integers from the second layer to the last sum. The ranges are the largest magnitudes over
    `batches` of images, in eval mode. Parameters keep their names. The graph is that of eval mode, so functions that
    depend on the mode, such as F.dropout, always behave as in eval mode.

    Raises ValueError if `batches` is empty, for a network that cannot be traced, and for a network whose graph computes
    something else on the first batch than the network does.
    """
    batches = list(batches)
    source = copy_network(model)
    quantized = fx.GraphModule(source, trace(source), type(model).__name__)
    quantized.meta[ENDS] = end_layers(model)
    names: list[str] = []
    for node in list(filter(is_sum, quantized.graph.nodes)):
        for operand in dict.fromkeys(node.args):
            module = called_module(quantized, operand)
            if not (is_relu(module) or isinstance(module, ActivationQuantizer)):
                names.append(f"sum_quantizer_{len(names)}")
                quantized.add_submodule(names[-1], nn.Identity())
                with quantized.graph.inserting_before(node):
                    node.replace_input_with(operand, quantized.graph.call_module(names[-1], (operand,)))
    quantized.recompile()
    check_same(model, quantized, batches[:1])
    for name, absmax in _largest_outputs(quantized, names, batches).items():
        quantized.set_submodule(name, SumQuantizer(absmax).to(next(model.parameters()).device))
    modes = {name: module.training for name, module in model.named_modules()}
    for name, module in quantized.named_modules():
        module.training = modes.get(name, model.training)
    return quantized


def percentile_ranges(histograms: dict[str, Histogram], percentile: float) -> dict[str, float]:
    """For each ReLU, the upper edge of the bin that holds the `percentile` (0 to 100) of its outputs, with zeros."""
    return {name: upper_edge(histogram, percentile) for name, histogram in histograms.items()}


def mse_ranges(histograms: dict[str, Histogram], bits: int) -> dict[str, float]:
    """For each ReLU, the range with the smallest mean squared error at `bits` bits, as `mse_part` finds it."""
    return {name: histogram.top * mse_part(histogram, bits) for name, histogram in histograms.items()}


def _largest_outputs(model: nn.Module, names: Iterable[str], batches: Iterable[Batch]) -> dict[str, float]:
    """Largest magnitude of the outputs of each of the modules `names` over `batches`, where they are of a float type.

    Raises ValueError if `batches` is empty, and for a magnitude that is not finite.
    """
    largest: dict[str, Tensor] = {}

    def observe(name: str, _: Tensor, output: Any) -> None:
        if not (isinstance(output, Tensor) and output.is_floating_point()):
            return  # the sum of sizes or of token ids
        peak = output.abs().amax()
        largest[name] = torch.maximum(largest[name], peak) if name in largest else peak

    if not watch(model, names, batches, observe):
        raise ValueError("calibration needs at least one batch of images")
    found = {name: peak.item() for name, peak in largest.items()}
    for name, peak in found.items():
        if not math.isfinite(peak):
            raise ValueError(f"the output of {name} reaches {peak}: its range cannot be calibrated")
    return found


class ChannelStatistics(NamedTuple):
    """Mean and variance of an activation, one value per channel (float tensors [C])."""

    mean: Tensor
    var: Tensor


@torch.no_grad()
def bn_ranges(model: nn.Module, n: float = 6.0, shortcut: bool = True) -> dict[str, float]:
    """Data-free range of every ReLU by module name: the maximum over channels of mean + n * standard deviation of its
    input (default n 6).

    The statistics come from batch norm, whose output has mean beta and standard deviation |gamma|. For a ReLU after a
    residual sum, shortcut=True (default, ours) adds the mean and variance of the shortcut, which is assumed to be
    independent of the main branch. The output of an earlier ReLU is taken as a rectified normal variable.
    shortcut=False is the published rule, which uses only the batch norm of the main branch (the first operand of the
    sum).

    Raises ValueError, with the name, for a ReLU whose input cannot be traced back to a batch norm or to one that is not
    finite, and for a network that cannot be traced.
    """
    statistics = _Statistics(model, shortcut)
    ranges: dict[str, float] = {}
    for node in trace(model).nodes:
        if is_relu(called_module(model, node)):
            try:
                mean, var = statistics.of(node.args[0])
            except LookupError as error:
                raise ValueError(
                    f"no batch norm feeds {node.target} (found {error}): its range must be calibrated on images"
                ) from None
            largest = (mean + n * var.sqrt()).max().item()
            if not math.isfinite(largest):
                raise ValueError(f"the batch norm before {node.target} has values that are not finite")
            ranges[node.target] = max(ranges.get(node.target, 0.0), largest)
    return ranges


class _Statistics:
    """Channel statistics of the nodes of a traced graph, derived from the batch norms before them."""

    def __init__(self, model: nn.Module, shortcut: bool) -> None:
        self.model, self.shortcut = model, shortcut
        self.known: dict[fx.Node, ChannelStatistics] = {}

    def of(self, node: Argument) -> ChannelStatistics:
        """Statistics of the output of `node`. Raises LookupError, naming the node that is not understood."""
        if not isinstance(node, fx.Node):
            raise LookupError(str(node))
        if node not in self.known:
            self.known[node] = self.follow(node)
        return self.known[node]

    def follow(self, node: fx.Node) -> ChannelStatistics:
        module = called_module(self.model, node)
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)) and module.affine:
            return ChannelStatistics(module.bias, module.weight.square())
        if is_relu(module):
            return rectified(self.of(node.args[0]))
        if isinstance(module, (nn.Identity, nn.Dropout)):
            return self.of(node.args[0])
        if is_sum(node):
            main = self.of(node.args[0])
            if not self.shortcut:
                return main
            other = self.of(node.args[1])
            return ChannelStatistics(main.mean + other.mean, main.var + other.var)
        raise LookupError(str(node.target))


def rectified(x: ChannelStatistics) -> ChannelStatistics:
    """Statistics of max(0, x) for normally distributed x, in closed form."""
    std = x.var.sqrt().clamp_min(torch.finfo(x.var.dtype).tiny)
    ratio = x.mean / std
    density = torch.exp(-0.5 * ratio.square()) / (2 * torch.pi) ** 0.5
    share = torch.special.ndtr(ratio)
    mean = x.mean * share + std * density
    second_moment = (x.mean.square() + x.var) * share + x.mean * std * density
    return ChannelStatistics(mean, (second_moment - mean.square()).clamp_min(0))
