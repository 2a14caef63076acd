"""The kinds of layers that are quantized: which of their parameters, and which dims of a weight have scales."""

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor, nn
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.parametrize import ParametrizationList

EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_experts", "n_routed_experts")  # attributes of modules


class Kind(NamedTuple):
    """A kind of layer: its name in words, its weights and the biases that are quantized, and the dims of a weight whose
    every index has a scale of its own, with a grid for each tensor and with one for each output channel."""

    name: str
    weights: tuple[str, ...] = ("weight",)
    biases: tuple[str, ...] = ("bias",)
    tensor_dims: tuple[int, ...] = ()
    channel_dims: tuple[int, ...] = (0,)

    def scale_dims(self, per_channel: bool) -> tuple[int, ...] | None:
        """`Grid.scale_dims` of a weight: None where the default says the same."""
        dims = self.channel_dims if per_channel else self.tensor_dims
        return None if dims == ((0,) if per_channel else ()) else dims


LINEAR = Kind("linear layer")
CONVOLUTION = Kind("convolution", biases=())
# A weight is [in, out / groups, ...]: with groups, those output channels share a scale that have the same place in
# their groups.
TRANSPOSED = Kind("transposed convolution", biases=(), channel_dims=(1,))
CONV1D = Kind("Conv1D", channel_dims=(1,))  # of transformers: a linear layer with a weight [in, out]
ATTENTION = Kind(
    "attention", ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"), ("in_proj_bias",)
)  # its out_proj is a linear layer
EXPERTS = Kind("experts", (), (), (0,), (0, 1))  # a stack [experts, out, in]; `kind_of` finds its weights
CLASSES: tuple[tuple[tuple[type[nn.Module], ...], Kind], ...] = (
    ((nn.Linear,), LINEAR),
    ((nn.Conv1d, nn.Conv2d, nn.Conv3d), CONVOLUTION),
    ((nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d), TRANSPOSED),
    ((nn.MultiheadAttention,), ATTENTION),
)
PLAIN = (LINEAR, CONVOLUTION, TRANSPOSED, CONV1D)  # they take one tensor and return one


def kind_of(module: nn.Module) -> Kind | None:
    """The kind of a layer; None for a module that is none.

    A Conv1D is known by the name of its class and its 2-D weight. A stack of experts is a 3-D parameter of a module
    that has one of the attributes EXPERT_COUNTS, equal to the size of dim 0; it is [experts, in, out] if the module's
    `is_transposed` is true, as in transformers. Other 3-D parameters may be anything, such as embeddings of positions.
    """
    for classes, kind in CLASSES:
        if isinstance(module, classes):
            return kind
    if any(base.__name__ == CONV1D.name for base in type(module).__mro__):
        weight = getattr(module, "weight", None)
        return CONV1D if isinstance(weight, Tensor) and weight.dim() == 2 else None
    counts = [vars(module)[name] for name in EXPERT_COUNTS if name in vars(module)]
    if not counts:
        return None
    own = module._parameters.items()
    stacks = tuple(key for key, value in own if value is not None and value.dim() == 3 and len(value) in counts)
    dims = (0, 2) if getattr(module, "is_transposed", False) else EXPERTS.channel_dims
    return EXPERTS._replace(weights=stacks, channel_dims=dims) if stacks else None


class Role(NamedTuple):
    """What a parameter is: the path and the kind of its layer, the attribute of the layer that it holds, and whether
    other parameters or a function stand between the two, or between a bias and the weight beside it."""

    layer: str
    kind: Kind | None
    attribute: str
    computed: bool

    @property
    def is_weight(self) -> bool:
        return self.kind is not None and self.attribute in self.kind.weights

    @property
    def by_rule(self) -> bool:
        """Whether it is quantized."""
        own = self.kind is not None and self.attribute in (*self.kind.weights, *self.kind.biases)
        return own and not self.computed


def role_of(name: str, modules: Mapping[str, nn.Module]) -> Role:
    """The role of the parameter `name` in a network of `modules`, by path."""
    path, _, key = name.rpartition(".")
    module = modules[path]
    if isinstance(module, ParametrizationList):
        layer, attribute = layer_of(name), path.rpartition(".")[2]
        return Role(layer, kind_of(modules[layer]), attribute, is_computed(modules[layer], attribute))
    kind, attribute = kind_of(module), key.removesuffix("_orig")
    stem = key.removesuffix("_g").removesuffix("_v")  # of nn.utils.weight_norm
    if kind and stem in kind.weights and is_computed(module, stem):
        return Role(path, kind, stem, True)
    beside = kind is not None and attribute in kind.biases and any(is_computed(module, key) for key in kind.weights)
    return Role(path, kind, attribute, beside)


def is_computed(layer: nn.Module, attribute: str) -> bool:
    """Whether an attribute of `layer` is no parameter but computed from others.

    Not so with spectral_norm, which divides a parameter by a number, and with a pruning mask, which sets some of its
    elements to zero: a grid of the parameter is one of the attribute.
    """
    if {attribute, f"{attribute}_orig"} & layer._parameters.keys():
        return False
    steps = getattr(layer, "parametrizations", {})
    return attribute not in steps or not all(isinstance(step, _SpectralNorm) for step in steps[attribute])


def parameter_of(layer: str, attribute: str) -> str:
    """The name of a parameter of the layer at the path `layer`, which is "" for a network that is a layer itself."""
    return f"{layer}.{attribute}" if layer else attribute


def layer_of(name: str) -> str:
    """Path of the layer that the parameter `name` belongs to, which a parametrization has two levels below it."""
    path = name.rpartition(".")[0]
    above, found, _ = f".{path}".rpartition(".parametrizations.")
    return above[1:] if found else path
