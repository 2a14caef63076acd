"""Quantizers at the inputs of the quantized layers: which layers, their ranges, and a network that has them.

The layers are found by running the network, so functions, concatenations, attention and control flow do not matter.
"""

import math
import warnings
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .grid import FIRST_LAST_BITS, Grid, as_grid
from .histograms import Histogram, count, mse_part, upper_edge
from .hooks import Batch, call_layers, input_places, is_projection, watch
from .kinds import kind_of, layer_of
from .layers import copy_network, first_names, layer_grids
from .quantizers import ActivationQuantizer, InputQuantizer


class InputRange(NamedTuple):
    """The range of the inputs of a layer."""

    low: float
    high: float
    is_end: bool = False  # of the first or last layer, whose input has 8 bits
    is_called: bool = True  # if not, its parent passes its weight to a function


class InputHistogram(NamedTuple):
    """The values of the inputs of a layer; the other entries are those of `InputRange`."""

    values: Histogram
    is_end: bool
    is_called: bool


def input_layers(model: nn.Module, grid: Grid | int) -> dict[str, bool]:
    """The layers that own a parameter in `layer_grids(model, grid)`, in the order of the modules of `model`, and
    whether each is the first or last one: one with more bits than the others on a 2-bit grid.

    Layers that share a parameter are all among them. Modules of other kinds, such as embeddings, are not, even where
    `include` names their parameters.
    """
    grids = layer_grids(model, replace(as_grid(grid), bits=2))
    bits = {id(model.get_parameter(name)): own.bits for name, own in grids.items()}
    layers: dict[str, bool] = {}
    for name, module in model.named_modules():
        own = [bits[id(parameter)] for parameter in module.parameters(recurse=False) if id(parameter) in bits]
        layer = name.partition(".parametrizations.")[0]
        if own and kind_of(model.get_submodule(layer)):
            layers[layer] = layers.get(layer, False) or FIRST_LAST_BITS in own
    return layers


@torch.no_grad()
def input_histograms(model: nn.Module, batches: Iterable[Batch], grid: Grid | int = 8) -> dict[str, InputHistogram]:
    """Histogram of the inputs of each of `input_layers(model, grid)` over `batches`, by the layer's name.

    It takes three passes, so all of `batches` is held in memory. The first finds which layers are called, the second
    their ranges. One warning names the inputs that no hook reaches, as `calibrate` says. Raises ValueError if `batches`
    is empty, for a network with activation quantizers, and, with its name, for an input that is not finite.
    """
    check_float(model)
    batches, ends = list(batches), input_layers(model, grid)
    uncalled = uncalled_layers(model, list(ends), batches)
    lows: dict[str, Tensor] = {}
    tops: dict[str, Tensor] = {}

    def observe_ends(name: str, x: Tensor, _: Any) -> None:
        low, top = x.aminmax()
        lows[name] = torch.minimum(lows.get(name, torch.zeros_like(low)), low)
        tops[name] = torch.maximum(tops.get(name, torch.zeros_like(top)), top)

    watch(model, ends, batches, observe_ends, uncalled)
    _warn_of_missed(model, grid, [name for name in ends if name not in lows])
    limits = {name: (lows[name].item(), tops[name].item()) for name in ends if name in lows}
    for name, (low, top) in limits.items():
        if not math.isfinite(top - low):
            raise ValueError(f"the input of {name} reaches {low} to {top}: its range cannot be calibrated")
    counts: dict[str, Tensor] = {}

    def observe_values(name: str, x: Tensor, _: Any) -> None:
        counts[name] = counts.get(name, 0) + count(x, *limits[name])

    watch(model, limits, batches, observe_values, uncalled)
    return {
        name: InputHistogram(Histogram(counts[name], top, low), ends[name], name not in uncalled)
        for name, (low, top) in limits.items()
    }


def check_float(model: nn.Module) -> None:
    """Raises ValueError for a network that has quantizers in place of ReLUs or at inputs already."""
    kinds = (ActivationQuantizer, InputQuantizer)
    names = [name for name, module in model.named_modules() if isinstance(module, kinds)]
    if names:
        raise ValueError(f"{type(model).__name__} has activation quantizers already, such as {names[0]}")


def uncalled_layers(model: nn.Module, names: Collection[str], batches: Sequence[Batch]) -> list[str]:
    """The layers among `names` that `model` does not call on any of `batches`, and the last projections of attentions.
    Their weights may be given to functions. Raises ValueError if `batches` is empty."""
    if not batches:
        raise ValueError("calibration needs at least one batch of images")
    called: set[str] = set()
    watch(model, names, batches, lambda name, *_: called.add(name))
    return [name for name in names if name not in called or is_projection(model, name)]


def _warn_of_missed(model: nn.Module, grid: Grid | int, missed: list[str]) -> None:
    """Warns that the inputs of the layers `missed` stay float, those of the second and later weights of a layer, such
    as one of experts, which are computed inside it, and those of modules that are not known layers."""
    weights: dict[str, list[str]] = defaultdict(list)
    for name in layer_grids(model, grid):
        if model.get_parameter(name).dim() > 1:
            weights[layer_of(name)].append(name)
    for owner, names in weights.items():
        layer = model.get_submodule(owner)
        if not isinstance(layer, (nn.MultiheadAttention, nn.Embedding, nn.EmbeddingBag)):  # the latter read indices
            missed = [*missed, *(names[1:] if kind_of(layer) else names)]
    if missed:
        warnings.warn(f"the inputs of {first_names(missed)} stay float: no hook reaches them", stacklevel=4)


def input_ranges(
    histograms: Mapping[str, InputHistogram], rule: str, bits: int, percentile: float
) -> dict[str, InputRange]:
    """The range of each input by `rule` (see `calibrate`), from `input_histograms`."""
    ranges = {}
    for name, (values, is_end, is_called) in histograms.items():
        low, high = _range(values, rule, _bits(bits, is_end), percentile)
        ranges[name] = InputRange(low, high, is_end, is_called)
    return ranges


def _range(histogram: Histogram, rule: str, bits: int, percentile: float) -> tuple[float, float]:
    if rule == "percentile":
        lower = -upper_edge(histogram.mirrored, percentile) if histogram.low else 0.0
        return lower, upper_edge(histogram, percentile)
    part = mse_part(histogram, bits) if rule == "mse" else 1.0
    return histogram.low * part, histogram.top * part


def _bits(bits: int, is_end: bool) -> int:
    """The bits of an input: 8 at the first and last layers."""
    return FIRST_LAST_BITS if is_end else bits


def quantize_inputs(model: nn.Module, bits: int, ranges: Mapping[str, InputRange], inplace: bool = False) -> nn.Module:
    """A copy of `model` with an `InputQuantizer`, the child `input_quantizer`, at the input of each layer of `ranges`.

    A forward pre-hook of the layer calls it. Raises ValueError for a layer that `model` does not have.
    """
    quantizers = {name: InputQuantizer(_bits(bits, own.is_end), own.low, own.high) for name, own in ranges.items()}
    quantized = model if inplace else copy_network(model)
    for name, quantizer in quantizers.items():
        try:
            layer = quantized.get_submodule(name)
        except AttributeError:
            raise ValueError(f"{type(model).__name__} has no layer {name}, for which a range is given") from None
        layer.input_quantizer = quantizer.to(next(layer.parameters()).device)
        layer.register_forward_pre_hook(quantize_input, with_kwargs=True)
    call_layers(quantized, [name for name, own in ranges.items() if not own.is_called])
    return quantized


def quantize_input(
    layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a call of `layer` with its inputs quantized. A tensor that is given several times stays one."""
    quantizer = layer.get_submodule("input_quantizer")
    quantized: dict[int, Tensor] = {}
    held: dict[Any, Any] = {**dict(enumerate(args)), **kwargs}
    for place in input_places(layer, args, kwargs):
        value = held[place]
        if id(value) not in quantized:
            quantized[id(value)] = quantizer(value)
        held[place] = quantized[id(value)]
    return tuple(held[place] for place in range(len(args))), {name: held[name] for name in kwargs}
