"""Networks with activation quantizers: in place of their ReLUs, or at the inputs of their layers."""

import warnings
from collections.abc import Mapping, Sequence

from torch import fx, nn
from torch.fx.proxy import TraceError
from torch.nn.modules import activation

from .grid import FLOAT_BITS, check_bits
from .inputs import InputRange, check_float, quantize_inputs
from .layers import copy_network, first_names, is_relu
from .quantizers import ActivationQuantizer, Quantizer
from .tracing import InPlaceError, operation, trace

# Modules that torch lists as activations but that do not count here: a softmax computes the weights of a mean, and
# attention is a network of its own.
NO_ACTIVATIONS = {"LogSoftmax", "MultiheadAttention", "Softmax", "Softmax2d", "Softmin"}
ACTIVATION_LAYERS = tuple(
    kind for name, kind in vars(activation).items() if name in activation.__all__ and name not in NO_ACTIVATIONS
)
ACTIVATION_FUNCTIONS = {
    "celu", "clamp", "clamp_max", "clamp_min", "clip", "elu", "gelu", "glu", "hardshrink", "hardsigmoid", "hardswish",
    "hardtanh", "leaky_relu", "log_sigmoid", "logsigmoid", "maximum", "minimum", "mish", "prelu", "relu", "relu6",
    "rrelu", "selu", "sigmoid", "silu", "softplus", "softshrink", "softsign", "special_expit", "tanh", "tanhshrink",
    "threshold",
}  # fmt: skip
TRANSFORMER_LAYERS = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)


def relu_names(model: nn.Module) -> list[str]:
    """Names of the ReLU modules of `model`. Raises ValueError if it has none."""
    names = [name for name, module in model.named_modules() if is_relu(module) and _is_reached(model, name)]
    if not names:
        raise ValueError(f"{type(model).__name__} has no nn.ReLU module for an activation quantizer to replace")
    return names


def _is_reached(model: nn.Module, name: str) -> bool:
    """Whether `model` finds the module `name` under this name.

    The layers of an nn.TransformerDecoder do not: torch has them call F.relu, whatever their module `activation` is.
    """
    try:
        model.get_submodule(name)
    except AttributeError:
        return False
    return True


def float_activations(model: nn.Module) -> list[str]:
    """The activations of `model` that `quantize_activations` leaves in float, which are all except nn.ReLU modules.

    Each entry is a name and, in parentheses, the kind of activation, such as "features.0.2 (Hardswish)". If torch.fx
    can trace the network, the list includes functions such as F.relu and omits modules that eval mode never calls. If
    not, it names all modules and no functions. Raises InPlaceError, a ValueError, as `trace` does.
    """
    return [f"{name} ({kind})" for name, kind in _activations(model, _graph(model)) if kind != "ReLU"]


def _graph(model: nn.Module) -> fx.Graph | None:
    """The traced graph, or None if `model` cannot be traced. Raises InPlaceError."""
    try:
        return trace(model)
    except InPlaceError:
        raise
    except TraceError:
        return None


def _activations(model: nn.Module, graph: fx.Graph | None) -> list[tuple[str, str]]:
    """Name and kind of every activation that eval mode calls. Without a graph, all modules count as called."""
    found, called = [], _called(graph)
    for name, module in model.named_modules():
        if isinstance(module, ACTIVATION_LAYERS) and _is_called(name, called) and _is_reached(model, name):
            found.append((name, "ReLU" if is_relu(module) else type(module).__name__))
        if isinstance(module, TRANSFORMER_LAYERS) and not isinstance(module.activation, nn.Module):
            found.append((f"{name}.activation", getattr(module.activation, "__name__", "function")))
    for node in graph.nodes if graph else ():
        kind = operation(node).removesuffix("_")
        if node.op in ("call_function", "call_method") and kind in ACTIVATION_FUNCTIONS:
            found.append((node.name, kind))
    return found


def _called(graph: fx.Graph | None) -> set[str] | None:
    """Names of the modules that are called, or None if there is no graph to tell."""
    return None if graph is None else {str(node.target) for node in graph.nodes if node.op == "call_module"}


def _is_called(name: str, called: set[str] | None) -> bool:
    """Whether the module `name`, or one that contains it, is in `called`. None stands for all modules."""
    parts = name.split(".")
    return called is None or any(".".join(parts[:end]) in called for end in range(1, len(parts) + 1))


def quantize_activations(
    model: nn.Module, bits: int, ranges: Mapping[str, float] | Mapping[str, InputRange], inplace: bool = False
) -> nn.Module:
    """A copy of `model` with activation quantizers of `bits` bits, where the `ranges` of `calibrate` are.

    With the largest values x_max of `calibrate`, or of `bn_ranges`, an `ActivationQuantizer` replaces every nn.ReLU
    (published). A ReLU module that the network uses in several places, or under several names, gets one quantizer with
    the largest of its ranges. A ReLU that eval mode never calls, such as that of an auxiliary head, stays. One warning
    names the other activations that stay in float: modules of other kinds and functions such as F.relu. Another warning
    says that functions were not looked for, if torch.fx cannot trace the network.

    With the ranges of `calibrate(..., at="inputs")`, each of their layers gets an `InputQuantizer`, its child
    `input_quantizer`, which a forward pre-hook calls (ours). The inputs of the first and last layers, which include the
    image, have 8 bits. An nn.MultiheadAttention has one quantizer for its query, key and value. Layers whose weights
    are given to functions, as in torchvision's Swin, are called instead, so their inputs are quantized too.

    bits=32 quantizes nothing. inplace=True changes `model` itself and returns it. Raises ValueError for bits outside
    2..8, for a network with activation quantizers, for a model without ReLU modules, for a ReLU without a range, for a
    range of a layer or ReLU that `model` lacks, and (InPlaceError, for ReLUs) for a network that reads a tensor again
    after an in-place operation has overwritten it.
    """
    if bits == FLOAT_BITS:
        return model if inplace else copy_network(model)
    inputs = {name: own for name, own in ranges.items() if isinstance(own, InputRange)}
    largest = {name: own for name, own in ranges.items() if not isinstance(own, InputRange)}
    if inputs and largest:
        raise ValueError("ranges must be those of ReLUs or those of inputs, got both")
    check_bits(bits)
    check_float(model)
    quantized = (
        quantize_inputs(model, bits, inputs, inplace) if inputs else _replace_relus(model, bits, largest, inplace)
    )
    _leave_fast_path(quantized)
    return quantized


def _replace_relus(model: nn.Module, bits: int, ranges: Mapping[str, float], inplace: bool) -> nn.Module:
    graph = _graph(model)
    called = _called(graph)
    quantizers: dict[str, ActivationQuantizer] = {}
    names = relu_names(model)
    if unknown := next((name for name in ranges if name not in names), None):
        raise ValueError(f"{type(model).__name__} has no ReLU {unknown}, for which a range is given")
    for name in names:
        if name in ranges:
            in_place = getattr(model.get_submodule(name), "inplace", False)
            # On the model's device: a GPU divides by a CPU scalar differently, which changes how ties round.
            quantizer = ActivationQuantizer(bits, ranges[name], in_place).to(next(model.parameters()).device)
            quantizers[name] = quantizer
        elif called is not None and _is_called(name, called):
            raise ValueError(f"no activation range is given for {name}")
    _warn_of_floats(_activations(model, graph), quantizers)
    if graph is None:
        warnings.warn(
            f"torch.fx cannot trace {type(model).__name__}: functions such as F.relu, if it calls any, stay float",
            stacklevel=3,
        )
    quantized = model if inplace else copy_network(model)
    by_module = {quantized.get_submodule(name): quantizer for name, quantizer in quantizers.items()}
    for name, module in list(quantized.named_modules(remove_duplicate=False)):
        if module in by_module:
            quantized.set_submodule(name, by_module[module])
    return quantized


def _warn_of_floats(activations: Sequence[tuple[str, str]], quantizers: dict[str, ActivationQuantizer]) -> None:
    left = [f"{name} ({kind})" for name, kind in activations if name not in quantizers]
    if left:
        message = f"{len(left)} of {len(activations)} activations stay float: {first_names(left)}"
        warnings.warn(message, stacklevel=4)


def _leave_fast_path(model: nn.Module) -> None:
    """Makes torch's transformer layers call their modules. Their fused kernels would apply a ReLU, and quantize
    nothing."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer) and _has_quantizer(module):
            module.activation_relu_or_gelu = 0
        if isinstance(module, nn.TransformerEncoder) and any(map(_has_quantizer, module.layers)):
            module.use_nested_tensor = False


def _has_quantizer(layer: nn.Module) -> bool:
    """Whether a transformer layer has a quantizer."""
    return any(isinstance(module, Quantizer) for module in layer.modules())
