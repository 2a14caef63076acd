"""Activation quantizers in place of a network's ReLUs."""

import warnings
from collections.abc import Sequence

from torch import fx, nn
from torch.fx.proxy import TraceError
from torch.nn.modules import activation

from .grid import FLOAT_BITS
from .layers import copy_network
from .quantizers import ActivationQuantizer
from .tracing import InPlaceError, operation, trace

# Softmax gives the weights of a mean, and attention is a network.
NO_ACTIVATIONS = {"LogSoftmax", "MultiheadAttention", "Softmax", "Softmax2d", "Softmin"}
ACTIVATION_LAYERS = tuple(
    kind for name, kind in vars(activation).items() if name in activation.__all__ and name not in NO_ACTIVATIONS
)
ACTIVATION_FUNCTIONS = {
    "celu", "clamp", "clamp_min", "elu", "gelu", "glu", "hardshrink", "hardsigmoid", "hardswish", "hardtanh",
    "leaky_relu", "logsigmoid", "mish", "prelu", "relu", "relu6", "rrelu", "selu", "sigmoid", "silu", "softplus",
    "softshrink", "softsign", "tanh", "tanhshrink", "threshold",
}  # fmt: skip
TRANSFORMER_LAYERS = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)


def relu_names(model: nn.Module) -> list[str]:
    """Names of the ReLU modules of `model`. Raises ValueError if it has none."""
    names = [name for name, module in model.named_modules() if isinstance(module, nn.ReLU)]
    if not names:
        raise ValueError(f"{type(model).__name__} has no nn.ReLU module to put an activation quantizer at")
    return names


def float_activations(model: nn.Module) -> list[str]:
    """The activations of `model` that `quantize_activations` leaves in float: all but the nn.ReLU modules.

    Each is a name with the kind of activation in brackets, such as "features.0.2 (Hardswish)". Functions, such as
    F.relu, and which modules eval mode calls at all, are seen where torch.fx can trace the network.
    """
    return [f"{name} ({kind})" for name, kind in _activations(model, _graph(model)) if kind != "ReLU"]


def _graph(model: nn.Module) -> fx.Graph | None:
    """The traced graph, or None where there is none. Raises InPlaceError."""
    try:
        return trace(model)
    except InPlaceError:
        raise
    except TraceError:
        return None


def _activations(model: nn.Module, graph: fx.Graph | None) -> list[tuple[str, str]]:
    """Name and kind of every activation that eval mode calls, or, without a graph, may call."""
    found = []
    for name, module in model.named_modules():
        if isinstance(module, ACTIVATION_LAYERS) and _is_called(name, graph):
            found.append((name, "ReLU" if isinstance(module, nn.ReLU) else type(module).__name__))
        if isinstance(module, TRANSFORMER_LAYERS) and not isinstance(module.activation, nn.Module):
            found.append((f"{name}.activation", getattr(module.activation, "__name__", "function")))
    for node in graph.nodes if graph else ():
        kind = operation(node).removesuffix("_")
        if node.op in ("call_function", "call_method") and kind in ACTIVATION_FUNCTIONS:
            found.append((node.name, kind))
    return found


def _is_called(name: str, graph: fx.Graph | None) -> bool:
    if graph is None:
        return True
    called = [str(node.target) for node in graph.nodes if node.op == "call_module"]
    return any(name == target or name.startswith(f"{target}.") for target in called)


def quantize_activations(model: nn.Module, bits: int, ranges: dict[str, float], inplace: bool = False) -> nn.Module:
    """A copy of `model` with an `ActivationQuantizer` of `bits` bits in place of every ReLU.

    `ranges` gives the largest value x_max of each ReLU by module name, as `bn_ranges` and `minmax_ranges` do. A ReLU
    module that a network uses at several places, or under several names, has one quantizer, with the largest range of
    them. A ReLU that eval mode never calls, as that of an auxiliary head, stays. What else stays float (other
    activations, functions such as F.relu) is named in one warning.

    bits=32 changes nothing; inplace=True changes `model` itself and returns it. Raises ValueError for a ReLU without a
    range, and for a network of which an operation in place rewrites what is read again.
    """
    if bits == FLOAT_BITS:
        return model if inplace else copy_network(model)
    graph = _graph(model)
    quantizers: dict[str, ActivationQuantizer] = {}
    for name in relu_names(model):
        if name in ranges:
            in_place = getattr(model.get_submodule(name), "inplace", False)
            # On the model's device: a GPU divides by a scalar of the CPU's in another way, and ties fall differently.
            quantizer = ActivationQuantizer(bits, ranges[name], in_place).to(next(model.parameters()).device)
            quantizers[name] = quantizer
        elif graph and _is_called(name, graph):
            raise ValueError(f"no activation range is given for {name}")
    _warn_of_floats(_activations(model, graph), quantizers)
    quantized = model if inplace else copy_network(model)
    by_module = {quantized.get_submodule(name): quantizer for name, quantizer in quantizers.items()}
    for name, module in list(quantized.named_modules(remove_duplicate=False)):
        if module in by_module:
            quantized.set_submodule(name, by_module[module])
    _leave_fast_path(quantized)
    return quantized


def _warn_of_floats(activations: Sequence[tuple[str, str]], quantizers: dict[str, ActivationQuantizer]) -> None:
    left = [f"{name} ({kind})" for name, kind in activations if name not in quantizers]
    if left:
        more = f" and {len(left) - 3} more" if len(left) > 3 else ""
        message = f"{len(left)} of {len(activations)} activations stay float: {', '.join(left[:3])}{more}"
        warnings.warn(message, stacklevel=3)


def _leave_fast_path(model: nn.Module) -> None:
    """Has torch's transformer layers call their activation: a fused kernel of theirs applies a ReLU by itself."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer) and _has_quantizer(module):
            module.activation_relu_or_gelu = 0
        if isinstance(module, nn.TransformerEncoder) and any(map(_has_quantizer, module.layers)):
            module.use_nested_tensor = False


def _has_quantizer(layer: nn.Module) -> bool:
    """Whether the activation of a transformer layer is a quantizer."""
    return isinstance(getattr(layer, "activation", None), ActivationQuantizer)
