"""Integers of 2 to 8 bits packed without padding: two 4-bit values per byte, eight 3-bit values per three bytes."""

import torch
from torch import Tensor

from ..grid import check_bits

PIECE = 1 << 18  # values that are packed at a time, each of which takes a byte for each bit; a multiple of 8


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
    return torch.cat([_packed(part.to(torch.int8), bits) for part in torch.split(flat, PIECE)])


def _packed(values: Tensor, bits: int) -> Tensor:
    ones = _bits(values.view(torch.uint8), bits).reshape(-1)
    return _number(torch.nn.functional.pad(ones, (0, -ones.numel() % 8)).view(-1, 8))


def _bits(values: Tensor, count: int) -> Tensor:
    """The lowest `count` bits of each of the uint8 `values` [N], lowest first: uint8 [N, count]."""
    return (values[:, None] >> torch.arange(count, dtype=torch.uint8, device=values.device)) & 1


def _number(ones: Tensor) -> Tensor:
    """The reverse of `_bits`: uint8 [N]."""
    places = torch.arange(ones.shape[1], dtype=torch.uint8, device=ones.device)
    return (ones << places).sum(1, dtype=torch.uint8)


def unpack_bits(packed: Tensor, bits: int, count: int) -> Tensor:
    """Unpacks `count` values that `pack_bits` packed, into int8 [count].

    Raises ValueError if `packed` is not uint8 of the length that `count` values need, and for bits outside 2..8.
    """
    expected = (count * check_bits(bits) + 7) // 8
    if packed.dtype != torch.uint8 or packed.dim() != 1 or len(packed) != expected:
        shape = f"{packed.dtype} {list(packed.shape)}"
        raise ValueError(f"{count} values of {bits} bits need uint8 [{expected}], got {shape}")
    return torch.cat([_unpacked(part, bits) for part in torch.split(packed, PIECE // 8 * bits)])[:count]


def _unpacked(packed: Tensor, bits: int) -> Tensor:
    """All values that `packed` has room for."""
    ones = _bits(packed, 8).reshape(-1)
    whole = _number(ones[: len(ones) // bits * bits].view(-1, bits))
    return (whole << 8 - bits).view(torch.int8) >> 8 - bits  # the highest bit is the sign
