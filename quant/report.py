"""Reports on a network: what becomes of each parameter, and the effect of quantization on each layer."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .grid import FLOAT_BITS, Grid, snap
from .hooks import Batch, watch
from .inputs import input_layers, uncalled_layers
from .kinds import parameter_of
from .layers import choices, layer_grids
from .post_training import capture, layers_in_order


@dataclass(frozen=True)
class ParameterRow:
    """A parameter: its state_dict name, its shape, its bits (32 if it stays in float), and why."""

    name: str
    shape: tuple[int, ...]
    bits: int
    reason: str

    @property
    def cells(self) -> tuple[str, ...]:
        """The row as words."""
        bits = "float" if self.bits == FLOAT_BITS else f"{self.bits} bits"
        return self.name, "x".join(map(str, self.shape)) or "scalar", bits, self.reason


@dataclass(frozen=True)
class Description:
    """The rows of all parameters of a network. As a string it is a table."""

    rows: tuple[ParameterRow, ...]

    def __str__(self) -> str:
        cells = [row.cells for row in self.rows]
        widths = [max(map(len, column)) for column in zip(*cells)]
        lines = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in cells]
        count = sum(math.prod(row.shape) for row in self.rows)
        quantized = sum(math.prod(row.shape) for row in self.rows if row.bits != FLOAT_BITS)
        return "\n".join([*lines, f"{quantized:,} of {count:,} parameters are quantized"])


def describe(model: nn.Module, grid: Grid | int) -> Description:
    """Every parameter of `model`, its shape, its bits or "float", and why: `print(describe(model, 4))` is a table.

    The rows are in the order of the modules. A parameter that several modules share has one row, and so one name. The
    reasons are the kind of layer that a quantized parameter belongs to, and what a float parameter is; "frozen" is
    added to those that do not require a gradient. It takes a network on the meta device too. Raises ValueError as
    `layer_grids` does, except for full precision and for a network with nothing to quantize.
    """
    return Description(tuple(
        ParameterRow(
            choice.name, tuple(choice.parameter.shape), choice.grid.bits if choice.grid else FLOAT_BITS,
            choice.reason + ("" if choice.parameter.requires_grad else ", frozen"),
        )
        for choice in choices(model, grid)
    ))  # fmt: skip


def layer_rows(
    model: nn.Module, batches: Iterable[Batch], grid: Grid | int
) -> Iterator[tuple[dict[str, Any], nn.Module]]:
    """Yields, for each quantized layer in the order in which the layers run, a row and `model` with only that layer
    quantized.

    The model is the same object each time, quantized in place, so use it before the next row. A row has these keys:

        layer: name of the layer
        bits: bit-width of its weight
        weights: number of its weights
        mse: mean of (w - Q(w))^2
        sqnr: signal-to-quantization-noise ratio of the weights, in dB; infinite without noise
        grid_share: share (0 to 1) of the weights whose distance to the grid is at most a tenth of the scale
        input_min, input_max: range of the layer's inputs over `batches` of images

    A weight that several layers share has one row, that of the first of them. A computed weight, as by spectral_norm,
    has none, and neither have nn.MultiheadAttention itself (its out_proj has one), stacks of experts, and what
    `Grid.include` adds. Raises ValueError for full precision and if `batches` is empty.
    """
    batches = list(batches)
    grids = layer_grids(model, grid)
    for name in layers_in_order(model, batches, grids):
        own = {key: grids[full] for key in ("weight", "bias") if (full := parameter_of(name, key)) in grids}
        if "weight" not in own:
            continue
        layer = model.get_submodule(name)
        before = {key: layer.get_parameter(key).detach().clone() for key in own}
        snapped = {key: snap(value, own[key]) for key, value in before.items()}
        inputs = [layer_input.aminmax() for layer_input, _ in capture(model, name, batches)]
        row = {
            "layer": name, "bits": own["weight"].bits,
            **_weight_figures(before["weight"], *snapped["weight"]),
            "input_min": min(low.item() for low, _ in inputs), "input_max": max(high.item() for _, high in inputs),
        }  # fmt: skip
        with torch.no_grad():
            for key, (value, _) in snapped.items():
                layer.get_parameter(key).copy_(value)
        try:
            yield row, model
        finally:
            with torch.no_grad():
                for key, value in before.items():
                    layer.get_parameter(key).copy_(value)


def layer_sqnr(model: nn.Module, quantized: nn.Module, batches: Iterable[Batch]) -> dict[str, float]:
    """Signal-to-quantization-noise ratio, in dB, of the outputs of each layer of `quantized`, and of the whole network.

    `quantized` is a copy of `model` with quantized weights, activations or both. The layers are the convolutions and
    linear layers (see `layer_grids`), by name, in the order in which they run in eval mode; the network itself has the
    name "". The ratio is 10 log10(sum y^2 / sum (y - y')^2) over all elements of the outputs y of `model` and y' of
    `quantized` on all `batches`; infinite if they are equal. Of an output with several tensors the first counts. A
    layer's noise holds that of the layers before it. Layers that are not called are left out.

    Raises ValueError if `batches` is empty, and if a layer runs more or less often in `quantized` than in `model`.
    """
    batches, layers = list(batches), list(input_layers(model, 8))
    uncalled, names = uncalled_layers(model, layers, batches), [*layers, ""]
    signal: dict[str, float] = {}
    noise: dict[str, float] = {}
    for batch in batches:
        before, after = (_outputs(network, names, batch, uncalled) for network in (model, quantized))
        if [(name, len(outputs)) for name, outputs in before.items()] != [(n, len(o)) for n, o in after.items()]:
            raise ValueError("the layers that run in the quantized network are not those that run in the network")
        for name, outputs in before.items():
            for output, other in zip(outputs, after[name]):
                signal[name] = signal.get(name, 0.0) + output.double().square().sum().item()
                noise[name] = noise.get(name, 0.0) + (output.double() - other.double()).square().sum().item()
    return {name: _decibels(signal[name], noise[name]) for name in signal}


def _outputs(model: nn.Module, names: Iterable[str], batch: Batch, uncalled: Iterable[str]) -> dict[str, list[Tensor]]:
    """What each of the modules `names` returns on `batch`, a tensor for each call, in the order of the first calls."""
    outputs: dict[str, list[Tensor]] = {}

    def observe(name: str, _: Tensor, output: Any) -> None:
        first = next(leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor))
        outputs.setdefault(name, []).append(first.clone())

    present = dict(model.named_modules(remove_duplicate=False)).keys()  # a traced network lacks what is not called
    watch(model, filter(present.__contains__, names), [batch], observe, filter(present.__contains__, uncalled))
    return outputs


def _decibels(signal: float, noise: float) -> float:
    """Their ratio in dB. Without noise it is infinite; without signal, but with noise, minus infinity."""
    if not noise:
        return math.inf
    return 10 * math.log10(signal / noise) if signal else -math.inf


def _weight_figures(weight: Tensor, nearest: Tensor, scale: Tensor) -> dict[str, float]:
    """The entries of a row that describe the weight. `nearest` and `scale` are what `snap` returns for it."""
    error = nearest - weight
    noise, signal = error.square().mean().item(), weight.square().mean().item()
    return {
        "weights": weight.numel(), "mse": noise, "sqnr": _decibels(signal, noise),
        "grid_share": (error.abs() <= 0.1 * scale).float().mean().item(),
    }  # fmt: skip
