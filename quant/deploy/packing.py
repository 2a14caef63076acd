"""Integers of 2 to 8 bits packed without padding: two 4-bit values per byte, eight 3-bit values per three bytes."""

import torch
from torch import Tensor

from ..grid import check_bits


def pack_bits(values: Tensor, bits: int) -> Tensor:
    """Packs integers -2^(bits-1) ... 2^(bits-1) - 1, of any shape and dtype, into uint8 [ceil(numel * bits / 8)].

    The values are in two's complement, in the order of the elements, lowest bit first. Zeros pad the last byte. Raises
    ValueError for a value outside that range and for bits outside 2..8.
    """
    limit = 2 ** (check_bits(bits) - 1)
    flat = values.reshape(-1)
    low, high = (flat.min().item(), flat.max().item()) if flat.numel() else (0, 0)
    if low < -limit or high >= limit:
        raise ValueError(f"values from {low} to {high} do not fit {bits} bits")
    places = torch.arange(bits, device=flat.device)
    ones = ((flat.to(torch.int16)[:, None] >> places) & 1).reshape(-1)
    ones = torch.nn.functional.pad(ones, (0, -ones.numel() % 8)).view(-1, 8)
    return (ones << torch.arange(8, device=flat.device)).sum(1).to(torch.uint8)


def unpack_bits(packed: Tensor, bits: int, count: int) -> Tensor:
    """Unpacks `count` values that `pack_bits` packed, into int8 [count].

    Raises ValueError if `packed` is not uint8 of the length that `count` values need, and for bits outside 2..8.
    """
    expected = (count * check_bits(bits) + 7) // 8
    if packed.dtype != torch.uint8 or packed.dim() != 1 or len(packed) != expected:
        shape = f"{packed.dtype} {list(packed.shape)}"
        raise ValueError(f"{count} values of {bits} bits need uint8 [{expected}], got {shape}")
    ones = (packed[:, None].to(torch.int16) >> torch.arange(8, device=packed.device)) & 1
    ones = ones.reshape(-1)[: count * bits].view(count, bits)
    unsigned = (ones << torch.arange(bits, device=packed.device)).sum(1)
    return (unsigned - ((unsigned >> (bits - 1)) << bits)).to(torch.int8)
