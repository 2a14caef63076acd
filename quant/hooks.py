"""Running batches through a network: observing its layers, and leaving the network as it was."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

Batch = Any  # images, or (images, labels, ...) as a data loader yields them
Observer = Callable[[str, Tensor, Tensor], None]  # takes a layer's name, its input and its output


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
def watch(model: nn.Module, names: Iterable[str], batches: Iterable[Batch], observe: Observer) -> int:
    """Runs `batches` through `model` in eval mode and passes each call of the modules `names` to `observe`.

    The input and the output are valid only during the call of `observe`: a later layer may overwrite them in place. An
    nn.MultiheadAttention uses the weights of its out_proj without calling it; here it does call it. Returns the number
    of batches.
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
    """Makes `attention` call its out_proj as a layer. The attention itself runs with an identity in place of out_proj,
    which is exact; out_proj is then applied to the result."""
    layer = attention.out_proj

    def set_aside(*_: Any) -> None:
        weight = layer.weight  # computed anew at each access, if it is parametrized
        identity = nn.Linear(len(weight), len(weight), layer.bias is not None, device="meta")
        identity.weight = nn.Parameter(torch.eye(len(weight)).to(weight), requires_grad=False)
        if layer.bias is not None:
            identity.bias = nn.Parameter(torch.zeros_like(layer.bias), requires_grad=False)
        attention._modules["out_proj"] = identity

    def project(module: nn.Module, args: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        attention._modules["out_proj"] = layer
        return layer(outputs[0]), *outputs[1:]

    handles = [attention.register_forward_pre_hook(set_aside), attention.register_forward_hook(project)]
    try:
        yield
    finally:
        attention._modules["out_proj"] = layer
        for handle in handles:
            handle.remove()
