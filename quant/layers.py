"""Which parameters are quantized, and at how many bits: the one rule that training and evaluation share."""

import copy
import warnings
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .grid import Grid, as_grid, check_bits, is_all_zeros, scale_count

WEIGHT_LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
WEIGHT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def is_relu(module: nn.Module | None) -> bool:
    """Whether `module` is an nn.ReLU. A subclass that computes something else is not one."""
    return isinstance(module, nn.ReLU) and type(module).forward is nn.ReLU.forward


def layer_grids(model: nn.Module, grid: Grid | int) -> dict[str, Grid]:
    """The grid of every quantized parameter by its state_dict name, in the order of the modules of `model`.

    The weights of convolutions and linear layers and the biases of linear layers are quantized. All other parameters
    stay in float: those of normalization layers, the biases of convolutions, and embeddings unless they share the
    weight of a linear layer. The first and last of the convolutions and linear layers follow `Grid.first_last`. A
    parameter that several layers share appears once, under its first name.

    Raises ValueError for full precision, for a model with nothing to quantize, and for weights that are not real
    floating-point numbers.
    """
    grid = as_grid(grid)
    check_bits(grid.bits)
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, WEIGHT_LAYERS)]
    if not layers:
        raise ValueError(f"{type(model).__name__} has no convolution or linear layer to quantize")
    ends = (layers[0][1], layers[-1][1])
    result: dict[str, Grid] = {}
    seen: set[int] = set()
    for name, module in layers:
        at_end = module in ends
        if at_end and not grid.first_last:
            continue
        for key, parameter in module.named_parameters(name, recurse=False):
            kind = key.rpartition(".")[2].removesuffix("_orig")  # nn.utils.spectral_norm and prune append it
            quantized = kind == "weight" or (kind == "bias" and isinstance(module, nn.Linear))
            if id(parameter) in seen or not quantized:
                continue
            if parameter.dtype not in WEIGHT_DTYPES:
                raise ValueError(f"{key} is {parameter.dtype}: only real floating-point weights have a grid")
            seen.add(id(parameter))
            result[key] = grid.of_ends if at_end else grid
    if not result:
        raise ValueError(f"{type(model).__name__} has no weights to quantize in its convolution and linear layers")
    return result


def warn_of_computed(model: nn.Module) -> None:
    """Warns of convolutions and linear layers whose weight is computed from other parameters, which have no grid."""
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, WEIGHT_LAYERS)]
    computed = [name for name, module in layers if not {"weight", "weight_orig"} & module._parameters.keys()]
    if computed:
        warnings.warn(
            f"the weights of {first_names(computed)} are computed, as by weight_norm or another parametrization, and "
            "are left alone: make them parameters first (remove_parametrizations, remove_weight_norm)",
            stacklevel=3,
        )


def first_names(names: Sequence[str]) -> str:
    """The first three of `names`, and how many more there are: for a message."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def weight_value(model: nn.Module, name: str) -> Tensor:
    """The parameter `name` as the network uses it. Weights that an active mask of torch.nn.utils.prune prunes are
    zero."""
    parameter = model.get_parameter(name)
    mask = _pruning_mask(model, name)
    return parameter if mask is None else parameter * mask


def _pruning_mask(model: nn.Module, name: str) -> Tensor | None:
    owner, _, key = name.rpartition(".")
    return getattr(model.get_submodule(owner), key.replace("_orig", "_mask"), None) if key.endswith("_orig") else None


@torch.no_grad()
def settle_masks(model: nn.Module, names: Iterable[str]) -> None:
    """Sets the weights that active masks of torch.nn.utils.prune prune to zero in the parameters `names` themselves.

    The network computes the same as before. The masked weights no longer affect the scale of a grid.
    """
    for name in names:
        mask = _pruning_mask(model, name)
        if mask is not None:
            model.get_parameter(name).mul_(mask)


def copy_network(model: nn.Module) -> nn.Module:
    """A deep copy of `model`.

    It also works after a training step with spectral_norm, weight_norm or a pruning mask. These leave in the module a
    computed weight that copy.deepcopy rejects. And copies of an nn.TransformerDecoderLayer keep an activation that is a
    module, in place of which torch gives them F.relu.
    """
    computed = [
        value
        for module in model.modules()
        for value in vars(module).values()
        if isinstance(value, Tensor) and not value.is_leaf
    ]
    copied = copy.deepcopy(model, {id(value): value.detach().clone() for value in computed})
    for module, twin in zip(model.modules(), copied.modules(), strict=True):
        if isinstance(module, nn.TransformerDecoderLayer) and "activation" not in vars(module):
            vars(twin).pop("activation", None)
    return copied


def psg_param_groups(model: nn.Module, grid: Grid | int) -> list[dict[str, Any]]:
    """Parameter groups for a base optimizer: one group of quantized parameters for each bit-width, then one unscaled
    group with all other parameters.

    `layer_grids` decides which parameters are quantized. A parameter with one element per scale is on its grid whatever
    its value, so PSG would never move it: it stays unscaled. Parameters that do not require a gradient are left out.
    Pruned weights under an active mask are set to zero in `model` (see `settle_masks`). Warnings name the scaled
    parameters that are all zeros, such as those of a zero-initialized branch, and the layers whose weight is computed
    from other parameters, as by weight_norm: it is not found.

    Raises ValueError for full precision, for a weight_range other than "absmax", and for a model with nothing to scale.
    """
    grid = as_grid(grid)
    if grid.weight_range != "absmax":
        raise ValueError(f'PSGD trains only for weight_range "absmax", got {grid.weight_range!r}')
    grids = layer_grids(model, grid)
    settle_masks(model, grids)
    bits_of = {name: own.bits for name, own in grids.items() if not _always_on_grid(model.get_parameter(name), own)}
    warn_of_computed(model)
    scaled, others = split_parameters(model, bits_of)
    if not scaled:
        raise ValueError(f"{type(model).__name__} has no weights to scale: each is frozen or has one element per scale")
    groups: list[dict[str, Any]] = [
        {"params": [scaled[name] for name in scaled if bits_of[name] == bits], "bits": bits,
         "per_channel": grid.per_channel}
        for bits in sorted({bits_of[name] for name in scaled})
    ]  # fmt: skip
    return groups + ([{"params": others}] if others else [])


def split_parameters(model: nn.Module, names: Collection[str]) -> tuple[dict[str, nn.Parameter], list[nn.Parameter]]:
    """Splits the parameters of `model` that require a gradient: PSG scales those among `names`, but not the others.

    Returns the scaled parameters by name, then the others, both in the order of model.parameters(). A warning names the
    scaled parameters that are all zeros.
    """
    # By identity: named_parameters() lists a parameter shared with, say, an embedding under the embedding's name.
    name_of = {id(model.get_parameter(name)): name for name in names}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    scaled = {name_of[id(parameter)]: parameter for parameter in trained if id(parameter) in name_of}
    zeros = [name for name, parameter in scaled.items() if is_all_zeros(parameter)]
    if zeros:
        warnings.warn(
            f"all zeros, which PSG never moves: {first_names(zeros)}; give PSGD an eps > 0, such as 0.01, "
            "start from trained weights, or leave them out of the scaled groups",
            stacklevel=3,
        )
    return scaled, [parameter for parameter in trained if id(parameter) not in name_of]


def _always_on_grid(parameter: nn.Parameter, grid: Grid) -> bool:
    """Whether each scale of `parameter` covers one element only, which is then on the grid whatever its value."""
    return parameter.numel() <= scale_count(parameter, grid.per_channel)


def check_finite(name: str, weight: Tensor) -> None:
    """Raises ValueError, with the name, for a weight that is not finite or that is on the meta device."""
    if weight.is_meta:
        raise ValueError(f"{name} is on the meta device: it has no values to quantize or prune")
    if not weight.isfinite().all():
        raise ValueError(f"{name} has values that are not finite: it can be neither quantized nor pruned")
