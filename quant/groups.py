"""Parameter groups for PSGD's base optimizer: of a whole network, or existing groups, split."""

import warnings
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from .grid import HALVES, Grid, as_grid, scale_count
from .layers import check_values, first_names, layer_grids, settle_masks, warn_of_float
from .settings import PSG_KEYS, STAGE_KEYS, is_scaled
from .sharded import is_all_zeros

Item = Tensor | tuple[str, Tensor]  # a parameter in a group, perhaps with its name
Group = dict[str, Any]


def psg_param_groups(
    groups: nn.Module | Iterable[Any], grid: Grid | int, model: nn.Module | None = None, no_decay: bool = False
) -> list[Group]:
    """Parameter groups for a base optimizer: one group of quantized parameters for each bit-width, then one unscaled
    group with all other parameters.

    `layer_grids` decides which parameters are quantized. Those with other channels than dim 0, such as the weights of
    transposed convolutions with a grid for each channel, and stacks of experts have groups of their own. A parameter
    with one element per scale is on its grid whatever its value, so PSG would never move it: it stays unscaled.
    Parameters keep their order within a group.

    Args:
        groups: the network, of which the parameters that do not require a gradient are left out. Or existing groups of
            parameters of `model`, in any form that torch's optimizers take: parameters, pairs (name, parameter), or
            dicts. Each is split in the same way. The parts keep the settings of their group, such as lr and
            weight_decay, but only the scaled ones keep PSG settings, such as lambda_s. Nothing is left out: a frozen
            parameter is scaled as soon as it gets gradients.
        grid: the grid, or its bit-width.
        model: the network, with existing groups only.
        no_decay: whether parameters with fewer than two dims, which are those of normalization layers and biases, go to
            groups of their own with a weight_decay of 0. The quantized biases stay scaled. Default False.

    Pruned weights under an active mask are set to zero in the network (see `settle_masks`). Warnings name the scaled
    parameters that are all zeros, such as those of a zero-initialized branch, those in float16 or bfloat16, the layers
    whose weight is computed from other parameters, as by weight_norm: it is not found, and the other matrices that stay
    in float, without the user's word, and are above 1 % of the parameters.

    Raises ValueError for full precision, for a weight_range other than "absmax", for groups without `model` or that are
    scaled already, for weights on the meta device, for a network with nothing to scale, and as `layer_grids` does.
    Raises TypeError for parameters in a set, which has no order.
    """
    grid = as_grid(grid)
    if grid.weight_range != "absmax":
        raise ValueError(f'PSGD trains only for weight_range "absmax", got {grid.weight_range!r}')
    network, given = _network_and_groups(groups, model)
    grids = layer_grids(network, grid)
    for name in grids:
        check_values(name, network.get_parameter(name))
    settle_masks(network, grids)
    grids = {name: own for name, own in grids.items() if not _always_on_grid(network.get_parameter(name), own)}
    warn_of_float(network, grid)
    scaled = _listed(network, grids, given)
    warn_of_values(scaled)
    grid_of = {id(parameter): grids[name] for name, parameter in scaled.items()}
    return [part for group in given for part in _split(group, grid_of, no_decay)]


def _network_and_groups(groups: Any, model: nn.Module | None) -> tuple[nn.Module, list[Group]]:
    """The network, and the groups as new dicts whose "params" are lists."""
    if isinstance(groups, nn.Module):
        if model is not None:
            raise ValueError("model goes with existing groups: give either psg_param_groups(model, grid) or groups")
        return groups, [{"params": [p for p in groups.parameters() if p.requires_grad]}]
    if model is None:
        raise ValueError("existing groups need their network: psg_param_groups(groups, grid, model=model)")
    items = _as_list(groups)
    given = items if items and isinstance(items[0], dict) else [{"params": items}]
    for group in given:
        if is_scaled(group):
            kind = f"bits={group['bits']}" if "bits" in group else 'target="zero"'
            raise ValueError(f"a group has {kind}, so it is scaled already: give the groups as they were before")
    return model, [group | {"params": _as_list(group["params"])} for group in given]


def _listed(network: nn.Module, names: Iterable[str], given: list[Group]) -> dict[str, nn.Parameter]:
    """The parameters `names` of `network` that are in the groups `given`. Raises ValueError if there are none."""
    listed = {id(_parameter(item)) for group in given for item in group["params"]}
    found = {name: p for name in names if id(p := network.get_parameter(name)) in listed}
    if not found:
        raise ValueError(
            f"{type(network).__name__} has no weights to scale: each is frozen, in none of the groups, or has one "
            "element per scale"
        )
    return found


def _as_list(items: Any) -> list[Any]:
    if isinstance(items, set):
        raise TypeError("a set of parameters has no order: give a list")
    return [items] if isinstance(items, Tensor) else list(items)


def _parameter(item: Item) -> Tensor:
    return item if isinstance(item, Tensor) else item[1]


def _split(group: Group, grid_of: dict[int, Grid], no_decay: bool) -> list[Group]:
    """The parts of `group`: those with grids, by bits and dims, then the one without; of each the matrices first."""
    parts: dict[tuple[Any, ...], tuple[Grid | None, list[int]]] = {}
    first = {id(_parameter(item)): index for index, item in reversed([*enumerate(group["params"])])}
    for index in sorted(first.values()):  # a parameter that layers share may be listed for each of them
        parameter = _parameter(group["params"][index])
        own, aside = grid_of.get(id(parameter)), no_decay and parameter.dim() < 2
        key = (own is None, own.bits if own else 0, own.scale_dims or () if own else (), aside)
        parts.setdefault(key, (own, []))[1].append(index)
    return [
        _part(group, own, chosen, key[-1]) for key, (own, chosen) in sorted(parts.items(), key=lambda part: part[0])
    ]


def _part(group: Group, own: Grid | None, chosen: list[int], aside: bool) -> Group:
    """The parameters at the positions `chosen` of `group`, which have the grid `own`."""
    part = dict(group)
    for key in ("params", "param_names"):  # an optimizer keeps names beside the parameters
        if key in part:
            part[key] = [part[key][index] for index in chosen]
    if own:
        part |= {"bits": own.bits, "per_channel": own.per_channel}
        if own.scale_dims is not None:
            part["scale_dims"] = own.scale_dims
    else:
        for key in (PSG_KEYS | STAGE_KEYS) & part.keys():
            del part[key]
    return part | ({"weight_decay": 0.0} if aside else {})


def warn_of_values(scaled: dict[str, nn.Parameter]) -> None:
    """Warns of scaled parameters that PSG does not move as one may expect."""
    zeros = [name for name, parameter in scaled.items() if parameter.requires_grad and is_all_zeros(parameter)]
    if zeros:
        warnings.warn(
            f"all zeros, which PSG never moves: {first_names(zeros)}; give PSGD an eps > 0, such as 0.01, "
            "start from trained weights, or leave them out of the scaled groups",
            stacklevel=3,
        )
    halves = [name for name, parameter in scaled.items() if parameter.dtype in HALVES]
    if halves:
        warnings.warn(
            f"in 16 bits, which are too few for the small steps of PSG: {first_names(halves)}; keep float32 parameters "
            "and compute in 16 bits (torch.autocast)",
            stacklevel=3,
        )


def _always_on_grid(parameter: nn.Parameter, grid: Grid) -> bool:
    """Whether each scale of `parameter` covers one element only, which is then on the grid whatever its value."""
    return parameter.numel() <= scale_count(parameter, grid)
