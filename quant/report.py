"""What quantization does to each layer of a network."""

import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from .grid import Grid, snap
from .hooks import Batch
from .layers import layer_grids
from .post_training import capture, layers_in_order


def layer_rows(
    model: nn.Module, batches: Iterable[Batch], grid: Grid | int
) -> Iterator[tuple[dict[str, Any], nn.Module]]:
    """For each quantized layer, in the order in which they run, a row of figures and `model` with that layer quantized.

    The model is the same object each time, quantized in place: use it before the next row. A row has layer, bits, the
    number of weights, mse of the weights, sqnr (signal to quantization noise, in dB), grid_share (share of the weights
    within a tenth of a step of the grid), and input_min and input_max of the layer's inputs over `batches` of images.
    A weight that layers share has its row with the first of them. A weight that is computed, as by spectral_norm, has
    none.
    """
    batches = list(batches)
    grids = layer_grids(model, grid)
    for name in layers_in_order(model, batches[0], grids):
        if f"{name}.weight" not in grids:
            continue
        layer = model.get_submodule(name)
        keys = [key for key in ("weight", "bias") if f"{name}.{key}" in grids]
        before = {key: layer.get_parameter(key).detach().clone() for key in keys}
        snapped = {key: snap(value, grids[f"{name}.{key}"]) for key, value in before.items()}
        weight, (nearest, scale) = before["weight"], snapped["weight"]
        error = nearest - weight
        noise, signal = error.square().mean().item(), weight.square().mean().item()
        inputs = [layer_input.aminmax() for layer_input, _ in capture(model, name, batches)]
        row = {
            "layer": name, "bits": grids[f"{name}.weight"].bits, "weights": weight.numel(), "mse": noise,
            "sqnr": 10 * math.log10(signal / noise) if noise else math.inf,
            "grid_share": (error.abs() <= 0.1 * scale).float().mean().item(),
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
