"""Which parameters the method touches, and at how many bits: the one rule that training and evaluation share."""

from collections import defaultdict
from typing import Any

from torch import Tensor, nn

from .grid import check_bits, scale_count

WEIGHT_LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
FIRST_LAST_BITS = 8  # of the first and the last layer when the others have fewer than 4


def layer_bits(model: nn.Module, bits: int, first_last: bool = True) -> dict[str, int]:
    """Bit-width of every quantized parameter, by its state_dict name, in the order of the model's modules.

    These are the weights of convolutions and linear layers, and the biases of linear layers; normalisation layers,
    embeddings that share no layer's weight, convolution biases and other parameters of such a layer stay float. The
    first and the last of those layers get `bits` bits if bits >= 4, else 8; with first_last=False they are left out
    (published rule). A parameter that several layers share appears once, under its first name.

    Raises ValueError for bits outside 2..8 and for a model of which no such layer is left.
    """
    check_bits(bits)
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, WEIGHT_LAYERS)]
    if not layers:
        raise ValueError(f"{type(model).__name__} has no convolution or linear layer to quantize")
    ends = (layers[0][1], layers[-1][1])
    result: dict[str, int] = {}
    seen: set[int] = set()
    for name, module in layers:
        at_end = module in ends
        if at_end and not first_last:
            continue
        for key, parameter in module.named_parameters(name, recurse=False):
            kind = key.rpartition(".")[2].removesuffix("_orig")  # what nn.utils.spectral_norm and prune make of it
            quantized = kind == "weight" or (kind == "bias" and isinstance(module, nn.Linear))
            if id(parameter) in seen or not quantized:
                continue
            seen.add(id(parameter))
            result[key] = FIRST_LAST_BITS if at_end and bits < 4 else bits
    if not result:
        raise ValueError(f"{type(model).__name__} has no weights to quantize in its convolution and linear layers")
    return result


def psg_param_groups(
    model: nn.Module, bits: int, first_last: bool = True, per_channel: bool = False
) -> list[dict[str, Any]]:
    """Parameter groups for a base optimizer: the quantized parameters by bit-width, then all others, unscaled.

    Which parameters are quantized, and the meaning of `first_last`, is `layer_bits`'s rule. One element alone is on its
    grid whatever its value and would never move: it stays unscaled. Parameters that do not require a gradient are left
    out. Raises ValueError for bits outside 2..8 or a model with nothing to scale.
    """
    # By identity, not by name: a parameter shared with, say, an embedding goes by the embedding's name there.
    widths = {id(model.get_parameter(name)): width for name, width in layer_bits(model, bits, first_last).items()}
    by_width: dict[int, list[nn.Parameter]] = defaultdict(list)
    others = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            scaled = id(parameter) in widths and parameter.numel() > scale_count(parameter, per_channel)
            (by_width[widths[id(parameter)]] if scaled else others).append(parameter)
    if not by_width:
        raise ValueError(f"{type(model).__name__} has no weights to scale: all are frozen, or on any grid")
    groups = [{"params": by_width[width], "bits": width, "per_channel": per_channel} for width in sorted(by_width)]
    return groups + ([{"params": others}] if others else [])


def check_finite(name: str, weight: Tensor) -> None:
    """ValueError with the name of a weight that is not finite."""
    if not weight.isfinite().all():
        raise ValueError(f"{name} has values that are not finite: it can be neither quantized nor pruned")
