"""A report on the effect of quantization on each layer of a network."""

import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .grid import Grid, snap
from .hooks import Batch
from .layers import layer_grids
from .post_training import capture, layers_in_order


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
    has none. Raises ValueError for full precision and if `batches` is empty.
    """
    batches = list(batches)
    grids = layer_grids(model, grid)
    for name in layers_in_order(model, batches, grids):
        if f"{name}.weight" not in grids:
            continue
        layer = model.get_submodule(name)
        keys = [key for key in ("weight", "bias") if f"{name}.{key}" in grids]
        before = {key: layer.get_parameter(key).detach().clone() for key in keys}
        snapped = {key: snap(value, grids[f"{name}.{key}"]) for key, value in before.items()}
        inputs = [layer_input.aminmax() for layer_input, _ in capture(model, name, batches)]
        row = {
            "layer": name, "bits": grids[f"{name}.weight"].bits,
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


def _weight_figures(weight: Tensor, nearest: Tensor, scale: Tensor) -> dict[str, float]:
    """The entries of a row that describe the weight. `nearest` and `scale` are what `snap` returns for it."""
    error = nearest - weight
    noise, signal = error.square().mean().item(), weight.square().mean().item()
    return {
        "weights": weight.numel(), "mse": noise, "sqnr": 10 * math.log10(signal / noise) if noise else math.inf,
        "grid_share": (error.abs() <= 0.1 * scale).float().mean().item(),
    }  # fmt: skip
