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


def _peak(weight: Tensor, dims: tuple[int, ...], keepdim: bool) -> Tensor:
    """max|w| over `dims`, without a copy of the weight."""
    if not dims:  # torch would take none of the dims for all of them
        return weight.abs()
    return torch.maximum(weight.amax(dims, keepdim=keepdim), weight.amin(dims, keepdim=keepdim).neg())
