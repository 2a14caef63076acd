"""Which parameters the method touches, and at how many bits: the one rule that training and evaluation share."""

import copy
import warnings
from collections import defaultdict
from collections.abc import Iterable
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from .grid import check_bits, is_all_zeros, scale_count

WEIGHT_LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
FIRST_LAST_BITS = 8  # of the first and the last layer when the others have fewer than 4
WEIGHT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def layer_bits(model: nn.Module, bits: int, first_last: bool = True) -> dict[str, int]:
    """Bit-width of every quantized parameter, by its state_dict name, in the order of the model's modules.

    These are the weights of convolutions and linear layers, and the biases of linear layers; normalisation layers,
    embeddings that share no layer's weight, convolution biases and other parameters of such a layer stay float. The
    first and the last of those layers get `bits` bits if bits >= 4, else 8; with first_last=False they are left out
    (published rule). A parameter that several layers share appears once, under its first name.

    Raises ValueError for bits outside 2..8, for a model of which no such layer is left, and for weights that are not
    real floating-point numbers.
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
            if parameter.dtype not in WEIGHT_DTYPES:
                raise ValueError(f"{key} is {parameter.dtype}: only real floating-point weights have a grid")
            seen.add(id(parameter))
            result[key] = FIRST_LAST_BITS if at_end and bits < 4 else bits
    if not result:
        raise ValueError(f"{type(model).__name__} has no weights to quantize in its convolution and linear layers")
    return result


def weight_value(model: nn.Module, name: str) -> Tensor:
    """The parameter `name` as the network computes with it: weights under an active pruning mask
    (torch.nn.utils.prune) are zero."""
    parameter = model.get_parameter(name)
    mask = _pruning_mask(model, name)
    return parameter if mask is None else parameter * mask


def _pruning_mask(model: nn.Module, name: str) -> Tensor | None:
    owner, _, key = name.rpartition(".")
    return getattr(model.get_submodule(owner), key.replace("_orig", "_mask"), None) if key.endswith("_orig") else None


@torch.no_grad()
def settle_masks(model: nn.Module, names: Iterable[str]) -> None:
    """Sets the weights under active pruning masks to zero in the parameters `names` themselves. The network computes
    what it did before, and a grid's range no longer counts what it does not use."""
    for name in names:
        mask = _pruning_mask(model, name)
        if mask is not None:
            model.get_parameter(name).mul_(mask)


def named_among(model: nn.Module, parameters: Iterable[nn.Parameter]) -> list[tuple[str, nn.Parameter]]:
    """Name and parameter of those parameters of `model` that are among `parameters`."""
    wanted = {id(parameter) for parameter in parameters}
    return [(name, parameter) for name, parameter in model.named_parameters() if id(parameter) in wanted]


def warn_of_zeros(named: Iterable[tuple[str, nn.Parameter]]) -> None:
    """One warning that names the trained parameters that are all zeros: they are on their target, and stay there."""
    zeros = [name for name, parameter in named if is_all_zeros(parameter)]
    if zeros:
        more = f" and {len(zeros) - 3} more" if len(zeros) > 3 else ""
        warnings.warn(
            f"all zeros, which PSG never moves: {', '.join(zeros[:3])}{more}; give PSGD an eps > 0, such as 0.01, "
            "start from trained weights, or leave them out of the scaled groups",
            stacklevel=3,
        )


def copy_network(model: nn.Module) -> nn.Module:
    """A deep copy of `model`, also after a training step with spectral_norm, weight_norm or a pruning mask, which leave
    a computed weight in the module that copy.deepcopy refuses."""
    computed = [
        value
        for module in model.modules()
        for value in vars(module).values()
        if isinstance(value, Tensor) and not value.is_leaf
    ]
    return copy.deepcopy(model, {id(value): value.detach().clone() for value in computed})


def psg_param_groups(
    model: nn.Module, bits: int, first_last: bool = True, per_channel: bool = False
) -> list[dict[str, Any]]:
    """Parameter groups for a base optimizer: the quantized parameters by bit-width, then all others, unscaled.

    Which parameters are quantized, and the meaning of `first_last`, is `layer_bits`'s rule. One element alone is on its
    grid whatever its value and would never move: it stays unscaled. Parameters that do not require a gradient are left
    out. Weights under an active pruning mask become zero (`settle_masks`). A scaled parameter that is all zeros, as a
    zero-initialized branch is, is named in a warning. Raises ValueError for bits outside 2..8 or a model with nothing
    to scale.
    """
    # By identity, not by name: a parameter shared with, say, an embedding goes by the embedding's name there.
    named_widths = layer_bits(model, bits, first_last)
    settle_masks(model, named_widths)
    widths = {id(model.get_parameter(name)): width for name, width in named_widths.items()}
    by_width: dict[int, list[nn.Parameter]] = defaultdict(list)
    others = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            scaled = id(parameter) in widths and parameter.numel() > scale_count(parameter, per_channel)
            (by_width[widths[id(parameter)]] if scaled else others).append(parameter)
    if not by_width:
        raise ValueError(f"{type(model).__name__} has no weights to scale: all are frozen, or on any grid")
    warn_of_zeros(named_among(model, chain.from_iterable(by_width.values())))
    groups = [{"params": by_width[width], "bits": width, "per_channel": per_channel} for width in sorted(by_width)]
    return groups + ([{"params": others}] if others else [])


def check_finite(name: str, weight: Tensor) -> None:
    """ValueError with the name of a weight that is not finite, or has no values, being on the meta device."""
    if weight.is_meta:
        raise ValueError(f"{name} is on the meta device: it has no values to quantize or prune")
    if not weight.isfinite().all():
        raise ValueError(f"{name} has values that are not finite: it can be neither quantized nor pruned")
