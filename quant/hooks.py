"""Running batches through a network: observing its layers, and leaving the network as it was."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import linear, multi_head_attention_forward
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode

Batch = Any  # images, or (images, labels, ...) as a data loader yields them
Observer = Callable[[str, Tensor, Any], None]  # takes a layer's name, its input and its output


def images_of(batch: Batch) -> Tensor:
    """The images of a batch: the batch itself if it is a tensor, or the first item of (images, labels, ...).

    Raises TypeError for any other batch, such as a dict, and ValueError for one without images.
    """
    images = batch[0] if isinstance(batch, (tuple, list)) and len(batch) else batch
    if not isinstance(images, Tensor):
        raise TypeError(f"a batch must be a tensor of images or (images, labels), got a {type(batch).__name__}")
    if not images.numel():
        raise ValueError(f"a batch must hold at least one image, got shape {list(images.shape)}")
    return images


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[nn.Module]:
    """Puts `model` in eval mode for the block. Each module returns to its own mode afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield model
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def unfused_attention() -> Iterator[None]:
    """Makes torch's attention and transformer layers compute step by step for the block. Their fused kernels call no
    layers, and ONNX lacks them."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@contextmanager
def restored_on_error(model: nn.Module) -> Iterator[nn.Module]:
    """Restores the parameters, buffers and modes of `model` if the block raises an exception."""
    kept = [(m, m.training, dict(m._parameters), dict(m._buffers)) for m in model.modules()]
    values = [(tensor, tensor.detach().clone()) for tensor in chain(model.parameters(), model.buffers())]
    try:
        yield model
    except BaseException:
        for module, training, parameters, buffers in kept:
            module.training = training
            module._parameters.clear()
            module._parameters.update(parameters)
            module._buffers.clear()
            module._buffers.update(buffers)
        with torch.no_grad():
            for tensor, value in values:
                tensor.copy_(value)
        raise


@torch.no_grad()
def watch(
    model: nn.Module, names: Iterable[str], batches: Iterable[Batch], observe: Observer, uncalled: Iterable[str] = ()
) -> int:
    """Runs `batches` through `model` in eval mode and passes each call of the modules `names` to `observe`.

    A call without elements, such as that of an expert without tokens, is left out. The input and the output are valid
    only during the call of `observe`: a later layer may overwrite them in place. An nn.MultiheadAttention has up to
    three inputs, each of which is passed once. It uses the weights of its out_proj without calling it; here it does
    call it, and so do the parents of the layers `uncalled` (see `call_layers`). Returns the number of batches.
    """
    names, seen = list(names), 0
    with ExitStack() as stack:
        for undo in call_layers(model, {*filter(partial(is_projection, model), names), *uncalled}):
            stack.callback(undo)
        for name in names:
            handle = model.get_submodule(name).register_forward_hook(_hook(name, observe), with_kwargs=True)
            stack.callback(handle.remove)
        stack.enter_context(unfused_attention())
        stack.enter_context(eval_mode(model))
        for batch in batches:
            model(images_of(batch))
            seen += 1
    return seen


def _hook(name: str, observe: Observer) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        held = [
            kwargs[place] if isinstance(place, str) else args[place] for place in input_places(module, args, kwargs)
        ]
        for value in {id(value): value for value in held}.values():
            if not isinstance(value, Tensor) or value.numel():  # an expert may have no rows
                observe(name, value, output)

    return hook


def input_places(layer: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[int | str]:
    """Where a call of `layer` has its inputs: indices of `args` and keys of `kwargs`.

    They are the query, key and value of an nn.MultiheadAttention, and the first argument of any other layer.
    """
    if isinstance(layer, nn.MultiheadAttention):
        return [*range(min(len(args), 3)), *({"query", "key", "value"} & kwargs.keys())]
    return [0] if args else [next(iter(kwargs))]


def is_projection(model: nn.Module, name: str) -> bool:
    """Whether the module `name` belongs to an nn.MultiheadAttention, which uses its weight without calling it."""
    return bool(name) and isinstance(model.get_submodule(name.rpartition(".")[0]), nn.MultiheadAttention)


def call_layers(model: nn.Module, names: Iterable[str]) -> list[Callable[[], None]]:
    """Makes the parents of the layers `names` call these layers wherever they pass their weights to F.linear or to
    F.multi_head_attention_forward. The outputs stay the same, and hooks of the layers run.

    Returns functions that undo it.
    """
    children: dict[nn.Module, list[str]] = defaultdict(list)
    for name in names:
        parent, _, child = name.rpartition(".")
        children[model.get_submodule(parent)].append(child)
    undo: list[Callable[[], None]] = []
    for module, own in children.items():
        before = vars(module).get("forward")
        if isinstance(before, partial) and before.func is _forward:
            continue  # it calls them already
        undo.append(partial(_restore, module, before))
        module.forward = partial(_forward, module.forward, module, own)
    return undo


def _restore(module: nn.Module, forward: Callable[..., Any] | None) -> None:
    del module.forward
    if forward is not None:
        module.forward = forward


def _forward(forward: Callable[..., Any], parent: nn.Module, children: Sequence[str], *args: Any, **kwargs: Any) -> Any:
    # Cached, so that a parametrized weight is the same tensor wherever it is read.
    with parametrize.cached(), _Calls(parent, children):
        return forward(*args, **kwargs)


class _Calls(TorchFunctionMode):
    """Replaces functions that are given the weight of one of the `children` of `parent` by calls of that layer."""

    def __init__(self, parent: nn.Module, children: Sequence[str]) -> None:
        super().__init__()
        self.layers = [parent.get_submodule(name) for name in children]
        self.batch_first = getattr(parent, "batch_first", False)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is linear:
            x, weight, bias = _linear_arguments(*args, **kwargs)
            layer = self.layer_of(weight)
            if layer and layer.bias is bias:
                return layer(x)
            if layer and bias is not None:
                return functional_call(layer, {"bias": bias}, (x,))
        elif func is multi_head_attention_forward:
            weight = args[11]  # of the last projection
            if layer := self.layer_of(weight):
                # Attention with an identity as its last projection, which is exact, and then the projection itself.
                identity = torch.eye(weight.shape[1], dtype=weight.dtype, device=weight.device)
                output, shares = func(*args[:11], identity, None, *args[13:], **kwargs)
                swaps = self.batch_first and output.dim() == 3  # the function has the batch second
                output = layer(output.transpose(0, 1)).transpose(0, 1) if swaps else layer(output)
                return output, shares
        return func(*args, **kwargs)

    def layer_of(self, weight: Tensor) -> nn.Module | None:
        """The layer that has this weight."""
        return next((layer for layer in self.layers if getattr(layer, "weight", None) is weight), None)


def _linear_arguments(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple[Any, ...]:
    """The arguments of F.linear, which may be given by name."""
    return input, weight, bias
