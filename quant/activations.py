"""Activation quantizers in place of a network's ReLUs, and the data-free ranges that batch norm gives them."""

import copy
from collections import Counter
from typing import NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.fx.proxy import TraceError

from .grid import FLOAT_BITS, activation_quant_max, fake_quantize, nonzero_scale


class Quantizer(nn.Module):
    """Rounds to the integers quant_min ... quant_max times a step, of which `largest` is the last."""

    def __init__(self, largest: float, quant_min: int, quant_max: int) -> None:
        super().__init__()
        if not 0 <= largest < float("inf"):
            raise ValueError(f"the activation range must be a finite number >= 0, got {largest!r}")
        self.quant_min, self.quant_max = quant_min, quant_max
        self.register_buffer("scale", nonzero_scale(torch.tensor(largest / quant_max)))

    def forward(self, x: Tensor) -> Tensor:
        return fake_quantize(x, self.scale.to(x.dtype), self.quant_min, self.quant_max)

    def extra_repr(self) -> str:
        return f"integers {self.quant_min} to {self.quant_max}, largest={self.scale.item() * self.quant_max:.6g}"


class ActivationQuantizer(Quantizer):
    """ReLU and quantizer in one: clamps to [0, x_max] and rounds to the 2^bits levels of that range.

    An x_max of 0, a ReLU that was never seen to fire, gives a step of 1. Raises ValueError for bits outside 2..8 or an
    x_max that is negative or not finite.
    """

    def __init__(self, bits: int, x_max: float) -> None:
        super().__init__(x_max, 0, activation_quant_max(bits))


class SumQuantizer(Quantizer):
    """Rounds to integers -128 ... 127 of a step absmax / 127: what a residual sum takes.

    An absmax of 0 gives a step of 1. Raises ValueError for an absmax that is negative or not finite.
    """

    def __init__(self, absmax: float) -> None:
        super().__init__(absmax, -128, 127)


class _Tracer(fx.Tracer):
    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return isinstance(module, Quantizer) or super().is_leaf_module(module, name)


def trace(model: nn.Module) -> fx.Graph:
    """The torch.fx graph of `model`, in which an activation quantizer is one node.

    Raises torch.fx's TraceError, a ValueError, naming a module that is called without a positional argument.
    """
    graph = _Tracer().trace(model)
    for node in graph.nodes:
        if node.op == "call_module" and not node.args:
            raise TraceError(f"{node.target} is called without a positional argument: its input cannot be followed")
    return graph


def relu_names(model: nn.Module) -> list[str]:
    """Names of the ReLU modules of `model`. Raises ValueError if it has none."""
    names = [name for name, module in model.named_modules() if isinstance(module, nn.ReLU)]
    if not names:
        raise ValueError(f"{type(model).__name__} has no nn.ReLU module to put an activation quantizer at")
    return names


def quantize_activations(model: nn.Module, bits: int, ranges: dict[str, float], inplace: bool = False) -> nn.Module:
    """A copy of `model` with an `ActivationQuantizer` of `bits` bits in place of every ReLU.

    `ranges` gives the largest value x_max of each ReLU by module name, as `bn_ranges` and `minmax_ranges` do. A ReLU
    module that a network uses at several places, or under several names, has one quantizer, with the largest range of
    them.
    bits=32 changes nothing; inplace=True changes `model` itself and returns it. Raises ValueError for a ReLU without a
    range.
    """
    quantized = model if inplace else copy.deepcopy(model)
    if bits == FLOAT_BITS:
        return quantized
    quantizers: dict[nn.Module, ActivationQuantizer] = {}
    for name in relu_names(quantized):
        if name not in ranges:
            raise ValueError(f"no activation range is given for {name}")
        # On the model's device: a GPU divides by a scalar of the CPU's in another way, and ties fall differently.
        quantizer = ActivationQuantizer(bits, ranges[name]).to(next(model.parameters()).device)
        quantizers[quantized.get_submodule(name)] = quantizer
    for name, module in list(quantized.named_modules(remove_duplicate=False)):
        if module in quantizers:
            quantized.set_submodule(name, quantizers[module])
    return quantized


def is_sum(node: fx.Node) -> bool:
    """Whether `node` of a traced graph adds two activations, as they are (torch.add has an alpha)."""
    operation = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    operands = len(node.args) == 2 and all(isinstance(operand, fx.Node) for operand in node.args)
    return operation in ("add", "iadd", "add_") and operands and not node.kwargs


def conv_norm_pairs(model: nn.Module, graph: fx.Graph) -> list[tuple[fx.Node, fx.Node]]:
    """Calls of 2-d convolutions, each with the call of the batch norm with running statistics that alone follows it.

    `graph` is `trace(model)`. Modules that the network calls more than once are left out.
    """
    calls = [node for node in graph.nodes if node.op == "call_module"]
    uses = Counter(node.target for node in calls)
    pairs = []
    for node in calls:
        before = node.args[0]
        if before.op != "call_module" or uses[before.target] > 1 or uses[node.target] > 1 or len(before.users) > 1:
            continue
        conv, norm = model.get_submodule(before.target), model.get_submodule(node.target)
        if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d) and norm.track_running_stats:
            pairs.append((before, node))
    return pairs


class ChannelStatistics(NamedTuple):
    """Mean and variance of an activation, one value a channel (float tensors [C])."""

    mean: Tensor
    var: Tensor


@torch.no_grad()
def bn_ranges(model: nn.Module, n: float = 6.0, shortcut: bool = True) -> dict[str, float]:
    """Data-free range of every ReLU: the maximum over channels of mean + n * standard deviation of what feeds it.

    Batch norm says these statistics: its output has mean beta and standard deviation |gamma|. For a ReLU after a
    residual sum, shortcut=True (ours) adds the mean and variance of the shortcut, taken as independent, an earlier
    ReLU's output being a rectified normal variable; shortcut=False is the published rule, which looks at the batch
    norm of the main branch (the first operand of the sum) alone.

    Raises ValueError naming the ReLU that no batch norm feeds, or whose input cannot be followed to one.
    """
    traced = fx.symbolic_trace(model)
    known: dict[fx.Node, ChannelStatistics] = {}

    def statistics(node: fx.Node) -> ChannelStatistics:
        if node not in known:
            known[node] = follow(node)
        return known[node]

    def follow(node: fx.Node) -> ChannelStatistics:
        module = traced.get_submodule(node.target) if node.op == "call_module" else None
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)) and module.affine:
            return ChannelStatistics(module.bias, module.weight.square())
        if isinstance(module, nn.ReLU):
            return rectified(statistics(node.args[0]))
        if isinstance(module, (nn.Identity, nn.Dropout)):
            return statistics(node.args[0])
        if is_sum(node):
            main = statistics(node.args[0])
            if not shortcut:
                return main
            other = statistics(node.args[1])
            return ChannelStatistics(main.mean + other.mean, main.var + other.var)
        raise LookupError(str(node.target))

    ranges: dict[str, float] = {}
    for node in traced.graph.nodes:
        if node.op == "call_module" and isinstance(traced.get_submodule(node.target), nn.ReLU):
            try:
                mean, var = statistics(node.args[0])
            except LookupError as error:
                raise ValueError(
                    f"no batch norm feeds {node.target} (found {error}): its range must be calibrated on images"
                ) from None
            ranges[node.target] = max(ranges.get(node.target, 0.0), (mean + n * var.sqrt()).max().item())
    return ranges


def rectified(x: ChannelStatistics) -> ChannelStatistics:
    """Statistics of max(0, x) for normal x, in closed form."""
    std = x.var.sqrt().clamp_min(torch.finfo(x.var.dtype).tiny)
    ratio = x.mean / std
    density = torch.exp(-0.5 * ratio.square()) / (2 * torch.pi) ** 0.5
    share = torch.special.ndtr(ratio)
    mean = x.mean * share + std * density
    second_moment = (x.mean.square() + x.var) * share + x.mean * std * density
    return ChannelStatistics(mean, (second_moment - mean.square()).clamp_min(0))
