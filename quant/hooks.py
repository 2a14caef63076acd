"""Running batches through a network: what its layers see, and how to leave the network as it was."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

Batch = Any  # images, or (images, labels, ...) as a data loader gives them
Observer = Callable[[str, Tensor, Tensor], None]  # takes a layer's name, its input and its output


def images_of(batch: Batch) -> Tensor:
    """The images of a batch: the batch itself, or the first of (images, labels, ...).

    Raises TypeError for anything else, such as a dict.
    """
    images = batch[0] if isinstance(batch, (tuple, list)) and len(batch) else batch
    if not isinstance(images, Tensor):
        raise TypeError(f"a batch must be a tensor of images or (images, labels), got a {type(batch).__name__}")
    return images


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[nn.Module]:
    """`model` in eval mode; each module has its own mode back afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield model
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def restored_on_error(model: nn.Module) -> Iterator[nn.Module]:
    """After an exception in the block `model` has the parameters, buffers and modes that it had before."""
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
def watch(model: nn.Module, names: Iterable[str], batches: Iterable[Batch], observe: Observer) -> int:
    """Runs `batches` through `model` in eval mode and shows each call of the modules `names` to `observe`.

    An input or output is valid during the call only: a layer behind it may work in place. The out_proj of an
    nn.MultiheadAttention, whose weights are used without a call, is called here. Returns the number of batches.
    """
    seen = 0
    with ExitStack() as stack:
        for name in names:
            module = model.get_submodule(name)
            parent = model.get_submodule(name.rpartition(".")[0])
            if isinstance(parent, nn.MultiheadAttention):
                stack.enter_context(_called_projection(parent))
            handle = module.register_forward_hook(_hook(name, observe), with_kwargs=True)
            stack.callback(handle.remove)
        stack.enter_context(eval_mode(model))
        for batch in batches:
            model(images_of(batch))
            seen += 1
    return seen


def _hook(name: str, observe: Observer) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        observe(name, args[0] if args else next(iter(kwargs.values())), output)

    return hook


@contextmanager
def _called_projection(attention: nn.MultiheadAttention) -> Iterator[None]:
    """Makes `attention` call its out_proj as a layer: it runs with the identity in its place, which is exact, and
    out_proj is applied to what comes out."""
    layer = attention.out_proj
    own = dict(layer._parameters)

    def set_aside(*_: Any) -> None:
        weight = layer.weight
        layer._parameters["weight"] = nn.Parameter(torch.eye(len(weight)).to(weight), requires_grad=False)
        if layer.bias is not None:
            layer._parameters["bias"] = nn.Parameter(torch.zeros_like(layer.bias), requires_grad=False)

    def project(module: nn.Module, args: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        layer._parameters.update(own)
        return layer(outputs[0]), *outputs[1:]

    handles = [attention.register_forward_pre_hook(set_aside), attention.register_forward_hook(project)]
    try:
        yield
    finally:
        layer._parameters.update(own)
        for handle in handles:
            handle.remove()
