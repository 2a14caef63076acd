"""Tensors that may be sharded over processes (DTensor), as FSDP2's are."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeGuard

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def is_sharded(tensor: Tensor) -> TypeGuard["DTensor"]:
    """Whether `tensor` is a DTensor. This process may hold only a part of it, or nothing."""
    return hasattr(tensor, "full_tensor")


def number(value: Tensor) -> float:
    """The 0-d `value` as a Python number. For a DTensor it is the value over all processes; .item() would read only
    this process's part."""
    return (value.full_tensor() if is_sharded(value) else value).item()


def is_all_zeros(weight: Tensor) -> bool:
    """Whether `weight`, which may be sharded, has at least one element and all of them are zero."""
    return weight.numel() > 0 and not weight.is_meta and number(largest_magnitude(weight.detach())) == 0


def other_dims(tensor: Tensor, own: Sequence[int]) -> tuple[int, ...]:
    """All dims of `tensor` but `own`."""
    return tuple(dim for dim in range(tensor.dim()) if dim not in own)


def largest_magnitude(weight: Tensor, own: Sequence[int] = ()) -> Tensor:
    """max|w|, 0-d; or for each index of the dims `own`, with a size of 1 in all others.

    `weight` is not empty as a whole, but this process's part of it may be.
    """
    dims = other_dims(weight, own)
    if not is_sharded(weight) or any(getattr(placement, "dim", None) in own for placement in weight.placements):
        return _peak(weight, dims, bool(own))
    from torch.distributed.tensor import DTensor, Partial, Replicate

    part, mesh = weight.to_local(), weight.device_mesh
    sizes = [size if dim in own else 1 for dim, size in enumerate(weight.shape)] if own else []
    peak = _peak(part, dims, bool(own)) if part.numel() else part.new_zeros(sizes)
    return DTensor.from_local(peak, mesh, [Partial("max")] * mesh.ndim).redistribute(mesh, [Replicate()] * mesh.ndim)


def largest_magnitudes(weights: "list[DTensor]") -> "list[DTensor]":
    """max|w| of each of `weights` of one mesh, 0-d, with one reduction for all."""
    from torch.distributed.tensor import DTensor, Replicate

    def peak(part: Tensor) -> Tensor:
        return _peak(part, other_dims(part, ()), False) if part.numel() else part.new_zeros(())

    mesh, parts = weights[0].device_mesh, [weight.to_local() for weight in weights]
    peaks = reduced(weights, torch.stack([*map(peak, parts)]), "max")
    return [DTensor.from_local(value, mesh, [Replicate()] * mesh.ndim, run_check=False) for value in peaks.unbind()]


def local(tensors: list[Tensor]) -> list[Tensor]:
    """This process's parts of those of `tensors` that are sharded, and the others."""
    return [tensor.to_local() if is_sharded(tensor) else tensor for tensor in tensors]


def mean_squares(tensors: list[Tensor]) -> Tensor:
    """Mean square of each of `tensors`: float32, shape [len(tensors)]. That of sharded tensors, all of one mesh, is
    over all processes, with one reduction for all."""
    return means(tensors, squares(local(tensors)))


def squares(tensors: list[Tensor]) -> Tensor:
    """Sum of squares of each of `tensors`, which are not sharded: float32, shape [len(tensors)]."""
    return torch.stack(list(torch._foreach_norm(tensors))).float().square()


def means(tensors: list[Tensor], sums: Tensor) -> Tensor:
    """`sums` [len(tensors)] over this process's part of each tensor, as means over all of the tensor."""
    sharded = list(filter(is_sharded, tensors))
    sums = reduced(sharded, sums, "sum") if sharded else sums
    # Numbers, as a tensor of counts would have to be copied to the device.
    return torch.stack(list(torch._foreach_div(list(sums.unbind()), [float(tensor.numel()) for tensor in tensors])))


def reduced(tensors: "list[DTensor]", values: Tensor, reduction: str) -> Tensor:
    """`values`, one of this process's part of each of `tensors` of one mesh, reduced over all parts: "max" or "sum".

    One reduction serves all that are cut along the same dims of the mesh.
    """
    from torch.distributed.tensor import DTensor, Partial, Replicate

    alike: dict[tuple[bool, ...], list[int]] = {}
    for index, tensor in enumerate(tensors):
        alike.setdefault(tuple(placement.is_replicate() for placement in tensor.placements), []).append(index)
    found: dict[int, Tensor] = {}
    for whole, indices in alike.items():
        placements = [Replicate() if kept else Partial(reduction) for kept in whole]
        parts = torch.stack([values[index] for index in indices])
        total = DTensor.from_local(parts, tensors[0].device_mesh, placements).full_tensor()
        found |= dict(zip(indices, total.unbind()))
    return torch.stack([found[index] for index in range(len(tensors))])


def _peak(weight: Tensor, dims: tuple[int, ...], keepdim: bool) -> Tensor:
    """max|w| over `dims`, without a copy of the weight."""
    if not dims:  # torch would take none of the dims for all of them
        return weight.abs()
    return torch.maximum(weight.amax(dims, keepdim=keepdim), weight.amin(dims, keepdim=keepdim).neg())
