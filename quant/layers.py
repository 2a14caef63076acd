"""Which parameters are quantized, and at how many bits: the one rule that training and evaluation share."""

import copy
import math
import warnings
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.nn.parameter import is_lazy

from .grid import Grid, as_grid, check_bits
from .kinds import EXPERTS, LINEAR, Role, is_computed, kind_of, role_of
from .selectors import selectors, selects
from .sharded import largest_magnitude, number

FLOAT_SHARE = 0.01  # of the parameters: a larger matrix does not stay in float without a word
ENDS = "psg_ends"  # in the meta of a traced network: what `end_layers` found in the network itself
WEIGHT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def is_relu(module: nn.Module | None) -> bool:
    """Whether `module` is an nn.ReLU. A subclass that computes something else is not one."""
    return isinstance(module, nn.ReLU) and type(module).forward is nn.ReLU.forward


class Choice(NamedTuple):
    """What becomes of a parameter: its `grid`, or None if it stays in float, and why. `own_word` says that it stays in
    float because the user said so."""

    name: str
    parameter: nn.Parameter
    role: Role
    grid: Grid | None
    reason: str
    own_word: bool = False


def choices(model: nn.Module, grid: Grid | int) -> list[Choice]:
    """The choice for every parameter of `model`, each parameter once: for one that several modules share, that of the
    first layer that quantizes it. In the order of the modules.

    Raises ValueError as `layer_grids` does, except for a model with nothing to quantize.
    """
    rule = _Rule(model, as_grid(grid))
    found: dict[int, Choice] = {}
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(path, recurse=False):
            choice, before = rule.choose(name, parameter), found.get(id(parameter))
            if before is None or _precedence(choice) > _precedence(before):
                found.pop(id(parameter), None)
                found[id(parameter)] = choice
    return list(found.values())


def _precedence(choice: Choice) -> tuple[bool, bool]:
    """How a choice counts among those for the names of one parameter."""
    return choice.grid is not None, choice.role.by_rule


def end_layers(model: nn.Module) -> dict[str, str]:
    """The paths of the "first" and the "last" layer; empty for a network without layers."""
    if isinstance(model, fx.GraphModule) and ENDS in model.meta:  # it has its modules in the order of their use
        known: dict[str, str] = model.meta[ENDS]
        return known
    layers = [path for path, module in model.named_modules() if kind_of(module)]
    return {"first": layers[0], "last": layers[-1]} if layers else {}


class _Rule:
    """The rule for the parameters of one network."""

    def __init__(self, model: nn.Module, grid: Grid) -> None:
        if grid.scale_dims is not None:
            raise ValueError(f"scale_dims={grid.scale_dims} are those of a single weight: the layers of a network "
                             "have their own")  # fmt: skip
        self.grid, self.model = grid, model
        self.modules = dict(model.named_modules(remove_duplicate=False))
        self.names: dict[int, list[str]] = defaultdict(list)
        for name, parameter in model.named_parameters(remove_duplicate=False):
            if is_lazy(parameter):
                raise ValueError(f"{name} has no shape yet: run a batch through the network first")
            self.names[id(parameter)].append(name)
        self.ends = {path: f"{end} layer" for end, path in reversed(end_layers(model).items())}
        self.included = self.selected("include", 2)
        self.excluded = self.selected("exclude", 0)

    def selected(self, key: str, least_dims: int) -> set[int]:
        """The ids of the parameters that `include` or `exclude` stands for, under any of their names."""
        found: set[int] = set()
        for selector in selectors(key, getattr(self.grid, key)):
            own = {
                number for number, names in self.names.items()
                if any(selects(selector, name, self.modules) for name in names)
                and self.model.get_parameter(names[0]).dim() >= least_dims
            }  # fmt: skip
            if not own:
                shown = repr(selector) if isinstance(selector, str) else selector.__name__
                which = f"parameter with {least_dims} dims or more" if least_dims else "parameter"
                raise ValueError(f"{key}={shown} matches no {which} of {type(self.model).__name__}")
            found |= own
        return found

    def choose(self, name: str, parameter: nn.Parameter) -> Choice:
        role = role_of(name, self.modules)
        end = self.ends.get(role.layer)
        if id(parameter) in self.excluded:
            return Choice(name, parameter, role, None, "excluded", True)
        if role.by_rule and role.kind:
            if end and not self.grid.first_last:
                return Choice(name, parameter, role, None, f"{end}, left out", True)
            reason = f"{role.kind.name}, {end}" if end else role.kind.name
            return Choice(name, parameter, role, self.own_grid(parameter, role, bool(end)), reason)
        # The parts of weight_norm lie on no grid that the weight would lie on.
        whole = not role.computed or name.endswith(".original")
        if id(parameter) in self.included and whole:
            return Choice(name, parameter, role, self.own_grid(parameter, role, False), "included")
        return Choice(name, parameter, role, None, float_reason(role, self.modules[role.layer], parameter))

    def own_grid(self, parameter: nn.Parameter, role: Role, at_end: bool) -> Grid:
        """The grid of one parameter."""
        if parameter.dtype not in WEIGHT_DTYPES:
            name = self.names[id(parameter)][0]
            raise ValueError(f"{name} is {parameter.dtype}: only real floating-point weights have a grid")
        grid = self.grid.of_ends if at_end else self.grid
        included = EXPERTS if parameter.dim() == 3 else LINEAR  # what the user includes is like one of these
        kind = role.kind if role.kind and role.is_weight else included
        dims = kind.scale_dims(grid.per_channel) if parameter.dim() > 1 else None
        return replace(grid, include=(), exclude=(), scale_dims=dims)


def float_reason(role: Role, module: nn.Module, parameter: nn.Parameter) -> str:
    """Why the rule leaves a parameter of `module` in float."""
    if role.computed:
        return "the weight is computed from it" if role.is_weight else f"{role.attribute} beside a computed weight"
    if role.kind:
        return f"{role.attribute} of a {role.kind.name}"
    if isinstance(module, nn.modules.batchnorm._NormBase) or "Norm" in type(module).__name__:
        return "normalization"
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        return "embedding"
    return f"of {type(module).__name__}, not a known kind of layer"


def layer_grids(model: nn.Module, grid: Grid | int) -> dict[str, Grid]:
    """The grid of every quantized parameter by its state_dict name, in the order of the modules of `model`.

    The rule takes the weights of convolutions, transposed convolutions and linear layers, of transformers' Conv1D and
    of nn.MultiheadAttention, stacks of experts (see `quant.kinds.kind_of`), and the biases of linear layers, Conv1D and
    MultiheadAttention. All other parameters stay in float: those of normalization layers, the biases of convolutions,
    and embeddings unless they share the weight of a linear layer. `Grid.include` adds to these and `Grid.exclude` takes
    away. The first and last of the layers of the rule, excluded or not, follow `Grid.first_last`; what is included does
    not. A parameter that several layers share appears once, under its name in the first layer that is scaled.

    With a grid for each output channel the channels are dim 0, but dim 1 of a transposed convolution (channels at the
    same place in their groups share a scale) and of a Conv1D. A stack of experts [E, out, in] has a scale for each
    expert, or for each of their output channels; so has an included parameter with three dims.

    Raises ValueError for full precision, for a model with nothing to quantize, for weights that are not real
    floating-point numbers or have no shape yet, and for an `include` or `exclude` that matches nothing.
    """
    grid = as_grid(grid)
    check_bits(grid.bits)
    chosen = choices(model, grid)
    result = {choice.name: choice.grid for choice in chosen if choice.grid is not None}
    if not result and not any(choice.role.kind for choice in chosen):
        raise ValueError(f"{type(model).__name__} has no convolution or linear layer to quantize")
    if not result:
        raise ValueError(f"{type(model).__name__} has no weights to quantize in its convolution and linear layers")
    return result


def warn_of_float(model: nn.Module, grid: Grid | int) -> None:
    """Warns of the matrices that stay in float, without the user's word, and are above 1 % of the parameters. And, as
    `warn_of_computed` does, of computed weights."""
    warn_of_computed(model, stacklevel=4)
    chosen = choices(model, grid)
    least = FLOAT_SHARE * sum(choice.parameter.numel() for choice in chosen)
    large = [
        choice.name for choice in chosen
        if choice.grid is None and not choice.own_word and not (choice.role.kind and choice.role.computed)
        and choice.parameter.dim() > 1 and choice.parameter.numel() > least
    ]  # fmt: skip
    if large:
        warnings.warn(
            f"matrices that stay in float, each above 1 % of the parameters: {first_names(large)}; "
            "Grid(include=...) quantizes them, Grid(exclude=...) leaves them so without this warning",
            stacklevel=3,
        )


def warn_of_computed(model: nn.Module, stacklevel: int = 3) -> None:
    """Warns of layers whose weight is computed from other parameters, which have no grid."""
    layers = [(path, module, kind) for path, module in model.named_modules() if (kind := kind_of(module))]
    computed = [path for path, module, kind in layers if any(is_computed(module, key) for key in kind.weights)]
    if computed:
        warnings.warn(
            f"the weights of {first_names(computed)} are computed, as by weight_norm or another parametrization, and "
            "are left alone: make them parameters first (remove_parametrizations, remove_weight_norm)",
            stacklevel=stacklevel,
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


def check_finite(name: str, weight: Tensor) -> None:
    """Raises ValueError, with the name, for a weight that is not finite or that is on the meta device."""
    check_values(name, weight)
    if weight.numel() and not math.isfinite(number(largest_magnitude(weight.detach()))):
        raise ValueError(f"{name} has values that are not finite: it can be neither quantized nor pruned")


def check_values(name: str, weight: Tensor) -> None:
    """Raises ValueError, with the name, for a weight that is on the meta device."""
    if weight.is_meta:
        raise ValueError(f"{name} is on the meta device: it has no values to scale, quantize or prune")
