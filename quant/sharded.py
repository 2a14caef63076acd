"""Tensors that may be sharded over processes (DTensor), as FSDP2's are."""

from typing import TYPE_CHECKING, TypeGuard

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


def largest_magnitude(weight: Tensor) -> Tensor:
    """max|w|, 0-d. `weight` is not empty as a whole, but this process's part of it may be."""
    if not is_sharded(weight):
        return weight.abs().amax()
    from torch.distributed.tensor import DTensor, Partial, Replicate

    part, mesh = weight.to_local(), weight.device_mesh
    peak = part.abs().amax() if part.numel() else part.new_zeros(())
    return DTensor.from_local(peak, mesh, [Partial("max")] * mesh.ndim).redistribute(mesh, [Replicate()] * mesh.ndim)
