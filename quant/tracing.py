"""torch.fx graphs of networks. Networks that their graph would misrepresent are refused."""

import inspect
import operator
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import fx, nn
from torch.fx.node import map_arg
from torch.fx.proxy import TraceError
from torch.utils._pytree import tree_leaves

from .hooks import Batch, eval_mode, images_of
from .layers import is_relu
from .quantizers import Quantizer

# Operations whose result may share memory with their first argument. Dropout and the like do so in eval mode.
VIEWS = {
    "as_strided", "atleast_1d", "atleast_2d", "atleast_3d", "broadcast_to", "chunk", "contiguous", "cpu", "cuda",
    "detach", "diagonal", "double", "dsplit", "expand", "expand_as", "flatten", "float", "getattr", "getitem", "hsplit",
    "movedim", "moveaxis", "narrow", "pad", "permute", "positive", "ravel", "real", "reshape", "reshape_as", "select",
    "split", "split_with_sizes", "squeeze", "swapaxes", "swapdims", "t", "tensor_split", "to", "transpose", "type",
    "type_as", "unbind", "unflatten", "unfold", "unsafe_chunk", "unsafe_split", "unsqueeze", "view", "view_as",
    "view_as_real", "vsplit",
    "alpha_dropout", "drop_path", "dropout", "dropout1d", "dropout2d", "dropout3d", "feature_alpha_dropout",
    "stochastic_depth",
}  # fmt: skip
DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
VIEW_LAYERS = (nn.Identity, nn.Flatten, nn.Unflatten, *DROPOUTS)
# `x += y` and the like. torch.fx would record them as `x = x + y`, which leaves other references to x unchanged.
IN_PLACE_OPERATORS = (
    "iadd", "iand", "ifloordiv", "ilshift", "imatmul", "imod", "imul", "ior", "ipow", "irshift", "isub", "itruediv",
    "ixor",
)  # fmt: skip


class _Proxy(fx.Proxy):
    """A proxy that records in-place operators as such."""


def _recorded(name: str) -> Callable[[fx.Proxy, Any], fx.Proxy]:
    return lambda self, other: self.tracer.create_proxy("call_function", getattr(operator, name), (self, other), {})


for _name in IN_PLACE_OPERATORS:
    setattr(_Proxy, f"__{_name}__", _recorded(_name))


class _Tracer(fx.Tracer):
    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return isinstance(module, Quantizer) or is_relu(module) or super().is_leaf_module(module, name)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)


class InPlaceError(TraceError):
    """A network reads a tensor again after an in-place operation has overwritten it. Code that analyzes a graph assumes
    that the value of a node does not change."""


def trace(model: nn.Module) -> fx.Graph:
    """The torch.fx graph of `model` in eval mode. An activation quantizer is a single node.

    Raises TraceError (of torch.fx, a ValueError) for a network that torch.fx cannot trace, and for a module that is
    called without a positional argument. Raises its subclass InPlaceError for a network that reads a tensor again after
    an in-place operation has overwritten it.
    """
    try:
        with eval_mode(model):
            graph = _Tracer().trace(model)
    except Exception as error:  # code that expects a tensor may raise anything on a proxy
        reason = " ".join(str(error).split()) or type(error).__name__
        raise TraceError(f"{type(model).__name__} cannot be traced by torch.fx ({reason})") from error
    for node in graph.nodes:
        if node.op == "call_module" and not node.args:
            raise TraceError(f"{node.target} is called without a positional argument: its input cannot be followed")
    _check_in_place(model, graph)
    return graph


def operation(node: fx.Node) -> str:
    """Name of the function or method that `node` calls, or path of the module."""
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))


def called_module(model: nn.Module, node: fx.Node) -> nn.Module | None:
    """The module of `model` that `node` calls, or None if it calls something else."""
    return model.get_submodule(operation(node)) if node.op == "call_module" else None


def _written(model: nn.Module, node: fx.Node) -> list[fx.Node]:
    """The arguments that `node` overwrites."""
    if out := _nodes_in(node.kwargs.get("out")):
        return out
    first = _nodes_in(next(iter([*node.args, *node.kwargs.values()]), None))
    if node.op == "call_module":
        return first if getattr(called_module(model, node), "inplace", False) else []
    if node.op not in ("call_method", "call_function"):
        return []
    name = operation(node)
    in_place = name in IN_PLACE_OPERATORS or (name.endswith("_") and not name.endswith("__"))
    return [written for written in first if (in_place or _says_in_place(node)) and not _is_size(written)]


def _nodes_in(argument: Any) -> list[fx.Node]:
    """The nodes in an argument: itself, or those in a list, as the functions torch._foreach_... take them."""
    found: list[fx.Node] = []
    map_arg(argument, found.append)
    return found


def _is_size(node: fx.Node) -> bool:
    """Whether `node` is a size of a tensor or computed from sizes. It is then a number, which nothing overwrites."""
    if operation(node) in ("size", "dim", "len") or (operation(node) == "getattr" and node.args[1] == "shape"):
        return True
    inputs = node.all_input_nodes
    return node.op == "call_function" and bool(inputs) and all(map(_is_size, inputs))


def _says_in_place(node: fx.Node) -> bool:
    """Whether a function such as relu is called with inplace=True, by name or by position."""
    if isinstance(node.target, str):  # the name of a method or a module
        return bool(node.kwargs.get("inplace"))
    try:
        arguments = inspect.signature(node.target).bind(*node.args, **node.kwargs).arguments
    except (TypeError, ValueError):  # built-in functions have no signature
        arguments = node.kwargs
    return bool(arguments.get("inplace"))


def _shares_memory(model: nn.Module, node: fx.Node) -> bool:
    if node.op == "call_module":
        return isinstance(called_module(model, node), VIEW_LAYERS)
    return node.op in ("call_method", "call_function") and operation(node) in VIEWS


def _check_in_place(model: nn.Module, graph: fx.Graph) -> None:
    """Raises InPlaceError, naming both nodes, if a node reads a value after another node has overwritten it."""
    source: dict[fx.Node, fx.Node] = {}  # from a node to the node whose memory it shares
    attributes: dict[object, fx.Node] = {}  # from a name to the first node that reads it
    writers: dict[fx.Node, list[fx.Node]] = defaultdict(list)  # by the first node with that memory

    def history(node: fx.Node) -> list[fx.Node]:
        names = [node]
        while names[-1] in source:
            names.append(source[names[-1]])
        return names

    for node in graph.nodes:
        for operand in node.all_input_nodes:
            names = history(operand)
            for writer in writers[names[-1]]:
                if writer not in names:
                    raise InPlaceError(
                        f"{operation(writer)} ({writer.name}) works in place, and {node.name} reads {operand.name}, "
                        "which it has overwritten: a graph cannot represent this; use an operation that returns a "
                        "new tensor (inplace=False)"
                    )
        if node.op == "get_attr" and attributes.setdefault(node.target, node) is not node:
            source[node] = attributes[node.target]
        written = _written(model, node)
        if written:
            source[node] = written[0]
            for operand in written:
                writers[history(operand)[-1]].append(node)
        elif node.args and isinstance(node.args[0], fx.Node) and _shares_memory(model, node):
            source[node] = node.args[0]


@torch.no_grad()
def check_same(model: nn.Module, rewritten: nn.Module, batches: Iterable[Batch]) -> None:
    """Raises ValueError if the output of `rewritten`, made from the graph of `model`, differs on `batches` from that of
    `model`. Of an output that is a tuple, a list or a dict, all tensors are compared."""
    with eval_mode(model), eval_mode(rewritten):
        for batch in batches:
            images = images_of(batch)
            outputs, others = _tensors_in(model(images)), _tensors_in(rewritten(images))
            if len(outputs) != len(others) or not all(map(_agree, outputs, others)):
                raise ValueError(f"the traced graph of {type(model).__name__} does not compute what the network does")


def _tensors_in(output: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor)]


def _agree(output: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether `other` is `output` up to rounding, whatever the magnitude of the numbers."""
    if output.shape != other.shape or not output.is_floating_point():
        return torch.equal(output, other)
    finite = output[output.isfinite()]
    largest = finite.abs().amax().item() if finite.numel() else 0.0
    return torch.allclose(output, other, rtol=1e-3, atol=1e-4 * largest, equal_nan=True)


def is_sum(node: fx.Node) -> bool:
    """Whether `node` of a traced graph adds two activations without scaling one (torch.add can, by its alpha)."""
    operands = len(node.args) == 2 and all(isinstance(operand, fx.Node) for operand in node.args)
    return operation(node) in ("add", "iadd", "add_") and operands and not node.kwargs


def conv_norm_pairs(model: nn.Module, graph: fx.Graph) -> list[tuple[fx.Node, fx.Node]]:
    """Pairs of calls: a 2-d convolution, and a batch norm with running statistics, the only reader of its output.

    `graph` is `trace(model)`. Modules that the network calls more than once are left out, and so are convolutions with
    a computed weight, as by weight_norm.
    """
    calls = [node for node in graph.nodes if node.op == "call_module"]
    uses = Counter(node.target for node in calls)
    pairs = []
    for node in calls:
        before = node.args[0]
        if not isinstance(before, fx.Node) or before.op != "call_module" or len(before.users) > 1:
            continue
        if uses[before.target] > 1 or uses[node.target] > 1:
            continue
        conv, norm = called_module(model, before), called_module(model, node)
        own_weight = isinstance(conv, nn.Conv2d) and "weight" in conv._parameters
        if own_weight and isinstance(norm, nn.BatchNorm2d) and norm.track_running_stats:
            pairs.append((before, node))
    return pairs
